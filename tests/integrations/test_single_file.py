"""One file of a fine-tune: every style of names, every type, one sentence for what is no such file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import fine_tunes as ft
import pytest
import standins
import torch
from original_layouts import ORIGINAL
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from svdquant import SVDQuantConfig, SVDQuantError
from svdquant.checkpoint.mapped import MappedTensors
from svdquant.checkpoint.streaming import ShardWriter
from svdquant.integrations import fine_tune
from svdquant.integrations.fine_tune import FineTune, bare_file
from svdquant.integrations.on_disk import quantize_pipeline
from svdquant.integrations.original_bases import default_base
from svdquant.integrations.own_parts import load_own_parts
from svdquant.integrations.pipeline import PipelineOptions, draw, load_pipeline
from svdquant.integrations.single_file import check_single_file, fitting_base, load_single_file, part_of, unpack
from svdquant.integrations.skeletons import build_skeleton, skeleton

CONFIG = SVDQuantConfig(rank=16, smooth=2, gptq=False)


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], Path]:
    """(weights, folder of the pipeline) of a tiny FLUX.1-dev."""
    made = ft.model("flux")
    return made.state_dict(), ft.pipeline_around(made, tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline that draws."""
    return standins.save("flux_dev", tmp_path_factory.mktemp("whole"))


def loaded(file: Path, base: Path, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    return load_single_file(file, base, dtype).state_dict()


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Bit for bit, in the type of the model, but for what it keeps in float32."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value.to(found[name].dtype)), name


@pytest.mark.parametrize("name", list(ft.MODELS))
def test_names_of_every_family(name: str, tmp_path: Path) -> None:
    made = ft.model(name)
    state, base = made.state_dict(), ft.pipeline_around(made, tmp_path / "base")
    original = ORIGINAL.get(name, dict)(state)
    if name != "qwen_image":
        assert not original.keys() <= state.keys()
    for number, (prefix, held) in enumerate(
        [("", original), ("model.diffusion_model.", original), ("", state), ("transformer.", state), ("model.", state)]
    ):
        file = ft.write(tmp_path / f"{number}.safetensors", held, prefix)
        assert_same(loaded(file, base), state)
        assert fitting_base(file, str(base)) == str(base)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_types_and_what_the_model_keeps_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    made = ft.model("wan").to(torch.float32)
    base = ft.pipeline_around(made, tmp_path / "base")
    state = {k: v + 1e-3 * torch.randn_like(v) for k, v in made.state_dict().items()}
    file = ft.write(tmp_path / "f.safetensors", ORIGINAL["wan"](state))
    found = loaded(file, base, dtype)
    assert found["blocks.0.norm2.weight"].dtype == found["scale_shift_table"].dtype == torch.float32
    assert torch.equal(found["blocks.0.norm2.weight"], state["blocks.0.norm2.weight"])
    assert found["blocks.0.attn1.to_q.weight"].dtype == dtype
    assert_same(found, state)


def test_mixed_types(flux: tuple, tmp_path: Path) -> None:
    state, base = flux
    types = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
    stored = {name: value.to(types[i % len(types)]) for i, (name, value) in enumerate(ORIGINAL["flux"](state).items())}
    file = ft.write(tmp_path / "f.safetensors", stored)
    meant = ft.write(tmp_path / "g.safetensors", {name: value.float() for name, value in stored.items()})
    assert_same(loaded(file, base), loaded(meant, base))
    # An fp8 number is one of bfloat16 and float16.
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        every = torch.arange(256, dtype=torch.uint8).view(dtype)
        for wide in (torch.bfloat16, torch.float16):
            assert torch.equal(every.to(wide).float().nan_to_num(), every.float().nan_to_num())


@pytest.mark.parametrize("name", ["ltx", "sana"])
def test_everything_in_fp8(name: str, tmp_path: Path) -> None:
    """Tables of scales and shifts too, which are no scales of a weight."""
    made = ft.model(name)
    base = ft.pipeline_around(made, tmp_path / "base")
    state = {key: value.to(torch.float8_e4m3fn) for key, value in made.state_dict().items()}
    assert_same(loaded(ft.write(tmp_path / "f.safetensors", ORIGINAL[name](state)), base), state)


@pytest.mark.parametrize("kind", ["scalar", "one", "rows", "row_vector", "blocks", "tiles"])
@pytest.mark.parametrize("leaf", ["scale_weight", "weight_scale"])
def test_scaled_fp8(flux: tuple, tmp_path: Path, kind: str, leaf: str) -> None:
    state, base = flux
    original = ORIGINAL["flux"](state)
    stored, meant = ft.scaled_fp8(original, kind, leaf)
    assert sum(value.dtype == torch.float8_e4m3fn for value in stored.values()) > 20
    if leaf == "scale_weight":
        stored["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
        more = {"double_blocks.0.img_attn.qkv.scale_input": torch.ones(())}
    else:
        stored |= {
            name.replace("weight_scale", "comfy_quant"): ft.as_bytes({"format": "float8_e4m3fn"})
            for name in list(stored)
            if name.endswith("weight_scale")
        }
        more = {"double_blocks.0.img_attn.qkv.input_scale": torch.ones(())}
    file = ft.write(tmp_path / "f.safetensors", stored | more, "model.diffusion_model.")
    wanted = ft.write(tmp_path / "g.safetensors", meant)
    found = loaded(file, base)
    assert_same(found, loaded(wanted, base))
    # Near the original, as a weight without its scale would not be.
    name = "transformer_blocks.0.ff.net.0.proj.weight"
    assert (found[name].float() - state[name].float()).norm() < 0.05 * state[name].float().norm()


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_scales_announced_in_the_metadata(flux: tuple, tmp_path: Path, prefix: str) -> None:
    state, base = flux
    stored, meant = ft.scaled_fp8(ORIGINAL["flux"](state), "scalar", "weight_scale")
    layers = {n.removesuffix(".weight_scale"): {"format": "float8_e4m3fn"} for n in stored if n.endswith("_scale")}
    said = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    file = ft.write(tmp_path / "f.safetensors", stored, prefix, said)
    assert_same(loaded(file, base), loaded(ft.write(tmp_path / "g.safetensors", meant), base))
    lost = {name: value for name, value in stored.items() if name != "single_blocks.0.linear2.weight_scale"}
    file = ft.write(tmp_path / "f.safetensors", lost, prefix, said)
    with pytest.raises(SVDQuantError, match=r"single_blocks\.0\.linear2 is stored as float8_e4m3fn without a scale"):
        loaded(file, base)


QKV = "double_blocks.0.img_attn.qkv"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({f"{QKV}.weight_scale_inv": torch.ones(1)}, "qkv.weight_scale_inv is unknown beside an fp8 weight; give"),
        (
            {f"{QKV}.weight_scale": torch.ones(()), f"{QKV}.scale_weight": torch.ones(())},
            r"qkv.weight has two scales \(scale_weight, weight_scale\); give",
        ),
        ({f"{QKV}.pre_quant_scale": torch.ones(1)}, "qkv.pre_quant_scale is unknown beside an fp8 weight"),
        ({f"{QKV}.rotation": torch.ones(2, 2)}, "holds double_blocks.0.img_attn.qkv.rotation, which .* no place for"),
        ({f"{QKV}.scale_weight": torch.ones(7)}, r"qkv.scale_weight of the shape \[7\] does not fit its weight"),
        ({f"{QKV}.scale_weight": torch.ones(3, 5)}, r"qkv.scale_weight of the shape \[3, 5\] does not fit its weight"),
        ({f"{QKV}.weight_scale_2": torch.ones(1)}, r"is quantized already, to NVFP4 \(double_.*in 16 bits or fp8"),
        ({f"{QKV}.weight_scale": torch.ones(4, 4, dtype=torch.uint8)}, "is quantized already, to MXFP8"),
        ({f"{QKV}.comfy_quant": ft.as_bytes({"format": "nvfp4"})}, "is quantized already, to nvfp4"),
        ({f"{QKV}.comfy_quant": ft.as_bytes({"format": "int8_tensorwise", "convrot": True})}, "to int8_tensorwise"),
        (
            {f"{QKV}.comfy_quant": ft.as_bytes({"format": "float8_e4m3fn", "convrot": True})},
            "qkv is stored with convrot, which is unknown here",
        ),
        ({f"{QKV}.comfy_quant": torch.zeros(4, dtype=torch.uint8)}, "what it says of its quantization cannot be read"),
        ({f"{QKV}.weight": torch.zeros(384, 128, dtype=torch.int8)}, "is quantized already, to int8"),
        ({f"{QKV}.weight": torch.zeros(384, 64, dtype=torch.uint8)}, "is quantized already, to packed 4-bit"),
        (
            {f"{QKV}.weight.quant_state.bitsandbytes__nf4": torch.zeros(9, dtype=torch.uint8)},
            r"is quantized already, to bitsandbytes NF4 \(double_blocks",
        ),
        ({f"{QKV}.SCB": torch.ones(384)}, "is quantized already, to bitsandbytes int8"),
        ({"img_in.scale_weight": torch.full((), 2.0)}, "img_in.scale_weight scales a weight of type BF16"),
        ({"lost.scale_weight": torch.ones(())}, "lost.scale_weight is the scale of no weight"),
        ({f"{QKV}.weight": torch.zeros(384, 120, dtype=torch.bfloat16)}, "has the shape .* in .* it has .*--base"),
        ({"extra.weight": torch.zeros(2, 2)}, "holds extra.weight, which .* has no place for"),
        ({"txt_in.weight": None}, "lacks context_embedder.weight, which .* has; .*--base"),
        ({"img_in.bias": torch.full((128,), float("nan"))}, "img_in.bias holds NaN or infinity"),
        ({f"{QKV}.bias": torch.full((384,), float("inf"))}, "qkv.bias holds NaN or infinity"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_by_name(flux: tuple, tmp_path: Path, change: dict, sentence: str) -> None:
    state, base = flux
    stored = ORIGINAL["flux"](state)
    stored[f"{QKV}.weight"] = stored[f"{QKV}.weight"].to(torch.float8_e4m3fn)
    stored = {name: value for name, value in (stored | change).items() if value is not None}
    file = ft.write(tmp_path / "f.safetensors", stored)
    with pytest.raises(SVDQuantError, match=sentence) as caught:
        loaded(file, base)
    assert str(caught.value).startswith(f"{file}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight"], "is an adapter, not a model; .*--lora"),
        (["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"], "is an adapter, not a model; .*lora merge"),
        (["lycoris_blocks_0.lokr_w1"], "is an adapter"),
        (["encoder.block.0.layer.0.SelfAttention.q.weight", "shared.weight"], "is a text encoder alone"),
        (["text_model.encoder.layers.0.mlp.fc1.weight"], "is a text encoder alone"),
        (["model.layers.0.self_attn.q_proj.weight"], "is a text encoder alone"),
        (["encoder.conv_in.weight", "decoder.conv_in.weight"], "is a VAE alone"),
        (["controlnet_blocks.0.weight"], "is a ControlNet alone"),
        (["some.other.weight"], r"holds no transformer or UNet that is known by its names \(some\.other\.weight"),
    ],
)
def test_files_of_other_things(whole: Path, tmp_path: Path, names: list[str], sentence: str) -> None:
    file = tmp_path / "f.safetensors"
    save_file({name: torch.ones(2, 2) for name in names}, file)
    for call in (
        lambda: quantize_pipeline(file, tmp_path / "out", CONFIG, base=str(whole)),
        lambda: load_pipeline(file, whole, device="cpu"),
        lambda: skeleton(file),
    ):
        with pytest.raises(SVDQuantError, match=sentence):
            call()
    assert sorted(tmp_path.iterdir()) == [file]


def test_other_containers_and_damage(whole: Path, tmp_path: Path) -> None:
    gguf, cut = tmp_path / "model.gguf", tmp_path / "cut.safetensors"
    gguf.write_bytes(b"GGUF")
    weights = whole / "transformer" / "diffusion_pytorch_model.safetensors"
    cut.write_bytes(weights.read_bytes()[:-100])
    packed = standins.save_quantized("flux_dev", tmp_path / "packed.safetensors")
    for file, sentence in (
        (gguf, "GGUF holds quantized weights; give the .safetensors of the model in 16 bits or fp8"),
        (cut, "is truncated"),
        (packed, "is quantized already; start from the 16-bit model"),
    ):
        with pytest.raises(SVDQuantError, match=sentence):
            quantize_pipeline(file, tmp_path / "out", CONFIG, base=str(whole))
        assert not list(tmp_path.glob("out*"))
    for file in (gguf, cut):
        with pytest.raises(SVDQuantError):
            load_pipeline(file, whole)


def test_of_another_family(flux: tuple, whole: Path, tmp_path: Path) -> None:
    sana = ft.model("sana")
    file = ft.write(tmp_path / "f.safetensors", ORIGINAL["sana"](sana.state_dict()))
    sentence = (
        r"f\.safetensors: holds a SanaTransformer2DModel, and .* has a FluxTransformer2DModel; give its own pipeline, "
        r"e\.g\. 'Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers', as base"
    )
    for base in (whole, flux[1]):
        with pytest.raises(SVDQuantError, match=sentence):
            quantize_pipeline(file, tmp_path / "out", CONFIG, base=str(base))
    assert sorted(tmp_path.iterdir()) == [file]
    # A schnell lacks what a dev has.
    schnell = standins.flux_transformer().state_dict()
    with pytest.raises(SVDQuantError, match=r"lacks time_text_embed\.guidance_embedder.* and 3 more, .*--base"):
        loaded(ft.write(file, ORIGINAL["flux"](schnell)), flux[1])


@pytest.mark.parametrize(
    ("part", "text", "sentence"),
    [
        ("transformer/config.json", '{"_class_name": "FluxTransformer2DModel", "num_layers": "x"}', "makes no model"),
        ("transformer/config.json", '{"_class_name": "Nope"}', "Nope is no model class of diffusers"),
        ("transformer/config.json", "{}", " is no model class of diffusers"),
        ("model_index.json", '{"_class_name": "FluxPipeline", "transformer": []}', "has no transformer or unet"),
    ],
)
def test_broken_pipelines(flux: tuple, tmp_path: Path, part: str, text: str, sentence: str) -> None:
    state, base = flux
    broken = Path(shutil.copytree(base, tmp_path / "base"))
    (broken / part).write_text(text)
    file = ft.write(tmp_path / "f.safetensors", ORIGINAL["flux"](state))
    with pytest.raises(SVDQuantError, match=sentence):
        quantize_pipeline(file, tmp_path / "out", CONFIG, base=str(broken))


def test_a_model_that_is_known_by_its_base_alone(tmp_path: Path) -> None:
    """diffusers' names of a class that no table here has."""
    from diffusers import DiTTransformer2DModel

    made = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, num_layers=1, sample_size=8, num_embeds_ada_norm=4
    ).to(torch.bfloat16)
    base = ft.pipeline_around(made, tmp_path / "base")
    file = ft.write(tmp_path / "f.safetensors", made.state_dict(), "model.diffusion_model.")
    assert_same(loaded(file, base), made.state_dict())
    assert load_own_parts(file, base, "transformer", torch.bfloat16) == {}
    with pytest.raises(SVDQuantError, match="holds no transformer or UNet that is known by its names"):
        fitting_base(file, None)


def test_shards_and_bare_folders(flux: tuple, whole: Path, tmp_path: Path) -> None:
    state, base = flux
    folder = tmp_path / "shards"
    folder.mkdir()
    writer = ShardWriter(folder, "flux-dev", 100_000)
    for name, value in ORIGINAL["flux"](state).items():
        writer.add(name, value)
    writer.finish()
    index = folder / "flux-dev.safetensors.index.json"
    assert len(list(folder.glob("*.safetensors"))) > 5
    assert_same(loaded(index, base), state)
    assert bare_file(folder) == index
    assert type(skeleton(folder)).__name__ == type(skeleton(index)).__name__ == "FluxTransformer2DModel"
    # A folder of one file, and a model folder that is put into a pipeline.
    bare, model = tmp_path / "bare", tmp_path / "model"
    bare.mkdir()
    shutil.copytree(whole / "transformer", model)
    shutil.copy(model / "diffusion_pytorch_model.safetensors", bare / "any.safetensors")
    wanted = load_file(bare / "any.safetensors")
    for number, source in enumerate((bare, model)):
        quantize_pipeline(source, tmp_path / f"out{number}", CONFIG, base=str(whole))
    assert weights_of(tmp_path / "out0") == weights_of(tmp_path / "out1")
    # What shapes do not tell is in the model's own configuration.
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"axes_dims_rope": [16, 24, 24]}))
    quantize_pipeline(model, tmp_path / "out2", CONFIG, base=str(whole))
    stored = json.loads((tmp_path / "out2" / "transformer" / "config.json").read_text())
    assert stored["axes_dims_rope"] == [16, 24, 24]
    assert_same(load_pipeline(bare, whole, device="cpu").transformer.state_dict(), wanted)


def weights_of(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted((folder / "transformer").glob("*.safetensors"))}


@pytest.mark.parametrize("broken", [KeyboardInterrupt, SVDQuantError])
def test_stopped_while_unpacking(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: type[BaseException]
) -> None:
    file = tmp_path / "f.safetensors"
    shutil.copy(whole / "transformer" / "diffusion_pytorch_model.safetensors", file)
    count, get = [0], MappedTensors.get

    def some(self: MappedTensors, name: str, *more: Any) -> Tensor:
        count[0] += 1
        if count[0] == 20:
            raise broken("stopped")
        return get(self, name, *more)

    monkeypatch.setattr(MappedTensors, "get", some)
    with pytest.raises(broken):
        quantize_pipeline(file, tmp_path / "out", CONFIG, base=str(whole))
    assert sorted(tmp_path.iterdir()) == [file]
    # As a kill leaves it: half of the copy, and no word that it is complete.
    left = tmp_path / "out.partial" / "source" / "transformer"
    left.mkdir(parents=True)
    (left / "part-00000.safetensors").write_bytes(b"half")
    (tmp_path / "out.partial" / "lock").touch()
    quantize_pipeline(file, tmp_path / "out", CONFIG, base=str(whole))
    quantize_pipeline(whole, tmp_path / "same", CONFIG)
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "same")


def test_another_file_does_not_disturb_an_interrupted_run(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = whole / "transformer" / "diffusion_pytorch_model.safetensors"
    files = [Path(shutil.copy(weights, tmp_path / name)) for name in ("a.safetensors", "b.safetensors")]
    with pytest.raises(SVDQuantError, match="exceed the relative error"):
        strict = SVDQuantConfig(rank=16, smooth=2, gptq=False, max_error=1e-9)
        quantize_pipeline(files[0], tmp_path / "out", strict, base=str(whole))
    monkeypatch.setattr("svdquant.integrations.on_disk.unpack", None)
    with pytest.raises(SVDQuantError, match="was begun with other weights"):
        quantize_pipeline(files[1], tmp_path / "out", CONFIG, base=str(whole))
    monkeypatch.undo()
    quantize_pipeline(files[0], tmp_path / "out", CONFIG, base=str(whole))


def test_names_are_converted_without_reading_a_weight(
    flux: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but one tensor is read at a time, and each part of q, k and v as its own memory."""
    state, base = flux
    file = ft.write(tmp_path / "f.safetensors", ORIGINAL["flux"](state))
    part = load_single_file(file, base, torch.bfloat16).get_submodule("transformer_blocks.0.attn.to_k").weight
    assert part.untyped_storage().nbytes() == part.nbytes

    def get(*_: Any) -> Tensor:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(MappedTensors, "get", get)
    assert fitting_base(file, str(base)) == str(base)
    assert isinstance(skeleton(file), nn.Module)


def test_second_transformer_by_the_name_of_the_file(tmp_path: Path) -> None:
    """Wan 2.2 is two files; that of low noise takes over from the other."""
    made = ft.model("wan")
    base = ft.pipeline_around(made, tmp_path / "base")
    shutil.copytree(base / "transformer", base / "transformer_2")
    index = json.loads((base / "model_index.json").read_text())
    index["transformer_2"] = index["transformer"]
    (base / "model_index.json").write_text(json.dumps(index))
    for name, part, other in (
        ("wan2.2_t2v_high_noise_14B.safetensors", "transformer", "transformer_2"),
        ("wan2.2_t2v_low_noise_14B.safetensors", "transformer_2", "transformer"),
    ):
        notes: list[str] = []
        file = ft.write(tmp_path / name, made.state_dict())
        check_single_file(file, str(base), lambda *note, notes=notes: notes.append(note[3]))
        assert f"takes the place of the {part}; {other} stays" in notes[0]
        (tmp_path / part).mkdir()
        folder = unpack(file, str(base), tmp_path / part, None, {"file": name})
        assert (folder / part / "diffusion_pytorch_model.safetensors").is_file()
        assert not list((folder / other).glob("*.safetensors"))
    for name, part in (
        ("low_noise_model/any", "transformer_2"),
        ("transformer_2/any", "transformer_2"),
        ("high_noise_model/any", "transformer"),
        ("low_noise_model/high_noise", "transformer"),
    ):
        assert part_of(str(base), tmp_path / f"{name}.safetensors") == part


@pytest.mark.parametrize(
    ("name", "config", "model_class", "base"),
    [
        ("flux", {"guidance_embeds": True}, "FluxTransformer2DModel", "black-forest-labs/FLUX.1-dev"),
        ("flux", {"guidance_embeds": False}, "FluxTransformer2DModel", "black-forest-labs/FLUX.1-schnell"),
        ("flux", {"guidance_embeds": True, "in_channels": 384, "out_channels": 64}, "FluxTransformer2DModel",
         "black-forest-labs/FLUX.1-Fill-dev"),
        ("flux2", {}, "Flux2Transformer2DModel", "black-forest-labs/FLUX.2-dev"),
        ("hunyuan_video", {}, "HunyuanVideoTransformer3DModel", "hunyuanvideo-community/HunyuanVideo"),
        ("sana", {}, "SanaTransformer2DModel", "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers"),
        ("qwen_image", {}, "QwenImageTransformer2DModel", "Qwen/Qwen-Image"),
        ("wan", {}, "WanTransformer3DModel", "Wan-AI/Wan2.1-T2V-14B-Diffusers"),
        ("ltx", {}, "LTXVideoTransformer3DModel", "Lightricks/LTX-Video"),
        ("z_image", {}, "ZImageTransformer2DModel", "Tongyi-MAI/Z-Image"),
    ],
)  # fmt: skip
def test_real_sizes_tell_model_and_base(
    tmp_path: Path, name: str, config: dict[str, Any], model_class: str, base: str
) -> None:
    """Headers of files of the published sizes: the same module tree, shape by shape, without a configuration."""
    import diffusers

    model = build_skeleton(getattr(diffusers, model_class), config, torch.bfloat16)
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    original = ORIGINAL.get(name, dict)(model.state_dict())
    file = ft.write_header(tmp_path / "f.safetensors", original, "model.diffusion_model.")
    made = skeleton(file)
    assert type(made).__name__ == model_class
    assert {key: tuple(value.shape) for key, value in made.state_dict().items()} == wanted
    with FineTune(file) as tune:
        assert tune.default_base() == base
    with pytest.raises(SVDQuantError, match=f"seems to be made from {base}, which could not be loaded; .*--base"):
        fitting_base(file, None)


def test_base_of_files_told_apart_by_name(flux: tuple) -> None:
    def lazy(shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
        return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}

    wan = lazy({"patch_embedding.weight": (5120, 36, 1, 2, 2)})
    for model_class, tensors, file, base in (
        ("FluxTransformer2DModel", flux[0], "my-Kontext.safetensors", "black-forest-labs/FLUX.1-Kontext-dev"),
        ("FluxTransformer2DModel", lazy({"img_in.weight": (3072, 128)}), "x", "black-forest-labs/FLUX.1-Depth-dev"),
        ("QwenImageTransformer2DModel", {}, "qwen_image_edit_2509_v3", "Qwen/Qwen-Image-Edit-2509"),
        ("WanTransformer3DModel", wan, "wan2.2_i2v_high_noise", "Wan-AI/Wan2.2-I2V-A14B-Diffusers"),
        ("WanTransformer3DModel", wan | lazy({"img_emb.x": (1,)}), "x", "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"),
        ("UNet2DConditionModel", {}, "x", None),
        ("NoSuchModel", {}, "x", None),
    ):
        assert default_base(model_class, tensors, file) == base


def test_plan_and_notes_with_a_base(flux: tuple, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, base = flux
    file = ft.write(tmp_path / "f.safetensors", ORIGINAL["flux"](state))
    of_base, alone = skeleton(file, base=str(base)), skeleton(file)
    assert tuple(of_base.config["axes_dims_rope"]) == alone.config["axes_dims_rope"]
    assert of_base.state_dict().keys() == alone.state_dict().keys()
    encoder = skeleton(file, component="text_encoder_2", base=str(whole))
    assert type(encoder).__name__ == "T5EncoderModel"
    with pytest.raises(SVDQuantError, match="has a FluxTransformer2DModel; give its own pipeline"):
        skeleton(ft.write(tmp_path / "g.safetensors", ft.model("qwen_image").state_dict()), base=str(base))
    notes: list[str] = []
    monkeypatch.setattr(fine_tune, "default_base", lambda *_: str(base))
    assert check_single_file(file, None, lambda *note: notes.append(note[3])) == str(base)
    assert notes == [f"f.safetensors is taken for a fine-tune of {base}; --base names another pipeline"]


def test_drawing_with_a_file_in_original_names(whole: Path, tmp_path: Path) -> None:
    state = load_file(whole / "transformer" / "diffusion_pytorch_model.safetensors")
    file = ft.write(tmp_path / "f.safetensors", ORIGINAL["flux"](state), "model.diffusion_model.")
    options = PipelineOptions(num_inference_steps=1, height=16, width=16, max_sequence_length=16)
    pictures = [
        draw(pipe, ["a cat"], [0], options)[0].tobytes()
        for pipe in (load_pipeline(whole, device="cpu"), load_pipeline(file, whole, device="cpu"))
    ]
    assert pictures[0] == pictures[1]
