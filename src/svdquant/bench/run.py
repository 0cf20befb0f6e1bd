"""A whole run: suites in turn, results into a folder."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

from ..errors import SVDQuantError
from .blocks import run_blocks
from .device import Device
from .layers import run_layers
from .machine import versions
from .pipelines import run_pipelines
from .plot import plot
from .report import markdown
from .results import Case, Results
from .settings import Settings

Suite = Callable[[Settings, Device], list[Case]]
SUITES: dict[str, Suite] = {"layers": run_layers, "blocks": run_blocks, "pipeline": run_pipelines}
# Of its own kind: `bench.gpu`.
GPU = "gpu"


def choose_suites(text: str) -> list[str]:
    """Suites by name, or "all" of a CPU's. Raises `SVDQuantError` for an unknown one."""
    if text == "all":
        return list(SUITES)
    if text not in (*SUITES, GPU):
        raise SVDQuantError(f"--suite {text!r} is none of {', '.join(SUITES)}, {GPU} or all")
    return [text]


def run(suites: list[str], settings: Settings, device: Device, command: str) -> Results:
    """Runs the suites one after the other."""
    began = time.perf_counter()
    results = Results(
        command,
        device.describe(),
        versions(settings.peers),
        {
            "suites": suites,
            "shapes": [str(shape) for shape in settings.shapes],
            "dtype": str(settings.dtype).removeprefix("torch."),
            "peers": [peer.name for peer in settings.peers],
            "rank": settings.rank,
            "rounds": settings.rounds,
            "gptq": settings.gptq,
            "sample_seconds": settings.sample_seconds,
        },
        datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
    for suite in suites:
        results.cases += SUITES[suite](settings, device)
    results.seconds = time.perf_counter() - began
    return results


def save(results: Results, folder: Path) -> tuple[list[Path], str | None]:
    """Writes results.json, results.md and results.png; (files, why there is no plot or None)."""
    files = write(results, folder)
    picture = folder / "results.png"
    missing = plot(results, picture)
    if missing is None:
        files.append(picture)
    return files, missing


def write(results: Results, folder: Path) -> list[Path]:
    """results.json and results.md alone, which may be done at any time of a run."""
    files = [folder / "results.json", folder / "results.md"]
    files[0].write_text(json.dumps(results.to_dict(), indent=1) + "\n", encoding="utf-8")
    files[1].write_text(markdown(results), encoding="utf-8")
    return files
