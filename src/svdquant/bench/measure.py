"""Times that can be compared: every round runs each contender once, and ratios are taken within a round."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .device import Call, Device

# Shorter samples are lost in the clock and in what other threads still do.
SAMPLE_SECONDS = 0.06
# More calls than this are copies that are to be found cold; two are two inputs of one layer.
_WARM = 2
# A call as long as this needs no call before it to bring its data back into the caches.
_LONG = 0.1
_MOST_REPEATS = 100_000


@dataclass(frozen=True)
class Spread:
    """A median with what lies around it."""

    median: float
    lower_quartile: float
    upper_quartile: float
    minimum: float
    maximum: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        ordered = sorted(values)
        if len(ordered) == 1:
            return cls(*[ordered[0]] * 5)
        low, _, high = statistics.quantiles(ordered, n=4, method="inclusive")
        return cls(statistics.median(ordered), low, high, ordered[0], ordered[-1])


@dataclass(frozen=True)
class Contender:
    """Something to time. calls: one call, or several over equal data that are to be found cold in turn."""

    name: str
    calls: Sequence[Call]


def measure(
    contenders: Sequence[Contender],
    device: Device,
    rounds: int,
    sample_seconds: float = SAMPLE_SECONDS,
    progress: Callable[[int, int], Any] | None = None,
) -> dict[str, list[float]]:
    """Seconds per call of each contender, one number per round.

    A sample repeats the call until `sample_seconds` have passed, after one call that brings its data into the caches
    (none where there are many calls, which are to be found cold). The order rotates from round to round and runs
    backwards in every second one, so that nobody always follows the same neighbour.
    """
    repeats = {c.name: _repeats(c, device, sample_seconds) for c in contenders}
    samples: dict[str, list[float]] = {c.name: [] for c in contenders}
    for number in range(rounds):
        if progress is not None:
            progress(number, rounds)
        for contender in in_order(contenders, number):
            if len(contender.calls) <= _WARM:
                device.seconds(contender.calls, len(contender.calls))
            samples[contender.name].append(device.seconds(contender.calls, repeats[contender.name]))
    return samples


def in_order(contenders: Sequence[Contender], number: int) -> list[Contender]:
    """The contenders of one round."""
    start = number % max(len(contenders), 1)
    order = [*contenders[start:], *contenders[:start]]
    return order[::-1] if number % 2 else order


def _repeats(contender: Contender, device: Device, sample_seconds: float) -> int:
    """Calls per sample, after a warm-up; one where samples may be as short as they are."""
    if sample_seconds <= 0:
        return 1
    device.seconds(contender.calls, len(contender.calls))
    taken = device.seconds(contender.calls, 1)
    if taken < _LONG:
        taken = device.seconds(contender.calls, min(max(3, len(contender.calls)), 64))
    wanted = math.ceil(sample_seconds / max(taken, 1e-9))
    return max(1, min(wanted, _MOST_REPEATS))


def ratios(baseline: Sequence[float], seconds: Sequence[float]) -> list[float]:
    """How many times faster than the baseline, round by round."""
    return [b / s for b, s in zip(baseline, seconds, strict=True)]


def shares(whole: Sequence[float], without: Sequence[float]) -> list[float]:
    """The part of `whole` that is missing in `without`, round by round; negative where noise exceeds it."""
    return [1 - b / a for a, b in zip(whole, without, strict=True)]
