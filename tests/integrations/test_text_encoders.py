"""Text encoders in W4A16, one at a time: every class that published pipelines use, in memory, on disk, and on load."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import independent
import numpy as np
import pytest
import tiny
import tiny_text
import torch
import transformers
from safetensors import safe_open

import svdquant
from svdquant import SVDQuantConfig
from svdquant.checkpoint import inspect
from svdquant.integrations.components import text_config
from svdquant.integrations.on_disk import quantize_pipeline
from svdquant.nn import W4A16Linear, quantized_layers
from svdquant.ptq.plan import make_plan


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    expected = expected.double()
    return float((actual.double() - expected).norm() / expected.norm())


def tensor_names(folder: Path) -> set[str]:
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as handle:
            names |= set(handle.keys())
    return names


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.bfloat16) for name in tiny_text.CONFIGS]
    + [(name, torch.float32) for name in ("UMT5EncoderModel", "CLIPTextModel", "Qwen2_5_VLForConditionalGeneration")],
    ids=str,
)
def test_every_way_gives_the_same_bits(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Folder to folder, in memory, while loading; then saved and loaded again."""
    cls = getattr(transformers, name)
    dense = tiny_text.text_encoder(name, dtype=dtype)
    dense.save_pretrained(tmp_path / "dense")
    quantize_pipeline(tmp_path / "dense", tmp_path / "streamed", SVDQuantConfig(), dtype=dtype)
    model = cls.from_pretrained(tmp_path / "dense", dtype=dtype)
    reference = tiny_text.encode(model)
    report = svdquant.quantize(model, text_config())
    hidden = tiny_text.encode(model)
    assert {layer.kind for layer in report.layers} == {"w4a16"} and len(report.layers) >= 12
    assert 0.02 < relative(hidden, reference) < 0.4

    model.save_pretrained(tmp_path / "saved", max_shard_size="100KB")
    loaded = [cls.from_pretrained(tmp_path / folder) for folder in ("streamed", "saved")]
    loaded.append(cls.from_pretrained(tmp_path / "dense", dtype=dtype, quantization_config=text_config()))
    for other in loaded:
        assert other.dtype == dtype and other.is_quantized
        assert tiny.state_equal(other, model)
        assert torch.equal(tiny_text.encode(other), hidden)

    # Nothing under another name than in the 16-bit files, tied weights once.
    names = tensor_names(tmp_path / "streamed")
    assert names == tensor_names(tmp_path / "saved")
    assert {name.rpartition(".")[0] for name in names} == {
        name.rpartition(".")[0] for name in tensor_names(tmp_path / "dense")
    }
    info = inspect(tmp_path / "streamed")
    assert info.layers == {"w4a16": {"int4": len(report.layers)}}
    layers: Any = quantized_layers(model).values()
    assert info.quantized_bytes == sum(layer.qweight.nbytes + layer.wscales.nbytes for layer in layers)


def test_float16_keeps_the_input_of_t5s_output_projection_in_float32(tmp_path: Path) -> None:
    """transformers keeps `wo` in float32 beside float16: without a branch no tensor of the packed layer shows it."""
    tiny_text.text_encoder("T5EncoderModel").save_pretrained(tmp_path / "dense")
    load = transformers.T5EncoderModel.from_pretrained
    model = load(tmp_path / "dense", dtype=torch.float16, quantization_config=text_config())
    model.save_pretrained(tmp_path / "saved")
    quantize_pipeline(tmp_path / "dense", tmp_path / "streamed", SVDQuantConfig(), dtype=torch.float16)
    again, streamed = load(tmp_path / "saved"), load(tmp_path / "streamed")
    for each in (model, again, streamed):
        assert each.dtype == torch.float16
        assert {n.weight.dtype for name, n in quantized_layers(each).items() if name.endswith("wo")} == {torch.float32}
        assert {n.weight.dtype for name, n in quantized_layers(each).items() if name.endswith("q")} == {torch.float16}
    assert torch.equal(tiny_text.encode(model), tiny_text.encode(again))
    assert torch.equal(tiny_text.encode(model), tiny_text.encode(streamed))


def after_stack(name: str) -> str:
    """What follows the list of blocks; what precedes it is another in some files."""
    return re.sub(r"^.*?\.(?=\d)", "", name.removesuffix(".qweight"))


@pytest.mark.parametrize(
    "name", ["T5EncoderModel", "CLIPTextModel", "Gemma2Model", "Qwen2_5_VLForConditionalGeneration"]
)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)], ids=["fp32", "bf16"])
def test_layers_multiply_what_is_stored(name: str, dtype: torch.dtype, limit: float, tmp_path: Path) -> None:
    """Against float64 products with the codes and scales of the file, read by a reader of its own."""
    model = tiny_text.text_encoder(name, dtype=dtype)
    svdquant.quantize(model, text_config())
    model.save_pretrained(tmp_path)
    tensors, _ = independent.read(tmp_path / "model.safetensors")
    described = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    stored = {after_stack(key): key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")}
    errors: dict[str, float] = {}

    def check(layer_name: str) -> Callable[..., None]:
        def hook(module: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            spec = independent.layer_fields(described, layer_name)
            weight, bias = independent.dense(tensors, stored[after_stack(layer_name)], spec, module.in_features)
            expected = args[0].double().numpy() @ weight.T + (0 if bias is None else bias)
            difference = np.linalg.norm(output.double().numpy() - expected) / np.linalg.norm(expected)
            errors[layer_name] = max(float(difference), errors.get(layer_name, 0.0))

        return hook

    layers = quantized_layers(model)
    for layer_name, layer in layers.items():
        assert isinstance(layer, W4A16Linear)
        layer.register_forward_hook(check(layer_name))
    tiny_text.encode(model)
    assert errors.keys() == layers.keys()
    assert max(errors.values()) < limit, errors


CALIBRATED = ["T5EncoderModel", "CLIPTextModel", "Gemma2Model", "Qwen3Model", "Mistral3ForConditionalGeneration"]


@pytest.mark.parametrize("name", CALIBRATED)
def test_calibrated_is_closer_than_data_free(name: str) -> None:
    """On prompts that calibration has not seen; scales of the largest number, not searched, are worse than either."""
    words = tiny_text.tokens(seed=1, batch=64)
    unseen = tiny_text.tokens(seed=2, batch=4)

    def error(change: Callable[[Any], Any]) -> float:
        model = tiny_text.text_encoder(name)
        reference = tiny_text.encode(model, unseen)
        change(model)
        return relative(tiny_text.encode(model, unseen), reference)

    def round_to_nearest(model: Any) -> None:
        quantized = make_plan(model, text_config()).specs
        for layer in quantized:
            weight = model.get_submodule(layer).weight
            groups = weight.data.unflatten(1, (-1, 64))
            scale = groups.abs().amax(-1, keepdim=True) / 7
            weight.data = ((groups / scale).round() * scale).flatten(1)

    nearest = error(round_to_nearest)
    free = error(lambda model: svdquant.quantize(model, text_config()))
    calibrated = error(lambda model: svdquant.quantize(model, text_config(), lambda m: tiny_text.encode(m, words)))
    assert calibrated < 0.6 * free, (calibrated, free)
    assert free < 0.99 * nearest < 0.4, (free, nearest)


_WORDS = tiny_text.tokens(batch=3, length=20)
_MASK = torch.arange(20)[None] < torch.tensor([5, 9, 20])[:, None]
_CALLS = {
    "keyword": (lambda model: model(_WORDS, attention_mask=_MASK.long()), 34),
    "positional": (lambda model: model(_WORDS, _MASK), 34),
    "none": (lambda model: model(_WORDS), 60),
}


@pytest.mark.parametrize("call", _CALLS)
def test_calibration_reads_words_not_padding(call: str) -> None:
    run, rows = _CALLS[call]
    report = svdquant.quantize(tiny_text.text_encoder("T5EncoderModel"), text_config(), run)
    assert {layer.rows for layer in report.layers} == {rows}
