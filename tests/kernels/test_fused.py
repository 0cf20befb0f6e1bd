"""The operations between products against float64, by every path that this CPU has."""

from __future__ import annotations

import cpu_truth
import pytest
import torch
from torch import Tensor

from svdquant.kernels import fused

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Of one rounding to the type, and what float32 arithmetic adds to it.
HALF_STEP = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-24}
ARITHMETIC = 2e-6


@pytest.fixture(autouse=True)
def inference():
    with torch.no_grad():
        yield


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


def check(y: Tensor, truth: Tensor) -> None:
    """Every element is the truth, rounded once."""
    assert y.shape == truth.shape
    largest = truth.abs().amax() if truth.numel() else 0
    bound = truth.abs() * HALF_STEP[y.dtype] * 1.01 + ARITHMETIC * largest
    assert bool(((y.double() - truth).abs() <= bound).all())


def modulated(x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x, scale, shift = x.double(), scale.double(), shift.double()
    y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
    y = y if weight is None else y * weight.double()
    y = y if bias is None else y + bias.double()
    return y * (1 + scale[:, None]) + shift[:, None]


def rotated(x: Tensor, weight: Tensor | None, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
    x = x.double()
    y = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    y = y if weight is None else y * weight.double()
    if rotary is None:
        return y
    cosine, sine = (part.double()[None, :, None] for part in rotary)
    turned = y.clone()
    turned[..., 0::2], turned[..., 1::2] = -y[..., 1::2], y[..., 0::2]
    return y * cosine + turned * sine


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 7), (1, 17, 16), (3, 9, 100), (2, 33, 192), (1, 5, 3072)], ids=str)
def test_norm_modulate(path, dtype, shape):
    x = (random(*shape) * 3 + 1).to(dtype)
    batch, _, k = shape
    for rows in {1, batch}:
        # As a modulation's chunks lie.
        scale, shift, _ = random(rows, 3 * k, dtype=dtype, seed=1).chunk(3, dim=1)
        for weight, bias in ((None, None), (random(k, dtype=dtype), None), (random(k), random(k, seed=5))):
            y = fused.norm_modulate(x, scale, shift, 1e-6, weight, bias)
            assert y.dtype == dtype
            check(y, modulated(x, scale, shift, weight, bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 5, 3, 6), (1, 9, 2, 64), (2, 3, 4, 128), (1, 2, 1, 90)], ids=str)
def test_norm_rotate(path, dtype, shape):
    batch, tokens, heads, d = shape
    x = random(*shape, dtype=dtype)
    angles = random(tokens, d // 2) * 9
    pairs = (angles.cos().repeat_interleave(2, 1), angles.sin().repeat_interleave(2, 1))
    free = (random(tokens, d, seed=1), random(tokens, d, seed=2))
    for weight in (None, random(d, dtype=dtype, seed=3)):
        for rotary in (None, pairs, free):
            truth = rotated(x, weight, rotary)
            check(fused.norm_rotate(x, weight, 1e-6, rotary), truth)
            # Into a part of a larger tensor, whose rest stays.
            whole = torch.full((batch, tokens + 3, heads, d), 7.0, dtype=dtype)
            part = whole[:, 2:-1]
            assert fused.norm_rotate(x, weight, 1e-6, rotary, out=part) is part
            check(part, truth)
            assert bool((whole[:, :2] == 7).all() and (whole[:, -1:] == 7).all())
            itself = x.clone()
            fused.norm_rotate(itself, weight, 1e-6, rotary, out=itself)
            assert torch.equal(itself, part)
            # Heads before tokens in memory.
            check(fused.norm_rotate(x.transpose(1, 2).contiguous().transpose(1, 2), weight, 1e-6, rotary), truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 7), (3, 9, 100), (2, 33, 192)], ids=str)
def test_gate_add(path, dtype, shape):
    residual, x = random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1)
    for rows in {1, shape[0]}:
        gate = random(rows, 2 * shape[-1], dtype=dtype, seed=2)[:, shape[-1] :]
        truth = residual.double() + gate.double()[:, None] * x.double()
        y = fused.gate_add(residual, gate, x)
        check(y, truth)
        for out in (residual.clone(), torch.zeros(shape[0], shape[1] + 1, shape[2], dtype=dtype)[:, 1:]):
            assert fused.gate_add(residual, gate, x, out=out) is out and torch.equal(out, y)
        itself = residual.clone()
        assert torch.equal(fused.gate_add(itself, gate, x, out=itself), y)


def test_what_is_out_of_range(path):
    x = torch.full((1, 2, 20), 6e4, dtype=torch.float16)
    gate = torch.tensor([[3.0, -3.0] * 10], dtype=torch.float16)
    assert torch.equal(fused.gate_add(x, gate, x)[0, 0, :2], torch.tensor([65504, -65504], dtype=torch.float16))
    for dtype in DTYPES:
        x = random(2, 2, 20, dtype=dtype)
        x[0, 1, 3] = torch.nan
        for y in (
            fused.gate_add(x, x[:, 0], torch.ones_like(x)),
            fused.norm_modulate(x, x[:1, 0], x[:1, 0], 1e-6),
            fused.norm_rotate(x[:, :, None], None, 1e-6)[:, :, 0],
        ):
            assert y[0, 1, 3].isnan() and y[1].isfinite().all() and y[0, 0].isfinite().all()
        zero = torch.zeros_like(x)
        assert bool((fused.norm_modulate(zero, x[1:, 0], zero[:1, 0], 1e-6) == 0).all())
        assert bool((fused.norm_rotate(zero[:, :, None], None, 1e-6) == 0).all())


def test_rows_on_their_own(path, threads):
    """The same bits whatever else is computed, and on however many threads."""
    x, residual = random(2, 41, 96, dtype=torch.bfloat16), random(2, 41, 96, dtype=torch.bfloat16, seed=1)
    m, rotary = random(2, 96, dtype=torch.bfloat16, seed=2), (random(41, 32), random(41, 32, seed=1))
    heads = x.unflatten(-1, (3, 32))

    def compute(batch: slice, rows: slice) -> list[Tensor]:
        part, gate = x[batch, rows], m[batch]
        return [
            fused.norm_modulate(part, gate, gate, 1e-6),
            fused.gate_add(residual[batch, rows], gate, part),
            fused.norm_rotate(heads[batch, rows], None, 1e-6, (rotary[0][rows], rotary[1][rows])).flatten(2),
        ]

    threads(1)
    expected = compute(slice(None), slice(None))
    for count in (1, 2, 3):
        threads(count)
        for batch, rows in ((slice(None), slice(None)), (slice(1, 2), slice(None)), (slice(None), slice(13, 14))):
            for y, whole in zip(compute(batch, rows), expected, strict=True):
                assert torch.equal(y, whole[batch, rows])


def test_results_over_operands(path):
    """What overlaps an operand without being it is written when everything has been read; torch learns of changes."""
    memory = random(40)
    x, out = memory[:32].view(1, 4, 8), memory[8:].view(1, 4, 8)
    before, gate = x.clone(), random(1, 8)
    version = memory._version
    fused.gate_add(x, gate, x, out=out)
    torch.testing.assert_close(out, fused.gate_add(before, gate, before))
    assert memory._version > version
    memory.copy_(random(40))
    fused.norm_rotate(x[:, :, None], None, 1e-6, out=out[:, :, None])
    torch.testing.assert_close(out, fused.norm_rotate(before[:, :, None], None, 1e-6)[:, :, 0])
    version = memory._version
    fused.norm_rotate(x[:, :, None], None, 1e-6, out=x[:, :, None])
    assert memory._version > version
    with pytest.raises(RuntimeError):
        fused.gate_add(before, gate, before, out=random(8).expand(1, 4, 8))


def test_nothing(path):
    for shape in ((0, 3, 8), (2, 0, 8)):
        x, m = torch.empty(shape), torch.zeros(1, 8)
        assert fused.norm_modulate(x, m, m, 1e-6).shape == fused.gate_add(x, m, x).shape == shape
        assert fused.norm_rotate(x[:, :, None], None, 1e-6).shape == (*shape[:2], 1, 8)


def test_sizes_that_contradict_each_other(path):
    x, m = random(2, 3, 8), random(1, 8)
    for wrong in (random(1, 9), random(3, 8)):
        with pytest.raises(RuntimeError):
            fused.norm_modulate(x, wrong, wrong, 1e-6)
        with pytest.raises(RuntimeError):
            fused.gate_add(x, wrong, x)
    with pytest.raises(RuntimeError):
        fused.norm_modulate(x, m, random(2, 9), 1e-6)
    with pytest.raises(RuntimeError):
        fused.gate_add(x, m, random(2, 4, 8))
    with pytest.raises(RuntimeError):
        fused.norm_rotate(x[:, :, None], None, 1e-6, (random(4, 8), random(4, 8)))
    with pytest.raises(RuntimeError):
        fused.norm_rotate(x[:, :, None], None, 1e-6, out=random(2, 4, 1, 8))


@pytest.mark.skipif(cpu_truth.PATHS == ["dequantize"], reason="nothing is fused there")
def test_where_the_library_runs(monkeypatch):
    x = random(1, 2, 8)
    assert fused.usable(x) and fused.usable(x, x)
    assert not fused.usable(x, x.half()) and not fused.usable(x.double()) and not fused.usable(x.to("meta"))
    with torch.enable_grad():
        assert not fused.usable(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not fused.usable(x)
    assert not torch.func.vmap(lambda t: torch.tensor(fused.usable(t)).expand(1))(x).any()
    for name, value in (("SVDQUANT_FUSE", "0"), ("SVDQUANT_BACKEND", "dequantize")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert not fused.usable(x)


def test_gradients():
    """Of the definitions in plain torch."""
    with torch.enable_grad():
        x, m = random(1, 2, 8).requires_grad_(), random(1, 8).requires_grad_()
        (fused.norm_modulate(x, m, m, 1e-6) + fused.gate_add(x, m, x)).sum().backward()
        assert x.grad is not None and m.grad is not None and bool(x.grad.any() and m.grad.any())
