"""What of a whole model depends on the batch it is drawn in: no quantized layer; of torch's own operations, some."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

import svdquant
from svdquant.nn import QUANTIZED


def record(model: nn.Module, arguments: dict[str, Tensor]) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """(the model's output, input and output of every leaf module)."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def hook_for(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                seen.setdefault(name, (args[0].clone(), output.clone()))

        return hook

    leaves = {name: module for name, module in model.named_modules() if not list(module.children())}
    handles = [module.register_forward_hook(hook_for(name)) for name, module in leaves.items()]
    with torch.no_grad():
        output = model(**arguments, return_dict=False)[0]
    for handle in handles:
        handle.remove()
    return output, seen


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 2e-2), (torch.float32, 1e-3)])
@pytest.mark.parametrize("activations", ["int4", "int8", "none"])
def test_only_operations_of_torch_depend_on_the_batch(dtype: torch.dtype, limit: float, activations: str) -> None:
    # The limits: a last-bit difference in front of a quantized layer can move a value into the next code.
    model = tiny.transformer().to(dtype)
    svdquant.quantize(model, tiny.config())
    svdquant.set_activations(model, activations)
    together = tiny.inputs(model, side=5, text=9, batch=4)
    whole, inside = record(model, together)
    for row in range(4):
        shared = ("img_ids", "txt_ids")
        alone, outside = record(model, {k: v if k in shared else v[row : row + 1] for k, v in together.items()})
        depends = []
        for name, (x, y) in inside.items():
            single_x, single_y = outside[name]
            if x.shape[0] != 4 or not torch.equal(x[row : row + 1], single_x):
                continue
            if not torch.equal(y[row : row + 1], single_y):
                depends.append(name)
        # Given the same row, a quantized layer returns the same bits; torch's own 16-bit linears need not.
        assert not [name for name in depends if isinstance(model.get_submodule(name), QUANTIZED)]
        assert all(isinstance(model.get_submodule(name), nn.Linear) for name in depends), depends
        difference = float((whole[row : row + 1] - alone).float().norm() / alone.float().norm())
        assert difference <= limit, (difference, depends)
