"""Fused forwards compute what diffusers' own do, and step aside for whatever somebody else has put in their place."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import tiny
import torch
from diffusers import FluxTransformer2DModel
from diffusers.hooks import LayerSkipConfig, apply_layer_skip
from diffusers.models import activations, normalization
from diffusers.models.transformers import transformer_flux
from torch import Tensor, nn

import svdquant
from svdquant import kernels
from svdquant.families import fused
from svdquant.nn import SVDQuantLinear

BLOCKS = ("transformer_blocks.0", "single_transformer_blocks.0")
needs_library = pytest.mark.skipif(not kernels.cpu.available(), reason="nothing is fused without the compiled library")


@pytest.fixture(scope="module")
def quantized() -> FluxTransformer2DModel:
    model = tiny.transformer().to(torch.bfloat16)
    randomize_norms(model)
    svdquant.quantize(model, tiny.config())
    return model


@pytest.fixture
def model(quantized) -> FluxTransformer2DModel:
    return copy.deepcopy(quantized)


def randomize_norms(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.RMSNorm):
            module.weight.data.copy_(torch.rand(module.weight.shape, generator=generator) + 0.5)


def plain(model: nn.Module) -> Any:
    """A copy with diffusers' own forwards."""
    other = copy.deepcopy(model)
    fused.uninstall(other)
    return other


def fused_classes(model: nn.Module) -> set[str]:
    parts = [part for m in model.modules() for part in (m, m.__dict__.get("processor"))]
    return {type(part).__name__ for part in parts if type(part).__module__.startswith("svdquant.families")}


def arguments(batch: int = 1, text: int = 5, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """Of one block of the tiny model, with 12 image tokens."""
    generator = torch.Generator().manual_seed(batch * 10 + text)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    positions = torch.randint(0, 9, (text + 12, 3), generator=generator).float()
    return {
        "hidden_states": random(batch, 12, 128),
        "encoder_hidden_states": random(batch, text, 128),
        "temb": random(batch, 128),
        "image_rotary_emb": transformer_flux.FluxPosEmbed(10000, [8, 28, 28])(positions),
    }


@torch.no_grad()
def run(block: Any, **options: Any) -> Tensor:
    return torch.cat(block(**(arguments() | options)), dim=1)


def error(y: Tensor, truth: Tensor) -> float:
    return float((y.double() - truth.double()).norm() / truth.double().norm())


@needs_library
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize(("batch", "text"), [(1, 5), (2, 5), (3, 1)])
def test_quantized_blocks(model, name, batch, text):
    block = model.get_submodule(name)
    ours, theirs = (run(b, **arguments(batch, text)) for b in (block, plain(block)))
    assert 0 < error(ours, theirs) < 4e-3
    for dtype, bound in ((torch.float16, 2e-3), (torch.float32, 1e-5)):
        block.to(dtype)
        svdquant.set_activations(block, "none")
        inputs = arguments(batch, text, dtype)
        assert error(run(block, **inputs), run(plain(block), **inputs)) < bound


@needs_library
@pytest.mark.parametrize("dense", [tiny.transformer(seed=1)], ids=["dense"])
@pytest.mark.parametrize("name", BLOCKS)
def test_nearer_to_the_truth(dense, name):
    """One rounding instead of several, on layers that nobody quantized."""
    block = copy.deepcopy(dense.get_submodule(name))
    randomize_norms(block)
    inputs, cast = arguments(2, dtype=torch.float32), copy.deepcopy(block).bfloat16()
    fused.install(cast)
    half = {key: value.bfloat16() if torch.is_tensor(value) else value for key, value in inputs.items()}
    inputs = {key: value.float() if torch.is_tensor(value) else value for key, value in half.items()}
    exact = copy.deepcopy(cast).float()
    truth = run(plain(exact), **inputs)
    assert error(run(exact, **inputs), truth) < 1e-6
    assert error(run(cast, **half), truth) < error(run(plain(cast), **half), truth) < 1e-2


@pytest.mark.parametrize("batch", [1, 2])
def test_whole_model(model, batch):
    theirs = plain(model)
    assert fused_classes(theirs) == set()
    assert error(tiny.run(model, batch=batch), tiny.run(theirs, batch=batch)) < 1e-2
    assert fused_classes(model) == {
        *("AdaLayerNormZero", "AdaLayerNormZeroSingle", "AdaLayerNormContinuous", "GELU", "RMSNorm"),
        *("FluxTransformerBlock", "FluxSingleTransformerBlock", "FluxAttnProcessor"),
    }


def test_modules_stay_what_they_are(model, quantized):
    theirs = plain(model)
    for (name, ours), original in zip(model.named_modules(), theirs.modules(), strict=True):
        assert isinstance(ours, type(original)) and type(ours).__name__ == type(original).__name__, name
        assert ours.__dict__.keys() == original.__dict__.keys()
    assert tiny.state_equal(model, theirs)
    assert model.transformer_blocks[0].attn.processor.__class__.__name__ == "FluxAttnProcessor"
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert fused_classes(other) == fused_classes(model)
        assert torch.equal(tiny.run(other), tiny.run(quantized))
    fused.install(model)
    assert torch.equal(tiny.run(model), tiny.run(quantized))


def test_saved_loaded_and_dequantized(model, tmp_path):
    expected = tiny.run(model)
    model.save_pretrained(tmp_path)
    loaded = FluxTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert fused_classes(loaded) == fused_classes(model)
    assert torch.equal(tiny.run(loaded), expected)
    loaded.dequantize()
    assert fused_classes(loaded) == set()


def test_turned_off(model, quantized, monkeypatch, tmp_path):
    theirs = tiny.run(plain(model))
    monkeypatch.setenv("SVDQUANT_FUSE", "0")
    assert torch.equal(tiny.run(model), theirs)
    quantized.save_pretrained(tmp_path)
    assert fused_classes(FluxTransformer2DModel.from_pretrained(tmp_path)) == set()


class Counting(transformer_flux.FluxAttnProcessor):
    """A user's own processor."""

    calls = 0

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.calls += 1
        return super().__call__(*args, **options)


def test_a_users_processor(model):
    processor = Counting()
    model.set_attn_processor(processor)
    y = tiny.run(model)
    assert processor.calls == 2 and "FluxAttnProcessor" not in fused_classes(model)
    theirs = plain(model)
    assert error(y, tiny.run(theirs)) < 1e-2
    # One that is there before the model is quantized stays as well.
    fused.install(model)
    assert all(p is processor for p in model.attn_processors.values()) and type(processor) is Counting


def test_attention_backends_and_masks(model, monkeypatch):
    seen: list[Any] = []
    dispatch = transformer_flux.dispatch_attention_fn

    def record(*heads: Tensor, **options: Any) -> Tensor:
        seen.append(options)
        return dispatch(*heads, **options)

    for module in (transformer_flux, fused.flux):
        monkeypatch.setattr(module, "dispatch_attention_fn", record)
    processor = model.transformer_blocks[0].attn.processor
    model.transformer_blocks[0].attn.set_attention_backend("_native_math")
    block = model.transformer_blocks[0]
    free = run(block)
    assert seen[-1]["backend"] == processor._attention_backend == "_native_math"
    mask = torch.zeros(1, 1, 1, 17, dtype=torch.bfloat16)
    mask[..., 3] = -torch.inf
    masked = run(block, joint_attention_kwargs={"attention_mask": mask})
    assert seen[-1]["attn_mask"] is mask and not torch.equal(masked, free)
    assert error(masked, run(plain(block), joint_attention_kwargs={"attention_mask": mask})) < 4e-3
    # Sequences that are split over several devices are diffusers' business.
    monkeypatch.setattr(fused.flux, "joint_heads", lambda *_: pytest.fail("not diffusers' own"))
    processor._parallel_config = object()
    run(block)
    assert seen[-1]["parallel_config"] is processor._parallel_config


@pytest.mark.parametrize("text", [None, 5])
def test_attention_alone(model, text):
    """With and without a text stream, with and without rotation."""
    attn = model.get_submodule(BLOCKS[text is None]).attn
    inputs = arguments()
    streams = {"hidden_states": inputs["hidden_states"]}
    if text:
        streams["encoder_hidden_states"] = inputs["encoder_hidden_states"]
    tables = tuple(part[: 12 + (text or 0)] for part in inputs["image_rotary_emb"])
    for rotary in (None, tables):
        with torch.no_grad():
            ours, theirs = (a(**streams, image_rotary_emb=rotary) for a in (attn, plain(attn)))
        for y, truth in zip(ours if text else [ours], theirs if text else [theirs], strict=True):
            assert error(y, truth) < 1.5e-2


def test_adapters(model):
    """PEFT takes the place of layers: they are called, and nothing that they compute is left out."""
    from peft import LoraConfig

    before = tiny.run(model)
    targets = ["to_q", "to_v", "add_k_proj", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_mlp", "norm1.linear"]
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights=False, target_modules=targets))
    y, theirs = tiny.run(model), tiny.run(plain(model))
    assert error(y, theirs) < 1e-2 < error(y, before)
    model.disable_adapters()
    assert error(tiny.run(model), before) < 1e-2


def test_hooks_see_their_layers(model):
    seen: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, SVDQuantLinear) or name.endswith(("norm_q", "norm2", "act_mlp")):
            module.register_forward_hook(lambda _m, _i, _o, name=name: seen.append(name))
    y = tiny.run(model)
    expected = {n for n, m in model.named_modules() if isinstance(m, SVDQuantLinear) or n.endswith(("norm_q", "norm2"))}
    assert expected | {"single_transformer_blocks.0.act_mlp"} == set(seen)
    assert error(y, tiny.run(plain(model))) < 1e-2


def test_forwards_of_others(model):
    """A layer whose forward somebody has replaced is called as it always was."""
    layer = model.transformer_blocks[0].attn.to_q
    forward, calls = layer.forward, []

    def replaced(x: Tensor) -> Tensor:
        calls.append(x.shape)
        return forward(x)

    expected = tiny.run(model)
    layer.forward = replaced
    assert torch.equal(tiny.run(model), expected) and len(calls) == 1


def test_gradients(model):
    """Training goes through diffusers' own forwards."""
    for name in BLOCKS:
        block, inputs = model.get_submodule(name), arguments()
        inputs["hidden_states"].requires_grad_()
        y = torch.cat(block(**inputs), dim=1)
        assert torch.equal(y, torch.cat(plain(block)(**inputs), dim=1))
        y.float().sum().backward()
        assert bool(inputs["hidden_states"].grad.any())


@pytest.mark.parametrize("name", BLOCKS)
def test_compiled(model, name):
    torch._dynamo.reset()
    block = model.get_submodule(name)
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    assert torch.equal(run(compiled), run(plain(block)))
    torch._dynamo.reset()


def test_skipped_layers(model):
    """diffusers looks the classes of blocks and processors up."""
    free = tiny.run(model)
    apply_layer_skip(model, LayerSkipConfig(indices=[0], fqn="transformer_blocks"))
    assert not torch.equal(tiny.run(model), free)


def test_another_signature(monkeypatch):
    """A diffusers whose forward takes more than we know keeps it."""

    def forward(self: Any, hidden_states: Tensor, temb: Tensor, something_new: Any = None) -> Tensor:
        return hidden_states

    monkeypatch.setattr(transformer_flux.FluxTransformerBlock, "forward", forward)
    known = fused._classes.__wrapped__()
    assert transformer_flux.FluxTransformerBlock not in known
    assert transformer_flux.FluxSingleTransformerBlock in known


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_shared_modules(dtype):
    """Modules that other families use too, in forms that FLUX does not have."""
    torch.manual_seed(0)
    x, emb = torch.randn(2, 7, 48).to(dtype), torch.randn(2, 48).to(dtype)
    cases: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = [
        (normalization.AdaLayerNormZero(48, norm_type="fp32_layer_norm"), (x,), {"emb": emb}),
        (normalization.AdaLayerNormZero(48, num_embeddings=4), (x, torch.ones(2), torch.ones(2).long(), dtype), {}),
        (normalization.AdaLayerNormContinuous(48, 48), (x, emb.float()), {}),
        (normalization.AdaLayerNormContinuous(48, 48, bias=False), (x, emb), {}),
        (normalization.AdaLayerNormContinuous(48, 48, norm_type="rms_norm"), (x, emb), {}),
        (activations.GELU(48, 96, approximate="tanh"), (x,), {}),
        (activations.GELU(48, 96), (x,), {}),
        (nn.RMSNorm(48, eps=None), (x[:, :, None],), {}),
        (nn.RMSNorm(48, eps=1e-6), (x[:, :, None],), {}),
        (nn.RMSNorm(48, eps=1e-6), (x,), {}),
    ]
    for module, inputs, options in cases:
        for parameter in module.parameters():
            parameter.data.normal_(0, 0.3)
        module = module.to(dtype)
        fused_module = copy.deepcopy(module)
        fused.install(fused_module)
        with torch.no_grad():
            ours, theirs = fused_module(*inputs, **options), module(*inputs, **options)
        for y, truth in zip(ours, theirs, strict=True):
            assert y.dtype == truth.dtype
            assert error(y, truth) < (8e-3 if dtype == torch.bfloat16 else 1e-6), module
