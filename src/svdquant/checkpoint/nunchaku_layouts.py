"""Which tensors of a Nunchaku checkpoint are which modules of the diffusers model, family by family.

Module names of our models are diffusers' own; a Nunchaku file stacks linears that read one input, cuts FLUX' `proj_out`
in two, and orders some outputs as its kernels want them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Piece:
    """One linear of the file: its name, and the input columns of the members that it multiplies (stop None = all)."""

    name: str
    start: int = 0
    stop: int | None = None
    unsigned: bool = False


@dataclass(frozen=True)
class StoredLinear:
    """Linears of the model, stacked along their outputs in this order, as the file stores them.

    chunks: of an interleaved modulation (kind "w4a16"). rows: int64, for each stored row the row of the stack or −1 for
    padding. bias: whether the file has one wherever the model has.
    """

    members: tuple[str, ...]
    pieces: tuple[Piece, ...]
    kind: str = "svdquant"
    chunks: int = 0
    rows: Tensor | None = field(default=None, compare=False)
    bias: bool = True


@dataclass(frozen=True)
class StoredTensor:
    """A 16-bit tensor under another name: `targets` of the model, stacked; rows as in `StoredLinear`.

    channels_last: a depthwise kernel stored [C, 3, 3, 1] instead of [C, 1, 3, 3].
    """

    name: str
    targets: tuple[str, ...]
    rows: Tensor | None = field(default=None, compare=False)
    channels_last: bool = False


@dataclass(frozen=True)
class Layout:
    """How one model is stored. legacy: leaves are `lora_down`, `smooth`, … ; blocks: prefixes of the quantized part.

    ignored: patterns of tensors that only Nunchaku's own runtime has a use for. metadata: further quantization_config.
    """

    model_class: str
    linears: tuple[StoredLinear, ...]
    tensors: tuple[StoredTensor, ...] = ()
    legacy: bool = True
    nvfp4: bool = True
    blocks: tuple[str, ...] = ("transformer_blocks.",)
    ignored: tuple[str, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)


def layout_of(model: nn.Module, quantized: Callable[[str], bool]) -> Layout | None:
    """The layout of a diffusers model, on any device; None for a family that Nunchaku does not have.

    quantized(name): whether a linear of the file, or a module of the model, of that name is quantized; asked where
    files differ.
    """
    for cls in type(model).__mro__:
        if cls.__name__ in _FAMILIES:
            return _FAMILIES[cls.__name__](model, quantized)
    return None


def _one(prefix: str, name: str, member: str | tuple[str, ...], unsigned: bool = False, **fields: Any) -> StoredLinear:
    members = (member,) if isinstance(member, str) else member
    return StoredLinear(tuple(prefix + m for m in members), (Piece(prefix + name, unsigned=unsigned),), **fields)


def _modulation(prefix: str, name: str, chunks: int) -> StoredLinear:
    return _one(prefix, name, name, kind="w4a16", chunks=chunks)


_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_ADDED_QKV = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")


def _flux(model: Any, _quantized: Callable[[str], bool]) -> Layout:
    linears: list[StoredLinear] = []
    tensors: list[StoredTensor] = []
    for i in range(len(model.transformer_blocks)):
        p = f"transformer_blocks.{i}."
        linears += [
            _modulation(p, "norm1.linear", 6),
            _modulation(p, "norm1_context.linear", 6),
            _one(p, "qkv_proj", _QKV),
            _one(p, "qkv_proj_context", _ADDED_QKV),
            _one(p, "out_proj", "attn.to_out.0"),
            _one(p, "out_proj_context", "attn.to_add_out"),
            _one(p, "mlp_fc1", "ff.net.0.proj"),
            _one(p, "mlp_fc2", "ff.net.2", unsigned=True),
            _one(p, "mlp_context_fc1", "ff_context.net.0.proj"),
            _one(p, "mlp_context_fc2", "ff_context.net.2", unsigned=True),
        ]
        for norm in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            tensors.append(StoredTensor(f"{p}{norm}.weight", (f"{p}attn.{norm}.weight",)))
    for i, block in enumerate(model.single_transformer_blocks):
        p, width = f"single_transformer_blocks.{i}.", block.attn.to_q.in_features
        halves = (Piece(f"{p}out_proj", 0, width), Piece(f"{p}mlp_fc2", width, unsigned=True))
        linears += [
            _modulation(p, "norm.linear", 3),
            _one(p, "qkv_proj", _QKV),
            _one(p, "mlp_fc1", "proj_mlp"),
            StoredLinear((f"{p}proj_out",), halves),
        ]
        for norm in ("norm_q", "norm_k"):
            tensors.append(StoredTensor(f"{p}{norm}.weight", (f"{p}attn.{norm}.weight",)))
    return Layout(
        "NunchakuFluxTransformer2dModel",
        tuple(linears),
        tuple(tensors),
        blocks=("transformer_blocks.", "single_transformer_blocks."),
    )


def _qwen(model: Any, _quantized: Callable[[str], bool]) -> Layout:
    linears: list[StoredLinear] = []
    for i in range(len(model.transformer_blocks)):
        p = f"transformer_blocks.{i}."
        linears += [
            _modulation(p, "img_mod.1", 6),
            _modulation(p, "txt_mod.1", 6),
            _one(p, "attn.to_qkv", _QKV),
            _one(p, "attn.add_qkv_proj", _ADDED_QKV),
            *(_one(p, name, name) for name in ("attn.to_out.0", "attn.to_add_out")),
            *(_one(p, name, name) for name in ("img_mlp.net.0.proj", "txt_mlp.net.0.proj")),
            *(_one(p, name, name, unsigned=True) for name in ("img_mlp.net.2", "txt_mlp.net.2")),
        ]
    return Layout("NunchakuQwenImageTransformer2DModel", tuple(linears), legacy=False)


def _sdxl(model: Any, _quantized: Callable[[str], bool]) -> Layout:
    linears: list[StoredLinear] = []
    for name, module in model.named_modules():
        if type(module).__name__ != "BasicTransformerBlock":
            continue
        p = f"{name}."
        linears.append(_one(p, "attn1.to_qkv", ("attn1.to_q", "attn1.to_k", "attn1.to_v")))
        others = ["attn1.to_out.0", "attn2.to_q", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2"]
        present = dict(module.named_modules())
        linears += [_one(p, other, other) for other in others if other in present]
    return Layout("NunchakuSDXLUNet2DConditionModel", tuple(linears), nvfp4=False, blocks=())


def _z_image(model: Any, quantized: Callable[[str], bool]) -> Layout:
    linears: list[StoredLinear] = []
    tensors: list[StoredTensor] = []
    refined = False
    for stack in ("noise_refiner", "context_refiner", "layers"):
        for i in range(len(getattr(model, stack))):
            p = f"{stack}.{i}."
            qkv = tuple(f"attention.{name}" for name in ("to_q", "to_k", "to_v"))
            # Gate and value are stored as one linear, the value first.
            gated = ("feed_forward.w3", "feed_forward.w1")
            if stack == "layers" or quantized(f"{p}attention.to_qkv") or quantized(f"{p}attention.to_q"):
                refined |= stack != "layers"
                linears += [
                    _one(p, "attention.to_qkv", qkv),
                    _one(p, "attention.to_out.0", "attention.to_out.0"),
                    _one(p, "feed_forward.net.0.proj", gated),
                    _one(p, "feed_forward.net.2", "feed_forward.w2"),
                ]
            else:
                tensors += [
                    StoredTensor(f"{p}feed_forward.net.0.proj.weight", tuple(f"{p}{name}.weight" for name in gated)),
                    StoredTensor(f"{p}feed_forward.net.2.weight", (f"{p}feed_forward.w2.weight",)),
                ]
    return Layout(
        "NunchakuZImageTransformer2DModel",
        tuple(linears),
        tuple(tensors),
        legacy=False,
        blocks=(),
        metadata={"skip_refiners": not refined},
    )


def _sana(model: Any, _quantized: Callable[[str], bool]) -> Layout:
    linears: list[StoredLinear] = []
    tensors: list[StoredTensor] = []
    for i, block in enumerate(model.transformer_blocks):
        p, width = f"transformer_blocks.{i}.", block.attn1.to_q.out_features
        hidden = block.ff.conv_point.in_channels
        gates = _value_gate_rows(hidden, math.ceil(hidden / 64) * 64)
        linears += [
            _one(
                p,
                "attn.qkv_proj",
                ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
                rows=_head_rows(width, width // block.attn1.heads),
            ),
            _one(p, "attn.out_proj", "attn1.to_out.0", bias=False),
            _one(p, "cross_attn.q_linear", "attn2.to_q"),
            _one(p, "cross_attn.out_proj", "attn2.to_out.0"),
            _one(p, "ff.inverted_conv", "ff.conv_inverted", rows=gates),
            _one(p, "ff.point_conv", "ff.conv_point"),
        ]
        for leaf in ("weight", "bias"):
            both = (f"{p}attn2.to_k.{leaf}", f"{p}attn2.to_v.{leaf}")
            tensors.append(StoredTensor(f"{p}cross_attn.kv_linear.{leaf}", both))
            depthwise = (f"{p}ff.conv_depth.{leaf}",)
            tensors.append(StoredTensor(f"{p}ff.depth_conv.{leaf}", depthwise, gates, channels_last=leaf == "weight"))
    return Layout(
        "NunchakuSanaTransformer2DModel",
        tuple(linears),
        tuple(tensors),
        # A second copy of the values' weight, for perturbed attention; diffusers uses the first.
        ignored=(r"\.attn\.pag_to_v\.",),
    )


def _head_rows(width: int, head: int) -> Tensor:
    """Stored rows of SANA's q, k, v: the queries, then head by head its keys and its values; each padded to 128."""
    padded = math.ceil(width / 128) * 128
    channel = torch.arange(padded)
    real = channel < width
    q, k, v = (torch.where(real, channel + part * width, -1) for part in range(3))
    pairs = torch.stack([k.view(-1, head), v.view(-1, head)], 1) if padded % head == 0 else None
    if pairs is None:
        raise ValueError(f"heads of {head} do not fill {padded} rows")
    return torch.cat([q, pairs.flatten()])


def _value_gate_rows(hidden: int, padded: int) -> Tensor:
    """Stored rows of SANA's gated channels: value and gate of one channel side by side."""
    channel = torch.arange(padded)
    value = torch.where(channel < hidden, channel, -1)
    gate = torch.where(channel < hidden, channel + hidden, -1)
    return torch.stack([value, gate], 1).flatten()


_FAMILIES: dict[str, Callable[[Any, Callable[[str], bool]], Layout]] = {
    "FluxTransformer2DModel": _flux,
    "QwenImageTransformer2DModel": _qwen,
    "UNet2DConditionModel": _sdxl,
    "ZImageTransformer2DModel": _z_image,
    "SanaTransformer2DModel": _sana,
}
STOCK_CLASSES = {
    "NunchakuFluxTransformer2dModel": "FluxTransformer2DModel",
    "NunchakuFluxTransformer2DModelV2": "FluxTransformer2DModel",
    "NunchakuQwenImageTransformer2DModel": "QwenImageTransformer2DModel",
    "NunchakuSDXLUNet2DConditionModel": "UNet2DConditionModel",
    "NunchakuZImageTransformer2DModel": "ZImageTransformer2DModel",
    "NunchakuSanaTransformer2DModel": "SanaTransformer2DModel",
}
