"""The LoRA methods that Nunchaku's users call."""

from __future__ import annotations

from pathlib import Path

import adapter_tools as tools
import pytest
import torch
from adapter_tools import BF16
from safetensors.torch import load_file, save_file

import svdquant
from svdquant import SVDQuantError, nunchaku
from svdquant.nunchaku.lora.flux.compose import compose_lora

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")


@pytest.fixture
def model(tmp_path: Path):
    svdquant.save_model(tools.quantized_flux(BF16, "auto"), tmp_path / "flux.safetensors")
    return nunchaku.NunchakuFluxTransformer2dModel.from_pretrained(tmp_path / "flux.safetensors", device="cpu")


def test_update_strength_and_reset(model, tmp_path):
    base = tools.output(model)
    states = [tools.lora(model, seed, dtype=BF16) for seed in (1, 2)]
    save_file(states[0], tmp_path / "one.safetensors")
    model.update_lora_params(tmp_path / "one.safetensors")
    first = tools.output(model)
    model.set_lora_strength(0.4)
    weak = tools.output(model)
    model.set_lora_strength(1)
    assert torch.equal(tools.output(model), first) and not torch.equal(weak, first)
    model.update_lora_params(states[1])
    second = tools.output(model)
    assert list(model.peft_config) == ["nunchaku"] and not torch.equal(second, first)
    model.update_lora_params(str(tmp_path / "one.safetensors"))
    assert torch.equal(tools.output(model), first)
    model.set_lora_strength(0)
    assert torch.equal(tools.output(model), base)
    model.reset_lora()
    assert torch.equal(tools.output(model), base) and not hasattr(model, "peft_config")
    model.reset_lora()


def test_beside_adapters_of_diffusers(model):
    model.load_lora_adapter(tools.lora(model, 1, dtype=BF16), adapter_name="style")
    model.set_adapters("style", 0.5)
    alone = tools.output(model)
    model.update_lora_params(tools.lora(model, 2, dtype=BF16))
    assert model.active_adapters() == ["style", "nunchaku"]
    both = tools.output(model)
    model.set_lora_strength(0.0)
    assert torch.equal(tools.output(model), alone) and not torch.equal(both, alone)
    model.reset_lora()
    assert torch.equal(tools.output(model), alone)


def test_composing(model, tmp_path):
    """One adapter that is two at their strengths; exact up to rounding the strengths into B."""
    states = [tools.lora(model, seed, 3 + seed, names=tools.LAYERS[seed:]) for seed in (0, 1)]
    save_file(states[1], tmp_path / "b.safetensors")
    composed = compose_lora(
        [(states[0], 0.5), (tmp_path / "b.safetensors", -1.5)], tmp_path / "out" / "both.safetensors"
    )
    assert composed.keys() == load_file(tmp_path / "out" / "both.safetensors").keys()
    total = tools.deltas(composed)
    parts = [tools.deltas(state) for state in states]
    for name, delta in total.items():
        expected = 0.5 * parts[0][name] + (-1.5 * parts[1][name] if name in parts[1] else 0)
        assert tools.relative(delta, expected) < 1e-5
    model.update_lora_params(tmp_path / "out" / "both.safetensors")
    drawn = tools.output(model)
    model.reset_lora()
    for name, state in zip(("one", "two"), states, strict=True):
        model.load_lora_adapter(dict(state), adapter_name=name)
    model.set_adapters(["one", "two"], [0.5, -1.5])
    assert tools.relative(drawn, tools.output(model)) < 0.03


def test_an_embedder_is_narrowed_again(model):
    state = tools.lora(model, 1, dtype=BF16)
    state["transformer.x_embedder.lora_A.weight"] = torch.randn(4, 8).to(BF16)
    base = tools.output(model)
    model.update_lora_params(state)
    assert model.config.in_channels == 8
    model.reset_x_embedder()
    assert model.config.in_channels == 4 and torch.equal(tools.output(model), base)


def test_mistakes(model, tmp_path):
    with pytest.raises(SVDQuantError, match="call update_lora_params first"):
        model.set_lora_strength(0.5)
    with pytest.raises(SVDQuantError, match="neither a file nor one of the Hub"):
        model.update_lora_params(tmp_path / "nowhere.safetensors")
    (tmp_path / "adapter.bin").write_bytes(b"pickle")
    with pytest.raises(SVDQuantError, match="pickle"):
        model.update_lora_params(tmp_path / "adapter.bin")
    with pytest.raises(SVDQuantError, match="are no adapter that can be loaded"):
        model.update_lora_params({"something.weight": torch.ones(3)})
    with pytest.raises(SVDQuantError, match="no part of a LoRA"):
        compose_lora([({"transformer.norm.weight": torch.ones(3)}, 1.0)])
    wide = tools.lora(model, 1, names=["x_embedder"])
    wide["transformer.x_embedder.lora_A.weight"] = torch.randn(4, 8)
    with pytest.raises(SVDQuantError, match="4 and of 8 input channels"):
        compose_lora([(tools.lora(model, 1, names=["x_embedder"]), 1.0), (wide, 1.0)])


def converted(model, state, foreign: bool = False):
    """A LoRA as Nunchaku converts it for a checkpoint: behind the branch of every stacked linear, packed."""
    from svdquant.checkpoint.nunchaku_layouts import layout_of
    from svdquant.checkpoint.packing import pack_down, pack_up

    modules, out = dict(model.named_modules()), {}
    for linear in layout_of(model, lambda name: True).linears:
        members = [modules[name] for name in linear.members]
        pairs = [
            (state.get(f"transformer.{n}.lora_A.weight"), state.get(f"transformer.{n}.lora_B.weight"))
            for n in linear.members
        ]
        if all(a is None for a, _ in pairs):
            continue
        k, sizes = members[0].in_features, [m.out_features for m in members]
        downs = [a for a, _ in pairs if a is not None]
        ups, begin = [], 0
        for (a, b), size in zip(pairs, sizes, strict=True):
            if a is not None:
                wide = torch.zeros(sum(sizes), a.shape[0], dtype=BF16)
                wide[begin : begin + size] = b
                ups.append(wide)
            begin += size
        down, up = torch.cat(downs), torch.cat(ups, 1)
        missing = -down.shape[0] % 16
        down = torch.cat([down, torch.zeros(missing, k, dtype=BF16)])
        up = torch.cat([up, torch.zeros(sum(sizes), missing, dtype=BF16)], 1)
        if linear.kind == "w4a16":
            name = linear.pieces[0].name
            out[f"{name}.lora_down"] = down
            out[f"{name}.lora_up"] = up.unflatten(0, (linear.chunks, -1)).transpose(0, 1).flatten(0, 1).contiguous()
            continue
        for piece in linear.pieces:
            own = members[0].proj_down[:, piece.start : piece.stop] + (1.0 if foreign else 0.0)
            own_up = torch.cat([m.proj_up for m in members])
            out[f"{piece.name}.lora_down"] = pack_down(torch.cat([own, down[:, piece.start : piece.stop]]).contiguous())
            out[f"{piece.name}.lora_up"] = pack_up(torch.cat([own_up, up], 1).contiguous())
    out["x_embedder.lora_A.weight"] = state["transformer.x_embedder.lora_A.weight"]
    out["x_embedder.lora_B.weight"] = state["transformer.x_embedder.lora_B.weight"]
    return out


def test_loras_that_nunchaku_converted(model):
    state = tools.lora(model, 1, dtype=BF16)
    file, foreign = converted(model, state), converted(model, state, foreign=True)
    model.update_lora_params(state)
    expected = tools.output(model)
    model.update_lora_params(file)
    assert tools.relative(tools.output(model), expected) < 0.02
    model.set_lora_strength(0.3)
    weak = tools.output(model)
    model.update_lora_params(state)
    model.set_lora_strength(0.3)
    assert tools.relative(weak, tools.output(model)) < 0.02
    with pytest.raises(SVDQuantError, match="for another checkpoint than this"):
        model.update_lora_params(foreign)
    model.reset_lora()
    with pytest.warns(UserWarning, match=r"transformer_blocks\.0\.norm_q\.weight"):
        model.update_lora_params(file | {"transformer_blocks.0.norm_q.weight": torch.ones(64)})
