"""The entry point of the command: verbs, global flags, and one sentence for whatever goes wrong."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from .bench import bench
from .console import debugging
from .convert import convert
from .demo import demo
from .doctor import doctor
from .failures import DEBUG, INTERRUPTED, Interrupted, explain
from .generate import generate
from .inspect import inspect
from .lora import lora
from .plan import plan
from .quantize import quantize

app = typer.Typer(
    name="svdquant",
    help="Quantize diffusion models to 4 bits with SVDQuant, and run them on any device.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verb in (demo, plan, quantize, generate, convert, inspect, doctor, bench):
    app.command()(verb)
app.add_typer(lora)


def _print_version(value: bool) -> None:
    if value:
        from .. import __version__

        typer.echo(f"svdquant {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and the libraries' own messages.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    if debug:
        os.environ[DEBUG] = "1"


def run(arguments: list[str]) -> int:
    """Runs one command line and returns its exit code: 0, 2 for bad input, 130 interrupted, 1 anything else."""
    arguments = _debug_first(arguments)
    try:
        result = typer.main.get_command(app)(args=arguments, prog_name="svdquant", standalone_mode=False)
        if result == INTERRUPTED:
            raise KeyboardInterrupt
        return result if isinstance(result, int) else 0
    except BaseException as error:
        sentence, code = explain(error)
        if debugging() and isinstance(error, Exception) and not isinstance(error, (Interrupted, typer.Exit)):
            import traceback

            traceback.print_exception(error)
        if sentence:
            print(f"svdquant: {sentence}", file=sys.stderr)
        return code


def _debug_first(arguments: list[str]) -> list[str]:
    """--debug is a flag of the command, but is accepted after the verb as well."""
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    if "--debug" not in own:
        return arguments
    position = own.index("--debug")
    return ["--debug", *arguments[:position], *arguments[position + 1 :]]


def main() -> None:
    """What the installed command `svdquant` calls."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
