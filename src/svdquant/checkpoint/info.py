"""`inspect`: what a checkpoint holds, from its headers alone."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..config import LayerSpec
from ..numerics import FORMATS
from ..ptq.leftovers import Leftover, Leftovers, likely_reason
from .header import TensorInfo
from .layout import Checkpoint, layer_specs, open_checkpoint, parse_config
from .nunchaku import layer_names, stock_class
from .skeleton import DTYPES, stored_dtype

_LOW_RANK = ("proj_down", "proj_up", "lora_down", "lora_up")
_QUANTIZED = (
    "qweight", "wscales", "wzeros", "wcscales", "wtscale", "scales", "scaled_zeros",
    "smooth_factor", "smooth_factor_orig", "smooth", "smooth_orig",
)  # fmt: skip
_FOREIGN = ("nunchaku", "nunchaku_lite")
_NUMBERED = re.compile(r"\w+\.\d+\..*$")


@dataclass(frozen=True)
class CheckpointInfo:
    """What `inspect` found; sizes in bytes.

    format: "svdquant", another quant_method, "unquantized", or "unknown" for packed weights of another format.
    container: "file" or "folder", with ", blocks only" where a 16-bit model has to provide the rest.
    weights: stored precision of the W4A4 layers, of the others where there are none. half: type of what is in 16 bits.
    layers: kind → stored weights → number of layers as the file has them (in Nunchaku's, q, k and v are one).
    activations, ranks: of the layers of kind "svdquant"; only svdquant says which activations it was solved for.
    quantized_bytes: packed weights, scales and smoothing of the quantized layers; low_rank_bytes: their branches;
    other_bytes: the rest, biases included. dtypes: type as safetensors names it → number of tensors.
    leftovers: what is in 16 bits besides the quantized layers, buffers included; None where nothing is quantized.
        Inputs that the file fills up count as they are stored, if nothing else tells how many there are.
    """

    path: str
    format: str
    format_version: int | None
    library: str
    model_class: str
    files: int
    layers: dict[str, dict[str, int]] = field(default_factory=dict)
    activations: dict[str, int] = field(default_factory=dict)
    ranks: dict[int, int] = field(default_factory=dict)
    rotated: int = 0
    tensors: int = 0
    quantized_bytes: int = 0
    low_rank_bytes: int = 0
    other_bytes: int = 0
    total_bytes: int = 0
    dtypes: dict[str, int] = field(default_factory=dict)
    container: str = "folder"
    weights: str = ""
    half: str = ""
    leftovers: Leftovers | None = None

    @property
    def quantized_layers(self) -> int:
        return sum(sum(by_weights.values()) for by_weights in self.layers.values())

    def to_dict(self) -> dict[str, Any]:
        held = self.leftovers
        data = asdict(self) | {"quantized_layers": self.quantized_layers}
        return data | {"leftovers": None if held is None else held.to_dict()}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)


def inspect(path: str | Path, component: str | None = None) -> CheckpointInfo:
    """Describes a model folder, a pipeline folder's denoiser or `component`, or a .safetensors file.

    Reads JSON and headers only. Raises `SVDQuantError` as `load_model` does, but not for an unquantized model.
    """
    checkpoint = open_checkpoint(path, component)
    method = checkpoint.method
    config = parse_config(checkpoint.quantization or {}, checkpoint.path) if method == "svdquant" else None
    specs = stored_layers(checkpoint)
    sizes: Counter[str] = Counter()
    for name, info in checkpoint.tensors.items():
        module, _, leaf = name.rpartition(".")
        ours = module in specs
        what = "quantized" if ours and leaf in _QUANTIZED else "low_rank" if ours and leaf in _LOW_RANK else "other"
        sizes[what] += info.nbytes
    layers: dict[str, Counter[str]] = {}
    activations: Counter[str] = Counter()
    ranks: Counter[int] = Counter()
    rotated = 0
    for spec in specs.values():
        layers.setdefault(spec.kind, Counter())[spec.weights] += 1
        if spec.kind == "svdquant":
            ranks[spec.rank] += 1
            rotated += spec.rotate
            if config is not None:
                activations[spec.activations] += 1
    packed = any(name.endswith(".qweight") for name in checkpoint.tensors)
    return CheckpointInfo(
        path=str(checkpoint.path),
        format=method or ("unknown" if packed else "unquantized"),
        format_version=config.format_version if config else None,
        library=checkpoint.library,
        model_class=_class_of(checkpoint),
        files=len(checkpoint.files),
        layers={kind: dict(by_weights) for kind, by_weights in layers.items()},
        activations=dict(activations),
        ranks=dict(ranks),
        rotated=rotated,
        tensors=len(checkpoint.tensors),
        quantized_bytes=sizes["quantized"],
        low_rank_bytes=sizes["low_rank"],
        other_bytes=sizes["other"],
        total_bytes=sum(sizes.values()),
        dtypes=dict(Counter(info.dtype for info in checkpoint.tensors.values())),
        container=_container(checkpoint),
        weights=" and ".join(sorted(layers.get("svdquant") or layers.get("w4a16") or ())),
        half=str(stored_dtype(checkpoint.tensors)).removeprefix("torch."),
        leftovers=_leftovers(checkpoint, specs) if specs else None,
    )


def _leftovers(checkpoint: Checkpoint, specs: dict[str, LayerSpec]) -> Leftovers:
    """What the headers say about tensors of no quantized layer."""
    found, unit = checkpoint.tensors, stored_dtype(checkpoint.tensors).itemsize
    out = Leftovers(quantized=sum(_dense_bytes(found, name, spec, unit) for name, spec in specs.items()))
    for name, info in found.items():
        if name.rpartition(".")[0] in specs:
            out.stored += info.nbytes
            continue
        dtype = str(DTYPES.get(info.dtype, info.dtype)).removeprefix("torch.")
        out.entries.append(Leftover(name, info.shape, dtype, info.nbytes, likely_reason(name, info.shape)))
    return out


def _dense_bytes(tensors: dict[str, TensorInfo], layer: str, spec: LayerSpec, unit: int) -> int:
    """Of the 16-bit linear that a quantized layer was."""
    packed = tensors[f"{layer}.qweight"]
    weights = packed.nbytes * 8 // FORMATS[spec.weights].bits
    down, bias = tensors.get(f"{layer}.proj_down"), tensors.get(f"{layer}.bias")
    if down is not None and packed.dtype == "U8":
        # Our own file: rows are not filled up, columns are to whole groups.
        weights = packed.shape[0] * down.shape[1]
    return (weights + (0 if bias is None else bias.shape[0])) * unit


def stored_layers(checkpoint: Checkpoint) -> dict[str, LayerSpec]:
    """Name in the file → stored form of each quantized layer, from the headers; empty for what is not readable here."""
    if checkpoint.method == "svdquant":
        specs = layer_specs(parse_config(checkpoint.quantization or {}, checkpoint.path), checkpoint.path)
        return _as_in_file(specs, checkpoint)
    return layer_names(checkpoint) if checkpoint.method in _FOREIGN else {}


def _as_in_file(specs: dict[str, LayerSpec], checkpoint: Checkpoint) -> dict[str, LayerSpec]:
    """By the names of the file: transformers stores some models under others than the model's own."""
    packed = [name.rpartition(".")[0] for name in checkpoint.tensors if name.endswith(".qweight")]
    by_tail = {_tail(name): name for name in packed}
    return {name if name in packed else by_tail.get(_tail(name), name): spec for name, spec in specs.items()}


def _tail(name: str) -> str:
    """From the list that the first number counts: "layers.0.mlp.up_proj"; what precedes it is renamed."""
    match = _NUMBERED.search(name)
    return name if match is None else match[0]


def _container(checkpoint: Checkpoint) -> str:
    kind = "file" if checkpoint.is_file else "folder"
    return f"{kind}, blocks only" if checkpoint.blocks_only else kind


def _class_of(checkpoint: Checkpoint) -> str:
    """The stock class; of the oldest files, which do not name it, as far as their layers tell."""
    sana = "transformer_blocks.0.ff.inverted_conv.qweight" in checkpoint.tensors
    return stock_class(checkpoint) or ("SanaTransformer2DModel" if sana else "")
