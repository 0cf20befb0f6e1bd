"""Which path multiplies, and with how many bits."""

import pytest
import reference64
import torch

import svdquant
from svdquant import SVDQuantConfig, SVDQuantError
from svdquant.config import LayerSpec
from svdquant.kernels import BACKENDS, cpu, device_path, resolve_activations, svdquant_linear
from svdquant.kernels.dispatch import compute_dtype

CPU = torch.device("cpu")


@pytest.fixture
def cuda(monkeypatch):
    """Pretends that a CUDA device of some capability is there."""

    def pretend(major, minor, hip=None):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, minor))
        monkeypatch.setattr(torch.version, "hip", hip)
        return torch.device("cuda")

    return pretend


@pytest.mark.parametrize("weights", ["int4", "nvfp4", "int8"])
@pytest.mark.parametrize("solved", ["auto", "int4", "nvfp4", "int8", "fp8"])
def test_auto_on_a_cpu_is_int8(weights, solved):
    assert resolve_activations("auto", LayerSpec(weights=weights, activations=solved), CPU) == "int8"


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((7, 0), ("int8", "int8", "int8")),
        ((7, 5), ("int4", "int8", "int8")),
        ((8, 0), ("int4", "int8", "int8")),
        ((8, 9), ("int4", "int8", "int8")),
        ((9, 0), ("int8", "int8", "int8")),
        ((10, 0), ("int8", "nvfp4", "int8")),
        ((12, 0), ("int8", "nvfp4", "int8")),
    ],
)
def test_auto_on_cuda(cuda, capability, expected):
    device = cuda(*capability)
    got = tuple(resolve_activations("auto", LayerSpec(weights=w), device) for w in ("int4", "nvfp4", "int8"))
    assert got == expected
    assert f"sm_{capability[0]}{capability[1]}" in device_path(device).why


def test_auto_on_rocm_is_int8(cuda):
    assert resolve_activations("auto", LayerSpec(), cuda(8, 0, hip="6.2")) == "int8"


@pytest.mark.parametrize(
    ("weights", "capability", "solved", "expected"),
    [
        ("int4", (8, 9), "int8", "int8"),
        ("int4", (8, 9), "fp8", "fp8"),
        ("int4", (8, 9), "none", "none"),
        ("int4", (8, 9), "int4", "int4"),
        ("nvfp4", (12, 0), "int8", "int8"),
        ("nvfp4", (12, 0), "nvfp4", "nvfp4"),
        ("int4", (9, 0), "fp8", "int8"),
        ("int4", (9, 0), "none", "none"),
        ("nvfp4", (8, 9), "none", "none"),
        ("int8", (12, 0), "none", "none"),
    ],
)
def test_a_layer_solved_for_more_bits_keeps_them(cuda, weights, capability, solved, expected):
    spec = LayerSpec(weights=weights, activations=solved)
    assert resolve_activations("auto", spec, cuda(*capability)) == expected


@pytest.mark.parametrize("activations", ["int4", "int8", "fp8", "nvfp4", "none"])
def test_an_explicit_precision_is_taken_literally(activations):
    assert resolve_activations(activations, LayerSpec(activations="int8"), CPU) == activations


@pytest.mark.parametrize("activations", ["int3", "", "AUTO"])
def test_an_unknown_precision(activations):
    with pytest.raises(SVDQuantError, match="is not one of auto, int4"):
        resolve_activations(activations, LayerSpec(), CPU)


def test_backend_from_the_environment(monkeypatch):
    monkeypatch.delenv("SVDQUANT_BACKEND", raising=False)
    fastest = "native" if cpu.available() else "dequantize"
    assert device_path(CPU).backend == fastest
    for backend in BACKENDS:
        monkeypatch.setenv("SVDQUANT_BACKEND", backend)
        # Triton's interpreter, which these tests run under, takes CPU tensors for those who ask for a product of a GPU.
        expected = {"native": fastest, "dequantize": "dequantize", "reference": "reference"}.get(backend, "triton")
        assert device_path(CPU).backend == expected
    monkeypatch.setenv("SVDQUANT_BACKEND", "cutlass")
    with pytest.raises(SVDQuantError, match="SVDQUANT_BACKEND='cutlass' is not one of"):
        device_path(CPU)
    tensors = reference64.random_tensors(LayerSpec(), 64, 8, True, torch.float32)
    with pytest.raises(SVDQuantError, match="SVDQUANT_BACKEND"):
        svdquant_linear(torch.zeros(1, 64), tensors, "int8")


def test_the_reference_is_the_more_exact_backend(monkeypatch):
    tensors = reference64.random_tensors(LayerSpec(), 128, 64, True, torch.bfloat16)
    x = reference64.random_inputs(tensors.spec, 32, 128, torch.bfloat16)
    expected, _ = reference64.layer(tensors).forward(x.double().numpy(), "none", torch.bfloat16)
    errors = {}
    for backend in ("native", "dequantize", "reference"):
        monkeypatch.setenv("SVDQUANT_BACKEND", backend)
        errors[backend] = reference64.relative(svdquant_linear(x, tensors, "none").double().numpy(), expected)
    assert errors["reference"] < 2.5e-3 and errors["reference"] < errors["dequantize"] < 6e-3


@pytest.mark.parametrize(
    ("dtype", "backend", "expected"),
    [
        (torch.bfloat16, "dequantize", torch.bfloat16),
        (torch.bfloat16, "reference", torch.float32),
        (torch.float16, "dequantize", torch.float32),
        (torch.float32, "dequantize", torch.float32),
        (torch.float64, "dequantize", torch.float32),
    ],
)
def test_compute_type_on_a_cpu(dtype, backend, expected):
    assert compute_dtype(torch.zeros(1, dtype=dtype), backend) == expected


def test_compute_type_on_another_device():
    assert compute_dtype(torch.zeros(1, dtype=torch.float16, device="meta"), "dequantize") == torch.float16


@pytest.mark.parametrize("rotate", [False, True])
def test_gradients_reach_the_input_straight_through(rotate: bool) -> None:
    """LoRA training and guidance need d(loss)/dx; it is that of the dense linear."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(128, 192))
    config = SVDQuantConfig(rank=16, rotate=rotate)
    svdquant.quantize(model, config)
    layer = model[0]
    assert isinstance(layer, svdquant.SVDQuantLinear)
    x = torch.randn(3, 5, 128, requires_grad=True)
    upstream = torch.randn(3, 5, 192)
    layer(x).backward(upstream)
    dense = layer.dequantize().weight.double()
    assert x.grad is not None
    expected = upstream.double() @ dense
    assert float((x.grad.double() - expected).norm() / expected.norm()) < 1e-5
