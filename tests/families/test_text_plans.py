"""Plans of the text encoders of published pipelines, from their configurations; no weight is made."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, T5Config, T5EncoderModel
from typer.testing import CliRunner

from svdquant import SVDQuantConfig, SVDQuantError
from svdquant.cli.main import app
from svdquant.families import family_of
from svdquant.integrations.components import planned_config, text_config
from svdquant.integrations.skeletons import skeleton
from svdquant.ptq.example import trace_model
from svdquant.ptq.leftovers import EMBEDDING, NORM, find_leftovers
from svdquant.ptq.plan import Plan, make_plan

CONFIGS = Path(__file__).parent / "configs" / "text"
VISION, ENDS = "vision-language model keeps it", "embedding, final norm or projection"
# Parameters as published; W4A16 linears; GB in 16 bits and in W4A16; what stays in 16 bits, in percent.
EXPECTED: dict[str, tuple[int, int, float, float, dict[str, float]]] = {
    "t5-v1_1-xxl": (4_762_310_656, 168, 9.525, 2.724, {EMBEDDING: 2.8}),
    "umt5-xxl": (5_680_910_336, 168, 11.362, 4.561, {EMBEDDING: 18.5}),
    "clip-l": (123_060_480, 72, 0.246, 0.121, {EMBEDDING: 30.9}),
    "clip-bigg": (694_659_840, 192, 1.389, 0.465, {EMBEDDING: 9.1, ENDS: 0.2}),
    "gemma-2-2b-it": (2_614_341_888, 182, 5.229, 2.256, {EMBEDDING: 22.6}),
    "gemma-3-12b-it": (12_187_325_040, 336, 24.375, 8.573, {EMBEDDING: 8.3, VISION: 3.4}),
    "qwen2.5-vl-7b": (8_292_166_656, 196, 16.584, 7.000, {EMBEDDING: 6.6, ENDS: 7.1, VISION: 7.6}),
    "qwen3-4b": (4_022_468_096, 252, 8.045, 2.709, {EMBEDDING: 9.7}),
    "qwen3-8b": (8_190_735_360, 252, 16.381, 6.180, {EMBEDDING: 7.6, ENDS: 7.6}),
    "mistral-small-3.2-24b": (24_011_361_280, 280, 48.023, 15.373, {EMBEDDING: 2.8, ENDS: 3.0, VISION: 1.7}),
    "llama-3-8b": (7_505_186_816, 224, 15.010, 4.759, {EMBEDDING: 7.0}),
}


@cache
def planned(name: str) -> tuple[Any, Plan]:
    model = skeleton(CONFIGS / f"{name}.json")
    return model, make_plan(model, text_config())


@pytest.mark.parametrize("name", EXPECTED)
def test_counts_and_bytes(name: str) -> None:
    parameters, layers, before, after, stays = EXPECTED[name]
    model, plan = planned(name)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert plan.bytes_before == 2 * parameters
    quantized = [layer for layer in plan.layers.values() if layer.kind != "keep"]
    assert len(quantized) == layers
    assert {(layer.kind, layer.spec.weights, layer.spec.group_size, layer.spec.rank) for layer in quantized} == {
        ("w4a16", "int4", 64, 0)
    }
    assert (round(plan.bytes_before / 1e9, 3), round(plan.bytes_after / 1e9, 3)) == (before, after)
    # Four bits, and a scale of 16 for 64 weights.
    packed = sum(
        layer.in_features * layer.out_features * 17 // 32 + 2 * layer.out_features * layer.bias for layer in quantized
    )
    assert sum(layer.bytes_after for layer in quantized) == packed

    shares: dict[str, float] = {}
    leftovers = find_leftovers(model, plan, text_config())
    for line in leftovers.lines():
        shares[line.reason] = shares.get(line.reason, 0.0) + 100 * line.bytes / leftovers.total
    large = {reason: round(share, 1) for reason, share in shares.items() if share >= 0.1}
    assert large == pytest.approx(stays, abs=0.11), shares
    assert set(shares) - set(large) <= {NORM, ENDS, EMBEDDING, "convolution", "parameter of its own", "too small"}


@pytest.mark.parametrize("name", EXPECTED)
def test_example_inputs_reach_every_quantized_layer(name: str) -> None:
    """So that a plan for four-bit activations knows which layers read the same tensor."""
    model, plan = planned(name)
    family = family_of(model)
    assert family.example_inputs is not None
    traces = trace_model(model, lambda m: m(**family.example_inputs(m)))
    assert {layer.name for layer in plan.layers.values() if layer.kind != "keep"} <= traces.keys()
    grouped = make_plan(model, SVDQuantConfig(rank=32, activations="int8"))
    query = next(name for name in grouped.layers if name.endswith((".q", ".q_proj")) and "vis" not in name)
    read = next(names for group in grouped.groups if query in (names := [member.name for member in group.members]))
    assert len(read) == 3, read


def test_a_text_encoder_is_weights_only_unless_told_otherwise() -> None:
    model, _ = planned("clip-l")
    plain = planned_config(SVDQuantConfig(), model, None)
    assert plain.weights_only and not plain.overrides
    assert planned_config(SVDQuantConfig(weights="int8"), model, None).weights == "int8"
    assert planned_config(SVDQuantConfig(rank=16), model, None).rank == 16
    # In a pipeline the denoiser's options are not its own.
    pipeline = SVDQuantConfig(rank=64, seed=3, components={"text_encoder": {"weights": "int8"}})
    own = planned_config(pipeline, model, "text_encoder")
    assert (own.weights_only, own.weights, own.seed, own.components) == (True, "int8", 3, {})
    assert planned_config(SVDQuantConfig(rank=64), model, "text_encoder_2") == text_config()


def _plan(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["plan", *arguments])


def test_the_command_plans_configurations_classes_and_components(tmp_path: Path) -> None:
    text = _plan(str(CONFIGS / "t5-v1_1-xxl.json")).output
    assert "168 of 168 linears" in text and "8.87 GiB → 2.54 GiB" in text
    assert "36 of 36 linears" in _plan("T5EncoderModel").output
    from svdquant.integrations.pipeline import embedded_model

    text = _plan(str(embedded_model()), "--component", "text_encoder_2").output
    assert "T5EncoderModel" in text and "weights only" in text


@pytest.mark.parametrize(
    ("component", "message"),
    [
        ("text_encoder_9", "has no text_encoder_9; its components are scheduler, text_encoder,"),
        ("tokenizer", "tokenizer is a CLIPTokenizer, no model"),
        ("vae", "vae is an AutoencoderKL, made of convolutions"),
    ],
)
def test_components_that_cannot_be_planned(component: str, message: str) -> None:
    from svdquant.integrations.pipeline import embedded_model

    with pytest.raises(SVDQuantError, match=message):
        skeleton(embedded_model(), component=component)


def test_encoders_that_no_family_names_are_traced():
    """BERT: query, key and value of a layer read the same tensor, whatever they are called."""
    model = BertModel(
        BertConfig(vocab_size=32, hidden_size=128, num_hidden_layers=1, num_attention_heads=2, intermediate_size=256)
    )
    assert family_of(model).name == "generic"
    plan = make_plan(model, text_config())
    groups = [[member.name.rpartition(".")[2] for member in group.members] for group in plan.groups]
    assert plan.traced and ["query", "key", "value"] in groups


def test_planning_draws_no_random_numbers():
    model = T5EncoderModel(T5Config(vocab_size=32, d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4)).train()
    before = torch.get_rng_state()
    make_plan(model, text_config())
    assert torch.equal(before, torch.get_rng_state()) and model.training
