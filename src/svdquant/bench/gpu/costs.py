"""What parts of a layer cost: the low-rank branch, quantizing the input, an adapter; launches per block."""

from __future__ import annotations

import gc
from functools import partial
from typing import Any

import torch

from ...config import SVDQuantConfig
from ...kernels.gpu import choose
from ...nn import set_activations
from ..cases import Shape
from ..measure import Spread, shares
from ..results import OURS, Case, Row
from . import models
from .data import layer_data, random_record, spec_of
from .layers import cache_bytes
from .ours import PRECISIONS, Way, ways
from .session import Session
from .timing import Timed, by_kind, fill_rates, launches, measure_rows

BRANCH = "low-rank branch"
_DTYPE = torch.bfloat16
_SECONDS = 10.0


def run_costs(session: Session) -> None:
    scale = session.settings.scale
    for shape in scale.shapes[: len(scale.layers)]:
        for what, run in (("ranks", _ranks), ("input", _input)):
            name = f"{what} {shape}"
            if session.has(name) or not session.fits(_SECONDS * session.on_gpu, name):
                continue
            _, reason = session.attempt(name, partial(run, session, shape, name))
            if reason:
                session.note(f"{name}: {reason}")
    if not session.has("launches of a block") and session.fits(2 * _SECONDS * session.on_gpu, "launches of a block"):
        _, reason = session.attempt("launches of a block", lambda: _launches(session))
        if reason:
            session.note(f"launches of a block: {reason}")


def _usual(session: Session, shape: Shape) -> Way | None:
    """What the device chooses, or the first that works."""
    weights, activations = PRECISIONS[0]
    t = random_record(shape.k, shape.n, spec_of(weights, activations, 32), _DTYPE, session.torch_device)
    found = ways(t, activations, _DTYPE, session.torch_device)
    working = [way for way, why in found if not why and not way.emulated and way.key not in session.state.wrong]
    chosen = choose(t, activations, _DTYPE, session.torch_device)
    return next((way for way in working if way.product.name == chosen), working[0] if working else None)


@torch.inference_mode()
def _ranks(session: Session, shape: Shape, name: str) -> None:
    """The same layer with branches of several ranks; the last is the usual one with an adapter's directions added."""
    scale, settings = session.settings.scale, session.settings
    way = _usual(session, shape)
    if way is None:
        session.note(f"{name}: no product works")
        return
    data = layer_data(shape, scale.rank, _DTYPE, session.torch_device, 3 * cache_bytes(session))
    case = Case(session.suite, name, f"rank {scale.rank}", {"m": shape.m, "k": shape.k, "n": shape.n, "way": str(way)})
    timed = []
    for rank, text in [(r, f"rank {r}") for r in scale.ranks] + [
        (scale.rank + scale.adapter, f"rank {scale.rank} and an adapter of rank {scale.adapter}")
    ]:
        row = Row(text, OURS)
        case.rows.append(row)
        spec = spec_of(way.weights, way.activations, rank)
        t = random_record(shape.k, shape.n, spec, _DTYPE, session.torch_device)
        row.bytes = t.nbytes()
        calls = [partial(way.layer, x, t) for x in data.inputs]
        entry, row.reason = session.attempt(f"{name}: {text}", partial(_started, row, calls))
        if entry is not None:
            timed.append(entry)
    seconds = measure_rows(timed, session.device, settings.rounds, settings.sample_seconds, case.reference)
    usual, without = seconds.get(f"rank {scale.rank}"), seconds.get("rank 0")
    if usual and without:
        case.shares[BRANCH] = Spread.of(shares(usual, without))
    for rank in scale.ranks:
        found = seconds.get(f"rank {rank}")
        if found and without and rank not in (0, scale.rank):
            case.shares[f"branch of rank {rank}"] = Spread.of(shares(found, without))
    adapted = seconds.get(timed[-1].row.contender) if timed else None
    if usual and adapted and timed[-1].row.contender.startswith(f"rank {scale.rank} and"):
        case.shares["adapter"] = Spread.of(shares(adapted, usual))
    session.add(case)


def _started(row: Row, calls: list[Any], moved: float = 0.0) -> Timed:
    """After a first call of each."""
    for call in calls:
        call()
    return Timed(row, calls, 0.0, moved)


@torch.inference_mode()
def _input(session: Session, shape: Shape, name: str) -> None:
    """Quantizing an input of this width, down-projection included, by what every precision asks for."""
    scale, settings = session.settings.scale, session.settings
    if any(case.name.startswith(f"input {shape.m}x{shape.k}x") for case in session.state.results.cases):
        return
    data = layer_data(shape, scale.rank, _DTYPE, session.torch_device, 3 * cache_bytes(session))
    case = Case(session.suite, name, "", {"m": shape.m, "k": shape.k})
    timed, seen = [], set()
    for weights, activations in PRECISIONS[:4]:
        t = random_record(shape.k, 64, spec_of(weights, activations, scale.rank), _DTYPE, session.torch_device)
        for way, why in ways(t, activations, _DTYPE, session.torch_device):
            reading = way.product.reading(activations)
            if why or reading in seen:
                continue
            seen.add(reading)
            layout = (", packed" if reading.packed else "") + (", split" if reading.split else "")
            row = Row(f"{activations}{layout}", OURS)
            case.rows.append(row)
            calls = [partial(way.quantize, x, t) for x in data.inputs]
            moved = shape.m * shape.k * (2 + (0.5 if reading.packed else 1)) + shape.m * scale.rank * 2
            entry, row.reason = session.attempt(f"{name}: {row.contender}", partial(_started, row, calls, moved))
            if entry is not None:
                timed.append(entry)
    measure_rows(timed, session.device, settings.rounds, settings.sample_seconds, "")
    for entry in timed:
        entry.row.speedup = None
        if entry.row.milliseconds is not None:
            entry.row.more["TB/s"] = entry.moved / entry.row.milliseconds.median / 1e9
    fill_rates(timed, session.state.ceilings)
    session.add(case)


@torch.inference_mode()
def _launches(session: Session) -> None:
    """Kernels per block, of ours and of bf16, eagerly run."""
    scale = session.settings.scale
    device, picture = session.torch_device, scale.pictures[0]
    meta = models.meta_model(dict(scale.flux), (1, 1), _DTYPE)
    inputs = models.model_inputs(meta, picture, _DTYPE, device)
    case = Case(session.suite, "launches of a block", "", {"image_tokens": picture.image})
    made = {
        "ours W4A8": lambda: models.random_quantized(meta, SVDQuantConfig(rank=scale.rank), device),
        "bf16": lambda: models.bf16_model(meta, device),
    }
    for name, make in made.items():
        model = make()
        if name.startswith("ours"):
            set_activations(model, "int8")
        seen: dict[str, Any] = {}
        blocks = {kind: getattr(model, kind)[0] for kind in models.BLOCKS}
        hooks = [
            block.register_forward_pre_hook(partial(_remember, seen, kind), with_kwargs=True)
            for kind, block in blocks.items()
        ]
        model(**inputs)
        for hook in hooks:
            hook.remove()
        for kind, block in blocks.items():
            row = Row(f"{name}, {kind.removesuffix('s')}", OURS)
            case.rows.append(row)
            found = launches(partial(block, **seen[kind]), session.device)
            row.more["launches"] = sum(count for _, count, _ in found)
            row.more["kernels"] = [{"name": n[:120], "count": c, "ms": round(ms, 4)} for n, c, ms in found]
            case.profiles[row.contender] = by_kind(found)
        del model, blocks
        gc.collect()
    session.add(case)


def _remember(seen: dict[str, Any], kind: str, _block: Any, _args: Any, kwargs: dict[str, Any]) -> None:
    seen[kind] = kwargs
