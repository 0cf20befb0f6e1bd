"""Compiling kernels ahead of time, in a process where Triton's interpreter is off."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import svdquant

ROOT = Path(svdquant.__file__).parents[1]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`python` with these arguments; Triton compiles, and its cache is the user's."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


def reports(*arguments: str) -> list[dict[str, Any]]:
    """What `python -m svdquant.kernels.gpu.ahead_of_time --json` prints."""
    done = run("-m", "svdquant.kernels.gpu.ahead_of_time", "--json", *arguments)
    assert done.stdout, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def count(report: dict[str, Any], prefix: str) -> int:
    return sum(n for name, n in report["instructions"].items() if name.startswith(prefix))
