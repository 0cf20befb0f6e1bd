"""FLUX.1-dev's transformer with random weights, straight on the device in the format of each contender."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...config import SVDQuantConfig
from ...families import fused
from ...nn import SVDQuantLinear, make_layer, quantized_layers, replace_module
from ...ptq import make_plan
from .data import STD, random_record
from .modules import FP8Linear, NF4Linear
from .peers import bitsandbytes_nf4, dense_linear, torchao_fp8
from .settings import Picture

BLOCKS = ("transformer_blocks", "single_transformer_blocks")


def meta_model(flux: dict[str, Any], blocks: tuple[int, int] | None, dtype: torch.dtype) -> Any:
    """The transformer without memory. Raises ImportError without diffusers."""
    from diffusers import FluxTransformer2DModel

    if blocks is not None:
        flux = flux | {"num_layers": blocks[0], "num_single_layers": blocks[1]}
    with torch.device("meta"):
        return FluxTransformer2DModel(**flux).to(dtype).eval().requires_grad_(False)


def model_inputs(model: Any, picture: Picture, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Of one step: packed latents, text, guidance, positions."""
    g, config = torch.Generator(device).manual_seed(0), model.config
    batch, side = picture.batch, round(picture.image**0.5)

    def noise(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, device=device).to(dtype)

    positions = torch.zeros(picture.image, 3, device=device)
    positions[:, 1] = torch.arange(picture.image, device=device) // side
    positions[:, 2] = torch.arange(picture.image, device=device) % side
    return {
        "hidden_states": noise(batch, picture.image, config.in_channels),
        "encoder_hidden_states": noise(batch, picture.text, config.joint_attention_dim),
        "pooled_projections": noise(batch, config.pooled_projection_dim),
        "timestep": torch.full((batch,), 0.5, device=device, dtype=dtype),
        "guidance": torch.full((batch,), 3.5, device=device, dtype=torch.float32),
        "img_ids": positions,
        "txt_ids": torch.zeros(picture.text, 3, device=device),
        "return_dict": False,
    }


def bf16_model(meta: Any, device: torch.device) -> Any:
    return _materialised(copy.deepcopy(meta), device)


def fp8_model(meta: Any, device: torch.device) -> Any:
    """Every linear of a block in row-wise FP8, modulation included."""
    return _converted(meta, device, lambda linear: FP8Linear(linear.weight.data, linear.bias.data))


def nf4_torch_model(meta: Any, device: torch.device) -> Any:
    return _converted(meta, device, lambda linear: NF4Linear(linear.weight.data, linear.bias.data))


def bitsandbytes_model(meta: Any, device: torch.device) -> Any:
    return _converted(meta, device, bitsandbytes_nf4)


def torchao_model(meta: Any, device: torch.device) -> Any:
    def convert(linear: nn.Linear) -> nn.Module:
        holder = nn.Sequential(linear)
        torchao_fp8(holder)
        return holder[0]

    return _converted(meta, device, convert)


def random_quantized(meta: Any, config: SVDQuantConfig, device: torch.device) -> Any:
    """What `svdquant.quantize` would make of the model, with random numbers in it. meta: on the meta device."""
    made = copy.deepcopy(meta)
    plan = make_plan(meta, config)
    dtype = next(meta.parameters()).dtype
    shared: dict[str, Any] = {}
    for number, (name, layer) in enumerate(plan.layers.items()):
        if layer.spec is None:
            continue
        original: Any = meta.get_submodule(name)
        bias = original.bias is not None or bool(layer.spec.unsigned)
        t = random_record(layer.in_features, layer.out_features, layer.spec, dtype, device, number, bias)
        # Layers that read the same tensor have the same smoothing and down-projection.
        first = shared.setdefault(layer.group, t)
        for part in ("smooth_factor", "proj_down"):
            value = getattr(first, part)
            setattr(t, part, None if value is None else value.clone())
        replace_module(made, name, make_layer(original, t))
    made = _materialised(made, device)
    fused.install(made)
    return made


def _block_linears(model: Any) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in list(model.named_modules()):
        if name.startswith(tuple(f"{block}." for block in BLOCKS)) and type(module) is nn.Linear:
            yield name, module


def _converted(meta: Any, device: torch.device, convert: Callable[[nn.Linear], nn.Module]) -> Any:
    """One linear at a time has its 16-bit weight."""
    made = copy.deepcopy(meta)
    g = torch.Generator(device).manual_seed(1)
    for name, linear in _block_linears(meta):
        n, k = linear.weight.shape
        weight = (torch.randn(n, k, generator=g, device=device) * STD).to(linear.weight.dtype)
        replace_module(made, name, convert(dense_linear(weight, torch.zeros(n, device=device, dtype=weight.dtype))))
    return _materialised(made, device)


def _materialised(model: Any, device: torch.device) -> Any:
    """Random numbers in whatever is still on the meta device."""
    g = torch.Generator(device).manual_seed(2)
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        if not any(p.is_meta for p in own.values()):
            continue
        module.to_empty(device=device, recurse=False)
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1:
                parameter.data.normal_(0, STD, generator=g)
            else:
                parameter.data.fill_(1.0 if name.endswith("weight") else 0.0)
    return model.eval().requires_grad_(False)


def compile_blocks(model: Any, backend: str) -> dict[nn.Module, Any]:
    """Block → its compiled call. Each by itself, as diffusers' `compile_repeated_blocks` does it."""
    compiled = {}
    for name in BLOCKS:
        for block in getattr(model, name):
            block.compile(dynamic=False, backend=backend)
            compiled[block] = block._compiled_call_impl
    return compiled


def set_compiled(model: Any, compiled: dict[nn.Module, Any]) -> None:
    """Runs a model's blocks by the compiled calls given, or eagerly where there are none."""
    for name in BLOCKS:
        for block in getattr(model, name):
            block._compiled_call_impl = compiled.get(block)


def dequantized_block(block: nn.Module) -> nn.Module:
    """A copy with the dense weights of its quantized layers, run by diffusers' own forward."""
    made = copy.deepcopy(block)
    for name, layer in quantized_layers(made).items():
        assert isinstance(layer, SVDQuantLinear)
        replace_module(made, name, layer.dequantize())
    fused.uninstall(made)
    return made
