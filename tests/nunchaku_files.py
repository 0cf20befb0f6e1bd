"""Random files in Nunchaku's formats, and the stock 16-bit models that they mean.

No writer is involved: each packing is a bijection, so random bytes of the right shape are a valid layer.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from nunchaku64 import code_positions, dense_awq, dense_w4a4, low_rank_positions, numbers
from nunchaku_plans import (  # noqa: F401  # whoever makes a file needs what it is of
    CONFIGS,
    MODEL_CLASS,
    STOCK_CLASS,
    V2_LEAVES,
    Layer,
    Plan,
    plan,
    shapes,
    stock,
)
from safetensors.torch import save_file
from torch import Tensor


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
        # Far enough from 1 that taking it out needs more than 16 bits.
        bias = random.normal((layer.n,), 0.7 if layer.chunks == 6 else 0.1).float()
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
