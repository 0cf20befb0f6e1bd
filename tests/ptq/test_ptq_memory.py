"""The estimates of `svdquant plan`: bytes exactly as stored, peaks counted from shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import tiny
import torch
from diffusers import SanaTransformer2DModel
from torch import nn

import svdquant
from svdquant.nn import quantized_layers
from svdquant.ptq import make_plan
from svdquant.ptq.memory import Memory, estimate


class Block(nn.Module):
    """Widths that no group divides, as SANA's 5600 (a multiple of 32), and a buffer."""

    def __init__(self, k: int, n: int) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(k, n), nn.GELU(), nn.Linear(n, k, bias=False)
        self.register_buffer("table", torch.zeros(7, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.act(self.up(x)))


class Odd(nn.Module):
    def __init__(self, k: int = 72, n: int = 5600) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(k, n) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def sana() -> SanaTransformer2DModel:
    return SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=5,
        attention_head_dim=32,
        num_cross_attention_heads=2,
        cross_attention_head_dim=80,
        cross_attention_dim=160,
        caption_channels=32,
        mlp_ratio=2.5,
        sample_size=8,
    )


def random_rows(model: Any) -> torch.Tensor:
    return model(torch.randn(1, 40, 72).bfloat16())


def picture(model: Any) -> torch.Tensor:
    make = {"dtype": model.dtype, "generator": torch.Generator().manual_seed(0)}
    return model(
        hidden_states=torch.randn(1, 4, 8, 8, **make),
        encoder_hidden_states=torch.randn(1, 8, 32, **make),
        timestep=torch.ones(1, dtype=model.dtype),
    )[0]


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], Any]]] = {
    "flux": (lambda: tiny.transformer(), lambda m: tiny.run(m)),
    "sana": (sana, picture),
    "5600": (Odd, random_rows),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("weights", ["int4", "nvfp4", "int8"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_weights_are_estimated_to_the_byte(name: str, weights: str, calibrated: bool) -> None:
    make, run = CASES[name]
    torch.manual_seed(0)
    model = make().to(torch.bfloat16).eval()
    config = tiny.config(weights=weights, rotate=False, smooth=2, gptq=False, calibration_rows=32)
    found = estimate(model, make_plan(model, config, run if calibrated else None), config, calibrated)
    before = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    svdquant.quantize(model, config, run if calibrated else None)
    held = sum(p.nbytes for layer in quantized_layers(model).values() for p in layer.parameters())
    assert found.sixteen_bit == before and found.quantized == held > 0
    assert found.weights == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert found.buffers == sum(t.nbytes for t in model.buffers())


def of(k: int, n: int, tokens: int = 1000, **config: Any) -> Memory:
    model = Odd(k, n).to(torch.bfloat16)
    settings = tiny.config(**({"rank": 16} | config))
    return estimate(model, make_plan(model, settings, traces={}), settings, tokens=tokens)


def test_multiplying() -> None:
    """Against the sums written out: input, output, codes with a scale and the branch, on a GPU the 8-bit weights."""
    k, n, tokens = 128, 512, 1000
    found = of(k, n, tokens, rotate=False)
    ends = tokens * (k + n) * 2
    # `down` reads more columns, so it has more codes; both read and write as many bytes.
    assert found.multiplying_layer == {"cpu": "blocks.0.down", "gpu": "blocks.0.down"}
    assert found.multiplying["gpu"] == ends + tokens * (n + 4 + 4 * 16) + k * (n + 4)
    assert found.multiplying["cpu"] == ends + tokens * (n + 4 + 4 * 8 + 4 * 16)
    assert found.drawing("cpu") == found.weights + found.multiplying["cpu"]
    # An 8-bit weight is multiplied as it is.
    assert of(k, n, tokens, weights="int8").multiplying["gpu"] == ends + tokens * (n + 4 + 4 * 16)
    # A CPU cuts long inputs.
    assert of(k, n, 10**6).multiplying["cpu"] == 10**6 * (k + n) * 2 + (32 << 20)


def test_solving() -> None:
    k, n = 128, 512
    data_free = estimate(
        model := Odd(k, n).to(torch.bfloat16), plan := make_plan(model, tiny.config(), traces={}), tiny.config(), False
    )
    assert data_free.solving == (18 + 28) * k * n
    many = tiny.config(calibration_rows=10**5)
    # The layer of more inputs: its rows, and a Hessian of 512².
    assert estimate(model, plan, many).solving == 18 * k * n + 14 * 10**5 * n + max(28 * k * n, 30 * n * n)
    assert estimate(model, plan, many).solving_group == "blocks.0.down"
    assert asdict(data_free)["solving_group"] == data_free.solving_group
