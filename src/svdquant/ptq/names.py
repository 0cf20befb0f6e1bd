"""Names of equal things in different blocks, written as one: `blocks.{0-18}.attn.to_q`."""

from __future__ import annotations

from collections.abc import Hashable, Sequence


def ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] as "0-2,5"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def joined_names(names: Sequence[tuple[str, Hashable]]) -> list[tuple[str, list[int]]]:
    """(pattern, positions in `names`) of what differs only in numbers of the path, in the order of the first.

    names: (name, what has to be equal for two to be joined). A pattern means exactly the names that it was made of:
    numbers are joined one place at a time, the innermost first, and only where everything else agrees.
    """
    lines = [(name.split("."), key, [position]) for position, (name, key) in enumerate(names)]
    for place in range(max((len(parts) for parts, _, _ in lines), default=0) - 1, -1, -1):
        found: dict[Hashable, list[tuple[list[str], Hashable, list[int]]]] = {}
        for line in lines:
            parts, key, _ = line
            numbered = place < len(parts) and parts[place].isdigit()
            around = (*parts[:place], "", *parts[place + 1 :]) if numbered else tuple(parts)
            found.setdefault((around, key, numbered), []).append(line)
        lines = [_one(same, place) for same in found.values()]
    return [(".".join(parts), positions) for parts, _, positions in lines]


def _one(lines: list[tuple[list[str], Hashable, list[int]]], place: int) -> tuple[list[str], Hashable, list[int]]:
    parts, key, _ = lines[0]
    if len(lines) == 1:
        return lines[0]
    numbers = ranges([int(line[0][place]) for line in lines])
    merged = [*parts[:place], f"{{{numbers}}}", *parts[place + 1 :]]
    return merged, key, sorted(position for line in lines for position in line[2])
