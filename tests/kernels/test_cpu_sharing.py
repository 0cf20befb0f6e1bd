"""Layers that read one tensor may quantize it once, as long as nobody can tell.

Every test runs one layer on x, changes something, and runs another on what looks like the same x.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import cpu_truth
import numpy as np
import pytest
import torch
from cpu_truth import BF16, FP16, FP32, check_linear

from svdquant.kernels import svdquant_linear

ROWS, K = 40, 192


@pytest.fixture(params=["int8", "int4"])
def activations(request):
    return request.param


def pair(dtype: torch.dtype = FP32, **options: Any) -> list[Any]:
    """Two layers that quantize an input alike: same smoothing and branch input, other weights."""
    a, b = (cpu_truth.layer(K, 72, dtype=dtype, seed=seed, **options) for seed in (1, 2))
    b.smooth_factor, b.proj_down = a.smooth_factor, a.proj_down
    return [a, b]


def test_the_second_layer_computes_what_the_first_would(path, activations):
    """With and without a neighbour that has just read the same tensor: the same bits."""
    for dtype in (BF16, FP16, FP32):
        for options in ({}, {"rotate": True}, {"unsigned": ((0, K),)}, {"rank": 0}, {"smooth": False}):
            a, b = pair(dtype, **options)
            x = cpu_truth.inputs(ROWS, K, dtype, 1, a.spec.unsigned)
            alone = svdquant_linear(x.clone(), b, activations)
            svdquant_linear(x, a, activations)
            assert torch.equal(svdquant_linear(x, b, activations), alone)
            assert torch.equal(svdquant_linear(x[:], b, activations), alone)
            assert torch.equal(svdquant_linear(x.view(4, -1, K), b, activations).flatten(0, 1), alone)


EDITS: dict[str, Callable[[torch.Tensor], object]] = {
    "add_": lambda x: x.add_(1),
    "copy_": lambda x: x.copy_(x.flip(0)),
    "item": lambda x: x.__setitem__((3, 5), 50.0),
    "slice": lambda x: x[10:20].mul_(-3),
    "one of the last row": lambda x: x[-1, -1:].fill_(77.0),
    "data": lambda x: x.data.add_(1),
    "data, one element": lambda x: x.data[17].__setitem__(100, 60.0),
    "detached": lambda x: x.detach().mul_(2),
    "through numpy": lambda x: np.negative(x.numpy(), out=x.numpy()),
    "numpy, one element": lambda x: x.numpy().__setitem__((0, 0), -40.0),
    "through dlpack": lambda x: torch.from_dlpack(x).add_(1),
    "out of another operation": lambda x: torch.mul(x.clone(), -2, out=x),
    "sign of one": lambda x: x.data[5, 3:4].neg_(),
    "two exchanged": lambda x: x.data[:2].copy_(x.data[:2].flip(0).clone()),
    "other data": lambda x: setattr(x, "data", x.data.flip(0).clone()),
    "set_": lambda x: x.set_(x.detach().flip(1).clone()),
    "zero_": lambda x: x.data.zero_(),
    "nan_to_num_": lambda x: (x.data.div_(0), x.data.nan_to_num_(1, 2, 3)),
    "transposed in place": lambda x: x.data.copy_(x.data.clone().flatten().view(K, ROWS).t()),
}


@pytest.mark.parametrize("name", EDITS, ids=lambda n: n.replace(", ", "-").replace(" ", "-"))
def test_edits_between_two_layers_are_seen(path, name, activations):
    a, b = pair()
    for inference in (False, True):
        with torch.inference_mode(inference):
            x = cpu_truth.inputs(ROWS, K, FP32)
            check_linear(path, x, a, activations)
            EDITS[name](x)
            check_linear(path, x, b, activations, (name, inference))
            check_linear(path, x, a, activations, (name, inference))


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int32)


def _wave(x: torch.Tensor, distance: int) -> torch.Tensor:
    """+1, −2, +1 in the bits of three words: neither their sum nor their sum weighted by place changes."""
    words = _bits(x.clone())
    for i, step in enumerate((1, -2, 1)):
        words[:, 5 + i * distance] += step << 20
    return words.view(x.dtype)


def _signs(x: torch.Tensor, distance: int) -> torch.Tensor:
    x = x.clone()
    x[:, [7, 7 + distance]] *= -1
    return x


def _exchanged(x: torch.Tensor, distance: int) -> torch.Tensor:
    x = x.clone()
    x[:, [7, 7 + distance]] = x[:, [7 + distance, 7]]
    return x


CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "negated": lambda x: -x,
    "half of it negated": lambda x: torch.cat([-x[:, x.shape[1] // 2 :], x[:, : x.shape[1] // 2]], 1),
    "signs exchanged": lambda x: x * torch.tensor([1, -1], dtype=x.dtype).repeat(x.shape[1] // 2),
    "absolute": torch.abs,
    "all sign bits": lambda x: (_bits(x) ^ (1 << 31)).view(x.dtype),
    "times 2": lambda x: x * 2,
    "times 16": lambda x: x * 16,
    "times 1/256": lambda x: x / 256,
    "reversed": lambda x: x.flip(1),
    "rows exchanged": lambda x: x.flip(0),
    **{f"rolled by {d}": lambda x, d=d: x.roll(d, 1) for d in (1, 8, 16, 32, 64, 128)},
    **{f"two signs, {d} apart": lambda x, d=d: _signs(x, d) for d in (1, 2, 16, 32, 64, 96, 128)},
    **{f"two exchanged, {d} apart": lambda x, d=d: _exchanged(x, d) for d in (1, 2, 16, 32, 64, 128)},
    **{f"a wave of {d}": lambda x, d=d: _wave(x, d) for d in (1, 2, 8, 16, 32, 64)},
}


@pytest.mark.parametrize("k", [512, 3072, 16384])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_structured_changes_are_seen(path, dtype, k, activations):
    """What leaves sums of the bits as they were: signs, powers of two, permutations."""
    t = cpu_truth.layer(k, 4, dtype=FP32, rank=0, bias=False)
    original = cpu_truth.inputs(2, k, dtype)
    x = original.clone()
    wrong = []
    for name, change in CHANGES.items():
        x.copy_(original)
        svdquant_linear(x, t, activations)
        x.copy_(change(original))
        y = svdquant_linear(x, t, activations).double().numpy()
        expected = cpu_truth.output(x, t, activations)
        # Two columns of K may hardly show in the product, but in a norm of 4 outputs a stale one differs at all.
        svdquant_linear(torch.ones(3, k), t, activations)
        fresh = svdquant_linear(x, t, activations).double().numpy()
        if not np.array_equal(y, fresh) or np.linalg.norm(fresh - expected) > 0.01 * np.linalg.norm(expected):
            wrong.append(name)
    assert not wrong


def test_edits_through_another_view(path, activations):
    a, b = pair()
    for inference in (False, True):
        with torch.inference_mode(inference):
            storage = torch.zeros(2 * ROWS, K)
            x, other = storage[:ROWS], storage[ROWS // 2 : 3 * ROWS // 2]
            x.copy_(cpu_truth.inputs(ROWS, K, FP32))
            check_linear(path, x, a, activations)
            other.fill_(3)
            check_linear(path, x, b, activations)
            check_linear(path, other, b, activations)
            storage.view(-1)[5::7] = -9
            check_linear(path, x, b, activations)


def test_other_views_of_the_same_memory(path, activations):
    """Same address, another shape, stride, type or length."""
    a, b = pair()
    storage = cpu_truth.inputs(2 * ROWS, 2 * K, FP32)
    views = [
        storage[:ROWS, :K],
        storage.view(-1, K)[:ROWS],
        storage[::2, :K],
        storage[:7, :K],
        storage.view(-1, K)[: 2 * ROWS],
        storage.t()[:ROWS, : 2 * ROWS].repeat(1, 3)[:, :K],
        storage[:1, :K].expand(ROWS, K),
        storage.as_strided((ROWS, K), (K, 1)),
        storage.as_strided((ROWS, K), (1, 1)),
        storage.as_strided((ROWS, K), (K, 1), 1),
    ]
    for first in views:
        for second in views:
            svdquant_linear(first, a, activations)
            check_linear(path, second, b, activations)
    half = storage.view(torch.uint8).view(BF16).nan_to_num(1, 1, 1).clamp_(-9, 9)
    svdquant_linear(half[:ROWS, :K].float(), a, activations)
    same_bytes = half.view(FP16).nan_to_num(1, 1, 1).clamp_(-9, 9)
    svdquant_linear(half[:ROWS, :K], a, activations)
    half.view(FP16).copy_(same_bytes)
    check_linear(path, half.view(FP16)[:ROWS, :K], b, activations)


def test_freed_memory_that_comes_back(path, activations):
    """The allocator gives the address of the last tensor to the next; without a reference nothing says so."""
    a, b = pair()
    for inference in (False, True):
        with torch.inference_mode(inference):
            for seed in range(30):
                x = cpu_truth.inputs(ROWS, K, FP32, seed)
                check_linear(path, x, (a, b)[seed % 2], activations, seed)
                del x
    buffer = np.empty((ROWS, K), np.float32)
    for seed in range(6):
        buffer[:] = cpu_truth.inputs(ROWS, K, FP32, seed).numpy()
        check_linear(path, torch.from_numpy(buffer), (a, b)[seed % 2], activations, seed)


def test_results_in_the_memory_of_inputs(path, activations):
    """A chain of square layers in which each result is where an earlier input was."""
    layers = [cpu_truth.layer(K, K, seed=seed, dtype=BF16) for seed in range(4)]
    x = cpu_truth.inputs(ROWS, K, BF16)
    buffer = torch.empty_like(x)
    with torch.inference_mode():
        for i in range(12):
            expected = cpu_truth.output(x, layers[i % 4], activations)
            buffer.copy_(svdquant_linear(x, layers[i % 4], activations))
            cpu_truth.check(path, buffer, expected, layers[i % 4], i)
            x, buffer = buffer.div_(buffer.abs().max() / 4), x


DIFFERENCES: dict[str, Any] = {
    "smoothing": ({}, {"seed": 5}),
    "smoothing or none": ({}, {"smooth": False}),
    "rotation": ({}, {"rotate": True}),
    "unsigned": ({}, {"unsigned": ((0, K),)}),
    "unsigned ranges": ({"unsigned": ((0, 64),)}, {"unsigned": ((64, K),)}),
    "group": ({}, {"group": 32}),
    "large group": ({"group": 96}, {"group": 64}),
    "weights": ({}, {"weights": "nvfp4"}),
    "int8 weights": ({"weights": "int8"}, {}),
    "rank": ({"rank": 32}, {"rank": 1}),
    "no branch": ({"rank": 0}, {"rank": 16}),
    "padded columns": ({"group": 128}, {"group": 64}),
}


@pytest.mark.parametrize("name", DIFFERENCES, ids=lambda n: n.replace(" ", "-"))
def test_what_differs_is_not_shared(path, name, activations):
    for dtype in (BF16, FP32):
        a, b = (cpu_truth.layer(K, 72, dtype=dtype, **options) for options in DIFFERENCES[name])
        x = cpu_truth.inputs(ROWS, K, dtype, 1, ((0, K),))
        for t in (a, b, b, a, b):
            check_linear(path, x, t, activations, name)


def test_smoothing_that_is_edited(path, activations):
    """The same tensors object, other numbers; and a new tensor at an old address."""
    a, b = pair()
    x = cpu_truth.inputs(ROWS, K, FP32)
    check_linear(path, x, a, activations)
    a.smooth_factor.data.mul_(1.7)
    check_linear(path, x, b, activations)
    a.smooth_factor.numpy()[3] = 0.1
    check_linear(path, x, b, activations)
    a.proj_down.data.neg_()
    check_linear(path, x, b, activations)
    for seed in range(8):
        b.smooth_factor = None
        b.smooth_factor = torch.rand(K, generator=torch.Generator().manual_seed(seed)) + 0.5
        check_linear(path, x, b, activations, seed)
        b.proj_down = None
        b.proj_down = torch.randn(16, K, generator=torch.Generator().manual_seed(seed))
        check_linear(path, x, b, activations, seed)


def test_other_precision_of_the_same_input(path):
    a, b = pair()
    x = cpu_truth.inputs(ROWS, K, FP32)
    for first, second in (("int8", "int4"), ("int4", "int8"), ("int4", "int4")):
        check_linear(path, x, a, first)
        check_linear(path, x, b, second)
    plain = cpu_truth.layer(K, 40, rank=0, kind="w4a16", smooth=False)
    check_linear(path, x, a, "int8")
    cpu_truth.check_weight_only(path, x, plain)
    check_linear(path, x, a, "int4")


def test_the_type_of_the_model(path, activations):
    """x in bfloat16 and the same numbers in float32: other codes."""
    a, b = pair(BF16)
    x = cpu_truth.inputs(ROWS, K, BF16)
    check_linear(path, x, a, activations)
    check_linear(path, x.float(), b, activations)
    check_linear(path, x, b, activations)


def test_two_threads_with_inputs_at_turns(path, activations):
    """Each caller overwrites its own buffer between layers; nobody sees another's."""
    layers = pair()
    wrong: list[object] = []

    def work(seed: int) -> None:
        x = torch.empty(ROWS, K)
        for turn in range(12):
            x.copy_(cpu_truth.inputs(ROWS, K, FP32, 100 * seed + turn))
            try:
                for t in layers:
                    check_linear(path, x, t, activations, (seed, turn))
            except AssertionError as error:
                wrong.append(error)

    callers = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_records_that_are_cut(path, activations):
    """The same memory read as a smaller layer, by a copy of a record and by the record itself."""
    for dtype in (BF16, FP32):
        t = cpu_truth.layer(K, 130, dtype=dtype, rank=32)
        x = cpu_truth.inputs(ROWS, K, dtype)
        check_linear(path, x, t, activations)
        for outputs, rank in ((64, 32), (64, 16), (7, 1), (130, 8)):
            for cut in (copy.copy(t), t):
                for name in ("qweight", "wscales", "bias", "proj_up"):
                    setattr(cut, name, getattr(t, name)[:outputs])
                cut.proj_down = t.proj_down[:rank]
                cut.proj_up = cut.proj_up.flatten()[: cut.qweight.shape[0] * rank].view(-1, rank)
                check_linear(path, x, cut, activations, (outputs, rank))
            t = cpu_truth.layer(K, 130, dtype=dtype, rank=32)
            check_linear(path, x, t, activations)
        t = cpu_truth.layer(K, 130, dtype=dtype, rank=32, group=32)
        check_linear(path, x, t, activations)
        t.spec = replace(t.spec, group_size=64)
        t.wscales = t.wscales.flatten()[: 130 * 3].view(130, 3)
        check_linear(path, x, t, activations)


def test_inputs_are_not_kept_alive(path, activations):
    """A large activation is freed when its owner drops it, not when the next one comes."""
    a, b = pair()
    memory = cpu_truth.inputs(ROWS, K, FP32).numpy()
    x = torch.from_numpy(memory)
    gone = weakref.ref(memory)
    del memory
    svdquant_linear(x, a, activations)
    svdquant_linear(x, b, activations)
    del x
    assert gone() is None


@pytest.mark.skipif(cpu_truth.PATHS == ["dequantize"], reason="nothing is shared there")
@pytest.mark.parametrize("shape", [(ROWS, K), (2, ROWS // 2, K)], ids=str)
def test_an_input_is_quantized_once(path, shape, activations, monkeypatch):
    """The second reader finds the first one's codes."""
    from svdquant.kernels.cpu import linear

    found = []
    take = linear.take

    def recording(*arguments: Any) -> Any:
        made = take(*arguments)
        found.append(made.filled)
        return made

    monkeypatch.setattr(linear, "take", recording)
    a, b = pair()

    def both(x: torch.Tensor) -> torch.Tensor:
        h = x * 2
        return svdquant_linear(h, a, activations) + svdquant_linear(h, b, activations)

    torch._dynamo.reset()
    x = cpu_truth.inputs(ROWS, K, FP32).reshape(shape)
    expected = both(x)
    assert found == [False, True]
    for way in ("gradient", "compiled"):
        svdquant_linear(torch.zeros(1, K), a, activations)
        found.clear()
        if way == "gradient":
            y = both(x.clone().requires_grad_())
        else:
            y = torch.compile(both, fullgraph=True, backend="aot_eager")(x)
        # Whether codes are shared there is left to the operation; the result is the same.
        assert torch.equal(y.detach(), expected), way
