"""LyCORIS' kinds on linears: a quantized model with them is its dense meaning plus their ΔW."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import adapter_tools as tools
import lycoris_kinds as kinds
import pytest
import tiny
import torch
from adapter_tools import BF16, FP32
from test_adapters_formats import modules as bfl_modules
from torch import Tensor

import svdquant
from svdquant import SVDQuantError
from svdquant.integrations.adapter_formats import kind_of
from svdquant.integrations.adapters import load_adapter
from svdquant.integrations.merge import MergeReport, merge_into

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`", "ignore:.*became LoRAs of at most")
EVERY = {
    "OFT with limit and rescale": kinds.limited_oft,
    "BOFT": kinds.boft,
    "OFT of inputs": kinds.peft_oft,
    "OFT of inputs, scaled": kinds.scaled_peft_oft,
    "IA3": kinds.ia3,
    "IA3 of inputs": kinds.ia3_of_inputs,
    "GLoRA": kinds.glora,
    "early GLoRA": kinds.early_glora,
    "difference": kinds.difference,
}
STRENGTHS = {1: [0.8], 2: [1.0, -0.5], 5: [0.5, -1.0, 0.0, 1.5, 0.25]}


@pytest.fixture(scope="module")
def original() -> Any:
    return tools.quantized_flux()


@pytest.fixture
def model(original) -> Any:
    return copy.deepcopy(original)


def weights(model: Any, names: Any = tools.LAYERS) -> dict[str, Tensor]:
    dense = tools.dense(model)
    return {name: dense.get_submodule(name).weight.data for name in names}


@pytest.mark.parametrize("kind", EVERY)
def test_one_two_and_five(model, kind):
    """With LoRAs among them; back to the same bits, and to none."""
    before = tools.output(model)
    own, adapters = weights(model), []
    for seed in range(5):
        if seed in (1, 4):
            state = tools.lora(model, seed)
            adapters.append((state, tools.deltas(state)))
        else:
            adapters.append(kinds.adapter(EVERY[kind], own, seed))
    plain = copy.deepcopy(model)
    for i, (state, _) in enumerate(adapters):
        assert load_adapter(model, state, f"style_{i}") == f"style_{i}"
    outputs = {}
    for count, strengths in STRENGTHS.items():
        names = [f"style_{i}" for i in range(count)]
        wanted = [(changes, s) for (_, changes), s in zip(adapters, strengths, strict=False)]
        expected = tools.output(tools.dense(plain, wanted))
        assert tools.relative(before, expected) > 0.02
        model.set_adapters(names, strengths)
        outputs[count] = tools.output(model)
        assert tools.relative(outputs[count], expected) < (5e-3 if kind == "difference" else 1e-3)
    model.set_adapters(["style_0"], STRENGTHS[1])
    assert torch.equal(tools.output(model), outputs[1])
    model.set_adapters(["style_0", "style_2"], [0.0, 0.0])
    assert torch.equal(tools.output(model), before)
    model.set_adapters(["style_0"], STRENGTHS[1])
    model.disable_lora()
    assert torch.equal(tools.output(model), before)
    model.enable_lora()
    model.delete_adapters(["style_0"])
    model.set_adapters(["style_2"], STRENGTHS[1])
    assert not torch.equal(tools.output(model), outputs[1])
    model.unload_lora()
    assert torch.equal(tools.output(model), before)
    assert not any("lora" in name for name, _ in model.named_modules())
    assert all(torch.equal(p, dict(plain.named_parameters())[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_dora_of_columns(model, strength):
    names = [name for name in tools.LAYERS if name != "x_embedder"]
    state, changes = kinds.adapter(kinds.column_dora, weights(model, [*names, "x_embedder"]), 1, "lora_unet_")
    if strength != 1:
        # As DoRA's strength is elsewhere: of BA, whose columns then get the lengths.
        own = weights(model, changes)
        for name in changes:
            base = f"lora_unet_{name.replace('.', '_')}"
            delta = state[f"{base}.lora_up.weight"] @ state[f"{base}.lora_down.weight"] * (2 / 3)
            moved = own[name] + strength * delta
            changes[name] = (moved * (state[f"{base}.dora_scale"] / moved.norm(dim=0)) - own[name]) / strength
    expected = tools.output(tools.dense(model, [(changes, strength)]))
    before = tools.output(model)
    load_adapter(model, state, "style", strength)
    assert tools.relative(before, expected) > 0.02 and tools.relative(tools.output(model), expected) < 1e-3
    model.set_adapters("style", 0.0)
    assert torch.equal(tools.output(model), before)


def stacked(model: Any, kind: Any, seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(state, ΔW of diffusers' modules) under the names of FLUX' authors, q, k and v in one."""
    own = weights(model, tools.linears(model))
    names = {name: parts for name, parts in bfl_modules().items() if "single" not in name or "linear2" in name}
    single = "single_transformer_blocks.0"
    names["lora_unet_single_blocks_0_linear1"] = (
        *(f"{single}.attn.{part}" for part in ("to_q", "to_k", "to_v")),
        f"{single}.proj_mlp",
    )
    state, found = kinds.adapter(kind, {n: torch.cat([own[p] for p in parts]) for n, parts in names.items()}, seed, "")
    changes = {}
    for name, parts in names.items():
        for part, rows in zip(parts, found[name].split([len(own[p]) for p in parts]), strict=True):
            changes[part] = rows
    return state, changes


@pytest.mark.parametrize("kind", ["OFT with limit and rescale", "OFT of inputs", "IA3", "GLoRA", "difference"])
def test_names_of_the_authors_of_flux(model, kind):
    state, changes = stacked(model, EVERY[kind], 3)
    expected = tools.output(tools.dense(model, [(changes, 0.7)]))
    assert tools.relative(tools.output(model), expected) > 0.02
    pipe = tiny.flux_pipeline(transformer=model)
    pipe.load_lora_weights(state, adapter_name="style")
    pipe.set_adapters("style", 0.7)
    assert tools.relative(tools.output(model), expected) < (5e-3 if kind == "difference" else 1e-3)


def test_a_lora_of_stacked_layers_of_any_width(model):
    """linear1 is q, k, v and the MLP's first; one LoRA is of all rows, another was put together of one per part."""
    single = "single_transformer_blocks.0"
    parts = [f"{single}.attn.{part}" for part in ("to_q", "to_k", "to_v")] + [f"{single}.proj_mlp"]
    rows = [tools.linears(model)[part].out_features for part in parts]
    generator = torch.Generator().manual_seed(0)
    for sparse in (False, True):
        down, up = torch.randn(8, 128, generator=generator) * 0.1, torch.randn(sum(rows), 8, generator=generator) * 0.3
        if sparse:
            up = torch.block_diag(*(torch.randn(n, 2, generator=generator) * 0.3 for n in rows))
        for base in ("lora_unet_single_blocks_0_linear1", "diffusion_model.single_blocks.0.linear1"):
            copied = copy.deepcopy(model)
            changes = dict(zip(parts, (up @ down * 0.5).split(rows), strict=True))
            state = {f"{base}.lora_down.weight": down, f"{base}.lora_up.weight": up, f"{base}.alpha": torch.tensor(4.0)}
            load_adapter(copied, state, "style", 0.9)
            expected = tools.output(tools.dense(model, [(changes, 0.9)]))
            assert tools.relative(tools.output(copied), expected) < 1e-3
            layer = copied.get_submodule(parts[0])
            assert layer.lora_A["style"].weight.shape == (2 if sparse else 8, 128)


def test_kohyas_oft_has_blocks_per_part(model):
    own = weights(model, tools.linears(model))
    names = [f"transformer_blocks.0.attn.{part}" for part in ("to_q", "to_k", "to_v")]
    generator, state, changes = torch.Generator().manual_seed(0), {}, {}
    base = "oft_unet_double_blocks_0_img_attn_qkv"
    for i, name in enumerate(names):
        group, change = kinds.oft(generator, own[name], alpha=1e-3)
        state[f"{base}.oft_blocks.{i}"], changes[name] = group["oft_blocks"], change.float()
    state[f"{base}.alpha"] = torch.tensor(1e-3)
    assert kind_of(state) == "OFT"
    load_adapter(model, state, "style")
    fresh = copy.deepcopy(model)
    fresh.unload_lora()
    assert tools.relative(tools.output(model), tools.output(tools.dense(fresh, [(changes, 1.0)]))) < 1e-3


def test_a_shared_block_and_the_inverse(model, tmp_path):
    """PEFT's OFT with one block for all inputs; and with the inverse that its configuration asks for."""
    name = "transformer_blocks.0.attn.to_q"
    own = weights(model, [name])[name].double()
    packed = torch.randn(1, 6, generator=torch.Generator().manual_seed(0)) * 0.3
    q = torch.zeros(4, 4, dtype=torch.float64)
    q[tuple(torch.triu_indices(4, 4, 1))] = packed[0].double()
    q = q - q.T
    eye = torch.eye(4, dtype=torch.float64)
    inverse = (eye - q) @ torch.linalg.inv(eye + q)
    series = eye + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q
    state = {f"transformer.{name}.oft_R.weight": packed}
    from safetensors.torch import save_file

    for folder, r in (("series", series), ("inverse", inverse)):
        (tmp_path / folder).mkdir()
        save_file(state, tmp_path / folder / "oft.safetensors")
        if folder == "inverse":
            (tmp_path / folder / "adapter_config.json").write_text('{"peft_type": "OFT", "use_cayley_neumann": false}')
        change = (own @ torch.block_diag(*[r.T] * 32) - own).float()
        expected = tools.output(tools.dense(model, [({name: change}, 1.0)]))
        copied = copy.deepcopy(model)
        load_adapter(copied, tmp_path / folder / "oft.safetensors")
        assert tools.relative(tools.output(copied), expected) < 1e-3


@pytest.mark.parametrize("kind", ["OFT with limit and rescale", "BOFT", "OFT of inputs", "IA3 of inputs"])
def test_other_types_and_quantized_activations(kind):
    """They add no error of their own worth mentioning."""
    dtype = torch.float16 if kind == "BOFT" else BF16
    model = tools.quantized_flux(dtype, "int8")
    state, changes = kinds.adapter(EVERY[kind], weights(model), 1)
    alone = tools.relative(tools.output(model), tools.output(tools.dense(model)))
    expected = tools.output(tools.dense(model, [(changes, 1.0)]))
    load_adapter(model, state, "style")
    assert tools.relative(tools.output(model), expected) < 1.5 * alone + 0.01


def test_copies_pickles_and_casts(model):
    own = weights(model)
    for i, kind in enumerate(("OFT with limit and rescale", "OFT of inputs")):
        load_adapter(model, kinds.adapter(EVERY[kind], own, i)[0], f"style_{i}")
    expected = tools.output(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(tools.output(copied), expected)
        copied.delete_adapters("style_0")
        assert not torch.equal(tools.output(copied), expected)
        assert torch.equal(tools.output(model), expected)
    layer = model.transformer_blocks[0].attn.to_q
    assert {t.dtype for t in layer.lora_transform.buffers()} == {FP32}
    x = torch.randn(3, 128)
    exact = layer(x)
    layer.to(BF16)
    assert {t.dtype for t in layer.lora_transform.buffers()} == {BF16}
    assert tools.relative(layer(x.to(BF16)), exact) < 0.02


def test_what_they_cannot(model):
    before = tools.output(model)
    state, _ = kinds.adapter(kinds.oft, weights(model), 1)
    load_adapter(model, state, "style")
    drawn = tools.output(model)
    with pytest.raises(SVDQuantError, match=r"'style' is no plain LoRA and cannot be fused.*lora merge"):
        model.fuse_lora()
    # Nothing was fused on the way there.
    assert torch.equal(tools.output(model), drawn)
    with pytest.raises(SVDQuantError, match="no plain LoRA; requests of one batch cannot differ"):
        tools.with_requests(model, lambda: tools.output(model), ["style"])
    with pytest.raises(SVDQuantError, match="cannot be hot-swapped"):
        model.load_lora_adapter(tools.lora(model, 1), adapter_name="style", hotswap=True)
    model.unload_lora()
    assert torch.equal(tools.output(model), before)


@pytest.mark.parametrize("kind", ["OFT with limit and rescale", "IA3 of inputs"])
def test_fused_into_layers_in_16_bits(model, kind):
    """Where none is quantized; with a LoRA beside, whose fused weight another strength must not undo."""
    before = tools.output(model)
    names = ["x_embedder", "context_embedder"]
    state, changes = kinds.adapter(EVERY[kind], weights(model, names), 1)
    lora = tools.lora(model, 2, names=names)
    expected = tools.output(tools.dense(model, [(changes, 0.8), (tools.deltas(lora), -0.5)]))
    load_adapter(model, state, "style", 0.8)
    load_adapter(model, lora, "other", -0.5)
    unfused = tools.output(model)
    model.fuse_lora()
    assert tools.relative(tools.output(model), expected) < 1e-3
    model.unfuse_lora()
    assert torch.equal(tools.output(model), unfused)
    model.unload_lora()
    assert torch.equal(tools.output(model), before)


def test_whole_weights_in_16_bits_beside_fused_adapters(model):
    names = ["x_embedder", "context_embedder"]
    state, changes = kinds.adapter(kinds.difference, weights(model, names), 1)
    lora = tools.lora(model, 2, names=names)
    plain = copy.deepcopy(model)
    load_adapter(model, state, "whole", 0.8)
    load_adapter(model, lora, "lora", -0.5)
    model.fuse_lora(adapter_names=["lora"])
    for strength in (0.8, -0.3, 0.0):
        model.set_adapters(["whole", "lora"], [strength, -0.5])
        expected = tools.output(tools.dense(plain, [(changes, strength), (tools.deltas(lora), -0.5)]))
        assert tools.relative(tools.output(model), expected) < 1e-3
    model.unfuse_lora()
    model.unload_lora()
    assert torch.equal(tools.output(model), tools.output(plain))


@pytest.mark.parametrize("grow", [False, True])
def test_merged(model, grow):
    """Baked in: OFT, (IA)³ and both DoRAs, with a plain LoRA; into 8 bits, so that rounding is small."""
    model = tools.quantized_flux(weights="int8")
    own, adapters = weights(model), []
    for i, kind in enumerate((kinds.limited_oft, kinds.ia3_of_inputs, kinds.boft)):
        adapters.append(kinds.adapter(kind, own, i))
    adapters.append(kinds.adapter(kinds.column_dora, own, 7, "lora_unet_"))
    adapters.append(kinds.adapter(kinds.row_dora, own, 8, "lora_unet_"))
    lora = tools.lora(model, 9)
    adapters.append((lora, tools.deltas(lora)))
    strengths = [0.5, -0.5, 0.5, 1.0, 1.0, 0.7]
    wanted = [(changes, s) for (_, changes), s in zip(adapters, strengths, strict=True)]
    expected, before = tools.output(tools.dense(model, wanted)), tools.output(model)
    for i, ((state, _), strength) in enumerate(zip(adapters, strengths, strict=True)):
        load_adapter(model, state, f"style_{i}", strength)
    assert tools.relative(tools.output(model), expected) < 1e-3
    report = MergeReport("", "", {})
    merge_into(model, report, grow=grow)
    assert not hasattr(model, "peft_config") and report.errors and max(report.errors.values()) < 0.05
    assert tools.relative(tools.output(model), expected) < 0.1 * tools.relative(before, expected)


def test_saved_and_loaded(model, tmp_path):
    """By the model's own call, whatever the adapter is made of."""
    own = weights(model)
    norm = "transformer_blocks.0.attn.norm_q"
    for i, kind in enumerate((kinds.limited_oft, kinds.boft, kinds.peft_oft, kinds.ia3_of_inputs)):
        state, _ = kinds.adapter(kind, own, i)
        state[f"lycoris_{norm.replace('.', '_')}.w_norm"] = torch.randn(64)
        name = load_adapter(model, state, f"style_{i}", 0.7)
        model.set_adapters(name, 0.7)
        expected = tools.output(model)
        model.save_lora_adapter(tmp_path / name, adapter_name=name)
        model.unload_lora()
        model.load_lora_adapter(tmp_path / name, adapter_name="again", prefix=None)
        model.set_adapters("again", 0.7)
        assert torch.equal(tools.output(model), expected)
        model.unload_lora()
        pipe = tiny.flux_pipeline(transformer=model)
        pipe.load_lora_weights(tmp_path / name, adapter_name="again")
        pipe.set_adapters("again", 0.7)
        assert torch.equal(tools.output(model), expected)
        model.unload_lora()


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_plain_loras_saved_by_both_calls(tmp_path, dtype):
    from peft import get_peft_model_state_dict

    model = tools.quantized_flux(dtype, "auto")
    pipe = tiny.flux_pipeline(transformer=model)
    alphas = {f"transformer.{name}.alpha": 2.0 for name in tools.LAYERS[:5]}
    model.load_lora_adapter(tools.lora(model, 1, dtype=dtype), adapter_name="style", network_alphas=alphas)
    model.set_adapters("style", 0.7)
    expected = tools.output(model)
    model.save_lora_adapter(tmp_path / "model", adapter_name="style")
    model.save_lora_adapter(tmp_path / "upcast", adapter_name="style", upcast_before_saving=True)
    assert torch.equal(tools.output(model), expected)
    layers = get_peft_model_state_dict(model, adapter_name="style")
    metadata = model.peft_config["style"].to_dict()
    pipe.save_lora_weights(
        tmp_path / "pipe", transformer_lora_layers=layers, transformer_lora_adapter_metadata=metadata
    )
    for folder in ("model", "upcast", "pipe"):
        pipe.unload_lora_weights()
        if folder == "pipe":
            pipe.load_lora_weights(tmp_path / folder, adapter_name="again")
        else:
            model.load_lora_adapter(tmp_path / folder, adapter_name="again", prefix=None)
        model.set_adapters("again", 0.7)
        assert torch.equal(tools.output(model), expected), folder


def test_a_file_of_norms_alone(model):
    """PEFT needs a LoRA to keep its name and strength: one of zeros."""
    before, change = tools.output(model), torch.randn(64, generator=torch.Generator().manual_seed(0))
    plain = tools.dense(model)
    plain.transformer_blocks[0].attn.norm_q.weight.data += 0.6 * change
    load_adapter(model, {"lycoris_transformer_blocks_0_attn_norm_q.w_norm": change}, "style", 0.6)
    assert tools.relative(tools.output(model), tools.output(plain)) < 1e-3
    model.set_adapters("style", 0.0)
    assert torch.equal(tools.output(model), before)


def bad(model: Any, change: Any, kind: Any = kinds.oft, name: str = "transformer_blocks.0.attn.to_q") -> str:
    """The sentence about a group of tensors after `change` has spoilt it; the model is as it was."""
    base = f"lycoris_{name.replace('.', '_')}"
    state, _ = kinds.adapter(kind, weights(model, [name]), 1)
    group = {key.removeprefix(f"{base}."): value for key, value in state.items()}
    change(group)
    before = tools.output(model)
    with pytest.raises(SVDQuantError) as failure, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_adapter(model, {f"{base}.{leaf}": value for leaf, value in group.items()}, "bad")
    assert not hasattr(model, "peft_config") or "bad" not in model.peft_config
    assert torch.equal(tools.output(model), before)
    return str(failure.value)


def test_bad_groups(model):
    def put(leaf: str, value: Any) -> Any:
        return lambda group: group.__setitem__(leaf, value(group) if callable(value) else value)

    def drop(leaf: str) -> Any:
        return lambda group: group.pop(leaf)

    b = "lycoris_transformer_blocks_0_attn_to_q"
    assert f"{b}.b2.weight is missing" in bad(model, drop("b2.weight"), kinds.glora)
    glora = bad(model, put("b1.weight", torch.ones(96, 3)), kinds.glora)
    assert f"{b}: its tensors (a1.weight [128, 3], a2.weight [3, 128], b1.weight [96, 3]" in glora
    assert "do not fit transformer_blocks.0.attn.to_q [128, 128]" in glora
    assert f"{b} is for 120 outputs" in bad(model, put("oft_blocks", torch.ones(15, 8, 8)))
    assert "do not fit together" in bad(model, put("oft_blocks", torch.ones(16, 4, 8)))
    assert "oft_blocks: holds numbers that are not finite" in bad(
        model, put("oft_blocks", lambda g: g["oft_blocks"] * float("nan"))
    )
    assert "rescale" in bad(model, put("rescale", torch.ones(7, 1)))
    assert f"{b}.dora_scale: is unknown beside" in bad(model, put("dora_scale", torch.ones(128, 1)))
    butterfly = bad(model, put("oft_blocks", torch.ones(6, 16, 8, 8) * 0.01), kinds.boft)
    assert "6 butterfly factors of blocks of 8 do not fit 128 outputs" in butterfly
    assert "is for 12 inputs" in bad(model, put("oft_R.weight", torch.ones(3, 6)), kinds.peft_oft)
    assert "is for 64 inputs" in bad(model, put("weight", torch.ones(64)), kinds.ia3_of_inputs)
    assert f"{b}.weight is missing" in bad(model, drop("weight"), kinds.ia3)
    assert "has the shape [96, 128]" in bad(model, put("diff", torch.ones(96, 128)), kinds.difference)
    assert "has the shape [128, 64]" in bad(model, put("diff", torch.ones(128, 64)), kinds.difference)
    with pytest.raises(SVDQuantError, match=r"none of the adapter's 2 tensors belongs to a module.*lycoris_no_such"):
        load_adapter(
            model, {"lycoris_no_such.oft_blocks": torch.ones(2, 4, 4), "lycoris_no_such.alpha": torch.ones(())}
        )
    both = {f"{b}.oft_blocks": torch.ones(16, 8, 8) * 0.01}
    both |= {f"{b}.lora_down.weight": torch.ones(2, 128), f"{b}.lora_up.weight": torch.ones(128, 2)}
    with pytest.raises(SVDQuantError, match="is unknown beside oft_blocks"):
        load_adapter(model, both)
    qkv = "lora_unet_double_blocks_0_img_attn_qkv"
    with pytest.raises(
        SVDQuantError, match=rf"{qkv}: its butterfly factors mix the outputs of transformer_blocks.0.attn"
    ):
        load_adapter(model, {f"{qkv}.oft_blocks": torch.zeros(2, 48, 8, 8)})
    with pytest.raises(SVDQuantError, match=r"blocks of 12 outputs do not end where .*to_q does \(128 outputs\)"):
        load_adapter(model, {f"{qkv}.oft_blocks": torch.zeros(32, 12, 12)})


def test_unknown_names_are_named_beside_known_ones(model):
    state, _ = kinds.adapter(kinds.oft, weights(model, ["transformer_blocks.0.attn.to_q"]), 1)
    with pytest.warns(UserWarning, match=r"no module for 1 tensors .*lycoris_no_such\.oft_blocks"):
        load_adapter(model, state | {"lycoris_no_such.oft_blocks": torch.ones(2, 4, 4)})


def test_set_activations_and_layers_stay_reachable(model):
    load_adapter(model, kinds.adapter(kinds.oft, weights(model), 1)[0])
    svdquant.set_activations(model, {"*.to_q": "int8"})
    assert model.transformer_blocks[0].attn.to_q.base_layer.activations == "int8"


def test_more_bad_groups(model):
    """A file cannot make anything but a sentence."""
    b = "lycoris_transformer_blocks_0_attn_to_q"
    whole = {"oft_blocks": torch.zeros(16, 8, 8), "alpha": torch.tensor(0.0)}
    for changed, said in (
        ({"oft_blocks": torch.zeros(128, 8)}, "do not fit together"),
        ({"oft_blocks": torch.zeros(0, 8, 8)}, "do not fit together"),
        ({"alpha": torch.zeros(2)}, "alpha: holds 2 numbers instead of one"),
        ({"oft_blocks": torch.zeros(2, 16, 8, 8), "rescale": torch.full((128, 1), float("inf"))}, "not finite"),
    ):
        state = {f"{b}.{leaf}": value for leaf, value in (whole | changed).items()}
        with pytest.raises(SVDQuantError, match=said):
            load_adapter(model, state, "bad")
    for leaf in ("lokr_w2", "lokr_w1_b", "hada_w2_a", "lokr_t2"):
        with pytest.raises(SVDQuantError, match="is missing; download the adapter again"):
            load_adapter(model, {f"{b}.{leaf}": torch.ones(2, 2)}, "bad")
    assert not getattr(model, "peft_config", {})
