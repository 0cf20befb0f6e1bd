"""On a real GPU: streams, graphs, several devices, offloading, compiling. Elsewhere these have nothing to run on.

Run by `TRITON_INTERPRET=0 python -m pytest -n 0 tests/kernels/gpu/test_gpu_device.py`; numbers are checked, too, by
`svdquant bench --suite gpu`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from svdquant.config import LayerSpec
from svdquant.kernels import gpu, reference, svdquant_linear, w4a16_linear
from svdquant.nn import SVDQuantLinear
from svdquant.numerics import FORMATS, SVDQuantTensors, quantize_weight, relative_error

pytestmark = [
    pytest.mark.skipif(gpu.missing() is not None, reason="triton is not installed"),
    pytest.mark.skipif(
        not torch.cuda.is_available() or gpu.interpreting(), reason="needs a GPU, and TRITON_INTERPRET=0"
    ),
]
DTYPES = (torch.bfloat16, torch.float16)


def layer(n: int = 384, k: int = 320, rank: int = 32, device: str = "cuda", **fields: Any) -> SVDQuantTensors:
    g = torch.Generator().manual_seed(n + k)
    spec = LayerSpec(rank=rank, **fields)
    dtype = torch.bfloat16
    weight = torch.randn(n, k, generator=g)
    values, wscales, wcscales = quantize_weight(weight, spec.weights, spec.group_size, dtype)
    tensors = SVDQuantTensors(
        spec,
        k,
        FORMATS[spec.weights].pack(values),
        wscales,
        wcscales,
        (torch.rand(k, generator=g) + 0.5).to(dtype),
        (torch.randn(rank, k, generator=g) * 0.05).to(dtype),
        torch.randn(n, rank, generator=g).to(dtype),
        torch.randn(n, generator=g).to(dtype),
    )
    return tensors.to(device)


def rows(m: int, k: int = 320, dtype: torch.dtype = torch.bfloat16, device: str = "cuda", seed: int = 0) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activations", ["int8", "fp8", "int4", "nvfp4"])
@pytest.mark.parametrize("m", [1, 17, 200])
def test_as_the_reference(activations, m, dtype):
    t = layer(weights="nvfp4", group_size=16) if activations == "nvfp4" else layer()
    if not gpu.supports(t, activations, dtype, torch.device("cuda")):
        pytest.skip(f"no product with {activations} activations on this GPU")
    x = rows(m, dtype=dtype)
    expected = reference.svdquant_linear(x, t, activations, torch.float32)
    assert relative_error(svdquant_linear(x, t, activations), expected) < 0.03


def test_streams_agree():
    t, x = layer(), rows(300)
    expected = svdquant_linear(x, t, "int8")
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    results = []
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(svdquant_linear(x, t, "int8"))
    torch.cuda.synchronize()
    assert all(torch.equal(y, expected) for y in results)


def test_a_graph_replays():
    t, x = layer(), rows(64)
    expected = [svdquant_linear(rows(64, seed=s), t, "int8") for s in range(3)]
    static = x.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        svdquant_linear(static, t, "int8")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = svdquant_linear(static, t, "int8")
    for s in range(3):
        static.copy_(rows(64, seed=s))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, expected[s])


@pytest.mark.parametrize("activations", ["int8", "int4"])
def test_compiled_without_a_break(activations):
    module = torch.nn.Sequential(SVDQuantLinear.from_tensors(layer()), torch.nn.GELU())
    module[0].activations = activations
    with torch.no_grad():
        x = rows(100)
        expected = module(x)
        torch._dynamo.reset()
        assert torch.equal(torch.compile(module, fullgraph=True)(x), expected)
        torch._dynamo.reset()
        assert torch.equal(torch.compile(module, fullgraph=True, mode="reduce-overhead")(x), expected)


@pytest.mark.parametrize("activations", ["int8", "fp8", "int4"])
def test_deterministic_and_batch_invariant(activations):
    t, x = layer(n=3072, k=3072), rows(600, 3072)
    if not gpu.supports(t, activations, x.dtype, x.device):
        pytest.skip(f"no product with {activations} activations on this GPU")
    whole = svdquant_linear(x, t, activations)
    for _ in range(20):
        assert torch.equal(svdquant_linear(x, t, activations), whole)
    for start, stop in ((0, 1), (5, 22), (63, 129), (100, 600)):
        assert torch.equal(svdquant_linear(x[start:stop], t, activations), whole[start:stop])


def test_weights_only_rows_are_their_own():
    t = layer(n=1024, k=3072, rank=0)
    x = rows(70, 3072)
    whole = w4a16_linear(x, t.qweight, t.wscales, t.bias)
    for start, stop in ((0, 1), (3, 4), (10, 30)):
        assert torch.equal(w4a16_linear(x[start:stop], t.qweight, t.wscales, t.bias), whole[start:stop])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_in_one_process():
    t, x = layer(), rows(50)
    expected = svdquant_linear(x, t, "int8").cpu()
    other = svdquant_linear(x.to("cuda:1"), t.to("cuda:1"), "int8")
    assert torch.cuda.current_device() == 0 and other.device.index == 1
    assert torch.equal(other.cpu(), expected)


def test_group_offload():
    hooks = pytest.importorskip("diffusers.hooks")

    model = torch.nn.Sequential(*(SVDQuantLinear.from_tensors(layer(320, 320, device="cpu")) for _ in range(4)))
    x = rows(40)
    with torch.no_grad():
        expected = model.to("cuda")(x)
        model.to("cpu")
        hooks.apply_group_offloading(
            model, torch.device("cuda"), torch.device("cpu"), offload_type="leaf_level", use_stream=True
        )
        for _ in range(3):
            assert torch.equal(model(x), expected)


def test_a_large_product_has_no_overflow():
    """M·N beyond 2³¹ elements."""
    free, _ = torch.cuda.mem_get_info()
    if free < 12 << 30:
        pytest.skip("needs 12 GB of free GPU memory")
    t = layer(n=9216, k=128, rank=16)
    x = rows(240_000, 128)
    y = svdquant_linear(x, t, "int8")
    expected = svdquant_linear(x[-5:], t, "int8")
    assert torch.equal(y[-5:], expected)
