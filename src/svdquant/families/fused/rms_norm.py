"""diffusers' own RMSNorm, over heads or whole rows, in one pass."""

from __future__ import annotations

from functools import wraps

import torch
from diffusers.models import normalization
from torch import Tensor, nn

from ...kernels import fused
from .modules import RMSNorm as TorchRMSNorm
from .modules import takes_options


class RMSNorm(normalization.RMSNorm):
    """Over heads [B, L, H, D], which it rotates where a fused forward asks for it, or rows [..., K], which it scales
    by a factor; into `out` where given.
    """

    @wraps(normalization.RMSNorm.forward)
    def forward(
        self,
        hidden_states: Tensor,
        rotary: tuple[Tensor, Tensor] | None = None,
        out: Tensor | None = None,
        factor: Tensor | None = None,
    ) -> Tensor:
        x = hidden_states
        asked = rotary is not None or out is not None or factor is not None
        if not asked and not (x.dim() in (2, 3, 4) and fused.usable(x) and self.takes(x)):
            return super().forward(x)
        out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
        if x.dim() == 4:
            return fused.norm_rotate(x, self.weight, self.eps, rotary, out)
        rows, written = (t[None] if t.dim() == 2 else t for t in (x, out))
        for i, weight in enumerate(self._weights(factor)):
            here = slice(None) if factor is None or len(factor) == 1 else slice(i, i + 1)
            fused.norm_rotate(rows[here, :, None], weight, self.eps, out=written[here, :, None])
        return out

    def _weights(self, factor: Tensor | None) -> list[Tensor | None]:
        """The weight [K] with each line of factor [B or 1, K]."""
        if factor is None:
            return [self.weight]
        return list(factor.float() if self.weight is None else factor.float() * self.weight.float())

    def takes(self, x: Tensor) -> bool:
        """Whether x [..., D] may be given with options."""
        same = self.weight is None or self.weight.dtype == x.dtype
        return same and self.bias is None and tuple(self.dim) == tuple(x.shape[-1:])


def scaled(norm: nn.Module, x: Tensor, factor: Tensor | None, out: Tensor | None = None) -> Tensor:
    """norm(x)·factor for x [B, L, K]; factor [B or 1, K], None = ones. out: a tensor like x, or x itself, to be written
    and returned.
    """
    if takes_options(norm, RMSNorm) and fused.usable(x) and norm.takes(x):  # type: ignore[operator]
        y: Tensor = norm(x, out=out, factor=factor)
    else:
        y = norm(x) if factor is None else norm(x) * factor[:, None].to(x.dtype)
    return y if out is None or y is out else out.copy_(y)


FUSED = (RMSNorm,)
# Those whose forward rotates and takes `out`.
ROTATING = (TorchRMSNorm, RMSNorm)


def rotates(norm: object, heads: Tensor) -> bool:
    """Whether `norm` may be called with options on heads [..., D] like these."""
    return any(takes_options(norm, cls) for cls in ROTATING) and norm.takes(heads)  # type: ignore[attr-defined]
