"""What the GPU's kernels must compute, written from docs/format.md: float64, codes in float32, operation by operation.

Only the package's records are read. `quantized_input` makes the input that a product takes, `output` what the product
must return for it; `random_layer` makes layers of every kind.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from svdquant.config import LayerSpec
from svdquant.kernels.gpu.types import Before, HeadNorm, Quantized, Reading, columns_of
from svdquant.numerics import SVDQuantTensors, padded_columns

SHIFT = 0.171875
GROUPS = {"int4": 64, "nvfp4": 16, "int8": 0}
INT4 = torch.tensor([n if n < 8 else n - 16 for n in range(16)], dtype=torch.float64)
UINT4 = torch.arange(16, dtype=torch.float64)
MAGNITUDES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
E2M1 = torch.cat([MAGNITUDES, -MAGNITUDES])


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖."""
    expected = expected.double()
    return float((actual.double() - expected).norm() / expected.norm().clamp_min(1e-300))


# Layers and inputs


def random_layer(
    generator: torch.Generator,
    n: int,
    k: int,
    weights: str = "int4",
    rank: int = 32,
    group: int | None = None,
    rotate: bool = False,
    unsigned: tuple[tuple[int, int], ...] = (),
    dtype: torch.dtype = torch.bfloat16,
    outer_blocks: int = 1,
    bias: bool = True,
    smooth: bool = True,
) -> SVDQuantTensors:
    """A layer of random codes (all that the format can hold) and scales, whose outputs are about 1 for inputs of 1.

    group: None = the format's usual one; 0 (int8 only) = the whole row. outer_blocks: nvfp4's `wcscales` are
    [N, blocks].
    """
    group = GROUPS[weights] if group is None else group
    spec = LayerSpec(
        weights=weights, group_size=group, rank=rank, unsigned=unsigned, rotate=rotate, smooth=smooth,
        outer_blocks=outer_blocks,
    )  # fmt: skip
    columns = padded_columns(k, spec)
    groups = columns // group if group else 1

    def uniform(*shape: int, low: float = 0.5, high: float = 1.5) -> Tensor:
        return torch.rand(shape, generator=generator) * (high - low) + low

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    wcscales = None
    spread = 1 / math.sqrt(k)
    if weights == "int8":
        qweight = torch.randint(-127, 128, (n, columns), generator=generator).to(torch.int8)
        wscales = (uniform(n, groups) * spread / 64).to(dtype)
    else:
        qweight = torch.randint(0, 256, (n, columns // 2), generator=generator).to(torch.uint8)
        wscales = (uniform(n, groups) * spread / 4).to(dtype)
        wscales *= 1 - 2 * (torch.rand(n, groups, generator=generator) < 0.3).to(dtype)
        if weights == "nvfp4":
            wscales = uniform(n, groups, low=4, high=400).to(torch.float8_e4m3fn)
            shape = (n,) if outer_blocks == 1 else (n, outer_blocks)
            wcscales = (uniform(*shape) * spread / 800).to(dtype)
    return SVDQuantTensors(
        spec=spec,
        in_features=k,
        qweight=qweight,
        wscales=wscales,
        wcscales=wcscales,
        smooth_factor=uniform(k, low=0.3, high=3).to(dtype) if smooth else None,
        proj_down=(normal(rank, k) * spread).to(dtype) if rank else None,
        proj_up=(normal(n, rank) / math.sqrt(max(rank, 1))).to(dtype) if rank else None,
        bias=normal(n).to(dtype) if bias else None,
    )


def random_input(
    generator: torch.Generator, batch: int, tokens: int, k: int, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """[batch, tokens, k] with a few channels of outliers."""
    x = torch.randn(batch, tokens, k, generator=generator)
    x[..., torch.randint(0, k, (max(k // 100, 1),), generator=generator)] *= 8
    return x.to(dtype)


# Weights


def nibbles(packed: Tensor) -> Tensor:
    """uint8 [..., n] to int64 [..., 2n], low nibble first."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2).long()


def spread(scales: Tensor, columns: int) -> Tensor:
    """[R, groups] to float64 [R, columns]."""
    return scales.double().repeat_interleave(columns // scales.shape[1], 1)


def weight(t: SVDQuantTensors) -> Tensor:
    """Ŵ float64 [N, Kp]."""
    if t.spec.weights == "int8":
        values = t.qweight.double()
    else:
        codes = nibbles(t.qweight)
        table = UINT4 if t.wzeros is not None else INT4 if t.spec.weights == "int4" else E2M1
        values = table[codes]
    columns = values.shape[1]
    out = values * spread(t.wscales, columns)
    if t.wcscales is not None:
        out = out * spread(t.wcscales.reshape(len(out), -1), columns)
    return out if t.wzeros is None else out + spread(t.wzeros, columns)


def hadamard() -> Tensor:
    """H/√128, float64 [128, 128]."""
    i = range(128)
    return torch.tensor([[(-1.0) ** (a & b).bit_count() for b in i] for a in i], dtype=torch.float64) / math.sqrt(128)


# Inputs


def after(x: Tensor, before: Before) -> Tensor:
    """x [B, L, K or 2K] after `before`, [B, L, K] in x's type."""
    v = x.double()
    if before.kind == "layer_norm":
        assert before.scale is not None and before.shift is not None
        v = F.layer_norm(v, v.shape[-1:], eps=before.eps)
        v = v * (1 + before.scale.double()[:, None]) + before.shift.double()[:, None]
    elif before.kind == "gelu":
        v = F.gelu(v, approximate="tanh")
    elif before.kind in ("geglu", "swiglu"):
        a, b = v.chunk(2, -1)
        v = a * (F.gelu(b) if before.kind == "geglu" else F.silu(b))
    else:
        assert before.kind == "none"
    return v.to(x.dtype)


def shift_of(t: SVDQuantTensors) -> Tensor:
    """float32 [K]: SHIFT in the columns that follow a GELU, else 0."""
    shift = torch.zeros(t.in_features)
    for start, stop in t.spec.unsigned:
        shift[start:stop] = SHIFT
    return shift


def smoothed(x: Tensor, t: SVDQuantTensors) -> Tensor:
    """float32 [M, C] of x/s for float32 x [M, K]: padded by zeros and rotated (by float64 products)."""
    h = x if t.smooth_factor is None else x / t.smooth_factor.float()
    h = F.pad(h, (0, columns_of(padded_columns(t.in_features, t.spec)) - h.shape[1]))
    return (h.double().unflatten(1, (-1, 128)) @ hadamard()).flatten(1).float() if t.spec.rotate else h


def unsigned_groups(t: SVDQuantTensors) -> Tensor:
    """bool [C / 64]: which groups of int4 activations have codes 0…15."""
    flags = torch.zeros(columns_of(padded_columns(t.in_features, t.spec)) // 64, dtype=torch.bool)
    for start, stop in t.spec.unsigned:
        flags[start // 64 : -(-stop // 64)] = True
    return flags


def quantize(x: Tensor, t: SVDQuantTensors, precision: str) -> tuple[Tensor, Tensor]:
    """(values float64 [M, C] that the codes stand for, scales float32 [M, 1], [M, C/64] or [M, C/16]) of x [M, K].

    Columns are in natural order. Scales are those that the product multiplies by. A group of zeros has scale 1, in
    nvfp4 0.
    """
    one = torch.ones(())
    if precision in ("int8", "fp8"):
        h = smoothed(x.float(), t)
        top = 127 if precision == "int8" else 448
        scales = h.abs().amax(1, keepdim=True) / top
        scales = torch.where(scales == 0, one, scales)
        if precision == "int8":
            return (h / scales).round().clamp(-127, 127).double(), scales
        return (h / scales).clamp(-448, 448).to(torch.float8_e4m3fn).double(), scales
    shifted = precision == "int4" and len(t.spec.unsigned) > 0
    h = smoothed(x.float() + shift_of(t) if shifted else x.float(), t).to(x.dtype).float()
    if precision == "int4":
        g = h.unflatten(1, (-1, 64))
        high = torch.where(unsigned_groups(t), 15.0, 7.0)[:, None] if shifted else torch.tensor(7.0)
        low = torch.where(unsigned_groups(t), 0.0, -7.0)[:, None] if shifted else torch.tensor(-7.0)
        exact = g.abs().amax(-1, keepdim=True) / high
        exact = torch.where(exact == 0, one, exact)
        codes = torch.minimum(torch.maximum((g / exact).round(), low), high)
        stored = exact.clamp(max=torch.finfo(x.dtype).max).to(x.dtype).float()
        return codes.flatten(1).double(), stored.squeeze(-1)
    g = h.unflatten(1, (-1, 16))
    exact = (g.abs().amax(-1, keepdim=True) / 6).clamp(max=448)
    v = (g / torch.where(exact == 0, one, exact)).double()
    # The nearest of the eight magnitudes; between two, the one with the even code.
    distance = (v.abs()[..., None] - MAGNITUDES).abs()
    nearest = (distance + torch.tensor([0, 1, 0, 1, 0, 1, 0, 1]) * 1e-12).argmin(-1)
    values = MAGNITUDES[nearest] * torch.where(v < 0, -1.0, 1.0)
    return values.flatten(1), exact.squeeze(-1).to(torch.float8_e4m3fn).float()


def low_of(x: Tensor, down: Tensor | None, low_scales: Tensor | None = None) -> Tensor | None:
    """x·Dᵀ of x [B, L, K], times low_scales [R] or [B, R]: float64 [B·L, R], unrounded."""
    if down is None:
        return None
    low = x.double() @ down.to(x.dtype).double().T
    if low_scales is not None:
        low = low * (low_scales.double() if low_scales.dim() == 1 else low_scales.double()[:, None])
    return low.flatten(0, 1)


def natural_to_split(columns: int) -> Tensor:
    """Indices: split order = natural[..., indices]."""
    i = torch.arange(columns).view(-1, 32, 2)
    return i.transpose(1, 2).flatten()


def quantized_input(
    x: Tensor, t: SVDQuantTensors, reading: Reading, before: Before | None = None, low_scales: Tensor | None = None
) -> Quantized:
    """What the quantizer hands to a product for x [B, L, K] (2K before a GLU)."""
    x = after(x, before or Before())
    rows = x.flatten(0, 1)
    values, scales = quantize(rows, t, reading.precision)
    if reading.split:
        values = values[:, natural_to_split(values.shape[1])]
    if reading.precision == "nvfp4":
        magnitude = (values.abs()[..., None] == MAGNITUDES).double().argmax(-1)
        nibble = torch.where(values < 0, magnitude + 8, magnitude)
    else:
        nibble = values.long() & 15
    if reading.packed:
        codes = (nibble[:, 0::2] | nibble[:, 1::2] << 4).to(torch.uint8)
    else:
        codes = values.to(torch.float8_e4m3fn if reading.precision == "fp8" else torch.int8)
    scales = scales.to(torch.float8_e4m3fn) if reading.precision == "nvfp4" else scales
    low = low_of(x, t.proj_down, low_scales)
    return Quantized(
        reading, x.shape[0], x.shape[1], codes, scales.squeeze(1) if reading.precision in ("int8", "fp8") else scales,
        None if low is None else low.to(x.dtype),
    )  # fmt: skip


def decode(q: Quantized, t: SVDQuantTensors) -> tuple[Tensor, Tensor]:
    """(values float64 [M, C] in natural order, scales float64 [M, groups]) of a quantized input."""
    if not q.reading.packed:
        values = q.codes.float().double()
    else:
        codes = nibbles(q.codes)
        values = E2M1[codes] if q.reading.precision == "nvfp4" else INT4[codes]
        if q.reading.precision == "int4" and t.spec.unsigned:
            values = torch.where(unsigned_groups(t).repeat_interleave(64), UINT4[codes], values)
    if q.reading.split:
        natural = torch.empty_like(values)
        natural[:, natural_to_split(values.shape[1])] = values
        values = natural
    scales = q.scales.float().double()
    return values, scales[:, None] if scales.dim() == 1 else scales


# Outputs


def output(q: Quantized, t: SVDQuantTensors, expanded: Tensor | None = None, gelu: bool = False) -> Tensor:
    """y float64 [M, N] = Q(x/s)·Ŵᵀ + low·Uᵀ + b (then GELU, tanh) of the quantized input.

    expanded: float64 [N, Kp] to multiply instead of Ŵ, where a product rounds weights to 8 bits.
    """
    w = weight(t)
    used = w if expanded is None else expanded
    values, scales = decode(q, t)
    h = (values * spread(scales, values.shape[1]))[:, : w.shape[1]]
    y = h @ used.T
    if t.spec.unsigned and q.reading.precision != "int4":
        shift = shift_of(t).double()
        shift = shift if t.smooth_factor is None else shift / t.smooth_factor.double()
        y = y + w[:, : t.in_features] @ shift
    if q.low is not None and t.proj_up is not None:
        y = y + q.low.double() @ t.proj_up.double().T
    if t.bias is not None:
        y = y + t.bias.double()
    return F.gelu(y, approximate="tanh") if gelu else y


def head_norm(y: Tensor, norm: HeadNorm, widths: list[int]) -> Tensor:
    """float64 y [B, L, ΣN] after `norm`: the first layers' heads normalized, weighted, rotated. widths: N per layer."""
    parts = list(y.double().split(widths, -1))
    for i, factor in enumerate(norm.weights):
        heads = parts[i].unflatten(-1, (-1, norm.head))
        heads = heads / (heads.square().mean(-1, keepdim=True) + norm.eps).sqrt()
        heads = heads if factor is None else heads * factor.double()
        if norm.cosine is not None and norm.sine is not None:
            real, imaginary = heads[..., 0::2], heads[..., 1::2]
            turned = torch.stack((-imaginary, real), -1).flatten(-2)
            heads = heads * norm.cosine.double()[:, None] + turned * norm.sine.double()[:, None]
        parts[i] = heads.flatten(-2)
    return torch.cat(parts, -1)
