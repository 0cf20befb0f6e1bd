"""Tensors that exist when they are asked for: a checkpoint is converted by its names, then read one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


class LazyTensor:
    """A tensor that is yet to be read, or what cutting, joining and reshaping such tensors gives.

    It answers questions of shape and type at once; any operation on it (a function of torch, a method, an index) gives
    another one. `value()` computes it, from the file each time; of what was cut into pieces, the last is kept.
    """

    def __init__(self, read: Callable[[], Tensor], like: Tensor, sources: frozenset[str]) -> None:
        """read: makes the tensor. like: one of its shape and type on the meta device. sources: names of the tensors
        of the file that it is made of."""
        self._read, self.like, self.sources = read, like, sources

    def value(self) -> Tensor:
        return self._read()

    @property
    def shape(self) -> torch.Size:
        return self.like.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.like.dtype

    @classmethod
    def __torch_function__(
        cls, function: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _recorded(function, args, kwargs or {})

    def __getitem__(self, index: Any) -> Any:
        return _recorded(Tensor.__getitem__, (self, index), {})

    def __getattr__(self, name: str) -> Any:
        """Methods and properties of tensors: `ndim`, `chunk`, `reshape`, …"""
        if name.startswith("_"):
            raise AttributeError(name)
        found = getattr(self.like, name)
        if isinstance(found, Tensor):
            return _recorded(lambda tensor: getattr(tensor, name), (self,), {})
        if not callable(found):
            return found
        method = getattr(Tensor, name)
        return lambda *args, **kwargs: _recorded(method, (self, *args), kwargs)

    def __bool__(self) -> bool:
        return bool(self.value())


def _recorded(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    like = function(*_replaced(args, "like"), **_replaced(kwargs, "like"))
    sources = frozenset().union(*(lazy.sources for lazy in _within((args, kwargs))))

    def compute() -> Any:
        return function(*_replaced(args, "value"), **_replaced(kwargs, "value"))

    if isinstance(like, Tensor):
        return LazyTensor(compute, like, sources)
    if isinstance(like, (tuple, list)) and all(isinstance(part, Tensor) for part in like):
        return tuple(LazyTensor(_part(compute, number), part, sources) for number, part in enumerate(like))
    return like


# The pieces that one tensor was cut into last: they are asked for one after another.
_latest: list[tuple[Callable[[], Any], Any]] = []


def _part(compute: Callable[[], Any], number: int) -> Callable[[], Tensor]:
    def piece() -> Tensor:
        if not _latest or _latest[0][0] is not compute:
            forget()
            _latest.append((compute, compute()))
        part: Tensor = _latest[0][1][number]
        return part

    return piece


def forget() -> None:
    """Gives back what is kept of the tensor that was cut last."""
    _latest.clear()


def _replaced(data: Any, by: str) -> Any:
    """Arguments with meta tensors ("like") or computed ones ("value") in place of the lazy ones."""
    if isinstance(data, LazyTensor):
        return data.like if by == "like" else data.value()
    if isinstance(data, (tuple, list)) and not isinstance(data, torch.Size):
        return type(data)(_replaced(part, by) for part in data)
    if isinstance(data, dict):
        return {key: _replaced(part, by) for key, part in data.items()}
    return data


def _within(data: Any) -> Iterator[LazyTensor]:
    if isinstance(data, LazyTensor):
        yield data
    elif isinstance(data, (tuple, list)):
        for part in data:
            yield from _within(part)
    elif isinstance(data, dict):
        yield from _within(list(data.values()))
