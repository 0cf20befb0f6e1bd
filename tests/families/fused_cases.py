"""Small quantized models of several families, what they read when a pipeline draws, and the truth about both."""

from __future__ import annotations

import copy
from typing import Any

import family_pipelines
import pytest
import tiny
import torch
from diffusers.models import normalization
from torch import Tensor, nn

import svdquant
from svdquant.families import fused
from svdquant.kernels import gpu

needs_interpreter = pytest.mark.skipif(
    gpu.missing() is not None or not gpu.interpreting(), reason="needs triton, and TRITON_INTERPRET=1"
)


class Case:
    """A quantized denoiser in bfloat16, and what it reads when its pipeline draws, in bfloat16 too.

    names: of the fused classes that it is expected to have.
    """

    def __init__(self, name: str, names: set[str], **arguments: Any) -> None:
        self.name, self.names, self.arguments = name, names, arguments
        self.pipe = family_pipelines.PIPELINES[name]()
        self.part, self.original = next(iter(family_pipelines.denoisers(self.pipe).items()))
        randomize_norms(self.original)
        model = copy.deepcopy(self.original).to(torch.bfloat16)
        svdquant.quantize(model, tiny.config())
        self.quantized: Any = model
        self.inputs = self.record()

    def record(self, **arguments: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the denoiser reads first."""
        seen: list[Any] = []
        handle = self.original.register_forward_pre_hook(lambda _m, a, k: seen.append((a, k)), with_kwargs=True)
        self.pipe.register_modules(**{self.part: self.original})
        family_pipelines.draw(self.name, self.pipe, **(self.arguments | arguments))
        handle.remove()
        args, options = cast(seen[0], torch.bfloat16)
        if self.name.startswith("flux2"):
            # Times a thousand in the model's type, which is to round nothing.
            given = [name for name in ("timestep", "guidance") if options.get(name) is not None]
            options |= {name: torch.full_like(options[name], 0.5) for name in given}
        return args, options

    def run(self, model: Any, inputs: Any = None, dtype: torch.dtype | None = None) -> Tensor:
        """Everything that the model makes, in one row of float64."""
        inputs = copy.deepcopy(self.inputs if inputs is None else inputs)
        given = inputs if dtype is None else cast(inputs, dtype)
        return family_pipelines.output({self.part: model}, {self.part: given})

    def read_by(self, model: Any, block: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What one of the model's modules reads first."""
        seen: list[Any] = []
        handle = block.register_forward_pre_hook(lambda _m, a, k: seen.append((a, k)), with_kwargs=True)
        self.run(model)
        handle.remove()
        args, options = copy.deepcopy(seen[0])
        return args, options

    def truth(self, model: nn.Module, inputs: Any = None) -> Tensor:
        """Of diffusers' own forwards on the dense meaning of the quantized layers, in float64."""
        return self.run(dense(model), inputs, torch.float64)


def randomize_norms(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, (nn.RMSNorm, normalization.RMSNorm)) and module.weight is not None:
            module.weight.data.copy_(torch.rand(module.weight.shape, generator=generator) + 0.5)


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Copies of floating tensors in another type, wherever they are."""
    if isinstance(value, Tensor):
        return value.clone().to(dtype) if value.is_floating_point() else value.clone()
    if isinstance(value, dict):
        return {key: cast(item, dtype) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(cast(item, dtype) for item in value)
    return value


def plain(model: nn.Module) -> Any:
    """A copy with diffusers' own forwards."""
    other = copy.deepcopy(model)
    fused.uninstall(other)
    return other


def dense(model: nn.Module) -> Any:
    """A copy in float64 without quantized layers, with diffusers' own forwards."""
    other = of_type(plain(model), torch.float32)
    other.dequantize()
    return of_type(other, torch.float64)


def of_type(model: nn.Module, dtype: torch.dtype) -> Any:
    """The model itself, cast, which diffusers refuses to do with a quantized one."""
    return nn.Module.to(model, dtype)


def fused_parts(model: nn.Module) -> list[Any]:
    """Modules and processors that have fused classes."""
    parts = [part for m in model.modules() for part in (m, m.__dict__.get("processor"))]
    return [part for part in parts if type(part).__module__.startswith("svdquant.families")]


def tensors(value: Any) -> list[Tensor]:
    """Every tensor in arguments or results, in order."""
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for item in items for tensor in tensors(item)]


def error(y: Tensor, truth: Tensor) -> float:
    return float((y.double() - truth.double()).norm() / truth.double().norm())
