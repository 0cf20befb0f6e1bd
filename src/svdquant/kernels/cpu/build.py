"""Compiles `csrc/` into one shared library per platform: `python -m svdquant.kernels.cpu.build`.

Needs the `ziglang` package, which compiles for every target, or clang 19 for this machine. Runs without torch and
without the rest of the package, so that a wheel can be built where neither is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import re
import shlex
import shutil
import struct
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

_HERE = Path(__file__).resolve().parent
SOURCES = _HERE / "csrc"
LIBRARIES = _HERE / "lib"
# Apple numbers its own.
_OLDEST_CLANG = {"": 19, "Apple ": 17}


class BuildError(RuntimeError):
    """One sentence: what is missing, or the compiler's own words."""


@dataclass(frozen=True)
class Variant:
    """One instruction set: what zig's -mcpu calls the processor, features on top of it, and further flags."""

    name: str
    processor: str
    features: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()


_VNNI = ("avx512vnni",)
_BF16 = (*_VNNI, "avx512bf16")
_AMX = (*_BF16, "amx_tile", "amx_int8", "amx_bf16")
# clang splits 64-byte vectors in two for this processor unless it is told not to.
_WIDE = ("-mprefer-vector-width=512",)
# Best first: the library picks the first that the processor can run. `csrc/cpu.h` names a field after each.
VARIANTS = {
    "x86_64": (
        Variant("amx", "x86_64_v4", _AMX, _WIDE),
        Variant("avx512bf16", "x86_64_v4", _BF16, _WIDE),
        Variant("avx512", "x86_64_v4", _VNNI, _WIDE),
        Variant("avxvnni", "x86_64_v3", ("avxvnni",)),
        Variant("avx2", "x86_64_v3"),
    ),
    "aarch64": (
        Variant("i8mm", "generic", ("dotprod", "i8mm", "bf16")),
        Variant("neon", "generic", ("dotprod",)),
    ),
}
_BASELINE = {"x86_64": Variant("", "x86_64"), "aarch64": Variant("", "generic")}


@dataclass(frozen=True)
class Target:
    """One platform: zig's triple for it, its libraries' ending, and the tag of a wheel that holds one."""

    name: str
    machine: str
    triple: str
    suffix: str
    wheel_tag: str

    @property
    def library(self) -> str:
        return f"svdquant-cpu-{self.name}{self.suffix}"


def _linux(machine: str) -> Target:
    tag = f"manylinux_2_17_{machine}.manylinux2014_{machine}"
    return Target(f"linux-{machine}", machine, f"{machine}-linux-gnu.2.17", ".so", tag)


TARGETS = {
    target.name: target
    for target in (
        _linux("x86_64"),
        _linux("aarch64"),
        Target("macos-arm64", "aarch64", "aarch64-macos.11.0", ".dylib", "macosx_11_0_arm64"),
        Target("macos-x86_64", "x86_64", "x86_64-macos.10.13", ".dylib", "macosx_10_13_x86_64"),
        Target("windows-x86_64", "x86_64", "x86_64-windows-gnu", ".dll", "win_amd64"),
    )
}


def host_target() -> Target | None:
    """The target of the running interpreter; None where there is none (32 bits, musl, other processors)."""
    system, _, machine = sysconfig.get_platform().partition("-")
    system = {"macosx": "macos", "win": "windows"}.get(system, system)
    machine = machine.rpartition("-")[2]
    if machine == "universal2":
        machine = platform.machine()
    machine = {"amd64": "x86_64"}.get(machine, machine)
    if struct.calcsize("P") != 8 or (system == "linux" and platform.libc_ver()[0] != "glibc"):
        return None
    return TARGETS.get(f"{system}-{machine}")


@dataclass(frozen=True)
class Compiler:
    """A command that compiles C, and whether it is zig's."""

    command: tuple[str, ...]
    zig: bool

    def flags(self, target: Target, variant: Variant) -> list[str]:
        """Which machine to compile for."""
        if self.zig:
            machine = ["-target", target.triple, "-mcpu=" + "+".join((variant.processor, *variant.features))]
        elif target.machine == "aarch64":
            machine = ["-march=" + "+".join(("armv8-a", *variant.features))]
        else:
            # What zig writes with underscores: x86_64_v4, amx_tile.
            machine = [f"-m{feature.replace('_', '-')}" for feature in variant.features]
            machine.append("-march=" + variant.processor.replace("_", "-"))
        if not self.zig and target.suffix == ".dylib":
            machine.append("-mmacosx-version-min=" + target.triple.partition(".")[2])
        return [*machine, *variant.flags]

    def wheel_tag(self, target: Target) -> str:
        """Which systems install a wheel with this library: clang links to the C library of this very one."""
        if self.zig or target.suffix != ".so":
            return target.wheel_tag
        return f"linux_{target.machine}"


def find_compiler(command: str | None = None) -> Compiler:
    """The compiler: `command` where given, else zig of the `ziglang` package, else clang on PATH.

    Raises `BuildError` where there is none or clang is older than 16.
    """
    if command:
        words = tuple(shlex.split(command, posix=os.name != "nt"))
        return Compiler(words, zig=True) if words[-1] == "cc" else _clang(words)
    package = importlib.util.find_spec("ziglang")
    for folder in (package and package.submodule_search_locations) or ():
        zig = shutil.which("zig", path=folder)
        if zig:
            return Compiler((zig, "cc"), zig=True)
    clang = shutil.which("clang")
    if clang is None:
        raise BuildError("no C compiler: `pip install ziglang`, or put clang 19 or newer on PATH")
    return _clang((clang,))


def _clang(words: tuple[str, ...]) -> Compiler:
    shown = shlex.join(words)
    try:
        answer = subprocess.run([*words, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"{shown} does not run: {error}") from error
    version = re.search(r"(Apple |)clang version (\d+)", answer)
    if version is None:
        raise BuildError(f"{shown} is neither zig nor clang: `pip install ziglang`, or name another with --cc")
    if int(version[2]) < _OLDEST_CLANG[version[1]]:
        raise BuildError(f"{shown} is clang {version[2]}, which is too old: `pip install ziglang`, or use clang 19")
    return Compiler(words, zig=False)


def build(
    targets: Sequence[str] = ("host",),
    out: Path = LIBRARIES,
    compiler: str | None = None,
    without: Sequence[str] = (),
    strict: bool = False,
) -> list[Path]:
    """Compiles for each target into `out` and returns the libraries' paths.

    targets: names of `TARGETS`, "host" or "all". compiler: a command, default `find_compiler`'s choice. without:
    variants to leave out. strict: warnings are errors. A library that exists is replaced only by a complete one.
    Raises `BuildError`.
    """
    found = find_compiler(compiler)
    host = host_target()
    wanted: list[Target] = []
    for name in targets:
        if name == "host" and host is None:
            raise BuildError(f"there is no library for this platform ({sysconfig.get_platform()})")
        some = list(TARGETS.values()) if name == "all" else [host if name == "host" else TARGETS.get(name)]
        for target in some:
            if target is None:
                raise BuildError(f"{name!r} is not one of host, all, {', '.join(TARGETS)}")
            if not found.zig and target is not host:
                raise BuildError(f"only zig compiles for {target.name} here: `pip install ziglang`")
            wanted.append(target)
    try:
        out.mkdir(parents=True, exist_ok=True)
        return [_build(target, out, found, without, strict) for target in dict.fromkeys(wanted)]
    except OSError as error:
        raise BuildError(f"cannot write the library to {out}: {error}") from error


def _build(target: Target, out: Path, compiler: Compiler, without: Sequence[str], strict: bool) -> Path:
    variants = [v for v in VARIANTS[target.machine] if v.name not in without]
    common = ["-std=c11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-fomit-frame-pointer"]
    common += ["-fno-sanitize=all", "-Wall", "-Wextra", "-Wno-psabi", "-c"]
    if target.suffix != ".dll":
        common.append("-fPIC")
    if strict:
        common.append("-Werror")
    listed = "-DSVDQ_VARIANTS(use)=" + " ".join(f"use({v.name})" for v in variants)
    with tempfile.TemporaryDirectory(prefix=".svdquant-", dir=out, ignore_cleanup_errors=True) as folder:
        environment = _environment(Path(folder))
        commands, objects = [], []
        # The variants first: they take longest.
        for source in sorted(SOURCES.glob("*.c"), key=lambda path: (not path.name.startswith("variant_"), path.name)):
            per_variant = source.name.startswith("variant_")
            for variant in variants if per_variant else [_BASELINE[target.machine]]:
                objects.append(os.path.join(folder, f"{source.stem}-{variant.name}.o"))
                defines = [f"-DSVDQ_ISA={variant.name}"] if per_variant else [listed]
                flags = [*common, *compiler.flags(target, variant), *defines]
                commands.append([*compiler.command, *flags, str(source), "-o", objects[-1]])
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            list(pool.map(lambda command: _run(command, environment), commands))
        made = os.path.join(folder, target.library)
        machine = compiler.flags(target, _BASELINE[target.machine])
        _run([*compiler.command, *machine, *_link_flags(target, compiler.zig), *objects, "-o", made], environment)
        os.replace(made, out / target.library)
    return out / target.library


def _link_flags(target: Target, zig: bool) -> list[str]:
    if target.suffix == ".so":
        # Without the compiler's own run-time library: nothing here needs it, and zig would build it first.
        return ["-shared", "-s", "-Wl,-z,defs", "-nostdlib", "-lc", "-lm"]
    if target.suffix == ".dylib":
        return ["-shared", "-nostdlib", "-lSystem", f"-Wl,-install_name,@rpath/{target.library}"]
    if not zig:
        return ["-shared"]
    return ["-shared", "-s", "-nostdlib", "-rtlib=compiler-rt", "-lucrtbase"]


def _environment(temporary: Path) -> dict[str, str]:
    """zig keeps what it built for a platform: in a checkout's build folder, else only until the end."""
    root = _HERE.parents[3]
    checkout = (root / "pyproject.toml").is_file() and os.access(root, os.W_OK)
    cache = root / "build" / "zig" if checkout else temporary / "zig"
    folders = {"ZIG_GLOBAL_CACHE_DIR": str(cache), "ZIG_LOCAL_CACHE_DIR": str(cache)}
    return folders | dict(os.environ)


def _run(command: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise BuildError(f"the compiler ended with {done.returncode}: {shlex.join(command)}\n{done.stderr.strip()}")
    if done.stderr.strip():
        print(done.stderr.strip(), file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m svdquant.kernels.cpu.build", description=__doc__.split("\n")[0])
    parser.add_argument("--target", action="append", choices=["host", "all", *TARGETS], help="default: host")
    parser.add_argument("--out", type=Path, default=LIBRARIES, help="folder for the library (default: %(default)s)")
    parser.add_argument("--cc", help="the compiler's command, such as 'zig cc' or clang-19")
    names = sorted({v.name for variants in VARIANTS.values() for v in variants})
    parser.add_argument("--without", action="append", default=[], choices=names, help="leave an instruction set out")
    parser.add_argument("--strict", action="store_true", help="warnings are errors")
    chosen = parser.parse_args(arguments)
    try:
        for path in build(chosen.target or ["host"], chosen.out, chosen.cc, chosen.without, chosen.strict):
            print(path)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
