"""What the device reaches at best: copying, and torch's own large products."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..results import BASELINE, Case, Row
from .session import Session
from .timing import Timed, measure_rows

_FP8 = torch.float8_e4m3fn


def run_ceilings(session: Session) -> None:
    """Bytes per second of a copy (read and written), and operations per second of products of random data."""
    scale, device = session.settings.scale, session.torch_device
    case = Case(session.suite, "copy and square products", "copy", {"bytes": scale.copy_bytes, "size": scale.matmul})
    timed: dict[str, Timed] = {}
    makers: dict[str, Callable[[], list[Any]]] = {
        "copy": lambda: _copy(scale.copy_bytes, device),
        "bf16": lambda: _bf16(scale.matmul, device),
        "fp8": lambda: _fp8(scale.matmul, device),
        "int8": lambda: _int8(scale.matmul, device),
    }
    for name, make in makers.items():
        row = Row(name, BASELINE)
        case.rows.append(row)
        calls, row.reason = session.attempt(f"preparing {name}", partial(_warm, make))
        if calls is not None:
            timed[name] = Timed(row, calls)
    session.attempt("timing", lambda: _time(session, timed))
    for name, entry in timed.items():
        if entry.row.milliseconds is None:
            entry.row.reason = "was not timed"
            continue
        work = 2 * scale.copy_bytes if name == "copy" else 2 * scale.matmul**3
        rate = work / entry.row.milliseconds.median * 1e3
        session.state.ceilings[name] = rate
        entry.row.more["TB/s" if name == "copy" else "TOP/s"] = rate / 1e12
    session.add(case)


def _time(session: Session, timed: dict[str, Timed]) -> None:
    settings = session.settings
    # Longer samples than elsewhere: a chip that heats up slows down, and so will whoever is compared with this.
    measure_rows(list(timed.values()), session.device, settings.rounds, 5 * settings.sample_seconds, "", graphs=False)
    for entry in timed.values():
        entry.row.speedup = None


def _warm(make: Callable[[], list[Any]]) -> list[Any]:
    calls = make()
    for call in calls:
        call()
    return calls


def _copy(size: int, device: torch.device) -> list[Any]:
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return [lambda: target.copy_(source)]


def _pair(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    g = torch.Generator(device).manual_seed(0)
    x, w = (torch.randn(size, size, generator=g, device=device) for _ in range(2))
    return x, w


def _bf16(size: int, device: torch.device) -> list[Any]:
    x, w = (t.bfloat16() for t in _pair(size, device))
    return [lambda: x @ w.T]


def _fp8(size: int, device: torch.device) -> list[Any]:
    x, w = (t.mul(448 / t.abs().max()).to(_FP8) for t in _pair(size, device))
    one = torch.ones((), device=device)
    return [lambda: torch._scaled_mm(x, w.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)]


def _int8(size: int, device: torch.device) -> list[Any]:
    x, w = (t.mul(127 / t.abs().max()).round().to(torch.int8) for t in _pair(size, device))
    return [lambda: torch._int_mm(x, w.T)]
