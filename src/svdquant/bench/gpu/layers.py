"""Linears of FLUX.1's shapes: ours by every product, beside torch and others."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...config import LayerSpec
from ...kernels.dispatch import resolve_activations
from ...numerics import SVDQuantTensors, relative_error
from ..cases import Shape
from ..ours import Variant, solve
from ..results import OURS, Case, Row
from .data import LayerData, copy_of, layer_data
from .modules import stored_bytes
from .ours import PRECISIONS, RATES, Way, multiply, ways
from .peers import BF16, CONTENDERS, WEIGHT_ONLY, Contender
from .session import Session
from .timing import Timed, fill_rates, measure_rows

# More than what any format explains: such a contender has computed something else.
WORST = 0.5
# Of inputs, or of copies of weights, that pass by before the first is used again: in units of the device's cache.
_CACHES = 3
_USUAL_CACHE = 64 << 20
_MOST_COPIES = 16
_SECONDS = 25.0


def run_layers(session: Session) -> None:
    """A case per shape; the shape of one row multiplies by weights alone, which it finds cold."""
    scale = session.settings.scale
    for shape in (*scale.shapes[: len(scale.layers)], scale.weight_only, *scale.shapes[len(scale.layers) :]):
        if session.has(str(shape)) or not session.fits(_SECONDS * session.on_gpu, f"shape {shape}"):
            continue
        _, reason = session.attempt(f"shape {shape}", partial(_shape, session, shape), limit=600)
        if reason:
            session.note(f"shape {shape}: {reason}")


@torch.inference_mode()
def _shape(session: Session, shape: Shape) -> None:
    torch._dynamo.reset()
    gc.collect()
    cache = cache_bytes(session)
    data = layer_data(shape, session.settings.scale.rank, torch.bfloat16, session.torch_device, _CACHES * cache)
    facts = {"m": shape.m, "k": shape.k, "n": shape.n, "cold": shape.modulation, "inputs": len(data.inputs)}
    case = Case(session.suite, str(shape), BF16, facts)
    timed: list[Timed] = []
    for contender in WEIGHT_ONLY if shape.modulation else CONTENDERS:
        row = Row(contender.name, contender.kind, reason=contender.missing())
        case.rows.append(row)
        if not row.reason:
            _prepare(session, row, timed, partial(_peer, session, contender, data, row, cache))
    if shape.modulation:
        for weights in ("int4", "int8"):
            _weight_only(session, case, timed, data, weights, cache)
    else:
        for weights, activations in PRECISIONS[: session.settings.scale.timed]:
            _ours(session, case, timed, data, weights, activations)
        if shape == session.settings.scale.shapes[0]:
            _solved(session, case, timed, data)
    _, reason = session.attempt(
        f"{shape}: timing",
        lambda: measure_rows(
            timed, session.device, session.settings.rounds, session.settings.sample_seconds, case.reference
        ),
    )
    if reason:
        session.note(f"{shape}: timing {reason}")
    fill_rates(timed, session.state.ceilings)
    dense = case.row(BF16).bytes
    for row in case.rows:
        row.bytes_ratio = row.bytes / dense if row.bytes is not None and dense else None
    session.add(case)


def cache_bytes(session: Session) -> int:
    """Of the device's last cache."""
    if not session.on_gpu:
        return 0
    found = getattr(torch.cuda.get_device_properties(session.torch_device), "L2_cache_size", 0)
    return int(found) or _USUAL_CACHE


def _prepare(session: Session, row: Row, timed: list[Timed], make: Callable[[], Timed]) -> None:
    entry, row.reason = session.attempt(f"{row.contender}", make)
    if entry is None:
        return
    if row.error is not None and not row.error < WORST:
        row.reason = f"wrong: error {row.error:.3g}"
        return
    timed.append(entry)


def _peer(session: Session, contender: Contender, data: LayerData, row: Row, cache: int) -> Timed:
    module = contender.make(data)
    row.bytes = stored_bytes(module)
    modules = [module]
    if data.shape.modulation:
        modules += [contender.make(data) for _ in range(copies(row.bytes, cache) - 1)]
    runs: list[Callable[[Tensor], Tensor]] = [module.forward for module in modules]
    if contender.compiled:
        backend = "eager" if session.settings.smoke else "inductor"
        run = torch.compile(_call, dynamic=False, backend=backend)
        runs = [partial(run, module) for module in modules]
    row.error = relative_error(runs[0](data.inputs[0]).float(), data.reference)
    return _timed(row, data, [partial(f, x) for f, x in _pairs(runs, data.inputs)], contender.rate)


def _call(module: torch.nn.Module, x: Tensor) -> Tensor:
    return module(x)


def _pairs(runs: list[Any], inputs: list[Tensor]) -> list[tuple[Any, Tensor]]:
    """Every run and every input at least once."""
    return [(runs[i % len(runs)], inputs[i % len(inputs)]) for i in range(max(len(runs), len(inputs)))]


def copies(size: int, cache: int) -> int:
    """Of a weight that is to be found cold."""
    return min(math.ceil(_CACHES * cache / max(size, 1)) + 1, _MOST_COPIES)


def _timed(row: Row, data: LayerData, calls: list[Any], rate: str | None) -> Timed:
    s = data.shape
    moved = (s.m * s.k + s.m * s.n) * 2 + (row.bytes or 0)
    return Timed(row, calls, 2.0 * s.m * s.k * s.n, moved, rate)


def _ours(session: Session, case: Case, timed: list[Timed], data: LayerData, weights: str, activations: str) -> None:
    t, reason = session.attempt(f"{data.shape}: {weights}", lambda: data.record(weights, activations))
    if t is None:
        session.note(f"{data.shape}, {weights}: {reason}")
        return
    for way, why in ways(t, activations, data.dtype, session.torch_device):
        if why or way.emulated:
            continue
        row = Row(str(way), OURS, bytes=t.nbytes(), reason=session.state.wrong.get(way.key, ""))
        row.more |= {"weights": weights, "activations": activations, "product": way.product.name}
        case.rows.append(row)
        if row.reason:
            continue
        _prepare(session, row, timed, partial(_layer, way, t, data, row))
        alone = Row(f"{way}: product alone", OURS, bytes=t.nbytes(), reason=row.reason)
        case.rows.append(alone)
        if not row.reason:
            _prepare(session, alone, timed, partial(_alone, way, t, data, alone))


def _layer(way: Way, t: SVDQuantTensors, data: LayerData, row: Row) -> Timed:
    row.error = relative_error(way.layer(data.inputs[0], t).float(), data.reference)
    return _timed(row, data, [partial(way.layer, x, t) for x in data.inputs], RATES.get(way.activations))


def _alone(way: Way, t: SVDQuantTensors, data: LayerData, row: Row) -> Timed:
    out = torch.empty(1, data.shape.m, data.shape.n, dtype=data.dtype, device=data.weight.device)
    quantized = [way.quantize(x, t) for x in data.inputs]
    calls = [partial(multiply, way.product, q, (t,), out) for q in quantized]
    return _timed(row, data, calls, RATES.get(way.activations))


def _weight_only(session: Session, case: Case, timed: list[Timed], data: LayerData, weights: str, cache: int) -> None:
    from ...kernels import gpu

    row = Row(f"ours {'W4' if weights == 'int4' else 'W8'}A16", OURS)
    row.reason = session.state.wrong.get((weights, "none", "w4a16"), "")
    case.rows.append(row)

    def make() -> Timed:
        t = data.weight_only(weights)
        row.bytes = t.nbytes()
        twins = [t] + [copy_of(t) for _ in range(copies(row.bytes, cache) - 1)]
        runs = [partial(_product_of, gpu.w4a16_linear, twin, weights) for twin in twins]
        row.error = relative_error(runs[0](data.inputs[0]).float(), data.reference)
        return _timed(row, data, [partial(f, x) for f, x in _pairs(runs, data.inputs)], "bf16")

    if not row.reason:
        _prepare(session, row, timed, make)


def _product_of(product: Any, t: SVDQuantTensors, weights: str, x: Tensor) -> Tensor:
    y: Tensor = product(x, t.qweight, t.wscales, t.bias, weights, None)
    return y


def _solved(session: Session, case: Case, timed: list[Timed], data: LayerData) -> None:
    """The layer as a user gets it: decomposed by the solver, multiplied by what the device chooses."""
    row = Row("ours, solved and called as a layer", OURS)
    case.rows.append(row)

    def make() -> Timed:
        activations = resolve_activations("auto", LayerSpec(), session.torch_device)
        variant = Variant("", "int4", activations, session.settings.scale.rank)
        layer = solve(variant, data.weight.cpu(), data.bias.cpu(), data.inputs[-1][:512].cpu()).to(session.torch_device)
        row.bytes = stored_bytes(layer)
        row.error = relative_error(layer(data.inputs[0]).float(), data.reference)
        return _timed(row, data, [partial(layer, x) for x in data.inputs], None)

    _prepare(session, row, timed, make)
