"""Other launches of the 8-bit product, for those who choose its defaults."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...numerics import relative_error
from ..results import OURS, Case, Row
from .data import LayerData, layer_data
from .layers import WORST, cache_bytes
from .ours import PRECISIONS, Way, ways
from .session import Session
from .timing import Timed, fill_rates, measure_rows

_DTYPE = torch.bfloat16
_SECONDS = 20.0


@torch.inference_mode()
def run_tuning(session: Session) -> None:
    """Every launch of `CANDIDATES`, with weights expanded for each product and with weights already expanded."""
    from ...kernels.gpu import eight_bit

    scale, settings = session.settings.scale, session.settings
    for shape in scale.shapes:
        for weights, activations in PRECISIONS[:2]:
            name = f"{activations} {shape}"
            if session.has(name) or not session.fits(_SECONDS * session.on_gpu, name):
                continue
            data = layer_data(shape, scale.rank, _DTYPE, session.torch_device, 3 * cache_bytes(session))
            t = data.record(weights, activations)
            way = _way(session, t, activations)
            if way is None:
                session.note(f"{name}: the product does not take the layer")
                continue
            case = Case(session.suite, name, "default", {"m": shape.m, "k": shape.k, "n": shape.n})
            quantized = [way.quantize(x, t) for x in data.inputs]
            out = torch.empty(1, shape.m, shape.n, dtype=_DTYPE, device=session.torch_device)
            runs = {"default": [partial(way.product.multiply, q, (t,), out) for q in quantized]}
            expanded, _ = session.attempt(f"{name}: expanding", partial(eight_bit.expand, (t,), activations))
            for label, config in eight_bit.CANDIDATES.items():
                runs[label] = [partial(eight_bit.multiply_with, config, q, (t,), out) for q in quantized]
                if expanded is not None:
                    runs[f"{label}, expanded before"] = [
                        partial(eight_bit.multiply_with, config, q, (t,), out, expanded=expanded) for q in quantized
                    ]
            timed = []
            for label, calls in runs.items():
                row = Row(label, OURS)
                case.rows.append(row)
                row.error, row.reason = session.attempt(f"{name}: {label}", partial(_error, calls[0], out, data))
                if not row.reason:
                    operations = 2.0 * shape.m * shape.k * shape.n
                    timed.append(Timed(row, list(calls), operations, 0.0, activations))
            measure_rows(timed, session.device, settings.rounds, settings.sample_seconds, case.reference)
            fill_rates(timed, session.state.ceilings)
            session.add(case)


def _error(call: Any, out: Tensor, data: LayerData) -> float:
    out.fill_(float("nan"))
    call()
    error = relative_error(out[0].float(), data.reference)
    if not error < WORST:
        raise ArithmeticError(f"wrong: error {error:.3g}")
    return error


def _way(session: Session, t: object, activations: str) -> Way | None:
    found = ways(t, activations, _DTYPE, session.torch_device)  # type: ignore[arg-type]
    return next((way for way, why in found if not why and way.product.name == "triton"), None)
