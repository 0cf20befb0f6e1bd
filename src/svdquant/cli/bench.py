"""`svdquant bench`: how fast this machine is with quantized layers, blocks and pipelines, beside other libraries."""

from __future__ import annotations

import logging
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import SVDQuantError
from .console import Stages, debugging, print_json, quiet_libraries, remark
from .failures import doing
from .options import Json

if TYPE_CHECKING:
    from ..bench.results import Results

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_STAGES = {"layers": "layers", "blocks": "blocks", "pipeline": "pipelines"}
# Enough columns for every table where stdout is no terminal.
_WIDTH = 140


def bench(
    suite: Annotated[str, typer.Option("--suite", metavar="NAME", help="layers, blocks, pipeline or all.")] = "layers",
    device: Annotated[str, typer.Option("--device", metavar="NAME", help="cpu.")] = "cpu",
    dtype: Annotated[str, typer.Option("--dtype", metavar="NAME", help="Of the model: bf16, fp16 or fp32.")] = "bf16",
    threads: Annotated[
        int | None, typer.Option("--threads", metavar="N", min=1, help="Of the CPU; torch's own number.")
    ] = None,
    peers: Annotated[
        str, typer.Option("--peers", metavar="NAMES", help="all, none, or libraries joined by commas.")
    ] = "all",
    shape: Annotated[
        list[str] | None,
        typer.Option("--shape", metavar="MxKxN", help="Rows, inputs, outputs of a layer; repeatable."),
    ] = None,
    rank: Annotated[int, typer.Option("--rank", metavar="N", help="Of the low-rank branch, 0-256.")] = 32,
    rounds: Annotated[int, typer.Option("--rounds", metavar="N", min=1, help="Samples of each contender.")] = 9,
    gptq: Annotated[
        bool, typer.Option("--gptq/--no-gptq", help="Solve our layers with GPTQ: minutes for large ones.")
    ] = False,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="Where results.json, .md and .png go.")
    ] = Path("svdquant-bench"),
    json: Json = False,
) -> None:
    """Measure quantized layers, blocks and pipelines on this machine, and other libraries in the same run."""
    if dtype not in _DTYPES:
        raise SVDQuantError(f"--dtype {dtype!r} is none of {', '.join(_DTYPES)}")
    if device != "cpu":
        raise SVDQuantError(f"--device {device!r} has no benchmark yet; leave it out for the CPU")
    if output.exists() and not output.is_dir():
        raise SVDQuantError(f"{output}: is a file; choose a folder with --output")
    import torch

    from ..bench.cases import DEFAULT_SHAPES, parse_shape
    from ..bench.device import make_device
    from ..bench.peers import choose_peers
    from ..bench.run import choose_suites, run, save
    from ..bench.settings import Settings
    from ..config import SVDQuantConfig

    suites = choose_suites(suite)
    SVDQuantConfig(rank=rank)
    settings = Settings(
        shapes=[parse_shape(text) for text in shape or DEFAULT_SHAPES],
        dtype=getattr(torch, _DTYPES[dtype]),
        peers=choose_peers(peers),
        rank=rank,
        rounds=rounds,
        gptq=gptq,
    )
    command = shlex.join(
        ["svdquant", "bench", "--suite", suite, "--dtype", dtype, "--peers", peers, "--rank", str(rank)]
        + ["--rounds", str(rounds), *(["--threads", str(threads)] if threads else []), *(["--gptq"] if gptq else [])]
        + [part for text in shape or () for part in ("--shape", text)]
    )
    output.mkdir(parents=True, exist_ok=True)
    _check_writable(output)
    quiet_libraries()
    _quiet_peers()
    with doing("measuring"), Stages(_STAGES) as progress:
        settings.progress = progress
        results = run(suites, settings, make_device(device, threads), command)
    files, missing = save(results, output)
    if missing is not None:
        remark(missing)
    if json:
        print_json(results.to_dict())
        return
    _show(results)
    typer.echo(f"\n{', '.join(str(file) for file in files)} in {results.seconds:.0f} s")


def _quiet_peers() -> None:
    """What they say while they are imported."""
    if not debugging():
        for name in ("torchao", "bitsandbytes", "sdnq", "torch.utils._pytree"):
            logging.getLogger(name).setLevel(logging.ERROR)


def _check_writable(folder: Path) -> None:
    """Before minutes of measuring. Raises the system's own error."""
    probe = folder / ".svdquant-bench"
    probe.touch()
    probe.unlink()


def _show(results: Results) -> None:
    from rich.console import Console

    from ..bench.report import remarks, rich_table

    console = Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False, soft_wrap=True)
    machine = results.machine
    console.print(f"{machine['name']}, {machine['threads']} threads; torch {results.versions['torch']}\n")
    for case in results.cases:
        console.print(rich_table(case))
        for row in case.rows:
            if row.reason:
                console.print(f"not run: {row.contender}: {row.reason}", markup=False)
        for text in remarks(case):
            console.print(text, markup=False)
        console.print()
