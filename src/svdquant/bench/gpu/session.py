"""One run: its results so far, its time, what went wrong, and how it goes on where a kernel has broken the device."""

from __future__ import annotations

import gc
import os
import pickle
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..device import Device
from ..peers.base import first_line
from ..results import Case, Results
from .settings import SECTIONS, GPUSettings

# A kernel that runs longer than this hangs. Compiling a transformer's blocks takes minutes, and gets more.
HANGS_AFTER = 150.0
_STATE = "SVDQUANT_BENCH_STATE"
T = TypeVar("T")


@dataclass
class State:
    """What survives a restart: all but the device's memory.

    wrong: (weights, activations, product) → why it is not timed. crashed: what is not tried again → why.
    """

    results: Results
    began: float
    finished: list[str] = field(default_factory=list)
    wrong: dict[tuple[str, str, str], str] = field(default_factory=dict)
    crashed: dict[str, str] = field(default_factory=dict)
    ceilings: dict[str, float] = field(default_factory=dict)


class Session:
    """What the sections share. `until`: when the running section has to end (`time.time`)."""

    def __init__(self, settings: GPUSettings, device: Device, state: State, folder: Path | None = None) -> None:
        self.settings, self.device, self.state, self.folder = settings, device, state, folder
        self.section, self.until = "", state.began + settings.budget

    @property
    def torch_device(self) -> torch.device:
        return self.device.torch

    @property
    def on_gpu(self) -> bool:
        return self.torch_device.type != "cpu"

    def enter(self, section: str) -> None:
        """Begins a section; it gets its share of the time that is left."""
        self.section = section
        rest = [name for name in self.settings.sections if name not in self.state.finished]
        left = self.state.began + self.settings.budget - time.time()
        self.until = time.time() + left * SECTIONS[section] / sum(SECTIONS[name] for name in rest)

    def leave(self) -> None:
        self.state.finished.append(self.section)
        self.save()

    def left(self) -> float:
        """Seconds of the section."""
        return self.until - time.time()

    def fits(self, seconds: float, what: str) -> bool:
        """Whether so much time is left; says so in the results where it is not."""
        if self.left() >= seconds:
            return True
        self.note(f"{what}: left out, {max(self.left(), 0):.0f} of {seconds:.0f} s are left to this section")
        return False

    def note(self, text: str) -> None:
        line = f"{self.section}: {text}"
        if line not in self.state.results.notes:
            self.state.results.notes.append(line)

    def add(self, case: Case) -> None:
        """A case that is complete; what has been found so far is written."""
        self.state.results.cases.append(case)
        self.save()

    def has(self, name: str) -> bool:
        """Whether the case was done before a restart."""
        return any(case.suite == self.suite and case.name == name for case in self.state.results.cases)

    @property
    def suite(self) -> str:
        return f"gpu {self.section}"

    def save(self) -> None:
        self.state.results.seconds = time.time() - self.state.began
        if self.settings.save is not None:
            self.settings.save(self.state.results)

    def tell(self, text: str) -> None:
        total = round(self.settings.budget)
        self.settings.progress("gpu", min(round(time.time() - self.state.began), total), total, text)

    def attempt(self, what: str, call: Callable[[], T], limit: float = HANGS_AFTER) -> tuple[T | None, str]:
        """(result, "") of a call that may fail, or (None, why). One that breaks the device restarts the run without it.

        limit: seconds after which it is taken to hang.
        """
        reason = self.state.crashed.get(f"{self.section}: {what}")
        if reason is not None:
            return None, reason
        self.tell(what)
        timer = threading.Timer(limit, self.restart, (what, f"hung for {limit:.0f} s"))
        if self.on_gpu and self.folder is not None:
            timer.daemon = True
            timer.start()
        try:
            result = call()
            if self.on_gpu:
                torch.cuda.synchronize(self.torch_device)
            return result, ""
        except Exception as error:
            reason = f"failed: {first_line(error)}"
        finally:
            timer.cancel()
        # Outside of the handler: its traceback would keep the call's tensors.
        self._recover(what, reason)
        return None, reason

    def _recover(self, what: str, reason: str) -> None:
        gc.collect()
        if not self.on_gpu:
            return
        try:
            torch.cuda.synchronize(self.torch_device)
            torch.cuda.empty_cache()
        except Exception:  # whatever a broken device raises: it takes no more work from this process
            self.restart(what, f"broke the device: {reason.removeprefix('failed: ')}")

    def restart(self, what: str, reason: str) -> None:
        """Begins anew in a fresh process, without `what`; the device takes nothing more from this one."""
        if self.folder is None:
            raise RuntimeError(f"{what}: {reason}")
        self.state.crashed[f"{self.section}: {what}"] = reason
        self.save()
        file = self.folder / ".state"
        file.write_bytes(pickle.dumps(self.state))
        os.environ[_STATE] = str(file)
        sys.stdout.flush()
        sys.stderr.flush()
        # The driver gives the memory back once its files are closed.
        os.closerange(3, 4096)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def restored() -> State | None:
    """The state of the process before this one, if it restarted."""
    name = os.environ.pop(_STATE, None)
    if name is None:
        return None
    file = Path(name)
    state: Any = pickle.loads(file.read_bytes())
    file.unlink()
    assert isinstance(state, State)
    return state
