"""diffusers: quantizing, saving and loading FLUX through its own API."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import tiny
import torch
from diffusers import AutoModel, DiffusionPipeline, FluxPipeline, FluxTransformer2DModel
from diffusers.quantizers import PipelineQuantizationConfig
from safetensors.torch import load_file, save_file
from torch import nn

import svdquant
from svdquant import SVDQuantError, SVDQuantLinear, W4A16Linear
from svdquant.config import QuantizationMethod
from svdquant.nn import FIXED_DTYPE, quantized_layers

BLOCK = "transformer_blocks.0"


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    tiny.transformer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def quantized():
    model = tiny.transformer()
    svdquant.quantize(model, tiny.config())
    return model


@pytest.fixture(scope="module")
def folder(quantized, tmp_path_factory):
    path = tmp_path_factory.mktemp("quantized")
    quantized.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def bf16():
    model = tiny.transformer().to(torch.bfloat16)
    svdquant.quantize(model, tiny.config())
    return model


@pytest.fixture(scope="module")
def bf16_folder(bf16, tmp_path_factory):
    path = tmp_path_factory.mktemp("bf16")
    bf16.save_pretrained(path)
    return path


def test_quantized_in_place_is_known_to_diffusers(quantized):
    assert quantized.is_quantized
    assert quantized.quantization_method == QuantizationMethod.SVDQUANT
    assert quantized.hf_quantizer.is_serializable
    assert isinstance(quantized.get_submodule(f"{BLOCK}.attn.to_q"), SVDQuantLinear)
    assert isinstance(quantized.get_submodule(f"{BLOCK}.norm1.linear"), W4A16Linear)
    recorded = quantized.config.quantization_config
    assert {n: layer.spec for n, layer in quantized_layers(quantized).items()} == {
        n: recorded.layer_spec(n) for n in recorded.layers
    }


def test_save_and_reload(quantized, folder):
    loaded = FluxTransformer2DModel.from_pretrained(folder)
    assert tiny.state_equal(loaded, quantized)
    assert torch.equal(tiny.run(loaded), tiny.run(quantized))
    assert loaded.is_quantized and loaded.quantization_method == QuantizationMethod.SVDQUANT
    again = AutoModel.from_pretrained(str(folder))
    assert tiny.state_equal(again, quantized)


def test_config_on_disk(folder):
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert stored["quant_method"] == "svdquant"
    assert stored["format_version"] == 1
    assert stored["layers"][f"{BLOCK}.norm1.linear"]["kind"] == "w4a16"


def test_sharded(quantized, tmp_path):
    quantized.save_pretrained(tmp_path, max_shard_size="300KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert tiny.state_equal(FluxTransformer2DModel.from_pretrained(tmp_path), quantized)


@pytest.mark.parametrize("shard", ["10GB", "300KB"])
def test_quantize_on_load_equals_in_place(quantized, tmp_path, shard):
    tiny.transformer().save_pretrained(tmp_path, max_shard_size=shard)
    options = tiny.config()
    loaded, info = FluxTransformer2DModel.from_pretrained(
        tmp_path, quantization_config=options, output_loading_info=True
    )
    assert tiny.state_equal(loaded, quantized)
    assert options.layers is None
    assert not any(info.values())
    assert loaded.config.quantization_config.layers == quantized.config.quantization_config.layers
    loaded.save_pretrained(tmp_path / "again")
    assert tiny.state_equal(FluxTransformer2DModel.from_pretrained(tmp_path / "again"), quantized)


def test_quantize_on_load_bf16_equals_in_place(bf16, dense_folder):
    loaded = FluxTransformer2DModel.from_pretrained(
        dense_folder, torch_dtype=torch.bfloat16, quantization_config=tiny.config()
    )
    assert tiny.state_equal(loaded, bf16)


def test_quantize_on_load_obeys_skip_and_errors(dense_folder):
    options = tiny.config(skip=["*.ff.*"], keep_16bit_above=0.07)
    loaded = FluxTransformer2DModel.from_pretrained(dense_folder, quantization_config=options)
    assert type(loaded.get_submodule(f"{BLOCK}.ff.net.2")) is nn.Linear
    assert type(loaded.get_submodule(f"{BLOCK}.attn.to_q")) is nn.Linear
    assert isinstance(loaded.get_submodule(f"{BLOCK}.norm1.linear"), W4A16Linear)
    assert not any(p.is_meta for p in loaded.parameters())
    with pytest.raises(SVDQuantError, match=r"exceed the relative error"):
        FluxTransformer2DModel.from_pretrained(dense_folder, quantization_config=tiny.config(max_error=0.01))


def test_quantize_on_load_names_a_missing_weight(dense_folder, tmp_path):
    name = f"{BLOCK}.attn.to_k.weight"
    _copy_without(dense_folder, tmp_path, name)
    with pytest.raises(SVDQuantError, match=name):
        FluxTransformer2DModel.from_pretrained(tmp_path, quantization_config=tiny.config())


def test_original_single_file_on_load(quantized, dense_folder):
    loaded = FluxTransformer2DModel.from_single_file(
        str(dense_folder / "diffusion_pytorch_model.safetensors"),
        config=str(dense_folder),
        quantization_config=tiny.config(),
        local_files_only=True,
    )
    assert tiny.state_equal(loaded, quantized)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, None])
def test_stored_types_survive_another_torch_dtype(bf16, bf16_folder, dtype):
    loaded = FluxTransformer2DModel.from_pretrained(bf16_folder, torch_dtype=dtype)
    for name, layer in quantized_layers(loaded).items():
        original = bf16.get_submodule(name)
        for leaf in FIXED_DTYPE:
            if (stored := getattr(original, leaf)) is not None:
                assert torch.equal(getattr(layer, leaf), stored) and getattr(layer, leaf).dtype == stored.dtype
    assert loaded.dtype == (dtype or torch.float32)
    assert loaded.get_submodule(f"{BLOCK}.attn.to_q").proj_up.dtype == (dtype or torch.float32)
    assert tiny.run(loaded).isfinite().all()


def test_fp32_modules_stay_fp32(tmp_path, monkeypatch):
    monkeypatch.setattr(FluxTransformer2DModel, "_keep_in_fp32_modules", ["norm_added_k", "norm1_context"])
    tiny.transformer().save_pretrained(tmp_path / "dense")
    options = {"torch_dtype": torch.bfloat16}
    loaded = FluxTransformer2DModel.from_pretrained(tmp_path / "dense", quantization_config=tiny.config(), **options)
    for _ in range(2):
        assert loaded.get_submodule(f"{BLOCK}.attn.norm_added_k").weight.dtype == torch.float32
        assert type(loaded.get_submodule(f"{BLOCK}.norm1_context.linear")) is nn.Linear
        assert loaded.get_submodule(f"{BLOCK}.norm1_context.linear").weight.dtype == torch.float32
        assert loaded.get_submodule(f"{BLOCK}.attn.norm_q").weight.dtype == torch.bfloat16
        loaded.save_pretrained(tmp_path / "quantized")
        loaded = FluxTransformer2DModel.from_pretrained(tmp_path / "quantized", **options)


def test_layer_without_bias_after_gelu(tmp_path):
    # Its compensation needs a bias that the 16-bit layer does not have.
    model = tiny.transformer()
    model.get_submodule(f"{BLOCK}.ff.net.2").bias = None
    svdquant.quantize(model, tiny.config(rotate=False))
    layer = model.get_submodule(f"{BLOCK}.ff.net.2")
    assert layer.spec.unsigned and layer.bias is not None
    model.save_pretrained(tmp_path)
    assert torch.equal(tiny.run(FluxTransformer2DModel.from_pretrained(tmp_path)), tiny.run(model))


@pytest.mark.parametrize("weights", ["int8", "nvfp4"])
def test_other_formats_save_and_reload(tmp_path, weights):
    model = tiny.transformer().to(torch.bfloat16)
    svdquant.quantize(model, tiny.config(weights=weights))
    model.save_pretrained(tmp_path)
    assert tiny.state_equal(FluxTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16), model)


def test_device_map(quantized, folder):
    loaded = FluxTransformer2DModel.from_pretrained(folder, device_map={"": "cpu"})
    assert tiny.state_equal(loaded, quantized)
    with pytest.raises(SVDQuantError, match="disk"):
        FluxTransformer2DModel.from_pretrained(folder, device_map={"": "disk"}, offload_folder="unused")


def test_refuses_types_it_cannot_compute_in(folder):
    with pytest.raises(SVDQuantError, match="torch_dtype"):
        FluxTransformer2DModel.from_pretrained(folder, torch_dtype=torch.float8_e4m3fn)


def test_pipeline_saves_and_loads_the_same_picture(quantized, tmp_path):
    pipe = tiny.flux_pipeline(transformer=quantized)
    expected = tiny.draw(pipe)
    pipe.save_pretrained(tmp_path)
    loaded = tiny.quiet(DiffusionPipeline.from_pretrained(tmp_path))
    assert isinstance(loaded, FluxPipeline)
    assert tiny.state_equal(loaded.transformer, quantized)
    loaded.vae, loaded.text_encoder, loaded.text_encoder_2 = pipe.vae, pipe.text_encoder, pipe.text_encoder_2
    assert (tiny.draw(loaded) == expected).all()

    # A fresh interpreter knows the format after `import svdquant` alone.
    code = (
        "import svdquant, torch; from diffusers import FluxPipeline; "
        f"p = FluxPipeline.from_pretrained({str(tmp_path)!r}); "
        "print(type(p.transformer.transformer_blocks[0].attn.to_q).__name__, p.transformer.is_quantized)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["SVDQuantLinear", "True"]


def test_pipeline_quantization_config(quantized, tmp_path):
    tiny.flux_pipeline().save_pretrained(tmp_path)
    mapping = PipelineQuantizationConfig(quant_mapping={"transformer": tiny.config()})
    pipe = tiny.quiet(DiffusionPipeline.from_pretrained(tmp_path, quantization_config=mapping))
    assert tiny.state_equal(pipe.transformer, quantized)
    assert not quantized_layers(pipe.text_encoder_2)
    backend = PipelineQuantizationConfig(
        quant_backend="svdquant", quant_kwargs={"rank": tiny.RANK}, components_to_quantize=["transformer"]
    )
    pipe = DiffusionPipeline.from_pretrained(tmp_path, quantization_config=backend)
    assert tiny.state_equal(pipe.transformer, quantized)


def test_dequantize(folder, tmp_path):
    model = FluxTransformer2DModel.from_pretrained(folder)
    svdquant.set_activations(model, "none")
    expected = tiny.run(model)
    model.dequantize()
    assert not quantized_layers(model) and not model.is_quantized
    assert type(model.get_submodule(f"{BLOCK}.attn.to_q")) is nn.Linear
    torch.testing.assert_close(tiny.run(model), expected, rtol=1e-4, atol=1e-5)
    model.fuse_qkv_projections()
    model.unfuse_qkv_projections()
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert not quantized_layers(FluxTransformer2DModel.from_pretrained(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, n: t.pop(f"{n}.qweight"), r"to_q\.qweight is missing"),
        (lambda t, n: t.pop("x_embedder.weight"), r"x_embedder\.weight is missing"),
        (lambda t, n: t.update({f"{n}.extra": torch.zeros(1)}), r"to_q\.extra belongs to no layer"),
        (lambda t, n: t.update({f"{n}.wscales": torch.zeros(3, 2)}), r"to_q\.wscales has the shape \[3, 2\]"),
        (lambda t, n: t.update({f"{n}.qweight": t[f"{n}.qweight"].view(torch.int8)}), r"to_q\.qweight has the type I8"),
        (lambda t, n: t.update({f"{n}.proj_up": t[f"{n}.proj_up"].int()}), r"to_q\.proj_up has the type I32"),
    ],
)
def test_strict_loading(folder, tmp_path, change, message):
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    change(tensors, f"{BLOCK}.attn.to_q")
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(SVDQuantError, match=message):
        FluxTransformer2DModel.from_pretrained(tmp_path)


def test_strict_config(folder, tmp_path):
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(
        (folder / "diffusion_pytorch_model.safetensors").read_bytes()
    )
    config = json.loads((folder / "config.json").read_text())
    quantization = config["quantization_config"]
    changes = [
        ({"format_version": 2}, "newer"),
        ({"layers": None}, "names no layers"),
        ({"layers": quantization["layers"] | {"nowhere.at_all": {"kind": "svdquant"}}}, "nowhere.at_all"),
        ({"layers": {f"{BLOCK}.attn.to_q": {"kind": "magic"}}}, r"to_q cannot be read"),
    ]
    for change, message in changes:
        (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": quantization | change}))
        with pytest.raises(SVDQuantError, match=message):
            FluxTransformer2DModel.from_pretrained(tmp_path)


def test_saving_refuses_pickle_and_attached_adapters(folder, tmp_path):
    model = FluxTransformer2DModel.from_pretrained(folder)
    with pytest.raises(SVDQuantError, match="safe_serialization"):
        model.save_pretrained(tmp_path / "a", safe_serialization=False)
    layer = model.get_submodule(f"{BLOCK}.attn.to_q")
    wrapper = nn.Module()
    wrapper.base_layer = layer
    model.get_submodule(f"{BLOCK}.attn").to_q = wrapper
    with pytest.raises(SVDQuantError, match="unload_lora_weights"):
        model.save_pretrained(tmp_path / "b")


def _copy_without(source, target, name):
    tensors = load_file(source / "diffusion_pytorch_model.safetensors")
    del tensors[name]
    save_file(tensors, target / "diffusion_pytorch_model.safetensors")
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
