"""Adapters in the low-rank branch: one product for the branch and all of them, and a strength per direction.

y = Q(x/s)·Ŵᵀ + ((x·[D A₁ A₂ …]ᵀ)·f)·[U B₁ B₂ …]ᵀ + b, where f is 1 for the layer's own directions and an adapter's
strength for that adapter's. Changing a strength changes f, a vector; no matrix is touched.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..config import MAX_STORED_RANK
from ..errors import SVDQuantError

# Every member's rank is padded to this, so that its sums are the same whoever stands beside it in the branch.
RANK_MULTIPLE = 16
# Sets of adapters whose joined matrices a layer keeps. One takes as much as the branch and the adapters together.
KEPT_SETS = 2


@dataclass(frozen=True)
class Adapter:
    """What an adapter adds to one layer: strength · x·Aᵀ·Bᵀ.

    down: A [r, K]; up: B [N, r]; of a convolution with 1×1 behind them.
    """

    name: str
    down: Tensor
    up: Tensor

    @property
    def rank(self) -> int:
        return self.down.shape[0]


@dataclass
class Branch:
    """A layer's branch with adapters in it, in place of its own for one call.

    proj_down [R, K], proj_up [N, R] in the layer's type; low_scales: float32 [R] or [B, R].
    """

    proj_down: Tensor
    proj_up: Tensor
    low_scales: Tensor


def padded_rank(rank: int) -> int:
    return -(-rank // RANK_MULTIPLE) * RANK_MULTIPLE


def joined_rank(layer: Any, ranks: Sequence[int]) -> int:
    """Rank of the layer's branch with adapters of these ranks in it."""
    base = 0 if layer.proj_down is None else layer.proj_down.shape[0]
    return padded_rank(base) + sum(padded_rank(rank) for rank in ranks)


def fits(layer: Any, ranks: Sequence[int]) -> bool:
    """Whether one branch holds them all."""
    return joined_rank(layer, ranks) <= MAX_STORED_RANK


def join(layer: Any, adapters: Sequence[Adapter]) -> tuple[Tensor, Tensor]:
    """(proj_down [R, K], proj_up [N, R]) of the layer's branch and the adapters', in the layer's type and device."""
    device, dtype = layer.qweight.device, layer.compute_dtype
    members = [] if layer.proj_down is None else [(layer.proj_down, layer.proj_up)]
    members += [(a.down.flatten(1), a.up.flatten(1)) for a in adapters]
    downs, ups = [], []
    for down, up in members:
        missing = padded_rank(down.shape[0]) - down.shape[0]
        downs.append(down.to(device, dtype))
        ups.append(up.to(device, dtype))
        if missing:
            downs.append(torch.zeros(missing, down.shape[1], device=device, dtype=dtype))
            ups.append(torch.zeros(up.shape[0], missing, device=device, dtype=dtype))
    return torch.cat(downs), torch.cat(ups, 1)


class BranchCache:
    """The joined matrices of the sets that a layer used last; forgotten with what they were made of."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[str, ...], tuple[list[Any], tuple[Tensor, Tensor]]] = OrderedDict()

    def get(self, layer: Any, adapters: Sequence[Adapter]) -> tuple[Tensor, Tensor]:
        """`join`, remembered while every tensor is the one it was, in the place where it was."""
        key = tuple(a.name for a in adapters)
        sources = _sources(layer, adapters)
        known = self._known.get(key)
        if known is not None and _same(known[0], sources):
            self._known.move_to_end(key)
            return known[1]
        self._known.pop(key, None)
        # Made for later calls too, which may need gradients.
        with torch.inference_mode(False), torch.no_grad():
            matrices = join(layer, adapters)
        self._known[key] = (sources, matrices)
        while len(self._known) > KEPT_SETS:
            self._known.popitem(last=False)
        return matrices

    def clear(self) -> None:
        self._known.clear()

    def forget(self, name: str) -> None:
        """Drops every set with the adapter of this name."""
        for key in [key for key in self._known if name in key]:
            del self._known[key]

    def nbytes(self) -> int:
        return sum(t.nbytes for _, matrices in self._known.values() for t in matrices)

    def __len__(self) -> int:
        return len(self._known)


def _sources(layer: Any, adapters: Sequence[Adapter]) -> list[Any]:
    tensors = [t for a in adapters for t in (a.down, a.up)]
    if layer.proj_down is not None:
        tensors += [layer.proj_down, layer.proj_up]
    # The tensors themselves: while they are held, nothing else can have their addresses.
    return [(t, t.data_ptr(), None if t.is_inference() else t._version) for t in tensors]


def _same(before: list[Any], now: list[Any]) -> bool:
    return len(before) == len(now) and all(
        a is b and address == there and version == then
        for (a, address, version), (b, there, then) in zip(before, now, strict=True)
    )


@lru_cache(maxsize=256)
def low_scales(
    device: torch.device, base: int, ranks: tuple[int, ...], strengths: tuple[Any, ...], repeats: int = 0
) -> Tensor:
    """float32 [R]: ones for `base` directions, each adapter's strength for its own; remembered.

    strengths: a number per adapter; or, where `repeats` is not 0, such a tuple per line: [repeats · lines, R].
    """
    # Made for later calls too, which may need gradients.
    with torch.inference_mode(False):
        if repeats:
            lines = [low_scales.__wrapped__(device, base, ranks, line) for line in strengths]
            return torch.stack(lines).repeat(repeats, 1)
        out = torch.ones(padded_rank(base) + sum(padded_rank(rank) for rank in ranks))
        start = padded_rank(base)
        for rank, strength in zip(ranks, strengths, strict=True):
            start += padded_rank(rank)
            out[start - padded_rank(rank) : start] = strength
        return out.to(device)


def traced_low_scales(device: torch.device, base: int, ranks: Sequence[int], strengths: Sequence[Any]) -> Tensor:
    """float32 [R] as operations that a compiler records; strengths may be tensors, which it then reads at run time."""
    parts = [torch.ones(padded_rank(base), device=device)]
    for rank, strength in zip(ranks, strengths, strict=True):
        if isinstance(strength, Tensor):
            parts.append(strength.to(device, torch.float32).reshape(1).expand(padded_rank(rank)))
        else:
            parts.append(torch.full((padded_rank(rank),), float(strength), device=device))
    return torch.cat(parts)


@dataclass(frozen=True)
class Requests:
    """Adapters per entry of a batch. sets: for each entry, adapter → strength; those not named are off."""

    sets: tuple[dict[str, float], ...]

    def repeats(self, entries: int, layer: str = "") -> int:
        """How often the sets recur in a batch of `entries`: pipelines with guidance draw every request twice.

        Raises `SVDQuantError` where they do not.
        """
        if entries % len(self.sets):
            where = f"{layer}: " if layer else ""
            raise SVDQuantError(
                f"{where}a batch of {entries} cannot be shared out among {len(self.sets)} requests; give one set of "
                "adapters per picture"
            )
        return entries // len(self.sets)

    @property
    def names(self) -> set[str]:
        return {name for chosen in self.sets for name, strength in chosen.items() if strength}

    def strengths(self, name: str, unit: float = 1.0) -> tuple[float, ...]:
        """Of one adapter, per entry, times `unit`."""
        return tuple(chosen.get(name, 0.0) * unit for chosen in self.sets)


def widened(layer: Any, down: Tensor, up: Tensor) -> None:
    """Makes these matrices the branch of `layer`, for good: a new rank in its spec."""
    for name, value in (("proj_down", down), ("proj_up", up)):
        setattr(layer, name, torch.nn.Parameter(value, requires_grad=False))
    layer.spec = replace(layer.spec, rank=down.shape[0])
