"""A denoiser's weights as fine-tunes store them: in 16 or 32 bits, or in fp8 with and without scales."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.header import TensorInfo
from ..checkpoint.mapped import TORCH_TYPES, MappedTensors
from ..errors import SVDQuantError
from .lazy_tensor import LazyTensor

FLOATS = ("F16", "BF16", "F32", "F64")
FP8 = ("F8_E4M3", "F8_E5M2")
# Beside an fp8 weight. The first two multiply it; the others say how to compute with it, which is of no use here.
_SCALES = ("scale_weight", "weight_scale")
_UNUSED = ("scale_input", "input_scale", "comfy_quant")
_FP8_FORMATS = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fn_rowwise", "float8_e4m3fn_blockwise")
_LAYER_FIELDS = ("format", "full_precision_matrix_mult", "group_size")
_METADATA = "_quantization_metadata"
# Part of a tensor's name → what the file is quantized to.
_PACKED = (
    ("quant_state.bitsandbytes__nf4", "bitsandbytes NF4"),
    ("quant_state.bitsandbytes__fp4", "bitsandbytes FP4"),
    (".absmax", "bitsandbytes 4-bit"),
    (".SCB", "bitsandbytes int8"),
    (".weight_scale_2", "NVFP4"),
    (".wscales", "Nunchaku's 4-bit"),
    (".weight_codebook", "4-bit"),
)


def lazy_weights(
    tensors: dict[str, TensorInfo], mapped: MappedTensors, metadata: dict[str, str], where: Path, prefix: str
) -> dict[str, LazyTensor]:
    """The tensors of a denoiser, scales multiplied in.

    tensors: those below `prefix`, without it in their names, as `mapped` has them. Floats keep the file's type; fp8
    becomes float32 with a scale and bfloat16 without, which holds every such number. Raises `SVDQuantError` for other
    formats, and for a companion of an fp8 weight that nothing here knows: leaving it out could change the weights.
    """
    refuse_packed(tensors, where)
    formats = _layer_formats(tensors, mapped, metadata, where, prefix)
    scales = {name: info for name, info in tensors.items() if name.rpartition(".")[2] in _SCALES}
    fp8 = {name.removesuffix(".weight") for name, info in tensors.items() if info.dtype in FP8 and name not in scales}
    weights: dict[str, LazyTensor] = {}
    for name, info in tensors.items():
        module, _, leaf = name.rpartition(".")
        if name in scales or leaf in _UNUSED or leaf == "scaled_fp8":
            continue
        if module in fp8 and "scale" in leaf and leaf != "scale":
            raise SVDQuantError(
                f"{where}: {prefix}{name} is unknown beside an fp8 weight; give the file of this model in 16 bits"
            )
        beside = [f"{module}.{kind}" for kind in _SCALES if leaf == "weight" and f"{module}.{kind}" in scales]
        if len(beside) > 1:
            raise SVDQuantError(
                f"{where}: {prefix}{name} has two scales ({', '.join(_SCALES)}); give the file of this model in 16 bits"
            )
        scale = beside[0] if beside else None
        weights[name] = _weight(name, info, scale, mapped, prefix, where)
    for name in scales:
        module = name.rpartition(".")[0]
        if f"{module}.weight" not in tensors:
            raise SVDQuantError(f"{where}: {prefix}{name} is the scale of no weight; download the file again")
    for module, kind in formats.items():
        if not any(f"{module}.{leaf}" in scales for leaf in _SCALES):
            raise SVDQuantError(f"{where}: {prefix}{module} is stored as {kind} without a scale; download it again")
    return weights


def refuse_packed(tensors: dict[str, TensorInfo], where: Path) -> None:
    """Raises `SVDQuantError` naming the format of weights that are quantized to something coarser than fp8."""
    for name in tensors:
        for part, kind in _PACKED:
            if part in name:
                raise _refusal(where, kind, name)
    for name, info in tensors.items():
        leaf = name.rpartition(".")[2]
        if info.dtype in FLOATS or info.dtype in FP8 or leaf in _UNUSED:
            continue
        if leaf in _SCALES:
            raise _refusal(where, "MXFP8", name)
        if info.dtype in ("I8", "U8", "F4", "F8_E8M0", "I32", "U32", "F6_E2M3", "F6_E3M2") and len(info.shape) > 1:
            raise _refusal(where, {"I8": "int8", "U8": "packed 4-bit", "F4": "4-bit"}.get(info.dtype, info.dtype), name)


def _refusal(where: Path, kind: str, name: str) -> SVDQuantError:
    return SVDQuantError(
        f"{where}: is quantized already, to {kind} ({name}); give the file of the same model in 16 bits or fp8"
    )


def _layer_formats(
    tensors: dict[str, TensorInfo], mapped: MappedTensors, metadata: dict[str, str], where: Path, prefix: str
) -> dict[str, str]:
    """Layer → format, of the layers that ComfyUI's metadata name. Raises `SVDQuantError` for others than scaled fp8."""
    found: dict[str, Any] = {}
    try:
        listed = json.loads(metadata.get(_METADATA, "{}")).get("layers", {})
        # Their names have the prefix of the file's tensors, or none.
        found |= {name.removeprefix(prefix): fields for name, fields in listed.items()}
        for name in tensors:
            if name.endswith(".comfy_quant"):
                text = bytes(mapped.get(prefix + name).flatten().tolist())
                found[name.rpartition(".")[0]] = json.loads(text)
        kinds = {name: (str(fields["format"]), fields) for name, fields in found.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SVDQuantError(f"{where}: what it says of its quantization cannot be read ({error})") from error
    for name, (kind, fields) in kinds.items():
        if f"{name}.weight" not in tensors:
            continue
        if kind not in _FP8_FORMATS:
            raise _refusal(where, kind, f"{prefix}{name}")
        if unknown := sorted(key for key, value in fields.items() if key not in _LAYER_FIELDS and value):
            raise SVDQuantError(
                f"{where}: {prefix}{name} is stored with {unknown[0]}, which is unknown here; give the file of this "
                "model in 16 bits"
            )
    return {name: kind for name, (kind, _) in kinds.items() if f"{name}.weight" in tensors}


def _weight(
    name: str, info: TensorInfo, scale: str | None, mapped: MappedTensors, prefix: str, where: Path
) -> LazyTensor:
    if info.dtype not in TORCH_TYPES:
        raise SVDQuantError(f"{where}: tensor {prefix}{name} has the type {info.dtype}, which is not supported")
    dtype = TORCH_TYPES[info.dtype]
    sources = frozenset({name})
    if info.dtype not in FP8:
        if scale is None:
            return LazyTensor(lambda: mapped.get(prefix + name), _meta(info.shape, dtype), sources)
        if bool((mapped.get(prefix + scale).float() != 1).any()):
            raise SVDQuantError(
                f"{where}: {prefix}{scale} scales a weight of type {info.dtype}, and only those of fp8 are known; "
                "give the file of this model in 16 bits"
            )
        return LazyTensor(lambda: mapped.get(prefix + name), _meta(info.shape, dtype), sources)
    if scale is None:
        # e5m2 has two bits of significand, e4m3 three: bfloat16 holds both exactly, and their exponents.
        return LazyTensor(
            lambda: mapped.get(prefix + name).to(torch.bfloat16), _meta(info.shape, torch.bfloat16), sources
        )
    steps = _scale_steps(mapped.tensors[prefix + scale].shape, info.shape)
    if steps is None or mapped.tensors[prefix + scale].dtype not in FLOATS:
        raise SVDQuantError(
            f"{where}: {prefix}{scale} of the shape {list(mapped.tensors[prefix + scale].shape)} does not fit its "
            f"weight of {list(info.shape)}; give the file of this model in 16 bits"
        )

    def scaled() -> Tensor:
        return scale_blocks(mapped.get(prefix + name).float(), mapped.get(prefix + scale).float())

    return LazyTensor(scaled, _meta(info.shape, torch.float32), sources)


def scale_blocks(weight: Tensor, scale: Tensor) -> Tensor:
    """weight [N, …] in float32 times its scales, in place: one, one per row, or one per equal block of both sides."""
    steps = _scale_steps(tuple(scale.shape), tuple(weight.shape))
    assert steps is not None
    if steps == (0, 0):
        return weight.mul_(scale.reshape(()))
    rows, columns = steps
    flat = weight.view(weight.shape[0], -1)
    blocks = flat.view(flat.shape[0] // rows, rows, flat.shape[1] // columns, columns)
    blocks.mul_(scale.view(blocks.shape[0], 1, blocks.shape[2], 1))
    return weight


def _scale_steps(scale: tuple[int, ...], weight: tuple[int, ...]) -> tuple[int, int] | None:
    """(rows, columns) that share a scale of the shape `scale`; (0, 0) where all do, None where it does not fit.

    Scales are [], [1], [N], [N, 1], [N / rows, K / columns] or [N, K / columns, 1].
    """
    if not weight or 0 in weight:
        return None
    count = 1
    for size in scale:
        count *= size
    if count == 1:
        return (0, 0)
    if len(weight) < 2:
        return None
    columns = 1
    for size in weight[1:]:
        columns *= size
    grid = (*scale, 1) if len(scale) == 1 else scale[:2]
    if len(scale) > 2 and any(size != 1 for size in scale[2:]):
        return None
    if not all(grid) or weight[0] % grid[0] or columns % grid[1] or (len(scale) == 1 and grid[0] != weight[0]):
        return None
    return (weight[0] // grid[0], columns // grid[1])


def _meta(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
