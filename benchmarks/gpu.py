"""The run behind the figures of the README for a GPU: `svdquant bench --suite gpu`, into a folder named after it.

    python benchmarks/gpu.py [--output FOLDER] [--budget 540] [--only checks,ceilings,layers]

A machine that is lent for minutes is measured in several commands, each with its own `--only` and `--output`: what no
longer fits into the budget is left out and named, and what has been found is written after every case. A GPU that
nobody else uses is needed; clocks are left as they are. docs/performance.md says what is measured, and how.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from svdquant.cli.main import run


def _folder() -> Path:
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return Path(__file__).parent / "results" / ("gpu-" + re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    args, more = parser.parse_known_args()
    return run(["bench", "--suite", "gpu", "--output", str(args.output or _folder()), *more])


if __name__ == "__main__":
    sys.exit(main())
