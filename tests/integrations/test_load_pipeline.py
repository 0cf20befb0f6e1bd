"""`svdquant.load_pipeline`: a quantized model in the right place of the right pipeline."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub
import numpy as np
import pytest
import standins
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import T5EncoderModel

import svdquant
from svdquant import SVDQuantError, load_pipeline
from svdquant.checkpoint.layout import open_checkpoint
from svdquant.integrations.slots import PUBLISHED, published_base
from svdquant.nn import quantized_layers

KINDS = {
    "flux": "FluxPipeline",
    "flux_dev": "FluxPipeline",
    "flux_fill": "FluxFillPipeline",
    "flux_control": "FluxControlPipeline",
    "flux_kontext": "FluxKontextPipeline",
    "sana": "SanaPipeline",
    "sana_odd": "SanaPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "qwen_image": "QwenImagePipeline",
    "qwen_image_edit": "QwenImageEditPipeline",
    "z_image": "ZImagePipeline",
}
SLOTS = {"sdxl": "unet"}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every stand-in without the 16-bit weights of its denoiser, and its checkpoint."""
    folder = tmp_path_factory.mktemp("shelf")
    for name in KINDS:
        standins.save(name, folder)
        weights = folder / name / SLOTS.get(name, "transformer") / "diffusion_pytorch_model.safetensors"
        weights.unlink()
        standins.save_quantized(name, folder / f"{name}.safetensors")
    standins.save("flux_redux", folder)
    standins.save_quantized_t5(folder / "t5.safetensors")
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FLUX with all its weights."""
    return standins.save("flux", tmp_path_factory.mktemp("whole"))


def draw(pipe: Any, **options: Any) -> np.ndarray:
    return tiny.draw(pipe, height=32, width=32, **options)


def is_quantized(model: Any) -> bool:
    return bool(quantized_layers(model))


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_without_the_weights_it_replaces(name: str, shelf: Path) -> None:
    # The stand-in of the editing pipeline is saved without its processor of pictures.
    more = {"processor": None} if name == "qwen_image_edit" else {}
    pipe = load_pipeline(shelf / f"{name}.safetensors", shelf / name, device="cpu", **more)
    assert type(pipe).__name__ == KINDS[name]
    model = getattr(pipe, SLOTS.get(name, "transformer"))
    assert is_quantized(model) and model.dtype == torch.bfloat16
    others = [c for c in pipe.components.values() if isinstance(c, torch.nn.Module) and c is not model]
    assert others and not any(is_quantized(other) for other in others)
    assert {p.dtype for other in others for p in other.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("form", ["nunchaku file", "nunchaku folder", "nunchaku_lite", "svdquant file", "svdquant"])
def test_every_container(form: str, shelf: Path, tmp_path: Path) -> None:
    """As a model around which the base is built, and as the transformer folder of a pipeline that needs none."""
    method, _, kind = form.partition(" ")
    path = standins.save_quantized("flux", tmp_path / ("model.safetensors" if kind == "file" else "model"), method)
    pipe = load_pipeline(path, shelf / "flux", device="cpu")
    assert is_quantized(pipe.transformer)
    if kind == "file":
        return
    shutil.copytree(shelf / "flux", tmp_path / "pipe")
    shutil.rmtree(tmp_path / "pipe" / "transformer")
    shutil.copytree(path, tmp_path / "pipe" / "transformer")
    own = load_pipeline(tmp_path / "pipe", device="cpu")
    assert is_quantized(own.transformer)
    assert (draw(own) == draw(pipe)).all()


def test_the_oldest_files_take_the_rest_from_the_base(shelf: Path, whole: Path, tmp_path: Path) -> None:
    file = standins.save_quantized("flux", tmp_path / "blocks.safetensors", blocks_only=True)
    pipe = load_pipeline(file, whole, device="cpu")
    assert tiny.state_equal(
        pipe.transformer, load_pipeline(shelf / "flux.safetensors", whole, device="cpu").transformer
    )


def test_dtype_and_device(shelf: Path) -> None:
    for name in ("torch_dtype", "dtype"):
        pipe = load_pipeline(shelf / "flux.safetensors", shelf / "flux", device="cpu", **{name: torch.float32})
        assert pipe.transformer.dtype == pipe.text_encoder_2.dtype == pipe.vae.dtype == torch.float32
    with pytest.raises(SVDQuantError, match="abacus"):
        load_pipeline(shelf / "flux.safetensors", shelf / "flux", device="abacus")


@pytest.mark.parametrize("wanted", ["FluxImg2ImgPipeline", diffusers.FluxImg2ImgPipeline])
def test_another_pipeline_class(shelf: Path, wanted: Any) -> None:
    pipe = load_pipeline(shelf / "flux.safetensors", shelf / "flux", device="cpu", pipeline=wanted)
    assert type(pipe) is diffusers.FluxImg2ImgPipeline
    image = standins.picture()
    picture = draw(pipe, image=image, strength=0.9)
    assert picture.shape == (1, 32, 32, 3) and np.isfinite(picture).all()
    fill = load_pipeline(shelf / "flux_fill.safetensors", shelf / "flux_dev", pipeline="FluxFillPipeline", device="cpu")
    assert type(fill) is diffusers.FluxFillPipeline
    picture = draw(fill, image=image, mask_image=standins.mask())
    assert picture.shape == (1, 32, 32, 3) and np.isfinite(picture).all()


def test_components_as_paths_and_objects(shelf: Path, tmp_path: Path) -> None:
    """Their 16-bit weights are not read either."""
    base = shutil.copytree(shelf / "flux", tmp_path / "flux")
    shutil.rmtree(base / "text_encoder_2")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0)
    pipe = load_pipeline(
        shelf / "flux.safetensors",
        base,
        text_encoder_2=str(shelf / "t5.safetensors"),
        scheduler=scheduler,
        device="cpu",
    )
    assert is_quantized(pipe.text_encoder_2) and is_quantized(pipe.transformer) and pipe.scheduler is scheduler
    assert draw(pipe).std() > 0
    bare = load_pipeline(
        shelf / "flux.safetensors", base, text_encoder=None, text_encoder_2=None, tokenizer_2=None, device="cpu"
    )
    assert bare.text_encoder_2 is None


def test_a_text_encoder_is_a_checkpoint_too(shelf: Path, whole: Path) -> None:
    pipe = load_pipeline(shelf / "t5.safetensors", whole, device="cpu")
    assert isinstance(pipe.text_encoder_2, T5EncoderModel) and is_quantized(pipe.text_encoder_2)
    assert not is_quantized(pipe.transformer) and not is_quantized(pipe.text_encoder)


def test_redux_prior_takes_a_text_encoder_and_no_transformer(shelf: Path) -> None:
    text = {"text_encoder": tiny.clip().bfloat16(), "tokenizer": tiny.clip_tokenizer()}
    prior = load_pipeline(
        shelf / "t5.safetensors", shelf / "flux_redux", tokenizer_2=tiny.t5_tokenizer(), **text, device="cpu"
    )
    assert type(prior).__name__ == "FluxPriorReduxPipeline" and is_quantized(prior.text_encoder_2)
    assert prior(standins.picture(), prompt="a cat").prompt_embeds.isfinite().all()
    message = r"flux_dev\.safetensors: .*FluxPriorReduxPipeline, which has no denoiser; give .*FLUX\.1-.* as base"
    with pytest.raises(SVDQuantError, match=message):
        load_pipeline(shelf / "flux_dev.safetensors", shelf / "flux_redux")


@pytest.mark.parametrize(
    ("checkpoint", "base", "message"),
    [
        ("flux_fill", "flux", r"flux_fill\.safetensors: has in_channels 48 and the transformer of .*flux has 16"),
        ("flux", "flux_control", r"flux\.safetensors: has in_channels 16 and the transformer of .*flux_control has 32"),
        ("flux", "flux_dev", r"flux\.safetensors: has guidance_embeds False and .*flux_dev has True"),
        ("sana", "flux", r"sana\.safetensors: holds a SanaTransformer2DModel, and .*flux is a FluxPipeline with"),
        ("sdxl", "z_image", r"sdxl\.safetensors: holds a UNet2DConditionModel, and .*z_image is a ZImagePipeline"),
        ("t5", "sana", r"t5\.safetensors: holds a T5EncoderModel, and .*sana is a SanaPipeline"),
    ],
)
def test_base_and_checkpoint_do_not_fit(checkpoint: str, base: str, message: str, shelf: Path) -> None:
    with pytest.raises(SVDQuantError, match=message) as caught:
        load_pipeline(shelf / f"{checkpoint}.safetensors", shelf / base)
    assert "\n" not in str(caught.value) and "base" in str(caught.value)


def test_what_is_wrong_is_said_in_one_sentence(shelf: Path, tmp_path: Path) -> None:
    file, base = shelf / "flux.safetensors", shelf / "flux"
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, r"name the pipeline as base"),
        ({"base": tmp_path / "none"}, r"none: does not exist"),
        ({"base": tmp_path}, r"has no model_index\.json"),
        ({"base": base, "pipeline": "FluxPipelien"}, "FluxPipelien is no pipeline class of diffusers"),
        ({"base": base, "pipeline": "FluxTransformer2DModel"}, "is no pipeline class"),
        ({"base": base, "unet": None}, r"takes no unet; its components are .*transformer"),
        ({"base": base, "transformer": torch.nn.Linear(1, 1)}, "give no other transformer"),
        ({"base": base, "text_encoder_2": file}, "holds a FluxTransformer2DModel, text_encoder_2 has to be a T5Enc"),
        ({"base": base, "text_encoder_2": tmp_path / "none.safetensors"}, "does not exist"),
        ({"base": base, "text_encoder_2": tmp_path / "other.safetensors"}, "text_encoder_2 has to be a T5EncoderModel"),
        ({"base": base, "dtype": "int3"}, "int3"),
    ]
    for arguments, message in cases:
        with pytest.raises(SVDQuantError, match=message) as caught:
            load_pipeline(file, **arguments)
        assert "\n" not in str(caught.value)


def test_damage_in_the_base_is_found_before_anything_is_loaded(
    shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = shutil.copytree(shelf / "flux", tmp_path / "flux")
    weights = base / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    monkeypatch.setattr("svdquant.integrations.pipeline.load_model", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(SVDQuantError, match="is truncated"):
        load_pipeline(shelf / "flux.safetensors", base)


@pytest.mark.parametrize(
    ("name", "stand_in", "base"),
    [
        ("nunchaku-tech/nunchaku-flux.1-schnell/svdq-int4_r32-flux.1-schnell", "flux", "FLUX.1-schnell"),
        ("nunchaku-tech/nunchaku-flux.1-dev/svdq-fp4_r32-flux.1-dev", "flux_dev", "FLUX.1-dev"),
        ("nunchaku-tech/nunchaku-flux.1-krea-dev/svdq-int4_r32-flux.1-krea-dev", "flux_dev", "FLUX.1-Krea-dev"),
        ("models/svdq-int4_r32-flux.1-kontext-dev", "flux_kontext", "FLUX.1-Kontext-dev"),
        ("mit-han-lab/svdq-int4-flux.1-fill-dev/model", "flux_fill", "FLUX.1-Fill-dev"),
        ("svdq-int4_r32-flux.1-depth-dev", "flux_control", "FLUX.1-Depth-dev"),
        ("svdq-int4_r32-flux.1-canny-dev", "flux_control", "FLUX.1-Canny-dev"),
        ("svdq-int4_r32-shuttle-jaguar", "flux", "shuttle-jaguar"),
        ("svdq-int4_r32-sana1.6b", "sana", "Sana_1600M_1024px_BF16_diffusers"),
        ("svdq-int4-sana-1600m/model", "sana", "Sana_1600M_1024px_BF16_diffusers"),
        ("svdq-int4_r32-sdxl", "sdxl", "stable-diffusion-xl-base-1.0"),
        ("svdq-int4_r32-sdxl-turbo", "sdxl", "sdxl-turbo"),
        ("svdq-int4_r128-qwen-image-lightningv1.0-4steps", "qwen_image", "Qwen-Image"),
        ("svdq-int4_r32-qwen-image-edit", "qwen_image", "Qwen-Image-Edit"),
        ("svdq-int4_r128-qwen-image-edit-2509-lightningv2.0-4steps", "qwen_image", "Qwen-Image-Edit-2509"),
        ("svdq-int4_r32-z-image-turbo", "z_image", "Z-Image-Turbo"),
        # Names that say something else, or nothing.
        ("svdq-int4_r32-flux.1-dev", "sana", None),
        ("my-flux", "flux", None),
        ("awq-int4-flux.1-t5xxl", "t5", None),
    ],
)
def test_published_names(name: str, stand_in: str, base: str | None, shelf: Path, tmp_path: Path) -> None:
    file = (tmp_path / name).with_name(Path(name).name + ".safetensors")
    file.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(shelf / f"{stand_in}.safetensors", file)
    found = published_base(open_checkpoint(file))
    assert (found and found.partition("/")[2]) == base


def test_configurations_name_their_origin_and_16_bit_models_are_not_published(shelf: Path, whole: Path) -> None:
    checkpoint = open_checkpoint(shelf / "flux.safetensors")
    checkpoint.config["_name_or_path"] = "black-forest-labs/FLUX.1-dev"
    assert published_base(checkpoint) == "black-forest-labs/FLUX.1-dev"
    original = open_checkpoint(whole)
    original.config["_name_or_path"] = "black-forest-labs/FLUX.1-dev"
    assert published_base(original) is None


def hub_cache(folder: Path, repo: str, source: Path) -> None:
    """`source` as the Hub client's cache holds a downloaded repository."""
    root = folder / f"models--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("0" * 40)
    shutil.copytree(source, root / "snapshots" / ("0" * 40))


def test_base_and_checkpoint_from_the_hub(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by the checkpoint's name; the transformer of the base was never downloaded."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    part, _, repo = PUBLISHED[0]
    (tmp_path / "published").mkdir()
    shutil.copy(shelf / "flux.safetensors", tmp_path / "published" / f"svdq-int4_r32-{part}.safetensors")
    hub_cache(tmp_path / "hub", f"nunchaku-tech/nunchaku-{part}", tmp_path / "published")
    hub_cache(tmp_path / "hub", repo, shelf / "flux")
    local = draw(load_pipeline(shelf / "flux.safetensors", shelf / "flux", device="cpu"))
    for name in (f"nunchaku-tech/nunchaku-{part}/svdq-int4_r32-{part}.safetensors", f"nunchaku-tech/nunchaku-{part}"):
        pipe = load_pipeline(name, device="cpu")
        assert is_quantized(pipe.transformer) and (draw(pipe) == local).all()
    for name in ("someone/nothing", "someone/nothing/file.safetensors"):
        with pytest.raises(SVDQuantError, match="could not be loaded from the Hub"):
            load_pipeline(name)
    with pytest.raises(SVDQuantError, match="could not be loaded from the Hub"):
        load_pipeline(shelf / "flux.safetensors", "someone/nothing")


def test_of_a_hub_base_the_replaced_weights_are_not_downloaded(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[set[str]] = []

    def download(repo: str, name: str, **_: Any) -> str:
        return str(shelf / "flux" / name)

    def pipeline(repo: str, use_safetensors: bool, **passed: Any) -> str:
        asked.append(set(passed))
        return str(shelf / "flux")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: "")
    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", pipeline)
    load_pipeline(shelf / "flux.safetensors", "someone/flux", text_encoder_2=shelf / "t5.safetensors", device="cpu")
    assert asked == [{"transformer", "text_encoder_2"}]


@pytest.mark.parametrize("variant", ["bf16", "fp16"])
def test_base_with_weights_under_a_variants_name(shelf: Path, tmp_path: Path, variant: str) -> None:
    standins.PIPELINES["flux"]().to(torch.bfloat16).save_pretrained(tmp_path / "flux", variant=variant)
    # Of these the plain file lies beside it.
    for folder in ("vae", "text_encoder"):
        (file,) = (tmp_path / "flux" / folder).glob("*.safetensors")
        shutil.copy(file, file.with_name(file.name.replace(f".{variant}", "")))
    shutil.rmtree(tmp_path / "flux" / "transformer")
    pipe = load_pipeline(shelf / "flux.safetensors", tmp_path / "flux", device="cpu")
    assert (draw(pipe) == draw(load_pipeline(shelf / "flux.safetensors", shelf / "flux", device="cpu"))).all()


def test_hub_base_with_variants_alone(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str | None] = []

    def pipeline(repo: str, variant: str | None = None, **_: Any) -> str:
        asked.append(variant)
        if variant != "fp16":
            raise OSError(f"Could not find the necessary `safetensors` weights in {{}} (variant={variant})")
        return str(shelf / "flux")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, name, **_: str(shelf / "flux" / name))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: "")
    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", pipeline)
    load_pipeline(shelf / "flux.safetensors", "someone/flux", device="cpu")
    assert asked == [None, "bf16", "fp16"]


def test_a_16_bit_model_around_its_base(whole: Path, shelf: Path, tmp_path: Path) -> None:
    """A fine-tuned file takes the place of the base's, whose weights may be missing."""
    file = tmp_path / "fine_tune.safetensors"
    save_file(load_file(whole / "transformer" / "diffusion_pytorch_model.safetensors"), file)
    pipe = load_pipeline(file, shelf / "flux", device="cpu")
    assert not is_quantized(pipe.transformer)
    assert (draw(pipe) == draw(load_pipeline(whole, device="cpu"))).all()


def test_public_name() -> None:
    assert svdquant.load_pipeline is load_pipeline and "load_pipeline" in dir(svdquant)
