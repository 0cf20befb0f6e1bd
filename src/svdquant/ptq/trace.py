"""One forward with hooks: which linears run, which of them read the same tensor, and which follow a GELU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import SVDQuantError

Run = Callable[[nn.Module], Any]


@dataclass(frozen=True)
class LayerTrace:
    """What one linear was given.

    source: number of the tensor it read, equal for all that read the same one; dims: of that tensor;
    gelu: column ranges [start, stop) that come straight out of a GELU; segments: all column ranges, where the tensor
    was concatenated from several.
    """

    source: int
    dims: int
    gelu: tuple[tuple[int, int], ...]
    segments: tuple[tuple[int, int], ...]


class _Provenance(TorchFunctionMode):
    """Remembers which tensors are a GELU's output and which are concatenations along the last dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.gelu: set[tuple[int, int, int]] = set()
        self.parts: dict[tuple[int, int, int], list[tuple[int, bool]]] = {}
        # Storages are told apart by address, so none may be freed and handed out again meanwhile.
        self.alive: list[Tensor] = []
        self.bytes_alive = 0

    def keep(self, x: Tensor) -> None:
        self.alive.append(x)
        if not x.is_meta:
            self.bytes_alive += x.numel() * x.element_size()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name == "gelu" and isinstance(out, Tensor):
            self.keep(out)
            self.gelu.add(storage_key(out))
        elif name in ("cat", "concat", "concatenate") and isinstance(out, Tensor):
            pieces = list(args[0] if args else kwargs["tensors"])
            dim = (args[1] if len(args) > 1 else (kwargs or {}).get("dim", (kwargs or {}).get("axis", 0))) % out.ndim
            if dim == out.ndim - 1:
                self.keep(out)
                self.parts[storage_key(out)] = [(p.shape[-1], storage_key(p) in self.gelu) for p in pieces]
        return out


def storage_key(x: Tensor) -> tuple[int, int, int]:
    """Equal for views of one whole tensor in one state; a change in place makes it another."""
    version = 0 if x.is_inference() else x._version
    return x.untyped_storage()._cdata, x.numel(), version


# Past this, what earlier blocks read is forgotten: tensors are rarely shared across blocks, and never if this large.
_KEPT_BYTES = 2 << 30


class _FirstForwardDone(BaseException):
    """Not an `Exception`, so that a pipeline's own error handling lets it through."""


def trace_forward(model: nn.Module, blocks: dict[str, str], run: Run) -> dict[str, LayerTrace]:
    """Runs `run(model)` up to the end of the model's first forward. Layers that did not run are absent.

    blocks: name of each layer to watch → name of the block that it stands in.

    Raises `SVDQuantError` where `run` never calls the model.
    """
    provenance = _Provenance()
    traces: dict[str, LayerTrace] = {}
    sources: dict[tuple[Any, ...], int] = {}
    current_block, counter = "", 0

    def hook_for(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            nonlocal current_block, counter
            if blocks[name] != current_block and provenance.bytes_alive > _KEPT_BYTES:
                provenance.__init__()  # type: ignore[misc]
                sources.clear()
            current_block = blocks[name]
            provenance.keep(x)
            key = storage_key(x)
            counter += 1
            source = sources.setdefault((*key, x.storage_offset(), x.shape[-1]), counter)
            if isinstance(module, nn.Conv2d):
                # Its columns are the channels, which no concatenation along the last dimension touches.
                parts = [(x.shape[1], key in provenance.gelu)]
            else:
                parts = provenance.parts.get(key, [])
                if sum(width for width, _ in parts) != x.shape[-1]:
                    # Reshaped since: its columns are no longer those that were concatenated.
                    parts = [(x.shape[-1], key in provenance.gelu and not parts)]
            segments, gelu, start = [], [], 0
            for width, is_gelu in parts:
                segments.append((start, start + width))
                if is_gelu:
                    gelu.append((start, start + width))
                start += width
            # Module hooks run inside the provenance mode; only the first call of a shared module counts.
            traces.setdefault(name, LayerTrace(source, x.ndim, tuple(gelu), tuple(segments)))

        return hook

    def stop(*_: Any) -> None:
        raise _FirstForwardDone

    handles = [model.get_submodule(name).register_forward_pre_hook(hook_for(name), with_kwargs=True) for name in blocks]
    handles.append(model.register_forward_hook(stop))
    try:
        with torch.no_grad(), provenance:
            run(model)
    except _FirstForwardDone:
        return traces
    finally:
        for handle in handles:
            handle.remove()
    raise SVDQuantError(
        f"calibrate returned without calling {type(model).__name__}; it must run the very model that is quantized"
    )
