"""What the headers of a Nunchaku file must say before any of its tensors is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from ..config import MAX_STORED_RANK
from ..errors import SVDQuantError
from .header import TensorInfo
from .layout import Checkpoint
from .nunchaku_layouts import StoredLinear
from .nunchaku_linear import AWQ_GROUP, LEGACY, T5_GROUP
from .packing import RANK_TILE, TILE, round_up

HALF = ("BF16", "F16")
_STACKS = {
    "num_layers": "transformer_blocks.",
    "num_single_layers": "single_transformer_blocks.",
    "n_layers": "layers.",
    "n_refiner_layers": "noise_refiner.",
}
PRECISIONS = {"int4": "int4", "fp4_e2m1_all": "nvfp4"}


def precision_of(checkpoint: Checkpoint) -> str:
    """ "int4" or "nvfp4": of the scales, which must agree with each other and with what the file declares."""
    kinds: dict[str, str] = {}
    for name, info in checkpoint.tensors.items():
        layer, _, leaf = name.rpartition(".")
        if leaf == "wscales" and getattr(checkpoint.tensors.get(f"{layer}.qweight"), "dtype", "") == "I8":
            kinds.setdefault("nvfp4" if info.dtype == "F8_E4M3" else "int4", layer)
    if len(kinds) > 1:
        raise SVDQuantError(
            f"{checkpoint.path}: {kinds['int4']} is int4 and {kinds['nvfp4']} nvfp4; a file has one of them: "
            "download it again"
        )
    found = next(iter(kinds), "int4")
    weight = (checkpoint.quantization or {}).get("weight")
    declared = weight.get("dtype") if isinstance(weight, dict) else None
    if declared is not None and kinds and PRECISIONS.get(str(declared)) != found:
        raise SVDQuantError(
            f"{checkpoint.path}: declares {declared!r} weights, its scales are those of {found}; download it again"
        )
    return found


def common_rank(checkpoint: Checkpoint) -> int:
    """The rank that all low-rank branches of a file have; raises `SVDQuantError` where they differ."""
    ranks: dict[int, str] = {}
    for name, info in checkpoint.tensors.items():
        layer, _, leaf = name.rpartition(".")
        if LEGACY.get(leaf, leaf) in ("proj_down", "proj_up") and f"{layer}.qweight" in checkpoint.tensors:
            ranks.setdefault(info.shape[-1] if info.shape else 0, name)
    if len(ranks) > 1:
        (first, one), (second, other) = sorted(ranks.items())[:2]
        raise SVDQuantError(
            f"{checkpoint.path}: tensor {one} has rank {first}, {other} rank {second}; a file has one rank: "
            "download it again"
        )
    rank = next(iter(ranks), 0)
    if rank % RANK_TILE or rank > MAX_STORED_RANK:
        raise SVDQuantError(
            f"{checkpoint.path}: tensor {ranks[rank]} has rank {rank}, which is no multiple of {RANK_TILE} up to "
            f"{MAX_STORED_RANK}; download it again"
        )
    return rank


def check_depth(config: dict[str, Any], tensors: dict[str, TensorInfo], where: Path) -> None:
    """Compares the numbers of blocks in a configuration with the tensors, before a model of that size is built.

    Raises `SVDQuantError` where they differ.
    """
    for key, stack in _STACKS.items():
        wanted = config.get(key)
        if not isinstance(wanted, int):
            continue
        depth = len({name[len(stack) :].partition(".")[0] for name in tensors if name.startswith(stack)})
        if wanted > len(tensors) or (depth and wanted != depth):
            raise SVDQuantError(
                f"{where}: its configuration says {key}={wanted}, its tensors are those of {depth}; download it again"
            )


def check_plain(name: str, shape: tuple[int, ...], found: dict[str, TensorInfo], where: Path) -> None:
    """A 16-bit tensor: there, floating, of this shape."""
    info = found.get(name)
    if info is None:
        raise SVDQuantError(f"{where}: tensor {name} is missing; download it again")
    if info.shape != shape:
        raise SVDQuantError(f"{where}: tensor {name} has the shape {list(info.shape)}, the model takes {list(shape)}")
    if info.dtype not in (*HALF, "F32"):
        raise SVDQuantError(f"{where}: tensor {name} has the type {info.dtype}, the model takes BF16, F16 or F32")


def check_linear(
    linear: StoredLinear,
    model: nn.Module,
    checkpoint: Checkpoint,
    weights: str,
    rank: int,
    padded: bool = True,
) -> set[str]:
    """Compares the packed tensors of one linear with the model; returns their names.

    padded: whether the format fills N and K up to 128. Raises `SVDQuantError` for what is missing or does not fit.
    """
    modules: list[Any] = [model.get_submodule(name) for name in linear.members]
    conv = [isinstance(module, nn.Conv2d) for module in modules]
    outs = [m.out_channels if c else m.out_features for m, c in zip(modules, conv, strict=True)]
    width = modules[0].in_channels if conv[0] else modules[0].in_features
    n = sum(outs) if linear.rows is None else linear.rows.numel()
    with_bias = linear.bias and any(m.bias is not None for m in modules)
    names: set[str] = set()
    for number, piece in enumerate(linear.pieces):
        k = (width if piece.stop is None else piece.stop) - piece.start
        last = number == len(linear.pieces) - 1
        check = _Checker(checkpoint, piece.name)
        if linear.kind == "w4a16":
            check.w4a16(n, k)
        else:
            check.w4a4(round_up(n, TILE) if padded else n, round_up(k, TILE) if padded else k, weights, rank)
        check.optional("bias", [(round_up(n, TILE),) if linear.kind != "w4a16" and padded else (n,)], (*HALF, "F32"))
        if with_bias and last and "bias" not in check.leaves:
            check.missing("bias")
        names |= {f"{piece.name}.{leaf}" for leaf in check.leaves}
    return names


class _Checker:
    """Collects the leaves of one layer as they are found in order."""

    def __init__(self, checkpoint: Checkpoint, layer: str) -> None:
        self.path, self.found, self.layer = checkpoint.path, checkpoint.tensors, layer
        self.leaves: set[str] = set()

    def missing(self, leaf: str) -> None:
        old = {new: name for name, new in LEGACY.items()}
        if leaf in old and any(name.endswith((".lora_down", ".smooth")) for name in self.found):
            leaf = old[leaf]
        raise SVDQuantError(f"{self.path}: tensor {self.layer}.{leaf} is missing; download it again")

    def required(self, leaf: str, shapes: list[tuple[int, ...]], types: tuple[str, ...]) -> None:
        if not self.optional(leaf, shapes, types):
            self.missing(leaf)

    def optional(self, leaf: str, shapes: list[tuple[int, ...]], types: tuple[str, ...]) -> bool:
        """Whether the leaf is there, under its old or new name; raises where it does not fit."""
        names = [leaf, *(old for old, new in LEGACY.items() if new == leaf)]
        present = [name for name in names if f"{self.layer}.{name}" in self.found]
        if not present:
            return False
        info = self.found[f"{self.layer}.{present[0]}"]
        where = f"{self.path}: tensor {self.layer}.{present[0]}"
        if info.shape not in shapes:
            raise SVDQuantError(f"{where} has the shape {list(info.shape)}, the model takes {list(shapes[0])}")
        if info.dtype not in types:
            raise SVDQuantError(f"{where} has the type {info.dtype}, the format has {' or '.join(types)}")
        self.leaves |= {present[0]}
        return True

    def w4a4(self, n: int, k: int, weights: str, rank: int) -> None:
        nvfp4 = weights == "nvfp4"
        self.required("qweight", [(n, k // 2)], ("I8",))
        self.required("wscales", [(k // (16 if nvfp4 else 64), n)], ("F8_E4M3",) if nvfp4 else HALF)
        self.required("smooth_factor", [(k,)], HALF)
        self.optional("smooth_factor_orig", [(k,)], HALF)
        if rank:
            self.required("proj_down", [(k, rank)], HALF)
            self.required("proj_up", [(n, rank)], HALF)
        if nvfp4:
            self.optional("wtscale", [(1,), ()], (*HALF, "F32"))
            self.optional("wcscales", [(n,)], HALF)

    def w4a16(self, n: int, k: int) -> None:
        t5 = getattr(self.found.get(f"{self.layer}.qweight"), "dtype", "") == "I16"
        shape, group = ((n // 4, k), T5_GROUP) if t5 else ((n // 4, k // 2), AWQ_GROUP)
        self.required("qweight", [shape], ("I16",) if t5 else ("I32",))
        if k % group:
            raise SVDQuantError(f"{self.path}: layer {self.layer} has {k} inputs, which groups of {group} do not fill")
        exact = k // group
        counts = [exact] if exact % 8 == 0 else [exact, round_up(exact, 8)]
        shapes: list[tuple[int, ...]] = [(count, n) for count in dict.fromkeys([*counts, round_up(exact, 16)])]
        self.required("scales" if t5 else "wscales", shapes, HALF)
        self.required("scaled_zeros" if t5 else "wzeros", shapes, HALF)
