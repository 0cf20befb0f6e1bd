"""A quantized model is a diffusers model: compiling, copying, offloading, caching, batching work as for any other."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny
import torch
from accelerate import cpu_offload
from diffusers import FirstBlockCacheConfig
from diffusers.hooks import apply_layerwise_casting
from torch import nn
from torch.library import opcheck

import svdquant
from svdquant import SVDQuantError
from svdquant.nn import quantized_layers


@pytest.fixture(scope="module")
def original():
    model = tiny.transformer(layers=2, single_layers=2)
    svdquant.quantize(model, tiny.config())
    return model


@pytest.fixture
def model(original):
    return copy.deepcopy(original)


def test_import_is_light():
    code = (
        "import sys, time; t = time.perf_counter(); import svdquant; t = time.perf_counter() - t; "
        "print(t, [m for m in ('torch', 'diffusers', 'transformers', 'numpy') if m in sys.modules])"
    )
    seconds = []
    for _ in range(3):
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        took, loaded = out.split(maxsplit=1)
        assert loaded.strip() == "[]"
        seconds.append(float(took))
        if seconds[-1] < 0.5:
            break
        time.sleep(0.5)
    assert min(seconds) < 0.5


def test_set_activations(model):
    auto = tiny.run(model)
    outputs = {a: tiny.run(svdquant.set_activations(model, a)) for a in ("int4", "int8", "fp8", "nvfp4", "none")}
    exact = outputs["none"]
    errors = {a: float((y - exact).norm() / exact.norm()) for a, y in outputs.items()}
    assert 0 < errors["int8"] < errors["int4"] and errors["nvfp4"] > 0 and errors["fp8"] > 0
    assert torch.equal(tiny.run(svdquant.set_activations(model, "auto")), auto)
    svdquant.set_activations(model, {"*.ff.*": "int4"})
    assert not torch.equal(tiny.run(model), auto)
    with pytest.raises(SVDQuantError, match="matches no quantized layer"):
        svdquant.set_activations(model, {"nowhere": "int4"})


def test_deepcopy_and_pickle(original):
    for other in (copy.deepcopy(original), pickle.loads(pickle.dumps(original))):
        assert tiny.state_equal(other, original)
        assert torch.equal(tiny.run(other), tiny.run(original))
        assert other.is_quantized
        with pytest.raises(SVDQuantError):
            other.fuse_qkv_projections()


def test_compile_repeated_blocks(model, monkeypatch):
    torch._dynamo.reset()
    # A compiler sees diffusers' own forwards.
    monkeypatch.setenv("SVDQUANT_FUSE", "0")
    expected = [tiny.run(model), tiny.run(model, side=6, text=5)]
    monkeypatch.delenv("SVDQUANT_FUSE")
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    for y, shape in zip(expected, ({}, {"side": 6, "text": 5}), strict=True):
        torch.testing.assert_close(tiny.run(model, **shape), y, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("activations", ["int4", "int8", "none"])
def test_operators_are_well_formed(original, activations):
    layers = quantized_layers(original)
    t = layers["transformer_blocks.0.attn.to_q"].tensors()
    tensors = (t.qweight, t.wscales, t.wcscales, t.smooth_factor, t.proj_down, t.proj_up, t.bias)
    x = torch.randn(2, 3, t.in_features)
    opcheck(torch.ops.svdquant.linear.default, (x, *tensors, "int4", 64, [], t.spec.rotate, activations))
    m = layers["transformer_blocks.0.norm1.linear"]
    opcheck(torch.ops.svdquant.w4a16_linear.default, (x, m.qweight, m.wscales, None, m.bias, "int4"))


def test_sequential_offload(original, model):
    cpu_offload(model, execution_device=torch.device("cpu"))
    layer = model.get_submodule("transformer_blocks.0.attn.to_q")
    assert layer.qweight.is_meta and layer.weight.is_meta
    for _ in range(2):
        assert torch.equal(tiny.run(model), tiny.run(original))
    with pytest.raises(SVDQuantError, match="is offloaded"):
        svdquant.save_model(model, "unused.safetensors")
    with pytest.raises(SVDQuantError, match="is offloaded"):
        model.dequantize()


@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
def test_group_offload(original, model, level):
    cpu = torch.device("cpu")
    blocks = {"num_blocks_per_group": 1} if level == "block_level" else {}
    model.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type=level, **blocks)
    for _ in range(2):
        assert torch.equal(tiny.run(model), tiny.run(original))


def test_first_block_cache(original, model):
    pipe = tiny.flux_pipeline(transformer=original)
    expected = tiny.draw(pipe, num_inference_steps=3)
    cached = tiny.flux_pipeline(transformer=model)
    model.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    assert (tiny.draw(cached, num_inference_steps=3) == expected).all()
    model.disable_cache()
    model.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    reused = tiny.draw(cached, num_inference_steps=3)
    assert np.isfinite(reused).all() and (reused != expected).any()
    model.disable_cache()
    assert (tiny.draw(cached, num_inference_steps=3) == expected).all()


def test_batches(original):
    pipe = tiny.flux_pipeline(transformer=original)

    def images(prompts, seeds):
        generator = [torch.Generator().manual_seed(seed) for seed in seeds]
        options = {"num_inference_steps": 2, "max_sequence_length": 16, "guidance_scale": 1.0, "output_type": "np"}
        return pipe(prompts, height=8, width=8, generator=generator, **options).images

    prompts = ["a cat", "a dog on a hill", "rain"]
    together = images(prompts, [1, 2, 3])
    assert together.shape == (3, 8, 8, 3)
    for i, prompt in enumerate(prompts):
        np.testing.assert_allclose(images([prompt], [i + 1])[0], together[i], atol=1e-2)
    assert tiny.draw(pipe, num_images_per_prompt=2).shape[0] == 2


@pytest.mark.parametrize(("height", "width"), [(6, 10), (14, 4), (2, 26)])
def test_odd_sizes(original, height, width):
    image = tiny.draw(tiny.flux_pipeline(transformer=original), height=height, width=width)
    assert image.shape == (1, height, width, 3) and np.isfinite(image).all()


@pytest.mark.parametrize(("side", "text", "batch"), [(1, 1, 1), (3, 7, 2), (9, 65, 1), (16, 1, 1)])
def test_token_counts(original, side, text, batch):
    y = tiny.run(original, side=side, text=text, batch=batch)
    assert y.shape == (batch, side * side, 4) and y.isfinite().all()


def test_layer_takes_any_leading_shape(original):
    layer = quantized_layers(original)["transformer_blocks.0.attn.to_q"]
    x = torch.randn(5, 128)
    y = layer(x)
    for shape in ((5, 128), (1, 5, 128), (5, 1, 1, 128)):
        assert torch.equal(layer(x.reshape(shape)), y.reshape(*shape[:-1], 128))
    assert layer(x[:0]).shape == (0, 128)
    assert layer(x[0]).shape == (128,)
    with pytest.raises(SVDQuantError, match="features"):
        layer(x[:, :64])


def test_fusion_is_refused(original, model):
    before = tiny.run(original)
    with pytest.raises(SVDQuantError, match="fuse_qkv_projections"):
        model.fuse_qkv_projections()
    with pytest.raises(SVDQuantError, match="fuse_qkv_projections"):
        model.transformer_blocks[0].attn.fuse_projections()
    assert tiny.state_equal(model, original) and torch.equal(tiny.run(model), before)
    # Other models of the class are free to.
    dense = tiny.transformer()
    dense.fuse_qkv_projections()


def test_layerwise_casting_is_refused(original, model):
    for storage in (torch.float8_e4m3fn, torch.float8_e5m2):
        with pytest.raises(SVDQuantError, match="enable_layerwise_casting"):
            model.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
    assert tiny.state_equal(model, original)
    assert torch.equal(tiny.run(model), tiny.run(original))


@pytest.mark.parametrize("weights", ["int4", "nvfp4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_refused_cast_leaves_a_layer_as_it_was(weights, dtype):
    model = tiny.transformer().to(torch.bfloat16)
    svdquant.quantize(model, tiny.config(weights=weights))
    before = copy.deepcopy(model)
    for layer in quantized_layers(model).values():
        with pytest.raises(SVDQuantError, match="8 bits"):
            layer.to(dtype)
    assert tiny.state_equal(model, before)
    with pytest.raises(SVDQuantError, match="8 bits"):
        apply_layerwise_casting(model, storage_dtype=dtype, compute_dtype=torch.bfloat16, skip_modules_pattern=())
    for name, layer in quantized_layers(model).items():
        assert tiny.state_equal(layer, before.get_submodule(name))


def test_casts_of_the_whole_model(model):
    with pytest.raises(ValueError, match="Casting a quantized model"):
        model.to(torch.float16)
    with pytest.raises(ValueError, match="half"):
        model.half()
    # The module's own method keeps the stored types.
    layer = quantized_layers(model)["transformer_blocks.0.attn.to_q"]
    scales = layer.wscales.clone()
    nn.Module.to(model, torch.bfloat16)
    assert torch.equal(layer.wscales, scales) and layer.wscales.dtype == torch.float32
    assert layer.proj_up.dtype == torch.bfloat16 and layer.qweight.dtype == torch.uint8
    nn.Module.to(model, torch.float32)
    assert torch.equal(layer.wscales, scales)


def test_virtual_weight(original):
    layer = quantized_layers(original)["transformer_blocks.0.ff.net.2"]
    assert layer.weight.shape == (128, 512) and layer.weight.dtype == torch.float32
    assert layer.weight.untyped_storage().nbytes() <= 4
    assert original.dtype == torch.float32 and "weight" not in dict(layer.named_parameters())
