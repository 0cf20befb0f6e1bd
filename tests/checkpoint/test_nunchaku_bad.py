"""Damaged and foreign Nunchaku files: one sentence that names the file and the tensor, and nothing is loaded."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import nunchaku_files
import pytest
import torch
from safetensors.torch import save_file

import svdquant
from svdquant import SVDQuantError

CONFIG = nunchaku_files.CONFIGS["flux"]
QKV = "transformer_blocks.0.qkv_proj"


@pytest.fixture(scope="module")
def tensors():
    return nunchaku_files.make("flux", CONFIG)


@pytest.fixture(scope="module")
def info():
    return nunchaku_files.metadata("flux", CONFIG)


def refused(path, message, **options):
    before = {file: file.stat().st_mtime_ns for file in Path(path).parent.rglob("*")}
    with pytest.raises(SVDQuantError, match=message) as caught:
        svdquant.load_model(path, **options)
    text = str(caught.value)
    assert os.path.basename(str(path)) in text
    assert "\n" not in text and len(text) < 500
    assert {file: file.stat().st_mtime_ns for file in Path(path).parent.rglob("*")} == before


def written(path, tensors, info, **changes):
    """The file with some tensors replaced, or left out where the change is None."""
    changed = {name: changes.get(name, t) for name, t in tensors.items()} | changes
    save_file({name: t.contiguous() for name, t in changed.items() if t is not None}, path, info)
    return path


def test_the_untouched_file_loads(tensors, info, tmp_path):
    assert svdquant.load_model(written(tmp_path / "good.safetensors", tensors, info)) is not None


@pytest.mark.parametrize("cut", [1, 1000, 100_000])
def test_truncated(tensors, info, tmp_path, cut):
    path = written(tmp_path / "short.safetensors", tensors, info)
    path.write_bytes(path.read_bytes()[:-cut])
    refused(path, r"is truncated \(\d+ bytes, its header says \d+\)")


def test_truncated_within_the_header(tensors, info, tmp_path):
    path = written(tmp_path / "short.safetensors", tensors, info)
    path.write_bytes(path.read_bytes()[:500])
    refused(path, "is truncated or no safetensors file")


@pytest.mark.parametrize("leaf", ["qweight", "wscales", "smooth", "lora_up", "bias"])
def test_missing_tensor(tensors, info, tmp_path, leaf):
    path = written(tmp_path / "lacking.safetensors", tensors, info, **{f"{QKV}.{leaf}": None})
    refused(path, rf"{QKV}\.{leaf} is missing")


@pytest.mark.parametrize(
    "name",
    ["x_embedder.weight", "transformer_blocks.0.norm_q.weight", "single_transformer_blocks.1.norm.linear.wzeros"],
)
def test_missing_plain_tensor(tensors, info, tmp_path, name):
    refused(written(tmp_path / "lacking.safetensors", tensors, info, **{name: None}), f"{name} is missing")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (f"{QKV}.qweight", (384, 32)),
        (f"{QKV}.wscales", (4, 384)),
        (f"{QKV}.lora_down", (256, 16)),
        (f"{QKV}.bias", (128,)),
        ("transformer_blocks.0.norm1.linear.qweight", (96, 64)),
        ("x_embedder.weight", (4, 128)),
    ],
)
def test_wrong_shape(tensors, info, tmp_path, name, shape):
    path = written(tmp_path / "odd.safetensors", tensors, info, **{name: torch.zeros(shape, dtype=tensors[name].dtype)})
    refused(path, rf"tensor {name} has the shape \[{shape[0]}.*takes")


@pytest.mark.parametrize("name", [f"{QKV}.smooth", "x_embedder.weight", "transformer_blocks.0.norm1.linear.wscales"])
def test_wrong_type(tensors, info, tmp_path, name):
    path = written(tmp_path / "odd.safetensors", tensors, info, **{name: tensors[name].to(torch.int8)})
    refused(path, f"tensor {name} has the type I8")


def test_mixed_ranks(tensors, info, tmp_path):
    other = nunchaku_files.make("flux", CONFIG, rank=32)
    names = [f"{QKV}.lora_down", f"{QKV}.lora_up"]
    path = written(tmp_path / "ranks.safetensors", tensors, info, **{name: other[name] for name in names})
    refused(path, r"lora_\w+ has rank 16, transformer_blocks.0.qkv_proj.lora_\w+ rank 32")
    path = written(tmp_path / "ranks.safetensors", tensors, info, **{names[1]: other[names[1]]})
    refused(path, "rank 32")


def test_rank_that_is_no_multiple_of_16(tensors, info, tmp_path):
    odd = {n: t[:, :8].contiguous() for n, t in tensors.items() if n.endswith((".lora_down", ".lora_up"))}
    refused(written(tmp_path / "odd.safetensors", tensors, info, **odd), "rank 8, which is no multiple of 16")


def test_mixed_precisions(tensors, info, tmp_path):
    other = nunchaku_files.make("flux", CONFIG, "nvfp4")
    path = written(tmp_path / "mixed.safetensors", tensors, info, **{f"{QKV}.wscales": other[f"{QKV}.wscales"]})
    refused(path, f"{QKV} nvfp4")


def test_precision_that_the_file_denies(tensors, tmp_path):
    path = written(tmp_path / "liar.safetensors", tensors, nunchaku_files.metadata("flux", CONFIG, "nvfp4"))
    refused(path, "declares 'fp4_e2m1_all' weights, its scales are those of int4")


@pytest.mark.parametrize("key", ["config", "quantization_config"])
@pytest.mark.parametrize(("value", "message"), [("{nonsense", "is not JSON"), ("[1]", "holds no JSON object")])
def test_metadata_that_is_not_json(tensors, info, tmp_path, key, value, message):
    refused(written(tmp_path / "meta.safetensors", tensors, info | {key: value}), f"metadata '{key}' {message}")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "PixArtTransformer2DModel"}, "names the model class 'PixArtTransformer2DModel'"),
        ({"_class_name": "FluxTransformer2DModel", "num_attention_heads": "many"}, "does not make a FluxTransformer2D"),
        ({"_class_name": "FluxTransformer2DModel", "num_layers": 3}, "says num_layers=3, its tensors are those of 1"),
        ({"_class_name": "FluxTransformer2DModel", "num_layers": 0}, "says num_layers=0"),
        ({"_class_name": "FluxTransformer2DModel", "num_single_layers": 10**9}, "says num_single_layers=1000000000"),
    ],
)
def test_configuration_of_another_model(tensors, info, tmp_path, config, message):
    base = json.loads(info["config"]) | config
    refused(written(tmp_path / "other.safetensors", tensors, info | {"config": json.dumps(base)}), message)


def rewrite(path, change):
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


@pytest.mark.parametrize("metadata", [["a"], "text", {"format": 3}, {"config": {}}])
def test_metadata_of_another_kind(tensors, info, tmp_path, metadata):
    path = written(tmp_path / "meta.safetensors", tensors, info)
    rewrite(path, lambda header: header.update(__metadata__=metadata))
    refused(path, "header is damaged.*metadata are not strings")


def test_nested_without_end(tensors, info, tmp_path):
    deep = "[" * 100_000 + "]" * 100_000
    refused(written(tmp_path / "deep.safetensors", tensors, info | {"config": deep}), "is not JSON")
    path = tmp_path / "deeper.safetensors"
    path.write_bytes(struct.pack("<Q", len(deep)) + deep.encode())
    refused(path, "header is damaged")


def test_numbers_that_float16_cannot_hold(tensors, info, tmp_path):
    name = f"{QKV}.lora_up"
    path = written(tmp_path / "large.safetensors", tensors, info, **{name: tensors[name] * 1e6})
    assert svdquant.load_model(path, torch_dtype=torch.bfloat16) is not None
    refused(path, "attn.to_q.proj_up does not fit float16.*bfloat16", torch_dtype=torch.float16)


@pytest.mark.parametrize("options", [{"torch_dtyp": 1}, {"device_map": "cpu"}, {"model": torch.nn.Linear(1, 1)}])
def test_options_that_do_not_belong(tensors, info, tmp_path, options):
    path = written(tmp_path / "good.safetensors", tensors, info)
    refused(path, f"{next(iter(options))}.*leave (it )?out|leave out {next(iter(options))}", **options)


def test_a_device_that_is_not_there(tensors, info, tmp_path):
    path = written(tmp_path / "good.safetensors", tensors, info)
    for device in ("cudaa", "cuda:99"):
        with pytest.raises(SVDQuantError, match=f"device '{device}' cannot be used"):
            svdquant.load_model(path, device=device)


@pytest.mark.parametrize(
    "architectures", [["T5ForConditionalGeneration"], ["NunchakuT5EncoderModel"], "T5EncoderModel", {}, [], None]
)
def test_the_text_encoder_is_one_whatever_its_configuration_says(tmp_path, architectures):
    config = nunchaku_files.CONFIGS["t5"]
    info = nunchaku_files.metadata("t5", config)
    changed = json.loads(info["config"]) | {"architectures": architectures}
    path = tmp_path / "t5.safetensors"
    save_file(nunchaku_files.make("t5", config), path, info | {"config": json.dumps(changed)})
    assert type(svdquant.load_model(path)).__name__ == "T5EncoderModel"


def test_claims_a_size_it_does_not_have(tensors, info, tmp_path):
    path = written(tmp_path / "claims.safetensors", tensors, info)
    rewrite(path, lambda header: header[f"{QKV}.qweight"].update(shape=[1 << 40, 64]))
    refused(path, f"tensor {QKV}.qweight does not lie where its shape says")
    path = written(tmp_path / "claims.safetensors", tensors, info)
    path.write_bytes(struct.pack("<Q", 1 << 60) + path.read_bytes()[8:])
    refused(path, "is truncated or no safetensors file")


def test_no_permission(tensors, info, tmp_path, monkeypatch):
    path = written(tmp_path / "locked.safetensors", tensors, info)
    path.chmod(0)
    if os.access(path, os.R_OK):  # root may read everything, so the system's answer is played

        def forbidden(*_args, **_kwargs):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "open", forbidden)
    refused(path, "Permission denied.*permissions")


def test_blocks_alone_need_a_base(tensors, tmp_path):
    path = nunchaku_files.write_blocks(tmp_path / "blocks.safetensors", tensors)
    refused(path, "blocks alone.*16-bit pipeline.*base")
    state = nunchaku_files.random_state("sdxl", nunchaku_files.CONFIGS["sdxl"], 1)
    base = nunchaku_files.write_base(tmp_path / "base", "sdxl", nunchaku_files.CONFIGS["sdxl"], state)
    with pytest.raises(SVDQuantError, match="UNet2DConditionModel"):
        svdquant.load_model(path, base=base)


def test_old_pickle(tmp_path):
    path = tmp_path / "svdq-w4a16-t5.pt"
    torch.save({"a.qweight": torch.zeros(1)}, path)
    refused(path, "pickle files can run code; convert to safetensors")


def test_unknown_method(tensors, tmp_path):
    lite = nunchaku_files.make("flux_lite", CONFIG)
    folder = nunchaku_files.write_lite(tmp_path / "lite", lite, CONFIG, "int4", 16)
    config = json.loads((folder / "config.json").read_text())

    def change(**fields):
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization | fields}))

    quantization = config["quantization_config"]
    change(quant_method="exl7")
    refused(folder, "'exl7' is not svdquant")
    svdq = quantization["svdq_w4a4"]
    change(svdq_w4a4=svdq | {"targets": [*svdq["targets"], "nowhere.to_q"]})
    refused(folder, "names the target nowhere.to_q")
    change(svdq_w4a4=svdq | {"rank": 24})
    refused(folder, "rank 24 is no multiple of 16")
    change(svdq_w4a4=svdq | {"rank": 32})
    refused(folder, "has the shape")
    change(svdq_w4a4=svdq | {"precision": "int3"})
    refused(folder, "svdq_w4a4 configuration is damaged")
    change(svdq_w4a4="all")
    refused(folder, "svdq_w4a4 configuration is damaged")


def test_more_tensors_than_the_model_has(tensors, info, tmp_path):
    """As Nunchaku itself: what it needs is there, the rest is left out, and said."""
    path = written(tmp_path / "more.safetensors", tensors, info, **{"something.else": torch.zeros(3)})
    with pytest.warns(UserWarning, match=r"tensor something\.else fits no layer of FluxTransformer2DModel"):
        svdquant.load_model(path)


def test_interrupted_saving_leaves_nothing(tensors, info, tmp_path, monkeypatch):
    model = svdquant.load_model(written(tmp_path / "good.safetensors", tensors, info))
    target = tmp_path / "out" / "copy.safetensors"
    svdquant.save_model(model, target, format="nunchaku")
    before = target.read_bytes()
    from svdquant.checkpoint.mapped import StreamedFile

    count = [0]
    add = StreamedFile.add

    def full(self, name, value):
        count[0] += 1
        if count[0] > 20:
            raise OSError(28, "No space left on device")
        add(self, name, value)

    monkeypatch.setattr(StreamedFile, "add", full)
    with pytest.raises(SVDQuantError, match=r"No space left on device.*nothing was changed"):
        svdquant.save_model(model, target, format="nunchaku")
    assert target.read_bytes() == before and [p.name for p in target.parent.iterdir()] == ["copy.safetensors"]
