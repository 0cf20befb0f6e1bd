"""Row i depends on row i alone, bit for bit, and on nothing that happened before."""

import pytest
import reference64
import torch

from svdquant.config import LayerSpec
from svdquant.kernels import svdquant_linear, w4a16_linear
from svdquant.kernels.rows import block_rows, linear_rows

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
COUNTS = [*range(1, 18), 63, 64, 65, 66, 130, 257]
GROUPS = {"int4": 64, "nvfp4": 16, "int8": 0}


def splits(run, x):
    """Every part of x gives the bits that it has within x."""
    whole = run(x)
    for count in COUNTS:
        for start in {0, x.shape[0] - count}:
            assert torch.equal(run(x[start : start + count]), whole[start : start + count]), (count, start)
    for row in (0, 1, 62, 63, 64, 100, 127, 128, 256):
        assert torch.equal(run(x[row : row + 1])[0], whole[row]), row
    order = torch.randperm(x.shape[0], generator=torch.Generator().manual_seed(0))
    assert torch.equal(run(x[order]), whole[order])
    assert torch.equal(run(x), whole)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activations", ["int4", "int8", "fp8", "nvfp4", "none"])
@pytest.mark.parametrize(("k", "n"), [(130, 70), (256, 320)])
def test_batch_invariance(k, n, activations, dtype):
    spec = LayerSpec(rank=16, rotate=k == 256)
    tensors = reference64.random_tensors(spec, k, n, True, dtype)
    splits(lambda x: svdquant_linear(x, tensors, activations), reference64.random_inputs(spec, 257, k, dtype))


@pytest.mark.parametrize("backend", ["dequantize", "reference"])
@pytest.mark.parametrize("weights", ["int4", "nvfp4", "int8"])
def test_batch_invariance_of_each_format(weights, backend, monkeypatch):
    monkeypatch.setenv("SVDQUANT_BACKEND", backend)
    spec = LayerSpec(weights=weights, group_size=GROUPS[weights], rank=33, unsigned=((64, 128),))
    tensors = reference64.random_tensors(spec, 200, 90, True, torch.bfloat16)
    splits(lambda x: svdquant_linear(x, tensors), reference64.random_inputs(spec, 257, 200, torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_invariance_of_w4a16(dtype):
    t = reference64.random_tensors(LayerSpec("w4a16", rank=0, smooth=False), 192, 130, True, dtype)
    x = reference64.random_inputs(t.spec, 257, 192, dtype)
    splits(lambda x: w4a16_linear(x, t.qweight, t.wscales, t.bias), x)


def test_one_bad_token_spoils_no_other():
    spec = LayerSpec(rank=16)
    tensors = reference64.random_tensors(spec, 130, 70, True, torch.float32)
    x = reference64.random_inputs(spec, 70, 130, torch.float32)
    whole = svdquant_linear(x, tensors, "int8")
    x[3] = float("nan")
    y = svdquant_linear(x, tensors, "int8")
    others = [i for i in range(70) if i != 3]
    assert torch.equal(y[others], whole[others]) and bool(y[3].isnan().all())


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rows", [0, 1, 63, 64, 65, 200])
def test_linear_rows_is_a_matrix_product(rows, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        g = torch.Generator().manual_seed(rows)
        x, weight = torch.randn(rows, 50, generator=g), torch.randn(30, 50, generator=g)
        y = linear_rows(x, weight)
    finally:
        torch.set_num_threads(before)
    assert y.shape == (rows, 30)
    assert torch.allclose(y, x @ weight.T, atol=1e-5)


def test_block_of_each_device():
    assert block_rows(torch.device("cpu")) == 64
    assert block_rows(torch.device("cuda")) == block_rows(torch.device("xpu")) == 256
