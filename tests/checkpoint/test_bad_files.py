"""Whatever is wrong with a path or a file is said in one sentence that names it, and nothing is loaded."""

from __future__ import annotations

import json
import os
import struct

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import svdquant
from svdquant import SVDQuantError
from svdquant.checkpoint import inspect
from svdquant.checkpoint.header import read_header

LAYER = "transformer_blocks.0.attn.to_q"


@pytest.fixture(scope="module")
def model():
    model = tiny.transformer()
    svdquant.quantize(model, tiny.config())
    return model


@pytest.fixture(scope="module")
def original(model, tmp_path_factory):
    return svdquant.save_model(model, tmp_path_factory.mktemp("original") / "model.safetensors")


@pytest.fixture
def file(original, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(original.read_bytes())
    return path


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "folder")
    return tmp_path / "folder"


def refused(path, message, inspected=True):
    for read in (svdquant.load_model, inspect) if inspected else (svdquant.load_model,):
        with pytest.raises(SVDQuantError, match=message) as caught:
            read(path)
        text = str(caught.value)
        assert os.path.basename(str(path)) in text
        assert "\n" not in text and len(text) < 500


def rewrite(file, change):
    """Rewrites the header's JSON and leaves the data."""
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def change_record(file, **fields):
    def change(header):
        record = json.loads(header["__metadata__"]["svdquant"])
        record["quantization_config"] |= fields.pop("quantization_config", {})
        header["__metadata__"]["svdquant"] = json.dumps(record | fields)

    rewrite(file, change)


def test_missing_path(tmp_path):
    refused(tmp_path / "nothing", "does not exist; give a model folder")
    refused(tmp_path / "nothing.safetensors", "does not exist; give a model folder")


def test_hub_id_that_cannot_be_reached():
    refused("someone/gated-model", r"hf auth login.*hf download someone/gated-model", inspected=False)


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".ckpt", ".pth"])
def test_pickle(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    torch.save({"w": torch.zeros(1)}, path)
    refused(path, "pickle files can run code; convert to safetensors")


def test_folder_of_pickles(folder):
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "diffusion_pytorch_model.bin")
    with pytest.raises(SVDQuantError, match=r"diffusion_pytorch_model\.bin: pickle files can run code"):
        svdquant.load_model(folder)


def test_other_files(tmp_path, folder):
    (tmp_path / "notes.txt").write_text("hello")
    refused(tmp_path / "notes.txt", "is not a model")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", r"has no config\.json")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    refused(folder, r"has no \.safetensors file")
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    refused(tmp_path / "pipeline", "the pipeline has no transformer")


@pytest.mark.parametrize("keep", [0, 5, 8, 100, -1, -1000])
def test_truncated(file, keep):
    file.write_bytes(file.read_bytes()[:keep])
    refused(file, "truncated|damaged")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff" * 64, "truncated or no safetensors"),
        (struct.pack("<Q", 4) + b"nope", "header is damaged"),
        (struct.pack("<Q", 2) + b"[]", "header is damaged"),
        (struct.pack("<Q", 10**12) + b"{}", "truncated or no safetensors"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
    ],
)
def test_no_safetensors(tmp_path, content, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    refused(path, message)


@pytest.mark.parametrize(
    "change",
    [
        lambda entry: entry.update(dtype="F1"),
        lambda entry: entry.update(shape=[-1, 4]),
        lambda entry: entry.update(shape=[7]),
        lambda entry: entry.update(data_offsets=[0, 1]),
        lambda entry: entry.update(data_offsets=["a", "b"]),
        lambda entry: entry.pop("dtype"),
    ],
)
def test_damaged_header(file, change):
    rewrite(file, lambda header: change(header[f"{LAYER}.qweight"]))
    refused(file, "header is damaged")


def test_trailing_bytes(file):
    file.write_bytes(file.read_bytes() + b"more")
    refused(file, "bytes after its last tensor")


def test_header_reader_agrees_with_safetensors(original):
    tensors, metadata = read_header(original)
    loaded = load_file(original)
    assert {n: (t.shape, t.nbytes) for n, t in tensors.items()} == {
        n: (tuple(t.shape), t.nbytes) for n, t in loaded.items()
    }
    assert metadata["format"] == "pt"


def test_file_of_someone_else(tmp_path):
    save_file({"w": torch.zeros(4)}, tmp_path / "other.safetensors")
    refused(tmp_path / "other.safetensors", "no svdquant record", inspected=False)
    save_file({"a.qweight": torch.zeros(4, dtype=torch.int8)}, tmp_path / "packed.safetensors")
    assert inspect(tmp_path / "packed.safetensors").format == "nunchaku"
    refused(tmp_path / "packed.safetensors", "does not say which model", inspected=False)


def test_record(file):
    change_record(file, quantization_config={"quant_method": "exl7"})
    refused(file, "'exl7' is not svdquant", inspected=False)
    change_record(file, quantization_config={"quant_method": "svdquant"}, format_version=2)
    refused(file, "newer than 1.*upgrade svdquant")
    change_record(file, format_version="one")
    refused(file, "record is damaged")
    change_record(file, format_version=1, model_class="FluxTransformer9DModel")
    refused(file, "diffusers has no model 'FluxTransformer9DModel'", inspected=False)
    change_record(file, library="elsewhere")
    refused(file, "model=", inspected=False)
    rewrite(file, lambda header: header["__metadata__"].update(svdquant="{"))
    refused(file, "record is damaged")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quant_method": "awq"}, "'awq' is not svdquant"),
        ({"format_version": 7}, "newer"),
        ({"format_version": None}, "format_version"),
        ({"weights": "int3"}, "weights='int3'"),
        ({"layers": None}, "names no layers"),
        ({"layers": {LAYER: {"kind": "svdquant", "weights": "int3"}}}, r"to_q cannot be read"),
        ({"layers": {LAYER: {"kind": "other"}}}, r"to_q cannot be read"),
        ({"layers": {LAYER: "int4"}}, r"to_q cannot be read"),
        ({"layers": {"no.such": {"kind": "w4a16"}}}, r"no\.such"),
    ],
)
def test_folder_config(folder, fields, message):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= fields
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, message, inspected=False)


def test_config_is_no_json(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(SVDQuantError, match=r"config\.json: is not valid JSON"):
        svdquant.load_model(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(SVDQuantError, match=r"config\.json: holds no JSON object"):
        inspect(folder)


def test_unquantized_folder(tmp_path):
    tiny.transformer().save_pretrained(tmp_path)
    refused(tmp_path, "unquantized FluxTransformer2DModel; quantize it first", inspected=False)


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{LAYER}.wscales"), r"to_q\.wscales is missing"),
        (lambda t: t.pop("proj_out.bias"), r"proj_out\.bias is missing"),
        (lambda t: t.update({"stray": torch.zeros(2)}), "stray belongs to no layer"),
        (lambda t: t.update({f"{LAYER}.proj_down": torch.zeros(4, 4)}), r"proj_down has the shape \[4, 4\]"),
        (lambda t: t.update({f"{LAYER}.wscales": t[f"{LAYER}.wscales"].double()}), r"wscales has the type F64"),
        (lambda t: t.update({f"{LAYER}.qweight": t[f"{LAYER}.qweight"].view(torch.int8)}), r"qweight has the type I8"),
    ],
)
def test_tensors(request, kind, change, message):
    path = request.getfixturevalue(kind)
    weights = path if kind == "file" else path / "diffusion_pytorch_model.safetensors"
    _, metadata = read_header(weights)
    tensors = load_file(weights)
    change(tensors)
    save_file(tensors, weights, metadata)
    refused(path, message, inspected=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("encoder.block.0.layer.0.SelfAttention.q.qweight"), r"q\.qweight is missing"),
        (lambda t: t.pop("encoder.final_layer_norm.weight"), r"final_layer_norm\.weight is missing"),
        (lambda t: t.update({"stray": torch.zeros(2)}), "stray belongs to no layer"),
    ],
)
def test_tensors_of_a_text_encoder(tmp_path, change, message):
    encoder = tiny.t5(width=128)
    svdquant.quantize(encoder, tiny.config())
    path = svdquant.save_model(encoder, tmp_path / "t5.safetensors")
    _, metadata = read_header(path)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata)
    refused(path, message, inspected=False)


def test_types(original):
    with pytest.raises(SVDQuantError, match="torch_dtype"):
        svdquant.load_model(original, torch_dtype=torch.float8_e4m3fn)


def test_shards(model, tmp_path):
    folder = tmp_path / "sharded"
    model.save_pretrained(folder, max_shard_size="300KB")
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    content = json.loads(index.read_text())

    def with_map(**changes):
        index.write_text(json.dumps(content | {"weight_map": content["weight_map"] | changes}))

    with_map(x=next(iter(content["weight_map"].values())))
    with pytest.raises(SVDQuantError, match="lacks tensor x"):
        svdquant.load_model(folder)
    with_map(x="../elsewhere.safetensors")
    with pytest.raises(SVDQuantError, match="not in that folder"):
        svdquant.load_model(folder)
    index.write_text(json.dumps({}))
    with pytest.raises(SVDQuantError, match="no weight_map"):
        svdquant.load_model(folder)
    with_map()
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(SVDQuantError, match=f"{shard.name}: is truncated"):
        svdquant.load_model(folder)
    shard.unlink()
    with pytest.raises(SVDQuantError, match=shard.name):
        inspect(folder)


def test_no_permission(file, folder, monkeypatch):
    file.chmod(0)
    folder.chmod(0)
    try:
        if os.access(file, os.R_OK):
            # root may read everything, so the system's answer is played.
            from pathlib import Path

            def forbidden(*_args, **_kwargs):
                raise PermissionError(13, "Permission denied")

            monkeypatch.setattr(Path, "open", forbidden)
            monkeypatch.setattr(Path, "iterdir", forbidden)
        refused(file, "Permission denied.*permissions")
        refused(folder, "Permission denied.*permissions")
    finally:
        monkeypatch.undo()
        folder.chmod(0o755)
