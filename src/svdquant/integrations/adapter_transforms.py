"""OFT, BOFT and (IA)³ as their files have them: what they multiply a layer's outputs or inputs by.

LyCORIS' and kohya's `oft_blocks` [n, b, b] hold B, with Q = B − Bᵀ and R = (I + Q)·(I − Q)⁻¹; a weight's rows become
Rᵀ times what they were, block by block. With four dimensions they are BOFT's factors. `alpha` limits ‖Q‖ to
alpha · outputs. PEFT's and OneTrainer's `oft_R.weight` holds the upper triangles of Q for the inputs, x becomes x·R.
"""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor

from ..errors import SVDQuantError
from .adapter_formats import unfit
from .peft_transforms import Transform

# PEFT's series in place of the inverse, at its default of five terms: I + 2Q + 2Q² + 2Q³ + Q⁴.
NEUMANN_TERMS = 5
LEAF = re.compile(r"\.(oft_blocks(?:\.\d+)?|rescale|oft_R\.weight|oft_R\.scaled_oft|on_input)$")


def cayley(q: Tensor) -> Tensor:
    """(I + Q)·(I − Q)⁻¹ − I of skew-symmetric Q [..., b, b], without the difference."""
    eye = torch.eye(q.shape[-1], dtype=q.dtype)
    return torch.linalg.solve(eye - q, 2 * q, left=False)


def rows_of(group: dict[str, Tensor]) -> int | None:
    """How many outputs a group speaks of; None where it speaks of inputs."""
    if "oft_R.weight" in group or ("on_input" in group and float(group["on_input"]) != 0):
        return None
    if "on_input" in group:
        return group["weight"].numel() if "weight" in group else 0
    blocks = _all_blocks(group)
    return sum(part.shape[-3] * part.shape[-1] if part.dim() >= 3 else 0 for part in blocks)


def _all_blocks(group: dict[str, Tensor]) -> list[Tensor]:
    names = [name for name in group if name.startswith("oft_blocks")]
    return [group[name] for name in sorted(names, key=lambda name: int(name.rpartition(".")[2]) if "." in name else 0)]


def for_outputs(base: str, group: dict[str, Tensor], parts: dict[str, int]) -> dict[str, Transform]:
    """Module → transform of its outputs. parts: module → rows of the modules that `base` is, one below the other.

    Raises `SVDQuantError` where the blocks do not fit the rows, or span several modules.
    """
    total = sum(parts.values())
    if "on_input" in group:
        gain = group["weight"].float().flatten()
        _check_rows(base, len(gain), parts)
        return {name: Transform("output", gain=g) for name, g in zip(parts, gain.split([*parts.values()]), strict=True)}
    given = _all_blocks(group)
    if any(part.dim() not in (3, 4) or part.shape[-1] != part.shape[-2] or part.numel() == 0 for part in given):
        raise unfit(base, group)
    _check_rows(base, rows_of(group) or 0, parts)
    rescale = group["rescale"].float().flatten() if "rescale" in group else torch.ones(total)
    if len(rescale) != total:
        raise unfit(base, group)
    gains = (rescale - 1).split([*parts.values()])
    factors = [_limited(part.float(), float(group.get("alpha", torch.zeros(())))) for part in given]
    if given[0].dim() == 4:
        return {next(iter(parts)): _butterfly(base, factors[0], gains[0], parts)}
    made, start = {}, 0
    pieces = _by_rows(factors)
    for (name, rows), gain in zip(parts.items(), gains, strict=True):
        blocks = [piece for begin, piece in pieces if start <= begin < start + rows]
        sizes = {piece.shape[-1] for piece in blocks}
        if len(sizes) != 1 or len(blocks) * max(sizes, default=0) != rows:
            raise SVDQuantError(
                f"{base}: its blocks of {', '.join(str(part.shape[-1]) for part in given)} outputs do not end where "
                f"{name} does ({rows} outputs); take the adapter as a LoRA"
            )
        made[name] = Transform("output", cayley(torch.stack(blocks)).mT[None], _gain(gain))
        start += rows
    return made


def _butterfly(base: str, factors: Tensor, gain: Tensor, parts: dict[str, int]) -> Transform:
    if len(parts) > 1:
        raise SVDQuantError(
            f"{base}: its butterfly factors mix the outputs of {', '.join(parts)}, which are layers of their own in "
            "this model; take the adapter as a LoRA"
        )
    count, _, size, _ = factors.shape
    if size % 2 or sum(parts.values()) % (2 ** (count - 1) * size):
        raise SVDQuantError(
            f"{base}: {count} butterfly factors of blocks of {size} do not fit {sum(parts.values())} outputs; download "
            "the adapter again"
        )
    return Transform("output", cayley(factors), _gain(gain), butterfly=True)


def _check_rows(base: str, rows: int, parts: dict[str, int]) -> None:
    if rows != sum(parts.values()):
        raise SVDQuantError(
            f"{base} is for {rows} outputs, and {' with '.join(parts)} has {sum(parts.values())}; the adapter was made "
            "for another model"
        )


def _gain(gain: Tensor) -> Tensor | None:
    return gain if bool(gain.any()) else None


def _limited(blocks: Tensor, alpha: float) -> Tensor:
    """Q, no longer than alpha · outputs where alpha is not 0."""
    q = blocks - blocks.mT
    longest = alpha * blocks.shape[-3] * blocks.shape[-1]
    norm = float(q.norm())
    return q * (longest / norm) if 0 < longest < norm else q


def _by_rows(factors: list[Tensor]) -> list[tuple[int, Tensor]]:
    """(first row, block) of all blocks."""
    out, start = [], 0
    for factor in factors:
        for block in factor:
            out.append((start, block))
            start += block.shape[-1]
    return out


def for_inputs(base: str, group: dict[str, Tensor], features: int, terms: int = NEUMANN_TERMS) -> Transform:
    """The transform of a layer's inputs. terms: of PEFT's series, 0 for the inverse itself.

    Raises `SVDQuantError` where it does not fit.
    """
    if "on_input" in group:
        gain = group["weight"].float().flatten()
        if len(gain) != features:
            raise _wrong(base, len(gain), features)
        return Transform("input", gain=gain)
    packed = group["oft_R.weight"].float()
    if packed.dim() != 2:
        raise unfit(base, group)
    count, entries = packed.shape
    size = round((1 + math.sqrt(1 + 8 * entries)) / 2)
    # One block for all is shared.
    repeats = features // size if count == 1 else 1
    if size * (size - 1) // 2 != entries or count * repeats * size != features:
        raise _wrong(base, count * size, features)
    if "oft_R.scaled_oft" in group:
        packed = packed / entries**0.5
    q = packed.new_zeros(count, size, size)
    rows, columns = torch.triu_indices(size, size, 1)
    q[:, rows, columns] = packed
    q = q - q.mT
    # PEFT turns the other way round with the inverse than with the series.
    change = _series(q, terms) if terms else cayley(-q)
    return Transform("input", change.mT.repeat(repeats, 1, 1)[None])


def _series(q: Tensor, terms: int) -> Tensor:
    """2Q + 2Q² + … + Qⁿ⁻¹."""
    terms = 4 if terms == 3 else terms  # in PEFT's code the same
    out, power = torch.zeros_like(q), q
    for i in range(1, terms):
        last = i == terms - 1 and terms > 2
        out = out + (1 if last else 2) * power
        power = power @ q
    return out


def _wrong(base: str, found: int, features: int) -> SVDQuantError:
    return SVDQuantError(
        f"{base} is for {found} inputs, and the layer has {features}; the adapter was made for another model"
    )
