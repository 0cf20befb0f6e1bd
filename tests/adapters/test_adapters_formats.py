"""Adapters in other people's names and forms mean what their dense ΔW says."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import adapter_tools as tools
import pytest
import tiny
import torch
from peft import LoraConfig
from peft.tuners.lora.config import KasaConfig
from torch import Tensor

from svdquant import SVDQuantError
from svdquant.integrations.adapter_formats import MAX_RANK, kind_of, needs_conversion, strength_of, to_lora
from svdquant.integrations.adapter_names import by_module
from svdquant.integrations.adapters import load_adapter

# BFL's names, by which kohya, XLabs and ComfyUI call FLUX' layers → diffusers' modules, in the order of their rows.
DOUBLE = {
    "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn_proj": ("attn.to_out.0",),
    "img_mlp_0": ("ff.net.0.proj",),
    "img_mlp_2": ("ff.net.2",),
    "img_mod_lin": ("norm1.linear",),
    "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn_proj": ("attn.to_add_out",),
    "txt_mlp_0": ("ff_context.net.0.proj",),
    "txt_mlp_2": ("ff_context.net.2",),
    "txt_mod_lin": ("norm1_context.linear",),
}
SINGLE = {"linear2": ("proj_out",), "modulation_lin": ("norm.linear",)}
EMBEDDERS = {"img_in": "x_embedder", "txt_in": "context_embedder"}


@pytest.fixture
def pipe() -> Any:
    return tiny.flux_pipeline(transformer=tools.quantized_flux())


def modules() -> dict[str, tuple[str, ...]]:
    """kohya's name → diffusers' modules."""
    named = {f"lora_unet_double_blocks_0_{k}": tuple(f"transformer_blocks.0.{n}" for n in v) for k, v in DOUBLE.items()}
    named |= {
        f"lora_unet_single_blocks_0_{k}": tuple(f"single_transformer_blocks.0.{n}" for n in v)
        for k, v in SINGLE.items()
    }
    return named | {f"lora_unet_{k}": (v,) for k, v in EMBEDDERS.items()}


def shapes(model: Any) -> dict[str, tuple[int, int]]:
    layers = tools.linears(model)
    return {
        name: (sum(layers[part].out_features for part in parts), layers[parts[0]].in_features)
        for name, parts in modules().items()
    }


def split(model: Any, changes: dict[str, Tensor]) -> dict[str, Tensor]:
    """ΔW of kohya's modules as ΔW of diffusers'."""
    layers, out = tools.linears(model), {}
    for name, change in changes.items():
        parts = modules()[name]
        for part, rows in zip(parts, change.split([layers[p].out_features for p in parts]), strict=True):
            out[part] = rows
    return out


def check(pipe: Any, source: Any, changes: dict[str, Tensor], strength: float = 0.7, bound: float = 1e-3) -> None:
    model = pipe.transformer
    expected = tools.output(tools.dense(model, [(split(model, changes), strength)]))
    assert tools.relative(tools.output(model), expected) > 0.05
    pipe.load_lora_weights(source, adapter_name="style")
    pipe.set_adapters("style", strength)
    assert tools.relative(tools.output(model), expected) < bound
    pipe.unload_lora_weights()


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def kohya(pipe: Any, rank: int = 4, alpha: float = 3.0, ends: tuple[str, str] = ("lora_down", "lora_up")) -> Any:
    state, changes = {}, {}
    for i, (name, (n, k)) in enumerate(shapes(pipe.transformer).items()):
        down, up = random(i, rank, k) * k**-0.5, random(i + 100, n, rank) * 0.2
        state |= {
            f"{name}.{ends[0]}.weight": down,
            f"{name}.{ends[1]}.weight": up,
            f"{name}.alpha": torch.tensor(alpha),
        }
        changes[name] = up @ down * (alpha / rank)
    return state, changes


def test_kohya_with_fused_qkv(pipe):
    state, changes = kohya(pipe)
    assert kind_of(state) == "kohya" and not needs_conversion(state)
    check(pipe, state, changes)


def test_kohya_for_diffusers_modules(pipe):
    """lora_transformer_…: diffusers' own modules with underscores."""
    state, changes = {}, {}
    for i, name in enumerate(n for n in tools.LAYERS if n != "x_embedder"):
        layer = tools.linears(pipe.transformer)[name]
        down, up = random(i, 4, layer.in_features) * 0.1, random(i + 9, layer.out_features, 4) * 0.2
        base = f"lora_transformer_{name.replace('.', '_')}"
        state |= {f"{base}.lora_down.weight": down, f"{base}.lora_up.weight": up, f"{base}.alpha": torch.tensor(2.0)}
        changes[name] = up @ down * 0.5
    expected = tools.output(tools.dense(pipe.transformer, [(changes, 1.0)]))
    pipe.load_lora_weights(state, adapter_name="style")
    assert tools.relative(tools.output(pipe.transformer), expected) < 1e-3


def test_xlabs(pipe):
    state, changes = {}, {}
    for i, (name, (n, k)) in enumerate(shapes(pipe.transformer).items()):
        end = {"attn_qkv": "qkv", "attn_proj": "proj"}.get(name.rpartition("_0_")[2][4:])
        if "double" not in name or end is None:
            continue
        key = f"double_blocks.0.processor.{end}_lora{1 if '_img_' in name else 2}"
        down, up = random(i, 4, k) * k**-0.5, random(i + 100, n, 4) * 0.3
        state |= {f"{key}.down.weight": down, f"{key}.up.weight": up}
        changes[name] = up @ down
    assert kind_of(state) == "XLabs"
    check(pipe, state, changes)


def test_comfyui_names(pipe):
    """diffusion_model.double_blocks.0.img_attn.qkv.lora_down.weight."""
    state, changes = kohya(pipe)
    dotted = {}
    for key, value in state.items():
        name = key.partition(".")[0].removeprefix("lora_unet_")
        if name.startswith("double_blocks_0_"):
            stream, part, rest = name.removeprefix("double_blocks_0_").split("_", 2)
            dotted[key.replace(f"lora_unet_{name}", f"diffusion_model.double_blocks.0.{stream}_{part}.{rest}")] = value
    changes = {name: change for name, change in changes.items() if "double" in name}
    if not dotted:
        pytest.fail("no keys")
    check(pipe, dotted, changes)


def loha(pipe: Any, rank: int = 3, alpha: float = 2.0, prefix: str = "lora_unet_") -> Any:
    state, changes = {}, {}
    for i, (name, (n, k)) in enumerate(shapes(pipe.transformer).items()):
        a1, b1, a2, b2 = random(i, n, rank), random(i + 1, rank, k), random(i + 2, n, rank), random(i + 3, rank, k)
        parts = {
            "hada_w1_a": a1,
            "hada_w1_b": b1 * 0.05,
            "hada_w2_a": a2,
            "hada_w2_b": b2,
            "alpha": torch.tensor(alpha),
        }
        base = name.replace("lora_unet_", prefix)
        state |= {f"{base}.{leaf}": value for leaf, value in parts.items()}
        changes[name] = (a1 @ (b1 * 0.05)) * (a2 @ b2) * (alpha / rank)
    return state, changes


@pytest.mark.parametrize("prefix", ["lora_unet_", "lycoris_"])
def test_loha(pipe, prefix):
    """Of rank r² and so exact, where that is not too much."""
    state, changes = loha(pipe, prefix=prefix)
    assert kind_of(state) == "LoHa" and needs_conversion(state)
    converted = to_lora(state)
    assert max(converted.errors.values()) < 0.005 and converted.kinds == {"LoHa": len(changes)}
    with pytest.warns(UserWarning, match=r"LoHa layers became LoRAs of at most 128 directions.*%"):
        check(pipe, state, changes, bound=5e-3)


def test_lokr(pipe):
    """Both halves whole, one factored, both factored."""
    state, changes = {}, {}
    for i, (name, (n, k)) in enumerate(shapes(pipe.transformer).items()):
        w1, w2 = random(i, 4, 2) * 0.3, (random(i + 1, n // 4, 2) @ random(i + 2, 2, k // 2)) * 0.3
        parts: dict[str, Tensor] = {"lokr_w1": w1, "lokr_w2": w2, "alpha": torch.tensor(5.0)}
        scale = 1.0
        if i % 3:
            a, b = random(i + 3, n // 4, 2) * 0.3, random(i + 4, 2, k // 2)
            parts = {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(1.0)}
            w2, scale = a @ b, 0.5
        if i % 3 == 2:
            a, b = random(i + 5, 4, 1), random(i + 6, 1, 2)
            parts = {name: value for name, value in parts.items() if name != "lokr_w1"} | {
                "lokr_w1_a": a,
                "lokr_w1_b": b,
            }
            w1 = a @ b
        state |= {f"{name}.{leaf}": value for leaf, value in parts.items()}
        changes[name] = torch.kron(w1, w2) * scale
    assert kind_of(state) == "LoKr"
    with pytest.warns(UserWarning, match="LoKr layers"):
        check(pipe, state, changes, bound=5e-3)


def test_full_rank_lokr_says_what_is_left_out():
    state = {"transformer.x.lokr_w1": random(0, 8, 8), "transformer.x.lokr_w2": random(1, 64, 64)}
    converted = to_lora(state)
    down, up = (converted.state[f"transformer.x.lora_{half}.weight"] for half in "AB")
    truth = torch.kron(state["transformer.x.lokr_w1"], state["transformer.x.lokr_w2"])
    assert down.shape == (MAX_RANK, 512) and up.shape == (512, MAX_RANK)
    left_out = float((up @ down - truth).norm() / truth.norm())
    assert converted.errors["transformer.x"] == pytest.approx(left_out, rel=1e-3) and left_out > 0.05
    # No other LoRA of as many directions leaves out less.
    best = torch.linalg.svdvals(truth)[MAX_RANK:].norm() / truth.norm()
    assert left_out == pytest.approx(float(best), rel=1e-3)


def test_loha_beyond_the_rank_is_the_best_there_is():
    state = {
        f"transformer.x.hada_w{i}_{half}": random(i, *shape)
        for i in (1, 2)
        for half, shape in (("a", (96, 16)), ("b", (16, 200)))
    }
    converted = to_lora(state)
    down, up = (converted.state[f"transformer.x.lora_{half}.weight"] for half in "AB")
    truth = (state["transformer.x.hada_w1_a"] @ state["transformer.x.hada_w1_b"]) * (
        state["transformer.x.hada_w2_a"] @ state["transformer.x.hada_w2_b"]
    )
    assert float((up @ down - truth).norm() / truth.norm()) == pytest.approx(
        converted.errors["transformer.x"], abs=1e-3
    )


def test_unknown_and_incomplete_groups():
    whole = {"a.hada_w1_a": random(0, 8, 2), "a.hada_w1_b": random(1, 2, 8), "a.hada_w2_a": random(2, 8, 2)}
    with pytest.raises(SVDQuantError, match=r"a\.hada_w2_b is missing"):
        to_lora(whole)
    with pytest.raises(SVDQuantError, match=r"a\.lokr_w2 is missing"):
        to_lora({"a.lokr_w1": random(0, 2, 2)})
    for leaf, said in (
        ("oft_diag", "early form of OFT"),
        ("oft_r", "early form of PEFT's OFT"),
        ("boft_R", "PEFT's BOFT"),
        ("lambda_layer", "T-LoRA"),
        ("set_weight", "take it as a difference"),
    ):
        with pytest.raises(SVDQuantError, match=said):
            to_lora({f"a.{leaf}": random(0, 2, 2)})
    with pytest.raises(SVDQuantError, match=r"a\.hada_w1_a is missing"):
        to_lora({"a.hada_t1": random(0, 2, 2, 3, 3)})
    with pytest.raises(SVDQuantError, match=r"a\.lora_up\.weight is missing"):
        to_lora({"a.lora_mid.weight": random(0, 2, 2, 3, 3), "a.lora_down.weight": random(0, 2, 4, 1, 1)})
    with pytest.raises(SVDQuantError, match=r"a\.other: is unknown"):
        to_lora(whole | {"a.hada_w2_b": random(3, 2, 8), "a.other": random(4, 8, 1)})
    with pytest.raises(SVDQuantError, match=r"a: its tensors do not fit together \(hada_w1_a \[8, 2\]"):
        to_lora(whole | {"a.hada_w2_b": random(3, 3, 8)})
    with pytest.raises(SVDQuantError, match=r"a\.hada_w2_b: holds numbers that are not finite"):
        to_lora(whole | {"a.hada_w2_b": random(3, 2, 8) / 0})


def test_adapters_of_other_models(pipe):
    state = {f"lora_unet_down_blocks_0_{leaf}": random(0, 4, 4) for leaf in ("x.lora_down.weight", "x.lora_up.weight")}
    with pytest.raises((SVDQuantError, ValueError)):
        pipe.load_lora_weights(state, adapter_name="sdxl")
    assert pipe.get_list_adapters() == {}


def test_strengths_behind_file_names():
    assert strength_of("a.safetensors") == ("a.safetensors", 1.0)
    assert strength_of("a/b.safetensors:0.8") == ("a/b.safetensors", 0.8)
    assert strength_of("a.safetensors:-1") == ("a.safetensors", -1.0)
    assert strength_of(r"C:\a.safetensors") == (r"C:\a.safetensors", 1.0)
    assert strength_of(r"C:\a.safetensors:2") == (r"C:\a.safetensors", 2.0)


def dotted(model: Any, prefix: str, ends: tuple[str, str], alpha: float | None, names: Any = tools.LAYERS) -> Any:
    """The model's own names behind a prefix."""
    state, changes = {}, {}
    separator = "_" if prefix.endswith("_") else "."
    for i, name in enumerate(names):
        layer = tools.linears(model)[name]
        down, up = random(i, 4, layer.in_features) * 0.1, random(i + 9, layer.out_features, 4) * 0.3
        base = prefix + name.replace(".", separator)
        state |= {f"{base}.{ends[0]}.weight": down, f"{base}.{ends[1]}.weight": up}
        if alpha is not None:
            state[f"{base}.alpha"] = torch.tensor(alpha)
        changes[name] = up @ down * (1 if alpha is None else alpha / 4)
    return state, changes


@pytest.mark.parametrize("through", ["pipeline", "model"])
@pytest.mark.parametrize(
    ("prefix", "ends", "alpha"),
    [
        ("lora_transformer_", ("lora_down", "lora_up"), 2.0),
        ("transformer.", ("lora_down", "lora_up"), 3.0),
        ("transformer.", ("lora_A", "lora_B"), 3.0),
        ("transformer.", ("lora_A", "lora_B"), None),
        ("diffusion_model.", ("lora_A", "lora_B"), None),
        ("base_model.model.", ("lora_A.default", "lora_B.default"), None),
        ("lycoris_", ("lora_down", "lora_up"), 8.0),
        ("", ("lora_A", "lora_B"), None),
    ],
)
def test_own_names_with_any_prefix(pipe, prefix, ends, alpha, through):
    model = pipe.transformer
    state, changes = dotted(model, prefix, ends, alpha)
    expected = tools.output(tools.dense(model, [(changes, 0.5)]))
    name = load_adapter(pipe if through == "pipeline" else model, state, strength=0.5)
    assert name == "adapter" and tools.relative(tools.output(model), expected) < 1e-3


@pytest.mark.parametrize("stack", ["to_qkv", "add_qkv_proj"])
def test_stacked_adapters_on_split_modules(pipe, stack):
    model, block = pipe.transformer, "transformer_blocks.0.attn"
    parts = ("to_q", "to_k", "to_v") if stack == "to_qkv" else ("add_q_proj", "add_k_proj", "add_v_proj")
    down, up = random(0, 6, 128) * 0.1, random(1, 384, 6) * 0.5
    state = {f"transformer.{block}.{stack}.lora_A.weight": down, f"transformer.{block}.{stack}.lora_B.weight": up}
    changes = {f"{block}.{part}": rows for part, rows in zip(parts, (up @ down).split(128), strict=True)}
    expected = tools.output(tools.dense(model, [(changes, 1.0)]))
    pipe.load_lora_weights(state, adapter_name="style")
    assert tools.relative(tools.output(model), expected) < 1e-3


def test_split_adapters_on_stacked_modules():
    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_qkv = torch.nn.Linear(16, 36)

    model = torch.nn.Module()
    model.attn = Attention()
    state = {}
    for i, part in enumerate(("to_q", "to_v")):
        state[f"transformer.attn.{part}.lora_down.weight"] = random(i, 2 + i, 16)
        state[f"transformer.attn.{part}.lora_up.weight"] = random(i + 5, 12, 2 + i)
    out = by_module(state, dict(model.named_modules()), "transformer.")
    delta = out["transformer.attn.to_qkv.lora_B.weight"] @ out["transformer.attn.to_qkv.lora_A.weight"]
    parts = {
        p: state[f"transformer.attn.{p}.lora_up.weight"] @ state[f"transformer.attn.{p}.lora_down.weight"]
        for p in ("to_q", "to_v")
    }
    assert torch.allclose(delta, torch.cat([parts["to_q"], torch.zeros(12, 16), parts["to_v"]]), atol=1e-5)


def test_pixart():
    """diffusers has no LoRA calls for it."""
    from diffusers import PixArtTransformer2DModel

    model, run = tools.quantized_pixart()
    names = ["transformer_blocks.0.attn1.to_q", "transformer_blocks.1.ff.net.2", "caption_projection.linear_1"]
    before = run(model)
    state, changes = dotted(model, "base_model.model.", ("lora_A", "lora_B"), None, names)
    expected = run(tools.dense(model, [(changes, 0.5)]))
    name = load_adapter(model, state, strength=0.5)
    assert tools.relative(run(model), expected) < 1e-3 < tools.relative(before, expected)
    model.set_adapters(name, 0.0)
    assert torch.equal(run(model), before)
    model.set_adapters(name, 0.5)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(twin), run(model)) and isinstance(twin, PixArtTransformer2DModel)
    model.unload_lora()
    assert torch.equal(run(model), before)
    again, _ = dotted(model, "lora_transformer_", ("lora_down", "lora_up"), 4.0, names)
    assert load_adapter(model, again, "other") == "other"


def test_what_would_mean_something_else_is_refused(pipe):
    state, _ = kohya(pipe)
    lonely = state | {"lora_unet_double_blocks_0_other.dora_scale": random(0, 512, 1)}
    with pytest.raises(SVDQuantError, match=r"other\.dora_scale: has no LoRA beside it"):
        pipe.load_lora_weights(lonely, adapter_name="style")
    with pytest.raises(SVDQuantError, match="kasa_config reads a layer's 16-bit weights"):
        pipe.transformer.add_adapter(LoraConfig(r=4, target_modules=["to_q"], kasa_config=KasaConfig()))
    assert pipe.get_list_adapters() in ({}, {"transformer": []})


def test_differences_that_are_left_out_are_named(pipe):
    state, changes = kohya(pipe)
    state |= {"lora_unet_final_layer_norm.diff": random(0, 128), "lora_unet_other.diff_b": random(0, 128)}
    state |= {"lora_unet_txt_in.diff_b": torch.zeros(128)}
    with pytest.warns(UserWarning, match=r"2 differences .*lora_unet_final_layer_norm\.diff, lora_unet_other\.diff_b$"):
        check(pipe, state, changes)


@pytest.mark.parametrize("strength", [0.7, -1.0])
def test_bias_differences(pipe, strength):
    """Of a layer in 16 bits, of stacked q, k and v, and of one with a branch; their strength is not scaled by alpha."""
    state, changes = kohya(pipe)
    names = [name for name in changes if name.endswith(("img_in", "img_attn_qkv", "img_mlp_2", "linear2"))]
    assert len(names) >= 3
    biases = {name: random(i, changes[name].shape[0]) for i, name in enumerate(names)}
    state |= {f"{name}.diff_b": bias for name, bias in biases.items()}
    model = pipe.transformer
    dense = tools.dense(model, [(split(model, changes), strength)])
    for name, bias in split(model, {name: bias[:, None] for name, bias in biases.items()}).items():
        dense.get_submodule(name).bias.data += strength * bias[:, 0]
    before, expected = tools.output(model), tools.output(dense)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pipe.load_lora_weights(state, adapter_name="style")
    pipe.set_adapters("style", strength)
    assert tools.relative(tools.output(model), expected) < 1e-3
    pipe.set_adapters("style", 0.0)
    assert torch.equal(tools.output(model), before)
    pipe.unload_lora_weights()


def _dora_weights(
    model: Any, state: dict[str, Tensor], changes: dict[str, Tensor], strength: float
) -> dict[str, Tensor]:
    """ΔW of a DoRA: every row of W + s·BA gets the length that the file says; `state` is given those lengths."""
    plain, out, lengths = tools.dense(model), {}, {}
    for name, change in split(model, changes).items():
        weight = plain.get_submodule(name).weight.data
        lengths[name] = (weight + change).norm(dim=1) * (1 + 0.3 * random(len(name), len(weight)))
        moved = weight + strength * change
        out[name] = moved * (lengths[name] / moved.norm(dim=1))[:, None] - weight
    for name in changes:
        state[f"{name}.dora_scale"] = torch.cat([lengths[part] for part in modules()[name]])[:, None]
    return out


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_dora(pipe, strength):
    """kohya's names with fused q, k and v; modulations and embedders too."""
    model = pipe.transformer
    state, changes = kohya(pipe)
    wanted = _dora_weights(model, state, changes, strength)
    expected = tools.output(tools.dense(model, [(wanted, 1.0)]))
    plain = tools.output(tools.dense(model, [(split(model, changes), strength)]))
    assert tools.relative(plain, expected) > 0.05
    pipe.load_lora_weights(state, adapter_name="style")
    pipe.set_adapters("style", strength)
    assert tools.relative(tools.output(model), expected) < 1e-3
    with pytest.raises(SVDQuantError, match="no plain LoRA and cannot be fused"):
        pipe.fuse_lora()
