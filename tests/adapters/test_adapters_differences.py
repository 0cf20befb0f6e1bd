"""What adapters add to norms, and to biases of layers without a LoRA: w + Σ strength·difference, and back again."""

from __future__ import annotations

import copy
from typing import Any

import adapter_tools as tools
import pytest
import tiny
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

import svdquant
from svdquant import SVDQuantError
from svdquant.integrations.adapters import load_adapter, remove_adapter
from svdquant.integrations.differences import differences_of
from svdquant.integrations.merge import MergeReport, merge_into

NORM, BIAS = "transformer_blocks.0.attn.norm_q.weight", "transformer_blocks.0.attn.to_add_out.bias"
HEAD = "proj_out.bias"
# The same parameters in three tools' names.
NAMES = {
    "kohya": {
        "lora_unet_double_blocks_0_img_attn_norm_query_norm.w_norm": NORM,
        "lora_transformer_transformer_blocks_0_attn_to_add_out.diff_b": BIAS,
        "lora_unet_proj_out.b_norm": HEAD,
    },
    "BFL": {
        "diffusion_model.double_blocks.0.img_attn.norm.query_norm.diff": NORM,
        "diffusion_model.transformer_blocks.0.attn.to_add_out.diff_b": BIAS,
        "proj_out.diff_b": HEAD,
    },
    "diffusers": {
        "transformer.transformer_blocks.0.attn.norm_q.diff": NORM,
        "transformer.transformer_blocks.0.attn.to_add_out.diff_b": BIAS,
        "transformer.proj_out.diff_b": HEAD,
    },
}


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def differences(model: Any, seed: int = 3) -> dict[str, Tensor]:
    state = dict(model.named_parameters())
    return {name: 0.5 * random(seed + i, *state[name].shape) for i, name in enumerate((NORM, BIAS, HEAD))}


def in_names(tool: str, changes: dict[str, Tensor]) -> dict[str, Tensor]:
    return {theirs: changes[ours] for theirs, ours in NAMES[tool].items()}


def expected(model: Any, adapters: list[tuple[dict[str, Tensor], dict[str, Tensor], float]]) -> Tensor:
    """The output of the dense meaning with every adapter's ΔW and differences in it."""
    plain = tools.dense(model, [(tools.deltas(lora), strength) for lora, _, strength in adapters])
    parameters = dict(plain.named_parameters())
    for _, changes, strength in adapters:
        for name, change in changes.items():
            parameters[name].data += strength * change
    return tools.output(plain)


@pytest.fixture
def pipe() -> Any:
    return tiny.flux_pipeline(transformer=tools.quantized_flux())


@pytest.mark.parametrize("tool", NAMES)
@pytest.mark.parametrize("strength", [1.0, -0.6])
def test_norms_and_lonely_biases(pipe, tool, strength):
    model = pipe.transformer
    lora, changes = tools.lora(model, 1, names=["transformer_blocks.0.attn.to_q"]), differences(model)
    wanted, without = expected(model, [(lora, changes, strength)]), expected(model, [(lora, {}, strength)])
    assert tools.relative(without, wanted) > 0.05
    pipe.load_lora_weights(lora | in_names(tool, changes), adapter_name="style")
    pipe.set_adapters("style", strength)
    assert tools.relative(tools.output(model), wanted) < 1e-3


def test_two_adapters_and_back_to_the_same_bits(pipe):
    model, before = pipe.transformer, tools.output(pipe.transformer)
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    adapters = {}
    for i, name in enumerate(("a", "b")):
        lora, changes = tools.lora(model, i), differences(model, 10 * i)
        adapters[name] = (lora, changes)
        pipe.load_lora_weights(lora | in_names("diffusers", changes), adapter_name=name)
    plain = copy.deepcopy(model)
    plain.unload_lora()
    assert all(torch.equal(p, state[n]) for n, p in plain.named_parameters())
    pipe.set_adapters(["a", "b"], [0.5, -1.0])
    both = tools.output(model)
    wanted = expected(plain, [(*adapters["a"], 0.5), (*adapters["b"], -1.0)])
    assert tools.relative(both, wanted) < 1e-3
    pipe.set_adapters("a", 0.5)
    alone = tools.output(model)
    assert tools.relative(alone, expected(plain, [(*adapters["a"], 0.5)])) < 1e-3
    pipe.disable_lora()
    assert torch.equal(tools.output(model), before)
    pipe.enable_lora()
    assert torch.equal(tools.output(model), alone)
    pipe.set_adapters(["a", "b"], [0.0, 0.0])
    assert torch.equal(tools.output(model), before)
    pipe.set_adapters(["a", "b"], [0.5, -1.0])
    assert torch.equal(tools.output(model), both)
    pipe.delete_adapters("b")
    pipe.set_adapters("a", 0.5)
    assert torch.equal(tools.output(model), alone)
    pipe.unload_lora_weights()
    assert torch.equal(tools.output(model), before) and differences_of(model) is None
    assert all(torch.equal(p, state[n]) for n, p in model.named_parameters())


def test_fused_they_stay_and_unfused_they_go(pipe):
    model, before = pipe.transformer, tools.output(pipe.transformer)
    lora, changes = tools.lora(model, 1, names=["transformer_blocks.0.attn.to_q"]), differences(model)
    wanted = expected(model, [(lora, changes, 0.7)])
    for unloaded in (False, True):
        pipe.load_lora_weights(lora | in_names("diffusers", changes), adapter_name="style")
        pipe.set_adapters("style", 0.7)
        pipe.fuse_lora()
        assert tools.relative(tools.output(model), wanted) < 1e-3
        if unloaded:
            pipe.unload_lora_weights()
            assert tools.relative(tools.output(model), wanted) < 1e-3 and differences_of(model) is None
        else:
            pipe.unfuse_lora()
            pipe.set_adapters("style", 0.0)
            assert torch.equal(tools.output(model), before)
            pipe.unload_lora_weights()


def test_merged_they_are_part_of_the_weights(pipe):
    model = pipe.transformer
    lora, changes = tools.lora(model, 1, names=["transformer_blocks.0.attn.to_q"]), differences(model)
    wanted = expected(model, [(lora, changes, 0.7)])
    load_adapter(model, lora | in_names("diffusers", changes), "style", 0.7)
    merge_into(model, MergeReport("", "", {}), grow=True)
    assert differences_of(model) is None and not hasattr(model, "peft_config")
    assert tools.relative(tools.output(model), wanted) < 1e-3


def test_a_bare_model_of_a_class_without_lora_calls():
    """PixArt; the embedder's bias has no LoRA beside it."""
    model, run = tools.quantized_pixart()
    name = "pos_embed.proj.bias"
    change = random(4, *model.get_parameter(name).shape)
    lora = tools.lora(model, 1, names=["transformer_blocks.0.attn1.to_q"])
    before = run(model)
    plain = tools.dense(model, [(tools.deltas(lora), 0.7)])
    plain.get_parameter(name).data += 0.7 * change
    load_adapter(model, lora | {"pos_embed.proj.diff_b": change}, "style", 0.7)
    assert tools.relative(run(model), run(plain)) < 1e-3
    remove_adapter(model, "style")
    assert torch.equal(run(model), before)


def test_names_of_the_checkpoint_that_a_model_came_from():
    """Wan: what its authors call norm3, diffusers calls norm2; a converter that only renames takes one key alone."""
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=64, ffn_dim=128, num_layers=1, text_dim=32, freq_dim=32
    )
    from svdquant.integrations.differences import found_in

    state = {
        "diffusion_model.blocks.0.norm3.diff": torch.ones(128),
        "diffusion_model.blocks.0.self_attn.norm_q.diff": torch.ones(128),
        "diffusion_model.head.head.diff_b": torch.ones(model.proj_out.out_features),
        "diffusion_model.blocks.0.norm9.diff": torch.ones(128),
    }
    found, rest = found_in(model, state, list(state))
    assert list(found) == ["blocks.0.norm2.weight", "blocks.0.attn1.norm_q.weight", "proj_out.bias"]
    assert rest == ["diffusion_model.blocks.0.norm9.diff"]


def test_what_cannot_be_is_said(pipe):
    model = pipe.transformer
    lora, changes = tools.lora(model, 1), differences(model)
    wrong = {"transformer.transformer_blocks.0.attn.norm_q.diff": torch.ones(7)}
    with pytest.raises(SVDQuantError, match=r"norm_q\.diff has the shape \[7\].*norm_q\.weight \[64\]"):
        pipe.load_lora_weights(lora | wrong, adapter_name="style")
    nothing = {"transformer.transformer_blocks.0.attn.norm_x.diff": torch.ones(64)}
    with pytest.warns(UserWarning, match=r"1 differences belong to no parameter .*norm_x\.diff$"):
        pipe.load_lora_weights(lora | nothing, adapter_name="style")
    pipe.unload_lora_weights()
    pipe.load_lora_weights(lora | in_names("diffusers", changes), adapter_name="style")
    with (
        pytest.raises(SVDQuantError, match=r"'style' changes .*norm_q.weight.*batch of their own"),
        svdquant.adapters_per_request(model, ["style"]),
    ):
        pass


def test_a_model_is_saved_as_it_is_after_unfusing(pipe, tmp_path):
    """A pipeline's unfuse_lora goes past its model's; the saved configuration has to follow all the same."""
    model = pipe.transformer
    before = tools.output(model)
    pipe.load_lora_weights(tools.lora(model, 1), adapter_name="style")
    pipe.fuse_lora()
    grown = model.config.quantization_config.layers["transformer_blocks.0.attn.to_q"]["rank"]
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert grown > 16 == model.config.quantization_config.layer_spec("transformer_blocks.0.attn.to_q").rank
    model.save_pretrained(tmp_path)
    loaded = svdquant.set_activations(type(model).from_pretrained(tmp_path), "none")
    assert torch.equal(tools.output(loaded), before)
