"""Medians, ratios within a round, the order of rounds, and that a slow contender is found slow."""

from __future__ import annotations

import statistics
import time

import pytest

from svdquant.bench.device import CPU
from svdquant.bench.measure import Contender, Spread, in_order, measure, ratios, shares


class Clock:
    """A device on which the first call of a contender in each round takes what was written down for it."""

    def __init__(self, takes: dict[str, list[float]]) -> None:
        self.takes, self.called, self.now = takes, [], ""

    def seconds(self, calls: list, repeats: int) -> float:
        for _ in range(repeats):
            calls[0]()
        return self.takes[self.now][0] if len(self.takes[self.now]) == 1 else self.takes[self.now].pop(0)


def clocked(takes: dict[str, list[float]]) -> tuple[Clock, list[Contender]]:
    clock = Clock(takes)

    def calling(name: str):
        def call() -> None:
            clock.now = name
            clock.called.append(name)

        return call

    return clock, [Contender(name, [calling(name)]) for name in takes]


def test_spread_against_the_standard_library() -> None:
    values = [3.0, 1.0, 4.0, 1.5, 9.0, 2.6]
    spread = Spread.of(values)
    quartiles = statistics.quantiles(values, n=4, method="inclusive")
    assert spread == Spread(statistics.median(values), quartiles[0], quartiles[2], 1.0, 9.0)
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0, 2.0, 2.0)


def test_ratios_are_taken_within_a_round() -> None:
    # The machine is twice as slow in the second round: the ratio is the same in both.
    assert ratios([2.0, 4.0], [1.0, 2.0]) == [2.0, 2.0]
    assert shares([10.0, 20.0], [9.0, 19.0]) == pytest.approx([0.1, 0.05])
    with pytest.raises(ValueError):
        ratios([1.0], [1.0, 2.0])


def test_everyone_runs_once_in_a_round_and_never_in_one_order() -> None:
    contenders = [Contender(name, [lambda: None]) for name in "abc"]
    orders = ["".join(c.name for c in in_order(contenders, number)) for number in range(6)]
    assert orders == ["abc", "acb", "cab", "cba", "bca", "bac"]


def test_samples_belong_to_their_contender() -> None:
    # Two calls to begin with, then per round one that warms and one sample; calls of a second are never repeated.
    fast, slow = ([n, n, 9, n, 9, n + 0.1, 9, n + 0.2] for n in (1.0, 5.0))
    clock, contenders = clocked({"fast": fast, "slow": slow})
    assert measure(contenders, clock, 3) == {"fast": [1.0, 1.1, 1.2], "slow": [5.0, 5.1, 5.2]}
    assert clock.called[4:] == ["fast", "fast", "slow", "slow"] * 3


def test_short_calls_are_repeated_until_a_sample_is_long() -> None:
    clock, contenders = clocked({"short": [0.001]})
    measure(contenders, clock, 1, sample_seconds=0.02)
    # Warm-up, a first look, three to calibrate, one to bring the data back, and the sample.
    assert len(clock.called) == 1 + 1 + 3 + 1 + 20


def test_copies_take_turns_and_are_not_warmed() -> None:
    called: list[int] = []
    calls = [lambda number=number: called.append(number) for number in range(3)]
    CPU().seconds(calls, 7)
    assert called == [0, 1, 2, 0, 1, 2, 0]
    clock, _ = clocked({"": [0.001]})
    called.clear()
    measure([Contender("", calls)], clock, 1, sample_seconds=0.02)
    assert len(called) == 3 + 1 + 3 + 20


def test_a_slow_contender_is_found_slow() -> None:
    contenders = [Contender("once", [lambda: time.sleep(0.002)]), Contender("thrice", [lambda: time.sleep(0.006)])]
    seconds = measure(contenders, CPU(), 3, sample_seconds=0.01)
    assert Spread.of(ratios(seconds["once"], seconds["thrice"])).maximum < 0.6
