"""What the verbs say about 16 bits and memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_tools import QUICK


def test_plan_says_what_stays_and_what_memory_it_takes(command: Callable, source: Path) -> None:
    shown = command("plan", "FluxTransformer2DModel", "--data-free").out
    assert "0.5 % of the model's bytes stay in 16 bits" in shown and "stayed in 16 bits" not in shown
    # What published checkpoints of FLUX.1 take.
    assert "memory: 6.2" in shown and " GiB of weights, and up to " in shown and "4,608 tokens" in shown
    assert "norm_out.linear.weight" in command("plan", source, "--rank", 16, "--leftovers").out
    every = command("plan", source, "--rank", 16, "--skip", "transformer_blocks.0", "--all").out
    assert "skipped by the configuration ('transformer_blocks.0')" in every


def test_plan_hints(command: Callable, source: Path) -> None:
    """A mixture of experts, whose weights are in no linear; a flag that leaves out half of the model."""
    shown = command("plan", "NucleusMoEImageTransformer2DModel", "--data-free").out
    assert "stacked weights, of no linear (transformer_blocks.{3-22}.img_mlp.experts.gate_up_proj ×20 and 20" in shown
    skipped = command("plan", source, "--rank", 16, "--skip", "single_transformer_blocks").out.splitlines()[-1]
    assert "% skipped by the configuration ('single_transformer_blocks') (single_transformer_blocks.0.proj_o" in skipped


def test_plan_json(command: Callable, source: Path) -> None:
    def made(*flags: Any) -> dict[str, Any]:
        return json.loads(command("plan", source, "--rank", 16, "--json", *flags).out)

    plan, longer, data_free = made(), made("--tokens", 9000), made("--data-free")
    left, memory = plan["leftovers"], plan["memory"]
    assert left["total"] == left["bytes"] + left["quantized"] == plan["bytes_before"] == memory["sixteen_bit"]
    assert left["bytes"] == sum(line["bytes"] for line in left["lines"]) and left["hint"]
    assert memory["weights"] == plan["bytes_after"] and memory["tokens"] == 4608
    assert longer["memory"]["multiplying"]["cpu"] > memory["multiplying"]["cpu"]
    assert data_free["memory"]["weights"] < memory["weights"]
    assert data_free["memory"]["solving"] < memory["solving"]
    assert command("plan", source, "--tokens", 0).code == 2


def test_quantize_reports_what_stayed(command: Callable, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = command("quantize", source, "-o", out, *QUICK, "--data-free", "--skip", "proj_mlp").out
    assert "in 16 bits  " in done and "skipped by the configuration ('proj_mlp')" in done
    text = (out / "svdquant_report.txt").read_text()
    assert "single_transformer_blocks.0.proj_mlp.weight" in text and "of quantized layers: " in text
    saved = json.loads((out / "svdquant_report.json").read_text())["leftovers"]
    again = command("quantize", source, "-o", out, *QUICK, "--data-free", "--json", "--overwrite").out
    shorter = json.loads(again)["leftovers"]
    assert shorter["bytes"] < sum(entry["bytes"] for entry in saved["entries"])
    assert shorter["total"] == saved["quantized"] + sum(entry["bytes"] for entry in saved["entries"])


@pytest.mark.parametrize("flag", [(), ("--leftovers",)])
def test_inspect(command: Callable, quantized: Path, flag: tuple[str, ...]) -> None:
    shown = command("inspect", quantized, *flag).out
    assert "in 16 bits  " in shown and "of the bytes that the 16-bit model had" in shown
    assert ("stayed in 16 bits" in shown) == bool(flag)
    left = json.loads(command("inspect", quantized, "--json").out)["leftovers"]
    report = json.loads((quantized / "svdquant_report.json").read_text())["leftovers"]
    assert left["bytes"] == sum(entry["bytes"] for entry in report["entries"])
    assert (left["quantized"], left["stored"]) == (report["quantized"], report["stored"])


def test_inspect_of_a_16_bit_model(command: Callable, source: Path) -> None:
    assert "in 16 bits" not in command("inspect", source, "--leftovers").out
    assert json.loads(command("inspect", source, "--json").out)["leftovers"] is None
