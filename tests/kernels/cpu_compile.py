"""The CPU library's sources, compiled as no wheel has them: for instructions that are emulated, and around a driver."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from svdquant.kernels.cpu import build

C = Path(__file__).parent / "c"
_COMMON = ("-std=c11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-fno-sanitize=all")
_CHECKS = ("-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-Wno-builtin-macro-redefined")


def variant(machine: str, name: str) -> build.Variant:
    return next(v for v in build.VARIANTS[machine] if v.name == name)


def link(
    out: Path,
    target: build.Target,
    variants: Sequence[build.Variant],
    more: Sequence[Path] = (),
    flags: Sequence[str] = (),
    flags_of: dict[str, Sequence[str]] | None = None,
) -> Path:
    """Compiles `csrc/` with these variants, best first, and files `more`, and links all to `out`.

    flags: of the linker; flags_of: of one source file, by its name. Raises `CalledProcessError`.
    """
    compiler = build.find_compiler()
    baseline = build.Variant("", {"x86_64": "x86_64", "aarch64": "generic"}[target.machine])
    listed = "-DSVDQ_VARIANTS(use)=" + " ".join(f"use({v.name})" for v in variants)
    commands: list[list[str]] = []
    for source in (*sorted(build.SOURCES.glob("*.c")), *more):
        per_variant = source.name.startswith("variant_")
        for v in variants if per_variant else [baseline]:
            own = [f"-DSVDQ_ISA={v.name}"] if per_variant else [listed, *(flags_of or {}).get(source.name, ())]
            made = out.with_name(f"{source.stem}-{v.name}.o")
            command = [*compiler.command, *_COMMON, *_CHECKS, *compiler.flags(target, v), *own, "-fPIC"]
            commands.append([*command, f"-I{build.SOURCES}", "-c", str(source), "-o", str(made)])
    environment = build._environment(out.parent)
    with ThreadPoolExecutor(2) as pool:
        for done in pool.map(lambda c: subprocess.run(c, env=environment, capture_output=True, text=True), commands):
            assert done.returncode == 0, done.stderr
    objects = [command[-1] for command in commands]
    machine = compiler.flags(target, baseline)
    done = subprocess.run(
        [*compiler.command, *machine, *flags, *objects, "-o", str(out)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return out
