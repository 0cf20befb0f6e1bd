"""One linear of a Nunchaku checkpoint: its packed tensors to `SVDQuantTensors` and back. Nothing is requantized."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..config import LayerSpec
from ..numerics import SVDQuantTensors, padded_columns
from . import packing

# Newer files name the branch and the smoothing as diffusers does.
LEGACY = {
    "lora_down": "proj_down",
    "lora_up": "proj_up",
    "smooth": "smooth_factor",
    "smooth_orig": "smooth_factor_orig",
}
T5 = {"scales": "wscales", "scaled_zeros": "wzeros"}
LEAVES = frozenset(
    ("qweight", "wscales", "wzeros", "wtscale", "wcscales", "bias", *LEGACY, *LEGACY.values(), *T5)
)  # fmt: skip
AWQ_GROUP, T5_GROUP = 64, 128
# A symmetric int4 group as unsigned codes: the zero point −8·scale is exact in every floating type, −7·scale is not.
ZERO = 8


def read_linear(
    tensors: dict[str, Tensor],
    out_features: int,
    in_features: int,
    unsigned: bool = False,
    chunks: int = 0,
    rows: Tensor | None = None,
) -> SVDQuantTensors:
    """The record of one packed linear.

    tensors: by leaf name, old or new. out_features N, in_features K: of the model; the file's may be padded.
    unsigned: the layer follows a GELU (int4 activations only). chunks: of an interleaved modulation, 0 = not
    interleaved. rows: int64 [N], the stored row of each output, where the stored order is another.
    """
    named = {LEGACY.get(leaf, T5.get(leaf, leaf)): t for leaf, t in tensors.items()}
    if named["qweight"].dtype != torch.int8:
        return _read_w4a16(named, in_features, chunks)
    nvfp4 = named["wscales"].dtype == torch.float8_e4m3fn
    down, up = named.get("proj_down"), named.get("proj_up")
    spec = LayerSpec(
        weights="nvfp4" if nvfp4 else "int4",
        group_size=16 if nvfp4 else 64,
        rank=0 if down is None else down.shape[1],
        unsigned=((0, in_features),) if unsigned and not nvfp4 else (),
    )
    columns = padded_columns(in_features, spec)

    def of_rows(stored: Tensor) -> Tensor:
        return stored[:out_features].contiguous() if rows is None else stored.index_select(0, rows.to(stored.device))

    unpack_scales = packing.unpack_micro_scales if nvfp4 else packing.unpack_scales
    scales = unpack_scales(named["wscales"])[:, : columns // spec.group_size]
    if nvfp4:
        scales = of_rows(scales.contiguous().view(torch.uint8)).view(torch.float8_e4m3fn)
    bias = named.get("bias")
    return SVDQuantTensors(
        spec,
        in_features,
        qweight=of_rows(packing.unpack_w4a4(named["qweight"])[:, : columns // 2]),
        wscales=scales if nvfp4 else of_rows(scales),
        wcscales=of_rows(_outer_scales(named)) if nvfp4 else None,
        smooth_factor=packing.unpack_vector(named["smooth_factor"])[:in_features].contiguous(),
        proj_down=None if down is None else packing.unpack_down(down)[:, :in_features].contiguous(),
        proj_up=None if up is None else of_rows(packing.unpack_up(up)),
        bias=None if bias is None else of_rows(packing.unpack_vector(bias)),
    )


def _outer_scales(named: dict[str, Tensor]) -> Tensor:
    """nvfp4's two optional outer scales, of the tensor and of each row, as one per row [Np]."""
    padded = named["qweight"].shape[0]
    of_tensor, of_rows = named.get("wtscale"), named.get("wcscales")
    if of_rows is None:
        half = named["smooth_factor"]
        return (half.new_ones(1) if of_tensor is None else of_tensor.reshape(1)).expand(padded).contiguous()
    natural = packing.unpack_vector(of_rows)
    if of_tensor is None or float(of_tensor) == 1:
        return natural
    if bool((natural == 1).all()):
        return of_tensor.reshape(1).expand(padded).contiguous()
    return natural.float() * of_tensor.float()


def _read_w4a16(named: dict[str, Tensor], in_features: int, chunks: int) -> SVDQuantTensors:
    group = AWQ_GROUP if named["qweight"].dtype == torch.int32 else T5_GROUP
    count = in_features // group

    def order(stored: Tensor) -> Tensor:
        return packing.deinterleave(stored, chunks) if chunks else stored

    codes = order(packing.unpack_awq(named["qweight"]))
    scales = order(named["wscales"][:count].T.contiguous())
    zeros: Tensor | None = order(named["wzeros"][:count].T.contiguous())
    if torch.equal(zeros, -ZERO * scales):  # type: ignore[arg-type]
        # Codes less 8 in two's complement: the same weights, without zero points.
        codes, zeros = codes ^ 0x88, None
    bias = named.get("bias")
    if bias is not None and chunks:
        bias = shift_units(order(bias), chunks, -1.0)
    spec = LayerSpec("w4a16", group_size=group, rank=0, smooth=False, zeros=zeros is not None)
    return SVDQuantTensors(spec, in_features, codes, scales, wzeros=zeros, bias=bias)


def shift_units(bias: Tensor, chunks: int, by: float) -> Tensor:
    """Adds `by` to the scale chunks; float32 where the bias' own type cannot hold the sum."""
    shifted = bias.float().unflatten(0, (chunks, -1)).clone()
    shifted[list(packing.unit_chunks(chunks))] += by
    shifted = shifted.flatten()
    return shifted.to(bias.dtype) if torch.equal(shifted.to(bias.dtype).float(), shifted) else shifted


def join_columns(pieces: Sequence[SVDQuantTensors]) -> SVDQuantTensors:
    """One record of layers whose outputs are added, over the concatenation of their inputs."""
    if len(pieces) == 1:
        return pieces[0]
    starts = [sum(p.in_features for p in pieces[:i]) for i in range(len(pieces))]
    unsigned = tuple(
        (a + start, b + start) for p, start in zip(pieces, starts, strict=True) for a, b in p.spec.unsigned
    )
    first, total = pieces[0], sum(p.in_features for p in pieces)
    down, up = _join_branches(pieces)
    outer, blocks = _join_outer(pieces)
    biases = [p.bias for p in pieces if p.bias is not None and bool(p.bias.any())]
    bias = next((p.bias for p in reversed(pieces) if p.bias is not None), None)
    if len(biases) == 1:
        bias = biases[0]
    elif biases:
        bias = torch.stack([b.float() for b in biases]).sum(0).to(biases[0].dtype)
    rank = 0 if down is None else down.shape[0]
    return SVDQuantTensors(
        replace(first.spec, rank=rank, unsigned=unsigned, outer_blocks=blocks),
        total,
        qweight=torch.cat([p.qweight for p in pieces], 1),
        wscales=torch.cat([p.wscales.view(torch.uint8) for p in pieces], 1).view(first.wscales.dtype)
        if first.wscales.itemsize == 1
        else torch.cat([p.wscales for p in pieces], 1),
        wcscales=outer,
        smooth_factor=torch.cat([p.smooth_factor for p in pieces]),  # type: ignore[misc]
        proj_down=down,
        proj_up=up,
        bias=bias,
    )


def _join_branches(pieces: Sequence[SVDQuantTensors]) -> tuple[Tensor | None, Tensor | None]:
    downs = [p.proj_down for p in pieces if p.proj_down is not None]
    ups = [p.proj_up for p in pieces if p.proj_up is not None]
    if not downs:
        return None, None
    if len(downs) == len(pieces) and all(torch.equal(up, ups[0]) for up in ups):
        # One branch over the whole input, which was cut for the file.
        return torch.cat(downs, 1), ups[0]
    down = ups[0].new_zeros(sum(d.shape[0] for d in downs), sum(p.in_features for p in pieces))
    row = column = 0
    for piece in pieces:
        part = piece.proj_down
        if part is not None:
            down[row : row + part.shape[0], column : column + part.shape[1]] = part
            row += part.shape[0]
        column += piece.in_features
    return down, torch.cat(ups, 1)


def _join_outer(pieces: Sequence[SVDQuantTensors]) -> tuple[Tensor | None, int]:
    """(outer scales, number of column blocks) where each piece brings its own."""
    outer = [p.wcscales for p in pieces if p.wcscales is not None]
    if not outer:
        return None, 1
    if all(torch.equal(o, outer[0]) for o in outer):
        return outer[0], 1
    width = math.gcd(*(p.in_features for p in pieces))
    dtype = outer[0].dtype if all(o.dtype == outer[0].dtype for o in outer) else torch.float32
    columns = [o.to(dtype)[:, None].expand(-1, p.in_features // width) for o, p in zip(outer, pieces, strict=True)]
    return torch.cat(columns, 1).contiguous(), sum(p.in_features for p in pieces) // width


def split_rows(record: SVDQuantTensors, sizes: Sequence[int], keep_bias: Sequence[bool]) -> list[SVDQuantTensors]:
    """Members of a fused linear. keep_bias: a member without one drops a bias of zeros."""
    if len(sizes) == 1 and keep_bias[0]:
        return [record]
    out, start = [], 0
    for size, keep in zip(sizes, keep_bias, strict=True):
        rows = slice(start, start + size)
        start += size
        bias = None if record.bias is None else record.bias[rows].clone()
        if bias is not None and not keep and not bool(bias.any()):
            bias = None
        out.append(
            replace(
                record,
                qweight=record.qweight[rows].clone(),
                wscales=_clone(record.wscales[rows]),
                wcscales=None if record.wcscales is None else record.wcscales[rows].clone(),
                smooth_factor=None if record.smooth_factor is None else record.smooth_factor.clone(),
                proj_down=None if record.proj_down is None else record.proj_down.clone(),
                proj_up=None if record.proj_up is None else record.proj_up[rows].clone(),
                bias=bias,
            )
        )
    return out


def _clone(t: Tensor) -> Tensor:
    return t.contiguous().clone() if t.itemsize > 1 else t.contiguous().view(torch.uint8).clone().view(t.dtype)
