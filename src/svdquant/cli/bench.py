"""`svdquant bench`: how fast this machine is with quantized layers, blocks and pipelines, beside other libraries."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import SVDQuantError
from .console import Stages, debugging, print_json, quiet_libraries, remark, table
from .failures import doing
from .options import Json

if TYPE_CHECKING:
    from ..bench.results import Results

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_STAGES = {"layers": "layers", "blocks": "blocks", "pipeline": "pipelines", "gpu": "seconds"}
_GPU_SUITE = "The suite gpu"
# Enough columns for every table where stdout is no terminal.
_WIDTH = 140


def bench(
    suite: Annotated[
        str, typer.Option("--suite", metavar="NAME", help="layers, blocks, pipeline or all of a CPU; or gpu.")
    ] = "layers",
    device: Annotated[
        str | None, typer.Option("--device", metavar="NAME", help="cpu, or for the suite gpu cuda or cuda:1.")
    ] = None,
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
    only: Annotated[
        str | None,
        typer.Option(
            "--only",
            metavar="SECTIONS",
            help="Some of checks, ceilings, layers, step, costs, repeats, tuning, joined by commas; all but tuning.",
            rich_help_panel=_GPU_SUITE,
        ),
    ] = None,
    budget: Annotated[
        float,
        typer.Option(
            "--budget", metavar="SECONDS", min=1, help="What no longer fits is left out.", rich_help_panel=_GPU_SUITE
        ),
    ] = 3600.0,
    blocks: Annotated[
        str | None,
        typer.Option(
            "--blocks",
            metavar="DOUBLE,SINGLE",
            help="So many blocks of the transformer instead of 19,38.",
            rich_help_panel=_GPU_SUITE,
        ),
    ] = None,
    smoke: Annotated[
        bool,
        typer.Option("--smoke", help="Try it out in tiny sizes, on a CPU too.", rich_help_panel=_GPU_SUITE),
    ] = False,
    json: Json = False,
) -> None:
    """Measure quantized layers, blocks and pipelines on this machine, and other libraries in the same run."""
    if dtype not in _DTYPES:
        raise SVDQuantError(f"--dtype {dtype!r} is none of {', '.join(_DTYPES)}")
    if output.exists() and not output.is_dir():
        raise SVDQuantError(f"{output}: is a file; choose a folder with --output")
    if suite == "gpu":
        results, files = _gpu(device, only, budget, blocks, rounds, smoke, output)
        _finish(results, files, json)
        return
    if device not in (None, "cpu"):
        raise SVDQuantError(f"--device {device!r} has no benchmark but --suite gpu; leave it out for the CPU")
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
        results = run(suites, settings, make_device("cpu", threads), command)
    files, missing = save(results, output)
    if missing is not None:
        remark(missing)
    _finish(results, files, json)


def _gpu(
    device: str | None, only: str | None, budget: float, blocks: str | None, rounds: int, smoke: bool, output: Path
) -> tuple[Results, list[Path]]:
    """The suite of a GPU: (results, files)."""
    import torch

    name = device or ("cuda:0" if torch.cuda.is_available() or not smoke else "cpu")
    if name == "cpu":
        if not smoke:
            raise SVDQuantError("--suite gpu measures nothing on a CPU; try it out there with --smoke")
        # Triton asks for it when kernels are imported, which must not have happened yet.
        os.environ.setdefault("TRITON_INTERPRET", "1")

    from ..bench.device import make_device
    from ..bench.gpu import GPUSettings, choose_sections, run_gpu
    from ..bench.run import save, write

    sections, counts = choose_sections(only), _two(blocks)
    try:
        where = make_device(name, None)
    except (ValueError, RuntimeError):
        raise SVDQuantError(f"--device {name!r} is not here; --smoke --device cpu tries the suite out") from None
    command = shlex.join(
        ["svdquant", "bench", "--suite", "gpu", "--device", name, "--budget", f"{budget:g}", "--rounds", str(rounds)]
        + [part for option, value in (("--only", only), ("--blocks", blocks)) if value for part in (option, value)]
        + (["--smoke"] if smoke else [])
    )
    output.mkdir(parents=True, exist_ok=True)
    _check_writable(output)
    with contextlib.suppress(ImportError):  # this suite runs without diffusers
        quiet_libraries()
    _quiet_peers()
    with doing("measuring"), Stages(_STAGES) as progress:
        settings = GPUSettings(sections, budget, smoke, counts, 1 if smoke else rounds, progress)
        settings.save = lambda results: write(results, output)
        results = run_gpu(settings, where, command, output)
    files, missing = save(results, output)
    if missing is not None:
        remark(missing)
    return results, files


def _two(blocks: str | None) -> tuple[int, int] | None:
    """ "2,4" as numbers. Raises `SVDQuantError` for anything else."""
    if blocks is None:
        return None
    parts = blocks.split(",")
    if len(parts) != 2 or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise SVDQuantError(f"--blocks {blocks!r} is not two numbers such as 2,4")
    return int(parts[0]), int(parts[1])


def _finish(results: Results, files: list[Path], json: bool) -> None:
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

    from ..bench.report import TARGETS, remarks, rich_table, target_cells, verdict

    console = Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False, soft_wrap=True)
    machine = results.machine
    threads = f", {machine['threads']} threads" if "threads" in machine else ""
    console.print(f"{machine['name']}{threads}; torch {results.versions['torch']}\n")
    for case in results.cases:
        line = verdict(case)
        console.print(rich_table(case) if line is None else line, markup=False)
        for row in case.rows:
            if row.reason:
                console.print(f"not run: {row.contender}: {row.reason}", markup=False)
        for text in remarks(case):
            console.print(text, markup=False)
        console.print()
    for text in results.notes:
        console.print(text, markup=False)
    if results.targets:
        rows = [target_cells(target) for target in results.targets]
        console.print("\n" + table(list(TARGETS), rows, "<>>"), markup=False)
