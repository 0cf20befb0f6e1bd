"""Rounding what the branch leaves: to nearest, or with GPTQ (Frantar et al. 2022) against the calibration inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..numerics import FORMATS, effective_scales, quantize_weight

BLOCK = 128
DAMPING = 0.01
RETRIES = 30


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
        for _ in range(RETRIES):
            damped = h + torch.eye(len(h), dtype=h.dtype, device=h.device) * (damping * mean)
            lower, info = torch.linalg.cholesky_ex(damped)
            if int(info) == 0:
                break
            damping *= 10
        else:
            raise ArithmeticError("the Hessian of the calibration inputs could not be factorised")
        self.damping = damping
        inverse = torch.cholesky_inverse(lower)
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


def quantize_residual(
    residual: Tensor, weights: str, group_size: int, dtype: torch.dtype, hessian: HessianFactor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(values float32 [N, Kp], wscales, wcscales) of a float32 residual [N, Kp]; GPTQ where a Hessian is given."""
    values, wscales, wcscales = quantize_weight(residual, weights, group_size, dtype)
    if hessian is not None:
        values = gptq_values(residual, wscales, wcscales, weights, hessian)
    return values, wscales, wcscales
