"""Our own layers, solved quickly enough for a benchmark."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..config import GROUP_SIZES, LayerSpec
from ..nn import SVDQuantLinear, W4A16Linear
from ..numerics import FORMATS, SVDQuantTensors, padded_columns
from ..numerics.hadamard import rotate
from ..ptq.low_rank import truncated_svd
from ..ptq.problem import Problem
from ..ptq.residual import HessianFactor, quantize_residual
from ..ptq.smooth import search
from .cases import LinearCase, Shape
from .results import OURS

# Steps of the smoothing search: enough to find about the best factor, few enough for large layers.
_GRID = 4
_SEARCHED_OUTPUTS = 1024


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

    kind = OURS
    keeps_output = False
    counts_bytes = True

    def __init__(self, variant: Variant, gptq: bool = False) -> None:
        self.variant, self.gptq = variant, gptq
        self.layer: SVDQuantLinear | None = None

    def prepare(self, case: LinearCase) -> None:
        """Solves the case's weight: a short smoothing search, low rank, rounding to nearest (or GPTQ)."""
        self.layer = solve(self.variant, case.weight, case.bias, case.calibration, self.gptq)

    def copy(self, case: LinearCase) -> OurLayer:
        """The same layer in memory of its own."""
        assert self.layer is not None
        tensors = self.layer.tensors()
        clones = {name: tensor.detach().clone() for name, tensor in tensors.named().items()}
        twin = OurLayer(self.variant)
        twin.layer = type(self.layer).from_tensors(replace(tensors, **clones), self.layer.compute_dtype)
        twin.layer.activations = self.layer.activations
        return twin

    def input(self, case: LinearCase) -> Tensor:
        return case.x

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        assert self.layer is not None
        return self.layer(x) if out is None else self.layer(x, out=out)

    @property
    def bytes(self) -> int | None:
        """Parameters as stored."""
        assert self.layer is not None
        return sum(p.nbytes for p in self.layer.parameters())


def solve(
    variant: Variant, weight: Tensor, bias: Tensor | None, calibration: Tensor, gptq: bool = False
) -> SVDQuantLinear:
    """The layer of a weight [N, K] whose inputs look like `calibration` [rows, K].

    As `svdquant.quantize` does it, but smoothing is searched with a few candidates on some of the outputs, and the
    residual is rounded to nearest unless `gptq`: seconds instead of minutes.
    """
    spec, dtype, (n, k) = variant.spec, weight.dtype, weight.shape
    generator = torch.Generator().manual_seed(0)
    rows = calibration.float()
    problem = Problem(weight.float(), [n], rows, spec, padded_columns(k, spec), variant.activations, dtype)
    smooth = torch.ones(k)
    if spec.smooth:
        some = torch.randperm(n, generator=generator)[:_SEARCHED_OUTPUTS]
        part = replace(problem, weight=problem.weight[some], splits=[len(some)])
        part.spec = replace(spec, rank=min(spec.rank, len(some)))
        smooth = search(part, rows.abs().amax(0), _GRID, generator).factor
    residual = problem.smoothed_weight(smooth)
    branch: dict[str, Tensor] = {}
    if spec.rank:
        up, down = truncated_svd(residual, spec.rank, generator, iterations=2)
        raw = (rotate(down) if spec.rotate else down)[:, :k] / smooth
        branch = {"proj_down": raw.to(dtype), "proj_up": up.to(dtype)}
        # The branch as it is stored; `smoothed_inputs` pads and rotates.
        stored = problem.smoothed_inputs(branch["proj_down"].float() * smooth, torch.ones(k))
        residual = residual - branch["proj_up"].float() @ stored
    hessian = None
    if gptq:
        seen = problem.smoothed_inputs(rows, smooth)
        hessian = HessianFactor(seen.T @ seen)
    values, wscales, wcscales = quantize_residual(residual, spec.weights, spec.group_size, dtype, hessian)
    tensors = SVDQuantTensors(
        spec,
        k,
        FORMATS[spec.weights].pack(values),
        wscales,
        wcscales,
        smooth.to(dtype) if spec.smooth else None,
        bias=None if bias is None else bias.clone(),
        **branch,
    )
    cls = W4A16Linear if spec.kind == "w4a16" else SVDQuantLinear
    layer = cls.from_tensors(tensors, dtype)
    layer.activations = variant.activations
    return layer
