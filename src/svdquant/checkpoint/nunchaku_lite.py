"""diffusers' `nunchaku_lite` folders: Nunchaku's packed tensors under the stock, unfused module names."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import SVDQuantConfig
from ..errors import SVDQuantError
from ..nn import make_layer, quantized_layers, replace_module
from ..numerics import SVDQuantTensors
from .layout import Checkpoint
from .mapped import MappedTensors, streamed_file
from .nunchaku import cast_record
from .nunchaku_check import check_depth, check_linear, check_plain
from .nunchaku_layouts import Piece, StoredLinear
from .nunchaku_linear import AWQ_GROUP, LEAVES, read_linear
from .nunchaku_pack import unfit, unfit_w4a16, with_shift, write_linear, write_w4a16
from .packing import RANK_TILE, TILE
from .skeleton import cast_floating, set_tensor

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
_GROUPS = {"int4": 64, "nvfp4": 16}
# Relative, of a bias that is stored in 16 bits.
_ROUNDING = 2.0**-7


def load(checkpoint: Checkpoint, dtype: torch.dtype, device: Any = None) -> nn.Module:
    """The stock diffusers model of a `nunchaku_lite` folder; compared with the headers before a tensor is read.

    Raises `SVDQuantError` naming the file and the tensor.
    """
    from ..integrations import attach
    from .canonical import empty_model, model_class

    where = checkpoint.path
    w4a4, w4a16 = _targets(checkpoint)
    cls = model_class(checkpoint.library, checkpoint.model_class, where)
    check_depth(checkpoint.config, checkpoint.tensors, where)
    model = empty_model(cls, {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}, dtype)
    linears = [(t, "svdquant") for t in w4a4["targets"]] + [(t, "w4a16") for t in w4a16["targets"]]
    used: set[str] = set()
    for name, kind in linears:
        try:
            module: Any = model.get_submodule(name)
        except AttributeError:
            module = None
        if not isinstance(module, nn.Linear):
            raise SVDQuantError(f"{where}: names the target {name}, but {cls.__name__} has no linear of that name")
        if kind == "svdquant" and (module.in_features % TILE or module.out_features % TILE):
            raise SVDQuantError(f"{where}: target {name} is {module.out_features}×{module.in_features}, not of 128s")
        layer = StoredLinear((name,), (Piece(name),), kind=kind)
        used |= check_linear(layer, model, checkpoint, w4a4["precision"], w4a4["rank"], padded=False)
    packed = {name for name, _ in linears}
    state = model.state_dict()
    plain = [name for name in state if name.rpartition(".")[0] not in packed]
    for name in plain:
        check_plain(name, tuple(state[name].shape), checkpoint.tensors, where)
    if unexpected := sorted(checkpoint.tensors.keys() - used - set(plain)):
        raise SVDQuantError(f"{where}: tensor {unexpected[0]} belongs to no layer of {cls.__name__}")
    keep = tuple(getattr(model, "_keep_in_fp32_modules", None) or ())
    with MappedTensors(checkpoint.tensors) as file:
        for name, _ in linears:
            original: Any = model.get_submodule(name)
            tensors = {leaf: file.get(f"{name}.{leaf}") for leaf in LEAVES if f"{name}.{leaf}" in file.tensors}
            record = read_linear(tensors, original.out_features, original.in_features)
            replace_module(model, name, make_layer(original, cast_record(name, record, dtype, device, where)))
        for name in plain:
            set_tensor(model, name, cast_floating(name, file.get(name), dtype, keep, where).to(device))
    attach(model, SVDQuantConfig(weights=w4a4["precision"], rank=min(w4a4["rank"], 256), rotate=False))
    return model.eval()


def _targets(checkpoint: Checkpoint) -> tuple[dict[str, Any], dict[str, Any]]:
    """(svdq_w4a4, awq_w4a16) of the configuration, an absent one without targets."""
    config = checkpoint.quantization or {}
    w4a4 = config.get("svdq_w4a4") or {"precision": "int4", "group_size": 64, "rank": 0, "targets": []}
    w4a16 = config.get("awq_w4a16") or {"precision": "int4", "group_size": 64, "targets": []}
    for key, entry in (("svdq_w4a4", w4a4), ("awq_w4a16", w4a16)):
        targets = entry.get("targets") if isinstance(entry, dict) else None
        sound = isinstance(targets, list) and all(isinstance(name, str) for name in targets)
        if not sound or entry.get("precision") not in _GROUPS or entry.get("group_size") != _GROUPS[entry["precision"]]:
            raise SVDQuantError(f"{checkpoint.path}: its {key} configuration is damaged; download it again")
    rank = w4a4.get("rank")
    if not isinstance(rank, int) or rank % RANK_TILE or rank < 0:
        raise SVDQuantError(f"{checkpoint.path}: its svdq_w4a4 rank {rank!r} is no multiple of {RANK_TILE}")
    if w4a16["precision"] != "int4":
        raise SVDQuantError(f"{checkpoint.path}: its awq_w4a16 precision {w4a16['precision']!r} is not int4")
    return w4a4, w4a16


def misfit(name: str, record: SVDQuantTensors) -> str:
    """Why a layer cannot be written, or ""."""
    if record.spec.kind == "w4a16":
        return unfit_w4a16(record, AWQ_GROUP)
    reason = unfit(record)
    if not reason and (record.in_features % TILE or record.out_features % TILE):
        reason = f"is {record.out_features}×{record.in_features}, the format has multiples of {TILE}"
    return reason


def save(model: Any, folder: Path) -> list[str]:
    """Writes a folder that diffusers loads with its own `nunchaku_lite`; returns what it could not hold exactly.

    Raises `SVDQuantError` naming the first layer that the format cannot hold.
    """
    if not hasattr(model, "to_json_string"):
        raise SVDQuantError(f"nunchaku_lite holds models of diffusers, no {type(model).__name__}")
    layers: dict[str, Any] = quantized_layers(model)
    records = {name: layer.tensors() for name, layer in layers.items()}
    for name, record in records.items():
        convolution = "is a convolution, the format has linears" if isinstance(layers[name], nn.Conv2d) else ""
        if reason := convolution or misfit(name, record):
            raise SVDQuantError(f"{name} {reason}; `svdquant convert` requantizes it or keeps it in 16 bits")
    w4a4 = [name for name, record in records.items() if record.spec.kind == "svdquant"]
    w4a16 = [name for name, record in records.items() if record.spec.kind == "w4a16"]
    kinds = {records[name].spec.weights for name in w4a4}
    if len(kinds) > 1:
        raise SVDQuantError("the model has int4 and nvfp4 layers, the format holds one of them; convert it to one")
    # diffusers' layers always have a branch.
    rank = max((records[name].spec.rank for name in w4a4), default=0)
    rank = max(-(-rank // RANK_TILE), 1) * RANK_TILE
    precision = next(iter(kinds), "int4")
    half = next((p.dtype for p in model.parameters() if p.dtype in (torch.bfloat16, torch.float16)), torch.bfloat16)
    quantization: dict[str, Any] = {"quant_method": "nunchaku_lite", "compute_dtype": str(half).removeprefix("torch.")}
    if w4a4:
        quantization["svdq_w4a4"] = {
            "precision": precision,
            "group_size": _GROUPS[precision],
            "rank": rank,
            "targets": w4a4,
        }
    if w4a16:
        quantization["awq_w4a16"] = {"precision": "int4", "group_size": AWQ_GROUP, "targets": w4a16}
    plain = {n: t for n, t in model.state_dict().items() if n.rpartition(".")[0] not in records}
    names = [*plain, *(f"{name}.{leaf}" for name in records for leaf in LEAVES)]
    stock = _without_biases(model)
    shifted, rounded = {name for name, record in records.items() if record.spec.unsigned}, 0
    folder.mkdir(parents=True, exist_ok=True)
    with streamed_file(folder / WEIGHTS_FILE, names, {"format": "pt"}) as file:
        for name, record in records.items():
            plain_record = with_shift(record, False) if record.spec.kind == "svdquant" else record
            if name in stock:
                plain_record = _without_bias(name, plain_record, record)
            rounded += name in shifted and plain_record.bias is not None
            for leaf, value in _packed(plain_record, rank).items():
                file.add(f"{name}.{leaf}", value)
        for name, value in plain.items():
            file.add(name, value)
    config = json.loads(model.to_json_string()) | {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if not rounded:
        return []
    return [
        f"the format has no unsigned activations: {rounded} layers after a GELU become signed, the shift leaves their "
        "rounded biases"
    ]


def _without_biases(model: Any) -> set[str]:
    """Linears that have no bias in the stock class, which then has no place for one."""
    from .canonical import empty_model

    config = {key: value for key, value in model.config.items() if key != "quantization_config"}
    modules = empty_model(type(model), config, torch.bfloat16).named_modules()
    return {name for name, module in modules if isinstance(module, nn.Linear) and module.bias is None}


def _without_bias(name: str, record: SVDQuantTensors, before: SVDQuantTensors) -> SVDQuantTensors:
    """The record of a layer whose bias held a shift and nothing else; `before`: with the shift."""
    if record.bias is None:
        return record
    left = float(record.bias.abs().max())
    # What rounding leaves of a sum that is zero.
    noise = 0.0 if before.bias is None or before is record else float(before.bias.abs().max()) * _ROUNDING
    if left > noise:
        raise SVDQuantError(f"{name} has a bias, which the class in diffusers lacks there; save the model as svdquant")
    return replace(record, bias=None)


def _packed(record: SVDQuantTensors, rank: int) -> dict[str, Tensor]:
    if record.spec.kind == "w4a16":
        return write_w4a16(record)
    packed = write_linear(record, rank, legacy=False)
    packed.pop("smooth_factor_orig")
    if record.spec.weights == "nvfp4":
        # Both outer scales are there, one of them ones.
        half = packed["smooth_factor"]
        packed.setdefault("wtscale", half.new_ones(1))
        packed.setdefault("wcscales", half.new_ones(record.out_features))
    return packed
