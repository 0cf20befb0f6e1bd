"""Variants for processors that this one is not: AMX and AVX-VNNI by instructions written in C, ARM in an emulator."""

from __future__ import annotations

import ctypes
import importlib.util
import platform
import random
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import cpu_compile
import cpu_truth
import pytest
import torch
from cpu_remote import Remote
from cpu_truth import BF16, DTYPES, FP32

from svdquant.kernels import svdquant_linear
from svdquant.kernels.cpu import build, library, linear

needs_zig = pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="ziglang is not installed")


@pytest.fixture(scope="class")
def emulated(tmp_path_factory) -> Iterator[library.Library]:
    """The library with `amx` and `avxvnni` made of what AVX512 and AVX2 compile; loaded in place of the real one."""
    target = build.host_target()
    if target is None or target.name != "linux-x86_64":
        pytest.skip("emulated on x86-64 Linux only")
    avx512, avx2 = (cpu_compile.variant("x86_64", name) for name in ("avx512", "avx2"))
    header = ("-include", str(cpu_compile.C / "emulated.h"))
    amx = replace(avx512, name="amx", flags=(*avx512.flags, "-DEMULATE_AMX", *header))
    vnni = replace(avx2, name="avxvnni", flags=(*avx2.flags, "-DEMULATE_AVXVNNI", *header))
    path = cpu_compile.link(
        tmp_path_factory.mktemp("emulated") / "library.so",
        target,
        [amx, avx512, vnni, avx2],
        [cpu_compile.C / "emulated.c"],
        ["-shared", "-nostdlib", "-lc", "-lm", "-Wl,-z,defs"],
        {"cpu_x86.c": ["-Dsvdq_examine_cpu=real_examine_cpu"]},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SVDQUANT_CPU_LIBRARY", str(path))
        patch.delenv("SVDQUANT_CPU_ISA", raising=False)
        patch.setattr(library, "_found", None)
        linear.operations.cache_clear()
        loaded = library.load()
        if loaded is None:
            pytest.skip(library.status().reason)
        yield loaded
    linear.operations.cache_clear()


def same_bits(one: str, other: str, x: torch.Tensor, t: Any, activations: str, label: object) -> None:
    outputs = []
    for variant in (one, other):
        with cpu_truth.running(variant):
            outputs.append(svdquant_linear(x.clone(), t, activations))
    assert torch.equal(*outputs), label


def random_layer(seed: int) -> tuple[torch.Tensor, Any, str, object]:
    choose = random.Random(seed)
    weights, dtype = choose.choice(["int4", "int4", "nvfp4", "int8"]), choose.choice(DTYPES)
    k, n = choose.choice([choose.randint(1, 600), 256, 512]), choose.randint(1, 150)
    rows = choose.choice([1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 23, 24, 33, 50])
    options: dict[str, Any] = {
        "rank": choose.choice([0, 1, 16, 32]),
        "bias": choose.random() < 0.7,
        "smooth": choose.random() < 0.7,
        "group": choose.choice([0, 16, 32, 64, 64, 128, 256]) if weights != "nvfp4" else None,
    }
    kind = choose.choice(["", "", "rotate", "unsigned"])
    if kind == "rotate":
        options["rotate"] = True
    elif kind == "unsigned":
        start = choose.randint(0, k - 1)
        options["unsigned"] = ((start, choose.randint(start + 1, k)),)
    t = cpu_truth.layer(k, n, weights, dtype=dtype, seed=seed, **options)
    activations = choose.choice(["int8", "int4"])
    return cpu_truth.inputs(rows, k, dtype, seed, t.spec.unsigned), t, activations, (seed, rows, k, n, weights, options)


@needs_zig
class TestEmulated:
    @pytest.mark.parametrize("activations", ["int8", "int4"])
    @pytest.mark.parametrize(
        ("weights", "group"),
        [*[("int4", group) for group in (0, 16, 32, 64, 128, 256)], ("nvfp4", 16), ("int8", 0), ("int8", 64)],
    )
    def test_amx_has_the_bits_of_avx512(self, emulated, weights, group, activations):
        if "amx" not in library.status().variants:
            pytest.skip("this processor has no AVX512")
        for k, n in ((40, 33), (256, 64), (650, 130)):
            t = cpu_truth.layer(k, n, weights, group)
            for rows in (1, 7, 8, 15, 16, 17, 24, 31, 33, 70):
                x = cpu_truth.inputs(rows, k, FP32, rows)
                same_bits("amx", "avx512", x, t, activations, (k, n, rows))
        assert ctypes.CFUNCTYPE(ctypes.c_int)(("emulated_tiles_in_use", emulated.cdll))() == 0

    def test_random_layers_on_amx(self, emulated, threads):
        if "amx" not in library.status().variants:
            pytest.skip("this processor has no AVX512")
        for seed in range(60):
            threads(1 + seed % 2)
            x, t, activations, label = random_layer(seed)
            same_bits("amx", "avx512", x, t, activations, label)

    def test_avxvnni_has_the_bits_of_avx2(self, emulated):
        for seed in range(60):
            x, t, activations, label = random_layer(seed)
            same_bits("avxvnni", "avx2", x, t, activations, label)


@pytest.mark.parametrize("weights", ["int4", "nvfp4", "int8"])
def test_largest_codes(path, weights):
    """Nothing saturates: all products of one sign, of the largest codes there are."""
    lowest, highest = {"int4": (0x88, 0x77), "nvfp4": (0xFF, 0x77), "int8": (-128, 127)}[weights]
    for k in (512, 513):
        t = cpu_truth.layer(k, 20, weights, rank=0, smooth=False)
        t.qweight[:10], t.qweight[10:] = lowest, highest
        for sign in (1, -1):
            for activations in ("int8", "int4"):
                cpu_truth.check_linear(path, torch.full((9, k), 3.0 * sign), t, activations, (k, sign))


@pytest.fixture(scope="class")
def arm_program(tmp_path_factory) -> Iterator[Remote]:
    """The operations of both ARM variants. The first time on a machine zig builds a C library: a minute or two."""
    emulator = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    native = sys.platform == "linux" and platform.machine() == "aarch64"
    if emulator is None and not native:
        pytest.skip("neither an ARM processor nor qemu-aarch64 (Debian's qemu-user-static)")
    program = cpu_compile.link(
        tmp_path_factory.mktemp("arm") / "driver",
        build.Target("linux-aarch64-static", "aarch64", "aarch64-linux-musl", "", ""),
        build.VARIANTS["aarch64"],
        [cpu_compile.C / "driver.c"],
        ["-static"],
    )
    remote = Remote([str(program)] if native else [str(emulator), str(program)])
    yield remote
    remote.close()


@pytest.fixture(params=["neon", "i8mm"])
def arm(request, arm_program, monkeypatch) -> str:
    if not arm_program.select(request.param):
        pytest.skip(f"this processor has no {request.param}")
    monkeypatch.setattr(linear, "operations", lambda: arm_program)
    return request.param


@needs_zig
class TestArm:
    def test_random_layers(self, arm):
        for seed in range(200, 320):
            x, t, activations, label = random_layer(seed)
            y = linear.svdquant_linear(x, t, activations)
            cpu_truth.check(arm, y, cpu_truth.output(x, t, activations), t, label, activations == "int4")

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_rows_on_their_own(self, arm, dtype):
        for weights in ("int4", "nvfp4", "int8"):
            t, x = cpu_truth.layer(200, 100, weights, rank=32, dtype=dtype), cpu_truth.inputs(37, 200, dtype)
            for activations in ("int8", "int4"):
                y = linear.svdquant_linear(x, t, activations)
                for rows in (1, 3, 4, 8, 15):
                    parts = [linear.svdquant_linear(part, t, activations) for part in x.split(rows)]
                    assert torch.equal(torch.cat(parts), y), (weights, activations, rows)

    def test_largest_codes(self, arm):
        for weights, lowest, highest in (("int4", 0x88, 0x77), ("nvfp4", 0xFF, 0x77), ("int8", -128, 127)):
            t = cpu_truth.layer(512, 20, weights, rank=0, smooth=False)
            t.qweight[:10], t.qweight[10:] = lowest, highest
            for x in (torch.full((9, 512), 3.0), torch.full((9, 512), -3.0)):
                expected = cpu_truth.output(x, t, "int8")
                cpu_truth.check(arm, linear.svdquant_linear(x, t, "int8"), expected, t, weights)

    def test_gelu(self, arm):
        t, x = cpu_truth.layer(200, 100, rank=32, dtype=BF16), cpu_truth.inputs(9, 200, BF16)
        y = linear.svdquant_linear(x, t, "int8", True)
        expected = torch.nn.functional.gelu(torch.from_numpy(cpu_truth.output(x, t, "int8")), approximate="tanh")
        cpu_truth.check(arm, y, expected.numpy(), t)

    def test_weights_only(self, arm):
        for seed in range(60):
            choose = random.Random(seed)
            weights, dtype = choose.choice(["int4", "nvfp4", "int8"]), choose.choice(DTYPES)
            zeros = weights == "int4" and seed % 2 == 0
            k, n, rows = choose.randint(1, 300), choose.randint(1, 80), choose.choice([1, 2, 3, 4, 5, 9])
            t = cpu_truth.layer(k, n, weights, dtype=dtype, rank=0, kind="w4a16", smooth=False, seed=seed, zeros=zeros)
            x = cpu_truth.inputs(rows, k, dtype, seed)
            y = linear.w4a16_linear(x, t.qweight, t.wscales, t.bias, weights, t.wzeros)
            cpu_truth.check(arm, y, cpu_truth.weight_only(x, t), t, (seed, weights, dtype), True)
