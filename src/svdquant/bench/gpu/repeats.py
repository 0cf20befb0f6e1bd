"""Whether the same input gives the same bits: again and again, and whatever rows stand beside it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ...kernels import gpu
from ..results import OURS, Case, Row
from .data import layer_data, random_record
from .ours import PRECISIONS, ways
from .session import Session

_DTYPE = torch.bfloat16
_SECONDS = 5.0


@torch.inference_mode()
def run_repeats(session: Session) -> None:
    """`row.more`: repeats that were equal to the first, and rows of which a part of the input gave the same bits."""
    scale = session.settings.scale
    shape = scale.shapes[0]
    case = Case(
        session.suite, f"equal bits {shape}", "", {"repeats": scale.repeats, "rows": list(scale.invariant_rows)}
    )
    if session.has(case.name):
        return
    data = layer_data(shape, scale.rank, _DTYPE, session.torch_device, 0)
    x = data.inputs[0]
    for weights, activations in PRECISIONS[: scale.timed]:
        t = data.record(weights, activations)
        for way, why in ways(t, activations, _DTYPE, session.torch_device):
            if not why and not way.emulated and way.key not in session.state.wrong:
                _row(session, case, f"{way}", partial(way.layer, t=t), x)
    t = data.weight_only("int4")
    _row(
        session, case, "ours W4A16", lambda part: gpu.w4a16_linear(part, t.qweight, t.wscales, t.bias, "int4", None), x
    )
    session.add(case)
    _stacked(session, x)


def _row(session: Session, case: Case, name: str, run: Callable[[Tensor], Tensor], x: Tensor) -> None:
    if not session.fits(_SECONDS * session.on_gpu, name):
        return
    row = Row(name, OURS)
    case.rows.append(row)
    found, row.reason = session.attempt(name, lambda: _bits(session, run, x))
    if found is None:
        return
    repeats, differing = found
    row.more["equal repeats"] = repeats
    row.more["rows with other bits"] = differing
    if repeats < session.settings.scale.repeats or differing:
        row.reason = f"{repeats} of {session.settings.scale.repeats} repeats equal; other bits with rows {differing}"


def _bits(session: Session, run: Callable[[Tensor], Tensor], x: Tensor) -> tuple[int, list[str]]:
    scale = session.settings.scale
    whole = run(x)
    equal = sum(bool(torch.equal(run(x), whole)) for _ in range(scale.repeats))
    differing = []
    for rows in scale.invariant_rows:
        # At the beginning, and somewhere in the middle.
        for start in sorted({0, (x.shape[0] - rows) // 2}):
            if not torch.equal(run(x[start : start + rows].clone()), whole[start : start + rows]):
                differing.append(f"{start}…{start + rows - 1}")
    return equal, differing


def _stacked(session: Session, x: Tensor) -> None:
    """Batches of different size through the layer as models call it."""
    from ...nn import SVDQuantLinear
    from .data import spec_of

    weights, activations = PRECISIONS[0]
    scale = session.settings.scale
    t = random_record(x.shape[1], scale.layers[0][1], spec_of(weights, activations, scale.rank), _DTYPE, x.device)
    layer = SVDQuantLinear.from_tensors(t, _DTYPE)
    layer.activations = activations
    case = Case(session.suite, "equal bits in a batch", "", {})
    row = Row("a layer as models call it", OURS)
    case.rows.append(row)
    even = x[: x.shape[0] // 2 * 2].view(2, -1, x.shape[1])

    def check() -> bool:
        both = layer(even)
        return all(torch.equal(layer(even[i : i + 1]), both[i : i + 1]) for i in range(2))

    same, row.reason = session.attempt(row.contender, check)
    row.more["same in a batch of 2"] = same
    if same is False:
        row.reason = "other bits in a batch of 2"
    session.add(case)
