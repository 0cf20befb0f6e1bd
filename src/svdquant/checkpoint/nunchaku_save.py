"""Writes models in Nunchaku's containers: one file with metadata, the folder of two files, the blocks alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SVDQuantError
from ..nn import quantized_layers
from ..numerics import SVDQuantTensors
from .layout import BLOCKS_FILE, REST_FILE
from .mapped import StreamedFile, streamed_file
from .nunchaku import plain_names
from .nunchaku_layouts import Layout, Piece, StoredLinear, StoredTensor, layout_of
from .nunchaku_linear import LEAVES
from .nunchaku_pack import (
    rounded_bias,
    rounded_outer,
    stack_rows,
    take_columns,
    unfit,
    unfit_w4a16,
    with_shift,
    write_linear,
    write_w4a16,
)
from .packing import RANK_TILE

_FORMATS: dict[str, dict[str, Any]] = {
    "int4": {"dtype": "int4", "scale": None, "weight_scale": None, "group_size": 64},
    "nvfp4": {
        "dtype": "fp4_e2m1_all",
        "scale": "fp8_e4m3_nan",
        "weight_scale": [None, "fp8_e4m3_nan"],
        "group_size": 16,
    },
}
Records = dict[str, SVDQuantTensors]
TEXT_ENCODERS = ("T5EncoderModel",)


def save(model: Any, path: Path, blocks_only: bool = False) -> list[str]:
    """Writes the model; returns what the format could not hold exactly, one sentence each.

    path: a .safetensors file, or a folder for the families that have one. blocks_only: transformer blocks alone, as in
    the oldest files. Raises `SVDQuantError` naming the first layer that would have to be requantized.
    """
    records: Records = {name: layer.tensors() for name, layer in quantized_layers(model).items()}  # type: ignore[operator]
    if hasattr(model, "get_input_embeddings") and not hasattr(model, "to_json_string"):
        return _save_text_encoder(model, records, path)
    layout = layout_of(model, lambda name: name in records)
    if layout is None:
        raise SVDQuantError(f"{type(model).__name__} has no Nunchaku layout; save it as svdquant or nunchaku_lite")
    to_file = path.suffix in (".safetensors", ".sft")
    if not layout.blocks and (blocks_only or not to_file):
        raise SVDQuantError(f"{path}: Nunchaku stores a {type(model).__name__} as one file; end it in .safetensors")
    check(layout, records, model)
    notes = Notes()
    rank = _common_rank(layout, records)
    plain = plain_names(model, layout)
    metadata = {"format": "pt"} | {
        key: json.dumps(value) for key, value in describe(model, layout, records, rank).items()
    }
    metadata["model_class"] = layout.model_class
    names = _names(layout, plain)
    if to_file:
        with streamed_file(path, names, {"format": "pt"} if blocks_only else metadata) as file:
            _write_blocks(file, layout, records, model, rank, notes)
            _write_plain(file, [n for n in plain if n.startswith(layout.blocks)] if blocks_only else plain, model)
        return notes.sentences()
    path.mkdir(parents=True, exist_ok=True)
    in_blocks = [name for name in plain if name.startswith(layout.blocks)]
    with streamed_file(path / BLOCKS_FILE, names, {"format": "pt"}) as file:
        _write_blocks(file, layout, records, model, rank, notes)
        _write_plain(file, in_blocks, model)
    with streamed_file(path / REST_FILE, names, {"format": "pt"}) as file:
        _write_plain(file, [name for name in plain if name not in in_blocks], model)
    for file_name, key in (("config.json", "config"), ("comfy_config.json", "comfy_config")):
        if key in metadata:
            text = json.dumps(json.loads(metadata[key]), indent=2, sort_keys=True) + "\n"
            (path / file_name).write_text(text, encoding="utf-8")
    return notes.sentences()


class Notes:
    """Counts what was rounded, and how far."""

    def __init__(self) -> None:
        self.units: list[float] = []
        self.shifts = 0
        self.outer: list[float] = []

    def sentences(self) -> list[str]:
        out = []
        if self.units:
            out.append(
                f"the 1 that the format adds to a modulation's scale rounds the bias of {len(self.units)} layers by at "
                f"most {max(self.units):.2g}"
            )
        if self.shifts:
            out.append(f"the shift after a GELU was moved into or out of the rounded bias of {self.shifts} layers")
        if self.outer:
            out.append(
                f"the outer scales of {len(self.outer)} layers, products of two, are rounded by at most "
                f"{max(self.outer):.2g} of their value"
            )
        return out


def check(layout: Layout, records: Records, model: nn.Module) -> None:
    """Raises `SVDQuantError` naming the first layer that the format cannot hold as it is."""
    remedy = "`svdquant convert` requantizes what it can"
    known = {member for linear in layout.linears for member in linear.members}
    if foreign := sorted(records.keys() - known):
        raise SVDQuantError(f"{foreign[0]} is quantized, Nunchaku keeps it in 16 bits; {remedy}")
    for linear in layout.linears:
        if missing := [name for name in linear.members if name not in records]:
            raise SVDQuantError(f"{missing[0]} is in 16 bits, Nunchaku needs it quantized; {remedy}")
        for name in linear.members:
            record = records[name]
            if reason := (
                unfit_w4a16(record, 64) if linear.kind == "w4a16" else unfit(record, cut=len(linear.pieces) > 1)
            ):
                raise SVDQuantError(f"{name} {reason}; {remedy}")
    kinds = {r.spec.weights for r in records.values() if r.spec.kind == "svdquant"}
    if len(kinds) > 1:
        raise SVDQuantError(f"the model has int4 and nvfp4 layers, the format holds one of them; {remedy}")
    if "nvfp4" in kinds and not layout.nvfp4:
        raise SVDQuantError(f"Nunchaku has no nvfp4 {type(model).__name__}; convert it with --weights int4")


def _compose(linear: StoredLinear, records: Records) -> list[tuple[Piece, SVDQuantTensors]]:
    """What each packed linear of the file holds."""
    whole = stack_rows([records[name] for name in linear.members], linear.members)
    out = []
    for piece in linear.pieces:
        stop = whole.in_features if piece.stop is None else piece.stop
        try:
            out.append((piece, take_columns(whole, piece.start, stop, last=stop == whole.in_features)))
        except ValueError as error:
            raise SVDQuantError(f"{linear.members[0]}: {error}; `svdquant convert` requantizes it") from error
    return out


def _common_rank(layout: Layout, records: Records) -> int:
    ranks = [record.spec.rank for linear in layout.linears for _, record in _compose(linear, records)]
    # Nunchaku's layers always have a branch.
    return max(-(-max(ranks, default=0) // RANK_TILE), 1) * RANK_TILE


def _names(layout: Layout, plain: list[str]) -> list[str]:
    packed = [f"{piece.name}.{leaf}" for linear in layout.linears for piece in linear.pieces for leaf in LEAVES]
    return [*packed, *(tensor.name for tensor in layout.tensors), *plain]


def _write_blocks(
    file: StreamedFile, layout: Layout, records: Records, model: nn.Module, rank: int, notes: Notes
) -> None:
    for linear in layout.linears:
        for piece, record in _compose(linear, records):
            if linear.kind == "w4a16":
                if off := rounded_bias(record, linear.chunks):
                    notes.units.append(off)
                packed = write_w4a16(record, linear.chunks)
            else:
                unsigned = piece.unsigned and record.spec.weights == "int4"
                if not linear.bias and record.bias is not None and not bool(record.bias.any()):
                    record = replace(record, bias=None)
                shifted = with_shift(record, unsigned)
                notes.shifts += shifted is not record
                if off := rounded_outer(record, len(linear.members) > 1):
                    notes.outer.append(off)
                packed = write_linear(shifted, rank, layout.legacy, linear.rows, fused=len(linear.members) > 1)
            for leaf, value in packed.items():
                file.add(f"{piece.name}.{leaf}", value)
    state = model.state_dict()
    for tensor in layout.tensors:
        file.add(tensor.name, _stack(tensor, state))


def _stack(tensor: StoredTensor, state: dict[str, Tensor]) -> Tensor:
    value = torch.cat([state[target] for target in tensor.targets])
    if tensor.rows is not None:
        moved = value[tensor.rows.clamp(min=0).to(value.device)]
        moved[(tensor.rows < 0).to(value.device)] = 0
        value = moved
    return value.permute(0, 2, 3, 1).contiguous() if tensor.channels_last else value


def _write_plain(file: StreamedFile, names: list[str], model: nn.Module) -> None:
    state = model.state_dict()
    for name in names:
        file.add(name, state[name])


def describe(model: Any, layout: Layout, records: Records, rank: int) -> dict[str, Any]:
    """The metadata of a single file, by key."""
    config = json.loads(model.to_json_string())
    config.pop("quantization_config", None)
    weights = next((r.spec.weights for r in records.values() if r.spec.kind == "svdquant"), "int4")
    fmt = _FORMATS[weights]
    quantization = {
        "method": "svdquant",
        "weight": {"dtype": fmt["dtype"], "scale_dtype": fmt["weight_scale"], "group_size": fmt["group_size"]},
        "activation": {"dtype": fmt["dtype"], "scale_dtype": fmt["scale"], "group_size": fmt["group_size"]},
        "rank": rank,
    }
    out = {"config": config, "quantization_config": quantization | layout.metadata}
    if layout.model_class == "NunchakuFluxTransformer2dModel":
        out["comfy_config"] = _comfy_config(model)
    return out


def _comfy_config(model: Any) -> dict[str, Any]:
    """What ComfyUI builds its FLUX from."""
    config, attention = model.config, model.transformer_blocks[0].attn
    width = config.num_attention_heads * config.attention_head_dim
    return {
        "model_class": "Flux" if config.guidance_embeds else "FluxSchnell",
        "model_config": {
            "axes_dim": list(config.axes_dims_rope),
            "context_in_dim": config.joint_attention_dim,
            "depth": config.num_layers,
            "depth_single_blocks": config.num_single_layers,
            "disable_unet_model_creation": True,
            "guidance_embed": config.guidance_embeds,
            "hidden_size": width,
            "image_model": "flux",
            # ComfyUI counts channels of the latent, diffusers of a patch of 2×2.
            "in_channels": config.in_channels // 4,
            "mlp_ratio": model.transformer_blocks[0].ff.net[2].in_features / width,
            "num_heads": config.num_attention_heads,
            "out_channels": (config.out_channels or config.in_channels) // 4,
            "patch_size": 2,
            "qkv_bias": attention.to_q.bias is not None,
            "theta": 10000,
            "vec_in_dim": config.pooled_projection_dim,
        },
    }


def _save_text_encoder(model: Any, records: Records, path: Path) -> list[str]:
    if type(model).__name__ not in TEXT_ENCODERS:
        raise SVDQuantError(f"Nunchaku has no {type(model).__name__}; save it as svdquant")
    if path.suffix not in (".safetensors", ".sft"):
        raise SVDQuantError(f"{path}: Nunchaku stores a text encoder as one file; end it in .safetensors")
    for name, record in records.items():
        if reason := unfit_w4a16(record, 128):
            raise SVDQuantError(f"{name} {reason}; `svdquant convert` requantizes what it can")
    config = json.loads(model.config.to_json_string(use_diff=False))
    config.pop("quantization_config", None)
    metadata = {"format": "pt", "config": json.dumps(config), "model_class": "NunchakuT5EncoderModel"}
    state = {n: t for n, t in model.state_dict().items() if n.rpartition(".")[0] not in records}
    with streamed_file(path, [*state, *(f"{n}.{leaf}" for n in records for leaf in LEAVES)], metadata) as file:
        for name, record in records.items():
            for leaf, value in write_w4a16(record, t5=True).items():
                file.add(f"{name}.{leaf}", value)
        _write_plain(file, list(state), model)
    return []
