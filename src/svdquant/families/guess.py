"""Inputs for one small forward of a diffusers denoiser that has no family file, from its signature and configuration.

A forward that fails tells how far it came. Starting from the likeliest value of every parameter, one parameter at a
time takes its other candidates; what comes further is kept, until a forward runs through or the trials are used up.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from .candidates import ABSENT, Same, candidates

MAX_TRIALS = 80
# Calls of torch in all trials together: about five seconds. Counted, not timed, so that a slow machine plans the same.
MAX_CALLS = 50_000


def guess_inputs(model: nn.Module, attempt: Callable[[dict[str, Any]], None]) -> None:
    """Calls `attempt(inputs)`, which runs `model` on the meta device, until it raises nothing.

    inputs: keyword arguments of `forward`. Raises what the trial that came furthest raised.
    """
    values = candidates(model)
    trials = _Trials(values, attempt)
    chosen = dict.fromkeys(values, 0)
    reached, error = trials.run(chosen)
    improved = True
    while error is not None and improved:
        improved = False
        for name, made in values.items():
            for i in range(len(made)):
                if i == chosen[name] or error is None:
                    continue
                if trials.spent:
                    raise error
                further, failed = trials.run(chosen | {name: i})
                if further > reached:
                    reached, error, improved = further, failed, True
                    chosen[name] = i
    if error is not None:
        raise error


@contextmanager
def values_optional() -> Iterator[None]:
    """Within, a model on the meta device takes tensors with values beside those without."""
    with _Masquerade(), _Valueless():
        yield


class _Trials:
    """Runs a forward with candidates and says how far it came; keeps account of what that cost."""

    def __init__(self, values: dict[str, list[Any]], attempt: Callable[[dict[str, Any]], None]) -> None:
        self.values, self.attempt = values, attempt
        self.trials, self.calls = 0, 0

    @property
    def spent(self) -> bool:
        return self.trials >= MAX_TRIALS or self.calls >= MAX_CALLS

    def run(self, chosen: dict[str, int]) -> tuple[float, Exception | None]:
        """(calls of torch that the forward made, what it raised); infinitely many where it ran through."""
        given = {name: self.values[name][i] for name, i in chosen.items()}
        given |= {name: given[value.name] for name, value in given.items() if isinstance(value, Same)}
        inputs = {name: value for name, value in given.items() if value is not ABSENT}
        count = _Masquerade(MAX_CALLS - self.calls)
        try:
            with warnings.catch_warnings(), count, _Valueless():
                warnings.simplefilter("ignore")
                self.attempt(inputs)
            return math.inf, None
        except Exception as error:
            return count.calls, error
        finally:
            self.trials += 1
            self.calls += count.calls


class _Masquerade(TorchFunctionMode):
    """Meta tensors say that they are on the CPU; counts calls of torch and stops at a limit.

    What a forward makes "on the same device" then has values, and autocast knows the device's name.
    """

    def __init__(self, limit: float = math.inf) -> None:
        super().__init__()
        self.calls, self.limit = 0, limit

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        if self.calls > self.limit:
            raise RuntimeError("no trials left")
        if getattr(func, "__self__", None) is Tensor.device:
            return torch.device("cpu")
        if func is Tensor.tolist and args[0].is_meta:
            return torch.ones(args[0].shape, dtype=args[0].dtype).tolist()
        return func(*args, **(kwargs or {}))


class _Valueless(TorchDispatchMode):
    """Lets tensors with and without values meet: the result has none. Where one is read nevertheless, it is 1."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        places = {x.is_meta for x in _tensors((*args, *kwargs.values()))}
        if True not in places:
            return func(*args, **kwargs)
        name = func._schema.name
        if name == "aten::_local_scalar_dense":
            return torch.ones((), dtype=args[0].dtype).item()
        if name == "aten::bincount":
            return torch.bincount(torch.ones(args[0].numel(), dtype=torch.int64))
        if name == "aten::nonzero":
            return torch.arange(args[0].numel(), device="meta")[:, None].repeat(1, args[0].ndim)
        if name == "aten::copy_" and not args[0].is_meta:
            return args[0]
        if name in ("aten::index", "aten::index_put", "aten::index_put_"):
            args = (args[0], [j for i in args[1] for j in _numbers(i)], *args[2:])
        if "device" in kwargs:
            kwargs = kwargs | {"device": torch.device("meta")}
        if False in places:
            args, kwargs = tree_map(_without_values, (args, kwargs))
        return func(*args, **kwargs)


def _tensors(arguments: Any) -> Iterator[Tensor]:
    for x in arguments:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, (list, tuple)):
            yield from _tensors(x)


def _numbers(index: Tensor | None) -> list[Tensor | None]:
    """A mask as the indices that it stands for; one without values stands for everything."""
    if index is None or index.dtype is not torch.bool:
        return [index]
    if not index.is_meta:
        return list(index.nonzero(as_tuple=True))
    return [torch.empty(index.numel(), dtype=torch.int64, device="meta") for _ in range(index.ndim)]


def _without_values(x: Any) -> Any:
    return torch.empty_like(x, device="meta") if isinstance(x, Tensor) and not x.is_meta else x


def skeleton_of(model: nn.Module) -> nn.Module | None:
    """The same diffusers model on the meta device, all in float32; None for others and where it cannot be made."""
    if not any(cls.__name__ == "ModelMixin" for cls in type(model).__mro__):
        return None
    diffusers_model: Any = model
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            config = {key: value for key, value in diffusers_model.config.items() if key != "quantization_config"}
            skeleton: nn.Module = type(diffusers_model).from_config(config).eval()
    except Exception:  # whatever a class raises that cannot be built from its own configuration
        return None
    return skeleton
