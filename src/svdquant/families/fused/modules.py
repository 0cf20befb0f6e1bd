"""Modules that many transformers of diffusers share: adaptive norms, and the GELU of a feed-forward."""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models import activations, normalization
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ...kernels import fused
from ...nn import SVDQuantLinear
from .inputs import Normalized, computed, on_gpu


def untouched(module: Any, cls: type) -> bool:
    """Whether nobody would notice that `module` is not called: it is of this very class and has no hooks."""
    hooked = module._forward_hooks or module._forward_pre_hooks or _has_any_global_hook()
    return type(module) is cls and "forward" not in module.__dict__ and not hooked


def takes_options(module: Any, cls: type) -> bool:
    """Whether a call of `module` reaches the forward of `cls` with all its arguments: hooks of accelerate (offloading)
    and diffusers (caches, group offloading) pass them on, adapters and other people's forwards need not.
    """
    hooked = hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook")
    # A subclass of a quantized layer, or an adapter around it, may have another forward: it says so itself.
    known = vars(type(module)).get("takes_options", False) if cls is SVDQuantLinear else type(module) is cls
    return known and (hooked or "forward" not in module.__dict__)


def linear(layer: Any, x: Tensor, gelu: bool = False, out: Tensor | None = None) -> Tensor:
    """layer(x), or its GELU (tanh); into `out` where given, which is returned."""
    if takes_options(layer, SVDQuantLinear):
        y: Tensor = layer(x, gelu=gelu, out=out)
    else:
        y = layer(x)
        if gelu:
            y = F.gelu(y, approximate="tanh")
    return y if out is None or y is out else out.copy_(y)


def gives_away(layer: Any) -> bool:
    """Whether what a call of `layer` returns is the caller's alone, to be written over: no hook may have kept it."""
    known = takes_options(layer, SVDQuantLinear) or untouched(layer, nn.Linear)
    return known and not layer._forward_hooks and not _has_any_global_hook()


def own(layer: Any, x: Tensor) -> Tensor:
    """layer(x), to be written over."""
    y: Tensor = layer(x)
    return y if gives_away(layer) else y.clone()


def modulated(norm: Any, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """norm(x)·(1 + scale) + shift for x [B, L, K]; scale, shift [B, K]."""
    if scale.dtype == x.dtype and untouched(norm, nn.LayerNorm) and norm.normalized_shape == x.shape[-1:]:
        return fused.norm_modulate(x, scale, shift, norm.eps, norm.weight, norm.bias)
    y: Tensor = norm(x)
    return y * (1 + scale[:, None]) + shift[:, None]


class RMSNorm(nn.RMSNorm):
    """Over heads [B, L, H, D]; rotates them and writes them to `out` where a fused attention processor asks for it."""

    @wraps(nn.RMSNorm.forward)
    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None = None, out: Tensor | None = None) -> Tensor:
        if rotary is None and out is None and not (x.dim() == 4 and fused.usable(x) and self.takes(x)):
            return super().forward(x)
        assert self.eps is not None
        return fused.norm_rotate(x, self.weight, self.eps, rotary, out)

    def takes(self, x: Tensor) -> bool:
        """Whether x [..., D] may be given with options."""
        same = self.weight is None or self.weight.dtype == x.dtype
        return same and self.eps is not None and self.normalized_shape == x.shape[-1:]


def normalized(norm: Any, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor | Normalized:
    """`modulated`, put off until somebody reads it where that may be fused with the norm."""
    plain = untouched(norm, nn.LayerNorm) and norm.weight is None and norm.bias is None
    fits = scale.dtype == x.dtype and norm.normalized_shape == x.shape[-1:] and x.dim() == 3
    if plain and fits and on_gpu(x):
        return Normalized(x, scale, shift, norm.eps)
    return modulated(norm, x, scale, shift)


class AdaLayerNormZero(normalization.AdaLayerNormZero):
    @wraps(normalization.AdaLayerNormZero.forward)
    def forward(
        self,
        x: Tensor,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        hidden_dtype: torch.dtype | None = None,
        emb: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        if not fused.usable(x):
            return super().forward(x, timestep, class_labels, hidden_dtype, emb)
        if self.emb is not None:
            emb = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
        y, *rest = self.put_off(x, emb)
        return computed(y), *rest

    def put_off(self, x: Tensor, emb: Tensor | None) -> tuple[Any, ...]:
        """The forward, with its norm put off."""
        shift, scale, *rest = self.linear(self.silu(emb)).chunk(6, dim=1)
        return normalized(self.norm, x, scale, shift), *rest


class AdaLayerNormZeroSingle(normalization.AdaLayerNormZeroSingle):
    @wraps(normalization.AdaLayerNormZeroSingle.forward)
    def forward(self, x: Tensor, emb: Tensor | None = None) -> tuple[Tensor, ...]:
        if not fused.usable(x):
            return super().forward(x, emb)
        y, gate = self.put_off(x, emb)
        return computed(y), gate

    def put_off(self, x: Tensor, emb: Tensor | None) -> tuple[Any, Tensor]:
        """The forward, with its norm put off."""
        shift, scale, gate = self.linear(self.silu(emb)).chunk(3, dim=1)
        return normalized(self.norm, x, scale, shift), gate


class AdaLayerNormContinuous(normalization.AdaLayerNormContinuous):
    @wraps(normalization.AdaLayerNormContinuous.forward)
    def forward(self, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
        if not fused.usable(x):
            return super().forward(x, conditioning_embedding)
        return modulated(self.norm, x, *self._modulation(x, conditioning_embedding))

    def put_off(self, x: Tensor, conditioning_embedding: Tensor) -> Tensor | Normalized:
        """The forward, with its norm put off."""
        return normalized(self.norm, x, *self._modulation(x, conditioning_embedding))

    def _modulation(self, x: Tensor, conditioning_embedding: Tensor) -> tuple[Tensor, Tensor]:
        scale, shift = self.linear(self.silu(conditioning_embedding).to(x.dtype)).chunk(2, dim=1)
        return scale, shift


class GELU(activations.GELU):
    @wraps(activations.GELU.forward)
    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.approximate != "tanh" or not fused.usable(hidden_states):
            return super().forward(hidden_states)
        return linear(self.proj, hidden_states, gelu=True)


FUSED = (RMSNorm, AdaLayerNormZero, AdaLayerNormZeroSingle, AdaLayerNormContinuous, GELU)
