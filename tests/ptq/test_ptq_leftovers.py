"""What stayed in 16 bits: every byte of a model is accounted for, once, and a hint says what to do about it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import UNet2DConditionModel
from torch import nn

import svdquant
from svdquant import SVDQuantConfig
from svdquant.nn import quantized_layers
from svdquant.ptq import Report, make_plan
from svdquant.ptq.leftovers import HINT_ABOVE, Leftover, Leftovers, find_leftovers
from svdquant.ptq.names import joined_names, ranges


class Experts(nn.Module):
    """A block whose experts are stacked in two parameters of no linear."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(128, 128)
        self.gate_up = nn.Parameter(torch.randn(8, 128, 256) / 12)
        self.down = nn.Parameter(torch.randn(8, 128, 128) / 12)
        self.norm = nn.LayerNorm(128)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = torch.einsum("btk,ekn->bten", self.norm(self.router(x)), self.gate_up).chunk(2, -1)
        return x + torch.einsum("bten,enk->btk", gate.sigmoid() * up, self.down)


class MoE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Experts() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Tied(nn.Module):
    """An embedding that is the head's weight, one linear under two names, two linears of one weight, and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, 128)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128)) for _ in range(2))
        self.again = self.layers[0][0]
        self.first, self.second = nn.Linear(128, 128, bias=False), nn.Linear(128, 128, bias=False)
        self.second.weight = self.first.weight
        self.head = nn.Linear(128, 256)
        self.head.weight = self.embed.weight
        self.register_buffer("table", torch.zeros(1000, 128))
        self.register_buffer("scratch", torch.zeros(1000, 128), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in (*self.layers, self.again, self.first, self.second):
            x = x + layer(x)
        return self.head(x)


def unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(1, 2),
        transformer_layers_per_block=2,
        use_linear_projection=True,
        cross_attention_dim=64,
        norm_num_groups=8,
        sample_size=8,
    )


MODELS = {"flux": lambda: tiny.transformer(layers=2, single_layers=2), "unet": unet, "moe": MoE, "tied": Tied}


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().to(torch.bfloat16).eval()


def bytes_of(model: nn.Module) -> int:
    """Of all parameters, by the memory that they lie in."""
    return sum({p.data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}.values())


def expanded(pattern: str) -> set[str]:
    """The names that a pattern like a.{0-2,5}.b.{1,3} means."""
    parts = []
    for part in pattern.split("."):
        if not part.startswith("{"):
            parts.append([part])
            continue
        spans = [span.split("-") for span in part[1:-1].split(",")]
        parts.append([str(i) for span in spans for i in range(int(span[0]), int(span[-1]) + 1)])
    return {".".join(choice) for choice in itertools.product(*parts)}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("meta", [False, True])
def test_every_byte_once(name: str, meta: bool) -> None:
    """Quantized and left over make the whole model, and no parameter is missing or there twice."""
    model = make(name)
    total = bytes_of(model)
    if meta:
        # Moving breaks the ties of parameters, so that a model with some is built there.
        with torch.device("meta"):
            model = MODELS[name]().to(torch.bfloat16).eval()
    config = tiny.config()
    plan = make_plan(model, config)
    left = find_leftovers(model, plan, config)
    assert left.total == left.quantized + left.bytes == total
    names = [entry.name for entry in left.entries]
    quantized = {
        n for n, _ in model.named_parameters() if plan.layers.get(n.rpartition(".")[0], None) and n not in names
    }
    assert len(set(names)) == len(names) and set(names) | quantized == {n for n, _ in model.named_parameters()}
    assert {plan.layers[n.rpartition(".")[0]].kind for n in quantized} <= {"svdquant", "w4a16"}
    state = dict(model.named_parameters())
    assert all(entry.bytes == state[entry.name].numel() * 2 and entry.reason for entry in left.entries)
    assert all(entry.dtype == "bfloat16" and entry.shape == tuple(state[entry.name].shape) for entry in left.entries)
    # The joined lines say the same.
    lines = left.lines()
    assert sum(line.bytes for line in lines) == left.bytes and sum(line.count for line in lines) == len(names)
    assert set().union(*(expanded(line.name) for line in lines)) == set(names)
    assert [line.bytes for line in lines] == sorted((line.bytes for line in lines), reverse=True)


@pytest.mark.parametrize("name", ["flux", "unet", "moe"])
@pytest.mark.parametrize("weights", ["int4", "nvfp4"])
def test_the_plan_the_result_and_the_file_agree(name: str, weights: str, tmp_path: Path) -> None:
    model = make(name)
    total = bytes_of(model)
    report = svdquant.quantize(model, tiny.config(weights=weights))
    left, after = report.leftovers, find_leftovers(model)
    assert left is not None and left.total == total
    packed = quantized_layers(model)
    held = sum(p.nbytes for layer in packed.values() for p in layer.parameters())
    assert left.stored == after.stored == held
    assert {(e.name, e.bytes) for e in after.entries} == {(e.name, e.bytes) for e in left.entries}
    assert left.bytes + left.stored == sum(p.nbytes for p in model.parameters())
    # A bias that was made to hold a shift cannot be told from one that was there.
    made = {layer for layer in packed if packed[layer].spec.unsigned}
    assert after.quantized == left.quantized or (made and after.quantized > left.quantized)
    assert Report.from_json(report.to_json()) == report
    if name == "moe":
        return
    info = svdquant.checkpoint.inspect(svdquant.save_model(model, tmp_path / "m"))
    assert info.leftovers is not None
    assert {(e.name, e.bytes, e.dtype) for e in info.leftovers.entries} == {
        (e.name, e.bytes, e.dtype) for e in left.entries
    }
    assert (info.leftovers.stored, info.leftovers.quantized) == (after.stored, after.quantized)
    json.dumps(info.to_dict())


def test_what_several_modules_share() -> None:
    model = make("tied")
    plan = make_plan(model, tiny.config())
    left = {entry.name: entry.reason for entry in find_leftovers(model, plan).entries}
    # The head would be quantized, but its weight is the embedding's, which stays.
    assert left["embed.weight"] == "embedding" and "head.weight" not in left
    assert "shared" in left["layers.0.0.weight"] and "layers.1.0.weight" not in left
    assert not any("table" in name or "scratch" in name for name in left)


def test_reasons() -> None:
    config = tiny.config(skip=["ff"], overrides={"*proj_out": None}, modulation="none")
    model = tiny.transformer(layers=2).to(torch.bfloat16)
    found = {e.name: e.reason for e in find_leftovers(model, make_plan(model, config), config).entries}
    assert found["transformer_blocks.1.ff.net.2.bias"] == "skipped by the configuration ('ff')"
    assert found["single_transformer_blocks.0.proj_out.weight"] == "skipped by the configuration ('*proj_out')"
    assert found["transformer_blocks.0.norm1.linear.weight"] == "modulation, kept by the configuration"
    assert found["transformer_blocks.0.attn.norm_q.weight"] == "norm"
    assert found["x_embedder.weight"] == "embedding, final norm or projection"
    model = make("unet")
    found = {e.name: e.reason for e in find_leftovers(model, make_plan(model, tiny.config())).entries}
    assert found["conv_in.weight"] == found["down_blocks.0.resnets.0.conv1.bias"] == "convolution"
    kv = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    assert found[kv] == "reads the text of a cross-attention"


def test_layers_that_were_sent_back() -> None:
    model = make("flux")
    total = bytes_of(model)
    limits = {"*.attn.*": {"keep_16bit_above": 1e-3}}
    report = svdquant.quantize(model, tiny.config(rotate=False, overrides=limits))
    back = {layer.name for layer in report.layers if layer.kind == "keep"}
    left = report.leftovers
    assert left is not None and back and len(back) < len(report.layers)
    kept = {e.name.rpartition(".")[0] for e in left.entries if "keep_16bit_above" in e.reason}
    assert kept == back and left.total == total
    assert left.bytes + left.stored == sum(p.nbytes for p in model.parameters())


def leftovers(share: float, reason: str = "convolution") -> Leftovers:
    part = round(10000 * share)
    return Leftovers([Leftover("block.3.conv.weight", (part // 2,), "bfloat16", part, reason)], 10000 - part, 2500)


@pytest.mark.parametrize(("share", "hinted"), [(0.0, False), (0.0499, False), (0.05, False), (0.0501, True), (1, True)])
def test_the_hint_begins_above_five_percent(share: float, hinted: bool) -> None:
    assert HINT_ABOVE == 0.05
    found = leftovers(share)
    assert found.share == pytest.approx(share) and bool(found.hint()) == hinted


def test_the_hint_follows_what_a_model_has() -> None:
    """The same model, with a parameter of no linear that is just small or just large enough."""
    for rows, hinted in ((12, False), (16, True)):
        model = nn.Module()
        model.blocks = nn.ModuleList(nn.Sequential(nn.Linear(128, 128, bias=False)) for _ in range(2))
        model.extra = nn.Parameter(torch.zeros(rows, 128))
        plan = make_plan(model, tiny.config())
        left = find_leftovers(model, plan)
        assert left.share == pytest.approx(rows / (256 + rows)) and bool(left.hint()) == hinted


@pytest.mark.parametrize(
    ("reason", "remedy"),
    [
        ("reads the text of a cross-attention", "`--text-kv int8`"),
        ("skipped by the configuration ('*.ff.*')", "'*.ff.*'"),
        ("modulation, kept by the configuration", "`--modulation int4`"),
        ("convolution", "nothing in this version quantizes them"),
        ("stacked weights, of no linear", "nothing in this version quantizes them"),
        ("narrower than the rank", "lower `--rank`"),
        ("reads the picture of a cross-attention", "`--text-kv int8`"),
        ("modulation shared by all blocks", "kept on purpose"),
    ],
)
def test_the_hint_names_the_remedy(reason: str, remedy: str) -> None:
    hint = leftovers(0.2, reason).hint()
    assert remedy in hint and "block.3.conv.weight" in hint and hint.startswith("20.0 % ")


def test_the_hint_names_the_largest() -> None:
    model = make("moe")
    left = find_leftovers(model, make_plan(model, tiny.config()))
    hint = left.hint()
    assert left.share > 0.95 and "blocks.{0-2}.gate_up ×3 and 3 more" in hint and "norm" not in hint
    assert "blocks.{0-2}.gate_up" in left.table() and f"{left.stored:,} after" in left.table()


def test_reports_of_several_models() -> None:
    one, two = Report("A", bytes_before=3), Report("B", bytes_before=4, leftovers=leftovers(0.1))
    one.add(two, "transformer_2")
    assert one.bytes_before == 7 and one.leftovers is not None
    assert [e.name for e in one.leftovers.entries] == ["transformer_2.block.3.conv.weight"]
    one.add(two, "transformer")
    assert one.leftovers.total == 20000 and len(one.leftovers.entries) == 2
    assert one.leftovers.entries[0].name == "transformer_2.block.3.conv.weight"
    assert "stayed in 16 bits" in one.table() and Report.from_json(one.to_json()) == one


def test_a_report_of_before() -> None:
    data: dict[str, Any] = json.loads(Report("A", bytes_before=3).to_json())
    del data["leftovers"]
    old = Report.from_json(json.dumps(data))
    assert old.leftovers is None and "stayed in 16 bits" not in old.table()


def test_names_are_joined_exactly() -> None:
    names = [f"down.{i}.attn.{j}.to_{x}" for i in (1, 2) for j in range(i + 1) for x in "qk"] + ["a.0", "a.x.0", "0.a"]
    joined = joined_names([(name, name.endswith("k")) for name in names])
    assert [p for _, positions in joined for p in positions] != [] and len(joined) < len(names)
    for pattern, positions in joined:
        assert expanded(pattern) == {names[p] for p in positions}
    assert sorted(p for _, positions in joined for p in positions) == list(range(len(names)))
    assert ranges([5, 0, 2, 1]) == "0-2,5" and ranges([3]) == "3"


def test_patterns_that_skip_are_looked_up_in_order() -> None:
    config = SVDQuantConfig(rank=16, skip=["*.attn.to_q", "attn"])
    model = tiny.transformer().to(torch.bfloat16)
    found = {e.name: e.reason for e in find_leftovers(model, make_plan(model, config), config).entries}
    assert "'*.attn.to_q'" in found["transformer_blocks.0.attn.to_q.weight"]
    assert "('attn')" in found["transformer_blocks.0.attn.to_k.weight"]
