"""Keeping most of a model in host memory, by diffusers' group offloading."""

from __future__ import annotations

from typing import Any

import torch

from ...errors import SVDQuantError
from ._base import NunchakuModel


class OffloadingModel(NunchakuModel):
    """A diffusers model of which a few blocks at a time are on the accelerator once offloading is asked for.

    Offloading starts when the model is sent to an accelerator: a pipeline that offloads by other means
    (`enable_sequential_cpu_offload`, `enable_model_cpu_offload`) is not hindered, and on a CPU nothing happens.
    """

    # (use_pin_memory, num_blocks_on_gpu) once asked for; None = the model moves as a whole.
    _offload: tuple[bool, int] | None = None

    def set_offload(
        self, offload: bool, use_pin_memory: bool = True, num_blocks_on_gpu: int = 1, **_kwargs: Any
    ) -> None:
        """Asks for offloading, or ends it and brings the model to the accelerator it was offloaded from.

        use_pin_memory: host memory that the accelerator reads while it computes. num_blocks_on_gpu: how many blocks
        come at once; with 1, the next one is copied meanwhile.
        """
        if num_blocks_on_gpu < 1:
            raise SVDQuantError(f"num_blocks_on_gpu={num_blocks_on_gpu} is less than 1")
        model: Any = self
        onload = _end_group_offload(model)
        self._offload = (use_pin_memory, num_blocks_on_gpu) if offload else None
        where = onload or model.device
        if where.type not in ("cpu", "meta"):
            model.to(where)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = self
        where = next((_as_device(a) for a in (*args, kwargs.get("device")) if _as_device(a) is not None), None)
        # A model with accelerate's hook is moved by that hook, whole, by the user's wish.
        if self._offload is None or where is None or where.type in ("cpu", "meta") or hasattr(self, "_hf_hook"):
            return super().to(*args, **kwargs)  # type: ignore[misc]
        if not _is_group_offloaded(model):
            super().to("cpu")  # type: ignore[misc]
            _group_offload(model, where, *self._offload)
        return self


def _as_device(value: Any) -> torch.device | None:
    if isinstance(value, torch.device):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return torch.device("cuda", value)
    if isinstance(value, str):
        try:
            return torch.device(value)
        except RuntimeError:
            return None
    return None


def _group_offload(model: Any, onload: torch.device, use_pin_memory: bool, blocks: int) -> None:
    stream = blocks == 1 and onload.type in ("cuda", "xpu")
    model.enable_group_offload(
        onload_device=onload,
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=blocks,
        use_stream=stream,
        non_blocking=stream,
        # True pins a block when it is needed instead of keeping all of them pinned.
        low_cpu_mem_usage=not use_pin_memory,
    )


def _is_group_offloaded(model: Any) -> bool:
    from diffusers.hooks.group_offloading import _is_group_offload_enabled

    return _is_group_offload_enabled(model)


def _end_group_offload(model: Any) -> torch.device | None:
    """The accelerator that the model was offloaded from, None where it was not."""
    if not _is_group_offloaded(model):
        return None
    from diffusers.hooks import HookRegistry
    from diffusers.hooks.group_offloading import (
        _GROUP_OFFLOADING,
        _LAYER_EXECUTION_TRACKER,
        _LAZY_PREFETCH_GROUP_OFFLOADING,
        _get_group_onload_device,
    )

    onload: torch.device = _get_group_onload_device(model)
    registry = HookRegistry.check_if_exists_or_initialize(model)
    for hook in (_GROUP_OFFLOADING, _LAYER_EXECUTION_TRACKER, _LAZY_PREFETCH_GROUP_OFFLOADING):
        registry.remove_hook(hook, recurse=True)
    return onload
