"""`inspect`: what a checkpoint holds, from its headers alone."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .layout import open_checkpoint, parse_config

_QUANTIZED = ("qweight", "wscales", "wcscales", "smooth_factor")
_LOW_RANK = ("proj_down", "proj_up")


@dataclass(frozen=True)
class CheckpointInfo:
    """What `inspect` found; sizes in bytes.

    format: "svdquant", another quant_method, "unquantized", or "unknown" for packed weights of another format.
    layers: kind → stored weights → number of layers. activations, ranks: of the layers of kind "svdquant".
    quantized_bytes: packed weights, scales and smoothing of the quantized layers; low_rank_bytes: their branches;
    other_bytes: the rest, biases included. dtypes: type as safetensors names it → number of tensors.
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

    @property
    def quantized_layers(self) -> int:
        return sum(sum(by_weights.values()) for by_weights in self.layers.values())

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"quantized_layers": self.quantized_layers}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)


def inspect(path: str | Path, component: str | None = None) -> CheckpointInfo:
    """Describes a model folder, a pipeline folder's denoiser or `component`, or a .safetensors file.

    Reads JSON and headers only. Raises `SVDQuantError` as `load_model` does, but not for an unquantized model.
    """
    checkpoint = open_checkpoint(path, component)
    sizes: Counter[str] = Counter()
    method = checkpoint.method
    config = parse_config(checkpoint.quantization or {}, checkpoint.path) if method == "svdquant" else None
    for name, info in checkpoint.tensors.items():
        module, _, leaf = name.rpartition(".")
        ours = config is not None and module in (config.layers or {})
        what = "quantized" if ours and leaf in _QUANTIZED else "low_rank" if ours and leaf in _LOW_RANK else "other"
        sizes[what] += info.nbytes
    layers: dict[str, Counter[str]] = {}
    activations: Counter[str] = Counter()
    ranks: Counter[int] = Counter()
    rotated = 0
    for name in (config.layers or {}) if config else ():
        spec = config.layer_spec(name)  # type: ignore[union-attr]
        layers.setdefault(spec.kind, Counter())[spec.weights] += 1
        if spec.kind == "svdquant":
            activations[spec.activations] += 1
            ranks[spec.rank] += 1
            rotated += spec.rotate
    packed = any(name.endswith(".qweight") for name in checkpoint.tensors)
    return CheckpointInfo(
        path=str(checkpoint.path),
        format=method or ("unknown" if packed else "unquantized"),
        format_version=config.format_version if config else None,
        library=checkpoint.library,
        model_class=checkpoint.model_class,
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
    )
