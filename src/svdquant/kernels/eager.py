"""When an operation can be called directly: torch's own way around it costs more than a small layer's product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

# What torch keeps of modes that want to see every operation (fake tensors, tracing, profiling, vmap). Where one of
# these names is missing, nothing is called directly.
_DISPATCH_MODES: Callable[[], int] | None = getattr(torch._C, "_len_torch_dispatch_stack", None)
_FUNCTIONAL: Callable[[], Any] | None = getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", None)
_TRACING: Callable[[], Any] | None = getattr(torch._C, "_get_tracing_state", None)


def is_plain(x: Tensor) -> bool:
    """Whether x is an ordinary CPU tensor that nothing but the caller looks at: no gradient, no mode, no compiler."""
    return x.device.type == "cpu" and is_unwatched(x)


def is_unwatched(x: Tensor) -> bool:
    """The same of a tensor on any device."""
    if torch.compiler.is_compiling() or _DISPATCH_MODES is None or _FUNCTIONAL is None or _TRACING is None:
        return False
    if type(x) is not Tensor or (x.requires_grad and torch.is_grad_enabled()):
        return False
    if x.is_neg() or x._is_zerotensor():
        return False
    return not _DISPATCH_MODES() and _FUNCTIONAL() is None and _TRACING() is None


def as_rows(out: Tensor, x: Tensor) -> Tensor | None:
    """out [..., N] seen as [M, N] with contiguous rows, or None where a copy would be needed."""
    if not is_plain(out) or out.stride(-1) != 1 or out.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
        return None
    try:
        rows = out.view(-1, out.shape[-1])
    except RuntimeError:
        return None
    overlap = rows.shape[0] > 1 and rows.stride(0) < rows.shape[1]
    return None if overlap else rows


_Function = TypeVar("_Function", bound=Callable[..., Any])


def assume_constant(function: _Function) -> _Function:
    """Makes a compiler call the function once, and keep its result, instead of following it.

    What `torch.compiler.assume_constant_result` does, which imports the compiler, and Triton with it, to say so.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
