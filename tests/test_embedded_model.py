"""The miniature FLUX pipeline inside the package, and the check that scores its pictures."""

from __future__ import annotations

import copy
import importlib
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextModel, T5EncoderModel

import svdquant
from svdquant.nunchaku import NunchakuFluxTransformer2dModel

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "src" / "svdquant" / "assets" / "tiny_flux"
sys.path.insert(0, str(ROOT / "examples" / "embedded_model"))
check = importlib.import_module("check")
scenes = importlib.import_module("scenes")


@pytest.fixture(scope="module")
def settings() -> dict:
    return json.loads((MODEL / "prompts.json").read_text())


@pytest.fixture(scope="module")
def pipeline() -> FluxPipeline:
    loaded = FluxPipeline.from_pretrained(MODEL, torch_dtype=torch.bfloat16)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def truth() -> tuple[list, list[np.ndarray]]:
    rng = random.Random(7)
    asked = rng.sample(scenes.all_scenes(), 256)
    return asked, [scenes.render(scene, scenes.Layout.sample(rng)) for scene in asked]


def test_folder_is_small() -> None:
    assert sum(file.stat().st_size for file in MODEL.rglob("*") if file.is_file()) < 24_000_000


def test_classes(pipeline: FluxPipeline) -> None:
    assert isinstance(pipeline.transformer, FluxTransformer2DModel)
    assert isinstance(pipeline.text_encoder, CLIPTextModel)
    assert isinstance(pipeline.text_encoder_2, T5EncoderModel)
    assert isinstance(pipeline.vae, AutoencoderKL)
    assert isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler)


def test_sizes(pipeline: FluxPipeline) -> None:
    transformer = pipeline.transformer
    assert (transformer.config.num_attention_heads, transformer.config.attention_head_dim) == (4, 64)
    assert (len(transformer.transformer_blocks), len(transformer.single_transformer_blocks)) == (2, 4)
    assert transformer.config.in_channels == 64
    assert tuple(transformer.config.axes_dims_rope) == (8, 28, 28)
    assert not transformer.config.guidance_embeds
    assert pipeline.vae.config.latent_channels == 16
    assert pipeline.vae_scale_factor == 8


@pytest.mark.parametrize("component", ["transformer", "text_encoder", "text_encoder_2"])
def test_linears_are_multiples_of_64(pipeline: FluxPipeline, component: str) -> None:
    linears = [module for module in getattr(pipeline, component).modules() if isinstance(module, torch.nn.Linear)]
    assert linears
    assert all(linear.in_features % 64 == 0 and linear.out_features % 64 == 0 for linear in linears)


def test_tokenizers_know_every_word(pipeline: FluxPipeline, settings: dict) -> None:
    words = scenes.vocabulary()
    assert all(len(pipeline.tokenizer(word).input_ids) == 3 for word in words)
    assert all(len(pipeline.tokenizer_2(word).input_ids) == 2 for word in words)
    captions = [scene.caption for scene in scenes.all_scenes()]
    assert max(map(len, pipeline.tokenizer_2(captions).input_ids)) <= settings["max_sequence_length"]
    assert max(map(len, pipeline.tokenizer(captions).input_ids)) <= pipeline.tokenizer.model_max_length


def test_held_out_prompts_are_unseen(settings: dict) -> None:
    training, held_out = scenes.split()
    assert len(held_out) == 64
    assert not set(training) & set(held_out)
    assert len(training) + len(held_out) == len(scenes.all_scenes())
    assert all(scene in set(training) for scene, _ in scenes.training_scenes(3000, seed=1))
    assert settings["held_out"] == [scene.caption for scene in held_out]
    assert len(settings["calibration"]) == 64
    assert set(settings["calibration"]) <= {scene.caption for scene in training}
    assert len(settings["demo"]) == 8
    assert set(settings["demo"]) <= set(settings["held_out"])


def test_captions_are_unique() -> None:
    captions = [scene.caption for scene in scenes.all_scenes()]
    assert len(set(captions)) == len(captions) == 2304


def test_check_accepts_rendered_truth(truth: tuple[list, list[np.ndarray]]) -> None:
    asked, pictures = truth
    assert min(check.score(pictures, asked).values()) >= 0.98


def test_check_rejects_shuffled_prompts(truth: tuple[list, list[np.ndarray]]) -> None:
    asked, pictures = truth
    assert max(check.score(pictures, asked[1:] + asked[:1]).values()) < 0.5


def test_check_rejects_noise() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (16, 96, 96, 3), dtype=np.uint8)
    assert check.score(list(noise), scenes.all_scenes()[::144])["all"] < 0.5


def test_model_follows_held_out_prompts(pipeline: FluxPipeline, settings: dict) -> None:
    _, held_out = scenes.split()
    steps, length = settings["num_inference_steps"], settings["max_sequence_length"]
    pictures = check.draw(pipeline, settings["held_out"], steps, length, settings["height"])
    assert check.score(pictures, held_out)["all"] >= check.REQUIRED_SHARE


def test_pictures_survive_nunchaku_files(pipeline: FluxPipeline, settings: dict, tmp_path: Path) -> None:
    """Quantized, written as others store it, read back by the names that others use: the same picture."""
    prompts = settings["held_out"][:2]
    prompts = [prompt if isinstance(prompt, str) else prompt["prompt"] for prompt in prompts]
    original = pipeline.transformer
    model = copy.deepcopy(original)
    svdquant.quantize(model, svdquant.SVDQuantConfig(rotate=False))
    svdquant.save_model(model, tmp_path / "file.safetensors", format="nunchaku")
    svdquant.save_model(model, tmp_path / "lite", format="nunchaku_lite")
    read = {
        "16 bits": original,
        "quantized": model,
        "nunchaku": NunchakuFluxTransformer2dModel.from_pretrained(tmp_path / "file.safetensors", device="cpu"),
        "lite": svdquant.load_model(tmp_path / "lite"),
    }
    pictures = {}
    try:
        for name, pipeline.transformer in read.items():
            images = pipeline(
                prompts,
                generator=[torch.Generator().manual_seed(seed) for seed in range(len(prompts))],
                **{key: settings[key] for key in ("height", "width", "num_inference_steps", "guidance_scale")},
                max_sequence_length=settings["max_sequence_length"],
                output_type="np",
            ).images
            pictures[name] = np.asarray(images, dtype=np.float64)
    finally:
        pipeline.transformer = original

    def psnr(a: str, b: str) -> float:
        return float(-10 * np.log10(np.square(pictures[a] - pictures[b]).mean() + 1e-12))

    # The formats round biases, by 2⁻⁸ of a modulation at most; quantizing to 4 bits changes far more.
    assert psnr("nunchaku", "quantized") > 52 and psnr("lite", "quantized") > 52
    assert 38 < psnr("quantized", "16 bits") < psnr("nunchaku", "quantized")
    assert psnr("nunchaku", "16 bits") > 38
