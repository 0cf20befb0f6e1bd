"""transformers: text encoders, quantized in place or on load, saved and loaded again."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from diffusers import DiffusionPipeline
from diffusers.quantizers import PipelineQuantizationConfig
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, CLIPTextModel, T5EncoderModel

import svdquant
from svdquant import SVDQuantError, SVDQuantLinear
from svdquant.config import QuantizationMethod
from svdquant.nn import FIXED_DTYPE, quantized_layers

WIDTH = 128
FF = "encoder.block.0.layer.1.DenseReluDense"
MODELS = {"t5": (tiny.t5, T5EncoderModel, {"width": WIDTH}), "clip": (tiny.clip, CLIPTextModel, {"hidden": WIDTH})}


def options(**fields):
    return tiny.config(**({"activations": "none"} | fields))


@torch.no_grad()
def encode(model):
    return model(torch.arange(2, 12)[None]).last_hidden_state


@pytest.fixture(params=MODELS)
def kind(request):
    return request.param


def build(kind, dtype=torch.float32):
    make, cls, arguments = MODELS[kind]
    return make(**arguments).to(dtype), cls


def test_in_place_save_and_reload(kind, tmp_path):
    model, cls = build(kind)
    reference = encode(model)
    svdquant.quantize(model, options())
    assert model.is_quantized and model.quantization_method == QuantizationMethod.SVDQUANT
    expected = encode(model)
    error = float((expected - reference).norm() / reference.norm())
    assert 0 < error < 0.2
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="200KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    for folder in ("one", "many"):
        loaded, info = cls.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert tiny.state_equal(loaded, model)
        assert loaded.is_quantized and not any(p.requires_grad for p in quantized_parameters(loaded))
        torch.testing.assert_close(encode(loaded), expected, rtol=0, atol=1e-6)
    assert tiny.state_equal(svdquant.load_model(tmp_path / "many"), model)


def test_on_load_equals_in_place(kind, tmp_path):
    model, cls = build(kind)
    model.save_pretrained(tmp_path)
    svdquant.quantize(model, options())
    given = options()
    loaded = cls.from_pretrained(tmp_path, quantization_config=given)
    assert tiny.state_equal(loaded, model)
    assert given.layers is None
    loaded.save_pretrained(tmp_path / "again")
    stored = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert stored["quant_method"] == "svdquant" and len(stored["layers"]) == len(quantized_layers(model))
    assert tiny.state_equal(cls.from_pretrained(tmp_path / "again"), model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_stored_types_survive_another_dtype(kind, dtype, tmp_path):
    model, cls = build(kind, torch.bfloat16)
    svdquant.quantize(model, options(gptq=False))
    model.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path, dtype=dtype)
    for name, layer in quantized_layers(loaded).items():
        for leaf in FIXED_DTYPE:
            stored = getattr(model.get_submodule(name), leaf)
            assert stored is None or torch.equal(getattr(layer, leaf).view(torch.uint8), stored.view(torch.uint8))
    assert encode(loaded).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_t5_output_projection_stays_in_fp32_under_fp16(tmp_path, dtype):
    """transformers keeps `wo` in float32 beside fp16; packed, its branch must be, or its inputs lose their range."""
    dense = tiny.t5(width=WIDTH)
    reference = encode(dense)
    dense.save_pretrained(tmp_path / "dense")
    for folder in ("dense", "quantized"):
        config = {"quantization_config": options()} if folder == "dense" else {}
        loaded = T5EncoderModel.from_pretrained(tmp_path / folder, dtype=dtype, **config)
        layer = loaded.get_submodule(f"{FF}.wo")
        assert isinstance(layer, SVDQuantLinear)
        assert layer.weight.dtype == layer.proj_up.dtype == (torch.float32 if dtype == torch.float16 else dtype)
        assert loaded.get_submodule(f"{FF}.wi_0").proj_up.dtype == dtype
        error = (encode(loaded).float() - reference).norm() / reference.norm()
        assert float(error) < 0.2
        loaded.save_pretrained(tmp_path / "quantized")


def test_skipped_layers_stay(tmp_path):
    model = tiny.t5(width=WIDTH)
    model.save_pretrained(tmp_path)
    loaded = T5EncoderModel.from_pretrained(tmp_path, quantization_config=options(skip=["wo"]))
    assert type(loaded.get_submodule(f"{FF}.wo")) is nn.Linear
    assert isinstance(loaded.get_submodule(f"{FF}.wi_0"), SVDQuantLinear)


def test_auto_model(tmp_path):
    model, _ = build("clip")
    svdquant.quantize(model, options())
    model.save_pretrained(tmp_path)
    assert tiny.state_equal(AutoModel.from_pretrained(tmp_path), model)


def test_pipeline_quantization_config(tmp_path):
    pipe = tiny.flux_pipeline(text_encoder_2=tiny.t5(width=32), text_encoder=tiny.clip(hidden=WIDTH))
    pipe.save_pretrained(tmp_path)
    mapping = PipelineQuantizationConfig(quant_mapping={"transformer": tiny.config(), "text_encoder": options()})
    loaded = DiffusionPipeline.from_pretrained(tmp_path, quantization_config=mapping)
    assert quantized_layers(loaded.text_encoder) and quantized_layers(loaded.transformer)
    loaded.save_pretrained(tmp_path / "again")
    again = DiffusionPipeline.from_pretrained(tmp_path / "again")
    assert tiny.state_equal(again.text_encoder, loaded.text_encoder)


def test_dequantize(kind, tmp_path):
    model, cls = build(kind)
    svdquant.quantize(model, options())
    expected = encode(svdquant.set_activations(model, "none"))
    model.dequantize()
    assert not quantized_layers(model) and not model.is_quantized
    torch.testing.assert_close(encode(model), expected, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    assert not quantized_layers(cls.from_pretrained(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, n: t.pop(f"{n}.wscales"), r"wi_0\.wscales is missing"),
        (lambda t, n: t.update({f"{n}.wcscales": torch.zeros(4)}), r"wi_0\.wcscales belongs to no layer"),
        (lambda t, n: t.update({f"{n}.wscales": torch.zeros(3, 2)}), r"wi_0\.wscales has the shape"),
        (lambda t, n: t.update({f"{n}.qweight": t[f"{n}.qweight"].view(torch.int8)}), r"wi_0\.qweight has the type"),
    ],
)
def test_strict_loading(tmp_path, change, message):
    model = tiny.t5(width=WIDTH)
    svdquant.quantize(model, options())
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors, f"{FF}.wi_0")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(SVDQuantError, match=message):
        T5EncoderModel.from_pretrained(tmp_path)


def quantized_parameters(model):
    return [p for layer in quantized_layers(model).values() for p in layer.parameters()]
