"""Our own layers, solved quickly enough for a benchmark."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import GROUP_SIZES, LayerSpec, SVDQuantConfig
from ..nn import SVDQuantLinear, W4A16Linear
from ..ptq import GroupInputs, GroupPlan, LayerPlan, solve_group
from .cases import LinearCase, Shape

# Steps of the smoothing search: enough to find about the best factor, few enough for large layers.
_GRID = 4


@dataclass(frozen=True)
class Variant:
    """One way of storing and multiplying a layer. activations "none": weights only."""

    name: str
    weights: str
    activations: str
    rank: int
    rotate: bool = False

    @property
    def spec(self) -> LayerSpec:
        group = GROUP_SIZES[self.weights]
        if self.activations == "none":
            return LayerSpec("w4a16", self.weights, group, 0, "none", (), False, False)
        return LayerSpec("svdquant", self.weights, group, self.rank, self.activations, (), self.rotate)


def variants(shape: Shape, rank: int) -> list[Variant]:
    """What is measured of ours at a shape. The first is what a user gets by default."""
    if shape.modulation:
        return [Variant("ours W4A16", "int4", "none", 0), Variant("ours W8A16", "int8", "none", 0)]
    found = [Variant(f"ours W4A8 rank {rank}", "int4", "int8", rank)]
    if rank:
        found.append(Variant("ours W4A8 rank 0", "int4", "int8", 0))
    return [
        *found,
        Variant(f"ours W4A4 rank {rank}", "int4", "int4", rank),
        Variant(f"ours W4A4 rank {rank} rotated", "int4", "int4", rank, rotate=True),
        Variant(f"ours nvfp4 A8 rank {rank}", "nvfp4", "int8", rank),
        Variant(f"ours W8A8 rank {rank}", "int8", "int8", rank),
    ]


class OurLayer:
    """One of our layers under the protocol of a peer."""

    kind = "ours"

    def __init__(self, variant: Variant, gptq: bool) -> None:
        self.variant, self.gptq = variant, gptq
        self.name = variant.name
        self._layer: nn.Module | None = None

    def prepare(self, case: LinearCase) -> None:
        """Solves the case's weight: a short smoothing search, low rank, rounding to nearest (or GPTQ)."""
        self._layer = solve(self.variant, case.weight, case.bias, case.calibration, self.gptq)

    def copy(self) -> OurLayer:
        """The same layer in memory of its own."""
        assert isinstance(self._layer, SVDQuantLinear)
        tensors = self._layer.tensors()
        twin = OurLayer(self.variant, self.gptq)
        twin._layer = _layer_of(type(tensors)(tensors.spec, tensors.in_features, **_cloned(tensors.named())), self._layer)
        return twin

    def __call__(self, x: Tensor) -> Tensor:
        assert self._layer is not None
        return self._layer(x)

    @property
    def bytes(self) -> int | None:
        """Parameters as stored."""
        assert self._layer is not None
        return sum(p.nbytes for p in self._layer.parameters())


def solve(variant: Variant, weight: Tensor, bias: Tensor | None, calibration: Tensor, gptq: bool) -> SVDQuantLinear:
    """The layer of a weight [N, K] whose inputs look like `calibration` [rows, K]."""
    n, k = weight.shape
    plan = LayerPlan("layer", variant.spec.kind, k, n, bias is not None, 2, "", "layer", "", spec=variant.spec)
    config = SVDQuantConfig(
        weights=variant.weights,
        activations=variant.activations,
        rank=variant.rank,
        smooth=_GRID,
        gptq=gptq,
        rotate=variant.rotate,
    )
    inputs = GroupInputs(calibration, calibration.abs().amax(0).float())
    solved = solve_group(GroupPlan("layer", (plan,)), {"layer": weight}, {"layer": bias}, inputs, config)
    cls = W4A16Linear if variant.spec.kind == "w4a16" else SVDQuantLinear
    layer = cls.from_tensors(solved["layer"].tensors, weight.dtype)
    layer.activations = variant.activations
    return layer


def _layer_of(tensors: object, like: SVDQuantLinear) -> SVDQuantLinear:
    layer = type(like).from_tensors(tensors, like.compute_dtype)  # type: ignore[arg-type]
    layer.activations = like.activations
    return layer


def _cloned(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def exact(layer: SVDQuantLinear) -> tuple[Tensor, Tensor | None]:
    """The dense weight and bias that a layer means, float32."""
    with torch.no_grad():
        return layer.tensors().dense()
