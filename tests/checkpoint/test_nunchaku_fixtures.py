"""Layers packed by another writer, with what they mean: the test suite's reader and the package's agree with both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import nunchaku64
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from svdquant import SVDQuantLinear, W4A16Linear

FILE = Path(__file__).resolve().parents[3] / "shared" / "fixtures" / "layers.safetensors"
W4A4 = ["int4", "int4_unsigned", "nvfp4", "nvfp4_fused_qkv"]
W4A16 = {"w4a16_adaln3": 3, "w4a16_adaln6": 6, "w4a16_t5": 0}
fixture = pytest.mark.skipif(not FILE.exists(), reason="the file of packed layers is not part of the package")


class Fixture:
    """One layer: `packed` by leaf, `logical` in float32, and its input and outputs."""

    def __init__(self, name: str) -> None:
        prefix = f"{name}."
        own = {key.removeprefix(prefix): t for key, t in load_file(FILE).items() if key.startswith(prefix)}
        self.packed = {key.removeprefix("packed."): t for key, t in own.items() if key.startswith("packed.")}
        self.logical = {key.removeprefix("logical."): t.numpy() for key, t in own.items() if key.startswith("logical.")}
        self.x, self.outputs = own["x"], own
        self.n, self.k = self.logical["weight"].shape
        self.unsigned, self.chunks = name == "int4_unsigned", W4A16.get(name, 0)

    def distance(self, y: Any, key: str) -> float:
        expected = self.outputs[key].double().numpy()
        return float(np.linalg.norm(np.asarray(y, np.float64) - expected) / np.linalg.norm(expected))

    def codes_and_scales(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of a W4A16 layer: codes, scales and stored zeros, each [N, K], by the test suite's reader."""
        leaves = ("scales", "scaled_zeros") if "scales" in self.packed else ("wscales", "wzeros")
        group = np.arange(self.k) // (128 if "scales" in self.packed else 64)
        scale, zero = (nunchaku64.numbers(self.packed[leaf])[group].T for leaf in leaves)
        return nunchaku64.w4a16_codes(self.packed["qweight"]), scale, zero


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(np.asarray(a).astype(np.float32), b)


@fixture
@pytest.mark.parametrize("name", W4A4)
def test_independent_reader_of_w4a4(name: str) -> None:
    f = Fixture(name)
    assert same(nunchaku64.w4a4_residual(f.packed, f.n, f.k), f.logical["weight"])
    assert same(nunchaku64.vector(f.packed["bias"]), f.logical["bias"])
    assert same(nunchaku64.vector(f.packed["smooth"]), f.logical["smooth"])
    assert same(nunchaku64.lora_down(f.packed["lora_down"]), f.logical["down"])
    assert same(nunchaku64.lora_up(f.packed["lora_up"]), f.logical["up"])
    weight, bias = nunchaku64.dense_w4a4(f.packed, f.n, f.k, f.unsigned)
    assert f.distance(f.x.double().numpy() @ weight.T + bias, "y_exact") < 1e-3


@fixture
@pytest.mark.parametrize("name", W4A16)
def test_independent_reader_of_w4a16(name: str) -> None:
    f = Fixture(name)
    codes, scale, zero = f.codes_and_scales()
    # `logical` is the ideal, code minus a whole zero point; a file has that times the scale, in 16 bits.
    ideal = (codes - np.rint(-zero / scale)) * scale
    order = nunchaku64.deinterleave(ideal, f.chunks) if f.chunks else ideal
    assert same(order, f.logical["weight"])
    weight, bias = nunchaku64.dense_awq(f.packed, f.n, f.k, 64 if f.chunks else 128, f.chunks)
    assert np.abs(weight - f.logical["weight"]).max() <= 2.0**-8 * np.abs(zero).max()
    assert bias is None or same(bias, f.logical["bias"])


@fixture
@pytest.mark.parametrize("name", W4A4)
def test_unpacking_w4a4(name: str) -> None:
    from svdquant.checkpoint import packing

    f = Fixture(name)
    codes = packing.unpack_w4a4(f.packed["qweight"])
    assert np.array_equal(nibbles(codes), nunchaku64.w4a4_codes(f.packed["qweight"]))
    wscales = f.packed["wscales"]
    if wscales.dtype == torch.float8_e4m3fn:
        scales = packing.unpack_micro_scales(wscales)
        assert np.array_equal(nunchaku64.numbers(scales), nunchaku64.micro_scales(wscales))
    else:
        scales = packing.unpack_scales(wscales)
        assert np.array_equal(nunchaku64.numbers(scales), nunchaku64.scales(wscales))
    assert same(packing.unpack_vector(f.packed["bias"]).float(), f.logical["bias"])
    assert same(packing.unpack_vector(f.packed["smooth"]).float(), f.logical["smooth"])
    assert same(packing.unpack_down(f.packed["lora_down"]).float(), f.logical["down"])
    assert same(packing.unpack_up(f.packed["lora_up"]).float(), f.logical["up"])


@fixture
@pytest.mark.parametrize("name", W4A16)
def test_unpacking_w4a16(name: str) -> None:
    from svdquant.checkpoint import packing

    f = Fixture(name)
    assert np.array_equal(nibbles(packing.unpack_awq(f.packed["qweight"])), f.codes_and_scales()[0])


def nibbles(packed: Tensor) -> np.ndarray:
    """Bytes [N, K/2] → codes [N, K], the low nibble first."""
    assert packed.dtype == torch.uint8
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2).numpy()


@pytest.mark.parametrize("k", [128, 256, 384, 640])
@pytest.mark.parametrize("n", [128, 256, 384, 640])
def test_packing_is_a_bijection_with_the_independent_order(n: int, k: int) -> None:
    from svdquant.checkpoint import packing

    generator = torch.Generator().manual_seed(n * 1000 + k)

    def random_bytes(*shape: int) -> Tensor:
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)

    def check(unpack: Any, pack: Any, packed: Tensor, read: Any) -> None:
        natural = unpack(packed)
        expected = read(packed)
        got = nibbles(natural) if natural.dtype == torch.uint8 else nunchaku64.numbers(natural)
        assert got.shape == expected.shape and np.array_equal(got, expected)
        back = pack(natural)
        assert back.dtype == packed.dtype and torch.equal(back, packed)

    qweight = random_bytes(n, k // 2).view(torch.int8)
    check(packing.unpack_w4a4, packing.pack_w4a4, qweight, nunchaku64.w4a4_codes)
    scales = torch.randn(k // 64, n, generator=generator).bfloat16()
    check(packing.unpack_scales, packing.pack_scales, scales, nunchaku64.scales)
    micro = (torch.rand(k // 16, n, generator=generator) * 400).to(torch.float8_e4m3fn)
    natural = packing.unpack_micro_scales(micro)
    assert natural.dtype == micro.dtype and np.array_equal(nunchaku64.numbers(natural), nunchaku64.micro_scales(micro))
    assert torch.equal(packing.pack_micro_scales(natural).view(torch.uint8), micro.view(torch.uint8))
    check(packing.unpack_vector, packing.pack_vector, torch.randn(n, generator=generator).half(), nunchaku64.vector)
    for rank in (16, 32, 48, 128):
        down, up = (torch.randn(rows, rank, generator=generator).bfloat16() for rows in (k, n))
        check(packing.unpack_down, packing.pack_down, down, nunchaku64.lora_down)
        check(packing.unpack_up, packing.pack_up, up, nunchaku64.lora_up)
    words = random_bytes(n // 4, 2 * k)
    for dtype in (torch.int16, torch.int32):
        codes = packing.unpack_awq(words.view(dtype))
        assert np.array_equal(nibbles(codes), nunchaku64.w4a16_codes(words.view(dtype)))
        packed = packing.pack_awq(codes, dtype) if dtype != torch.int32 else packing.pack_awq(codes)
        assert torch.equal(packed, words.view(dtype))


@fixture
@pytest.mark.parametrize("name", W4A4)
def test_w4a4_layer(name: str) -> None:
    from svdquant.checkpoint.nunchaku import read_linear

    f = Fixture(name)
    layer = SVDQuantLinear.from_tensors(read_linear(f.packed, f.n, f.k, unsigned=f.unsigned), torch.float32)
    weight, bias = nunchaku64.dense_w4a4(f.packed, f.n, f.k, f.unsigned)
    got, got_bias = layer.tensors().dense()
    assert np.allclose(got, weight, rtol=1e-5, atol=1e-6) and np.allclose(got_bias, bias, rtol=1e-5, atol=1e-6)
    layer.activations = "none"
    assert f.distance(layer(f.x), "y_exact") < 1e-3


def published_activations(h: np.ndarray, unsigned: bool, nvfp4: bool) -> np.ndarray:
    """Smoothed inputs as the published kernels quantize them: by the scale before it is rounded, times the rounded."""
    groups = h.astype(np.float32).reshape(len(h), -1, 16 if nvfp4 else 64)
    scale = np.abs(groups).max(-1, keepdims=True) / np.float32(6 if nvfp4 else 15 if unsigned else 7)
    ratio = groups / scale
    if nvfp4:
        # Of two equally near values this file's writer took the smaller; hardware takes the even one.
        middle = (nunchaku64.E2M1[1:8] + nunchaku64.E2M1[:7]) / 2
        values = np.copysign(nunchaku64.E2M1[np.searchsorted(middle, np.abs(ratio))], ratio)
        return (values * round_to_e4m3(scale)).reshape(h.shape)
    low, high = (0, 15) if unsigned else (-8, 7)
    return (np.clip(np.rint(ratio), low, high) * to_bfloat16(scale)).reshape(h.shape)


def to_bfloat16(a: np.ndarray) -> np.ndarray:
    return torch.from_numpy(a).bfloat16().double().numpy()


def round_to_e4m3(a: np.ndarray) -> np.ndarray:
    return torch.from_numpy(a).to(torch.float8_e4m3fn).double().numpy()


@fixture
@pytest.mark.parametrize("name", W4A4)
def test_published_activations_explain_the_quantized_outputs(name: str) -> None:
    f = Fixture(name)
    x = f.x.double().numpy()
    smooth, bias = (nunchaku64.vector(f.packed[leaf]) for leaf in ("smooth", "bias"))
    h = (x + nunchaku64.SHIFT if f.unsigned else x) / smooth
    h = published_activations(to_bfloat16(h), f.unsigned, name.startswith("nvfp4"))
    down, up = nunchaku64.lora_down(f.packed["lora_down"]), nunchaku64.lora_up(f.packed["lora_up"])
    y = h @ nunchaku64.w4a4_residual(f.packed, f.n, f.k).T + x @ down.T @ up.T + bias
    assert f.distance(y, "y_quantized") < 1e-6


@fixture
@pytest.mark.parametrize("name", W4A4)
def test_w4a4_layer_with_quantized_activations(name: str) -> None:
    from svdquant.checkpoint.nunchaku import read_linear

    f = Fixture(name)
    layer = SVDQuantLinear.from_tensors(read_linear(f.packed, f.n, f.k, unsigned=f.unsigned), torch.bfloat16)
    layer.activations = "nvfp4" if name.startswith("nvfp4") else "int4"
    assert torch.equal(f.x.bfloat16().float(), f.x)
    assert f.distance(layer(f.x.bfloat16()).float(), "y_quantized") < 1e-2


@fixture
@pytest.mark.parametrize("name", W4A16)
def test_w4a16_layer(name: str) -> None:
    from svdquant.checkpoint.nunchaku import read_linear

    f = Fixture(name)
    layer = W4A16Linear.from_tensors(read_linear(f.packed, f.n, f.k, chunks=f.chunks), torch.float32)
    weight, bias = nunchaku64.dense_awq(f.packed, f.n, f.k, 64 if f.chunks else 128, f.chunks)
    y = layer(f.x)
    expected = f.x.double().numpy() @ weight.T + (0 if bias is None else bias)
    assert np.allclose(y, expected, rtol=1e-4, atol=1e-4)
    # The outputs were made from `logical`, the file's zeros are rounded to bfloat16.
    assert f.distance(y, "y_exact") < 6e-3
