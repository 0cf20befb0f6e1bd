"""Unpacking in registers: the machine instructions emulated, and the product against the one on expanded weights."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import truth

from svdquant.kernels.gpu import unpack
from svdquant.kernels.gpu.arch import Arch
from svdquant.kernels.gpu.eight_bit import EightBit
from svdquant.kernels.gpu.registers import Registers
from svdquant.kernels.gpu.types import Epilogue, HeadNorm, Reading

HALF = torch.float16
U32 = np.uint32


def halves(x):
    return x.astype(U32).view(np.float16).reshape(*x.shape, 2)


def from_halves(x):
    return np.ascontiguousarray(x).view(U32)[..., 0]


def fused(a, b, c):
    """a·b + c rounded once: exact in float64 for these sizes."""
    return (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(np.float16)


def permute(a, b, selector):
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    out = np.zeros_like(a)
    for i in range(4):
        byte = selector >> (4 * i) & 7
        out |= ((both >> np.uint64(8 * byte)) & np.uint64(255)).astype(U32) << U32(8 * i)
    return out


def logic(a, b, c, table):
    out = np.zeros_like(a)
    for i in range(8):
        if table >> i & 1:
            out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out


def to_e4m3(x):
    values = torch.from_numpy(halves(x).astype(np.float32)).clamp(-448, 448).to(torch.float8_e4m3fn)
    return values.view(torch.uint8).numpy().astype(U32) @ np.array([1, 256], dtype=U32)


def run(source, word, ratio):
    """The few instructions of PTX that the strings consist of, on arrays of registers. Returns ($0, $1)."""
    registers = {"$2": word, "$3": ratio}

    def value(name):
        name = name.strip()
        return registers[name] if name in registers else np.full_like(word, int(name, 0))

    body = re.sub(r"\{ \.reg[^;]*;(?:[^;]*\.b16[^;]*;)?", "", source, count=1).rsplit("}", 1)[0]
    for line in filter(None, map(str.strip, body.split(";"))):
        operation, rest = line.split(" ", 1)
        packed = re.search(r"\{(.*)\}", rest)
        if packed:
            low, high = packed.group(1).split(",")
            registers[rest.split(",")[0]] = value(low) | value(high) << U32(16)
            continue
        target, *operands = map(str.strip, rest.split(","))
        kind = operation.split(".")[0]
        a = [value(x) for x in operands]
        if kind == "shr":
            result = a[0] >> a[1]
        elif kind == "shl":
            result = a[0] << a[1]
        elif kind == "and":
            result = a[0] & a[1]
        elif kind == "mov":
            result = a[0]
        elif kind == "lop3":
            result = logic(*a[:3], int(operands[3], 0))
        elif kind == "prmt":
            result = permute(a[0], a[1], int(operands[2], 0))
        elif kind == "sub":
            result = from_halves(halves(a[0]) - halves(a[1]))
        elif kind == "mul":
            result = from_halves(halves(a[0]) * halves(a[1]))
        elif kind == "fma":
            result = from_halves(fused(*map(halves, a)))
        else:
            assert kind == "cvt"
            result = to_e4m3(a[0])
        registers[target] = result
    return registers["$0"], registers["$1"]


@pytest.mark.parametrize(
    "name", ["INT4_INT8", "INT4_E4M3", "NVFP4_INT8", "NVFP4_E4M3", "INT4_INT8_SPLIT", "INT4_E4M3_SPLIT"]
)
def test_instructions(name):
    """All codes in all places, many ratios: code·ratio rounded to 8 bits, in the order that is promised."""
    weights, eight = name.lower().split("_")[:2]
    generator = np.random.default_rng(0)
    top = unpack.TOP[weights, "int8" if eight == "int8" else "fp8"]
    ratio = np.concatenate(
        [generator.uniform(0, top, 4000), np.exp2(generator.uniform(-24, 4, 1000)).clip(0, top), [top, 0]]
    )
    ratio = ratio.astype(np.float16)
    codes = np.stack([(np.arange(8) + i) % 16 for i in range(16)])
    word = (codes.astype(U32) << (4 * np.arange(8, dtype=U32))).sum(1, dtype=U32)
    words = np.tile(word, len(ratio))
    ratios = np.repeat(ratio, 16)
    bits = ratios.view(np.uint16).astype(U32)
    low, high = run(getattr(unpack, f"PTX_{name}").value, words, bits | bits << U32(16))
    bytes8 = np.ascontiguousarray(np.stack([low, high], 1)).view(np.uint8)
    order = [0, 2, 4, 6, 1, 3, 5, 7] if name.endswith("SPLIT") else list(range(8))
    table = (truth.INT4 if weights == "int4" else truth.E2M1).numpy()
    product = table[np.tile(codes, (len(ratio), 1))[:, order]] * ratios.astype(np.float64)[:, None]
    if eight == "int8":
        assert np.array_equal(bytes8.view(np.int8), np.rint(product))
    else:
        wanted = torch.from_numpy(product.astype(np.float16).astype(np.float32)).to(torch.float8_e4m3fn)
        assert torch.equal(torch.from_numpy(bytes8).view(torch.float8_e4m3fn).float(), wanted.float())


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(5)


def outputs(generator, precision, tokens, n, k, epilogue, dtype=HALF, count=1, **spec):
    layers = [truth.random_layer(generator, n, k, dtype=dtype, **spec) for _ in range(count)]
    for t in layers:
        t.smooth_factor, t.proj_down = layers[0].smooth_factor, layers[0].proj_down
    x = truth.random_input(generator, 2, tokens, k, dtype)
    found = []
    for product in (Registers(), EightBit()):
        q = truth.quantized_input(x, layers[0], product.reading(precision))
        out = torch.full((2, tokens, n * count), float("nan"), dtype=dtype)
        product.multiply(q, layers, out, epilogue)
        assert torch.isfinite(out).all()
        found.append(out)
    return found


@pytest.mark.parametrize(
    "tokens, n, k, spec", [(1, 40, 64, {}), (17, 70, 320, {"bias": False}), (5, 24, 256, {"group": 128})]
)
def test_bits_of_the_expanded_product(generator, tokens, n, k, spec):
    ours, expanded = outputs(generator, "int8", tokens, n, k, Epilogue(), rank=0, **spec)
    assert torch.equal(ours, expanded)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize(
    "spec", [{}, {"rank": 48, "unsigned": ((64, 192),)}, {"rotate": True, "count": 2}, {"dtype": torch.bfloat16}]
)
def test_agrees_with_the_expanded_product(generator, precision, spec):
    ours, expanded = outputs(generator, precision, 9, 40, 192, Epilogue(gelu="rank" in spec), **spec)
    assert truth.relative_error(ours, expanded) < (1e-2 if spec.get("dtype") else 1e-3)


def test_refusals(generator):
    hopper = Arch("nvidia", 90)
    assert "multiple of 64" in Registers().why_not(truth.random_layer(generator, 8, 64, group=32), "int8", HALF, hopper)
    assert "int4" in Registers().why_not(truth.random_layer(generator, 8, 64, "nvfp4"), "int8", HALF, hopper)
    assert Registers().reading("int8") == Reading("int8", split=True)
    t = truth.random_layer(generator, 64, 64)
    assert not Registers().fuses(Epilogue(norm=HeadNorm((None,), 1e-6, 64)), [t])
