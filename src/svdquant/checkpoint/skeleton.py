"""Puts empty quantized layers into a model and compares it with what a checkpoint holds, before anything is loaded."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import SVDQuantConfig
from ..errors import SVDQuantError
from ..nn import FIXED_DTYPE, empty_layer, is_pointwise_conv, quantized_layers, replace_module
from .header import TensorInfo
from .layout import layer_specs

DTYPE_NAMES = {
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
}
_CACHE_LINE = 64
FLOATS = ("F16", "BF16", "F32")
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


def install_layers(model: nn.Module, config: SVDQuantConfig, where: Path | str) -> None:
    """Replaces each layer that `config.layers` names by an uninitialised quantized one, on its device.

    Raises `SVDQuantError` where the model has no such linear.
    """
    for name, spec in layer_specs(config, where).items():
        try:
            original = model.get_submodule(name)
        except AttributeError:
            original = None
        if not isinstance(original, nn.Linear) and not (original is not None and is_pointwise_conv(original)):
            raise SVDQuantError(
                f"{where}: names the quantized layer {name}, but {type(model).__name__} has no linear of that name; "
                "load it as the model class that it was saved from"
            )
        replace_module(model, name, empty_layer(original, spec, original.weight.dtype))


def check_tensors(
    expected: dict[str, Tensor],
    found: dict[str, TensorInfo],
    where: Path | str,
    fixed: Iterable[str] = (),
    ignore_unexpected: Iterable[str] = (),
) -> None:
    """Compares the tensors of a model (on any device, "meta" too) with those of a checkpoint.

    fixed: names whose stored type must fit; of the others any floating type does, because they are cast.
    Raises `SVDQuantError` for a missing or unexpected tensor, a wrong shape or a wrong type.
    """
    if missing := sorted(expected.keys() - found.keys()):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise SVDQuantError(f"{where}: tensor {missing[0]}{more} is missing; download or save the model again")
    unexpected = sorted(
        name for name in found.keys() - expected.keys() if not any(re.search(p, name) for p in ignore_unexpected)
    )
    if unexpected:
        more = f" and {len(unexpected) - 1} more" if len(unexpected) > 1 else ""
        raise SVDQuantError(
            f"{where}: tensor {unexpected[0]}{more} belongs to no layer of the model; load it as the model class that "
            "it was saved from"
        )
    fixed = set(fixed)
    for name, tensor in expected.items():
        info = found[name]
        if tuple(tensor.shape) != info.shape:
            raise SVDQuantError(
                f"{where}: tensor {name} has the shape {list(info.shape)}, the model takes {list(tensor.shape)}"
            )
        if not _type_fits(tensor.dtype, info.dtype, name in fixed):
            raise SVDQuantError(
                f"{where}: tensor {name} has the type {info.dtype}, the model takes {DTYPE_NAMES.get(tensor.dtype)}"
            )


def _type_fits(expected: torch.dtype, found: str, fixed: bool) -> bool:
    if fixed and expected in (torch.uint8, torch.int8, torch.float8_e4m3fn):
        return found == DTYPE_NAMES[expected]
    if expected.is_floating_point:
        return found in FLOATS or (not fixed and found == "F64")
    return True


def fixed_names(model: nn.Module) -> set[str]:
    """Full names of the tensors that keep the type they are stored in."""
    return {
        f"{name}.{tensor}"
        for name, layer in quantized_layers(model).items()
        for tensor in layer.fixed  # type: ignore[union-attr]
        if getattr(layer, tensor) is not None
    }


def set_tensor(model: nn.Module, name: str, value: Tensor) -> None:
    """Replaces a parameter or buffer by `value` as it is: its type, its device."""
    module_name, _, leaf = name.rpartition(".")
    module: Any = model.get_submodule(module_name)
    if leaf in module._buffers:
        module._buffers[leaf] = value
    else:
        old = module._parameters[leaf]
        module._parameters[leaf] = nn.Parameter(value, requires_grad=old.requires_grad and value.is_floating_point())


def aligned(value: Tensor) -> Tensor:
    """`value`, copied where a file's mapping left it off a cache line.

    torch's CPU kernels round differently on such memory, and a saved model must draw the picture that it drew before.
    """
    return value if is_aligned(value) else value.clone()


def is_aligned(value: Tensor) -> bool:
    return value.device.type != "cpu" or value.data_ptr() % _CACHE_LINE == 0


def cast_floating(
    name: str, value: Tensor, dtype: torch.dtype, keep_in_fp32: Iterable[str], where: Path | str
) -> Tensor:
    """A floating tensor in the model's type, or in float32 below a module named in `keep_in_fp32`; others as they are.

    Raises `SVDQuantError` where float16 cannot hold a number.
    """
    if not value.is_floating_point():
        return value
    parts = name.split(".")
    wanted = torch.float32 if any(part in keep_in_fp32 for part in parts) else dtype
    cast = value.to(wanted)
    if wanted == torch.float16 and value.dtype != torch.float16 and not bool(cast.isfinite().all()):
        raise SVDQuantError(f"{where}: tensor {name} does not fit float16; load it with torch_dtype=torch.bfloat16")
    return aligned(cast)


def check_device(device: torch.device | str | None) -> None:
    """Raises `SVDQuantError` for a device that is not there, before anything is read."""
    try:
        if device is not None and torch.device(device).type == "meta":
            raise RuntimeError("it holds no data")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise SVDQuantError(f"device {str(device)!r} cannot be used ({reason}); see `svdquant doctor`") from error


def check_load_dtype(dtype: torch.dtype | None) -> None:
    """Raises `SVDQuantError` for a type that the branch and the biases cannot be computed in."""
    if dtype not in (None, torch.float16, torch.bfloat16, torch.float32):
        raise SVDQuantError(f"torch_dtype={dtype} does not fit a quantized model; use bfloat16, float16 or float32")


def stored_dtype(tensors: dict[str, TensorInfo]) -> torch.dtype:
    """The type that a model was saved in: that of most bytes among the floating tensors that are no scales."""
    sizes = dict.fromkeys(FLOATS, 0)
    for name, info in tensors.items():
        if info.dtype in sizes and name.rpartition(".")[2] not in FIXED_DTYPE:
            sizes[info.dtype] += info.nbytes
    return DTYPES[max(sizes, key=lambda name: sizes[name])]
