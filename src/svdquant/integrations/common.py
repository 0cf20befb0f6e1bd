"""What both libraries' quantizers share: marks, refusals of calls that would corrupt weights, and turning back."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor, nn

from ..config import QuantizationMethod, SVDQuantConfig
from ..errors import SVDQuantError
from ..nn import quantized_layers, replace_module


def _refuse_fusion(*_args: Any, **_kwargs: Any) -> NoReturn:
    raise SVDQuantError(
        "fuse_qkv_projections() would join weights that svdquant keeps packed; leave it out, or call "
        "model.dequantize() first"
    )


def _refuse_layerwise_casting(*_args: Any, **_kwargs: Any) -> NoReturn:
    raise SVDQuantError(
        "enable_layerwise_casting() would store the scales and the low-rank branch in 8 bits; leave it out, the model "
        "is smaller than that already"
    )


# Module-level functions: they survive deepcopy and pickle as attributes of a model.
_MODEL_REFUSALS = {
    "fuse_qkv_projections": _refuse_fusion,
    "enable_layerwise_casting": _refuse_layerwise_casting,
}


def protect(model: nn.Module) -> None:
    """Makes the methods that read or cast weights behind the layers' back raise `SVDQuantError`, on this model only."""
    for name, refusal in _MODEL_REFUSALS.items():
        if hasattr(type(model), name):
            setattr(model, name, refusal)
    for module in model.modules():
        if hasattr(type(module), "fuse_projections"):
            module.fuse_projections = _refuse_fusion  # type: ignore[assignment]


def unprotect(model: nn.Module) -> None:
    """Undoes `protect`."""
    for name in _MODEL_REFUSALS:
        model.__dict__.pop(name, None)
    for module in model.modules():
        module.__dict__.pop("fuse_projections", None)


def record_layers(model: nn.Module, config: SVDQuantConfig) -> SVDQuantConfig:
    """A copy of `config` that names the quantized layers which the model has."""
    layers = quantized_layers(model).items()
    # PEFT puts a layer with adapters one level down; it is stored under the name it had.
    return config.with_layers({name.replace(".base_layer", ""): layer.spec for name, layer in layers})  # type: ignore[misc]


def mark(model: Any, quantizer: Any) -> None:
    """The attributes by which diffusers and transformers recognise a quantized model."""
    model.is_quantized = True
    model.quantization_method = QuantizationMethod.SVDQUANT
    model.hf_quantizer = quantizer


def dequantize_layers(model: nn.Module) -> None:
    """Replaces every quantized layer by a dense one; hooks of accelerate move along.

    Raises `SVDQuantError` where weights are offloaded, before anything is replaced.
    """
    layers = quantized_layers(model)
    for name, layer in layers.items():
        if any(p.is_meta for p in layer.parameters()):
            raise SVDQuantError(f"{name} is offloaded; call remove_all_hooks() on the pipeline, then dequantize")
    for name, layer in layers.items():
        dense = layer.dequantize()  # type: ignore[operator]
        hook = getattr(layer, "_hf_hook", None)
        if hook is not None:
            from accelerate.hooks import add_hook_to_module, remove_hook_from_module

            remove_hook_from_module(layer)
            add_hook_to_module(dense, hook)
        replace_module(model, name, dense)


def refuse_adapters(state_dict: dict[str, Tensor]) -> None:
    """A checkpoint with adapters in it would load nowhere: raises `SVDQuantError`."""
    for name in state_dict:
        if ".base_layer." in name:
            raise SVDQuantError(
                f"a LoRA is attached to {name.partition('.base_layer.')[0]}; call unload_lora_weights() before saving"
            )
        if name.endswith(".fused_down"):
            raise SVDQuantError(
                f"a LoRA is fused into {name.rpartition('.')[0]}, whose stored format has no low-rank branch; call "
                "unfuse_lora() before saving, or bake it in by `svdquant lora merge`"
            )
