"""The linears of a model, and the blocks that they stand in."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..families import Family
from ..nn import is_pointwise_conv


def find_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Every `nn.Linear` and 1×1 convolution by name."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or is_pointwise_conv(module):
            found[name] = module
    return found


def read_directly(model: nn.Module, linears: dict[str, nn.Module]) -> set[str]:
    """Names of linears whose weight their parent reads instead of calling them: torch's own attention modules."""
    direct = {name for name, module in linears.items() if isinstance(module, NonDynamicallyQuantizableLinear)}
    for name, module in model.named_modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            direct |= {f"{name}.{leaf}".lstrip(".") for leaf in ("linear1", "linear2")}
    return direct


def shared_linears(model: nn.Module, linears: dict[str, nn.Module]) -> set[str]:
    """Names of linears that the model holds under another name too."""
    count: dict[int, int] = {}
    for _, module in model.named_modules(remove_duplicate=False):
        count[id(module)] = count.get(id(module), 0) + 1
    return {name for name, module in linears.items() if count[id(module)] > 1}


def find_blocks(model: nn.Module, family: Family) -> list[str]:
    """Names of the model's blocks: elements of the outermost module lists, and a UNet's middle block."""
    lists = list(family.blocks)
    if not lists:
        found = _block_lists(model)
        projections = projection_lists(model, family)
        lists = [name for name in found if name not in projections]
    blocks = [f"{name}.{i}".lstrip(".") for name in lists for i in range(len(model.get_submodule(name)))]  # type: ignore[arg-type]
    if hasattr(model, "mid_block") and model.mid_block is not None:
        blocks.append("mid_block")
    return blocks


def projection_lists(model: nn.Module, family: Family) -> list[str]:
    """Names of lists that hold one linear per element beside lists of whole blocks: what the blocks read is projected
    there, for each by a linear of its own."""
    if family.blocks:
        return []
    lists = _block_lists(model)
    found = [name for name in lists if all(_is_projection(child) for child in model.get_submodule(name).children())]
    return found if len(found) < len(lists) else []


def block_of(name: str, blocks: list[str]) -> str:
    return next((block for block in blocks if f"{name}.".startswith(block + ".")), "")


def _block_lists(model: nn.Module) -> list[str]:
    lists: list[str] = []
    for name, module in model.named_modules():
        nested = any(not outer or f"{name}.".startswith(f"{outer}.") for outer in lists)
        if not nested and _is_block_list(module):
            lists.append(name)
    return lists


def _is_block_list(module: nn.Module) -> bool:
    """Whether the elements are blocks, not layers: modules of modules. A sequence must repeat one class."""
    children = list(module.children())
    blocks = [child for child in children if any(isinstance(m, nn.Linear) for m in child.modules() if m is not child)]
    if isinstance(module, nn.ModuleList):
        # A feed-forward network is a list, too, of an activation with its linear and another linear.
        return bool(blocks) and not any(isinstance(child, nn.Linear) for child in children)
    return isinstance(module, nn.Sequential) and len(blocks) > 1 and len({type(block) for block in blocks}) == 1


def _is_projection(module: nn.Module) -> bool:
    """Whether it is one linear, perhaps with a norm or an activation beside it."""
    linears = [part for part in module.children() if isinstance(part, nn.Linear)]
    return len(linears) == 1 and sum(parameter.ndim > 1 for parameter in module.parameters()) == 1
