"""Random files in Nunchaku's formats, and the stock 16-bit models that they mean.

No writer is involved: each packing is a bijection, so random bytes of the right shape are a valid layer.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from nunchaku64 import code_positions, dense_awq, dense_w4a4, low_rank_positions, numbers
from safetensors.torch import save_file
from torch import Tensor

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


class _Random:
    def __init__(self, seed: int, half: torch.dtype) -> None:
        self.generator, self.half = torch.Generator().manual_seed(seed), half

    def normal(self, shape: Sequence[int], std: float, mean: float = 0.0) -> Tensor:
        return (torch.randn(*shape, generator=self.generator) * std + mean).to(self.half)

    def uniform(self, shape: Sequence[int], low: float, high: float) -> Tensor:
        return torch.rand(*shape, generator=self.generator) * (high - low) + low

    def bytes(self, *shape: int) -> Tensor:
        return torch.randint(0, 256, shape, generator=self.generator, dtype=torch.uint8)


def _up_to(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


def _w4a4(random: _Random, layer: Layer, precision: str, rank: int, outer: str) -> dict[str, Tensor]:
    """outer: which of nvfp4's coarser scales the layer has, "wtscale", "wcscales", "both" or "none"."""
    half = random.half
    rows, columns = _up_to(layer.n, 128), _up_to(layer.k, 128)
    std = layer.k**-0.5
    out = {"qweight": random.bytes(rows, columns // 2).view(torch.int8)}
    if precision == "int4":
        out["wscales"] = random.uniform((columns // 64, rows), 0.5 * std / 4.6, 1.5 * std / 4.6).to(half)
    else:
        spread = random.uniform((columns // 16, rows), 0.5, 1.5)
        coarse = {"none": 1.0}.get(outer, 2.0**-6)
        out["wscales"] = (spread * (std / 2.9 / coarse)).to(torch.float8_e4m3fn)
        if outer == "wtscale":
            out["wtscale"] = torch.tensor([coarse * 1.25], dtype=half)
        if outer in ("wcscales", "both"):
            each = random.uniform((rows,), 0.7, 1.4) * (1 if outer == "both" else coarse)
            out["wcscales"] = each.to(half)
        if outer == "both":
            out["wtscale"] = torch.tensor([coarse * 1.1], dtype=torch.float32)
    if layer.bias or layer.unsigned:
        out["bias"] = random.normal((rows,), 0.1)
        if layer.name.startswith("single_transformer_blocks") and layer.name.endswith("out_proj"):
            out["bias"].zero_()
    for leaf in ("smooth", "smooth_orig"):
        out[leaf] = torch.exp2(random.uniform((columns,), -1, 1)).to(half)
    out["lora_down"] = random.normal((columns, rank), std)
    out["lora_up"] = random.normal((rows, rank), 0.5 * rank**-0.5)
    if layer.closed and columns > layer.k:
        nibble = code_positions(rows, columns)[:, layer.k :].reshape(-1)
        kept = np.bincount(nibble // 2, np.where(nibble % 2, 0xF0, 0x0F), out["qweight"].numel()).astype(np.uint8)
        out["qweight"].view(torch.uint8).reshape(-1).bitwise_and_(torch.from_numpy(~kept))
        out["lora_down"].view(-1)[low_rank_positions(columns, rank, down=True)[layer.k :].reshape(-1)] = 0
    return {V2_LEAVES.get(leaf, leaf) if layer.v2 else leaf: t for leaf, t in out.items()}


def _w4a16(random: _Random, layer: Layer, padded_groups: bool) -> dict[str, Tensor]:
    t5 = layer.kind == "t5"
    groups = -(-layer.k // (128 if t5 else 64))
    std = layer.k**-0.5
    scale = random.uniform((groups, layer.n), 0.5 * std / 4.6, 1.5 * std / 4.6).to(random.half)
    zero = (-scale.float() * random.uniform((groups, layer.n), 5, 10)).to(random.half)
    stored = _up_to(groups, 8 if t5 else 16) if padded_groups else groups
    scale, zero = (torch.cat([x, x.new_zeros(stored - groups, layer.n)]) for x in (scale, zero))
    words = random.bytes(layer.n // 4, 2 * layer.k)
    if t5:
        return {"qweight": words.view(torch.int16), "scales": scale, "scaled_zeros": zero}
    out = {"qweight": words.view(torch.int32), "wscales": scale, "wzeros": zero}
    if layer.bias:
        bias = random.normal((layer.n,), 0.1).float()
        if layer.chunks:
            bias += torch.tensor([float(c in (1, layer.chunks - 2)) for c in range(layer.chunks)]).repeat(
                layer.n // layer.chunks
            )
        out["bias"] = bias.to(random.half)
    return out


def _plain(random: _Random, name: str, shape: Sequence[int]) -> Tensor:
    # cap_embedder.0 is Z-Image's norm of the caption.
    if len(shape) == 1 and re.search(r"norm\w*\.weight$|^cap_embedder\.0\.weight$", name):
        return random.normal(shape, 0.1, 1.0)
    if name.endswith("bias"):
        return random.normal(shape, 0.1)
    fan_in = math.prod(shape[1:]) if len(shape) > 1 else 1
    return random.normal(shape, min(1.0, fan_in**-0.5))


def make(
    family: str,
    config: Mapping[str, Any],
    precision: str = "int4",
    half: torch.dtype = torch.bfloat16,
    rank: int = 16,
    seed: int = 0,
    *,
    outer: str = "",
    padded_groups: bool = True,
    **options: Any,
) -> dict[str, Tensor]:
    """Every tensor of a file, random. outer: as of `_w4a4` for all layers; "" is `wcscales` for fused layers and
    `wtscale` for the others. padded_groups: the W4A16 scales have rows of zeros up to the multiple that writers use."""
    random = _Random(seed, half)
    what = plan(family, config, precision, **options)
    names = shapes(family, config)
    out: dict[str, Tensor] = {}
    taken = {name for _, sources in what.plain.values() for name in sources}
    for layer in what.layers:
        if layer.kind == "w4a4":
            if family == "flux_lite":
                kind = "both"
            else:
                kind = outer or ("wcscales" if len(layer.parts) > 1 else "wtscale")
            tensors = _w4a4(random, layer, precision, rank, kind)
        else:
            tensors = _w4a16(random, layer, padded_groups and family != "flux_lite")
        out |= {f"{layer.name}.{leaf}": t for leaf, t in tensors.items()}
        taken |= {f"{part.module}.{leaf}" for part in layer.parts for leaf in ("weight", "bias")}
    if family == "flux_lite":
        # Stock diffusers has no parameter for the informational factor.
        out = {name: t for name, t in out.items() if not name.endswith("smooth_factor_orig")}
    for name, (shape, sources) in what.plain.items():
        out[name] = _plain(random, next(iter(sources)), shape)
    return out | {name: _plain(random, name, shape) for name, shape in names.items() if name not in taken}


def stock_state(
    family: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any], precision: str = "int4", **options: Any
) -> dict[str, np.ndarray]:
    """The float64 state of the stock class. options: as for `plan`."""
    what, names = plan(family, config, precision, **options), shapes(family, config)
    state: dict[str, np.ndarray] = {}
    for layer in what.layers:
        weight, bias = dense(layer, tensors)
        for part in layer.parts:
            rows = np.arange(layer.n) if part.rows is None else part.rows
            target = state.setdefault(f"{part.module}.weight", np.zeros(_matrix(names[f"{part.module}.weight"])))
            target[:, part.column : part.column + layer.k] = weight[rows]
            if f"{part.module}.bias" in names:
                total = state.setdefault(f"{part.module}.bias", np.zeros(len(rows)))
                total += 0 if bias is None else bias[rows]
    for file_name, (_, sources) in what.plain.items():
        values = numbers(tensors[file_name])
        state |= {name: read(values) for name, read in sources.items()}
    state |= {name: numbers(tensors[name]) for name in names if name not in state}
    return {name: state[name].reshape(shape) for name, shape in names.items()}


def dense(layer: Layer, tensors: Mapping[str, Tensor]) -> tuple[np.ndarray, np.ndarray | None]:
    prefix = f"{layer.name}."
    leaves = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    if layer.kind == "w4a4":
        return dense_w4a4(leaves, layer.n, layer.k, layer.unsigned)
    return dense_awq(leaves, layer.n, layer.k, 128 if layer.kind == "t5" else 64, layer.chunks)


def _matrix(shape: Sequence[int]) -> tuple[int, int]:
    return shape[0], math.prod(shape[1:])


def reference(family: str, config: Mapping[str, Any], state: Mapping[str, np.ndarray]) -> torch.nn.Module:
    """The stock model in float64 that holds `state`."""
    model = stock(family, config).double()
    tensors = {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in state.items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert set(missing) <= {"encoder.embed_tokens.weight"} and not unexpected
    return model


def quantization(precision: str, rank: int, skip_refiners: bool = False) -> dict[str, Any]:
    int4 = precision == "int4"
    dtype, group = ("int4", 64) if int4 else ("fp4_e2m1_all", 16)
    return {
        "method": "svdquant",
        "weight": {
            "dtype": dtype,
            "scale_dtype": None if int4 else [None, "fp8_e4m3_nan"],
            "group_size": group,
        },
        "activation": {"dtype": dtype, "scale_dtype": None if int4 else "fp8_e4m3_nan", "group_size": group},
        "rank": rank,
    } | ({"skip_refiners": True} if skip_refiners else {})


def full_config(family: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The whole `config.json` of the stock class."""
    if family == "t5":
        return transformers.T5Config(**config).to_dict() | {"architectures": ["T5EncoderModel"]}
    with torch.device("meta"):
        return json.loads(stock(family, config).to_json_string())


def metadata(
    family: str, config: Mapping[str, Any], precision: str = "int4", rank: int = 16, skip_refiners: bool = False
) -> dict[str, str]:
    out = {"config": json.dumps(full_config(family, config)), "model_class": MODEL_CLASS[family]}
    if family == "t5":
        return out
    if family == "flux":
        layers = {"depth": config["num_layers"], "depth_single_blocks": config["num_single_layers"]}
        comfy = {"model_class": "Flux", "model_config": {"image_model": "flux", "guidance_embed": True} | layers}
        out["comfy_config"] = json.dumps(comfy)
    return out | {"quantization_config": json.dumps(quantization(precision, rank, skip_refiners))}


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.contiguous().clone() for name, t in tensors.items()}


def write_single(path: Path, tensors: Mapping[str, Tensor], info: Mapping[str, str]) -> Path:
    save_file(_contiguous(tensors), path, dict(info))
    return path


def blocks_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: t for n, t in tensors.items() if n.startswith(("transformer_blocks.", "single_transformer_blocks."))}


def write_blocks(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    """The 2024 file: blocks alone, no metadata."""
    save_file(_contiguous(blocks_of(tensors)), path)
    return path


def write_folder(path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None) -> Path:
    """Two files; config: the content of `config.json`, None for none."""
    path.mkdir()
    blocks = write_blocks(path / "transformer_blocks.safetensors", tensors)
    rest = {name: t for name, t in tensors.items() if name not in blocks_of(tensors)}
    save_file(_contiguous(rest), blocks.with_name("unquantized_layers.safetensors"))
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    return path


def write_lite(path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], precision: str, rank: int) -> Path:
    """A `nunchaku_lite` folder."""
    path.mkdir()
    layers = plan("flux_lite", config).layers
    kinds = {kind: [layer.name for layer in layers if layer.kind == kind] for kind in ("w4a4", "awq")}
    group = 64 if precision == "int4" else 16
    method = {
        "quant_method": "nunchaku_lite",
        "compute_dtype": "bfloat16",
        "svdq_w4a4": {"precision": precision, "group_size": group, "rank": rank, "targets": kinds["w4a4"]},
        "awq_w4a16": {"precision": "int4", "group_size": 64, "targets": kinds["awq"]},
    }
    config = full_config("flux_lite", config) | {"quantization_config": method}
    (path / "config.json").write_text(json.dumps(config))
    save_file(_contiguous(tensors), path / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    return path


def random_state(family: str, config: Mapping[str, Any], seed: int) -> dict[str, np.ndarray]:
    """A stock state of its own, in numbers that bfloat16 holds."""
    random = _Random(seed, torch.bfloat16)
    return {name: numbers(_plain(random, name, shape)) for name, shape in shapes(family, config).items()}


def write_base(path: Path, family: str, config: Mapping[str, Any], state: Mapping[str, np.ndarray]) -> Path:
    """A pipeline folder with the 16-bit model alone; `state` in bfloat16."""
    (path / "transformer").mkdir(parents=True)
    name = STOCK_CLASS[family].__name__
    pipeline = {"_class_name": "FluxPipeline", "transformer": ["diffusers", name]}
    (path / "model_index.json").write_text(json.dumps(pipeline))
    (path / "transformer" / "config.json").write_text(json.dumps(full_config(family, config)))
    tensors = {n: torch.from_numpy(np.ascontiguousarray(a)).bfloat16() for n, a in state.items()}
    save_file(tensors, path / "transformer" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    return path
