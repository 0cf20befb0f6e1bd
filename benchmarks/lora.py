"""What adapters cost: switching them, drawing with them, keeping them; beside PEFT's own way, in one run.

    python benchmarks/lora.py [--rounds 9] [--threads N] [--width 3072] [--tokens 1024] [--json OUT]

Switching is measured on all 494 linears of FLUX.1-dev's blocks, narrow ones: it depends on their number, not on their
width (joining a set for the first time does, and is measured by the byte). Drawing is measured on one double and one
single block of real width. Memory is that of FLUX.1-dev's shapes.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

import svdquant
from svdquant.bench.device import make_device
from svdquant.bench.measure import Contender, Spread, measure
from svdquant.config import LayerSpec
from svdquant.integrations import attach, peft
from svdquant.integrations.switching import lora_layers
from svdquant.nn import empty_layer, replace_module

RANK = 16
MODULATION = ("norm.linear", "norm1.linear", "norm1_context.linear")


def flux(width: int, double: int, single: int, device: str = "cpu") -> FluxTransformer2DModel:
    """FLUX.1-dev of another width and depth."""
    head = 128 if width % 128 == 0 and width >= 512 else 64
    axes = (16, 56, 56) if head == 128 else (8, 28, 28)
    with torch.device(device):
        model = FluxTransformer2DModel(
            num_layers=double,
            num_single_layers=single,
            attention_head_dim=head,
            num_attention_heads=width // head,
            joint_attention_dim=64,
            pooled_projection_dim=64,
            guidance_embeds=True,
            axes_dims_rope=axes,
        )
    return model.to(torch.bfloat16).eval()


def block_linears(model: nn.Module) -> dict[str, Any]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "blocks." in n and ".lora_" not in n}


def quantized(model: FluxTransformer2DModel) -> FluxTransformer2DModel:
    """Layers with random contents in place of the blocks' linears: nothing is solved."""
    torch.manual_seed(0)
    for name, linear in block_linears(model).items():
        modulation = name.endswith(MODULATION)
        unsigned = ((0, linear.in_features),) if name.endswith("net.2") else ()
        spec = LayerSpec(kind="w4a16", rank=0, smooth=False) if modulation else LayerSpec(unsigned=unsigned)
        layer: Any = empty_layer(linear, spec, torch.bfloat16)
        layer.qweight.random_(0, 256)
        layer.wscales.fill_(0.005)
        for tensor, size in ((layer.proj_down, linear.in_features), (layer.proj_up, 32)):
            if tensor is not None:
                nn.init.normal_(tensor, std=0.3 * size**-0.5)
        for tensor, value in ((layer.bias, 0), (layer.smooth_factor, 1)):
            if tensor is not None:
                tensor.fill_(value)
        replace_module(model, name, layer)
    attach(model, svdquant.SVDQuantConfig())
    return model


def adapter(model: nn.Module, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, linear in block_linears(model).items():
        name = name.replace(".base_layer", "")
        k, n = linear.in_features, linear.out_features
        state[f"transformer.{name}.lora_A.weight"] = (torch.randn(RANK, k, generator=generator) / k**0.5).bfloat16()
        state[f"transformer.{name}.lora_B.weight"] = (torch.randn(n, RANK, generator=generator) * 0.05).bfloat16()
    return state


def with_adapters(model: Any, count: int) -> list[str]:
    names = [f"style_{seed}" for seed in range(count)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed, name in enumerate(names):
            model.load_lora_adapter(adapter(model, seed), adapter_name=name)
    return names


@contextlib.contextmanager
def unfused() -> Iterator[None]:
    """Inside, PEFT computes as it would around any linear: two more products per layer and adapter."""
    reachable = peft._reachable
    peft._reachable = lambda base: False
    try:
        yield
    finally:
        peft._reachable = reachable


def timed(call: Callable[[], Any], times: int = 50) -> float:
    """Milliseconds, the median of `times` calls."""
    samples = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        samples.append(time.perf_counter() - began)
    return 1e3 * sorted(samples)[times // 2]


def switching() -> dict[str, float]:
    """Milliseconds per switch of 494 linears."""
    model = quantized(flux(128, 19, 38))
    count = len(block_linears(model))
    names = with_adapters(model, 4)
    inputs = arguments(model, 16, 8)
    state = {"turn": 0}

    def strength() -> None:
        state["turn"] += 1
        model.set_adapters(names[:1], [0.5 + 0.001 * (state["turn"] % 100)])

    def chosen() -> None:
        state["turn"] += 1
        first = state["turn"] % 3
        model.set_adapters([names[first], names[first + 1]], [1.0, 0.5])

    stock = type(model).set_adapters.__wrapped__  # type: ignore[attr-defined]
    out = {
        "linears": count,
        "strength_ms": timed(strength),
        "set_ms": timed(chosen),
        "diffusers_set_ms": timed(lambda: stock(model, names[:2], [1.0, 0.5]), 10),
    }
    with torch.inference_mode():
        model.set_adapters(names[:1])
        model(**inputs)
        for text, fresh in (("first", True), ("again", False)):
            for layer in lora_layers(model) if fresh else ():
                if hasattr(layer, "branches"):
                    layer.branches.clear()
            began = time.perf_counter()
            model(**inputs)
            out[f"{text}_forward_ms"] = 1e3 * (time.perf_counter() - began)
    return out


def arguments(model: Any, image: int, text: int) -> dict[str, Any]:
    """Of one forward."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    ids = torch.zeros(image, 3)
    ids[:, 1] = torch.arange(image)
    return {
        "hidden_states": random(1, image, model.config.in_channels),
        "encoder_hidden_states": random(1, text, model.config.joint_attention_dim),
        "pooled_projections": random(1, model.config.pooled_projection_dim),
        "timestep": torch.tensor([0.5]).bfloat16(),
        "guidance": torch.tensor([3.5]).bfloat16(),
        "img_ids": ids,
        "txt_ids": torch.zeros(text, 3),
        "return_dict": False,
    }


@torch.inference_mode()
def drawing(width: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Seconds per forward of one double and one single block, and how many times the time without adapters."""
    model: Any = quantized(flux(width, 1, 1))
    inputs = arguments(model, tokens, tokens // 4)
    names = with_adapters(model, 3)

    def with_set(chosen: list[str], plain: bool = False) -> Callable[[], None]:
        def run() -> None:
            if chosen:
                model.enable_lora()
                model.set_adapters(chosen)
            else:
                model.disable_lora()
            with unfused() if plain else contextlib.nullcontext():
                model(**inputs)

        return run

    contenders = [
        Contender("no adapter", [with_set([])]),
        Contender("1 adapter", [with_set(names[:1])]),
        Contender("3 adapters", [with_set(names)]),
        Contender("1 adapter, PEFT unfused", [with_set(names[:1], True)]),
        Contender("3 adapters, PEFT unfused", [with_set(names, True)]),
    ]
    samples = measure(contenders, make_device("cpu", torch.get_num_threads()), rounds)
    base = samples["no adapter"]
    return {
        name: {
            "seconds": Spread.of(seconds).median,
            "times": Spread.of([s / b for s, b in zip(seconds, base, strict=True)]).median,
        }
        for name, seconds in samples.items()
    }


def memory() -> dict[str, float]:
    """MB of an adapter of rank 16 on all 494 linears of FLUX.1-dev, in 16 bits, and of a joined set with it."""
    layers = block_linears(flux(3072, 19, 38, "meta"))
    sizes = {name: layer.in_features + layer.out_features for name, layer in layers.items()}
    fused = {name: size for name, size in sizes.items() if not name.endswith(MODULATION)}
    return {
        "adapter_mb": 2 * RANK * sum(sizes.values()) / 1e6,
        "joined_set_mb": 2 * (32 + RANK) * sum(fused.values()) / 1e6,
    }


def joining(width: int) -> float:
    """GB/s at which a layer's branch and one adapter are joined."""
    from svdquant.nn.adapters import Adapter, join

    model = flux(width, 0, 1)
    layer: Any = quantized(model).single_transformer_blocks[0].proj_mlp
    k, n = layer.in_features, layer.out_features
    one = Adapter("style", torch.randn(RANK, k).bfloat16(), torch.randn(n, RANK).bfloat16())
    milliseconds = timed(lambda: join(layer, [one]))
    return 2 * (32 + RANK) * (k + n) / milliseconds / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--width", type=int, default=3072)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--json")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    result: dict[str, Any] = {"threads": torch.get_num_threads(), "rank": RANK, "switching": switching()}
    gc.collect()
    result["memory"] = memory()
    rate = joining(options.width)
    result["memory"]["first_join_ms"] = result["memory"]["joined_set_mb"] / rate
    s, m = result["switching"], result["memory"]
    print(f"{s['linears']} linears: strength {s['strength_ms']:.2f} ms, other set {s['set_ms']:.2f} ms", end="")
    print(f" (diffusers' set_adapters {s['diffusers_set_ms']:.1f} ms)")
    print(f"one adapter {m['adapter_mb']:.0f} MB, a joined set {m['joined_set_mb']:.0f} MB,", end=" ")
    print(f"joined once in {m['first_join_ms']:.0f} ms ({rate:.1f} GB/s)")
    result["drawing"] = drawing(options.width, options.tokens, options.rounds)
    for name, row in result["drawing"].items():
        print(f"{name:28} {1e3 * row['seconds']:8.1f} ms  ×{row['times']:.3f}")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(result, file, indent=2)


if __name__ == "__main__":
    main()
