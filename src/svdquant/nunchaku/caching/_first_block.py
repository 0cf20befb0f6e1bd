"""First-block caching on diffusers' hooks: a step whose first block changes little takes the rest from the step before.

diffusers' `apply_first_block_cache` does the work. Added here: one cache per stack of blocks, a context for pipelines
that set none, a fresh start for every drawing, models without diffusers' `CacheMixin`.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from diffusers.hooks import FirstBlockCacheConfig, HookRegistry, apply_first_block_cache
from diffusers.models.cache_utils import CacheMixin
from torch import Tensor, nn

from ...errors import SVDQuantError

_STACKS = ("transformer_blocks", "single_transformer_blocks")
_CONTEXT = "svdquant"


def apply(model: nn.Module, thresholds: dict[tuple[str, ...], float]) -> nn.Module:
    """Caches every group of stacks by itself, in place of any earlier cache. Returns the model.

    thresholds: names of block lists that are skipped together → largest relative change of the first one's first
    block, mean|r−r'|/mean|r'| with r = out − in, at which they are skipped; 0 and less skip nothing.
    Raises `SVDQuantError` for a model without such lists of blocks.
    """
    _register_blocks()
    present = {tuple(name for name in names if _blocks(model, name)): t for names, t in thresholds.items()}
    if not any(present):
        raise SVDQuantError(f"{type(model).__name__} has no list of transformer blocks to skip; draw without the cache")
    remove(model)
    managers = []
    for names, threshold in present.items():
        # A lone block is its own first block: nothing is left to skip.
        if threshold <= 0 or sum(len(_blocks(model, name)) for name in names) < 2:
            continue
        stack = nn.Module()
        for name in names:
            setattr(stack, name, getattr(model, name))
        apply_first_block_cache(stack, FirstBlockCacheConfig(threshold=threshold))
        managers.append(_leader(_blocks(model, names[0])[0]).state_manager)
    if managers:
        _forget_registries(HookRegistry.check_if_exists_or_initialize(model))
        holder: Any = model
        holder._svdquant_first_block = _FreshStart(model, managers)
        if isinstance(model, CacheMixin):
            holder._cache_config = FirstBlockCacheConfig(threshold=max(thresholds.values()))
        else:
            # Pipelines call it at the end of a drawing.
            holder._reset_stateful_cache = functools.partial(CacheMixin._reset_stateful_cache, holder)
    return model


def remove(model: nn.Module) -> None:
    """Undoes `apply`, or diffusers' own `enable_cache`. Idempotent."""
    from diffusers.hooks.first_block_cache import _FBC_BLOCK_HOOK, _FBC_LEADER_BLOCK_HOOK

    if isinstance(model, CacheMixin) and model.is_cache_enabled:
        model.disable_cache()
    registry = HookRegistry.check_if_exists_or_initialize(model)
    for hook in (_FBC_LEADER_BLOCK_HOOK, _FBC_BLOCK_HOOK):
        registry.remove_hook(hook, recurse=True)
    _forget_registries(registry)
    model.__dict__.pop("_reset_stateful_cache", None)
    if fresh_start := model.__dict__.pop("_svdquant_first_block", None):
        for handle in fresh_start.handles:
            handle.remove()


class _FreshStart:
    """Hooks of the whole model: a context where the pipeline sets none, and nothing left over from another drawing.

    torch's hooks, not diffusers': offloading may be switched on and off around them.
    """

    def __init__(self, model: nn.Module, managers: list[Any]) -> None:
        self.managers = managers
        self.handles = (
            model.register_forward_pre_hook(self.before, with_kwargs=True),
            model.register_forward_hook(self.after, always_call=True),
        )
        self._last: tuple[float, torch.Size] | None = None
        self._open: Any = None

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = inspect.signature(type(module).forward).bind_partial(module, *args, **kwargs).arguments
        step = (_first(bound.get("timestep")), bound["hidden_states"].shape)
        # A controlnet adds to the stream between blocks; what is added to skipped ones would count twice.
        added = any(bound.get(f"controlnet_{kind}samples") is not None for kind in ("block_", "single_block_"))
        if added or self._last is None or step[0] > self._last[0] or step[1] != self._last[1]:
            for manager in self.managers:
                context = _context(manager)
                manager.reset()
                manager.set_context(context)
        self._last = step
        if _context(self.managers[0]) is None:
            self._open = CacheMixin.cache_context(module, _CONTEXT)  # type: ignore[arg-type]
            self._open.__enter__()

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._open is not None:
            opened, self._open = self._open, None
            opened.__exit__(None, None, None)


def _context(manager: Any) -> Any:
    """What the pipeline calls this forward ("cond", "uncond"); the attribute's name depends on the release."""
    return getattr(manager, "_context", None) or getattr(manager, "_current_context", None)


def _first(timestep: Tensor | float | None) -> float:
    """Noise falls from step to step; a model without that argument never looks as if it began anew."""
    if timestep is None:
        return 0.0
    return float(timestep.flatten()[0]) if isinstance(timestep, Tensor) else float(timestep)


def _blocks(model: nn.Module, name: str) -> Any:
    blocks = getattr(model, name, None)
    return blocks if isinstance(blocks, nn.ModuleList) and len(blocks) else ()


def _leader(block: Any) -> Any:
    from diffusers.hooks.first_block_cache import _FBC_LEADER_BLOCK_HOOK

    return block._diffusers_hook.get_hook(_FBC_LEADER_BLOCK_HOOK)


def _forget_registries(registry: Any) -> None:
    # Releases differ: newer ones remember which children have hooks.
    if hasattr(registry, "invalidate_child_registries_cache"):
        registry.invalidate_child_registries_cache()


def _register_blocks() -> None:
    """Tells diffusers what SANA's blocks take and return; it knows the other families."""
    from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
    from diffusers.models.transformers.sana_transformer import SanaTransformerBlock

    TransformerBlockRegistry.register(SanaTransformerBlock, TransformerBlockMetadata(return_hidden_states_index=0))
