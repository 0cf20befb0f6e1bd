"""What a run has found, and its form in `results.json`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .measure import Spread, ratios

SCHEMA = 1
OURS, BASELINE, PEER = "ours", "baseline", "peer"


@dataclass
class Row:
    """One contender in one case.

    milliseconds: per call, over the rounds. speedup: × the case's reference contender, round by round.
    error: ‖y − ref‖/‖ref‖ against the case's exact result. bytes: what its weights take, scales and all;
    resident_bytes: by how much the process grew for it. scratch_bytes: needed during a call besides the output, at
    worst; first_scratch_bytes: the same of the very first call. reason: why it was not run, else "".
    """

    contender: str
    kind: str
    milliseconds: Spread | None = None
    speedup: Spread | None = None
    error: float | None = None
    bytes: int | None = None
    bytes_ratio: float | None = None
    resident_bytes: int | None = None
    scratch_bytes: int | None = None
    first_scratch_bytes: int | None = None
    samples_ms: list[float] = field(default_factory=list)
    reason: str = ""
    more: dict[str, Any] = field(default_factory=dict)

    def set_times(self, seconds: Sequence[float], reference: Sequence[float] | None) -> None:
        """Fills in what follows from the samples. reference: those of the contender that ratios refer to."""
        self.samples_ms = [1e3 * s for s in seconds]
        self.milliseconds = Spread.of(self.samples_ms)
        if reference is not None:
            self.speedup = Spread.of(ratios(reference, seconds))


@dataclass
class Case:
    """One shape, block or pipeline. reference: the contender that `speedup` refers to.

    shares: parts of a contender's time, by name, such as that of the low-rank branch. profiles: contender → kind of
    operation → milliseconds.
    """

    suite: str
    name: str
    reference: str
    facts: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    shares: dict[str, Spread] = field(default_factory=dict)
    profiles: dict[str, dict[str, float]] = field(default_factory=dict)

    def row(self, contender: str) -> Row:
        """The row of a contender. Raises `KeyError` where there is none."""
        for row in self.rows:
            if row.contender == contender:
                return row
        raise KeyError(contender)


@dataclass
class Target:
    """What was to be reached. met: None where it could not be evaluated; detail: how the value came about."""

    name: str
    wanted: str
    value: float | None
    met: bool | None
    detail: str = ""


@dataclass
class Results:
    """A whole run. notes: what was left out or failed, of suites that go on in spite of it."""

    command: str
    machine: dict[str, Any]
    versions: dict[str, str]
    settings: dict[str, Any]
    began: str
    cases: list[Case] = field(default_factory=list)
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **asdict(self)}
