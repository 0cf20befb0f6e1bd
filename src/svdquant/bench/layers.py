"""The suite of layers: one linear per shape, ours beside torch and the peers."""

from __future__ import annotations

import gc
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
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
from .results import OURS, PEER, Case, Row
from .settings import Settings

# Where weights are to be found cold, so many bytes of copies pass by before the first is used again.
_COLD_BYTES = 256 << 20
_MOST_COPIES = 12
_REHEARSAL = Shape(16, 256, 256)
_QUANTIZING, _OUTPUT = "quantizing the input", "new memory for the output"


class Multiplier(Protocol):
    """What `Peer` and `OurLayer` have in common."""

    keeps_output: Any
    counts_bytes: Any

    def prepare(self, case: LinearCase) -> None: ...
    def copy(self, case: LinearCase) -> Multiplier: ...
    def input(self, case: LinearCase) -> Tensor: ...
    def __call__(self, x: Tensor) -> Tensor: ...
    @property
    def bytes(self) -> int | None: ...


@dataclass(frozen=True)
class Entry:
    """One who takes part, or why not."""

    name: str
    kind: str
    make: Callable[[], Any]
    reason: str | None = None


def run_layers(settings: Settings, device: Device) -> list[Case]:
    """All shapes, one case each. Raises `SVDQuantError` where the rank exceeds one of them."""
    for shape in settings.shapes:
        if settings.rank > min(shape.k, shape.n) and not shape.modulation:
            fitting = min(shape.k, shape.n)
            raise SVDQuantError(f"rank {settings.rank} exceeds a layer of shape {shape}; use --rank {fitting} or less")
    cases = []
    for number, shape in enumerate(settings.shapes):

        def progress(done: int, total: int, text: str, number: int = number) -> None:
            settings.progress("layers", 100 * number + 100 * done // total, 100 * len(settings.shapes), text)

        cases.append(run_layer(shape, settings, device, progress))
    return cases


@torch.inference_mode()
def run_layer(shape: Shape, settings: Settings, device: Device, progress: Callable[[int, int, str], Any]) -> Case:
    """One shape."""
    data = linear_case(shape, settings.dtype, torch.get_num_threads())
    ours = variants(shape, settings.rank)
    entries = [Entry(v.name, OURS, partial(OurLayer, v, settings.gptq)) for v in ours]
    for peer in (*DENSE, *settings.peers):
        entries.append(Entry(peer.name, peer.kind, peer, peer.available() or peer.fits(data)))
    inputs = itertools.cycle([data.x, data.x.roll(1, 0)])
    total = len(entries) + settings.rounds
    facts = {"m": shape.m, "k": shape.k, "n": shape.n, "cold": shape.modulation}
    case = Case("layers", str(shape), BASELINE.name, facts)
    contenders: list[Contender] = []
    for number, entry in enumerate(entries):
        progress(number, total, f"{shape}: preparing {entry.name}")
        row = Row(entry.name, entry.kind, reason=entry.reason or "")
        case.rows.append(row)
        if row.reason:
            continue
        try:
            contender, multiplier = _prepared(entry.make, row, data, device, inputs)
            contenders.append(contender)
            if entry is entries[0] and not shape.modulation:
                contenders += parts(multiplier, data, inputs)
        except Exception as error:
            # Of others' code anything may be expected, and is reported; ours has to work.
            if entry.kind == OURS:
                raise
            row.reason = f"failed: {first_line(error)}"

    def tell(done: int, _rounds: int) -> None:
        progress(len(entries) + done, total, f"{shape}: round {done + 1}")

    seconds = measure(contenders, device, settings.rounds, settings.sample_seconds, tell)
    dense = case.row(BASELINE.name).bytes
    for row in case.rows:
        if row.contender in seconds:
            row.set_times(seconds[row.contender], seconds.get(BASELINE.name))
            held = row.bytes if row.bytes is not None else row.resident_bytes
            row.bytes_ratio = held / dense if held is not None and dense else None
    if not shape.modulation:
        whole = seconds[ours[0].name]
        without = {part: seconds[part] for part in (_QUANTIZING, _OUTPUT) if part in seconds}
        if settings.rank:
            without = {"low-rank branch": seconds[ours[1].name], **without}
        case.shares.update({part: Spread.of(shares(whole, rest)) for part, rest in without.items()})
    return case


def parts(multiplier: OurLayer, data: LinearCase, inputs: Iterator[Tensor]) -> list[Contender]:
    """The layer without what can be left out of it: an input that it has quantized before, an output in memory that
    the process has already been given."""
    kept = data.x.new_empty(data.x.shape[0], data.shape.n).fill_(0)

    def into_kept() -> Tensor:
        return multiplier(next(inputs), out=kept)

    return [Contender(_QUANTIZING, [partial(multiplier, data.x)]), Contender(_OUTPUT, [into_kept])]


def _prepared(
    make: Callable[[], Any], row: Row, data: LinearCase, device: Device, inputs: Iterator[Tensor]
) -> tuple[Contender, Any]:
    """Prepares a contender and fills in what one call tells: error, bytes, scratch. Returns what multiplies, too.

    inputs: what our layers read in turn, so that none finds its input already quantized by the call before.
    """
    if isinstance(make, type) and issubclass(make, Peer) and not make.counts_bytes:
        # What a library sets up once is not the layer's.
        small = linear_case(_REHEARSAL, data.dtype, data.threads)
        rehearsal = make()
        rehearsal.prepare(small)
        rehearsal(rehearsal.input(small))
        del rehearsal
    if row.kind == PEER:
        # Libraries tie their objects in knots, which would be counted for the next one.
        gc.collect()
    before = device.resident()
    multiplier: Multiplier = make()
    multiplier.prepare(data)
    x = multiplier.input(data)
    ours = isinstance(multiplier, OurLayer)
    y, first = _one_call(multiplier, x, ours, device)
    if y.shape != data.reference.shape:
        raise ValueError(f"the output has shape {list(y.shape)}")
    row.error = relative_error(y.float(), data.reference)
    size = y.nbytes
    del y
    after = device.resident()
    _, again = _one_call(multiplier, x, ours, device)
    row.bytes = multiplier.bytes
    row.first_scratch_bytes = None if first is None else max(first - size, 0)
    row.scratch_bytes = None if again is None else max(again - (0 if multiplier.keeps_output else size), 0)
    if before is not None and after is not None:
        beside = (0 if x is data.x else x.nbytes) + (size if multiplier.keeps_output else 0)
        row.resident_bytes = max(after - before - beside, 0)
    multipliers = [multiplier]
    if data.shape.modulation:
        held = row.bytes or row.resident_bytes or _COLD_BYTES
        copies = min(math.ceil(_COLD_BYTES / max(held, 1)), _MOST_COPIES)
        multipliers += [multiplier.copy(data) for _ in range(copies - 1)]
    row.more["copies"] = len(multipliers)
    if ours:
        return Contender(row.contender, [partial(_next_input, m, inputs) for m in multipliers]), multiplier
    return Contender(row.contender, [partial(m, x) for m in multipliers]), multiplier


def _one_call(multiplier: Multiplier, x: Tensor, ours: bool, device: Device) -> tuple[Tensor, int | None]:
    """(output, bytes it took). Ours keeps the codes of an input for others that read it, until the input is gone."""
    output: list[Tensor] = []
    peak = device.peak(partial(_kept_call, multiplier, x.clone() if ours else x, output))
    return output.pop(), peak


def _kept_call(multiplier: Multiplier, x: Tensor, output: list[Tensor]) -> None:
    output.append(multiplier(x))


def _next_input(multiplier: Multiplier, inputs: Iterator[Tensor]) -> Tensor:
    return multiplier(next(inputs))
