"""Layers and inputs of a real model's kind, made on the device in no time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from ...config import GROUP_SIZES, LayerSpec
from ...nn.linear import empty_tensors
from ...numerics import FORMATS, SVDQuantTensors, quantize_weight
from ..cases import Shape

# Of trained weights of this size.
STD = 0.02
# Of codes before they are rounded: few reach the ends.
_CODES = {"int4": 2.5, "nvfp4": 2.0, "int8": 40.0}
# nvfp4's group scales lie in e4m3, which begins at 2⁻⁶; the outer scale takes them back.
_OUTER = 64.0


def spec_of(weights: str, activations: str, rank: int) -> LayerSpec:
    return LayerSpec("svdquant", weights, GROUP_SIZES[weights], rank, activations)


def random_record(
    k: int, n: int, spec: LayerSpec, dtype: torch.dtype, device: torch.device, seed: int = 0, bias: bool = True
) -> SVDQuantTensors:
    """A layer of random codes, scales and branch. Its dense weight has about the size of a trained one."""
    g = torch.Generator(device).manual_seed(seed)
    tensors, fmt = empty_tensors(k, n, bias, spec, dtype, device), FORMATS[spec.weights]
    columns = tensors["qweight"].shape[1] * 8 // fmt.bits
    codes = torch.randn(n, columns, generator=g, device=device).mul_(_CODES[spec.weights])
    tensors["qweight"] = fmt.pack(fmt.round(codes))
    outer = _OUTER if spec.weights == "nvfp4" else 1.0
    for name, tensor in tensors.items():
        if name == "qweight":
            continue
        noise = torch.randn(tensor.shape, generator=g, device=device)
        if name == "wscales":
            values = (0.5 + torch.rand(tensor.shape, generator=g, device=device)) * (STD * outer / _CODES[spec.weights])
            if spec.weights == "int4":  # scales of either sign
                values = torch.where(noise < 0, -values, values)
        elif name == "wcscales":
            values = (1 + 0.1 * noise) / outer
        elif name == "smooth_factor":
            values = torch.exp(0.3 * noise)
        elif name == "proj_down":
            values = noise * k**-0.5
        else:
            values = noise * STD
        tensor.copy_(values)
    return SVDQuantTensors(spec, k, **tensors)


def copy_of(t: SVDQuantTensors) -> SVDQuantTensors:
    """The layer in memory of its own."""
    clones = {name: tensor.clone() for name, tensor in t.named().items()}
    return SVDQuantTensors(t.spec, t.in_features, **clones)


@dataclass
class LayerData:
    """A dense linear whose decomposition is known because it was made from it: weight = up·down + rest.

    inputs: several [M, K], so many that they do not fit into the device's cache together; some channels of them are
    outliers. smooth: a factor that suits them.
    """

    shape: Shape
    dtype: torch.dtype
    rest: Tensor
    up: Tensor
    down: Tensor
    bias: Tensor
    smooth: Tensor
    inputs: list[Tensor]

    @cached_property
    def weight(self) -> Tensor:
        """[N, K] in the model's type."""
        return (self.rest + self.up.float() @ self.down.float()).to(self.dtype)

    @cached_property
    def reference(self) -> Tensor:
        """float32 [M, N]: the first input times the original weight."""
        return F.linear(self.inputs[0].float(), self.weight.float(), self.bias.float())

    def record(self, weights: str, activations: str) -> SVDQuantTensors:
        """The linear quantized, to nearest, with the branch that it was made from."""
        spec = spec_of(weights, activations, self.down.shape[0])
        residual = (self.weight.float() - self.up.float() @ self.down.float()) * self.smooth.float()
        values, wscales, wcscales = quantize_weight(residual, weights, spec.group_size, self.dtype)
        packed = FORMATS[weights].pack(values)
        return SVDQuantTensors(
            spec, self.shape.k, packed, wscales, wcscales, self.smooth, self.down, self.up, self.bias
        )

    def weight_only(self, weights: str) -> SVDQuantTensors:
        spec = LayerSpec("w4a16", weights, GROUP_SIZES[weights], 0, "none", (), False, False)
        values, wscales, wcscales = quantize_weight(self.weight.float(), weights, spec.group_size, self.dtype)
        return SVDQuantTensors(spec, self.shape.k, FORMATS[weights].pack(values), wscales, wcscales, bias=self.bias)


def layer_data(shape: Shape, rank: int, dtype: torch.dtype, device: torch.device, beside: int) -> LayerData:
    """A linear of a shape. beside: bytes that all inputs together must exceed; of one row, two inputs do."""
    g = torch.Generator(device).manual_seed(shape.m * 7919 + shape.k * 31 + shape.n)

    def noise(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, device=device)

    m, k, n = shape.m, shape.k, shape.n
    spread = torch.exp(0.5 * noise(k))
    spread[torch.randperm(k, generator=g, device=device)[: k // 100]] *= 12
    count = min(max(math.ceil(beside / (m * k * 2)), 2 if beside else 1), 2 if shape.modulation else 16)
    return LayerData(
        shape,
        dtype,
        noise(n, k) * STD,
        (noise(n, rank) * STD).to(dtype),
        (noise(rank, k) * k**-0.5).to(dtype),
        (noise(n) * 0.1).to(dtype),
        (spread.sqrt() / spread.sqrt().median()).to(dtype),
        [(noise(m, k) * spread).to(dtype) for _ in range(count)],
    )
