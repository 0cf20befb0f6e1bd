"""Adapters on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_tools import SMALL
from PIL import Image
from safetensors.torch import save_file


@pytest.fixture
def adapters(tmp_path: Path) -> tuple[Path, Path]:
    files = []
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        state = {}
        for name in ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_v", "x_embedder"):
            k = 4 if name == "x_embedder" else 128
            state[f"transformer.{name}.lora_A.weight"] = torch.randn(2 * seed, k, generator=generator)
            state[f"transformer.{name}.lora_B.weight"] = torch.randn(128, 2 * seed, generator=generator)
        files.append(tmp_path / f"style-{seed}.v1.safetensors")
        save_file(state, files[-1])
    return files[0], files[1]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_generate_with_adapters(
    command: Callable, quantized: Path, adapters: tuple[Path, Path], tmp_path: Path
) -> None:
    one, two = adapters

    def draw(name: str, *flags: object) -> np.ndarray:
        done = command("generate", quantized, "a cat", "-o", tmp_path / name, *SMALL, *flags)
        assert done.code == 0, done.err
        return pixels(tmp_path / name)

    plain = draw("plain.png")
    first = draw("first.png", "--lora", one)
    both = draw("both.png", "--lora", f"{one}:0.5", "--lora", f"{two}:-1")
    pictures = [plain, first, both]
    assert all(np.abs(a - b).max() > 2 for i, a in enumerate(pictures) for b in pictures[:i])
    assert np.array_equal(draw("none.png", "--lora", f"{one}:0"), plain)
    assert np.array_equal(draw("again.png", "--lora", f"{one}:1.0"), first)


def test_generate_with_what_is_no_adapter(
    command: Callable, quantized: Path, adapters: tuple[Path, Path], tmp_path: Path
) -> None:
    def refusal(adapter: object) -> str:
        return command("generate", quantized, "a cat", *SMALL, "-o", tmp_path / "a.png", "--lora", adapter).refusal()

    assert "nowhere.safetensors" in refusal(tmp_path / "nowhere.safetensors")
    save_file({"something.weight": torch.ones(3)}, tmp_path / "other.safetensors")
    assert "is no adapter that can be loaded" in refusal(tmp_path / "other.safetensors")
    foreign = {f"transformer.no.such.lora_{half}.weight": torch.ones(4, 4) for half in "AB"}
    save_file(foreign, tmp_path / "foreign.safetensors")
    assert "none of its 2 tensors" in refusal(tmp_path / "foreign.safetensors")
    (tmp_path / "a.bin").write_bytes(b"x")
    assert "pickle" in refusal(tmp_path / "a.bin")


def test_an_adapter_that_is_not_there(command: Callable, quantized: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Said before the model is loaded, and without asking the Hub."""
    monkeypatch.setattr("svdquant.integrations.pipeline.load_pipeline", lambda *a, **k: pytest.fail("loaded"))
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(b"\x80" + bytes(20))
    for name, said in (("nothing.safetensors", "does not exist"), ("no/such/folder", "does not exist"), (cut, "cut")):
        out = tmp_path / "p.png"
        assert said in command("generate", quantized, "a cat", "-o", out, *SMALL, "--lora", f"{name}:0.5").refusal()
        assert said in command("lora", "merge", quantized, "--lora", name, "-o", tmp_path / "merged").refusal()
        assert not out.exists() and not (tmp_path / "merged").exists()


def test_inspect(command: Callable, adapters: tuple[Path, Path], tmp_path: Path) -> None:
    done = command("lora", "inspect", adapters[1])
    assert done.code == 0 and "format    PEFT" in done.out and "rank      4 (×3)" in done.out
    kohya = {}
    for i, name in enumerate(("double_blocks_0_img_attn_qkv", "single_blocks_1_linear2")):
        kohya[f"lora_unet_{name}.lora_down.weight"] = torch.ones(4 + i, 8)
        kohya[f"lora_unet_{name}.lora_up.weight"] = torch.ones(16, 4 + i)
        kohya[f"lora_unet_{name}.alpha"] = torch.tensor(2.0)
        kohya[f"lora_te1_text_model_{name}.lora_down.weight"] = torch.ones(4 + i, 8)
        kohya[f"lora_te1_text_model_{name}.lora_up.weight"] = torch.ones(16, 4 + i)
    kohya["lora_unet_img_in.diff_b"] = torch.ones(3)
    save_file(kohya, tmp_path / "kohya.safetensors", metadata={"ss_network_module": "networks.lora_flux"})
    info = json.loads(command("lora", "inspect", tmp_path / "kohya.safetensors", "--json").out)
    assert info["kind"] == "kohya" and info["modules"] == 4 and info["parts"] == {"denoiser": 2, "text encoder": 2}
    assert info["ranks"] == {"4": 2, "5": 2} and info["alphas"] == {"2": 2} and info["extras"] == {"diff_b": 1}
    assert info["metadata"] == {"ss_network_module": "networks.lora_flux"}
    loha = {f"lycoris_a.hada_w{i}_{h}": torch.ones(3, 3) for i in (1, 2) for h in "ab"}
    save_file(loha, tmp_path / "loha.safetensors")
    info = json.loads(command("lora", "inspect", tmp_path / "loha.safetensors", "--json").out)
    assert info["kind"] == "LoHa" and info["modules"] == 1 and info["ranks"] == {"3": 1}
    for kind, group, ranks, extras in (
        ("GLoRA", {"a1.weight": (9, 2), "a2.weight": (2, 9), "b1.weight": (8, 2), "b2.weight": (2, 9)}, {"2": 1}, {}),
        ("OFT", {"oft_blocks": (2, 4, 4), "rescale": (8, 1), "alpha": ()}, {}, {"rescale": 1}),
        ("OFT", {"oft_R.weight": (2, 6)}, {}, {}),
        ("(IA)³", {"weight": (8,), "on_input": ()}, {}, {}),
        ("difference", {"diff": (8, 9), "diff_b": (8,)}, {}, {"diff_b": 1}),
    ):
        state = {f"lycoris_{name}.{leaf}": torch.ones(shape) for name in "ab" for leaf, shape in group.items()}
        save_file(state, tmp_path / "kind.safetensors")
        info = json.loads(command("lora", "inspect", tmp_path / "kind.safetensors", "--json").out)
        assert (info["kind"], info["modules"]) == (kind, 2)
        assert info["ranks"] == {rank: 2 * n for rank, n in ranks.items()}
        assert info["extras"] == {leaf: 2 * n for leaf, n in extras.items()}


def test_inspect_what_is_no_adapter(command: Callable, tmp_path: Path) -> None:
    assert "is no file" in command("lora", "inspect", tmp_path).refusal()
    save_file({"weight": torch.ones(3)}, tmp_path / "model.safetensors")
    assert "holds no adapter" in command("lora", "inspect", tmp_path / "model.safetensors").refusal()
    (tmp_path / "text.safetensors").write_text("hello")
    assert "download it again" in command("lora", "inspect", tmp_path / "text.safetensors").refusal()


def test_merge(command: Callable, quantized: Path, source: Path, adapters: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "merged"
    done = command("lora", "merge", quantized, "--lora", f"{adapters[0]}:0.5", "-o", out)
    assert done.code == 0, done.err
    assert "solved   2 layers again: weight error" in done.out and "added    to 1 layers in 16 bits" in done.out
    again = ("lora", "merge", quantized, "--lora", f"{adapters[0]}:0.5", "-o", out)
    assert "exists already" in command(*again).refusal()
    info = json.loads(command(*again, "--overwrite", "--grow", "--json").out)
    assert info["grown"] and info["errors"] == {} and info["adapters"] == {str(adapters[0]): 0.5}
    picture = tmp_path / "merged.png"
    assert command("generate", out, "a cat", "-o", picture, *SMALL, "--base", source).code == 0
    with_adapter = tmp_path / "adapter.png"
    command("generate", quantized, "a cat", "-o", with_adapter, *SMALL, "--lora", f"{adapters[0]}:0.5")
    plain = tmp_path / "plain.png"
    command("generate", quantized, "a cat", "-o", plain, *SMALL)
    difference = np.abs(pixels(picture) - pixels(with_adapter)).mean()
    assert difference < 0.3 * np.abs(pixels(plain) - pixels(with_adapter)).mean()
