"""Adapters per entry of a batch: what a server needs that draws pictures of several users at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..errors import SVDQuantError
from ..nn.adapters import Requests


@contextmanager
def adapters_per_request(
    model: Any, requests: Sequence[Mapping[str, float] | str | Sequence[str] | None]
) -> Iterator[None]:
    """Inside, entry i of every batch is drawn with the adapters of `requests[i]`, whatever `set_adapters` said.

    model: a quantized model with its adapters loaded, or a pipeline (then its denoisers). requests: for each picture
    adapter → strength, a name or names (strength 1), or None for none. A batch that is a multiple as long, as with
    guidance (all without the prompt, then all with it), takes the list again from its start. A picture is what it is
    alone, up to what batches do to layers in 16 bits. The model draws one batch at a time.

    Raises `SVDQuantError` for an adapter that is not loaded or is no plain LoRA; when drawing, for a batch that the
    requests do not divide.
    """
    chosen = Requests(tuple(_strengths(request) for request in requests))
    if not chosen.sets:
        raise SVDQuantError("requests is empty; give one entry per picture")
    models = [model] if isinstance(model, nn.Module) else denoisers(model)
    _check_loaded(models, chosen.names)
    layers = [layer for m in models for layer in _layers(m, chosen.names)]
    before = [layer.__dict__.get("requests") for layer in layers]
    try:
        for layer in layers:
            layer.requests = chosen
        yield
    finally:
        for layer, earlier in zip(layers, before, strict=True):
            del layer.requests
            if earlier is not None:
                layer.requests = earlier


def denoisers(pipeline: Any) -> list[nn.Module]:
    """The components of a pipeline that draw."""
    parts = (getattr(pipeline, name, None) for name in ("transformer", "transformer_2", "unet"))
    return [part for part in parts if isinstance(part, nn.Module)]


def _strengths(request: Any) -> dict[str, float]:
    if request is None:
        return {}
    if isinstance(request, str):
        return {request: 1.0}
    if isinstance(request, Mapping):
        return {name: float(strength) for name, strength in request.items()}
    return dict.fromkeys(request, 1.0)


def _check_loaded(models: list[nn.Module], names: set[str]) -> None:
    loaded = {name for model in models for name in getattr(model, "peft_config", {})}
    if missing := sorted(names - loaded):
        there = ", ".join(sorted(loaded)) or "none"
        raise SVDQuantError(f"adapter {missing[0]!r} is not loaded (loaded: {there}); call load_lora_weights first")


def _layers(model: nn.Module, names: set[str]) -> list[Any]:
    from .differences import differences_of
    from .peft_dense import RequestLayer, adopt
    from .switching import lora_layers

    kept = differences_of(model)
    if kept is not None and (changed := sorted(names & kept.adapters.keys())):
        raise SVDQuantError(
            f"adapter {changed[0]!r} changes {next(iter(kept.adapters[changed[0]]))}, in which requests of one batch "
            "cannot differ; draw its pictures in a batch of their own"
        )
    adopt(model)
    layers = lora_layers(model)
    for layer in layers:
        if isinstance(layer, RequestLayer):
            continue
        if any(name in getattr(layer, kind, ()) for kind in layer.adapter_layer_names for name in names):
            raise SVDQuantError(
                f"an adapter changes a {type(layer.get_base_layer()).__name__} by {type(layer).__name__}, in which "
                "requests of one batch cannot differ"
            )
    return [layer for layer in layers if isinstance(layer, RequestLayer)]
