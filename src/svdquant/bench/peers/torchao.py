"""torchao: int8 weights per row, int8 activations per token, eager and compiled."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..cases import LinearCase
from .base import Peer


class _Int8Dynamic(Peer):
    family = "torchao"
    packages = {"torchao": "torchao.quantization"}  # noqa: RUF012

    def prepare(self, case: LinearCase) -> None:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        # Quantized in place are the children of a module, so the linear needs a parent.
        holder = nn.Sequential(_linear(case))
        quantize_(holder, Int8DynamicActivationInt8WeightConfig())
        self._layer = holder[0]

    def __call__(self, x: Tensor) -> Tensor:
        return self._layer(x)

    @property
    def bytes(self) -> int | None:
        parts: list[Tensor] = []
        for parameter in self._layer.parameters():
            _collect(parameter, parts)
        return sum(part.nbytes for part in parts)


class TorchaoEager(_Int8Dynamic):
    name = "torchao int8 dynamic, eager"


class TorchaoCompiled(_Int8Dynamic):
    name = "torchao int8 dynamic, compiled"
    _shared: ClassVar[tuple[Any, Any]] = (None, None)

    @classmethod
    def available(cls) -> str | None:
        reason = super().available()
        if reason is not None:
            return reason
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            get_cpp_compiler()
        except Exception:  # inductor has a type of its own for it, which moves between versions
            return "torch.compile finds no C++ compiler"
        return None

    def prepare(self, case: LinearCase) -> None:
        super().prepare(case)
        self._run: Any
        if case.shape.modulation:
            # One compiled function for all copies of a layer, whose tensors are its inputs.
            if TorchaoCompiled._shared[0] is not case:
                torch._dynamo.reset()
                TorchaoCompiled._shared = (case, torch.compile(_call, dynamic=False))
            self._run = functools.partial(TorchaoCompiled._shared[1], self._layer)
        else:
            # Recompilations of one function are counted over all shapes, and end in silence.
            torch._dynamo.reset()
            self._run = torch.compile(self._layer, dynamic=False, options={"freezing": True})

    def __call__(self, x: Tensor) -> Tensor:
        return self._run(x)


def _call(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


def _linear(case: LinearCase) -> nn.Linear:
    linear = nn.Linear(case.shape.k, case.shape.n, device="meta", dtype=case.dtype)
    linear.weight = nn.Parameter(case.weight.clone(), requires_grad=False)
    linear.bias = nn.Parameter(case.bias.clone(), requires_grad=False)
    return linear


def _collect(tensor: Any, parts: list[Tensor]) -> None:
    """The plain tensors that a tensor subclass is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            part = getattr(tensor, name)
            if isinstance(part, Tensor):
                _collect(part, parts)
    else:
        parts.append(tensor)
