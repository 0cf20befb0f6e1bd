"""Every family: its pipeline quantizes, saves, loads and draws; what is stored means what the dense model computes."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import family_pipelines
import independent
import numpy as np
import pytest
import tiny
import torch
from family_pipelines import Inputs, Models, relative
from torch import Tensor, nn

import svdquant
from svdquant.integrations import calibration
from svdquant.integrations.on_disk import quantize_pipeline
from svdquant.integrations.pipeline import PipelineOptions, draw, load_pipeline
from svdquant.nn import quantized_layers
from svdquant.ptq.linears import find_linears

QUICK = {"smooth": 2, "calibration_rows": 64}
# Their denoisers have the layers of another pipeline's.
ALIKE = {
    "flux_schnell", "flux_fill", "flux_control", "flux_redux", "flux_kontext", "flux2_dev", "sdxl_turbo", "sd35_large",
    "qwen_image_edit", "wan",
}  # fmt: skip


@dataclass
class Family:
    """A pipeline whose weights have outliers, what it draws in 16 bits, and its quantized denoisers, made once.

    inputs: of another drawing than those to calibrate with.
    """

    name: str
    pipe: Any = field(init=False)
    originals: Models = field(init=False)
    picture: np.ndarray = field(init=False)
    inputs: Inputs = field(init=False)

    def __post_init__(self) -> None:
        self.pipe = family_pipelines.PIPELINES[self.name]()
        self.originals = family_pipelines.denoisers(self.pipe)
        for model in self.originals.values():
            add_outliers(model)
        self.picture, self.inputs = family_pipelines.recorded(self.name, self.pipe)

    def draw(self, models: Models) -> np.ndarray:
        self.pipe.register_modules(**models)
        return family_pipelines.draw(self.name, self.pipe)

    def output(self, models: Models) -> Tensor:
        return family_pipelines.output(models, self.inputs)

    def quantize(self, weights: str, calibrated: bool, **fields: Any) -> Models:
        models = copy.deepcopy(self.originals)
        self.pipe.register_modules(**models)
        run = (lambda _model: family_pipelines.draw(self.name, self.pipe, seed=1)) if calibrated else None
        for model in models.values():
            svdquant.quantize(model, tiny.config(weights=weights, **QUICK | fields), run)
        return models

    @cached_property
    def calibrated(self) -> Models:
        return self.quantize("int4", calibrated=True)

    @cached_property
    def data_free(self) -> Models:
        return self.quantize("nvfp4", calibrated=False)

    def of(self, weights: str, calibrated: bool) -> Models:
        """Not to be changed: other tests read the same models."""
        if calibrated and weights == "int4":
            return self.calibrated
        return self.quantize(weights, calibrated) if calibrated or weights == "int4" else self.data_free


def add_outliers(model: nn.Module) -> None:
    """A few input channels of every linear weigh eight times as much."""
    for module in find_linears(model).values():
        module.weight.data[:, 5::48] *= 8


@pytest.fixture(scope="module", params=family_pipelines.PIPELINES)
def family(request: pytest.FixtureRequest) -> Iterator[Family]:
    yield Family(request.param)


@pytest.mark.parametrize("calibrated", [False, True], ids=["data-free", "calibrated"])
@pytest.mark.parametrize("weights", ["int4", "nvfp4"])
def test_quantized_saved_loaded_drawn(family: Family, tmp_path: Path, weights: str, calibrated: bool) -> None:
    if family.name in ALIKE and calibrated == (weights == "nvfp4"):
        pytest.skip("solves the same layers as another family")
    models = family.of(weights, calibrated)
    picture = family.draw(models)
    assert picture.shape == family.picture.shape and np.isfinite(picture).all()
    assert np.abs(picture - family.picture).max() > 0
    loaded = {}
    for part, model in models.items():
        assert {layer.spec.weights for layer in quantized_layers(model).values()} <= {weights, "int4"}
        model.save_pretrained(tmp_path / part)
        loaded[part] = type(model).from_pretrained(tmp_path / part)
        assert quantized_layers(loaded[part]).keys() == quantized_layers(model).keys()
    assert (family.draw(loaded) == picture).all()


@pytest.mark.parametrize("weights", ["int4", "nvfp4"])
def test_equals_the_dense_meaning_of_its_file(family: Family, tmp_path: Path, weights: str) -> None:
    """With 16-bit activations, a quantized model is the 16-bit model with the weights that its file means."""
    models = copy.deepcopy(family.calibrated if weights == "int4" else family.data_free)
    dense = copy.deepcopy(family.originals)
    for part, model in models.items():
        model.save_pretrained(tmp_path / part)
        read_dense(dense[part], tmp_path / part)
        svdquant.set_activations(model, "none")
    expected = family.output(dense)
    assert relative(family.output(models), expected) < 5e-6
    assert relative(family.output(family.originals), expected) > 1e-3


def read_dense(model: nn.Module, folder: Path) -> None:
    """Puts the weights of a quantized checkpoint into its 16-bit model, by the independent reader."""
    tensors, _ = independent.read(folder / "diffusion_pytorch_model.safetensors")
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert quantization["layers"]
    for name in quantization["layers"]:
        module: Any = model.get_submodule(name)
        in_features = module.weight[0].numel()
        weight, bias = independent.dense(tensors, name, independent.layer_fields(quantization, name), in_features)
        module.weight.data = torch.from_numpy(weight).to(module.weight.dtype).view(module.weight.shape)
        if bias is not None:
            module.bias = nn.Parameter(torch.from_numpy(bias).to(module.weight.dtype))


def test_beats_rounding_to_nearest(family: Family) -> None:
    # Calibrated, but nothing is made of it: the trace of a drawing is the quickest plan.
    plain = family.quantize("int4", calibrated=True, rank=0, smooth=False, gptq=False, rotate=False)
    expected = family.output(family.originals)
    errors = []
    for models in (plain, copy.deepcopy(family.calibrated)):
        for model in models.values():
            svdquant.set_activations(model, "int4")
        errors.append(relative(family.output(models), expected))
    nearest, ours = errors
    assert ours < 0.5 * nearest


def test_each_part_helps() -> None:
    """Without smoothing, without the branch or without GPTQ, layers err more on what they read in the 16-bit model."""
    family = Family("sd35_medium")
    original = family.originals["transformer"]
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda _module, args, y: seen.update({name: (args[0], y)})

    handles = [module.register_forward_hook(keep(name)) for name, module in find_linears(original).items()]
    family.output(family.originals)
    for handle in handles:
        handle.remove()

    def error(models: Models) -> float:
        model = models["transformer"]
        svdquant.set_activations(model, "int4")
        layers = quantized_layers(model)
        with torch.inference_mode():
            errors = [relative(model.get_submodule(name)(seen[name][0]), seen[name][1]) for name in layers]
        return math.exp(sum(map(math.log, errors)) / len(errors))

    whole = error(family.calibrated)
    for off in ({"smooth": False}, {"rank": 0}, {"gptq": False}):
        assert error(family.quantize("int4", calibrated=True, **off)) > 1.05 * whole, off


@pytest.mark.parametrize("name", ["flux2_klein", "sd35_medium", "wan22", "ltx", "hunyuan_video"])
def test_pipeline_folder_to_pipeline_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    to_calibrate = calibration.draw_to_calibrate
    monkeypatch.setattr(calibration, "draw_to_calibrate", lambda *args: (seen.append(args[1]), to_calibrate(*args)))
    pipe = family_pipelines.PIPELINES[name]()
    pipe.to(torch.bfloat16).save_pretrained(tmp_path / "16bit")
    video = "num_frames" in family_pipelines.CALLS.get(name, {})
    side = family_pipelines.CALLS.get(name, {}).get("height", 16)
    options = PipelineOptions(2, 1.0, side, side, num_frames=5 if video else None, max_sequence_length=16)
    report = quantize_pipeline(
        tmp_path / "16bit", tmp_path / "w4", tiny.config(**QUICK), prompts=["a cat"], options=options
    )
    assert {layer.error_of for layer in report.layers} == {"output"}
    assert seen == ["a cat"], "one drawing is for both of Wan's transformers"
    pictures = []
    for folder in (tmp_path / "16bit", tmp_path / "w4"):
        loaded = load_pipeline(folder)
        drawn = draw(loaded, ["a dog"], [1], options)
        frames = drawn[0].frames if video else drawn
        assert len(drawn) == 1 and len(frames) == (5 if video else 1)
        pictures.append(np.stack([np.asarray(frame, dtype=float) for frame in frames]))
    quantized = family_pipelines.denoisers(loaded)
    assert quantized.keys() == family_pipelines.denoisers(pipe).keys()
    assert sum(len(quantized_layers(model)) for model in quantized.values()) == len(report.layers)
    assert 0 < np.abs(pictures[0] - pictures[1]).mean() < 8
