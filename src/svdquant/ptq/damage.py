"""Weights and calibration inputs that cannot be quantized, because their numbers are none."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import SVDQuantError

# Squares of larger ones do not add up in float32. Trained weights stay far below float16's largest number.
_LARGEST_WEIGHT = 1e12


class UnusableModelError(SVDQuantError):
    """Of a model that the same job cannot quantize, however often it is repeated."""


class UnusableInputsError(UnusableModelError):
    """Of what the model read while it was calibrated."""


def check_weight(name: str, weight: Tensor, in_features: int, out_features: int) -> None:
    """Raises `UnusableModelError` for another shape, and for numbers that no format can hold."""
    if tuple(weight.shape) != (out_features, in_features):
        raise UnusableModelError(
            f"{name}.weight has shape {list(weight.shape)}, the model expects {[out_features, in_features]}; the "
            "weights belong to another model or configuration"
        )
    if why := damage(weight):
        raise UnusableModelError(f"{name}.weight holds {why}; download or export the weights again")


def damage(weight: Tensor) -> str:
    """What is wrong with the numbers of a floating tensor, in words; "" where nothing is."""
    if not weight.numel():
        return ""
    # NaN is both the least and the greatest; this is many times as fast as asking each number.
    least, greatest = torch.aminmax(weight.detach())
    largest = max(abs(float(least)), abs(float(greatest)))
    if not (math.isfinite(float(least)) and math.isfinite(float(greatest))):
        return "NaN or infinity"
    return f"numbers as large as {largest:.0e}, which no trained weight is" if largest > _LARGEST_WEIGHT else ""
