"""Which tensors a file of each family has, and which tensors of the stock class they mean; tiny configurations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import diffusers
import numpy as np
import torch
import transformers

V2_LEAVES = {
    "smooth": "smooth_factor",
    "smooth_orig": "smooth_factor_orig",
    "lora_down": "proj_down",
    "lora_up": "proj_up",
}
MODEL_CLASS = {
    "flux": "NunchakuFluxTransformer2dModel",
    "qwen": "NunchakuQwenImageTransformer2DModel",
    "sdxl": "NunchakuSDXLUNet2DConditionModel",
    "zimage": "NunchakuZImageTransformer2DModel",
    "sana": "NunchakuSanaTransformer2DModel",
    "t5": "NunchakuT5EncoderModel",
}
STOCK_CLASS = {
    "flux": diffusers.FluxTransformer2DModel,
    "flux_lite": diffusers.FluxTransformer2DModel,
    "qwen": diffusers.QwenImageTransformer2DModel,
    "sdxl": diffusers.UNet2DConditionModel,
    "zimage": diffusers.ZImageTransformer2DModel,
    "sana": diffusers.SanaTransformer2DModel,
    "t5": transformers.T5EncoderModel,
}
_FLUX = {
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 64,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "axes_dims_rope": [8, 28, 28],
    "guidance_embeds": True,
}
_SANA = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "num_layers": 2,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 64,
    "cross_attention_dim": 128,
    "caption_channels": 32,
    "mlp_ratio": 2.5,
    "sample_size": 8,
    "patch_size": 1,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "flux": _FLUX,
    "flux_lite": _FLUX,
    "qwen": {
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 64,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "axes_dims_rope": [8, 28, 28],
    },
    "sdxl": {
        "sample_size": 8,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "block_out_channels": [32, 128],
        "layers_per_block": 1,
        "transformer_layers_per_block": [1, 2],
        "attention_head_dim": [1, 2],
        "cross_attention_dim": 32,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 80,
        "norm_num_groups": 8,
    },
    "zimage": {
        "in_channels": 4,
        "dim": 384,
        "n_layers": 1,
        "n_refiner_layers": 1,
        "n_heads": 3,
        "n_kv_heads": 3,
        "cap_feat_dim": 32,
        "axes_dims": [32, 48, 48],
        "axes_lens": [128, 64, 64],
    },
    "sana": _SANA,
    # 160 channels: neither a multiple of 128 nor of the group; 400 hidden ones, 448 in a file.
    "sana_padded": _SANA
    | {
        "num_attention_heads": 5,
        "num_layers": 1,
        "cross_attention_head_dim": 80,
        "cross_attention_dim": 160,
    },
    "t5": {
        "vocab_size": 64,
        "d_model": 128,
        "d_kv": 32,
        "d_ff": 256,
        "num_layers": 2,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": False,
        "use_cache": False,
    },
}


@dataclass
class Part:
    """Where some of a layer's rows go: all of them, or `rows`, to the columns from `column` of the stock module."""

    module: str
    rows: np.ndarray | None = None
    column: int = 0


@dataclass
class Layer:
    """One quantized layer of a file."""

    name: str
    kind: str  # "w4a4", "awq" or "t5"
    n: int
    k: int
    parts: list[Part]
    bias: bool = True
    unsigned: bool = False
    chunks: int = 0
    v2: bool = False
    # The input is not zero beyond k, so these columns of the file must be.
    closed: bool = False


@dataclass
class Plan:
    """All tensors of a file: quantized layers, renamed or reordered plain ones; the rest has stock names."""

    layers: list[Layer] = field(default_factory=list)
    # File name → (shape, stock name → how to read it off the file's tensor).
    plain: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = field(default_factory=dict)

    def modules(self) -> set[str]:
        """The stock modules that must be quantized layers after loading."""
        return {part.module for layer in self.layers for part in layer.parts}


def stock(family: str, config: Mapping[str, Any]) -> torch.nn.Module:
    """The stock 16-bit class with weights that mean nothing."""
    cls = STOCK_CLASS[family]
    if family == "t5":
        return cls(transformers.T5Config(**config)).eval()
    return cls.from_config(dict(config)).eval()


def shapes(family: str, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = stock(family, config)
    return {name: tuple(t.shape) for name, t in model.state_dict().items() if name != "encoder.embed_tokens.weight"}


def _thirds(modules: Sequence[str], n: int) -> list[Part]:
    return [Part(module, np.arange(i * n, (i + 1) * n)) for i, module in enumerate(modules)]


def _flux(names: Mapping[str, tuple[int, ...]], precision: str) -> Plan:
    plan, d = Plan(), names["x_embedder.weight"][0]
    h = 4 * d
    after_gelu = precision == "int4"
    i = 0
    while f"transformer_blocks.{i}.attn.to_q.weight" in names:
        b = f"transformer_blocks.{i}."
        for norm in ("norm1", "norm1_context"):
            plan.layers.append(Layer(f"{b}{norm}.linear", "awq", 6 * d, d, [Part(f"{b}{norm}.linear")], chunks=6))
        qkv = [f"{b}attn.to_{x}" for x in "qkv"], [f"{b}attn.add_{x}_proj" for x in "qkv"]
        plan.layers += [
            Layer(f"{b}qkv_proj", "w4a4", 3 * d, d, _thirds(qkv[0], d)),
            Layer(f"{b}qkv_proj_context", "w4a4", 3 * d, d, _thirds(qkv[1], d)),
            Layer(f"{b}out_proj", "w4a4", d, d, [Part(f"{b}attn.to_out.0")]),
            Layer(f"{b}out_proj_context", "w4a4", d, d, [Part(f"{b}attn.to_add_out")]),
        ]
        for file, ff in (("mlp", "ff"), ("mlp_context", "ff_context")):
            plan.layers += [
                Layer(f"{b}{file}_fc1", "w4a4", h, d, [Part(f"{b}{ff}.net.0.proj")]),
                Layer(f"{b}{file}_fc2", "w4a4", d, h, [Part(f"{b}{ff}.net.2")], unsigned=after_gelu),
            ]
        _rename_norms(plan, names, b, ("norm_q", "norm_k", "norm_added_q", "norm_added_k"))
        i += 1
    i = 0
    while f"single_transformer_blocks.{i}.proj_mlp.weight" in names:
        b = f"single_transformer_blocks.{i}."
        plan.layers += [
            Layer(f"{b}norm.linear", "awq", 3 * d, d, [Part(f"{b}norm.linear")], chunks=3),
            Layer(f"{b}qkv_proj", "w4a4", 3 * d, d, _thirds([f"{b}attn.to_{x}" for x in "qkv"], d)),
            Layer(f"{b}out_proj", "w4a4", d, d, [Part(f"{b}proj_out")]),
            Layer(f"{b}mlp_fc1", "w4a4", h, d, [Part(f"{b}proj_mlp")]),
            Layer(f"{b}mlp_fc2", "w4a4", d, h, [Part(f"{b}proj_out", column=d)], unsigned=after_gelu),
        ]
        _rename_norms(plan, names, b, ("norm_q", "norm_k"))
        i += 1
    return plan


def _rename_norms(plan: Plan, names: Mapping[str, tuple[int, ...]], block: str, norms: Sequence[str]) -> None:
    for norm in norms:
        stock_name = f"{block}attn.{norm}.weight"
        plan.plain[f"{block}{norm}.weight"] = (names[stock_name], {stock_name: lambda a: a})


def _flux_lite(names: Mapping[str, tuple[int, ...]], precision: str) -> Plan:
    plan = Plan()
    for name, shape in names.items():
        module = name.removesuffix(".weight")
        if len(shape) == 2 and name.endswith(".weight") and "transformer_blocks." in name:
            kind = "awq" if ".norm" in name else "w4a4"
            plan.layers.append(Layer(module, kind, *shape, [Part(module)], v2=True))
    return plan


def _qwen(names: Mapping[str, tuple[int, ...]], precision: str) -> Plan:
    plan, d = Plan(), names["img_in.weight"][0]
    i = 0
    while f"transformer_blocks.{i}.img_mod.1.weight" in names:
        b = f"transformer_blocks.{i}."
        qkv = [f"{b}attn.to_{x}" for x in "qkv"], [f"{b}attn.add_{x}_proj" for x in "qkv"]
        plan.layers += [
            Layer(f"{b}attn.to_qkv", "w4a4", 3 * d, d, _thirds(qkv[0], d), v2=True),
            Layer(f"{b}attn.add_qkv_proj", "w4a4", 3 * d, d, _thirds(qkv[1], d), v2=True),
        ]
        for name in ("attn.to_out.0", "attn.to_add_out"):
            plan.layers.append(Layer(b + name, "w4a4", d, d, [Part(b + name)], v2=True))
        for stream in ("img", "txt"):
            mod, up, down = (b + stream + s for s in ("_mod.1", "_mlp.net.0.proj", "_mlp.net.2"))
            plan.layers += [
                Layer(mod, "awq", 6 * d, d, [Part(mod)], chunks=6),
                Layer(up, "w4a4", 4 * d, d, [Part(up)], v2=True),
                Layer(down, "w4a4", d, 4 * d, [Part(down)], v2=True, unsigned=precision == "int4"),
            ]
        i += 1
    return plan


def _sdxl(names: Mapping[str, tuple[int, ...]], precision: str) -> Plan:
    plan = Plan()
    for name in names:
        if not name.endswith("attn1.to_q.weight"):
            continue
        b, d = name.removesuffix("attn1.to_q.weight"), names[name][0]
        qkv = _thirds([f"{b}attn1.to_{x}" for x in "qkv"], d)
        plan.layers.append(Layer(f"{b}attn1.to_qkv", "w4a4", 3 * d, d, qkv, bias=False))
        for module in ("attn1.to_out.0", "attn2.to_q", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2"):
            n, k = names[f"{b}{module}.weight"]
            plan.layers.append(Layer(b + module, "w4a4", n, k, [Part(b + module)], bias=module != "attn2.to_q"))
    return plan


def _zimage(names: Mapping[str, tuple[int, ...]], precision: str, skip_refiners: bool) -> Plan:
    plan = Plan()
    for name in names:
        if not name.endswith("feed_forward.w1.weight"):
            continue
        b = name.removesuffix("feed_forward.w1.weight")
        h, d = names[name]
        # The gated half comes second: y = net.2(value · SiLU(gate)).
        value, gate, out = (f"{b}feed_forward.{w}" for w in ("w3", "w1", "w2"))
        ff = f"{b}feed_forward.net."
        if "refiner" in b and skip_refiners:
            halves = {f"{value}.weight": lambda a, h=h: a[:h], f"{gate}.weight": lambda a, h=h: a[h:]}
            plan.plain[f"{ff}0.proj.weight"] = ((2 * h, d), halves)
            plan.plain[f"{ff}2.weight"] = ((d, h), {f"{out}.weight": lambda a: a})
            continue
        qkv, to_out = [f"{b}attention.to_{x}" for x in "qkv"], f"{b}attention.to_out.0"
        plan.layers += [
            Layer(f"{b}attention.to_qkv", "w4a4", 3 * d, d, _thirds(qkv, d), bias=False, v2=True),
            Layer(to_out, "w4a4", d, d, [Part(to_out)], bias=False, v2=True),
            Layer(f"{ff}0.proj", "w4a4", 2 * h, d, _thirds([value, gate], h), bias=False, v2=True),
            Layer(f"{ff}2", "w4a4", d, h, [Part(out)], bias=False, v2=True),
        ]
    return plan


def _sana(names: Mapping[str, tuple[int, ...]], precision: str, pag: bool, out_bias: bool) -> Plan:
    plan, d = Plan(), names["patch_embed.proj.weight"][0]
    padded = math.ceil(d / 128) * 128
    h = names["transformer_blocks.0.ff.conv_point.weight"][1]
    hidden = math.ceil(round(2.5 * d) / 64) * 64
    heads, lane = np.divmod(np.arange(d), 32)
    i = 0
    while f"transformer_blocks.{i}.attn1.to_q.weight" in names:
        b = f"transformer_blocks.{i}."
        key = padded + 64 * heads + lane
        qkv = [(f"{b}attn1.to_q", np.arange(d)), (f"{b}attn1.to_k", key), (f"{b}attn1.to_v", key + 32)]
        to_q, to_out = f"{b}attn2.to_q", f"{b}attn2.to_out.0"
        inverted = np.concatenate([2 * np.arange(h), 2 * np.arange(h) + 1])
        plan.layers += [
            Layer(f"{b}attn.qkv_proj", "w4a4", 3 * padded, d, [Part(*member) for member in qkv], bias=False),
            Layer(f"{b}attn.out_proj", "w4a4", d, d, [Part(f"{b}attn1.to_out.0")], bias=out_bias, closed=True),
            Layer(f"{b}cross_attn.q_linear", "w4a4", d, d, [Part(to_q)]),
            Layer(f"{b}cross_attn.out_proj", "w4a4", d, d, [Part(to_out)]),
            Layer(f"{b}ff.inverted_conv", "w4a4", 2 * hidden, d, [Part(f"{b}ff.conv_inverted", inverted)]),
            Layer(f"{b}ff.point_conv", "w4a4", d, h, [Part(f"{b}ff.conv_point")], bias=False, closed=True),
        ]
        if pag:
            plan.layers.append(Layer(f"{b}attn.pag_to_v", "w4a4", padded, d, [], bias=False))
        for leaf in ("weight", "bias"):
            tail = (d,) if leaf == "weight" else ()
            plan.plain[f"{b}cross_attn.kv_linear.{leaf}"] = (
                (2 * d, *tail),
                {f"{b}attn2.to_k.{leaf}": lambda a: a[:d], f"{b}attn2.to_v.{leaf}": lambda a: a[d:]},
            )
        depth = f"{b}ff.conv_depth."
        plan.plain[f"{b}ff.depth_conv.weight"] = (
            (2 * hidden, 3, 3, 1),
            {f"{depth}weight": lambda a, rows=inverted: a[rows, None, :, :, 0]},
        )
        plan.plain[f"{b}ff.depth_conv.bias"] = ((2 * hidden,), {f"{depth}bias": lambda a, rows=inverted: a[rows]})
        i += 1
    return plan


def _t5(names: Mapping[str, tuple[int, ...]], linears: Sequence[str]) -> Plan:
    chosen = [name.removesuffix(".weight") for name in names if name.split(".")[-2] in linears]
    return Plan([Layer(n, "t5", *names[f"{n}.weight"], [Part(n)], bias=False) for n in chosen])


def plan(
    family: str,
    config: Mapping[str, Any],
    precision: str = "int4",
    *,
    skip_refiners: bool = False,
    pag: bool = False,
    out_bias: bool = True,
    linears: Sequence[str] = ("q", "k", "v", "o", "wi_0", "wi_1", "wo"),
) -> Plan:
    """What a file of that family holds.

    skip_refiners: for Z-Image, whose refiners are then in 16 bits. pag, out_bias: for SANA, whether `attn.pag_to_v` and
    the bias of `attn.out_proj` are there. linears: for T5, the names that are quantized.
    """
    names = shapes(family, config)
    if family == "zimage":
        return _zimage(names, precision, skip_refiners)
    if family == "sana":
        return _sana(names, precision, pag, out_bias)
    if family == "t5":
        return _t5(names, linears)
    makers = {"flux": _flux, "flux_lite": _flux_lite, "qwen": _qwen, "sdxl": _sdxl}
    return makers[family](names, precision)
