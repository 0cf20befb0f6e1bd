"""Checks of kernels that are no products: quantized inputs, weight-only linears, and what lies between."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from ...config import GROUP_SIZES, LayerSpec
from ...kernels import gpu
from ...kernels.gpu.types import Before, Reading
from ...numerics import relative_error
from ..results import OURS, Case, Row
from .data import random_record, spec_of
from .session import Session
from .timing import poisoned
from .truth import expected_input, meaning, normed, read_before, sample_input

# Codes may be one off where a value lies between two, and the value itself was rounded before.
_WORST_CODES = {"int8": 0.004, "fp8": 0.02, "int4": 0.03, "nvfp4": 0.03}
_WORST = 0.006


def run_other_checks(session: Session) -> None:
    case = Case(session.suite, "inputs, weight-only products, elementwise", "float64", {})
    if session.has(case.name):
        return
    for name, worst, check in _checks(session):
        row = Row(name, OURS)
        case.rows.append(row)
        row.error, row.reason = session.attempt(name, check)
        if row.error is not None and not row.error <= worst:
            row.reason = f"wrong: error {row.error:.3g}, at most {worst} is explained by rounding"
        if row.reason and name.startswith("weights only"):
            session.state.wrong[name.split()[2], "none", "w4a16"] = row.reason
    session.add(case)


def _checks(session: Session) -> Iterator[tuple[str, float, partial[float]]]:
    scale, device = session.settings.scale, session.torch_device
    m, k, n = scale.ragged[-1]
    kinds = ("none", "layer_norm", "gelu", "geglu", "swiglu")[: 2 if session.settings.smoke else None]
    for precision, worst in _WORST_CODES.items():
        for kind in kinds:
            name = f"{precision} input" + ("" if kind == "none" else f" after {kind}")
            yield name, worst, partial(_input_error, precision, kind, m, k, scale.rank, device)
    for weights in ("int4", "int8", "nvfp4"):
        for rows in (1, m):
            yield (
                f"weights only {weights}, {rows} rows",
                _WORST,
                partial(_weight_only_error, weights, rows, k, n, device),
            )
    yield "norm_modulate", _WORST, partial(_norm_modulate_error, m, k, device)
    yield "norm_rotate", _WORST, partial(_norm_rotate_error, m, device)
    yield "gate_add", _WORST, partial(_gate_add_error, m, k, device)


def _noise(*size: int, seed: int, device: torch.device) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator(device).manual_seed(seed), device=device)


def _input_error(precision: str, kind: str, m: int, k: int, rank: int, device: torch.device) -> float:
    """The larger error of codes and down-projection."""
    from ...kernels.gpu.quantize import quantize

    weights = "nvfp4" if precision == "nvfp4" else "int4"
    t = random_record(k, 32, spec_of(weights, precision, rank), torch.bfloat16, device)
    x = sample_input(m, 2 * k if kind in ("geglu", "swiglu") else k, torch.bfloat16, device)[None]
    before = Before(kind)
    if kind == "layer_norm":
        shift, factor = (_noise(1, k, seed=seed, device=device).bfloat16() for seed in (1, 2))
        before = Before(kind, 1e-6, factor, shift)
    packed = precision in ("int4", "nvfp4")
    q = quantize(x, t, Reading(precision, packed=packed), before)
    read = read_before(x, before)[0]
    assert q.low is not None and t.proj_down is not None
    low = relative_error(q.low, read.double() @ t.proj_down.double().T)
    return max(relative_error(meaning(q, t), expected_input(read, t, precision)), low)


def _weight_only_error(weights: str, m: int, k: int, n: int, device: torch.device) -> float:
    spec = LayerSpec("w4a16", weights, GROUP_SIZES[weights], 0, "none", (), False, False)
    t = random_record(k, n, spec, torch.bfloat16, device)
    weight = t.residual()
    scales = t.wscales
    if t.wcscales is not None:
        # Layers of this kind have no outer scale.
        weight = weight / t.wcscales.float()[:, None]
    x = sample_input(m, k, torch.bfloat16, device)
    y = gpu.w4a16_linear(x, t.qweight, scales, t.bias, weights, None)
    assert t.bias is not None
    return relative_error(y, x.double() @ weight[:, :k].double().T + t.bias.double())


def _norm_modulate_error(m: int, k: int, device: torch.device) -> float:
    from ...kernels.gpu.elementwise import norm_modulate

    x = sample_input(m, k, torch.bfloat16, device)[None]
    factor, offset = (_noise(1, k, seed=seed, device=device) for seed in (1, 2))
    out = poisoned(x.shape, x.dtype, device)
    norm_modulate(x, factor, offset, 1e-6, out)
    exact = torch.nn.functional.layer_norm(x.double(), (k,), eps=1e-6) * factor.double() + offset.double()
    return relative_error(out, exact)


def _norm_rotate_error(m: int, device: torch.device, heads: int = 3, head: int = 128) -> float:
    from ...kernels.gpu.elementwise import norm_rotate

    x = sample_input(m, heads * head, torch.bfloat16, device)
    angles = _noise(m, head // 2, seed=3, device=device).repeat_interleave(2, 1)
    weight = (1 + 0.2 * _noise(head, seed=4, device=device)).bfloat16()
    out = poisoned((1, m, heads, head), x.dtype, device)
    norm = gpu.HeadNorm((weight,), 1e-6, head, angles.cos(), angles.sin())
    norm_rotate(x.view(1, m, heads, head), weight, norm.eps, norm.cosine, norm.sine, out)
    return relative_error(out.flatten(2)[0], normed(x.double(), weight, norm))


def _gate_add_error(m: int, k: int, device: torch.device) -> float:
    from ...kernels.gpu.elementwise import gate_add

    x = sample_input(m, k, torch.bfloat16, device)[None]
    residual, gate = x.roll(1, 1), _noise(1, k, seed=1, device=device)
    out = poisoned(x.shape, x.dtype, device)
    gate_add(residual, gate, x, out)
    return relative_error(out, residual.double() + gate.double() * x.double())
