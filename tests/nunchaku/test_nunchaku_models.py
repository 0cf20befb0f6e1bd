"""The model classes: loaded with Nunchaku's keywords, used as the stock classes that they stand in for."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import diffusers
import nunchaku_files as files
import pytest
import standins
import tiny
import torch
import transformers
from diffusers import DiffusionPipeline, FluxTransformer2DModel

import svdquant
from svdquant import SVDQuantError, nunchaku

FAMILIES = {
    "flux": (nunchaku.NunchakuFluxTransformer2dModel, FluxTransformer2DModel),
    "qwen": (nunchaku.NunchakuQwenImageTransformer2DModel, diffusers.QwenImageTransformer2DModel),
    "sdxl": (nunchaku.NunchakuSDXLUNet2DConditionModel, diffusers.UNet2DConditionModel),
    "zimage": (nunchaku.NunchakuZImageTransformer2DModel, diffusers.ZImageTransformer2DModel),
    "sana": (nunchaku.NunchakuSanaTransformer2DModel, diffusers.SanaTransformer2DModel),
    "t5": (nunchaku.NunchakuT5EncoderModel, transformers.T5EncoderModel),
}


def written(folder: Path, family: str = "flux", precision: str = "int4", **settings: Any) -> Path:
    """A published file of random numbers."""
    config = files.CONFIGS[family] | settings
    tensors = files.make(family, config, precision)
    return files.write_single(folder / f"{family}.safetensors", tensors, files.metadata(family, config, precision))


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized FLUX in Nunchaku's format that draws sensible numbers, and fits `tiny.flux_pipeline`."""
    model = tiny.transformer(layers=2, single_layers=2).bfloat16()
    svdquant.quantize(model, tiny.config())
    path = tmp_path_factory.mktemp("flux") / "svdq-int4_r16.safetensors"
    return svdquant.save_model(model, path)


def load(path: Path, **options: Any) -> Any:
    return nunchaku.NunchakuFluxTransformer2dModel.from_pretrained(path, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_class_loads_its_own_files_and_no_other(family: str, tmp_path: Path) -> None:
    cls, stock = FAMILIES[family]
    path = written(tmp_path, family)
    model = cls.from_pretrained(path)
    assert isinstance(model, cls) and isinstance(model, stock)
    assert not model.training and model.device == torch.device("cpu") and model.dtype == torch.bfloat16
    plain = svdquant.load_model(path, torch_dtype=torch.bfloat16)
    assert type(plain) is stock and not isinstance(plain, cls)
    expected = plain.state_dict()
    assert all(torch.equal(tensor.float(), expected[name].float()) for name, tensor in model.state_dict().items())
    other = FAMILIES["qwen" if family != "qwen" else "flux"][0]
    with pytest.raises(SVDQuantError, match=f"holds a {stock.__name__}.*load it with Nunchaku"):
        other.from_pretrained(path)


def test_the_two_flux_classes(quantized: Path) -> None:
    first, second = load(quantized), nunchaku.NunchakuFluxTransformer2DModelV2.from_pretrained(quantized)
    assert not isinstance(first, nunchaku.NunchakuFluxTransformer2DModelV2)
    assert not isinstance(second, nunchaku.NunchakuFluxTransformer2dModel)
    assert torch.equal(tiny.run(first), tiny.run(second))


def test_metadata_of_file_and_folder(tmp_path: Path) -> None:
    path = written(tmp_path)
    model, metadata = load(path, return_metadata=True)
    assert isinstance(model, FluxTransformer2DModel)
    assert metadata["model_class"] == "NunchakuFluxTransformer2dModel" and "quantization_config" in metadata
    config = files.CONFIGS["flux"]
    folder = files.write_folder(tmp_path / "folder", files.make("flux", config), files.full_config("flux", config))
    assert load(folder, return_metadata=True)[1] == {}


@pytest.mark.parametrize(("held", "other"), [("int4", "fp4"), ("nvfp4", "int4")])
def test_precision_is_compared_not_demanded(
    held: str, other: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    path = written(tmp_path, precision=held)
    for fitting in ("auto", held, *(["fp4"] if held == "nvfp4" else [])):
        load(path, precision=fitting)
    assert not [w for w in recwarn if "weights" in str(w.message)]
    with pytest.warns(UserWarning, match=f"holds {held} weights") as caught:
        load(path, precision=other)
    assert len(caught) == 1
    with pytest.raises(SVDQuantError, match="precision='int8' is not one of"):
        load(path, precision="int8")


def test_keywords(quantized: Path, tmp_path: Path) -> None:
    assert load(quantized, torch_dtype=torch.float32).dtype == torch.float32
    everything = {"subfolder": None, "revision": None, "cache_dir": None, "local_files_only": True, "token": None}
    load(quantized, device="cpu", low_cpu_mem_usage=True, force_download=False, proxies=None, **everything)
    with pytest.raises(SVDQuantError, match=r"NunchakuFluxTransformer2dModel\.from_pretrained takes no colour"):
        load(quantized, colour="red")
    with pytest.raises(SVDQuantError, match="device 'nowhere' cannot be used"):
        load(quantized, device="nowhere")
    (tmp_path / "inner").mkdir()
    svdquant.save_model(svdquant.load_model(quantized), tmp_path / "inner" / "model")
    assert tiny.state_equal(load(tmp_path / "inner", subfolder="model"), load(quantized))
    with pytest.raises(SVDQuantError, match="does not exist"):
        load(tmp_path / "missing.safetensors")


def test_pag_layers_are_the_pipeline_s_matter(tmp_path: Path) -> None:
    model = nunchaku.NunchakuSanaTransformer2DModel.from_pretrained(written(tmp_path, "sana"), pag_layers=[0])
    assert len(model.transformer_blocks) == 2


def test_pipeline_saves_as_the_stock_class(quantized: Path, tmp_path: Path) -> None:
    pipe = tiny.flux_pipeline(transformer=load(quantized, torch_dtype=torch.float32))
    before = tiny.draw(pipe)
    pipe.save_pretrained(tmp_path / "pipe")
    index = (tmp_path / "pipe" / "model_index.json").read_text()
    config = (tmp_path / "pipe" / "transformer" / "config.json").read_text()
    assert "unchaku" not in index + config and '"FluxTransformer2DModel"' in index
    again = tiny.quiet(DiffusionPipeline.from_pretrained(tmp_path / "pipe"))
    assert type(again.transformer) is FluxTransformer2DModel
    assert (tiny.draw(again) == before).all()


def test_text_encoder_in_a_pipeline(tmp_path: Path) -> None:
    path = written(tmp_path, "t5", vocab_size=128)
    encoder = nunchaku.NunchakuT5EncoderModel.from_pretrained(path, torch_dtype=torch.float32)
    pipe = tiny.flux_pipeline(
        text_encoder_2=encoder, transformer=standins.flux_transformer(in_channels=4), vae=tiny.vae()
    )
    with torch.no_grad():
        embedded = pipe.encode_prompt("a cat", None, max_sequence_length=16)[0]
    assert embedded.shape == (1, 16, 128) and embedded.isfinite().all()
    with pytest.raises(SVDQuantError, match="moves as a whole"):
        nunchaku.NunchakuT5EncoderModel.from_pretrained(path, offload=True)


def test_copies(quantized: Path) -> None:
    model = load(quantized)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(twin, nunchaku.NunchakuFluxTransformer2dModel)
        assert torch.equal(tiny.run(twin), tiny.run(model))
        assert twin.config == model.config and twin is not model


def test_offload_on_a_cpu_changes_nothing(quantized: Path, tmp_path: Path) -> None:
    plain, offloaded = load(quantized), load(quantized, offload=True)
    assert torch.equal(tiny.run(offloaded.to("cpu")), tiny.run(plain))
    qwen = nunchaku.NunchakuQwenImageTransformer2DModel.from_pretrained(written(tmp_path, "qwen"))
    qwen.set_offload(True, use_pin_memory=False, num_blocks_on_gpu=2)
    qwen.set_offload(False)
    assert qwen.device == torch.device("cpu")
    with pytest.raises(SVDQuantError, match="num_blocks_on_gpu=0"):
        qwen.set_offload(True, num_blocks_on_gpu=0)


def test_offload_starts_on_the_way_to_an_accelerator(quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ "meta" cannot compute; a stand-in records what diffusers is asked for."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(FluxTransformer2DModel, "enable_group_offload", lambda self, **options: calls.append(options))
    model = load(quantized, offload=True)
    assert not calls
    assert model.to("cuda:1") is model and model.device == torch.device("cpu")
    assert calls[0]["onload_device"] == torch.device("cuda", 1) and calls[0]["num_blocks_per_group"] == 1
    assert calls[0]["use_stream"] and not calls[0]["low_cpu_mem_usage"]
    model.set_offload(True, use_pin_memory=False, num_blocks_on_gpu=20)
    model.to(torch.device("cuda"))
    assert calls[1]["num_blocks_per_group"] == 20 and not calls[1]["use_stream"] and calls[1]["low_cpu_mem_usage"]


def test_offloaded_blocks_compute_the_same_and_come_back(quantized: Path) -> None:
    """Group offloading itself, between the CPU and the CPU."""
    from svdquant.nunchaku.models import _offload

    model, plain = load(quantized), load(quantized)
    _offload._group_offload(model, torch.device("cpu"), True, 1)
    assert _offload._is_group_offloaded(model)
    assert torch.equal(tiny.run(model), tiny.run(plain))
    model.set_offload(False)
    assert not _offload._is_group_offloaded(model)
    assert torch.equal(tiny.run(model), tiny.run(plain))


def test_flash_where_it_is_installed(quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from svdquant.nunchaku.models import _attention

    model = load(quantized)
    monkeypatch.setattr(_attention, "_has_flash", lambda: True)
    model.set_attention_impl("flashattn2")
    processors = list(model.attn_processors.values())
    assert {p._attention_backend.value for p in processors} == {"flash"}
    exact = load(quantized, torch_dtype=torch.float32)
    exact.set_attention_impl("flashattn2")
    assert {p._attention_backend.value for p in exact.attn_processors.values()} == {"native"}
    monkeypatch.setattr(_attention, "_has_flash", lambda: False)
    model.set_attention_impl("")
    assert {p._attention_backend.value for p in model.attn_processors.values()} == {"native"}


def test_attention_implementations_agree(quantized: Path) -> None:
    model = load(quantized, torch_dtype=torch.float32)
    expected = tiny.run(model)
    seen: list[torch.Size] = []

    def attend(qkv: torch.Tensor) -> torch.Tensor:
        seen.append(qkv.shape)
        q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    for name in ("flashattn2", "nunchaku-fp16", "default"):
        model.set_attention_impl(name)
        assert torch.equal(tiny.run(model), expected)
    model.set_attention_impl("custom", attend)
    torch.testing.assert_close(tiny.run(model), expected, rtol=1e-4, atol=1e-5)
    # 16 image tokens after 8 of text, 2 heads of 64.
    assert seen == [(1, 24, 3, 2, 64)] * 4
    model.set_attention_impl("custom", lambda qkv: attend(qkv) * 2)
    assert not torch.allclose(tiny.run(model), expected, atol=1e-3)
    model.set_attention_impl("flashattn2")
    assert torch.equal(tiny.run(model), expected)


def test_float16_attention_where_it_is_fast(quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from svdquant.nunchaku.models import _attention

    model = load(quantized)
    expected = tiny.run(model)
    model.set_attention_impl("nunchaku-fp16")
    seen: set[torch.dtype] = set()
    dispatch = _attention.dispatch_attention_fn

    def record(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.update((q.dtype, k.dtype, v.dtype))
        return dispatch(q, k, v, **options)

    monkeypatch.setattr(_attention, "dispatch_attention_fn", record)
    assert torch.equal(tiny.run(model), expected) and seen == {torch.bfloat16}
    seen.clear()
    monkeypatch.setattr(_attention, "_FAST_FLOAT16", ("cpu",))
    y = tiny.run(model)
    assert seen == {torch.float16} and y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)


def test_attention_errors(quantized: Path) -> None:
    model = load(quantized)
    with pytest.raises(SVDQuantError, match="'flashattn9' is not one of flashattn2"):
        model.set_attention_impl("flashattn9")
    with pytest.raises(SVDQuantError, match="needs attn_func"):
        model.set_attention_impl("custom")
    model.set_attention_impl("custom", lambda qkv: qkv[:, :, 0, 0])
    with pytest.raises(SVDQuantError, match=r"attn_func returned the shape \[1, 24, 64\]"):
        tiny.run(model)
