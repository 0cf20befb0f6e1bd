"""Whatever a user gets wrong: exit code 2, one sentence on stderr, and nothing half-written."""

from __future__ import annotations

import errno
import json
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from cli_tools import QUICK, SMALL
from PIL import Image
from safetensors.torch import load_file, save_file

WEIGHTS = Path("transformer") / "diffusion_pytorch_model.safetensors"


def quantize(command: Callable, model: Path, out: Path, *more: object) -> str:
    """The refusal of `quantize`, after which there is no output."""
    sentence = command("quantize", model, "-o", out, "--rank", 16, *(more or ("--data-free",))).refusal()
    assert not out.exists()
    return sentence


def generate(command: Callable, model: Path, out: Path, *more: object) -> str:
    sentence = command("generate", model, "a cat", "-o", out, *SMALL, *more).refusal()
    assert not out.exists()
    return sentence


def change_tensor(folder: Path, part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> str:
    """Rewrites the first tensor whose name contains `part`; returns its name."""
    tensors = load_file(folder / WEIGHTS)
    name = next(name for name in tensors if part in name)
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return name


def with_nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor.view(-1)[3] = float("nan")
    return tensor


@pytest.mark.parametrize("verb", ["plan", "quantize", "generate", "inspect"])
def test_missing_path(command: Callable, tmp_path: Path, verb: str) -> None:
    more = {"quantize": ["-o", tmp_path / "out"], "generate": ["a cat", "-o", tmp_path / "out.png"]}
    sentence = command(verb, tmp_path / "none", *more.get(verb, [])).refusal()
    assert str(tmp_path / "none") in sentence and "does not exist" in sentence
    assert list(tmp_path.iterdir()) == []


def test_truncated_file(command: Callable, source: Path, quantized: Path, copy_of: Callable, tmp_path: Path) -> None:
    dense, packed = copy_of(source), copy_of(quantized)
    for folder in (dense, packed):
        data = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(data[: len(data) // 2])
    for sentence in (
        quantize(command, dense, tmp_path / "out"),
        generate(command, packed, tmp_path / "cat.png"),
        command("inspect", packed).refusal(),
    ):
        assert "truncated" in sentence and WEIGHTS.name in sentence


@pytest.mark.parametrize("header", [b"{" * 64, b'{"a": {"dtype": "BF16"}}' + b" " * 40], ids=["no-json", "no-entry"])
def test_corrupted_header(
    command: Callable, source: Path, quantized: Path, copy_of: Callable, tmp_path: Path, header: bytes
) -> None:
    dense, packed = copy_of(source), copy_of(quantized)
    for folder in (dense, packed):
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header)
    assert "header is damaged" in quantize(command, dense, tmp_path / "out")
    assert "header is damaged" in generate(command, packed, tmp_path / "cat.png")
    assert "header is damaged" in command("inspect", packed).refusal()


def test_wrong_tensor_shape(
    command: Callable, source: Path, quantized: Path, copy_of: Callable, tmp_path: Path
) -> None:
    dense, packed = copy_of(source), copy_of(quantized)
    name = change_tensor(dense, "attn.to_q.weight", lambda t: t[:64])
    sentence = quantize(command, dense, tmp_path / "out")
    assert name in sentence and "shape" in sentence
    name = change_tensor(packed, "attn.to_q.qweight", lambda t: t[:, :32])
    sentence = generate(command, packed, tmp_path / "cat.png")
    assert name in sentence and "shape" in sentence


def test_newer_format_version(command: Callable, quantized: Path, copy_of: Callable, tmp_path: Path) -> None:
    packed = copy_of(quantized)
    file = packed / "transformer" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["format_version"] = 99
    file.write_text(json.dumps(config))
    for sentence in (generate(command, packed, tmp_path / "cat.png"), command("inspect", packed).refusal()):
        assert "99 is newer" in sentence and "upgrade svdquant" in sentence


def test_nan_in_weights(command: Callable, source: Path, copy_of: Callable, tmp_path: Path) -> None:
    dense = copy_of(source)
    name = change_tensor(dense, "ff.net.2.weight", with_nan)
    sentence = quantize(command, dense, tmp_path / "out")
    assert name in sentence and "NaN" in sentence


def test_rank_above_the_layer(command: Callable, source: Path, tmp_path: Path) -> None:
    for sentence in (
        command("plan", source, "--rank", 200).refusal(),
        quantize(command, source, tmp_path / "out", "--data-free", "--rank", 200),
    ):
        assert "rank 200 exceeds" in sentence and "--rank 128" in sentence
    assert list(tmp_path.iterdir()) == []
    assert "rank=300" in command("plan", source, "--rank", 300).refusal()


def test_calibration_that_reaches_no_layer(
    command: Callable, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("svdquant.integrations.calibration.draw_to_calibrate", lambda *_: [])
    sentence = quantize(command, source, tmp_path / "out", "--prompt", "a cat", *SMALL)
    assert "calibration never reached transformer_blocks.0" in sentence


@pytest.mark.parametrize("verb", ["plan", "quantize", "generate"])
def test_unknown_dtype(command: Callable, source: Path, tmp_path: Path, verb: str) -> None:
    more = {"quantize": ["-o", tmp_path / "out"], "generate": ["a cat", "-o", tmp_path / "out.png"]}
    assert "'float12' is not one of" in command(verb, source, "--dtype", "float12", *more.get(verb, [])).refusal()
    assert list(tmp_path.iterdir()) == []


def test_pickle(command: Callable, source: Path, copy_of: Callable, tmp_path: Path) -> None:
    file = tmp_path / "model.ckpt"
    torch.save({}, file)
    assert "pickle" in quantize(command, file, tmp_path / "out")
    assert "pickle" in generate(command, file, tmp_path / "cat.png")
    assert "pickle" in command("inspect", file).refusal()
    dense = copy_of(source)
    (dense / WEIGHTS).unlink()
    torch.save({}, dense / "transformer" / "diffusion_pytorch_model.bin")
    assert "pickle" in quantize(command, dense, tmp_path / "out")


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 16 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk(command: Callable, source: Path, quantized: Path, tiny_disk: Path) -> None:
    assert "of disk" in quantize(command, source, tiny_disk / "out")
    size = ("--height", 128, "--width", 128)
    sentence = generate(command, quantized, tiny_disk / "cat.png", *size)
    assert "No space left on device" in sentence
    assert list(tiny_disk.iterdir()) == []


def test_disk_that_fills_up(
    command: Callable, source: Path, quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: object, **_kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    assert "No space left on device" in generate(command, quantized, tmp_path / "cat.png")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("svdquant.ptq.stream.save_file", full)
    assert "No space left on device" in quantize(command, source, tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "int3"], "weights='int3'"),
        (["--activations", "int2"], "activations='int2'"),
        (["--modulation", "int8"], "modulation='int8'"),
        (["--group-size", "63"], "group_size=63"),
        (["--skip", "nothing.like.it"], "matches no linear"),
        (["--override", "*.ff.*"], "--override"),
        (["--override", "*.ff.*={rank}"], "--override"),
        (["--override", '*.ff.*={"bits": 3}'], "unknown fields: bits"),
        (["--rank", "many"], "--rank"),
        (["--no-such-flag"], "No such option"),
        (["--smooth-grid", "0"], "smooth-grid"),
    ],
)
def test_flags_of_plan(command: Callable, source: Path, arguments: list[str], message: str) -> None:
    assert message in command("plan", source, *arguments).refusal()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts", "none.txt"], "none.txt: cannot be read"),
        (["--prompts", __file__ + "/none"], "cannot be read"),
        (["--data-free", "--prompt", "a cat"], "--data-free draws nothing"),
        (["--max-memory", "lots"], "'lots' is no size"),
        (["--device", "abacus"], "device 'abacus' cannot be used"),
        (["--samples", "0"], "--samples"),
        (["--data-free", "--int8-activations-above", "0.1"], "--int8-activations-above needs calibration"),
    ],
)
def test_flags_of_quantize(command: Callable, source: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    assert message in quantize(command, source, tmp_path / "out", *arguments)
    assert list(tmp_path.iterdir()) == []


def test_flags_of_generate(command: Callable, source: Path, quantized: Path, tmp_path: Path) -> None:
    out = tmp_path / "cat.png"
    assert "activations='int2'" in generate(command, quantized, out, "--activations", "int2")
    assert "no quantized layers" in generate(command, source, out, "--activations", "int4")
    assert "--base" in generate(command, quantized / "transformer", out)
    (tmp_path / "notes.txt").write_text("")
    assert "is a file" in command("generate", quantized, "a cat", "-o", tmp_path / "notes.txt").refusal()
    below = tmp_path / "notes.txt" / "cat.png"
    assert str(below.parent) in command("generate", quantized, "a cat", "-o", below, *SMALL).refusal()


def test_the_other_model_is_looked_for_before_drawing(
    command: Callable, quantized: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("svdquant.integrations.pipeline.draw", lambda *_: pytest.fail("drawn"))
    sentence = generate(command, quantized, tmp_path / "cat.png", "--compare", tmp_path / "nope")
    assert "nope: does not exist" in sentence
    assert "--base" in generate(command, quantized, tmp_path / "cat.png", "--compare", source / "transformer")


def test_what_is_no_model_cannot_be_planned(command: Callable, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    assert "is not a model" in command("plan", tmp_path / "notes.txt").refusal()


def test_no_prompt_in_the_file(command: Callable, source: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    for name, message in (("empty.txt", "holds no prompt"), ("binary.txt", "no UTF-8")):
        assert message in quantize(command, source, tmp_path / "out", *QUICK, "--prompts", tmp_path / name)


def test_quantizing_twice(command: Callable, quantized: Path, tmp_path: Path) -> None:
    assert "is quantized already" in quantize(command, quantized, tmp_path / "out")


def test_demo_into_a_file(command: Callable, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "is a file" in command("demo", "-o", tmp_path / "file").refusal()


def test_demo_next_to_folders_of_someone_else(command: Callable, tmp_path: Path) -> None:
    (tmp_path / "w8").mkdir()
    (tmp_path / "w8" / "thesis.txt").write_text("")
    assert "w8: was not made by this demo" in command("demo", "-o", tmp_path).refusal()
    assert [f.name for f in tmp_path.rglob("*")] == ["w8", "thesis.txt"]


def test_unknown_verb(command: Callable) -> None:
    assert "No such command 'quantise'" in command("quantise").refusal()
    assert "Missing argument" in command("plan").refusal()
