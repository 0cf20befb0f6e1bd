"""Records to the packed tensors of a Nunchaku checkpoint: the way back of `nunchaku_linear`. Nothing is requantized."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import SVDQuantError
from ..numerics import GELU_SHIFT, SVDQuantTensors
from . import packing
from .nunchaku_linear import AWQ_GROUP, LEGACY, T5_GROUP, ZERO, shift_units
from .packing import AWQ_COLUMNS, AWQ_ROWS, TILE, round_up


def take_columns(record: SVDQuantTensors, start: int, stop: int, last: bool) -> SVDQuantTensors:
    """The part of a record over some of its input columns; the bias stays with the last part, others get zeros.

    Raises `ValueError` where outer scales or groups do not end at these columns.
    """
    if (start, stop) == (0, record.in_features):
        return record
    group, outer = record.spec.group_size, record.wcscales
    if start % group or (stop % group and stop != record.in_features):
        raise ValueError(f"groups of {group} do not end at column {start} or {stop}")
    if outer is not None and record.spec.outer_blocks > 1:
        width = record.in_features // record.spec.outer_blocks
        mine = outer[:, start // width : -(-stop // width)]
        if start % width or stop % width or not torch.equal(mine, mine[:, :1].expand_as(mine)):
            raise ValueError(f"outer scales do not end at column {start} or {stop}")
        outer = mine[:, 0].contiguous()
    unsigned = tuple(
        (max(a, start) - start, min(b, stop) - start) for a, b in record.spec.unsigned if a < stop > start < b
    )
    bias, down, up = record.bias, record.proj_down, record.proj_up
    if bias is not None and not last:
        bias = torch.zeros_like(bias)
    if down is not None and up is not None:
        own = _own_half(down, start, stop)
        down, up = down[own, start:stop], up[:, own]
    return SVDQuantTensors(
        replace(record.spec, unsigned=unsigned, outer_blocks=1, rank=0 if down is None else down.shape[0]),
        stop - start,
        qweight=record.qweight[:, start // 2 : -(-stop // group) * group // 2],
        wscales=record.wscales[:, start // group : -(-stop // group)],
        wcscales=outer,
        smooth_factor=None if record.smooth_factor is None else record.smooth_factor[start:stop],
        proj_down=down,
        proj_up=up,
        bias=bias,
    )


def _own_half(down: Tensor, start: int, stop: int) -> slice:
    """The rows of a branch that belong to these columns: half of them where two branches were joined on reading."""
    middle, rest = down.shape[0] // 2, down.shape[0] % 2
    outside = torch.cat([down[:, :start], down[:, stop:]], 1)
    for own, other in ((slice(0, middle), slice(middle, None)), (slice(middle, None), slice(0, middle))):
        if middle and not rest and not outside[own].any() and not down[other, start:stop].any():
            return own
    return slice(None)


def stack_rows(records: Sequence[SVDQuantTensors], names: Sequence[str]) -> SVDQuantTensors:
    """One record of linears that read the same input: their rows, one smoothing, one branch.

    Branches with different down-projections become one of all their ranks. Raises `SVDQuantError` naming the first
    layer that cannot be stacked with the others.
    """
    first = records[0]
    if len(records) == 1:
        return first
    for record, name in zip(records, names, strict=True):
        if not _equal(record.smooth_factor, first.smooth_factor):
            raise SVDQuantError(f"{name} and {names[0]} are smoothed differently, the format stores them as one layer")
        if (record.spec.weights, record.spec.unsigned) != (first.spec.weights, first.spec.unsigned):
            raise SVDQuantError(f"{name} and {names[0]} are stored differently, the format stores them as one layer")
    biases = [r.bias for r in records]
    bias = None
    if any(b is not None for b in biases):
        like = next(b for b in biases if b is not None)
        bias = torch.cat([like.new_zeros(r.out_features) if r.bias is None else r.bias for r in records])
    down, up = _stack_branches(records)
    outer = [r.wcscales for r in records]
    return replace(
        first,
        spec=replace(first.spec, rank=0 if down is None else down.shape[0]),
        qweight=torch.cat([r.qweight for r in records]),
        wscales=torch.cat([r.wscales.view(torch.uint8) for r in records]).view(first.wscales.dtype)
        if first.wscales.itemsize == 1
        else torch.cat([r.wscales for r in records]),
        wcscales=None if outer[0] is None else torch.cat(outer),  # type: ignore[arg-type]
        proj_down=down,
        proj_up=up,
        bias=bias,
    )


def _stack_branches(records: Sequence[SVDQuantTensors]) -> tuple[Tensor | None, Tensor | None]:
    if all(_equal(r.proj_down, records[0].proj_down) for r in records):
        if records[0].proj_down is None:
            return None, None
        return records[0].proj_down, torch.cat([r.proj_up for r in records])  # type: ignore[misc]
    downs = [r.proj_down for r in records if r.proj_down is not None]
    like = downs[0]
    up = like.new_zeros(sum(r.out_features for r in records), sum(d.shape[0] for d in downs))
    row = column = 0
    for record in records:
        if record.proj_up is not None:
            rank = record.proj_up.shape[1]
            up[row : row + record.out_features, column : column + rank] = record.proj_up
            column += rank
        row += record.out_features
    return torch.cat(downs), up


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def write_linear(
    record: SVDQuantTensors, rank: int, legacy: bool, rows: Tensor | None = None, fused: bool = False
) -> dict[str, Tensor]:
    """The packed tensors of a W4A4 layer, by leaf name; N and K padded to 128, its branch to `rank`.

    rows: int64 [Np'], for each stored row the row of the record or −1, where the stored order is another.
    fused: several stacked linears, whose outer scales are written per row even where they are equal.
    Raises `SVDQuantError` where the record is not what the format holds; the layer's name is the caller's to add.
    """
    spec, half = record.spec, record.floating_dtype
    reason = unfit(record)
    if reason:
        raise SVDQuantError(reason)
    n = record.out_features if rows is None else rows.numel()
    padded_n, padded_k = round_up(n, TILE), round_up(record.in_features, TILE)
    group, nvfp4 = spec.group_size, spec.weights == "nvfp4"

    def of_rows(t: Tensor, fill: float) -> Tensor:
        if rows is None:
            return _pad(t, padded_n, fill)
        padding = rows < 0
        moved = t.index_select(0, rows.clamp(min=0).to(t.device)).clone()
        moved[padding.to(t.device)] = fill
        return _pad(moved, padded_n, fill)

    codes = _pad_columns(record.qweight, padded_k // 2, 0)
    scales = record.wscales
    one = 1.0
    if nvfp4:
        scales, one = scales.contiguous().view(torch.uint8), 0x38  # 1 in e4m3
    scales = _pad_columns(scales, padded_k // group, one)
    packed = {"qweight": packing.pack_w4a4(of_rows(codes, 0))}
    if nvfp4:
        packed["wscales"] = packing.pack_micro_scales(of_rows(scales, one).view(torch.float8_e4m3fn))
        packed |= _write_outer(record, of_rows, fused, half)
    else:
        packed["wscales"] = packing.pack_scales(of_rows(scales, one))
    if record.bias is not None:
        packed["bias"] = packing.pack_vector(of_rows(record.bias.to(half), 0))
    smooth = record.smooth_factor
    smooth = torch.ones(record.in_features, dtype=half, device=codes.device) if smooth is None else smooth
    packed["smooth_factor"] = packing.pack_vector(_pad(smooth, padded_k, 1))
    packed["smooth_factor_orig"] = packed["smooth_factor"].clone()
    if rank:
        down, up = record.proj_down, record.proj_up
        if down is None or up is None:
            down, up = smooth.new_zeros(0, record.in_features), smooth.new_zeros(record.out_features, 0)
        down = _pad_columns(_pad(down.to(half), rank, 0), padded_k, 0)
        packed["proj_down"] = packing.pack_down(down)
        packed["proj_up"] = packing.pack_up(of_rows(_pad_columns(up.to(half), rank, 0), 0))
    if not legacy:
        return packed
    old = {new: name for name, new in LEGACY.items()}
    return {old.get(leaf, leaf): t for leaf, t in packed.items()}


def _write_outer(
    record: SVDQuantTensors, of_rows: Callable[[Tensor, float], Tensor], fused: bool, half: torch.dtype
) -> dict[str, Tensor]:
    outer = record.wcscales
    assert outer is not None
    if not fused and bool((outer == outer[0]).all()):
        return {"wtscale": outer[:1].clone()}
    return {"wcscales": packing.pack_vector(of_rows(outer.to(half), 1))}


def rounded_outer(record: SVDQuantTensors, fused: bool) -> float:
    """What 16 bits take from outer scales that are products of two, relative, at most."""
    outer = record.wcscales
    if outer is None or outer.dtype != torch.float32 or (not fused and bool((outer == outer[0]).all())):
        return 0.0
    return float(((outer.to(record.floating_dtype).float() - outer) / outer).abs().max())


def unfit(record: SVDQuantTensors, cut: bool = False) -> str:
    """Why a record cannot be written as a packed W4A4 layer; empty if it can. cut: between its column blocks."""
    spec = record.spec
    if spec.kind != "svdquant" or spec.weights not in ("int4", "nvfp4"):
        return f"is stored as {spec.kind} {spec.weights}, the format holds int4 and nvfp4"
    if spec.rotate:
        return "is rotated, which no published format can hold"
    if spec.weights == "int4" and spec.group_size != 64:
        return f"has groups of {spec.group_size}, the format has 64"
    if spec.outer_blocks > 1 and not cut:
        return "has several outer scales per row, the format has one"
    half = record.floating_dtype
    if half not in (torch.bfloat16, torch.float16):
        return f"has a branch in {str(half).removeprefix('torch.')}, the format holds bfloat16 and float16"
    return ""


def write_w4a16(record: SVDQuantTensors, chunks: int = 0, t5: bool = False) -> dict[str, Tensor]:
    """The packed tensors of a W4A16 layer, by leaf name. Raises `SVDQuantError` where the format cannot hold it."""
    reason = unfit_w4a16(record, T5_GROUP if t5 else AWQ_GROUP)
    if reason:
        raise SVDQuantError(reason)
    codes, scales, zeros = record.qweight, record.wscales, record.wzeros
    if zeros is None:
        codes, zeros = codes ^ 0x88, -ZERO * scales
    bias = record.bias
    if chunks:
        codes, scales, zeros = (packing.interleave(t, chunks) for t in (codes, scales, zeros))
        if bias is not None:
            bias = packing.interleave(shift_units(bias, chunks, 1.0), chunks)
    if bias is not None:
        bias = bias.to(scales.dtype)
    if not t5:
        packed = {"qweight": packing.pack_awq(codes), "wscales": scales.T.contiguous(), "wzeros": zeros.T.contiguous()}
    else:
        groups = round_up(scales.shape[1], 8)
        packed = {
            "qweight": packing.pack_awq(codes, torch.int16),
            "scales": _pad(scales.T, groups, 0),
            "scaled_zeros": _pad(zeros.T, groups, 0),
        }
    return packed | ({} if bias is None else {"bias": bias})


def unfit_w4a16(record: SVDQuantTensors, group: int) -> str:
    """Why a record cannot be written as a packed W4A16 layer, or ""."""
    spec = record.spec
    if spec.kind != "w4a16" or spec.weights != "int4":
        return f"is stored as {spec.kind} {spec.weights}, the format has W4A16 there"
    if spec.group_size != group:
        return f"has groups of {spec.group_size}, the format has {group}"
    if record.out_features % AWQ_ROWS or record.in_features % max(AWQ_COLUMNS, group):
        return f"is {record.out_features}×{record.in_features}, which the format cannot pack"
    if record.wscales.dtype not in (torch.bfloat16, torch.float16):
        return "has scales in float32, the format holds bfloat16 and float16"
    return ""


def rounded_bias(record: SVDQuantTensors, chunks: int) -> float:
    """What adding the 1 of a modulation changes in its bias, at most: the format's 16 bits hold fewer digits then."""
    if record.bias is None or not chunks:
        return 0.0
    wanted = shift_units(record.bias.float(), chunks, 1.0)
    return float((wanted.to(record.wscales.dtype).float() - wanted).abs().max())


def with_shift(record: SVDQuantTensors, unsigned: bool) -> SVDQuantTensors:
    """The record with unsigned activations on all columns or on none; its bias takes the shift in or gives it back."""
    wanted = ((0, record.in_features),) if unsigned else ()
    if record.spec.unsigned == wanted:
        return record
    plain = replace(record, proj_down=None, proj_up=None, bias=None, spec=replace(record.spec, rank=0, unsigned=()))
    weight, _ = plain.dense()
    shift = torch.zeros(record.in_features, device=weight.device)
    for start, stop in record.spec.unsigned:
        shift[start:stop] += GELU_SHIFT
    for start, stop in wanted:
        shift[start:stop] -= GELU_SHIFT
    old = weight.new_zeros(record.out_features) if record.bias is None else record.bias.float()
    bias = (old + weight @ shift).to(record.floating_dtype)
    return replace(record, bias=bias, spec=replace(record.spec, unsigned=wanted))


def _pad(t: Tensor, length: int, fill: float) -> Tensor:
    """First dimension filled up to `length`."""
    missing = length - t.shape[0]
    return t.contiguous() if not missing else torch.cat([t, t.new_full((missing, *t.shape[1:]), fill)])


def _pad_columns(t: Tensor, length: int, fill: float) -> Tensor:
    missing = length - t.shape[1]
    return t.contiguous() if not missing else torch.cat([t, t.new_full((t.shape[0], missing), fill)], 1)
