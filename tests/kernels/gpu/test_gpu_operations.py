"""The operations that compilers see: what their fake implementations promise is what the kernels return."""

import pytest
import torch

pytest.importorskip("triton")

from torch._subclasses.fake_tensor import FakeTensorMode
from truth import head_norm, random_input, random_layer, relative_error

from svdquant.kernels import gpu, svdquant_linear
from svdquant.kernels.gpu import choice
from svdquant.kernels.gpu.operations import multiply_operation, quantize_operation
from svdquant.kernels.gpu.types import Before
from svdquant.numerics import SVDQuantTensors

K, N = 160, 48


@pytest.fixture
def g() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVDQUANT_BACKEND", "triton")


def faked(mode: FakeTensorMode, t: SVDQuantTensors) -> SVDQuantTensors:
    return SVDQuantTensors(t.spec, t.in_features, **{n: mode.from_tensor(v) for n, v in t.named().items()})


def described(parts):
    return [None if v is None else (tuple(v.shape), v.dtype, v.stride(), v.device) for v in parts]


CASES = [
    ("triton", "int8", {}),
    ("triton", "fp8", {}),
    ("registers", "int8", {}),
    ("registers", "fp8", {"rank": 16}),
    ("scaled_mm", "fp8", {}),
    ("grouped", "int4", {}),
    ("grouped", "int8", {"weights": "nvfp4"}),
    ("triton", "int8", {"weights": "int8"}),
    ("triton", "int8", {"unsigned": ((64, 160),)}),
    ("triton", "int8", {"rank": 0}),
    ("dot_scaled", "nvfp4", {"weights": "nvfp4"}),
]


@pytest.mark.parametrize(("name", "activations", "options"), CASES, ids=str)
def test_what_is_promised_is_returned(name, activations, options, g, monkeypatch):
    monkeypatch.setenv("SVDQUANT_BACKEND", name)
    t = random_layer(g, N, K, **options)
    x = random_input(g, 2, 3, K)
    assert gpu.choose(t, activations, x.dtype, x.device) == name
    real = quantize_operation(x, t, activations, Before(), None, None)
    mode = FakeTensorMode()
    with mode:
        fake = quantize_operation(mode.from_tensor(x), faked(mode, t), activations, Before(), None, None)
    assert described(fake) == described(real)

    p = gpu.Prepared(*real, 2, 3, activations, x.dtype)
    directly = gpu.project(gpu.prepare(x, t, activations), (t,))
    out = torch.full((2, 5, N + 8), float("nan"), dtype=x.dtype)
    multiply_operation(p, (t,), out[:, 1:4, 8:], gpu.Epilogue())
    assert torch.equal(out[:, 1:4, 8:], directly) and int(out.isnan().sum()) == out.numel() - directly.numel()
    with mode:
        fake_linear = svdquant_linear(mode.from_tensor(x), faked(mode, t), activations)
    assert described([fake_linear]) == described([svdquant_linear(x, t, activations)])


def test_packed_codes_for_int4_cores(g, monkeypatch):
    """No interpreter runs that product, so its quantizer's promise is compared with its quantizer."""
    from svdquant.kernels.gpu.quantize import quantize

    t, x = random_layer(g, N, K), random_input(g, 2, 3, K)
    monkeypatch.setattr(choice, "choose", lambda *args: "int4_mma")
    monkeypatch.setattr("svdquant.kernels.gpu.operations.choose", lambda *args: "int4_mma")
    q = quantize(x, t, gpu.Reading("int4", packed=True))
    mode = FakeTensorMode()
    with mode:
        fake = quantize_operation(mode.from_tensor(x), faked(mode, t), "int4", Before(), None, None)
    assert described(fake) == described((q.codes, q.scales, q.low))


@pytest.mark.parametrize("kind", ["second", "layer_norm"])
def test_other_inputs(kind, g):
    t = random_layer(g, N, K)
    x = random_input(g, 2, 3, K)
    strengths = torch.rand(2, 32, generator=g)
    before, second = Before(), None
    if kind == "second":
        x, second = x[..., :64], x[..., 64:]
    else:
        before = Before("layer_norm", 1e-6, *torch.randn(2, 2, K, generator=g).bfloat16())
    real = quantize_operation(x, t, "int8", before, second, strengths)
    direct = gpu.prepare(x, t, "int8", before, second, strengths)
    assert all(torch.equal(a, b) for a, b in zip(real, (direct.codes, direct.scales, direct.low), strict=True))


@pytest.mark.parametrize("name", ["triton", "grouped"])
def test_several_layers_with_heads(name, g, monkeypatch):
    """By the product itself, and by what follows a product that cannot."""
    monkeypatch.setenv("SVDQUANT_BACKEND", name)
    layers = [random_layer(g, 128, K) for _ in range(3)]
    for t in layers[1:]:
        t.proj_down, t.smooth_factor = layers[0].proj_down, layers[0].smooth_factor
    x = random_input(g, 2, 3, K)
    norm = gpu.HeadNorm((torch.rand(64, generator=g), None), 1e-6, 64, *torch.randn(2, 3, 64, generator=g))
    p = gpu.prepare(x, layers[0], "int8")
    out = torch.empty(2, 3, 3 * 128, dtype=x.dtype)
    multiply_operation(p, layers, out, gpu.Epilogue(norm=norm))
    assert torch.equal(out, gpu.project(p, layers, epilogue=gpu.Epilogue(norm=norm)))
    plain = gpu.project(p, layers)
    assert torch.equal(out[..., 256:], plain[..., 256:])
    assert relative_error(out, head_norm(plain, norm, [128] * 3)) < 0.01


def test_compiled(g):
    """One graph; a part of a larger tensor is written where it lies."""
    t, x = random_layer(g, N, K), random_input(g, 1, 3, K)

    def run(x: torch.Tensor) -> torch.Tensor:
        out = x.new_zeros(1, 3, 2 * N)
        gpu.project(gpu.prepare(x, t, "int8"), (t,), out[..., N:])
        return out * 2

    with torch.no_grad():
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), run(x))


def test_gradients_pass_through(g):
    t, x = random_layer(g, N, K), random_input(g, 1, 3, K).requires_grad_()
    y = svdquant_linear(x, t, "int8")
    with torch.no_grad():
        assert torch.equal(y, svdquant_linear(x, t, "int8"))
    y.sum().backward()
    weight, _ = t.dense()
    assert torch.allclose(x.grad, weight.sum(0).to(x.dtype).expand_as(x), rtol=1e-2, atol=1e-2)


def test_a_compiler_does_not_follow_what_finds_the_chip(monkeypatch):
    """It would warn of what is remembered there, and need to know every type of a device's properties."""
    asked: list[torch.device] = []
    monkeypatch.setattr(choice, "arch_of", asked.append)
    compiled = torch.compile(lambda x: x + gpu.active(x.device), fullgraph=True, backend="eager")
    for _ in range(2):
        compiled(torch.zeros(1))
    assert asked == [torch.device("cpu")]
