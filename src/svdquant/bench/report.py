"""Results as tables: markdown for a file, rich for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .measure import Spread
from .results import Case, Results, Row, Target

if TYPE_CHECKING:
    from rich.table import Table

HEADER = ("contender", "ms", "quartiles", "× reference", "quartiles", "error", "bytes", "scratch MiB")
# Columns of those cases that have them, out of `Row.more`.
MORE = ("TOP/s", "TB/s", "of ceiling", "launches")


def table(case: Case) -> tuple[list[str], list[tuple[Row, list[str]]]]:
    """(header, rows that were run with their cells) of a case; without
    columns that are empty because nothing was timed or compared."""
    header, more = list(HEADER), [name for name in MORE if any(name in row.more for row in case.rows)]
    header[3] = f"× {case.reference}" if case.reference else "×"
    header += more
    rows = [(row, cells(row, more)) for row in case.rows if not row.reason]
    kept = list(range(len(header)))
    if not case.reference or not any(row.milliseconds for row in case.rows):
        kept = [i for i in kept if i == 0 or any(line[i] for _, line in rows)]
    return [header[i] for i in kept], [(row, [line[i] for i in kept]) for row, line in rows]


def verdict(case: Case) -> str | None:
    """Checks in a line; None of a case with times or counts."""
    if any(row.milliseconds or any(name in row.more for name in MORE) for row in case.rows):
        return None
    errors = [row.error for row in case.rows if not row.reason and row.error is not None]
    worst = f", error at most {max(errors):.4f}" if errors else ""
    return f"{title(case)}: {sum(not row.reason for row in case.rows)} of {len(case.rows)} right{worst}"


def cells(row: Row, more: Sequence[str] = ()) -> list[str]:
    """One line of a table, under `HEADER` and `more`; of a contender that was not run, its reason."""
    if row.reason:
        return [row.contender, "", "", "", "", "", "", row.reason, *[""] * len(more)]
    ms, times = row.milliseconds, row.speedup
    return [
        row.contender,
        "" if ms is None else _number(ms.median),
        "" if ms is None else _quartiles(ms),
        "" if times is None else f"{times.median:.2f}",
        "" if times is None else f"{times.lower_quartile:.2f}–{times.upper_quartile:.2f}",
        "" if row.error is None else f"{row.error:.4f}",
        "" if row.bytes_ratio is None else f"{row.bytes_ratio:.3f}" + ("" if row.bytes is not None else " (grown)"),
        "" if row.scratch_bytes is None else f"{row.scratch_bytes / 2**20:.1f}",
        *("" if name not in row.more else f"{row.more[name]:.4g}" for name in more),
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
    lines = [
        machine_line(results),
        "",
        ", ".join(f"{name} {version}" for name, version in results.versions.items()),
        "",
        f"`{results.command}`",
    ]
    if results.targets:
        lines += ["", "## targets", "", _line(list(TARGETS)), "|---|---:|---:|---|---|"]
        lines += [_line(target_cells(target)) for target in results.targets]
    for case in results.cases:
        header, rows = table(case)
        lines += ["", f"## {title(case)}", "", _line(header), "|---|" + "---:|" * (len(header) - 1)]
        lines += [_line(line) for _, line in rows]
        missing = [row for row in case.rows if row.reason]
        lines += [""] + [f"not run: {row.contender}: {row.reason}" for row in missing] if missing else []
        lines += ["", *[f"- {text}" for text in remarks(case)]] if remarks(case) else []
    if results.notes:
        lines += ["", "## left out or failed", "", *[f"- {text}" for text in results.notes]]
    return "\n".join(lines) + "\n"


TARGETS = ("target", "wanted", "value", "", "how")


def target_cells(target: Target) -> list[str]:
    """One line of the table of targets, under `TARGETS`."""
    verdict = {True: "met", False: "missed", None: "undecided"}[target.met]
    value = "" if target.value is None else f"{target.value:.3f}"
    return [target.name, target.wanted, value, verdict, target.detail]


def machine_line(results: Results) -> str:
    """What the run was made on."""
    machine = results.machine
    if "capability" in machine:
        memory = f"{machine['memory'] / 2**30:.0f} GiB"
        parts = [machine["name"], f"capability {machine['capability']}", memory, f"CUDA {machine['cuda']}"]
        parts += [f"driver {machine['driver_version']}"] if "driver_version" in machine else []
        return ", ".join([*parts, results.began])
    return (
        f"{machine.get('name', '')} {machine.get('family', '')}, {machine.get('cores')} cores, "
        f"{machine.get('threads')} threads, {' '.join(machine.get('instructions', ()))}"
    )


def rich_table(case: Case) -> Table:
    """A case for a terminal."""
    from rich.table import Table

    made = Table(title=title(case), title_justify="left", title_style="bold", box=None, pad_edge=False)
    header, rows = table(case)
    for number, name in enumerate(header):
        made.add_column(name, justify="left" if number == 0 else "right", no_wrap=True)
    for row, line in rows:
        made.add_row(*line, style={"ours": "bold", "baseline": "dim"}.get(row.kind, ""))
    return made


def _line(values: list[str]) -> str:
    return "| " + " | ".join(value.replace("|", "/") for value in values) + " |"


def _number(milliseconds: float) -> str:
    digits = 3 if milliseconds < 10 else 2 if milliseconds < 100 else 1
    return f"{milliseconds:.{digits}f}"


def _quartiles(spread: Spread) -> str:
    return f"{_number(spread.lower_quartile)}–{_number(spread.upper_quartile)}"
