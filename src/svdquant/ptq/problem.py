"""One group to be solved: stacked weights, their shared inputs, and the error that every stage is scored by."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import LayerSpec
from ..kernels import reference
from ..numerics import effective_scales, grouped, quantize_weight
from ..numerics.hadamard import BLOCK as ROTATION
from ..numerics.hadamard import rotate

# Rows of a weight treated at once: the chunk stays in the cache through all passes over it.
_CHUNK = 512


@dataclass
class Problem:
    """weight: W float32 [N, K], the members stacked; splits: rows per member; inputs: X float32 [M, K] or None.

    columns: Kp, stored columns. activations: the precision to score with. dtype: 16-bit type of scales and branch.
    """

    weight: Tensor
    splits: list[int]
    inputs: Tensor | None
    spec: LayerSpec
    columns: int
    activations: str
    dtype: torch.dtype

    def smoothed_weight(self, smooth: Tensor) -> Tensor:
        """W·s, padded and rotated: [N, Kp]."""
        return self._padded_rotated(self.weight * smooth)

    def smoothed_inputs(self, inputs: Tensor, smooth: Tensor) -> Tensor:
        """x/s, padded and rotated: [M, Kp]."""
        return self._padded_rotated(inputs / smooth)

    def quantized_inputs(self, inputs: Tensor, smooth: Tensor) -> Tensor:
        """What the quantized weight sees instead of x/s: [M, Kp], the shift after a GELU taken out again."""
        h = reference.prepare_activation(inputs, self.spec, smooth, self.columns, self.activations, self.dtype)
        if self.spec.unsigned:
            shift = reference.shift_vector(self.spec, inputs.shape[1], inputs.device)
            h = h - reference.smoothed(shift[None], self.spec, smooth, self.columns)
        return h

    def round_to_nearest(self, residual: Tensor) -> Tensor:
        """The residual [n, Kp] of some rows, quantized and dequantized; for nvfp4 they must be a whole member's."""
        values, wscales, wcscales = quantize_weight(residual, self.spec.weights, self.spec.group_size, self.dtype)
        scales = effective_scales(wscales, wcscales)
        return (grouped(values, scales.shape[1]) * scales[..., None]).flatten(-2)

    def chunks(self) -> list[slice]:
        """Row ranges that keep members apart, since each member has scales of its own."""
        out, start = [], 0
        for rows in self.splits:
            # nvfp4's outer scale is the maximum over a whole member, so it cannot be cut.
            step = rows if self.spec.weights == "nvfp4" else _CHUNK
            out += [slice(a, min(a + step, start + rows)) for a in range(start, start + rows, step)]
            start += rows
        return out

    def score(
        self,
        target: Tensor,
        quantized: Tensor,
        exact: Tensor,
        weight: Tensor,
        up: Tensor,
        down: Tensor,
        keep: Tensor | None = None,
    ) -> float:
        """Σ ‖Q(x/s)·Q(R)ᵀ + (x/s)·Lᵀ − x·Wᵀ‖², with R = W·s − L rounded to nearest.

        target: x·Wᵀ [M, N]; quantized, exact: Q(x/s) and x/s [M, Kp]; weight: W·s [N, Kp]; up, down: the branch.
        keep: [N, Kp], receives Q(R).
        """
        low = exact @ down.T
        total = 0.0
        for rows in self.chunks():
            rounded = self.round_to_nearest(torch.addmm(weight[rows], up[rows], down, alpha=-1))
            if keep is not None:
                keep[rows] = rounded
            difference = torch.addmm(target[:, rows], quantized, rounded.T, beta=-1)
            difference.addmm_(low, up[rows].T)
            total += float(difference.square_().sum())
        return total

    def _padded_rotated(self, x: Tensor) -> Tensor:
        if x.shape[1] < self.columns:
            x = torch.nn.functional.pad(x, (0, self.columns - x.shape[1]))
        if not self.spec.rotate:
            return x
        # On whole weights a product with the small matrix beats the butterflies that the runtime uses.
        return (x.unflatten(1, (-1, ROTATION)) @ _hadamard(x.device)).flatten(1)


def _hadamard(device: torch.device) -> Tensor:
    return rotate(torch.eye(ROTATION, device=device))
