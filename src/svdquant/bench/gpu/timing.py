"""Calls as a device replays them, and what it launches for one of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..device import Call, Device
from ..measure import Contender, measure
from ..peers.base import first_line
from ..results import Row

ATTENTION, PRODUCTS, QUANTIZING = "attention", "products", "quantization"
COPIES, REST = "copies", "elementwise and norms"
# Kernels by parts of their names: ours, cuBLAS', CUTLASS', cuDNN's, and inductor's, which lists what it has fused.
_KINDS = (
    (ATTENTION, ("flash", "fmha", "attention", "sdpa", "softmax")),
    (QUANTIZING, ("quantize", "amax", "down_kernel")),
    (
        PRODUCTS,
        ("gemm", "gemv", "cutlass", "nvjet", "splitk", "xmma", "expand", "eight_bit", "weight_only", "int4_mma"),
    ),
    (PRODUCTS, ("registers_kernel", "grouped_kernel", "nvfp4_kernel", "dot_scaled")),
    (COPIES, ("memcpy", "memset", "direct_copy", "catarray")),
)


@dataclass
class Timed:
    """Something to time for a row. calls: over inputs in turn, so that none is found in the cache.

    keep: whatever the calls read. operations: of one call; bytes: that one has to move at least; rate: the ceiling of
    its products ("bf16", "fp8", "int8"), None where they are not the point.
    """

    row: Row
    calls: list[Call]
    operations: float = 0.0
    moved: float = 0.0
    rate: str | None = None


def measure_rows(
    timed: Sequence[Timed], device: Device, rounds: int, sample_seconds: float, reference: str, graphs: bool = True
) -> dict[str, list[float]]:
    """Fills in the rows' times, of calls that have been made before.

    graphs: the calls are replayed as one graph, so that only the device's time counts.

    `row.more`: "eager_ms" is the time with launches; "timed" says how the row's own time was taken.
    """
    contenders, counts = [], {}
    for entry in timed:
        name = entry.row.contender
        eager = device.seconds(entry.calls, len(entry.calls))
        entry.row.more["eager_ms"] = 1e3 * eager
        replay, entry.row.more["timed"] = (None, "events") if not graphs else _captured(entry.calls, device)
        counts[name] = 1 if replay is None else len(entry.calls)
        contenders.append(Contender(name, entry.calls if replay is None else [replay]))
    samples = measure(contenders, device, rounds, sample_seconds)
    seconds = {name: [s / counts[name] for s in found] for name, found in samples.items()}
    for entry in timed:
        entry.row.set_times(seconds[entry.row.contender], seconds.get(reference))
    return seconds


def _captured(calls: Sequence[Call], device: Device) -> tuple[Call | None, str]:
    """(replay of all calls as one graph or None, how time is taken)."""
    if device.torch.type == "cpu":
        return partial(_all, calls), "one after the other"
    try:
        stream = torch.cuda.Stream(device.torch)
        stream.wait_stream(torch.cuda.current_stream(device.torch))
        with torch.cuda.stream(stream):
            _all(calls)
        torch.cuda.current_stream(device.torch).wait_stream(stream)
        torch.cuda.synchronize(device.torch)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            _all(calls)
        graph.replay()
        torch.cuda.synchronize(device.torch)
    except Exception as error:  # others' calls may do what a graph forbids
        torch.cuda.synchronize(device.torch)
        return None, f"events, because it cannot be captured: {first_line(error)}"
    return graph.replay, "graph"


def compiling_limits() -> AbstractContextManager[None]:
    """Within it torch compiles all forms of one function, and does not run the later ones eagerly instead."""
    config: Any = torch._dynamo.config
    wanted = {"recompile_limit": 256, "accumulated_recompile_limit": 4096, "fail_on_recompile_limit_hit": True}
    there: AbstractContextManager[None] = config.patch({k: v for k, v in wanted.items() if hasattr(config, k)})
    return there


def _all(calls: Sequence[Call]) -> None:
    for call in calls:
        call()


def fill_rates(timed: Sequence[Timed], ceilings: dict[str, float]) -> None:
    """`row.more["TOP/s"]`, and "of ceiling": the time that the measured ceilings allow over the time taken."""
    for entry in timed:
        row = entry.row
        if row.milliseconds is None:
            continue
        seconds = row.milliseconds.median / 1e3
        if entry.operations:
            row.more["TOP/s"] = entry.operations / seconds / 1e12
        floors = []
        if entry.rate in ceilings:
            floors.append(entry.operations / ceilings[entry.rate])
        if "copy" in ceilings:
            floors.append(entry.moved / ceilings["copy"])
        if floors:
            row.more["of ceiling"] = max(floors) / seconds


def launches(call: Callable[[], Any], device: Device) -> list[tuple[str, int, float]]:
    """(kernel, how often, milliseconds) of one call, longest first. On a CPU: torch's outermost operations."""
    # Or the profiler announces itself on stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    call()
    found: dict[str, tuple[int, float]] = {}
    activities = [torch.profiler.ProfilerActivity.CPU]
    gpu = device.torch.type != "cpu"
    if gpu:
        activities = [torch.profiler.ProfilerActivity.CUDA]
        torch.cuda.synchronize(device.torch)
    with torch.profiler.profile(activities=activities) as profiler:
        call()
        if gpu:
            torch.cuda.synchronize(device.torch)
    events: Any = profiler.events()
    for event in events:
        on_gpu = event.device_type == torch.autograd.DeviceType.CUDA
        if on_gpu if gpu else event.cpu_parent is None:
            count, total = found.get(event.name, (0, 0.0))
            found[event.name] = count + 1, total + event.time_range.elapsed_us() / 1e3
    return sorted(((n, c, ms) for n, (c, ms) in found.items()), key=lambda entry: -entry[2])


def by_kind(found: Sequence[tuple[str, int, float]]) -> dict[str, float]:
    """Kind of kernel → milliseconds, largest first."""
    spent: dict[str, float] = {}
    for name, _, milliseconds in found:
        lowered = name.lower()
        kind = next((kind for kind, parts in _KINDS if any(part in lowered for part in parts)), REST)
        spent[kind] = spent.get(kind, 0.0) + milliseconds
    return dict(sorted(spent.items(), key=lambda item: -item[1]))


def poisoned(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An output in which every element that nobody writes is NaN."""
    return torch.full(tuple(shape), float("nan"), dtype=dtype, device=device)
