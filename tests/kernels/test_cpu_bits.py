"""The bits of a row depend on that row alone: not on its company, the threads, the call or who else calls."""

from __future__ import annotations

import itertools
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cpu_truth
import pytest
import torch
from cpu_truth import BF16, DTYPES, FP16, FP32

from svdquant.kernels import svdquant_linear, w4a16_linear

# name: (K, N, activations, dtype, options); activations None = weights only.
LAYERS: dict[str, Any] = {
    "A8": (200, 90, "int8", BF16, {"rank": 33}),
    "A8, float32, rotated": (256, 70, "int8", FP32, {"rotate": True}),
    "A8, unsigned": (320, 65, "int8", FP16, {"unsigned": ((64, 320),)}),
    "A4": (200, 90, "int4", BF16, {"rank": 33}),
    "A4, float16, rotated": (256, 70, "int4", FP16, {"rotate": True}),
    "A4, unsigned": (320, 65, "int4", FP32, {"unsigned": ((64, 320),)}),
    "nvfp4": (200, 90, "int8", BF16, {"weights": "nvfp4"}),
    "int8": (200, 90, "int8", BF16, {"weights": "int8"}),
    "group of 6": (130, 40, "int8", BF16, {"group": 6}),
    "weights only": (200, 90, None, BF16, {}),
    "weights only, float32, zeros": (256, 70, None, FP32, {"zeros": True, "group": 128}),
    "weights only, nvfp4": (200, 65, None, FP16, {"weights": "nvfp4"}),
    "weights only, int8": (200, 65, None, BF16, {"weights": "int8"}),
}


def linear(name: str) -> Any:
    """(function of x, K, dtype, unsigned ranges) of a layer in the table."""
    k, n, activations, dtype, options = LAYERS[name]
    if activations is None:
        t = cpu_truth.layer(k, n, dtype=dtype, rank=0, kind="w4a16", smooth=False, **options)
        return (lambda x: w4a16_linear(x, t.qweight, t.wscales, t.bias, t.spec.weights, t.wzeros)), k, dtype, ()
    t = cpu_truth.layer(k, n, dtype=dtype, **options)
    return (lambda x: svdquant_linear(x, t, activations)), k, dtype, t.spec.unsigned


@pytest.fixture(params=LAYERS, ids=lambda n: n.replace(", ", "-").replace(" ", "-"))
def layer(request):
    return linear(request.param)


def test_any_split_of_a_batch(path, layer):
    run, k, dtype, unsigned = layer
    x = cpu_truth.inputs(257, k, dtype, 1, unsigned)
    whole = run(x)
    for count in (*range(1, 18), 31, 32, 33, 63, 64, 65, 96, 128, 130):
        for start in {0, 3, 257 - count}:
            assert torch.equal(run(x[start : start + count]), whole[start : start + count]), (count, start)
    choose = random.Random(0)
    for _ in range(6):
        edges = [0, *sorted(choose.sample(range(1, 257), 7)), 257]
        parts = [run(x[a:b]) for a, b in itertools.pairwise(edges)]
        assert torch.equal(torch.cat(parts), whole)
    order = torch.randperm(257, generator=torch.Generator().manual_seed(0))
    assert torch.equal(run(x[order]), whole[order])
    assert torch.equal(run(x[:256].reshape(2, 4, 32, k)).flatten(0, 2), whole[:256])
    assert torch.equal(run(x), whole)


def test_any_number_of_threads(path, layer, threads):
    run, k, dtype, unsigned = layer
    if path == "dequantize" and dtype != BF16:
        pytest.skip("torch's float32 product sums in another order for another number of threads")
    for rows in (1, 2, 5, 70, 257):
        x = cpu_truth.inputs(rows, k, dtype, rows, unsigned)
        threads(1)
        expected = run(x)
        for count in (2, 3, 4, 7):
            threads(count)
            assert torch.equal(run(x), expected), (rows, count)


@pytest.mark.parametrize("activations", ["int8", "int4", None])
def test_threads_on_shapes_of_models(path, activations, threads):
    k, n = (5600, 130) if activations else (3072, 515)
    t = cpu_truth.layer(k, n, dtype=BF16, rank=32 if activations else 0, kind="svdquant" if activations else "w4a16")
    for rows in (1, 3, 100):
        x = cpu_truth.inputs(rows, k, BF16)
        results = []
        for count in (1, 2, 3, 4):
            threads(count)
            if activations:
                results.append(svdquant_linear(x, t, activations))
            else:
                results.append(w4a16_linear(x, t.qweight, t.wscales, t.bias))
        assert all(torch.equal(y, results[0]) for y in results)


def test_one_row_of_a_large_batch(path):
    """Beyond every block size: 3,000 rows in one call and four of them alone."""
    for activations in ("int8", "int4"):
        t = cpu_truth.layer(128, 48, dtype=BF16)
        x = cpu_truth.inputs(3000, 128, BF16)
        whole = svdquant_linear(x, t, activations)
        for row in (0, 1023, 1024, 2047, 2999):
            assert torch.equal(svdquant_linear(x[row], t, activations), whole[row])
        cpu_truth.check(path, whole[::7], cpu_truth.output(x[::7], t, activations), t)


@pytest.mark.skipif(cpu_truth.PATHS == ["dequantize"], reason="that path has no limit to its scratch")
def test_inputs_that_are_multiplied_in_parts(path, layer, monkeypatch):
    from svdquant.kernels.cpu import linear

    run, k, dtype, unsigned = layer
    x = cpu_truth.inputs(257, k, dtype, 1, unsigned)
    whole = run(x)
    for limit in (1, 10_000, 100_000):
        monkeypatch.setattr(linear, "SCRATCH_LIMIT", limit)
        assert torch.equal(run(x), whole)
        assert torch.equal(run(x.t().contiguous().t()), whole)


def test_memory_of_the_past_is_not_read(path, layer):
    """What earlier calls left in scratch or in freed memory changes nothing."""
    run, k, dtype, unsigned = layer
    x = cpu_truth.inputs(37, k, dtype, 1, unsigned)
    expected = run(x)
    for junk in (float("nan"), 3e4, -1.0):
        run(torch.full((300, k), junk, dtype=dtype))
        left = [torch.full((37, width), junk, dtype=dtype) for width in (k, 90, 64, 33)]
        del left
        assert torch.equal(run(x), expected)


def test_several_callers_at_once(path, threads):
    """Python threads share layers and inputs; each result is that of a single caller."""
    threads(2)
    runs = [linear(name) for name in LAYERS]
    jobs = []
    for run, k, dtype, unsigned in runs:
        for rows in (1, 3, 50):
            x = cpu_truth.inputs(rows, k, dtype, rows, unsigned)
            jobs.append((run, x, run(x)))
    order = [random.Random(0).choice(jobs) for _ in range(150)]

    def work(job: Any) -> bool:
        run, x, expected = job
        return torch.equal(run(x), expected)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, order))


def test_callers_with_different_numbers_of_threads(path, threads):
    """torch's count belongs to the calling thread."""
    run, k, dtype, _ = linear("A8")
    x = cpu_truth.inputs(130, k, dtype)
    expected = run(x)

    def work(count: int) -> bool:
        torch.set_num_threads(count)
        return all(torch.equal(run(x), expected) for _ in range(5))

    threads(1)
    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(work, (1, 2, 3, 4, 2, 1)))


@pytest.mark.skipif(len(cpu_truth.PATHS) < 2, reason="one variant only")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activations", ["int8", "int4"])
def test_variants_agree(activations, dtype):
    """They need not give the same bits, but both are within the bound, so they are close to each other."""
    t = cpu_truth.layer(200, 90, dtype=dtype, rank=32)
    x = cpu_truth.inputs(40, 200, dtype)
    results = []
    for path in cpu_truth.PATHS:
        with cpu_truth.running(path):
            results.append(svdquant_linear(x, t, activations).double().numpy())
    for y in results[1:]:
        cpu_truth.check(cpu_truth.PATHS[0], torch.from_numpy(y).to(dtype), results[0], t)
