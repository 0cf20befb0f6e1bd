"""How the FLUX transformer computes attention: Nunchaku's three settings on diffusers' processors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor
from torch import Tensor, nn

from ...errors import SVDQuantError
from ...families import fused
from ...families.fused.flux import heads_of

IMPLEMENTATIONS = ("flashattn2", "nunchaku-fp16", "custom")
_ALIASES = {"": "flashattn2", "default": "flashattn2"}
# Devices whose matrix units run float16 at full speed; processors convert it to and fro.
_FAST_FLOAT16 = ("cuda", "xpu", "mps")
AttentionFunction = Callable[[Tensor], Tensor]


class FluxFunctionProcessor(ABC):
    """A FLUX attention processor around a function of q, k and v, each [B, T, H, D], normalized and rotated."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """hidden_states [B, T, C]; the text stream [B, T', C] comes first in the joint sequence."""
        if attention_mask is not None:
            raise SVDQuantError("this attention implementation takes no mask; call set_attention_impl('flashattn2')")

        heads = heads_of(attn, hidden_states, encoder_hidden_states, image_rotary_emb)
        if heads is None:
            heads = _joint_heads(attn, hidden_states, encoder_hidden_states, image_rotary_emb)
        text = 0 if encoder_hidden_states is None else encoder_hidden_states.shape[1]
        y = self.attend(*heads).flatten(2).to(hidden_states.dtype)
        if encoder_hidden_states is None:
            return y
        image = attn.to_out[1](attn.to_out[0](y[:, text:].contiguous()))
        return image, attn.to_add_out(y[:, :text].contiguous())

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v [B, T, H, D] to [B, T, H, D]."""


def _joint_heads(
    attn: Any, image: Tensor, text: Tensor | None, rotary: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What the fused `heads_of` returns, by the modules themselves."""

    def project(linear: nn.Module, x: Tensor, norm: nn.Module | None = None) -> Tensor:
        y = linear(x).unflatten(-1, (attn.heads, -1))
        return y if norm is None else norm(y)

    q, k, v = project(attn.to_q, image, attn.norm_q), project(attn.to_k, image, attn.norm_k), project(attn.to_v, image)
    if text is not None:
        q = torch.cat([project(attn.add_q_proj, text, attn.norm_added_q), q], dim=1)
        k = torch.cat([project(attn.add_k_proj, text, attn.norm_added_k), k], dim=1)
        v = torch.cat([project(attn.add_v_proj, text), v], dim=1)
    if rotary is not None:
        q, k = (apply_rotary_emb(t, rotary, sequence_dim=1) for t in (q, k))
    return q, k, v


class Float16Processor(FluxFunctionProcessor):
    """torch's attention in float16 where the device is fast in it, in the model's type elsewhere."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.device.type in _FAST_FLOAT16:
            q, k, v = q.half(), k.half(), v.half()
        backend: Any = self._attention_backend or "native"
        return dispatch_attention_fn(q, k, v, backend=backend, parallel_config=self._parallel_config)


class CustomProcessor(FluxFunctionProcessor):
    """A user's function of qkv [B, T, 3, H, D] that returns [B, T, H, D]."""

    def __init__(self, function: AttentionFunction) -> None:
        self.function = function

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = self.function(torch.stack([q, k, v], dim=2))
        if y.shape != q.shape:
            raise SVDQuantError(
                f"attn_func returned the shape {list(y.shape)}; it must return [B, T, H, D] = {list(q.shape)}"
            )
        return y


def processor_for(implementation: str, function: AttentionFunction | None = None) -> tuple[Any, str]:
    """(a new processor, the backend of diffusers that it is to use).

    Raises `SVDQuantError` for an unknown name, and for "custom" without a function.
    """
    name = _ALIASES.get(implementation, implementation)
    if name not in IMPLEMENTATIONS:
        raise SVDQuantError(f"attention {implementation!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    if name == "custom":
        if not callable(function):
            raise SVDQuantError("attention 'custom' needs attn_func, a function of qkv [B, T, 3, H, D]")
        return CustomProcessor(function), "native"
    if name == "nunchaku-fp16":
        return Float16Processor(), "native"
    return FluxAttnProcessor(), "flash" if _has_flash() else "native"


class FluxAttentionMethods:
    """`set_attention_impl` of the FLUX transformers."""

    def set_attention_impl(self, impl: str, attn_func: AttentionFunction | None = None) -> None:
        """How attention is computed from now on.

        impl: "flashattn2" ("default", ""): the flash-attn package where it is installed beside CUDA, else torch's own
        attention. "nunchaku-fp16": torch's attention in float16 on accelerators, in the model's type on a CPU.
        "custom": `attn_func` gets qkv [B, T, 3, H, D] after normalization and rotary embedding, text tokens first,
        and returns [B, T, H, D].

        Processors of an IP adapter stay. Raises `SVDQuantError` for another name.
        """
        model: Any = self
        _, backend = processor_for(impl, attn_func)
        if model.dtype not in (torch.float16, torch.bfloat16):
            # flash-attn computes in nothing else.
            backend = "native"
        for module in model.modules():
            if not isinstance(module, FluxAttention):
                continue
            if isinstance(module.processor, (FluxAttnProcessor, FluxFunctionProcessor)):
                processor = processor_for(impl, attn_func)[0]
                processor._parallel_config = module.processor._parallel_config
                # On the processors alone: the model's set_attention_backend would also change every other model's.
                processor._attention_backend = _backend(backend)
                module.set_processor(processor)
        fused.install(model)


def _backend(name: str) -> Any:
    from diffusers.models.attention_dispatch import AttentionBackendName

    return AttentionBackendName(name)


def _has_flash() -> bool:
    from diffusers.models import attention_dispatch

    return torch.cuda.is_available() and bool(getattr(attention_dispatch, "_CAN_USE_FLASH_ATTN", False))
