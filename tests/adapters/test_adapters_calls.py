"""diffusers' own LoRA calls on quantized pipelines."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
from typing import Any

import adapter_tools as tools
import numpy as np
import pytest
import standins
import tiny
import torch
from adapter_tools import BF16, FP32
from diffusers import FluxPipeline, FluxTransformer2DModel
from peft import get_peft_model_state_dict
from torch._dynamo.testing import CompileCounterWithBackend

import svdquant
from svdquant import SVDQuantError
from svdquant.nn import SVDQuantLinear, quantized_layers
from svdquant.nn.adapters import KEPT_SETS

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")


@pytest.fixture
def pipe() -> FluxPipeline:
    pipeline = tiny.flux_pipeline(transformer=tools.quantized_flux(BF16, "auto"))
    for part in (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.vae):
        part.to(BF16)
    return pipeline


def loaded(pipe: Any, *seeds: int) -> list[str]:
    names = [f"style_{seed}" for seed in seeds]
    for seed, name in zip(seeds, names, strict=True):
        pipe.load_lora_weights(tools.lora(pipe.transformer, seed, 2 + seed, dtype=BF16), adapter_name=name)
    return names


def test_every_call(pipe):
    base = tiny.draw(pipe)
    one, two = loaded(pipe, 1, 2)
    assert pipe.get_list_adapters() == {"transformer": [one, two]}
    pipe.set_adapters(one)
    assert pipe.get_active_adapters() == [one]
    first = tiny.draw(pipe)
    pipe.set_adapters([one, two], [0.5, -1.0])
    assert pipe.get_active_adapters() == [one, two]
    both = tiny.draw(pipe)
    pipe.set_adapters([two], adapter_weights=[0.7])
    second = tiny.draw(pipe)
    pictures = [base, first, both, second]
    assert all(np.abs(a - b).max() > 1e-3 for i, a in enumerate(pictures) for b in pictures[:i])
    pipe.disable_lora()
    assert np.array_equal(tiny.draw(pipe), base)
    pipe.enable_lora()
    assert np.array_equal(tiny.draw(pipe), second)
    pipe.set_adapters([one, two], [0.5, -1.0])
    assert np.array_equal(tiny.draw(pipe), both)
    pipe.set_adapters([one, two], [0.0, 0.0])
    assert np.array_equal(tiny.draw(pipe), base)
    # A second loading of what is there, at another strength per call.
    pipe.set_adapters(one)
    assert np.array_equal(tiny.draw(pipe), first)
    none = tiny.draw(pipe, joint_attention_kwargs={"scale": 0.0})
    assert not np.array_equal(none, first)
    pipe.set_adapters(one)
    assert np.array_equal(tiny.draw(pipe), first)
    pipe.delete_adapters(two)
    assert pipe.get_list_adapters() == {"transformer": [one]} and np.array_equal(tiny.draw(pipe), first)
    pipe.unload_lora_weights()
    assert np.array_equal(tiny.draw(pipe), base) and pipe.get_list_adapters() == {}
    assert type(pipe.transformer.transformer_blocks[0].attn.to_q) is SVDQuantLinear
    (one,) = loaded(pipe, 1)
    assert np.array_equal(tiny.draw(pipe), first)


@pytest.mark.parametrize("safe", [False, True])
def test_fusing_and_unfusing(pipe, safe):
    base = tools.output(pipe.transformer)
    one, two = loaded(pipe, 1, 2)
    pipe.set_adapters([one, two], [0.5, -0.6])
    unfused = tools.output(pipe.transformer)
    layer = pipe.transformer.transformer_blocks[0].attn.to_q.base_layer
    rank = layer.spec.rank
    pipe.fuse_lora(safe_fusing=safe)
    assert layer.spec.rank == rank + 32 and layer.proj_down.shape == (rank + 32, 128)
    fused = tools.output(pipe.transformer)
    effect = float((unfused - base).float().norm())
    assert float((fused - unfused).float().norm()) < 0.1 * effect and pipe.num_fused_loras == 2
    pipe.unfuse_lora()
    assert torch.equal(tools.output(pipe.transformer), unfused) and layer.spec.rank == rank
    pipe.unload_lora_weights()
    assert torch.equal(tools.output(pipe.transformer), base)


def test_fusing_is_exact_in_float32():
    model = tools.quantized_flux()
    states = [tools.lora(model, seed) for seed in (1, 2)]
    expected = tools.output(
        tools.dense(model, [(tools.deltas(states[0]), 0.5 * 0.4), (tools.deltas(states[1]), -0.6 * 0.4)])
    )
    for i, state in enumerate(states):
        model.load_lora_adapter(state, adapter_name=f"style_{i}")
    model.set_adapters(["style_0", "style_1"], [0.5, -0.6])
    model.fuse_lora(lora_scale=0.4)
    assert tools.relative(tools.output(model), expected) < 1e-3
    model.unload_lora()
    assert tools.relative(tools.output(model), expected) < 1e-3
    assert tools.relative(tools.output(tools.dense(model)), expected) < 1e-3


def test_a_model_with_a_fused_adapter_is_saved_and_loaded(tmp_path):
    """As turbo adapters are used: fused, unloaded, forgotten."""
    model = tools.quantized_flux(BF16, "auto")
    names = [name for name in tools.LAYERS if "norm" not in name]
    model.load_lora_adapter(tools.lora(model, 1, names=names, dtype=BF16), adapter_name="turbo")
    model.fuse_lora()
    model.unload_lora()
    expected = tools.output(model)
    model.save_pretrained(tmp_path / "diffusers")
    assert torch.equal(
        tools.output(FluxTransformer2DModel.from_pretrained(tmp_path / "diffusers", torch_dtype=BF16)), expected
    )
    svdquant.save_model(model, tmp_path / "own.safetensors")
    assert torch.equal(tools.output(svdquant.load_model(tmp_path / "own.safetensors")), expected)


def test_saving_names_what_is_in_the_way(pipe, tmp_path):
    loaded(pipe, 1)
    with pytest.raises(SVDQuantError, match="unload_lora_weights"):
        pipe.transformer.save_pretrained(tmp_path / "a")
    with pytest.raises(SVDQuantError, match="unload_lora_weights"):
        svdquant.save_model(pipe.transformer, tmp_path / "a.safetensors")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    for save in (pipe.transformer.save_pretrained, lambda path: svdquant.save_model(pipe.transformer, path)):
        with pytest.raises(SVDQuantError, match="unfuse_lora"):
            save(tmp_path / "b")


def test_broken_adapters_are_not_fused(pipe):
    (one,) = loaded(pipe, 1)
    layer = pipe.transformer.transformer_blocks[0].attn.to_q
    layer.lora_A[one].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        pipe.fuse_lora(safe_fusing=True)


def test_adapters_saved_by_diffusers_come_back(pipe, tmp_path):
    (one,) = loaded(pipe, 1)
    pipe.set_adapters(one)
    expected = tools.output(pipe.transformer)
    pipe.save_lora_weights(
        tmp_path, transformer_lora_layers=get_peft_model_state_dict(pipe.transformer, adapter_name=one)
    )
    pipe.unload_lora_weights()
    pipe.load_lora_weights(tmp_path, adapter_name="again")
    assert torch.equal(tools.output(pipe.transformer), expected)


def test_hot_swapping(pipe):
    (one,) = loaded(pipe, 2)
    before = tools.output(pipe.transformer)
    pipe.load_lora_weights(tools.lora(pipe.transformer, 7, 4, dtype=BF16), adapter_name=one, hotswap=True)
    swapped = tools.output(pipe.transformer)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(tools.lora(pipe.transformer, 7, 4, dtype=BF16), adapter_name="other")
    assert torch.equal(tools.output(pipe.transformer), swapped) and not torch.equal(before, swapped)


def test_hot_swapping_under_a_compiler():
    """Other matrices, rank and alpha, and not one frame compiled again."""
    torch._dynamo.reset()
    model = tools.quantized_flux(FP32, "int8")
    states = [tools.lora(model, seed, rank) for seed, rank in ((1, 4), (2, 8))]
    wanted = []
    for state in states:
        model.load_lora_adapter(dict(state), adapter_name="style")
        wanted.append(tools.output(model))
        model.unload_lora()
    model.enable_lora_hotswap(target_rank=8)
    model.load_lora_adapter(dict(states[0]), adapter_name="style")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    inputs = tiny.inputs(model)
    for turn in (0, 1, 0):
        if turn or counter.frame_count:
            model.load_lora_adapter(dict(states[turn]), adapter_name="style", hotswap=True)
        with torch.no_grad():
            # A compiler's last bits decide a rounding to 8 bits now and then: 4e-4 each time.
            assert tools.relative(compiled(**inputs, return_dict=False)[0], wanted[turn]) < 5e-3
    assert counter.frame_count == 1


def test_control_adapters_widen_the_embedder(pipe):
    """FLUX' guard: an embedder in 16 bits grows, a quantized layer is an error with both shapes."""
    state = tools.lora(pipe.transformer, 1, dtype=BF16)
    state["transformer.x_embedder.lora_A.weight"] = torch.randn(4, 8).to(BF16)
    pipe.load_lora_weights(state, adapter_name="control")
    assert pipe.transformer.config.in_channels == 8 and pipe.transformer.x_embedder.in_features == 8


@pytest.mark.parametrize("through", ["pipeline", "model"])
def test_shapes_that_do_not_fit(pipe, through):
    for key, shape in (("attn.to_q.lora_A", (4, 256)), ("attn.to_q.lora_B", (64, 4)), ("attn.to_k.lora_B", (256, 4))):
        state = tools.lora(pipe.transformer, 1, dtype=BF16)
        state[f"transformer.transformer_blocks.0.{key}.weight"] = torch.randn(shape).to(BF16)
        load = pipe.load_lora_weights if through == "pipeline" else pipe.transformer.load_lora_adapter
        with pytest.raises(SVDQuantError, match=rf"\[{shape[0]}, {shape[1]}\].*\[128, 128\]"):
            load(state, adapter_name="wrong")
        assert pipe.get_list_adapters() == {}
        loaded(pipe, 1)
        pipe.unload_lora_weights()


def test_narrower_adapters_are_padded(pipe):
    """As diffusers does for FLUX: an adapter of the base model on one with more input channels."""
    state = tools.lora(pipe.transformer, 1, names=["transformer_blocks.0.attn.to_q"], dtype=BF16)
    key = "transformer.transformer_blocks.0.attn.to_q.lora_A.weight"
    state[key] = state[key][:, :100].clone()
    pipe.load_lora_weights(state, adapter_name="narrow")
    assert pipe.transformer.transformer_blocks[0].attn.to_q.lora_A["narrow"].weight.shape == (4, 128)


def test_keys_that_fit_nothing_are_named(pipe):
    state = tools.lora(pipe.transformer, 1, dtype=BF16)
    state["transformer.some.other.layer.lora_A.weight"] = torch.randn(4, 128)
    state["transformer.some.other.layer.lora_B.weight"] = torch.randn(128, 4)
    with pytest.warns(UserWarning, match=r"2 tensors.*some\.other\.layer\.lora_A\.weight"):
        pipe.load_lora_weights(dict(state), adapter_name="partly")
    with_others = tools.output(pipe.transformer)
    pipe.unload_lora_weights()
    loaded(pipe, 1)
    nothing = {key: value for key, value in state.items() if ".some." in key}
    with pytest.raises(SVDQuantError, match=r"none of its 2 tensors.*some\.other"):
        pipe.load_lora_weights(nothing, adapter_name="none")
    pipe.unload_lora_weights()
    pipe.load_lora_weights(tools.lora(pipe.transformer, 1, dtype=BF16), adapter_name="whole")
    assert torch.equal(tools.output(pipe.transformer), with_others)


@pytest.mark.parametrize("name", ["sana", "sdxl", "qwen_image", "z_image"])
def test_other_families(name):
    pipe = standins.PIPELINES[name]()
    model = standins.denoiser(pipe).to(BF16)
    svdquant.quantize(model, tiny.config())
    kind = "unet" if name == "sdxl" else "transformer"
    chosen = [n for n, layer in quantized_layers(model).items() if isinstance(layer, SVDQuantLinear)]
    assert chosen
    state = tools.lora(model, 1, names=chosen, prefix=f"{kind}.", dtype=BF16)
    layer: Any = model.get_submodule(chosen[-1])
    x = torch.randn(2, 3, layer.in_features, generator=torch.Generator().manual_seed(0)).to(BF16)
    before = layer(x)
    pipe.load_lora_weights(dict(state), adapter_name="style")
    pipe.set_adapters("style", 0.5)
    assert pipe.get_active_adapters() == ["style"]
    delta = tools.deltas({key.replace("unet.", tools.PREFIX): value for key, value in state.items()})
    with torch.no_grad():
        y = model.get_submodule(chosen[-1])(x)
    expected = before.float() + 0.5 * x.float() @ delta[chosen[-1]].t()
    assert tools.relative(y, expected) < 0.01
    pipe.unload_lora_weights()
    assert torch.equal(model.get_submodule(chosen[-1])(x), before)


def test_convolutions_take_adapters_into_their_branch():
    """SANA's 1×1 convolutions."""
    pipe = standins.sana()
    model = pipe.transformer
    svdquant.quantize(model, tiny.config())
    svdquant.set_activations(model, "none")
    name, conv = next((n, m) for n, m in quantized_layers(model).items() if isinstance(m, torch.nn.Conv2d))
    generator = torch.Generator().manual_seed(0)
    down = torch.randn(4, conv.in_features, 1, 1, generator=generator)
    up = torch.randn(conv.out_features, 4, 1, 1, generator=generator)
    x = torch.randn(2, conv.in_features, 3, 5, generator=generator)
    before = conv(x)
    model.load_lora_adapter({f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up})
    wrapped = model.get_submodule(name)
    expected = before + torch.nn.functional.conv2d(torch.nn.functional.conv2d(x, down), up)
    with torch.no_grad():
        assert tools.relative(wrapped(x), expected) < 1e-4
        joined = [id(part) for _, parts in wrapped.branches._known.values() for part in parts]
        wrapped(x)
        assert [id(part) for _, parts in wrapped.branches._known.values() for part in parts] == joined
        wrapped.merge()
        assert tools.relative(wrapped(x), expected) < 1e-4
        wrapped.unmerge()
        assert tools.relative(wrapped(x), expected) < 1e-4


def test_copies_and_pickles_have_their_own_adapters(pipe):
    one, two = loaded(pipe, 1, 2)
    pipe.set_adapters(one)
    expected = tools.output(pipe.transformer)
    for copied in (copy.deepcopy(pipe.transformer), pickle.loads(pickle.dumps(pipe.transformer))):
        assert torch.equal(tools.output(copied), expected)
        copied.set_adapters(two)
        assert not torch.equal(tools.output(copied), expected)
        assert torch.equal(tools.output(pipe.transformer), expected)
        copied.unload_lora()
        assert torch.equal(tools.output(pipe.transformer), expected)


def test_casts_and_offloading(pipe):
    from accelerate import cpu_offload

    (one,) = loaded(pipe, 1)
    pipe.set_adapters(one)
    expected = tools.output(pipe.transformer)
    layer = pipe.transformer.transformer_blocks[0].attn.to_q
    assert len(layer.branches) == 1
    layer.float()
    assert len(layer.branches) == 0 and layer.base_layer.proj_up.dtype == FP32
    layer.to(BF16)
    assert torch.equal(tools.output(pipe.transformer), expected)
    cpu_offload(pipe.transformer, execution_device="cpu")
    assert tools.relative(tools.output(pipe.transformer), expected) < 0.02


def test_a_thousand_switches_leave_nothing():
    model = tools.quantized_flux(BF16, "auto")
    names = [f"style_{i}" for i in range(6)]
    for i, name in enumerate(names):
        model.load_lora_adapter(tools.lora(model, i, dtype=BF16), adapter_name=name)
    layers = [m for m in model.modules() if hasattr(m, "branches")]

    def alive() -> tuple[int, int]:
        gc.collect()
        # Compilers of other tests leave tensors of symbolic sizes behind, which have no bytes.
        plain = [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter)]
        tensors = [t for t in plain if all(type(size) is int for size in t.shape)]
        return len(tensors), sum(t.nbytes for t in tensors)

    inputs = tiny.inputs(model)
    outputs: dict[tuple[str, ...], torch.Tensor] = {}
    most = None
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for turn in range(1000):
            chosen = tuple(names[(turn * 7 + j) % 6] for j in range(1 + turn % 3))
            model.set_adapters(list(chosen), [0.1 * (1 + turn % 11)] * len(chosen))
            if turn % 25 == 0:
                model.set_adapters(list(chosen), 0.5)
                y = model(**inputs, return_dict=False)[0]
                assert torch.equal(outputs.setdefault(chosen, y), y)
            if turn == 500:
                most = alive()
    now = alive()
    # What remembers strengths is bounded, and a few vectors long.
    assert most is not None and now[0] <= most[0] + 64 and now[1] <= most[1] + 64 * 4096
    assert all(len(layer.branches) <= KEPT_SETS for layer in layers)


def test_fused_forwards_take_adapters(pipe, monkeypatch):
    """Whatever fused forwards leave out or put together, they draw what diffusers' own do; GELU and all."""
    model = pipe.transformer
    (one,) = loaded(pipe, 1)
    pipe.set_adapters(one)
    seen: list[dict[str, Any]] = []
    layer = model.transformer_blocks[0].ff.net[0].proj
    hook = layer.base_layer.register_forward_pre_hook(
        lambda _module, _args, options: seen.append(options), with_kwargs=True
    )
    whole = tools.output(model)
    hook.remove()
    assert seen and seen[0]["gelu"] is True and seen[0]["branch"] is not None
    monkeypatch.setenv("SVDQUANT_FUSE", "0")
    assert tools.relative(tools.output(model), whole) < 0.03


def test_text_encoders_take_their_part(pipe):
    """An adapter that changes CLIP as well, at one strength for both."""
    from svdquant.integrations.adapters import load_adapter

    state = tools.lora(pipe.transformer, 1, dtype=BF16)
    name = "encoder.layers.0.self_attn.q_proj"
    state[f"text_encoder.{name}.lora_A.weight"] = torch.ones(4, 32).to(BF16)
    state[f"text_encoder.{name}.lora_B.weight"] = torch.ones(32, 4).to(BF16)
    assert load_adapter(pipe, state, "style", 0.25) == "style"
    assert pipe.text_encoder.get_submodule(name).scaling["style"] == 0.25
    assert pipe.transformer.transformer_blocks[0].attn.to_q.scaling["style"] == 0.25
