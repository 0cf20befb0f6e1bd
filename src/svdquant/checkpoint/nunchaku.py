"""Nunchaku's checkpoints into the stock diffusers and transformers classes."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import LayerSpec, SVDQuantConfig
from ..errors import SVDQuantError
from ..nn import make_layer, replace_module
from ..numerics import SVDQuantTensors
from .header import TensorInfo
from .hub import looks_like_hub_id, unreachable
from .layout import Checkpoint, open_checkpoint, open_model_config
from .mapped import MappedTensors
from .nunchaku_check import check_depth, check_linear, check_plain, common_rank, precision_of
from .nunchaku_layouts import STOCK_CLASSES, Layout, Piece, StoredLinear, StoredTensor, layout_of
from .nunchaku_linear import LEAVES, join_columns, read_linear, split_rows
from .skeleton import cast_floating, set_tensor

__all__ = ["load", "read_linear"]


def load(checkpoint: Checkpoint, dtype: torch.dtype, device: Any = None, base: Checkpoint | None = None) -> nn.Module:
    """The model of a Nunchaku file or folder, as its stock class.

    base: the 16-bit model that provides what the file lacks (the oldest files hold the blocks alone). Everything is
    compared with the headers before a tensor is read; `SVDQuantError` names the file and the tensor.
    """
    if checkpoint.library == "transformers":
        return _load_text_encoder(checkpoint, dtype, device)
    found = checkpoint.tensors
    skeleton = _skeleton(checkpoint, dtype, base)
    layout = layout_of(skeleton, lambda name: f"{name}.qweight" in found)
    if layout is None:
        raise SVDQuantError(f"{checkpoint.path}: {type(skeleton).__name__} has no Nunchaku layout; update svdquant")
    plain = plain_names(skeleton, layout)
    rest = rest_of(checkpoint, base, plain)
    _check(skeleton, layout, checkpoint, plain, rest)
    keep = tuple(getattr(skeleton, "_keep_in_fp32_modules", None) or ())

    def cast(name: str, value: Tensor) -> Tensor:
        return cast_floating(name, value, dtype, keep, checkpoint.path).to(device)

    unsigned = precision_of(checkpoint) == "int4"
    with MappedTensors(found | rest) as file:
        for linear in layout.linears:
            for name, record in _read(file, linear, skeleton, unsigned):
                original = skeleton.get_submodule(name)
                record = cast_record(name, record, dtype, device, checkpoint.path)
                replace_module(skeleton, name, make_layer(original, record))
        for tensor in layout.tensors:
            for name, value in _unstack(file.get(tensor.name), tensor, skeleton):
                set_tensor(skeleton, name, cast(name, value))
        for name in plain:
            set_tensor(skeleton, name, cast(name, file.get(name)))
    return _finish(skeleton, checkpoint)


def plain_names(model: nn.Module, layout: Layout) -> list[str]:
    """Tensors that a file stores under their own names."""
    packed = {member for linear in layout.linears for member in linear.members}
    renamed = {target for tensor in layout.tensors for target in tensor.targets}
    return [n for n in model.state_dict() if n not in renamed and n.rpartition(".")[0] not in packed]


def open_base(base: str | Path, checkpoint: Checkpoint) -> Checkpoint | None:
    """The 16-bit denoiser that completes an old file, from a folder or the Hub; None for a file that is complete.

    A file that only lacks its configuration takes that alone. Raises `SVDQuantError` where the base is quantized itself
    or of another class.
    """
    lacks_weights = checkpoint.blocks_only
    if checkpoint.config and not lacks_weights:
        return None
    if looks_like_hub_id(base):
        base = _download_base(str(base), lacks_weights)
    opened = open_model_config(Path(base)) if not lacks_weights else open_checkpoint(base)
    wanted = stock_class(checkpoint)
    if wanted and opened.model_class != wanted:
        raise SVDQuantError(f"{base}: holds a {opened.model_class}, {checkpoint.path} needs a {wanted}")
    if opened.quantization is not None:
        raise SVDQuantError(f"{base}: is quantized; the rest of {checkpoint.path} has to come from a 16-bit model")
    return opened


def _download_base(repo: str, weights: bool) -> str:
    from huggingface_hub import snapshot_download

    kinds = ("json", "safetensors") if weights else ("json",)
    parts = [f"{part}/*.{kind}" for part in ("transformer", "unet") for kind in kinds]
    try:
        return snapshot_download(repo, allow_patterns=["model_index.json", *parts])
    except Exception as error:  # the hub client raises of many kinds
        raise unreachable(repo, error) from error


def _skeleton(checkpoint: Checkpoint, dtype: torch.dtype, base: Checkpoint | None) -> nn.Module:
    import diffusers

    from .canonical import empty_model

    config = checkpoint.config or (base.config if base else {})
    name = stock_class(checkpoint) or (base.model_class if base else "")
    if not config and name == "FluxTransformer2DModel":
        config = _flux_config(checkpoint)
    if name not in STOCK_CLASSES.values():
        what = f"names the model class {name!r}" if name else "does not say which model it holds"
        raise SVDQuantError(f"{checkpoint.path}: {what}; give the 16-bit pipeline that it was made from as base")
    check_depth(config, checkpoint.tensors, checkpoint.path)
    try:
        return empty_model(getattr(diffusers, name), config, dtype)
    except (TypeError, ValueError, AttributeError, KeyError, RuntimeError) as error:
        raise SVDQuantError(f"{checkpoint.path}: its configuration does not make a {name} ({error})") from error


def stock_class(checkpoint: Checkpoint) -> str:
    """The diffusers class that a file is of, by what it says or else by its names; empty where neither tells."""
    name = STOCK_CLASSES.get(checkpoint.model_class, checkpoint.model_class)
    if not name and "single_transformer_blocks.0.qkv_proj.qweight" in checkpoint.tensors:
        return "FluxTransformer2DModel"
    return name


def _flux_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The configuration of a FLUX.1 that says nothing about itself: the folders of December 2024."""
    found = checkpoint.tensors

    def count(prefix: str) -> int:
        return len({name.split(".")[1] for name in found if name.startswith(f"{prefix}.")})

    try:
        channels, width = found["x_embedder.weight"].shape[1], found["x_embedder.weight"].shape[0]
        head = found["transformer_blocks.0.norm_q.weight"].shape[0]
        outputs = found["proj_out.weight"].shape[0]
        joint, pooled = (
            found["context_embedder.weight"].shape[1],
            found["time_text_embed.text_embedder.linear_1.weight"].shape[1],
        )
    except KeyError as error:
        raise SVDQuantError(
            f"{checkpoint.path}: holds transformer blocks alone ({error.args[0]} is missing); give the 16-bit pipeline "
            "that it was made from as base"
        ) from error
    # One position axis and two of the picture, in FLUX' proportions.
    first = head // 8
    return {
        "in_channels": channels,
        "out_channels": None if outputs == channels else outputs,
        "num_layers": count("transformer_blocks"),
        "num_single_layers": count("single_transformer_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": joint,
        "pooled_projection_dim": pooled,
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in found,
        "axes_dims_rope": [first, (head - first) // 2, (head - first) // 2],
    }


def rest_of(checkpoint: Checkpoint, base: Checkpoint | None, plain: list[str]) -> dict[str, TensorInfo]:
    """What comes from the base: the plain tensors that the file lacks."""
    if base is None:
        return {}
    return {name: base.tensors[name] for name in plain if name in base.tensors and name not in checkpoint.tensors}


def _check(
    skeleton: nn.Module, layout: Layout, checkpoint: Checkpoint, plain: list[str], rest: dict[str, TensorInfo]
) -> None:
    found, used = checkpoint.tensors, set()
    rank = common_rank(checkpoint)
    weights = precision_of(checkpoint)
    for linear in layout.linears:
        used |= check_linear(linear, skeleton, checkpoint, weights, rank)
    state = skeleton.state_dict()
    for tensor in layout.tensors:
        rows = sum(state[t].shape[0] for t in tensor.targets) if tensor.rows is None else tensor.rows.numel()
        shape = (rows, *state[tensor.targets[0]].shape[1:])
        if tensor.channels_last:
            shape = (rows, *shape[2:], shape[1])
        check_plain(tensor.name, shape, found, checkpoint.path)
        used.add(tensor.name)
    if not rest and checkpoint.blocks_only:
        raise SVDQuantError(
            f"{checkpoint.path}: holds transformer blocks alone; give the 16-bit pipeline that it was made from as base"
        )
    for name in plain:
        check_plain(name, tuple(state[name].shape), found | rest, checkpoint.path)
        used.add(name)
    packed = {name.removesuffix(".qweight") for name in found if name.endswith(".qweight")}
    extra = [n for n in sorted(found.keys() - used) if not any(re.search(pattern, n) for pattern in layout.ignored)]
    if wrong := [name for name in extra if name.rpartition(".")[0] in packed]:
        raise SVDQuantError(
            f"{checkpoint.path}: tensor {wrong[0]} fits no layer of the {type(skeleton).__name__} that its "
            "configuration describes; download it again"
        )
    if extra:
        # Nunchaku ignores them too; everything that the model needs is there.
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        warnings.warn(
            f"{checkpoint.path}: tensor {extra[0]}{more} fits no layer of {type(skeleton).__name__} and is left out",
            stacklevel=2,
        )


def _read(
    file: MappedTensors, linear: StoredLinear, skeleton: nn.Module, unsigned: bool
) -> list[tuple[str, SVDQuantTensors]]:
    modules: list[Any] = [skeleton.get_submodule(name) for name in linear.members]
    sizes = [out_features(module) for module in modules]
    total, width = sum(sizes), in_features(modules[0])
    rows = None if linear.rows is None else inverse(linear.rows, total)
    pieces = []
    for piece in linear.pieces:
        tensors = {leaf: file.get(f"{piece.name}.{leaf}") for leaf in LEAVES if f"{piece.name}.{leaf}" in file.tensors}
        columns = (width if piece.stop is None else piece.stop) - piece.start
        pieces.append(read_linear(tensors, total, columns, unsigned and piece.unsigned, linear.chunks, rows))
    keep = [module.bias is not None for module in modules]
    records = split_rows(join_columns(pieces), sizes, keep)
    for record, wanted in zip(records, keep, strict=True):
        if wanted and record.bias is None:
            # Nunchaku adds none here; the stock module has one.
            record.bias = record.wscales.new_zeros(record.out_features, dtype=record.floating_dtype)
    return list(zip(linear.members, records, strict=True))


def in_features(module: Any) -> int:
    return int(module.in_channels if isinstance(module, nn.Conv2d) else module.in_features)


def out_features(module: Any) -> int:
    return int(module.out_channels if isinstance(module, nn.Conv2d) else module.out_features)


def inverse(rows: Tensor, count: int) -> Tensor:
    """For each of `count` rows where it is stored; the opposite of a stored order with −1 for padding."""
    stored = torch.empty(count, dtype=torch.long)
    real = rows >= 0
    stored[rows[real]] = torch.arange(rows.numel())[real]
    return stored


def _unstack(value: Tensor, tensor: StoredTensor, skeleton: nn.Module) -> list[tuple[str, Tensor]]:
    state = skeleton.state_dict()
    if tensor.channels_last:
        value = value.permute(0, 3, 1, 2)
    sizes = [state[target].shape[0] for target in tensor.targets]
    if tensor.rows is not None:
        value = value[inverse(tensor.rows, sum(sizes))]
    parts = value.split(sizes) if len(sizes) > 1 else [value]
    return [(target, part.clone().contiguous()) for target, part in zip(tensor.targets, parts, strict=True)]


def cast_record(
    layer: str, record: SVDQuantTensors, dtype: torch.dtype, device: Any, where: Path | str
) -> SVDQuantTensors:
    """The record with its branch and bias in the model's type; scales keep their own. On `device`, None = as it is."""
    if record.spec.kind == "svdquant":
        for leaf in ("proj_down", "proj_up", "bias"):
            value = getattr(record, leaf)
            if value is not None:
                setattr(record, leaf, cast_floating(f"{layer}.{leaf}", value, dtype, (), where))
    return record if device is None else record.to(device)


def _finish(model: nn.Module, checkpoint: Checkpoint) -> nn.Module:
    from ..integrations import attach

    weights = "nvfp4" if checkpoint.library == "diffusers" and precision_of(checkpoint) == "nvfp4" else "int4"
    attach(model, SVDQuantConfig(weights=weights, rank=min(common_rank(checkpoint), 256), rotate=False))
    return model.eval()


def _load_text_encoder(checkpoint: Checkpoint, dtype: torch.dtype, device: Any) -> nn.Module:
    """A W4A16 text encoder: which linears are packed is read off the file."""
    from accelerate import init_empty_weights

    from .canonical import model_class

    if not checkpoint.config:
        raise SVDQuantError(f"{checkpoint.path}: has no configuration of its text encoder; download it again")
    cls = model_class("transformers", checkpoint.model_class, checkpoint.path)
    depth = checkpoint.config.get("num_layers")
    if isinstance(depth, int) and depth > len(checkpoint.tensors):
        raise SVDQuantError(f"{checkpoint.path}: its configuration says num_layers={depth}; download it again")
    with init_empty_weights():
        try:
            model: Any = cls(cls.config_class.from_dict(checkpoint.config))
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise SVDQuantError(
                f"{checkpoint.path}: its configuration does not make a {cls.__name__} ({error})"
            ) from error
    model.to(dtype)
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and f"{n}.qweight" in checkpoint.tensors]
    tied = getattr(model, "all_tied_weights_keys", {})
    found, state = checkpoint.tensors, model.state_dict()
    absent = {name for name in {*tied, *tied.values()} if name not in found}
    # Of two names of one tensor, one is read.
    absent |= {name for name, source in tied.items() if source in found}
    plain = [n for n in state if n.rpartition(".")[0] not in linears and n not in absent]
    layers = [StoredLinear((name,), (Piece(name),), kind="w4a16") for name in linears]
    used = {f"{name}.weight" for name in linears}
    for layer in layers:
        used |= check_linear(layer, model, checkpoint, "int4", 0)
    for name in plain:
        check_plain(name, tuple(state[name].shape), found, checkpoint.path)
    if unexpected := sorted(found.keys() - used - set(plain) - absent):
        raise SVDQuantError(f"{checkpoint.path}: tensor {unexpected[0]} belongs to no layer of {cls.__name__}")
    # transformers keeps them beside float16 only.
    keep = tuple(getattr(model, "_keep_in_fp32_modules", None) or ()) if dtype == torch.float16 else ()
    with MappedTensors(found) as file:
        for layer in layers:
            for name, record in _read(file, layer, model, unsigned=False):
                original = model.get_submodule(name)
                record = cast_record(name, record, dtype, device, checkpoint.path)
                replace_module(model, name, make_layer(original, record))
        for name in plain:
            set_tensor(model, name, cast_floating(name, file.get(name), dtype, keep, checkpoint.path).to(device))
    model.tie_weights()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter._is_hf_initialized = True
    return _finish(model, checkpoint)


def layer_names(checkpoint: Checkpoint) -> dict[str, LayerSpec]:
    """The packed linears of a file under its own names, from the headers alone."""
    specs = {}
    for name, info in checkpoint.tensors.items():
        layer, _, leaf = name.rpartition(".")
        if leaf != "qweight":
            continue
        if info.dtype != "I8":
            group = 128 if info.dtype == "I16" else 64
            specs[layer] = LayerSpec("w4a16", group_size=group, rank=0, smooth=False, zeros=True)
            continue
        scales = checkpoint.tensors.get(f"{layer}.wscales")
        nvfp4 = scales is not None and scales.dtype == "F8_E4M3"
        down = checkpoint.tensors.get(f"{layer}.lora_down") or checkpoint.tensors.get(f"{layer}.proj_down")
        rank = down.shape[1] if down is not None and len(down.shape) == 2 else 0
        specs[layer] = LayerSpec(weights="nvfp4" if nvfp4 else "int4", group_size=16 if nvfp4 else 64, rank=rank)
    return specs
