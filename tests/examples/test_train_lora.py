"""Training a style on the embedded model and drawing with it on the 4-bit one, for a few steps."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_train_lora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    module = importlib.import_module("train_lora")
    monkeypatch.setattr(module, "examples", _few(module.examples))
    arguments = ["--steps", "2", "--batch", "2", "--prompts", "1", "--rank", "4", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["train_lora.py", *arguments])
    module.main()
    state = load_file(tmp_path / "upside_down.safetensors")
    assert "transformer.x_embedder.lora_A.weight" in state
    assert state["transformer.transformer_blocks.0.norm1.linear.lora_B.weight"].shape[1] == 4
    assert Image.open(tmp_path / "lora.png").width > 5 * 192
    assert capsys.readouterr().out.count("of 1 pictures upside down") == 5


def _few(examples):
    """Pictures of a few scenes instead of hundreds."""
    return lambda pipe, count, seed: examples(pipe, 8, seed)
