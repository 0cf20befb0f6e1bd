"""How much memory a plan takes: resident, while one layer multiplies, and while the largest group is solved.

Counted from shapes. The factors of `solving_bytes` are those of the arrays that `solve_group` holds at its worst
moments, fitted to measured peaks of groups of 1-17 million weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from ..config import SVDQuantConfig
from ..kernels.cpu import SCRATCH_LIMIT
from ..numerics import groups_of, padded_columns
from .leftovers import find_leftovers
from .plan import GroupPlan, LayerPlan, Plan
from .residual import ROWS

# Of a picture of 1024² (patches of 16 pixels) and 512 of text.
TOKENS = 4096 + 512


@dataclass(frozen=True)
class Memory:
    """Bytes. weights: the whole quantized model, buffers included; quantized: its quantized layers alone.

    sixteen_bit: the model before. multiplying: what the layer that needs most takes while it multiplies `tokens` rows,
    by kind of device: its input, its output, codes, and on GPUs without products of 4 bits the 8-bit weights that it
    makes for each call. What a block keeps beside it is not counted. solving: while the largest group is solved,
    besides the 16-bit model that draws the calibration pictures.
    """

    weights: int
    quantized: int
    buffers: int
    sixteen_bit: int
    tokens: int
    multiplying: dict[str, int]
    multiplying_layer: dict[str, str]
    solving: int
    solving_group: str

    def drawing(self, device: str) -> int:
        """Weights and the layer that needs most. device: "cpu" or "gpu"."""
        return self.weights + self.multiplying[device]


def estimate(
    model: nn.Module, plan: Plan, config: SVDQuantConfig, calibrated: bool = True, tokens: int = TOKENS
) -> Memory:
    """Of a 16-bit model (its weights are not read) and its plan. calibrated: with smoothing and calibration inputs."""
    left = find_leftovers(model, plan)
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    layers = [layer for layer in plan.layers.values() if layer.kind != "keep"]
    quantized = sum(stored_bytes(layer, calibrated) for layer in layers)
    peaks = {name: {layer.name: _multiplying(layer, name, tokens) for layer in layers} for name in ("cpu", "gpu")}
    worst = {name: max(found, key=lambda layer: found[layer]) for name, found in peaks.items()}
    solving = {group.name: solving_bytes(group, config, calibrated) for group in plan.groups}
    largest = max(solving, key=lambda name: solving[name])
    return Memory(
        weights=quantized + left.bytes + buffers,
        quantized=quantized,
        buffers=buffers,
        sixteen_bit=left.total + buffers,
        tokens=tokens,
        multiplying={name: peaks[name][layer] for name, layer in worst.items()},
        multiplying_layer=worst,
        solving=solving[largest],
        solving_group=largest,
    )


def stored_bytes(layer: LayerPlan, calibrated: bool = True) -> int:
    """Of a layer as it is stored, in a file and in memory; without calibration it has no smoothing."""
    if layer.spec is None or calibrated:
        return layer.bytes_after
    return replace(layer, spec=replace(layer.spec, smooth=False)).bytes_after


def _multiplying(layer: LayerPlan, device: str, tokens: int) -> int:
    """Bytes besides the weights while a layer multiplies; a modulation has one row."""
    spec, k, n, unit = layer.spec, layer.in_features, layer.out_features, layer.dtype_bytes
    assert spec is not None
    if spec.kind == "w4a16":
        return (1 if layer.reason.startswith("modulation") else tokens) * (k + n) * unit
    columns = padded_columns(k, spec)
    scales = 4 * (1 + groups_of(k, spec) * (spec.weights != "int8" and device == "cpu"))
    codes = tokens * (columns + scales + 4 * spec.rank)
    if device == "cpu":
        codes = min(codes, SCRATCH_LIMIT)
    expanded = 0 if device == "cpu" or spec.weights == "int8" else n * (columns + 4)
    return tokens * (k + n) * unit + codes + expanded


def solving_bytes(group: GroupPlan, config: SVDQuantConfig, calibrated: bool) -> int:
    """Bytes while a group is solved: weights in 16 and 32 bits, work arrays, calibration rows, the Hessian."""
    mine, spec = config.for_layer(group.name) or config, group.spec
    k = padded_columns(group.in_features, spec)
    rows = [member.out_features for member in group.members]
    # Rounded some rows at a time, unless the whole layer decides.
    together = calibrated or spec.weights == "nvfp4"
    one_layer, inputs = 28 * k * (max(rows) if together else min(max(rows), ROWS)), 0
    if calibrated:
        inputs = 14 * mine.calibration_rows * k
        if mine.gptq:
            # Three matrices of float64 and the Hessian itself while that is factorised.
            one_layer = max(one_layer, 30 * k * k)
    return (18 if spec.kind == "svdquant" else 12) * k * sum(rows) + inputs + one_layer
