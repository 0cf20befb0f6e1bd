"""All-in-one files: text encoders and VAE beside the denoiser, in every style of names, in 16 bits and in fp8."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import family_pictures
import family_videos
import fine_tunes as ft
import pytest
import standins
import torch
from original_layouts import ORIGINAL, original_vae
from safetensors.torch import load_file
from torch import Tensor

from svdquant import SVDQuantConfig, SVDQuantError
from svdquant.integrations.fine_tune import FineTune
from svdquant.integrations.on_disk import quantize_pipeline
from svdquant.integrations.pipeline import PipelineOptions, draw, load_pipeline
from svdquant.integrations.single_file import check_single_file, load_single_file, unpack

CONFIG = SVDQuantConfig(rank=16, smooth=2, gptq=False)
State = dict[str, Tensor]


def assert_same(found: State, wanted: State) -> None:
    """Bit for bit, in the type of the model, but for what it keeps in float32."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value.to(found[name].dtype)), name


def clip_names(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """transformers' file under SDXL's first prefix."""
    named = {name if name.startswith("text_") else f"text_model.{name}": value for name, value in state.items()}
    return {prefix + name: value for name, value in named.items()}


def _openclip_names(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The second text encoder as OpenCLIP stores it: q, k and v in one, the projection transposed."""
    out, state = {}, clip_names(state, "")
    outer = {
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.final_layer_norm.weight": "ln_final.weight",
        "text_model.final_layer_norm.bias": "ln_final.bias",
    }
    inner = [
        (".layer_norm", ".ln_"),
        (".mlp.fc1.", ".mlp.c_fc."),
        (".mlp.fc2.", ".mlp.c_proj."),
        (".self_attn.", ".attn."),
    ]
    for name, value in state.items():
        if name == "text_projection.weight":
            out["text_projection"] = value.t()
        elif name in outer:
            out[outer[name]] = value
        elif ".q_proj." in name:
            whole = torch.cat([state[name.replace(".q_proj.", f".{letter}_proj.")] for letter in "qkv"])
            new = name.replace(".self_attn.q_proj.", ".attn.in_proj_")
            out[new.replace("text_model.encoder.layers.", "transformer.resblocks.")] = whole
        elif ".k_proj." not in name and ".v_proj." not in name:
            new = name.replace("text_model.encoder.layers.", "transformer.resblocks.")
            for ours, theirs in inner:
                new = new.replace(ours, theirs)
            out[new] = value
    return {prefix + name: value for name, value in out.items()}


def trained(pipe: Any, folder: Path) -> Path:
    """The pipeline with every number of its models moved a little, in bfloat16."""
    generator = torch.Generator().manual_seed(9)
    for model in pipe.components.values():
        for value in model.parameters() if isinstance(model, torch.nn.Module) else ():
            value.data += 0.05 * torch.randn(value.shape, generator=generator)
    pipe.to(torch.bfloat16).save_pretrained(folder)
    return folder


def weights(folder: Path) -> State:
    """Of a model folder's files."""
    found: State = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def below(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


def clip_l(folder: Path) -> State:
    """As ComfyUI saves CLIP-L: with a projection, which the models were not trained with, and a temperature."""
    state = clip_names({n: v for n, v in weights(folder).items() if n != "text_projection.weight"}, "")
    state |= {"text_projection.weight": torch.eye(32), "text_model.embeddings.position_ids": torch.arange(77)[None]}
    return below("text_encoders.clip_l.transformer.", state) | {"text_encoders.clip_l.logit_scale": torch.ones(())}


def t5(folder: Path) -> State:
    """With the table of words under both of its names."""
    state = weights(folder)
    words = state.get("shared.weight", state.get("encoder.embed_tokens.weight"))
    assert words is not None
    state |= {"shared.weight": words, "encoder.embed_tokens.weight": words.clone()}
    return below("text_encoders.t5xxl.transformer.", state)


def flux(folder: Path) -> State:
    denoiser = below("model.diffusion_model.", ORIGINAL["flux"](weights(folder / "transformer")))
    vae = below("vae.", original_vae(weights(folder / "vae")))
    return denoiser | clip_l(folder / "text_encoder") | t5(folder / "text_encoder_2") | vae


def sd3(folder: Path) -> State:
    state = below("model.diffusion_model.", ORIGINAL["sd3"](weights(folder / "transformer")))
    state |= clip_l(folder / "text_encoder") | t5(folder / "text_encoder_3")
    state |= clip_names(weights(folder / "text_encoder_2"), "text_encoders.clip_g.transformer.")
    return state | below("first_stage_model.", original_vae(weights(folder / "vae")))


def ltx(folder: Path) -> State:
    denoiser = below("model.diffusion_model.", ORIGINAL["ltx"](weights(folder / "transformer")))
    return denoiser | t5(folder / "text_encoder") | below("vae.", weights(folder / "vae"))


def diffusers_names(folder: Path) -> State:
    parts = ("transformer", "text_encoder", "text_encoder_2", "vae")
    return {name: value for part in parts for name, value in below(f"{part}.", weights(folder / part)).items()}


Family = tuple[Callable[[], Any], Callable[[Path], State], list[str]]
FAMILIES: dict[str, Family] = {
    "flux": (lambda: standins.flux(guidance=True), flux, ["text_encoder", "text_encoder_2", "vae"]),
    "flux-diffusers": (
        lambda: standins.flux(guidance=True), diffusers_names, ["text_encoder", "text_encoder_2", "vae"],
    ),
    "sd3": (family_pictures.sd35, sd3, ["text_encoder", "text_encoder_2", "text_encoder_3", "vae"]),
    "ltx": (family_videos.ltx, ltx, ["text_encoder", "vae"]),
}  # fmt: skip


def unpacked(file: Path, around: Path) -> Path:
    work = around / file.stem
    work.mkdir()
    return unpack(file, str(around / "base"), work, None, {})


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("stored", ["bf16", "fp8", "scaled-fp8"])
def test_one_file_becomes_a_whole_pipeline(name: str, stored: str, tmp_path: Path) -> None:
    """Tensor for tensor that of the folder that it was made of; only tokenizers and configurations are the base's."""
    make, as_file, parts = FAMILIES[name]
    make().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    source = trained(make(), tmp_path / "trained")
    state = meant = as_file(source)
    matrix = re.compile(r"^text_encoder.*(proj|fc[12]|\.[qkvo]|w[io]_?\d?)\.weight$")
    if stored == "fp8":
        state = {n: v.to(torch.float8_e4m3fn) if matrix.search(n) else v for n, v in state.items()}
        meant = {n: v.to(torch.bfloat16) for n, v in state.items()}
    elif stored == "scaled-fp8":
        codes, dense = ft.scaled_fp8({n: v for n, v in state.items() if matrix.search(n)}, "scalar")
        state, meant = state | codes, state | dense
    fp8 = [n for n, v in state.items() if v.dtype == torch.float8_e4m3fn]
    assert len(fp8) > 12 or stored == "bf16"
    file, notes = ft.write(tmp_path / "all.safetensors", state), []
    check_single_file(file, str(tmp_path / "base"), lambda *note: notes.append(note[3]))
    assert f"the {', '.join(parts)} of all.safetensors are taken too" in notes
    assert not any("left out" in note for note in notes), notes
    folder = unpacked(file, tmp_path)
    reread = unpacked(ft.write(tmp_path / "meant.safetensors", meant), tmp_path)
    for part in ("transformer", *parts):
        wanted = weights((reread if stored != "bf16" else source) / part)
        if name == "sd3" and part == "text_encoder":
            # Its pictures were trained with what precedes the projection, which is the base's therefore.
            wanted["text_projection.weight"] = weights(tmp_path / "base" / part)["text_projection.weight"]
        assert_same(weights(folder / part), wanted)
    if stored == "scaled-fp8":
        before, after = weights(source / parts[-2]), weights(folder / parts[-2])
        changed = [n for n in before if not torch.equal(before[n], after[n])]
        assert changed and all(
            (before[n].float() - after[n].float()).norm() < 0.05 * before[n].float().norm() for n in changed
        )


def test_drawn_and_quantized_as_the_pipeline_it_was_made_of(tmp_path: Path) -> None:
    base = standins.save("flux_dev", tmp_path)
    source = trained(standins.flux(guidance=True), tmp_path / "trained")
    file = ft.write(tmp_path / "all.safetensors", flux(source))
    options = PipelineOptions(num_inference_steps=1, height=16, width=16, max_sequence_length=16)
    pictures = [
        draw(pipe, ["a cat"], [0], options)[0].tobytes()
        for pipe in (load_pipeline(source, device="cpu"), load_pipeline(file, base, device="cpu"))
    ]
    assert pictures[0] == pictures[1]
    for number, (model, of) in enumerate(((source, None), (file, str(base)))):
        quantize_pipeline(model, tmp_path / f"out{number}", CONFIG, base=of, text_encoders="int4")
    for part in ("transformer", "text_encoder", "text_encoder_2", "vae"):
        first, second = (weights(tmp_path / f"out{number}" / part) for number in (0, 1))
        assert first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)
    packed = json.loads((tmp_path / "out1" / "text_encoder_2" / "config.json").read_text())["quantization_config"]
    assert packed["weights"] == "int4"


T5 = "text_encoders.t5xxl.transformer."
Q = f"{T5}encoder.block.1.layer.0.SelfAttention.q.weight"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({Q: None}, r"its text_encoder_2 is not as .* has it \(encoder\.block\.1.*\.q\.weight is missing instead of"),
        ({Q: torch.zeros(7, 7)}, r"\.q\.weight is \[7, 7\] instead of \[128, 128\]\); give the pipeline"),
        ({Q.replace("block.1", "block.2"): torch.zeros(7, 7)}, r"block\.2.*\.q\.weight has no place there\); give"),
        ({Q: torch.full((128, 128), float("nan"))}, r"SelfAttention\.q\.weight holds NaN or infinity"),
        ({Q: torch.full((128, 128), 1e30)}, r"SelfAttention\.q\.weight holds numbers as large as 1e\+30, which"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    base = standins.save("flux_dev", tmp_path)
    state = {name: value for name, value in (flux(base) | change).items() if value is not None}
    file = ft.write(tmp_path / "all.safetensors", state)
    with pytest.raises(SVDQuantError, match=sentence):
        quantize_pipeline(file, tmp_path / "out", CONFIG, base=str(base))
    assert not list(tmp_path.glob("out*"))


def test_parts_that_cannot_be_read_are_left_to_the_base(tmp_path: Path) -> None:
    """With the reason: a text encoder in 4 bits is no obstacle where the base has one in 16."""
    base = standins.save("flux_dev", tmp_path)
    state = flux(base) | {Q: torch.zeros(128, 64, dtype=torch.uint8)}
    file, notes = ft.write(tmp_path / "all.safetensors", state), []
    check_single_file(file, str(base), lambda *note: notes.append(note[3]))
    assert "the text_encoder, vae of all.safetensors are taken too" in notes
    count = sum(name.startswith(T5) for name in state)
    assert f"text_encoders ({count} tensors) are left out ({T5}* is quantized already, to packed 4-bit" in notes[-1]
    folder = unpack(file, str(base), tmp_path, None, {})
    assert_same(weights(folder / "text_encoder_2"), weights(base / "text_encoder_2"))


def test_parts_that_the_pipeline_lacks(tmp_path: Path) -> None:
    """They are named, and not read."""
    made = ft.model("flux")
    state, base = made.state_dict(), ft.pipeline_around(made, tmp_path / "base")
    inside = {f"model.diffusion_model.{k}": v for k, v in ORIGINAL["flux"](state).items()}
    other = {
        "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(4, 4).char(),
        "text_encoders.t5xxl.transformer.scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn),
        "vae.decoder.conv_in.weight": torch.full((2, 2), float("nan")),
        "vae.decoder.conv_in.bias": torch.zeros(2),
        "alphas_cumprod": torch.zeros(2),
    }
    file, notes = ft.write(tmp_path / "f.safetensors", inside | other), []
    assert_same(load_single_file(file, base, torch.bfloat16).state_dict(), state)
    check_single_file(file, str(base), lambda *note: notes.append(note))
    (note,) = notes
    assert note[:3] == ("note", 0, 0)
    assert "text_encoders (2 tensors)" in note[3] and "vae (2 tensors)" in note[3] and "left out for" in note[3]


def test_parts_below_the_prefix_of_the_denoiser(tmp_path: Path) -> None:
    names = ("audio_patchify_proj.weight", "video_embeddings_connector.learnable_registers", "rope.freqs")
    file = ft.write(tmp_path / "f.safetensors", {name: torch.zeros(1) for name in names}, "model.diffusion_model.")
    assert FineTune(file).left_out() == "video_embeddings_connector (1 tensors)"


def test_text_encoders_of_an_sdxl_checkpoint(tmp_path: Path) -> None:
    """Trained along, they replace the base's, when drawing and when quantizing."""
    base = standins.save("sdxl", tmp_path)
    trained = standins.PIPELINES["sdxl"]()
    for model in (trained.unet, trained.text_encoder, trained.text_encoder_2, trained.vae):
        with torch.no_grad():
            for value in model.parameters():
                value.add_(0.05 * torch.randn_like(value))
    trained.to(torch.bfloat16).save_pretrained(tmp_path / "trained")
    unet = ORIGINAL["sdxl"](load_file(tmp_path / "trained" / "unet" / "diffusion_pytorch_model.safetensors"))
    first, second = (
        load_file(tmp_path / "trained" / name / "model.safetensors") for name in ("text_encoder", "text_encoder_2")
    )
    state = {f"model.diffusion_model.{name}": value for name, value in unet.items()}
    state |= clip_names(first, "conditioner.embedders.0.transformer.")
    state |= _openclip_names(second, "conditioner.embedders.1.model.")
    state["conditioner.embedders.1.model.logit_scale"] = torch.zeros(())
    third = load_file(tmp_path / "trained" / "vae" / "diffusion_pytorch_model.safetensors")
    state |= {f"first_stage_model.{name}": value for name, value in original_vae(third).items()}
    file, notes = ft.write(tmp_path / "sdxl.safetensors", state), []
    quantize_pipeline(file, tmp_path / "out", CONFIG, base=str(base), progress=lambda *note: notes.append(note))
    assert ("note", 0, 0, "the text_encoder, text_encoder_2, vae of sdxl.safetensors are taken too") in notes
    for name, wanted in (("text_encoder", first), ("text_encoder_2", second)):
        assert_same(load_file(tmp_path / "out" / name / "model.safetensors"), wanted)
    assert_same(load_file(tmp_path / "out" / "vae" / "diffusion_pytorch_model.safetensors"), third)
    options = PipelineOptions(num_inference_steps=1, height=64, width=64)
    pictures = [
        draw(pipe, ["a cat"], [0], options)[0].tobytes()
        for pipe in (load_pipeline(tmp_path / "trained", device="cpu"), load_pipeline(file, base, device="cpu"))
    ]
    assert pictures[0] == pictures[1]
    # What ComfyUI goes by: such a fine-tune needs another scheduler than its base.
    file, notes = ft.write(file, state | {"v_pred": torch.zeros(()), "ztsnr": torch.zeros(())}), []
    fields = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    check_single_file(file, str(base), lambda *note: notes.append(note[3]))
    assert "the scheduler is set to prediction_type=v_prediction, rescale_betas_zero_snr=True" in notes[1]
    folder = unpack(file, str(base), tmp_path, None, {})
    stored = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    drawn = load_pipeline(file, base, device="cpu").scheduler.config
    assert fields.items() <= stored.items() and fields.items() <= dict(drawn).items()
    state["conditioner.embedders.1.model.ln_final.weight"] = torch.zeros(7)
    file = ft.write(file, state)
    sentence = r"its text_encoder_2 is not as .* has it \(.*final_layer_norm\.weight is \[7\] instead of \[32\]\)"
    with pytest.raises(SVDQuantError, match=sentence):
        quantize_pipeline(file, tmp_path / "other", CONFIG, base=str(base))
    assert not list(tmp_path.glob("other*"))
