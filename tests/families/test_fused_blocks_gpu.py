"""FLUX.2's, Qwen-Image's, Z-Image's and SD3.5's blocks by a GPU's kernels: together equals apart."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fused_cases import Case, cast, error, needs_interpreter, plain, tensors
from torch import nn

from svdquant.families import fused

pytestmark = needs_interpreter
HEADS, PLAIN, GELU = ("multiply", (3, False, True)), ("multiply", (1, False, False)), ("multiply", (1, True, False))
BOTH_HALVES = ("multiply", (2, False, False))
NORM, NONE, SWIGLU = (("quantize", (kind, False)) for kind in ("layer_norm", "none", "swiglu"))
JOINED = ("quantize", ("none", True))
WITH_GELU = [NORM, HEADS, NONE, PLAIN, NORM, GELU, NONE, PLAIN]
WITH_SWIGLU = [NORM, HEADS, NONE, PLAIN, NORM, BOTH_HALVES, SWIGLU, PLAIN]
# Pipeline, block, launches.
BLOCKS: dict[str, list[tuple[str, list[Any]]]] = {
    "flux2_klein": [
        ("transformer_blocks.0", WITH_SWIGLU * 2),
        ("single_transformer_blocks.0", [NORM, HEADS, JOINED, PLAIN]),
    ],
    "qwen_image": [("transformer_blocks.0", WITH_GELU * 2)],
    "z_image": [("layers.0", [NONE, HEADS, NONE, PLAIN, NONE, BOTH_HALVES, SWIGLU, PLAIN])],
    # The second has no more use for the text.
    "sd35_large": [("transformer_blocks.0", WITH_GELU * 2), ("transformer_blocks.1", [*WITH_GELU, NORM, HEADS])],
    "sd35_medium": [("transformer_blocks.0", WITH_GELU * 2 + [NORM, HEADS, NONE, PLAIN])],
}


@pytest.fixture(scope="module", params=BLOCKS)
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    yield Case(request.param, set())


@pytest.fixture
def blocks(case, monkeypatch) -> list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Any]]]:
    """(block in float16, what it reads, what it is expected to launch)."""
    found = []
    for name, kernels in BLOCKS[case.name]:
        block = case.quantized.get_submodule(name)
        args, options = cast(case.read_by(case.quantized, block), torch.float16)
        block = copy.deepcopy(block).half()
        fused.install(block)
        found.append((block, args, options, kernels))
    monkeypatch.setenv("SVDQUANT_BACKEND", "triton")
    return found


def run(block: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([y.flatten() for y in tensors(block(*args, **options))])


def test_together_and_apart(blocks, replaced, launched):
    for block, args, options, kernels in blocks:
        launched.clear()
        together = run(block, args, options)
        assert sorted(map(str, launched)) == sorted(map(str, kernels))
        # Codes next to each other where an input was rounded once more.
        assert error(together, run(plain(block), args, options)) < 1e-2


# The other families are these kernels in another order; the interpreter takes seconds for each.
@pytest.mark.parametrize("case", ["flux2_klein", "qwen_image"], indirect=True)
def test_by_the_kernels(blocks, launched, monkeypatch):
    """Compiled without a break, and launched directly; beside the stored numbers, whose 8-bit copies differ by 1 %."""
    block, args, options, kernels = blocks[-1]
    directly = run(block, args, options)
    assert sorted(map(str, launched)) == sorted(map(str, kernels))
    with monkeypatch.context() as patch:
        patch.setenv("SVDQUANT_BACKEND", "reference")
        assert error(directly, run(plain(block), args, options)) < 1e-2
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert error(run(compiled, args, options), directly) < 2e-3
    torch._dynamo.reset()


def test_hooks(blocks, replaced, launched):
    """What somebody looks at is computed by itself."""
    for block, args, options, _ in blocks:
        attn = block.attn if hasattr(block, "attn") else block.attention
        expected, seen = run(block, args, options), []
        watched = [attn, attn.norm_q, attn.to_q if hasattr(attn, "to_q") else attn.to_qkv_mlp_proj]
        for module in watched:
            module.register_forward_hook(lambda m, *_, seen=seen: seen.append(m))
        launched.clear()
        assert error(run(block, args, options), expected) < 1e-2
        assert {id(m) for m in seen} == {id(m) for m in watched}
