"""Where a call spends its time, by kind of operation."""

from __future__ import annotations

import os
import time
from typing import Any

from .device import Call

LINEARS, ATTENTION, CONVOLUTIONS = "linears", "attention", "convolutions"
COPIES, REST, OUTSIDE = "copies and casts", "norms and elementwise", "outside of operations"
_KINDS = (
    (LINEARS, ("linear", "addmm", "matmul", "bmm", "::mm")),
    (ATTENTION, ("scaled_dot_product", "flash_attention")),
    (CONVOLUTIONS, ("conv",)),
    (COPIES, ("copy", "::to", "cat", "contiguous", "clone", "::stack")),
)


def profile(call: Call) -> dict[str, float]:
    """Kind of operation → milliseconds of one call, largest first; the profiler's own cost included."""
    # Or the profiler announces itself on stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from torch.autograd.profiler import profile as torch_profile

    call()
    with torch_profile(use_kineto=False) as found:
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


def kind_of(operation: str) -> str:
    """The kind of an operation by its name, such as "aten::addmm"."""
    if operation.startswith("svdquant::"):
        return LINEARS
    return next((kind for kind, parts in _KINDS if any(part in operation for part in parts)), REST)
