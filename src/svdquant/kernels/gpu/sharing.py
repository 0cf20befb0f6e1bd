"""Layers that read the same tensor one after another: it is quantized for the first of them alone.

A CPU compares contents; here that would stop the device. The same tensor object, written to by nobody since, read by
layers of which a digest says that they smooth and take down alike, has the same codes. A layer that asks a second time
has them made anew: what torch does not count as writing (a compiler's reused buffers, other people's kernels) happens
between two forwards, not between the query and the key of one.
"""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...numerics import SVDQuantTensors
from .choice import choose, signature
from .trial import capturing


def reading_of(t: SVDQuantTensors) -> tuple[bytes, str]:
    """(digest of what a layer does to its input before the product, its signature for products).

    Kept in `t.memory` while the layer has the same parameters of the same type and nobody has written to them; moving
    or offloading a model changes none of that.
    """
    parameters = [p for p in (t.smooth_factor, t.proj_down) if p is not None]
    # References, because an address is given to another parameter once this one is gone.
    state = [(weakref.ref(p), p.dtype, 0 if p.is_inference() else p._version) for p in parameters]
    memory = t.memory
    if "reads" not in memory or not _same(memory["reads_from"], state):
        digest = hashlib.blake2b(digest_size=16)
        for p in parameters:
            digest.update(f"{p.dtype} {tuple(p.shape)}".encode())
            digest.update(p.detach().contiguous().view(torch.uint8).cpu().numpy().tobytes())
        memory["reads_from"] = state
        memory["reads"] = digest.digest(), signature(t)
    found: tuple[bytes, str] = memory["reads"]
    return found


def _same(before: list[Any], now: list[Any]) -> bool:
    return len(before) == len(now) and all(
        a[0]() is b[0]() and a[1:] == b[1:] for a, b in zip(before, now, strict=True)
    )


@dataclass
class _Last:
    """The input that a thread has quantized last. served: layers that had these codes."""

    tensor: weakref.ref[Tensor]
    key: tuple[Any, ...]
    prepared: Any
    served: set[int] = field(default_factory=set)


class _Local(threading.local):
    last: _Last | None = None


_local = _Local()


def shared(x: Tensor, t: SVDQuantTensors, activations: str, make: Callable[[], Any]) -> Any:
    """What `make` prepares of x for a layer, or what was prepared of this x for one that reads it alike.

    x: as the layer was called with it, before any reshaping. t: a record that is kept between calls, as layers do: a
    digest takes longer than quantizing.
    """
    if x.is_inference() or capturing(x.device):
        # Writing is not counted, or what is launched now runs later.
        return make()
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
    product = choose(t, activations, x.dtype, x.device)
    how = (reading_of(t)[0], t.spec, t.in_features, activations, product)
    key = (how, x.data_ptr(), x._version, x.shape, x.stride(), stream)
    layer, last = id(t.memory), _local.last
    if last is not None and last.tensor() is x and last.key == key and layer not in last.served:
        last.served.add(layer)
        return last.prepared
    prepared = make()
    _local.last = _Last(weakref.ref(x, _forget), key, prepared, {layer})
    return prepared


def _forget(gone: weakref.ref[Tensor]) -> None:
    """Codes live no longer than the input."""
    last = _local.last
    if last is not None and last.tensor is gone:
        _local.last = None
