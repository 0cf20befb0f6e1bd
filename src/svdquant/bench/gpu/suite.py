"""The sections in turn, each for itself, and the targets at the end."""

from __future__ import annotations

import importlib
import os
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

from ..device import Device
from ..machine import GPU_PACKAGES, versions
from ..results import Results
from .session import Session, State, restored
from .settings import GPUSettings
from .timing import compiling_limits

Section = Callable[[Session], None]
# Sections end by the budget; what hangs is one of their parts.
_NEVER = 1e6


def _run(section: str, session: Session) -> None:
    """Imported when it runs: kernels are interpreted or compiled according to the moment of their import."""
    run: Section = getattr(importlib.import_module(f".{section}", __package__), f"run_{section}")
    run(session)


def run_gpu(settings: GPUSettings, device: Device, command: str, folder: Path | None = None) -> Results:
    """The suite. folder: where a process that goes on after a broken device finds its state."""
    state = restored() or _fresh(settings, device, command)
    session = Session(settings, device, state, folder)
    for name in settings.sections:
        if name in state.finished:
            continue
        session.enter(name)
        if session.fits(1, "the section"):
            with compiling_limits(), warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", UserWarning)
                _, reason = session.attempt("the section", partial(_run, name, session), _NEVER)
            for warning in caught:
                # A product that failed on the device and was passed over says so.
                if "svdquant" in str(warning.message) or "svdquant" in warning.filename:
                    session.note(f"warned: {warning.message}")
            if reason:
                session.note(reason)
        session.leave()
    from .targets import evaluate

    state.results.targets = evaluate(state.results, settings)
    session.save()
    return state.results


def _fresh(settings: GPUSettings, device: Device, command: str) -> State:
    described = {
        "suites": ["gpu"],
        "sections": list(settings.sections),
        "budget": settings.budget,
        "rounds": settings.rounds,
        "sample_seconds": settings.sample_seconds,
        "smoke": settings.smoke,
        "blocks": settings.blocks,
        "SVDQUANT_BACKEND": os.environ.get("SVDQUANT_BACKEND", ""),
    }
    found = versions((), GPU_PACKAGES)
    with suppress(KeyError):
        found["cuda"] = device.describe()["cuda"]
    began = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return State(Results(command, device.describe(), found, described, began), time.time())
