"""Where a benchmark runs: how a device keeps time, what memory a call takes on it, and what it is called."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from ..kernels.cpu.results import forget as forget_results

Call = Callable[[], Any]
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# Those that decide how fast 8-bit and 16-bit products are.
_INSTRUCTIONS = (
    "avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp", "i8mm", "bf16"
)  # fmt: skip


class Device(Protocol):
    """What the suites ask of a device; an accelerator is another class with these methods."""

    name: str
    torch: torch.device

    def seconds(self, calls: Sequence[Call], repeats: int) -> float:
        """Seconds per call of `repeats` calls, which take the entries of `calls` in turn."""

    def resident(self) -> int | None:
        """Bytes that this process holds on the device now; None where that cannot be told."""

    def peak(self, call: Call) -> int | None:
        """Bytes by which one call raises what is held, at its worst moment; None where that cannot be told."""

    def describe(self) -> dict[str, Any]:
        """Name, cores and so on, for the results."""


class CPU:
    """The CPU with a fixed number of threads."""

    name = "cpu"
    torch = torch.device("cpu")

    def __init__(self, threads: int | None = None) -> None:
        """threads: of every product, this process' from now on; None leaves torch's own number."""
        if threads is not None:
            torch.set_num_threads(threads)
        self.threads = torch.get_num_threads()

    def seconds(self, calls: Sequence[Call], repeats: int) -> float:
        count = len(calls)
        began = time.perf_counter()
        for number in range(repeats):
            calls[number % count]()
        return (time.perf_counter() - began) / repeats

    def resident(self) -> int | None:
        _return_free_memory()
        return _status("VmRSS")

    def peak(self, call: Call) -> int | None:
        before = self.resident()
        try:
            _RESET.write_text("5")
        except OSError:
            before = None
        result = call()
        highest = _status("VmHWM")
        del result
        return None if before is None or highest is None else max(highest - before, 0)

    def describe(self) -> dict[str, Any]:
        model, family, flags = _cpu()
        try:
            cores = len(os.sched_getaffinity(0))
        except AttributeError:
            cores = os.cpu_count() or 1
        return {
            "device": self.name,
            "name": model,
            "family": family,
            "instructions": [flag for flag in _INSTRUCTIONS if flag in flags],
            "cores": cores,
            "threads": self.threads,
            "platform": platform.platform(),
        }


class CUDA:
    """An NVIDIA or AMD GPU, timed by its own events."""

    name = "cuda"

    def __init__(self, index: int = 0) -> None:
        self.torch = torch.device("cuda", index)
        torch.cuda.set_device(self.torch)

    def seconds(self, calls: Sequence[Call], repeats: int) -> float:
        count = len(calls)
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.torch)
        began.record()
        for number in range(repeats):
            calls[number % count]()
        ended.record()
        ended.synchronize()
        milliseconds: float = began.elapsed_time(ended)
        return milliseconds / 1e3 / repeats

    def resident(self) -> int | None:
        return torch.cuda.memory_allocated(self.torch)

    def peak(self, call: Call) -> int | None:
        torch.cuda.synchronize(self.torch)
        torch.cuda.reset_peak_memory_stats(self.torch)
        before = torch.cuda.memory_allocated(self.torch)
        result = call()
        torch.cuda.synchronize(self.torch)
        highest = torch.cuda.max_memory_allocated(self.torch)
        del result
        return max(highest - before, 0)

    def describe(self) -> dict[str, Any]:
        p = torch.cuda.get_device_properties(self.torch)
        return {
            "device": str(self.torch),
            "name": p.name,
            "capability": f"{p.major}.{p.minor}",
            "multiprocessors": p.multi_processor_count,
            "memory": p.total_memory,
            "l2": getattr(p, "L2_cache_size", None),
            "cuda": torch.version.cuda or torch.version.hip,
            "platform": platform.platform(),
            **_nvidia(self.torch.index),
        }


def _nvidia(index: int) -> dict[str, str]:
    """What the driver says of a GPU; empty without its tool. `index` counts the GPUs that this process may use."""
    fields = ("driver_version", "power.limit", "clocks.max.sm", "clocks.sm", "temperature.gpu")
    visible = [part.strip() for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part.strip()]
    name = visible[index] if index < len(visible) else str(index)
    command = ["nvidia-smi", "-i", name, f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, (value.strip() for value in done.stdout.split(",")), strict=False))


def make_device(name: str, threads: int | None) -> Device:
    """The device called `name`: "cpu", "cuda" or "cuda:1". Raises `ValueError` for others and for those not there."""
    if name == "cpu":
        return CPU(threads)
    device = torch.device(name)
    if device.type != "cuda" or not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(name)
    return CUDA(device.index or 0)


def _status(field: str) -> int | None:
    """A size of /proc/self/status in bytes."""
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass  # not Linux
    return None


def _return_free_memory() -> None:
    """What has been freed goes back to the system, or later calls would seem to need no memory of their own."""
    forget_results()
    with contextlib.suppress(AttributeError, OSError, TypeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def _cpu() -> tuple[str, str, set[str]]:
    """(model name, family and model number, instruction flags)."""
    found: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            found.setdefault(key.strip(), value.strip())
    except OSError:
        pass  # not Linux
    name = found.get("model name") or platform.processor() or platform.machine()
    family = f"{found['cpu family']}/{found.get('model', '?')}" if "cpu family" in found else ""
    return name, family, set((found.get("flags") or found.get("Features") or "").split())
