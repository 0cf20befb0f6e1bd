"""Results as tables: markdown for a file, rich for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .measure import Spread
from .results import Case, Results, Row

if TYPE_CHECKING:
    from rich.table import Table

HEADER = ("contender", "ms", "quartiles", "× reference", "quartiles", "error", "bytes", "scratch MiB")


def cells(row: Row) -> list[str]:
    """One line of a table, under `HEADER`; of a contender that was not run, its reason."""
    if row.reason or row.milliseconds is None:
        return [row.contender, "", "", "", "", "", "", row.reason]
    ms, times = row.milliseconds, row.speedup
    return [
        row.contender,
        _number(ms.median),
        _quartiles(ms),
        "" if times is None else f"{times.median:.2f}",
        "" if times is None else f"{times.lower_quartile:.2f}–{times.upper_quartile:.2f}",
        "" if row.error is None else f"{row.error:.4f}",
        "" if row.bytes_ratio is None else f"{row.bytes_ratio:.3f}" + ("" if row.bytes is not None else " (grown)"),
        "" if row.scratch_bytes is None else f"{row.scratch_bytes / 2**20:.1f}",
    ]


def title(case: Case) -> str:
    """What a case is, in a line."""
    cold = ", weights cold" if case.facts.get("cold") else ""
    return f"{case.suite} {case.name}{cold}"


def remarks(case: Case) -> list[str]:
    """Lines below a case's table: shares and profiles."""
    lines = [
        f"{name}: {100 * share.median:.1f} % of the time "
        f"(quartiles {100 * share.lower_quartile:.1f} to {100 * share.upper_quartile:.1f} %)"
        for name, share in case.shares.items()
    ]
    for row in case.rows:
        if "seconds_per_picture" in row.more:
            psnr = "" if row.more.get("psnr") is None else f", {row.more['psnr']:.1f} dB against {case.reference}"
            lines.append(f"{row.contender}: {row.more['seconds_per_picture']:.2f} s per picture{psnr}")
    for contender, parts in case.profiles.items():
        total = sum(parts.values()) or 1.0
        spent = ", ".join(f"{name} {ms:.1f} ms ({100 * ms / total:.0f} %)" for name, ms in parts.items())
        lines.append(f"{contender} spends: {spent}")
    return lines


def markdown(results: Results) -> str:
    """The whole run as a page."""
    machine = results.machine
    lines = [
        f"{machine.get('name', '')} {machine.get('family', '')}, {machine.get('cores')} cores, "
        f"{machine.get('threads')} threads, {' '.join(machine.get('instructions', ()))}",
        "",
        ", ".join(f"{name} {version}" for name, version in results.versions.items()),
        "",
        f"`{results.command}`",
    ]
    for case in results.cases:
        header = list(HEADER)
        header[3] = f"× {case.reference}"
        lines += ["", f"## {title(case)}", "", _line(header), "|---|" + "---:|" * (len(header) - 1)]
        ran = [row for row in case.rows if not row.reason]
        lines += [_line(cells(row)) for row in ran]
        missing = [row for row in case.rows if row.reason]
        lines += [""] + [f"not run: {row.contender}: {row.reason}" for row in missing] if missing else []
        lines += ["", *[f"- {text}" for text in remarks(case)]] if remarks(case) else []
    return "\n".join(lines) + "\n"


def rich_table(case: Case) -> Table:
    """A case for a terminal."""
    from rich.table import Table

    made = Table(title=title(case), title_justify="left", title_style="bold", box=None, pad_edge=False)
    header = list(HEADER)
    header[3] = f"× {case.reference}"
    for number, name in enumerate(header):
        made.add_column(name, justify="left" if number == 0 else "right", no_wrap=True)
    for row in case.rows:
        if not row.reason:
            made.add_row(*cells(row), style={"ours": "bold", "baseline": "dim"}.get(row.kind, ""))
    return made


def _line(values: list[str]) -> str:
    return "| " + " | ".join(value.replace("|", "/") for value in values) + " |"


def _number(milliseconds: float) -> str:
    digits = 3 if milliseconds < 10 else 2 if milliseconds < 100 else 1
    return f"{milliseconds:.{digits}f}"


def _quartiles(spread: Spread) -> str:
    return f"{_number(spread.lower_quartile)}–{_number(spread.upper_quartile)}"
