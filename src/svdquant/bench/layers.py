"""The suite of layers: one linear per shape, ours beside torch and the peers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import SVDQuantError
from ..numerics import relative_error
from .cases import LinearCase, Shape, linear_case
from .device import Device
from .measure import Contender, Spread, measure, shares
from .ours import OurLayer, variants
from .peers import BASELINE, DENSE, Peer
from .peers.base import first_line
from .results import OURS, Case, Row
from .settings import Settings

# Where weights are to be found cold, so many bytes of copies pass by before the first is used again.
_COLD_BYTES = 256 << 20
_MOST_COPIES = 12


class Multiplier(Protocol):
    """What `Peer` and `OurLayer` have in common."""

    name: str
    kind: str

    def prepare(self, case: LinearCase) -> None: ...
    def __call__(self, x: Tensor) -> Tensor: ...
    @property
    def bytes(self) -> int | None: ...


def run_layers(settings: Settings, device: Device) -> list[Case]:
    """All shapes, one case each."""
    cases = []
    for number, shape in enumerate(settings.shapes):

        def progress(done: int, total: int, text: str, number: int = number) -> None:
            settings.progress("layers", number * total + done, len(settings.shapes) * total, text)

        cases.append(run_layer(shape, settings, device, progress))
    return cases


@torch.inference_mode()
def run_layer(
    shape: Shape, settings: Settings, device: Device, progress: Callable[[int, int, str], None]
) -> Case:
    """One shape. Raises `SVDQuantError` where the rank does not fit it."""
    if settings.rank > min(shape.k, shape.n):
        raise SVDQuantError(f"rank {settings.rank} exceeds the layer of shape {shape}; use --rank {min(shape.k, shape.n)}")
    data = linear_case(shape, settings.dtype, torch.get_num_threads())
    ours = variants(shape, settings.rank)
    peers: list[type[Peer]] = [*DENSE, *settings.peers]
    total = len(ours) + len(peers) + settings.rounds
    case = Case("layers", str(shape), BASELINE.name, {"m": shape.m, "k": shape.k, "n": shape.n, "cold": shape.modulation})
    contenders: list[Contender] = []
    makers: list[tuple[str, str, Callable[[], Multiplier]]] = [
        (v.name, OURS, lambda v=v: OurLayer(v, settings.gptq)) for v in ours
    ]
    makers += [(peer.name, peer.kind, peer) for peer in peers]
    reasons = {peer.name: peer.available() or peer.fits(data) for peer in peers}
    for number, (name, kind, make) in enumerate(makers):
        progress(number, total, f"{shape}: preparing {name}")
        row = Row(name, kind, reason=reasons.get(name) or "")
        case.rows.append(row)
        if row.reason:
            continue
        try:
            contenders.append(_prepared(make, row, data, device))
        except Exception as error:
            # Of others' code anything may be expected, and is reported; ours has to work.
            if kind == OURS:
                raise
            row.reason = f"failed: {first_line(error)}"

    def tell(done: int, _rounds: int) -> None:
        progress(len(makers) + done, total, f"{shape}: round {done + 1}")

    seconds = measure(contenders, device, settings.rounds, settings.sample_seconds, tell)
    dense = case.row(BASELINE.name).bytes
    for row in case.rows:
        if row.contender in seconds:
            row.set_times(seconds[row.contender], seconds.get(BASELINE.name))
            held = row.bytes if row.bytes is not None else row.resident_bytes
            row.bytes_ratio = held / dense if held is not None and dense else None
    if not shape.modulation and settings.rank:
        with_branch, without = (seconds[v.name] for v in ours[:2])
        case.shares["low-rank branch"] = Spread.of(shares(with_branch, without))
    return case


def _prepared(make: Callable[[], Multiplier], row: Row, data: LinearCase, device: Device) -> Contender:
    """Prepares a contender and fills in what one call tells: error, bytes, scratch."""
    before = device.resident()
    multiplier = make()
    multiplier.prepare(data)
    x: Tensor = multiplier.input(data) if isinstance(multiplier, Peer) else data.x
    output: list[Any] = []
    first = device.peak(lambda: output.append(multiplier(x)))
    y = output.pop()
    row.error = relative_error(y.float(), data.reference)
    size = y.nbytes
    shape = tuple(y.shape)
    del y
    if shape != tuple(data.reference.shape):
        raise ValueError(f"the output has shape {list(shape)}")
    after = device.resident()
    again = device.peak(lambda: multiplier(x))
    row.bytes = multiplier.bytes
    row.first_scratch_bytes = None if first is None else max(first - size, 0)
    row.scratch_bytes = None if again is None else max(again - size, 0)
    if before is not None and after is not None:
        row.resident_bytes = max(after - before - (0 if x is data.x else x.nbytes), 0)
    multipliers = [multiplier]
    if data.shape.modulation:
        held = row.bytes or row.resident_bytes or _COLD_BYTES
        for _ in range(min(math.ceil(_COLD_BYTES / max(held, 1)), _MOST_COPIES) - 1):
            multipliers.append(_twin(multiplier, make, data))
    row.more["copies"] = len(multipliers)
    return Contender(row.contender, [lambda m=m: m(x) for m in multipliers])


def _twin(multiplier: Multiplier, make: Callable[[], Multiplier], data: LinearCase) -> Multiplier:
    if isinstance(multiplier, OurLayer):
        return multiplier.copy()
    twin = make()
    twin.prepare(data)
    return twin
