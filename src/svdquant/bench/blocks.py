"""The suite of blocks: FLUX.1's double and single block, ours beside diffusers in 16 bits."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import LayerSpec, SVDQuantConfig
from ..families import fused
from ..nn import SVDQuantLinear, make_layer, quantized_layers, replace_module
from ..nn.linear import empty_tensors
from ..numerics import FORMATS, SVDQuantTensors, relative_error
from ..ptq import Plan, make_plan
from .device import Device
from .measure import Contender, measure
from .profile import profile
from .results import BASELINE, OURS, Case, Row
from .settings import BlockSize, Settings

REFERENCE = "diffusers bf16"
# Of random weights: what trained ones of this size have.
_STD = 0.02
# Of codes, before they are rounded: few reach the ends.
_CODES = {"int4": 2.5, "nvfp4": 2.0, "int8": 40.0}
_BLOCKS = {"double": "transformer_blocks.0", "single": "single_transformer_blocks.0"}


@dataclass(frozen=True)
class Recipe:
    """A way of quantizing a block. activations: the dial of the layers as they run; "auto": the device's choice."""

    name: str
    weights: str
    solved_for: str
    activations: str


RECIPES = (
    Recipe("ours W4A8", "int4", "int8", "int8"),
    Recipe("ours W4A8 as quantized by default", "int4", "auto", "auto"),
    Recipe("ours W4A4", "int4", "int4", "int4"),
    Recipe("ours W8A8", "int8", "int8", "int8"),
)


def run_blocks(settings: Settings, device: Device) -> list[Case]:
    """Both kinds of block."""
    total = len(_BLOCKS) * (1 + len(RECIPES) + settings.rounds)
    cases = []
    for number, name in enumerate(_BLOCKS):

        def progress(done: int, text: str, number: int = number) -> None:
            settings.progress("blocks", number * total // len(_BLOCKS) + done, total, text)

        cases.append(run_block(name, settings, device, progress))
    return cases


@torch.inference_mode()
def run_block(name: str, settings: Settings, device: Device, progress: Any) -> Case:
    """One block, with random weights. The error is that of what the block adds to its input, against the same block
    with its layers' own weights dequantized and multiplied in 16 bits: it shows kernels and activations, not weights.
    """
    size = settings.block
    model = _meta_model(size)
    inputs = _inputs(size, settings.dtype)
    case = Case(
        "blocks",
        f"{name}, {size.image_tokens} image + {size.text_tokens} text tokens",
        REFERENCE,
        {"dim": size.dim, "heads": size.heads, "image_tokens": size.image_tokens, "text_tokens": size.text_tokens},
    )
    progress(0, f"{name} block: {REFERENCE}")
    dense = _materialised(model.get_submodule(_BLOCKS[name]), torch.bfloat16)
    half = {key: _cast(value, torch.bfloat16) for key, value in inputs.items()}
    row = Row(REFERENCE, BASELINE, bytes=_bytes(dense), bytes_ratio=1.0)
    case.rows.append(row)
    blocks = [dense]
    contenders = [_contender(row, dense, half, device)]
    for number, recipe in enumerate(RECIPES):
        progress(1 + number, f"{name} block: {recipe.name}")
        config = SVDQuantConfig(weights=recipe.weights, activations=recipe.solved_for, rank=settings.rank)
        plan = make_plan(model, config)
        ours = _quantized(model.get_submodule(_BLOCKS[name]), _BLOCKS[name], plan, settings.dtype)
        for layer in quantized_layers(ours).values():
            layer.activations = recipe.activations  # type: ignore[assignment]
        row = Row(recipe.name, OURS, bytes=_bytes(ours))
        row.bytes_ratio = _bytes(ours) / _bytes(dense)
        row.error = _error(ours, inputs)
        case.rows.append(row)
        blocks.append(ours)
        contenders.append(_contender(row, ours, inputs, device))
    made = 1 + len(RECIPES)
    seconds = measure(
        contenders,
        device,
        settings.rounds,
        settings.sample_seconds,
        lambda done, _: progress(made + done, f"{name} block: round {done + 1}"),
    )
    for row in case.rows:
        row.set_times(seconds[row.contender], seconds[REFERENCE])
    for contender, block in zip(contenders, blocks, strict=True):
        case.profiles[contender.name] = profile(contender.calls[0], block)
    return case


def _meta_model(size: BlockSize) -> Any:
    """A FLUX.1 of one block of each kind, without memory."""
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        return FluxTransformer2DModel(
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=size.head_dim,
            num_attention_heads=size.heads,
            guidance_embeds=True,
            axes_dims_rope=size.rotary_axes,
        ).to(torch.bfloat16)


def _inputs(size: BlockSize, dtype: torch.dtype) -> dict[str, Any]:
    from diffusers.models.transformers.transformer_flux import FluxPosEmbed

    g = torch.Generator().manual_seed(1)
    tokens = size.image_tokens + size.text_tokens
    positions = torch.zeros(tokens, 3)
    positions[size.text_tokens :, 1] = torch.arange(size.image_tokens) // 32
    positions[size.text_tokens :, 2] = torch.arange(size.image_tokens) % 32
    return {
        "hidden_states": torch.randn(1, size.image_tokens, size.dim, generator=g).to(dtype),
        "encoder_hidden_states": torch.randn(1, size.text_tokens, size.dim, generator=g).to(dtype),
        "temb": torch.randn(1, size.dim, generator=g).to(dtype),
        # In float32 in the model too.
        "image_rotary_emb": FluxPosEmbed(theta=10000, axes_dim=list(size.rotary_axes))(positions),
    }


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) else value


def _materialised(block: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of a block on the meta device with random weights."""
    g = torch.Generator().manual_seed(2)
    made = copy.deepcopy(block).to_empty(device="cpu").to(dtype).eval()
    for name, parameter in made.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, _STD, generator=g)
        else:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
    return made


def _quantized(block: nn.Module, prefix: str, plan: Plan, dtype: torch.dtype) -> nn.Module:
    """The block with random quantized layers, stored as `plan` says; solving it would take minutes."""
    made = copy.deepcopy(block)
    shared: dict[str, dict[str, Tensor]] = {}
    for number, (name, layer) in enumerate(plan.layers.items()):
        if layer.spec is None or not name.startswith(f"{prefix}."):
            continue
        original = block.get_submodule(name[len(prefix) + 1 :])
        tensors = _random_tensors(layer.in_features, layer.out_features, layer.spec, dtype, number)
        # Layers that read the same tensor have the same smoothing and down-projection.
        first = shared.setdefault(layer.group, tensors)
        for part in ("smooth_factor", "proj_down"):
            if part in tensors:
                tensors[part] = first[part].clone()
        layer_of_ours = make_layer(original, SVDQuantTensors(layer.spec, layer.in_features, **tensors))
        replace_module(made, name[len(prefix) + 1 :], layer_of_ours)
    rest = [module for module in made.modules() if any(p.is_meta for p in module.parameters(recurse=False))]
    for module in rest:
        module.to_empty(device="cpu", recurse=False)
        for parameter in module.parameters(recurse=False):
            parameter.data = torch.ones_like(parameter, dtype=dtype)
    fused.install(made)
    return made.eval()


def _random_tensors(k: int, n: int, spec: LayerSpec, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """Tensors of a layer whose dense weight has about the size of a trained one."""
    g = torch.Generator().manual_seed(seed)
    tensors, fmt = empty_tensors(k, n, True, spec, dtype), FORMATS[spec.weights]
    columns = tensors["qweight"].shape[1] * 8 // fmt.bits
    tensors["qweight"] = fmt.pack(fmt.round(torch.randn(n, columns, generator=g).mul_(_CODES[spec.weights])))
    for name, tensor in tensors.items():
        if name == "qweight":
            continue
        if name == "wscales":
            values = torch.rand(tensor.shape, generator=g).add_(0.5) * (_STD / _CODES[spec.weights])
            values *= 1 - 2 * torch.randint(0, 2, tensor.shape, generator=g) if spec.weights == "int4" else 1
        elif name == "smooth_factor":
            values = torch.exp(0.3 * torch.randn(tensor.shape, generator=g))
        elif name == "proj_down":
            values = torch.randn(tensor.shape, generator=g) * k**-0.5
        else:
            values = torch.randn(tensor.shape, generator=g) * _STD
        tensor.copy_(values)
    return tensors


def _error(ours: nn.Module, inputs: dict[str, Any]) -> float:
    dense = copy.copy(ours)
    dense = copy.deepcopy(ours)
    for name, layer in quantized_layers(dense).items():
        assert isinstance(layer, SVDQuantLinear)
        replace_module(dense, name, layer.dequantize())
    return relative_error(_added(ours, inputs), _added(dense, inputs))


def _added(block: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """What a block adds to its tokens, text first."""
    text, image = block(**inputs)
    before = torch.cat([inputs["encoder_hidden_states"], inputs["hidden_states"]], 1)
    return torch.cat([text, image], 1).float() - before.float()


def _bytes(block: nn.Module) -> int:
    return sum(p.nbytes for p in block.parameters())


def _contender(row: Row, block: nn.Module, inputs: dict[str, Any], device: Device) -> Contender:
    def call() -> Any:
        return block(**inputs)

    row.first_scratch_bytes = device.peak(call)
    row.scratch_bytes = device.peak(call)
    return Contender(row.contender, [call])
