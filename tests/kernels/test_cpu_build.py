"""Compiling the library, and the wheels that hold it."""

from __future__ import annotations

import importlib.util
import os
import re
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from svdquant.kernels.cpu import build

ROOT = Path(__file__).parents[2]
needs_zig = pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="ziglang is not installed")


def check_elf(data: bytes, machine: int) -> None:
    """A whole shared library for Linux, for any C library since 2.17."""
    assert data[:4] == b"\x7fELF" and struct.unpack_from("<HH", data, 16) == (3, machine)
    needed = {tuple(map(int, v.split(b"."))) for v in re.findall(rb"GLIBC_([0-9.]+)", data)}
    assert needed and max(needed) <= (2, 17)


def no_compiler(monkeypatch) -> None:
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(build.shutil, "which", lambda *_, **__: None)


def test_without_a_compiler(monkeypatch, tmp_path, capsys):
    no_compiler(monkeypatch)
    with pytest.raises(build.BuildError, match=r"no C compiler: `pip install ziglang`, or put clang \d+ or newer"):
        build.build(out=tmp_path)
    assert build.main(["--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("error: no C compiler")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="the stand-ins are shell scripts")
@pytest.mark.parametrize(
    ("says", "problem"),
    [
        ("Debian clang version 14.0.6", "is clang 14, which is too old"),
        ("Apple clang version 14.0.0 (clang-1400.0.29.202)", "is clang 14, which is too old"),
        ("gcc (Debian 12.2.0-14) 12.2.0", "is neither zig nor clang"),
        ("Ubuntu clang version 19.1.1", None),
        ("Apple clang version 17.0.0 (clang-1700.0.13.5)", None),
    ],
)
def test_other_compilers(tmp_path, says, problem):
    script = tmp_path / "compiler"
    script.write_text(f"#!/bin/sh\necho '{says}'\n")
    script.chmod(0o755)
    if problem is None:
        assert not build.find_compiler(str(script)).zig
        return
    with pytest.raises(build.BuildError, match=problem):
        build.find_compiler(str(script))


def test_compiler_that_is_not_there(tmp_path):
    with pytest.raises(build.BuildError, match="does not run"):
        build.find_compiler(str(tmp_path / "clang"))


def test_flags_of_both_compilers():
    linux, arm = build.TARGETS["linux-x86_64"], build.TARGETS["macos-arm64"]
    variant = next(v for v in build.VARIANTS["x86_64"] if v.name == "avx512bf16")
    zig, clang = build.Compiler(("zig", "cc"), True), build.Compiler(("clang",), False)
    assert "-mcpu=x86_64_v4+avx512vnni+avx512bf16" in zig.flags(linux, variant)
    assert {"-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16"} <= set(clang.flags(linux, variant))
    assert clang.flags(arm, build.VARIANTS["aarch64"][-1]) == ["-march=armv8-a+dotprod", "-mmacosx-version-min=11.0"]
    assert zig.wheel_tag(linux) == "manylinux_2_17_x86_64.manylinux2014_x86_64"
    assert clang.wheel_tag(linux) == "linux_x86_64"


@pytest.mark.parametrize(
    ("platform", "target"),
    [
        ("linux-x86_64", "linux-x86_64"),
        ("linux-aarch64", "linux-aarch64"),
        ("linux-ppc64le", None),
        ("macosx-11.0-arm64", "macos-arm64"),
        ("macosx-10.13-x86_64", "macos-x86_64"),
        ("win-amd64", "windows-x86_64"),
        ("win32", None),
        ("win-arm64", None),
    ],
)
def test_host(monkeypatch, platform, target):
    monkeypatch.setattr(build.sysconfig, "get_platform", lambda: platform)
    monkeypatch.setattr(build.platform, "libc_ver", lambda: ("glibc", "2.36"))
    found = build.host_target()
    assert (found and found.name) == target


def test_host_without_glibc(monkeypatch):
    monkeypatch.setattr(build.sysconfig, "get_platform", lambda: "linux-x86_64")
    monkeypatch.setattr(build.platform, "libc_ver", lambda: ("", ""))
    assert build.host_target() is None
    with pytest.raises(build.BuildError, match="no library for this platform"):
        build.build(compiler="zig cc")


def test_unknown_target(tmp_path):
    with pytest.raises(build.BuildError, match="'plan9' is not one of host, all, linux-x86_64"):
        build.build(["plan9"], tmp_path, "zig cc")


@needs_zig
def test_for_another_platform(tmp_path):
    (path,) = build.build(["linux-aarch64"], tmp_path, strict=True)
    assert path == tmp_path / "svdquant-cpu-linux-aarch64.so" and list(tmp_path.iterdir()) == [path]
    check_elf(path.read_bytes(), 183)


@needs_zig
def test_a_failed_build_leaves_the_library(tmp_path, monkeypatch):
    sources, out = tmp_path / "csrc", tmp_path / "lib"
    sources.mkdir()
    out.mkdir()
    (sources / "broken.c").write_text("this is not C;\n")
    monkeypatch.setattr(build, "SOURCES", sources)
    old = out / build.TARGETS["linux-x86_64"].library
    old.write_text("the old one")
    with pytest.raises(build.BuildError, match=r"(?s)compiler ended with 1.*broken\.c:1:1: error"):
        build.build(["linux-x86_64"], out)
    assert old.read_text() == "the old one" and list(out.iterdir()) == [old]


@needs_zig
def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(build.BuildError, match="cannot write the library to"):
        build.build(["linux-x86_64"], tmp_path / "file" / "lib")


def hook(asked: str | None, monkeypatch, target: str = "wheel", version: str = "standard"):
    """Runs the build hook; returns its build data, the warnings that it gave, and the hook."""
    pytest.importorskip("hatchling")
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "_load", lambda path: build)
    if asked is None:
        monkeypatch.delenv("SVDQUANT_BUILD_TARGETS", raising=False)
    else:
        monkeypatch.setenv("SVDQUANT_BUILD_TARGETS", asked)
    warnings = []
    app = SimpleNamespace(display_warning=warnings.append)
    made = module.CustomBuildHook(str(ROOT), {}, None, None, str(ROOT / "dist"), target, app)
    data = {"force_include": {}}
    made.initialize(version, data)
    return data, warnings, made


def pretend(monkeypatch) -> list:
    """`build.build` only says what it was asked for."""
    calls = []

    def pretended(targets, out=build.LIBRARIES):
        calls.append((list(targets), out))
        names = list(build.TARGETS) if targets == ["all"] else ["linux-x86_64" if t == "host" else t for t in targets]
        return [out / build.TARGETS[name].library for name in names]

    monkeypatch.setattr(build, "build", pretended)
    monkeypatch.setattr(build, "host_target", lambda: build.TARGETS["linux-x86_64"])
    monkeypatch.setattr(build, "find_compiler", lambda: build.Compiler(("zig", "cc"), True))
    return calls


@pytest.mark.parametrize(
    ("asked", "tag"),
    [
        (None, "py3-none-manylinux_2_17_x86_64.manylinux2014_x86_64"),
        ("host", "py3-none-manylinux_2_17_x86_64.manylinux2014_x86_64"),
        ("macos-arm64", "py3-none-macosx_11_0_arm64"),
        ("windows-x86_64", "py3-none-win_amd64"),
        ("all", None),
    ],
)
def test_what_a_wheel_holds(monkeypatch, asked, tag):
    pretend(monkeypatch)
    data, warnings, made = hook(asked, monkeypatch)
    assert data.get("tag") == tag and not warnings
    libraries = sorted(data["force_include"].values())
    assert len(libraries) == (len(build.TARGETS) if asked == "all" else 1)
    assert all(path.startswith("svdquant/kernels/cpu/lib/svdquant-cpu-") for path in libraries)
    folder = Path(next(iter(data["force_include"]))).parent
    made.finalize("standard", data, "")
    assert not folder.exists()


def test_editable_installation_compiles_in_place(monkeypatch):
    calls = pretend(monkeypatch)
    data, _, _ = hook(None, monkeypatch, version="editable")
    assert data == {"force_include": {}} and calls == [(["host"], build.LIBRARIES)]


def test_wheel_without_a_compiler(monkeypatch):
    data, warnings, _ = hook("none", monkeypatch)
    assert data == {"force_include": {}} and not warnings
    no_compiler(monkeypatch)
    data, warnings, _ = hook(None, monkeypatch)
    assert data == {"force_include": {}}
    assert "no CPU library in this wheel" in warnings[0] and "no C compiler" in warnings[0]
    with pytest.raises(build.BuildError, match="no C compiler"):
        hook("host", monkeypatch)


@needs_zig
def test_wheel(tmp_path):
    """A wheel as pip builds it; a few seconds, half a minute on the first time on a machine."""
    pytest.importorskip("hatchling")
    if build.host_target() is None:
        pytest.skip("no library for this platform")
    env = {key: value for key, value in os.environ.items() if key != "SVDQUANT_BUILD_TARGETS"}
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    target = build.host_target()
    (wheel,) = tmp_path.iterdir()
    assert wheel.name.endswith(f"-py3-none-{target.wheel_tag}.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert [n for n in names if "/lib/svdquant-cpu-" in n] == [f"svdquant/kernels/cpu/lib/{target.library}"]
        assert "svdquant/kernels/cpu/csrc/svdquant.h" in names and "svdquant/kernels/cpu/build.py" in names
        described = archive.read(next(n for n in names if n.endswith(".dist-info/WHEEL"))).decode()
        assert "Root-Is-Purelib: false" in described
        assert all(f"Tag: py3-none-{tag}" in described for tag in target.wheel_tag.split("."))
        if target.suffix == ".so":
            machine = {"x86_64": 62, "aarch64": 183}[target.machine]
            check_elf(archive.read(f"svdquant/kernels/cpu/lib/{target.library}"), machine)
