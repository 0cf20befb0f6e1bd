"""Whether every kernel gives the right numbers on the device. What is wrong here is timed nowhere."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ...config import LayerSpec
from ...kernels.gpu.linear import multiply as multiply_and_finish
from ...kernels.gpu.types import Epilogue, HeadNorm
from ...numerics import SVDQuantTensors, relative_error
from ..results import OURS, Case, Row
from .data import random_record, spec_of
from .inputs import run_other_checks
from .ours import PRECISIONS, Way, multiply, ways
from .session import Session
from .timing import poisoned
from .truth import expected_product, sample_input

# ‖y − exact‖/‖exact‖ that the number formats explain: outputs and branches are rounded to 16 bits; 8-bit weights are
# made of 4-bit ones with fewer bits for small groups (int8) or three bits of mantissa (fp8).
_WORST = {"int8": 0.05, "fp8": 0.08, "int4": 0.012, "nvfp4": 0.012}


@dataclass(frozen=True)
class Variant:
    """What is unlike the plain layer. layers: stacked; main: of the size that is timed."""

    name: str
    m: int
    k: int
    n: int
    rank: int = 32
    dtype: torch.dtype = torch.bfloat16
    layers: int = 1
    gelu: bool = False
    head: int = 0
    rotate: bool = False
    unsigned: bool = False
    group: int | None = None
    bias: bool = True
    main: bool = False

    def spec(self, weights: str, activations: str) -> LayerSpec:
        spec = spec_of(weights, activations, self.rank)
        segments = ((0, self.k // 128 * 64),) if self.unsigned else ()
        group = spec.group_size if self.group is None else self.group
        return replace(spec, rotate=self.rotate, unsigned=segments, group_size=group)


def variants(session: Session) -> list[Variant]:
    scale = session.settings.scale
    (m, (k, n)), r = (scale.rows[0], scale.layers[0]), scale.rank
    ragged = scale.ragged[-1]
    head = 128 if not session.settings.smoke else 16
    found = [Variant("the timed size", m, k, n, r, main=True)]
    found += [Variant(f"{size[0]} rows", *size, r) for size in scale.ragged]
    if session.settings.smoke:
        return [*found, Variant("3 layers, norm and rotation", 6, 64, 32, r, layers=3, head=head)]
    return [
        *found,
        Variant("float16", *ragged, r, torch.float16),
        Variant("no branch", *ragged, 0),
        Variant("no bias", *ragged, r, bias=False),
        Variant("rank 16", *ragged, 16),
        Variant("rank 48", *ragged, 48),
        Variant("rank 128", *ragged, 128),
        Variant("GELU", *ragged, r, gelu=True),
        Variant("3 layers", ragged[0], ragged[1], 256, r, layers=3),
        Variant("3 layers, norm and rotation", 1152, 1152, 384, r, layers=3, head=head),
        Variant("rotated", *ragged, r, rotate=True),
        Variant("unsigned", *ragged, r, unsigned=True),
        Variant("groups of 128", *ragged, r, group=128),
        *(Variant(f"{k}→{n}", 512, k, n, r) for k, n in scale.layers[1:]),
    ]


def run_checks(session: Session) -> None:
    """Products, quantized inputs, weight-only products and what lies between."""
    run_other_checks(session)
    for main in (True, False):
        for weights, activations in PRECISIONS[: session.settings.scale.checked]:
            name = f"{weights} weights, {activations} activations" + ("" if main else ", other layers")
            if session.has(name) or not session.fits(5, name):
                continue
            case = Case(session.suite, name, "float64", {"worst allowed": _WORST[activations]})
            for variant in variants(session):
                if variant.main == main and _possible(variant, weights, activations):
                    _product_rows(session, case, variant, weights, activations)
            if case.rows:
                session.add(case)


def _possible(v: Variant, weights: str, activations: str) -> bool:
    """Layers that exist: only int4 weights are shifted, groups are the format's own but for int4."""
    if v.unsigned and weights != "int4":
        return False
    if v.group is not None and (weights != "int4" or v.k % v.group):
        return False
    return not (v.rotate and v.k % 128)


def _product_rows(session: Session, case: Case, v: Variant, weights: str, activations: str) -> None:
    spec, device = v.spec(weights, activations), session.torch_device
    make = partial(random_record, v.k, v.n, spec, v.dtype, device, bias=v.bias)
    first, reason = session.attempt(f"{case.name}: making {v.name}", lambda: make(seed=0))
    if first is None:
        session.note(f"{case.name}, {v.name}: {reason}")
        return
    # Layers that read one input agree in smoothing and down-projection.
    layers = [first] + [replace(make(seed=i), smooth_factor=first.smooth_factor) for i in range(1, v.layers)]
    for t in layers[1:]:
        t.proj_down = first.proj_down
    x = sample_input(v.m, v.k, v.dtype, device)
    epilogue = Epilogue(v.gelu, _head_norm(v, device) if v.head else None)
    exact: list[Tensor] = []
    for way, why in ways(first, activations, v.dtype, device):
        if why:
            continue
        row = Row(f"{way}, {v.name}", OURS)
        if not session.fits(3, row.contender):
            return
        case.rows.append(row)
        if not exact:
            truth, row.reason = session.attempt(
                f"{case.name}: {v.name} in float64", lambda: expected_product(x, layers, activations, epilogue)
            )
            if truth is None:
                return
            exact.append(truth)
        error, row.reason = session.attempt(
            row.contender, partial(_product_error, way, x, layers, v.dtype, epilogue, exact[0])
        )
        if error is not None:
            row.error = error
            if not error <= _WORST[activations]:
                row.reason = f"wrong: error {error:.3g}, at most {_WORST[activations]} is explained by the formats"
        if row.reason and v.main:
            session.state.wrong[way.key] = row.reason


def _product_error(
    way: Way, x: Tensor, layers: list[SVDQuantTensors], dtype: torch.dtype, epilogue: Epilogue, exact: Tensor
) -> float:
    if not way.product.fuses(epilogue, layers):
        # What it leaves to others is checked where it is done.
        return _piecewise(way, x, layers, dtype, epilogue, exact)
    n = exact.shape[1]
    # A view with room beside it, in which nothing may be written.
    whole = poisoned((1, x.shape[0], n + 16), dtype, x.device)
    multiply(way.product, way.quantize(x, layers[0]), layers, whole[..., :n], epilogue)
    if not bool(whole[..., n:].isnan().all()):
        return math.inf
    return relative_error(whole[0, :, :n], exact)


def _piecewise(
    way: Way, x: Tensor, layers: list[SVDQuantTensors], dtype: torch.dtype, epilogue: Epilogue, exact: Tensor
) -> float:
    out = poisoned((1, x.shape[0], exact.shape[1]), dtype, x.device)
    multiply_and_finish(way.product.name, way.quantize(x, layers[0]), layers, out, epilogue)
    return relative_error(out[0], exact)


def _head_norm(v: Variant, device: torch.device) -> HeadNorm:
    g = torch.Generator(device).manual_seed(5)
    angles = torch.randn(v.m, v.head // 2, generator=g, device=device).repeat_interleave(2, 1)
    weights = tuple((1 + 0.2 * torch.randn(v.head, generator=g, device=device)).to(v.dtype) for _ in range(2))
    return HeadNorm(weights, 1e-6, v.head, angles.cos(), angles.sin())
