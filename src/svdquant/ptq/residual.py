"""Rounding what the branch leaves: to nearest, or with GPTQ (Frantar et al. 2022) against the calibration inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..numerics import FORMATS, effective_scales, quantize_weight
from ..numerics.formats import grouped, nonzero

BLOCK = 128
DAMPING = 0.01
RETRIES = 30
# Rounded at once where rows do not depend on each other.
ROWS = 2048
# Rows whose scales are fitted at once: they stay in the cache through all tries.
CHUNK = 512
# Of the scale that moves no number by more than half a step.
SCALE_FACTORS = (1.0, 0.95, 0.9, 0.85, 0.8)


class HessianFactor:
    """The inverse Cholesky factor that GPTQ needs, shared by all weights that read the same input.

    hessian: XᵀX float32 [K, K]. Columns are visited by descending diagonal (act-order); columns that no input reaches
    are rounded to nearest. Damping of 1 % of the mean diagonal grows tenfold until the factorisation succeeds.
    """

    def __init__(self, hessian: Tensor) -> None:
        h = hessian.double()
        diagonal = h.diagonal()
        dead = diagonal == 0
        diagonal[dead] = 1
        self.order = torch.argsort(diagonal, descending=True, stable=True)
        h = h[self.order][:, self.order]
        mean, damping = (1.0 if bool(dead.all()) else float(diagonal[~dead].mean())), DAMPING
        undamped = h.diagonal().clone()
        for _ in range(RETRIES):
            h.diagonal().copy_(undamped + damping * mean)
            lower, info = torch.linalg.cholesky_ex(h)
            if int(info) == 0:
                break
            damping *= 10
        else:
            raise ArithmeticError("the Hessian of the calibration inputs could not be factorised")
        self.damping = damping
        # Each is as large as the layer's inputs squared, in float64.
        del h, diagonal
        inverse = torch.cholesky_inverse(lower)
        del lower
        self.factor = torch.linalg.cholesky(inverse, upper=True).float()


def gptq_values(
    weight: Tensor, wscales: Tensor, wcscales: Tensor | None, weights: str, hessian: HessianFactor
) -> Tensor:
    """GPTQ with static group scales. weight float32 [N, K]; returns the values float32 [N, K] in stored coordinates.

    Every column is rounded in turn and its error is spread over the columns not yet visited.
    """
    fmt = FORMATS[weights]
    scales = effective_scales(wscales, wcscales)
    columns = weight.shape[1]
    per_group = columns // scales.shape[1]
    order, factor = hessian.order, hessian.factor
    # Transposed, so that a column of the weight is contiguous.
    rest = weight.T[order].contiguous()
    scale_of = scales.T[order // per_group]
    values = torch.empty_like(rest)
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        block, block_scales = rest[start:stop], scale_of[start:stop]
        block_factor = factor[start:stop, start:stop]
        errors = torch.empty_like(block)
        for i in range(stop - start):
            column, scale = block[i], block_scales[i]
            value = fmt.round(column / scale)
            values[start + i] = value
            error = torch.div(column - value * scale, block_factor[i, i], out=errors[i])
            if i + 1 < stop - start:
                block[i + 1 :].addr_(block_factor[i, i + 1 :], error, alpha=-1)
        if stop < columns:
            rest[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    out = torch.empty_like(values)
    out[order] = values
    return out.T.contiguous()


def packed_residual(
    residual: Tensor,
    weights: str,
    group_size: int,
    dtype: torch.dtype,
    hessian: HessianFactor | None,
    fit_scales: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(qweight as stored, wscales, wcscales): `quantize_residual` some rows at a time, unless the whole layer decides.

    GPTQ and nvfp4's outer scale look at all rows.
    """
    size = len(residual) if hessian is not None or weights == "nvfp4" else ROWS
    parts = []
    for rows in residual.split(max(size, 1)):
        values, wscales, wcscales = quantize_residual(rows, weights, group_size, dtype, hessian, fit_scales)
        parts.append((FORMATS[weights].pack(values), wscales, wcscales))
    outer = [wcscales for _, _, wcscales in parts if wcscales is not None]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]), torch.cat(outer) if outer else None


def quantize_residual(
    residual: Tensor,
    weights: str,
    group_size: int,
    dtype: torch.dtype,
    hessian: HessianFactor | None,
    fit_scales: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(values float32 [N, Kp], wscales, wcscales) of a float32 residual [N, Kp]; GPTQ where a Hessian is given.

    fit_scales: without one, int4 scales that lose least of a group instead of those that move no number by more than
    half a step.
    """
    if fit_scales and hessian is None and weights == "int4":
        wscales = fitted_scales(residual, group_size, dtype)
        values = FORMATS[weights].round(grouped(residual, wscales.shape[1]) / wscales.float()[..., None])
        return values.flatten(-2), wscales, None
    values, wscales, wcscales = quantize_weight(residual, weights, group_size, dtype)
    if hessian is not None:
        values = gptq_values(residual, wscales, wcscales, weights, hessian)
    return values, wscales, wcscales


def fitted_scales(weight: Tensor, group_size: int, dtype: torch.dtype) -> Tensor:
    """Of int4's scale and smaller ones, the one of least squared error, for each group: [N, K/group] in `dtype`.

    Clipping the largest number may cost less than a finer step gains: the error of normally distributed weights falls
    by 1.5 %. weight: float32 [N, K].
    """
    return torch.cat([_fitted(rows, group_size, dtype) for rows in weight.split(CHUNK)])


def _fitted(weight: Tensor, group_size: int, dtype: torch.dtype) -> Tensor:
    fmt = FORMATS["int4"]
    groups = grouped(weight, weight.shape[1] // group_size)
    largest = fmt.scales(weight, group_size, torch.float32)[0]
    best, lowest = largest.to(dtype), torch.full_like(largest, float("inf"))
    for factor in SCALE_FACTORS:
        scales = nonzero((largest * factor).to(dtype))
        steps = scales.float()[..., None]
        lost = (fmt.round(groups / steps).mul_(steps) - groups).square_().sum(-1)
        better = lost < lowest
        best, lowest = torch.where(better, scales, best), torch.where(better, lost, lowest)
    return best
