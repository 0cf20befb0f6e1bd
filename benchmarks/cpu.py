"""The run behind the figures of the README for a CPU: `svdquant bench` over all suites, with every peer.

    pip install "svdquant[bench]" stable-diffusion-cpp-python
    python benchmarks/cpu.py [--threads 2] [--rounds 15] [--output benchmarks/results/cpu]

Half an hour on two cores, on which nothing else should run. Peers that are not installed are listed as such.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from svdquant.cli.main import run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", default="2")
    parser.add_argument("--rounds", default="15")
    parser.add_argument("--output", default=str(Path(__file__).parent / "results" / "cpu"))
    args, more = parser.parse_known_args()
    given = ["--threads", args.threads, "--rounds", args.rounds, "--output", args.output]
    return run(["bench", "--suite", "all", "--peers", "all", *given, *more])


if __name__ == "__main__":
    sys.exit(main())
