"""First-block caching: which blocks run, and what the pictures are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import standins
import tiny
import torch
from torch import nn

from svdquant import SVDQuantError
from svdquant.nunchaku.caching.diffusers_adapters import apply_cache_on_pipe, apply_cache_on_transformer, flux, sana

STEPS = 5
Counts = dict[str, int]


def flux_pipeline(layers: int = 3, single_layers: int = 3) -> Any:
    return tiny.flux_pipeline(transformer=tiny.transformer(layers=layers, single_layers=single_layers))


def counted(model: nn.Module) -> Counts:
    """How often each block's own computation runs; hooks of the cache go around it."""
    counts: Counts = {}

    def count(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            counts[name] = counts.get(name, 0) + 1

        return hook

    for stack in ("transformer_blocks", "single_transformer_blocks"):
        for i, block in enumerate(getattr(model, stack, ())):
            norm = block.norm1 if hasattr(block, "norm1") else block.norm
            norm.register_forward_hook(count(f"{'s' if 'single' in stack else 'd'}{i}"))
    return counts


def drawn(pipe: Any, prompt: str = "a cat", **options: Any) -> np.ndarray:
    return tiny.draw(pipe, prompt, num_inference_steps=STEPS, **options)


def test_huge_threshold_runs_the_rest_once() -> None:
    pipe = flux_pipeline()
    counts = counted(pipe.transformer)
    assert apply_cache_on_pipe(pipe, residual_diff_threshold=1e9) is pipe
    drawn(pipe)
    assert counts == {"d0": STEPS, "d1": 1, "d2": 1, "s0": 1, "s1": 1, "s2": 1}
    counts.clear()
    drawn(pipe)
    assert counts["d0"] == STEPS and counts["s2"] == 1, "the second drawing must begin afresh"


def test_second_drawing_is_the_first() -> None:
    pipe = flux_pipeline()
    apply_cache_on_pipe(pipe, residual_diff_threshold=1e9)
    first = drawn(pipe)
    other = drawn(pipe, "something else entirely")
    assert (drawn(pipe) == first).all() and (other != first).any()


def test_aborted_drawing_leaves_nothing_behind() -> None:
    pipe = flux_pipeline()
    apply_cache_on_pipe(pipe, residual_diff_threshold=1e9)
    expected = drawn(pipe)

    def stop(pipe: Any, step: int, *_: Any) -> Any:
        if step == 2:
            raise ZeroDivisionError
        return {}

    with pytest.raises(ZeroDivisionError):
        drawn(pipe, "something else entirely", callback_on_step_end=stop)
    assert (drawn(pipe) == expected).all()
    with pytest.raises(ZeroDivisionError):
        drawn(pipe, callback_on_step_end=stop, height=16, width=16)
    assert (drawn(pipe) == expected).all()


@pytest.mark.parametrize("double", [False, True])
def test_tiny_threshold_is_bit_identical(double: bool) -> None:
    pipe = flux_pipeline()
    counts = counted(pipe.transformer)
    expected = drawn(pipe)
    counts.clear()
    apply_cache_on_pipe(pipe, residual_diff_threshold=1e-9, use_double_fb_cache=double)
    assert (drawn(pipe) == expected).all()
    assert set(counts.values()) == {STEPS}


def test_skipping_changes_the_picture_and_removal_restores_it() -> None:
    pipe = flux_pipeline()
    expected = drawn(pipe)
    apply_cache_on_pipe(pipe, residual_diff_threshold=1e9)
    assert (drawn(pipe) != expected).any()
    assert pipe.transformer.is_cache_enabled
    apply_cache_on_pipe(pipe, residual_diff_threshold=0)
    assert not pipe.transformer.is_cache_enabled
    assert (drawn(pipe) == expected).all()
    apply_cache_on_pipe(pipe, residual_diff_threshold=-1.0)
    assert (drawn(pipe) == expected).all()


def test_second_call_replaces_the_first() -> None:
    pipe = flux_pipeline()
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.5))
    apply_cache_on_pipe(pipe, residual_diff_threshold=1e-9)
    apply_cache_on_pipe(pipe, residual_diff_threshold=1e9)
    counts = counted(pipe.transformer)
    drawn(pipe)
    assert counts["d0"] == STEPS and counts["d1"] == 1


@pytest.mark.parametrize(
    ("multi", "single", "d1", "s0", "s1"),
    [(1e9, 1e9, 1, STEPS, 1), (1e9, 1e-9, 1, STEPS, STEPS), (1e-9, 1e9, STEPS, STEPS, 1), (0, 1e9, STEPS, STEPS, 1)],
)
def test_double_cache_tests_both_stacks(multi: float, single: float, d1: int, s0: int, s1: int) -> None:
    pipe = flux_pipeline()
    counts = counted(pipe.transformer)
    apply_cache_on_pipe(
        pipe, use_double_fb_cache=True, residual_diff_threshold_multi=multi, residual_diff_threshold_single=single
    )
    drawn(pipe)
    assert (counts["d0"], counts["d1"], counts["s0"], counts["s1"]) == (STEPS, d1, s0, s1)
    assert counts["d2"] == d1 and counts["s2"] == s1


def test_what_is_reused_is_the_rest_of_the_last_computed_step() -> None:
    """Two steps by hand: hidden + (last − after the first block), for both streams."""
    model = tiny.transformer(layers=2, single_layers=2)
    apply_cache_on_transformer(model, residual_diff_threshold=1e9)
    first, second = tiny.inputs(model), tiny.inputs(model)
    second["timestep"] = second["timestep"] * 0.5
    seen: list[torch.Tensor] = []
    model.norm_out.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    with torch.no_grad():
        model(**first)
        model(**second)
    plain = tiny.transformer(layers=2, single_layers=2)
    ends: dict[str, Any] = {}
    plain.transformer_blocks[0].register_forward_hook(lambda m, a, out: ends.update(head=out[1]))
    plain.norm_out.register_forward_hook(lambda m, args, out: ends.update(tail=args[0]))
    with torch.no_grad():
        plain(**first)
        rest = ends["tail"] - ends["head"]
        plain(**second)
    torch.testing.assert_close(seen[1], ends["head"] + rest)


@pytest.mark.parametrize("name", ["flux_fill", "flux_control", "flux_kontext"])
def test_pipelines_that_set_no_context(name: str) -> None:
    pipe = standins.PIPELINES[name]()
    arguments: dict[str, Any] = {
        "prompt": "a cat",
        "height": 16,
        "width": 16,
        "num_inference_steps": STEPS,
        "max_sequence_length": 16,
        "output_type": "np",
    }
    image = standins.picture(side=16)
    if name == "flux_fill":
        arguments |= {"image": image, "mask_image": standins.mask(16)}
    elif name == "flux_control":
        arguments |= {"control_image": image}
    else:
        arguments |= {"image": image, "max_area": 256, "_auto_resize": False}

    def draw() -> np.ndarray:
        return pipe(generator=torch.Generator().manual_seed(0), **arguments).images

    expected = draw()
    counts = counted(pipe.transformer)
    flux.apply_cache_on_pipe(pipe, residual_diff_threshold=1e-9)
    assert (draw() == expected).all() and set(counts.values()) == {STEPS}
    flux.apply_cache_on_pipe(pipe, residual_diff_threshold=1e9)
    counts.clear()
    first = draw()
    assert counts == {"d0": STEPS, "d1": 1, "s0": 1, "s1": 1}
    assert (draw() == first).all()


def test_sana_which_has_no_cache_of_its_own() -> None:
    pipe = standins.PIPELINES["sana"]()

    def draw(steps: int = STEPS) -> np.ndarray:
        return pipe(
            "a cat",
            height=32,
            width=32,
            num_inference_steps=steps,
            guidance_scale=2.0,
            max_sequence_length=16,
            complex_human_instruction=None,
            use_resolution_binning=False,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        ).images

    expected = draw()
    counts = counted(pipe.transformer)
    sana.apply_cache_on_pipe(pipe, residual_diff_threshold=1e-9)
    assert (draw() == expected).all() and set(counts.values()) == {STEPS}
    sana.apply_cache_on_pipe(pipe, residual_diff_threshold=1e9)
    for _ in range(2):
        counts.clear()
        draw()
        assert counts == {"d0": STEPS, "d1": 1}
    counts.clear()
    for _ in range(2):
        draw(steps=1)
    assert counts == {"d0": 2, "d1": 2}, "one step each: equal timesteps, but two drawings"
    sana.apply_cache_on_pipe(pipe, residual_diff_threshold=0)
    assert (draw() == expected).all()
    assert "_reset_stateful_cache" not in vars(pipe.transformer)


def test_qwen_keeps_its_two_prompts_apart() -> None:
    pipe = standins.PIPELINES["qwen_image"]()

    def draw() -> np.ndarray:
        return pipe(
            "a cat",
            negative_prompt="a dog",
            true_cfg_scale=4.0,
            height=32,
            width=32,
            num_inference_steps=STEPS,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        ).images

    expected = draw()
    apply_cache_on_pipe(pipe, residual_diff_threshold=1e-9)
    assert (draw() == expected).all()
    blocks: list[int] = []
    pipe.transformer.transformer_blocks[1].attn.register_forward_hook(lambda *_: blocks.append(1))
    apply_cache_on_pipe(pipe, residual_diff_threshold=1e9)
    draw()
    assert len(blocks) == 2, "once with the prompt, once with the negative one"


def test_controlnet_residuals_are_never_added_to_skipped_blocks() -> None:
    model = tiny.transformer(layers=2, single_layers=2)
    arguments = tiny.inputs(model)
    residual = torch.ones(1, 16, 128)
    with torch.no_grad():
        expected = model(**arguments, controlnet_block_samples=[residual, residual])[0]
        apply_cache_on_transformer(model, residual_diff_threshold=1e9)
        model(**arguments)
        for _ in range(2):
            assert torch.equal(model(**arguments, controlnet_block_samples=[residual, residual])[0], expected)


def test_lone_blocks_have_nothing_to_skip() -> None:
    pipe = flux_pipeline(layers=1, single_layers=1)
    expected = drawn(pipe)
    apply_cache_on_pipe(pipe, use_double_fb_cache=True, residual_diff_threshold=1e9)
    assert (drawn(pipe) == expected).all()


def test_models_without_blocks_are_named() -> None:
    with pytest.raises(SVDQuantError, match="StableDiffusionXLPipeline has no transformer"):
        apply_cache_on_pipe(standins.PIPELINES["sdxl"]())
    with pytest.raises(SVDQuantError, match="Linear has no list of transformer blocks"):
        apply_cache_on_transformer(nn.Linear(2, 2))
