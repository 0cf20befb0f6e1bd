"""Models that nobody planned for: in-place arithmetic, torch's attention modules, shared layers, odd configurations."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import reference64
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import svdquant
from svdquant import SVDQuantConfig, SVDQuantError
from svdquant.nn import quantized_layers
from svdquant.ptq import make_plan

D = 128


def config(**fields: Any) -> SVDQuantConfig:
    return SVDQuantConfig(**({"rank": 8, "smooth": 3, "activations": "int4"} | fields))


def inputs(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seeded(module: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5
    return module.eval().requires_grad_(False)


class InPlace(nn.Module):
    """Everything about it changes tensors after they were made."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({n: nn.Linear(D, D) for n in "abcd"}) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        for block in self.blocks:
            h = F.gelu(block["a"](x))
            h[..., :64] -= 1
            x += block["b"](h)
            y = block["c"](x)
            x *= 0.5
            x += y + block["d"](x)
        return x


def test_changes_in_place_separate_what_is_read() -> None:
    model = seeded(InPlace())
    x = inputs(1, 64, D)
    plan = make_plan(model, config(rotate=False), lambda m: m(x))
    assert {layer.kind for layer in plan.layers.values()} == {"svdquant"}
    assert not plan.layers["blocks.0.b"].spec.unsigned, "no longer what the GELU returned"
    assert plan.layers["blocks.0.c"].group != plan.layers["blocks.0.d"].group
    dense = copy.deepcopy(model)
    report = svdquant.quantize(model, config(), lambda m: m(x))
    svdquant.set_activations(model, "int4")
    assert report.worst(1)[0].error < 0.2
    assert reference64.relative(model(x), dense(x)) < 0.25


def test_multihead_attention_of_torch_keeps_its_projection() -> None:
    """It reads `out_proj.weight` directly, which a packed layer does not have."""
    layers = [nn.TransformerEncoderLayer(D, 2, 256, batch_first=True), nn.TransformerDecoderLayer(D, 2, 256)]
    encoder, decoder = (seeded(layer) for layer in layers)
    model = nn.ModuleList([encoder, decoder])
    plan = make_plan(model, config())
    assert {n for n, layer in plan.layers.items() if layer.kind == "svdquant"} == {"1.linear1", "1.linear2"}
    dense = copy.deepcopy(model)
    svdquant.quantize(model, config())
    assert set(quantized_layers(model)) == {"1.linear1", "1.linear2"}
    x = inputs(2, 5, D)
    with torch.no_grad():
        assert reference64.relative(model[0](x), dense[0](x)) == 0
        assert reference64.relative(model[1](x, x), dense[1](x, x)) < 0.2


def test_a_reshaped_concatenation_is_one_input() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(D, 64), nn.Linear(D, 64), nn.Linear(256, D)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.cat([self.a(x), F.gelu(self.b(x))], -1).unflatten(1, (-1, 2)).flatten(-2))

    model = seeded(Model())
    report = svdquant.quantize(model, config(), lambda m: m(inputs(1, 8, D)))
    assert {layer.name for layer in report.layers} == {"a", "b", "c"}
    assert model.c.spec.unsigned == ()


def test_blocks_in_a_sequence() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_q, self.to_out = nn.Linear(D, D), nn.ModuleList([nn.Linear(D, D), nn.Dropout()])

        def forward(self, x: Tensor) -> Tensor:
            return x + self.to_out[0](self.to_q(x))

    model = seeded(nn.ModuleDict({"embed": nn.Linear(D, D), "blocks": nn.Sequential(Block(), Block())}))
    model.forward = lambda x: model["blocks"](model["embed"](x))  # type: ignore[method-assign]
    plan = make_plan(model, config())
    assert plan.layers["embed"].kind == "keep"
    assert [n for n, layer in plan.layers.items() if layer.kind == "svdquant"] == [
        f"blocks.{i}.{leaf}" for i in range(2) for leaf in ("to_q", "to_out.0")
    ]


def test_shared_layers_stay_as_they_are() -> None:
    model = seeded(nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D)))
    model.add_module("again", model[0])
    plan = make_plan(model, config())
    assert plan.layers["0"].kind == "keep" and "shared" in plan.layers["0"].reason
    assert plan.layers["2"].kind == "svdquant"


@pytest.mark.parametrize(("group_size", "k"), [(48, 192), (96, 500), (160, 256), (128, 130), (32, 96)])
@pytest.mark.parametrize("rotate", [False, True])
def test_any_even_group_size(group_size: int, k: int, rotate: bool) -> None:
    model = seeded(nn.Sequential(nn.Linear(k, 96)))
    dense = copy.deepcopy(model)
    x = inputs(33, k)
    svdquant.quantize(model, config(group_size=group_size, rotate=rotate), lambda m: m(x))
    svdquant.set_activations(model, "int4")
    assert reference64.relative(model(x), dense(x)) < 0.25
    assert reference64.relative(svdquant.set_activations(model, "none")(x), dense(x)) < 0.15


def test_float16_that_overflows_is_refused_and_nothing_changed() -> None:
    model = nn.Sequential(nn.Linear(D, D)).half()
    model[0].weight.data.fill_(5e4)
    before = model[0]
    with pytest.raises(SVDQuantError, match=r"0 does not fit into float16.*bfloat16"):
        svdquant.quantize(model, config(max_error=0.1, keep_16bit_above=0.1))
    assert model[0] is before


@pytest.mark.parametrize("weights", ["int4", "nvfp4", "int8"])
def test_tiny_float16_weights(weights: str) -> None:
    model = nn.Sequential(nn.Linear(D, D, bias=False)).half()
    model[0].weight.data = (inputs(D, D) * 1e-5).half()
    expected = model[0].weight.data.double()
    svdquant.quantize(model, config(weights=weights, activations="auto", rank=0, rotate=False))
    assert reference64.relative(model[0].dequantize().weight.double(), expected) < 0.13


def test_int8_weights_store_the_modulation_in_int8_too() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.proj = nn.Linear(D, D), nn.Linear(D, D)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.proj(x * self.norm(t)[:, None])

    model = seeded(Model())
    dense = copy.deepcopy(model)
    x, t = inputs(2, 9, D), inputs(2, D, seed=1)
    svdquant.quantize(model, config(weights="int8", activations="auto"), lambda m: m(x, t))
    assert (model.norm.spec.kind, model.norm.spec.weights) == ("w4a16", "int8")
    assert reference64.relative(model(x, t), dense(x, t)) < 0.02


def test_mistakes_are_named() -> None:
    class NoModule:
        pass

    with pytest.raises(SVDQuantError, match="takes a model, not a NoModule"):
        svdquant.quantize(NoModule(), config())  # type: ignore[arg-type]
    with pytest.raises(SVDQuantError, match="before enabling offload"):
        svdquant.quantize(nn.Sequential(nn.Linear(D, D, device="meta")), config())
    with pytest.raises(SVDQuantError, match="needs calibration"):
        svdquant.quantize(nn.Sequential(nn.Linear(D, D)), config(int8_activations_above=0.1))


@pytest.mark.parametrize(
    "fields",
    [
        {"rank": 32.5}, {"rank": True}, {"refine": -1}, {"refine": 1.5}, {"smooth": -3}, {"gptq": "no"},
        {"max_error": float("nan")}, {"max_error": -1.0}, {"keep_16bit_above": 0}, {"overrides": {"*": {"rank": 999}}},
        {"overrides": {"*": {"max_error": 0.1}}}, {"overrides": {"*": {"bits": 3}}}, {"group_size": 7},
        {"weights": "int3"},
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(SVDQuantError):
        SVDQuantConfig(**fields)
