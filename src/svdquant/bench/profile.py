"""Where a call spends its time, by kind of operation."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..nn import quantized_layers
from .device import Call

LINEARS, ATTENTION, CONVOLUTIONS = "linears", "attention", "convolutions"
COPIES, REST, OUTSIDE = "copies and casts", "norms and elementwise", "outside of operations"
_KINDS = (
    (LINEARS, ("linear", "addmm", "matmul", "bmm", "::mm")),
    (ATTENTION, ("scaled_dot_product", "flash_attention")),
    (CONVOLUTIONS, ("conv",)),
    (COPIES, ("copy", "::to.", "::cat", "contiguous", "clone", "::stack")),
)


def profile(call: Call, model: nn.Module) -> dict[str, float]:
    """Kind of operation → milliseconds of one call of `model`, largest first; the profiler's own cost included."""
    # Or the profiler announces itself on stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from torch.autograd.profiler import profile as torch_profile

    call()
    with _announced(model), torch_profile(use_kineto=False) as found:
        began = time.perf_counter()
        call()
        total = 1e3 * (time.perf_counter() - began)
    spent: dict[str, float] = {}
    events: Any = found.function_events
    for event in events:
        # What an operation calls is part of it.
        if event.cpu_parent is None:
            kind = kind_of(event.name)
            spent[kind] = spent.get(kind, 0.0) + event.cpu_time_total / 1e3
    spent[OUTSIDE] = max(total - sum(spent.values()), 0.0)
    return dict(sorted(spent.items(), key=lambda item: -item[1]))


@contextlib.contextmanager
def _announced(model: nn.Module) -> Iterator[None]:
    """Quantized layers tell the profiler of themselves: their products may go past torch's operations."""
    running: list[Any] = []

    def begin(_layer: nn.Module, _inputs: Any) -> None:
        running.append(torch.autograd.profiler.record_function("svdquant::layer"))
        running[-1].__enter__()

    def end(_layer: nn.Module, _inputs: Any, _output: Any) -> None:
        running.pop().__exit__(None, None, None)

    hooks = [layer.register_forward_pre_hook(begin) for layer in quantized_layers(model).values()]
    hooks += [layer.register_forward_hook(end) for layer in quantized_layers(model).values()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def kind_of(operation: str) -> str:
    """The kind of an operation by its name, such as "aten::addmm"."""
    if operation.startswith("svdquant::"):
        return LINEARS
    return next((kind for kind, parts in _KINDS if any(part in f"{operation}." for part in parts)), REST)
