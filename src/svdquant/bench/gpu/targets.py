"""What a run on a Hopper GPU has to reach, and whether this one did."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean

from ..measure import Spread, ratios
from ..results import Case, Results, Row, Target
from . import peers, step
from .costs import BRANCH
from .settings import GPUSettings

_NF4_NAMES = (step.NF4, step.NF4_TORCH)


def evaluate(results: Results, settings: GPUSettings) -> list[Target]:
    """All targets; one that the run cannot decide has no value."""
    cases = {(case.suite, case.name): case for case in results.cases}
    first = settings.scale.pictures[0]
    # Some blocks are not the transformer, and a smoke run is no measurement.
    picture = cases.get(("gpu step", step.case_name(first, None))) if not settings.blocks else None
    found = [
        _linears(cases, settings),
        _step("step against compiled bf16", 1.35, picture, (step.BF16,)),
        _step("step against compiled FP8", 0.95, picture, (step.FP8, step.FP8_TORCHAO)),
        _memory(picture),
        _step("step against NF4", 2.0, picture, _NF4_NAMES),
        _branch(cases, settings),
    ]
    if settings.smoke:
        for target in found:
            target.met, target.detail = None, f"a smoke run is no measurement; {target.detail}".rstrip("; ")
    return found


def _target(name: str, wanted: float, value: float | None, detail: str, most: bool = False) -> Target:
    met = None if value is None else (value <= wanted if most else value >= wanted)
    return Target(name, f"{'≤' if most else '≥'} {wanted:g}", value, met, detail)


def _linears(cases: dict[tuple[str, str], Case], settings: GPUSettings) -> Target:
    """Time of all linears of a step by bf16, over that of one way of ours, whichever is best."""
    name, wanted, scale = "linears with 4-bit weights against bf16", 1.6, settings.scale
    shapes = scale.shapes[: len(scale.layers)]
    there = [cases.get(("gpu layers", str(shape))) for shape in shapes]
    if any(case is None for case in there):
        return _target(name, wanted, None, "not all shapes were measured")
    totals: dict[str, float] = {}
    dense = _weighted((case.row(peers.BF16) for case in there if case), scale.weights)
    for way in _ways(there[0]):
        total = _weighted((_row(case, way) for case in there), scale.weights)
        if total is not None:
            totals[way] = total
    if dense is None or not totals:
        return _target(name, wanted, None, "bf16 or all of ours were not measured at some shape")
    best = min(totals, key=lambda way: totals[way])
    each = [row.speedup.median for case in there if (row := _row(case, best)) and row.speedup]
    detail = f"{best}; by shape {', '.join(f'{value:.2f}' for value in each)}; weighted as a step of FLUX.1 has them"
    return _target(name, wanted, dense / totals[best], detail)


def _ways(case: Case | None) -> list[str]:
    """Whole layers of ours with 4-bit weights."""
    rows = case.rows if case else []
    return [r.contender for r in rows if r.more.get("weights") in ("int4", "nvfp4") and r.milliseconds]


def _row(case: Case | None, name: str) -> Row | None:
    return next((row for row in case.rows if row.contender == name), None) if case else None


def _weighted(rows: Iterable[Row | None], weights: Iterable[int]) -> float | None:
    times = [row.milliseconds.median if row and row.milliseconds else None for row in rows]
    if None in times:
        return None
    return sum(time * weight for time, weight in zip(times, weights, strict=True) if time is not None)


def _fastest(case: Case, names: Iterable[str]) -> Row | None:
    rows = [row for name in names if (row := _row(case, name)) and row.milliseconds]
    return min(rows, key=lambda row: row.milliseconds.median if row.milliseconds else 0.0, default=None)


def _both(case: Case | None, others: Iterable[str]) -> tuple[Row, Row] | None:
    if case is None:
        return None
    ours, other = _fastest(case, step.OURS_NAMES), _fastest(case, others)
    return (ours, other) if ours and other else None


def _step(name: str, wanted: float, case: Case | None, others: tuple[str, ...]) -> Target:
    rows = _both(case, others)
    if rows is None:
        return _target(name, wanted, None, "not measured")
    ours, other = rows
    assert ours.milliseconds and other.milliseconds
    # Round by round, as the rounds were run: a chip that slows down slows both.
    ratio = Spread.of(ratios(other.samples_ms, ours.samples_ms)).median
    return _target(name, wanted, ratio, f"{ours.contender} against {other.contender}")


def _memory(case: Case | None) -> Target:
    name, wanted = "weight memory against FP8", 0.55
    rows = _both(case, (step.FP8, step.FP8_TORCHAO))
    if rows is None or not rows[0].bytes or not rows[1].bytes:
        return _target(name, wanted, None, "not measured", most=True)
    ours, other = rows
    assert ours.bytes and other.bytes
    gib = 1 << 30
    detail = f"{ours.bytes / gib:.2f} of {other.bytes / gib:.2f} GiB, against {other.contender}"
    return _target(name, wanted, ours.bytes / other.bytes, detail, most=True)


def _branch(cases: dict[tuple[str, str], Case], settings: GPUSettings) -> Target:
    name, wanted = "low-rank branch, share of a linear", 0.05
    there = [case for (suite, _), case in cases.items() if suite == "gpu costs" and BRANCH in case.shares]
    if not there:
        return _target(name, wanted, None, "not measured", most=True)
    found: list[float] = [case.shares[BRANCH].median for case in there]
    detail = f"mean of {', '.join(f'{100 * value:.1f} %' for value in found)}"
    return _target(name, wanted, fmean(found), detail, most=True)
