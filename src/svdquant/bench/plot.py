"""The results as a picture: how many times faster than the reference, a panel per case."""

from __future__ import annotations

from pathlib import Path

from .report import title
from .results import BASELINE, OURS, Case, Results

_COLOURS = {OURS: "#1b6ca8", BASELINE: "#9a9a9a"}
_OTHERS = "#d98e32"


def plot(results: Results, path: Path) -> str | None:
    """Writes a PNG; returns why there is none, or None."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return "no plot, because matplotlib is not installed: pip install matplotlib"
    shown = [case for case in results.cases if any(row.speedup for row in case.rows)]
    if not shown:
        return "no plot, because nothing was measured"
    heights = [0.9 + 0.26 * len(_bars(case)) for case in shown]
    figure, axes = pyplot.subplots(
        len(shown), 1, figsize=(9, sum(heights)), height_ratios=heights, squeeze=False, layout="constrained"
    )
    for axis, case in zip(axes[:, 0], shown, strict=True):
        bars = _bars(case)
        for place, (_, kind, middle, low, high, note) in enumerate(bars):
            colour, error = _COLOURS.get(kind, _OTHERS), [[middle - low], [high - middle]]
            axis.barh(place, middle, xerr=error, color=colour, height=0.7)
            axis.text(high, place, f"  {middle:.2f}×{note}", va="center", fontsize=8)
        axis.set_yticks(range(len(bars)), [bar[0] for bar in bars], fontsize=8)
        axis.invert_yaxis()
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_xlim(0, 1.35 * max(bar[4] for bar in bars))
        axis.set_title(f"{title(case)}: × {case.reference}, median and quartiles", fontsize=9, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(axis="x", labelsize=8)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)
    return None


def _bars(case: Case) -> list[tuple[str, str, float, float, float, str]]:
    """(name, kind, median, lower and upper quartile, note) of what was run."""
    return [
        (
            row.contender,
            row.kind,
            row.speedup.median,
            row.speedup.lower_quartile,
            row.speedup.upper_quartile,
            "" if not row.error else f", error {row.error:.3f}",
        )
        for row in case.rows
        if row.speedup is not None
    ]
