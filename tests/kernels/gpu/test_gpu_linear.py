"""The facade of the GPU's kernels: which product multiplies what, whether it works, and shapes of every kind."""

import subprocess
import sys
import warnings

import pytest
import torch

pytest.importorskip("triton")

from truth import random_input, random_layer, relative_error

from svdquant.kernels import fused, gpu, svdquant_linear
from svdquant.kernels.gpu import choice, linear, trial
from svdquant.kernels.gpu.arch import Arch
from svdquant.kernels.gpu.eight_bit import EightBit
from svdquant.kernels.reference import svdquant_linear as reference

K, N = 128, 48
CPU = torch.device("cpu")


@pytest.fixture
def g() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVDQUANT_BACKEND", "triton")


@pytest.fixture
def on_chip(monkeypatch: pytest.MonkeyPatch):
    """Makes every tensor's device a chip."""

    def put(arch: Arch | None) -> None:
        choice._first.cache_clear()
        monkeypatch.setattr(choice, "arch_of", lambda device: arch)
        monkeypatch.setattr(choice, "interpreting", lambda: False)

    yield put
    choice._first.cache_clear()


CHOICES = [
    # chip; weights; product for int8, fp8, int4, nvfp4 activations
    (Arch("nvidia", 80), "int4", ("triton", None, "int4_mma", None)),
    (Arch("nvidia", 86), "int8", ("triton", None, "grouped", None)),
    (Arch("nvidia", 89), "int4", ("triton", "triton", "int4_mma", None)),
    (Arch("nvidia", 90), "int4", ("triton", "triton", "grouped", None)),
    (Arch("nvidia", 90), "nvfp4", ("triton", "triton", "grouped", None)),
    (Arch("nvidia", 100), "nvfp4", ("triton", "triton", "grouped", "dot_scaled")),
    (Arch("nvidia", 120), "nvfp4", ("triton", "triton", "grouped", "dot_scaled")),
    (Arch("nvidia", 120), "int4", ("triton", "triton", "grouped", None)),
    (Arch("amd"), "int4", ("triton", None, "grouped", None)),
    (Arch("intel"), "int4", ("triton", None, "grouped", None)),
    (None, "int4", (None, None, None, None)),
]


@pytest.mark.parametrize(("arch", "weights", "expected"), CHOICES, ids=lambda v: getattr(v, "vendor", None))
def test_choices(arch, weights, expected, g, on_chip):
    on_chip(arch)
    t = random_layer(g, N, K, weights)
    names = [gpu.choose(t, a, torch.bfloat16, CPU) for a in ("int8", "fp8", "int4", "nvfp4")]
    assert tuple(names) == expected
    assert gpu.choose(t, "int8", torch.float32, CPU) is None
    assert gpu.choose(t, "none", torch.bfloat16, CPU) is None


def test_a_product_by_its_name(g, on_chip, monkeypatch):
    on_chip(Arch("nvidia", 90))
    t = random_layer(g, N, K)
    for name, activations, chosen in (
        ("registers", "int8", "registers"),
        ("grouped", "int8", "grouped"),
        ("int4_mma", "int4", "int4_mma"),  # emulated, but asked for
        ("scaled_mm", "fp8", "scaled_mm"),
        # What cannot take a layer leaves it to the others.
        ("scaled_mm", "int8", "triton"),
        ("dot_scaled", "int8", "triton"),
    ):
        monkeypatch.setenv("SVDQUANT_BACKEND", name)
        assert gpu.choose(t, activations, torch.bfloat16, CPU) == chosen


def test_a_rank_and_a_type_are_another_layer(g):
    t = random_layer(g, N, K)
    before = gpu.signature(t)
    assert gpu.signature(t) is before
    t.proj_down, t.proj_up = t.proj_down[:16], t.proj_up[:, :16]
    narrower = gpu.signature(t)
    t.bias = t.bias.half()
    assert len({before, narrower, gpu.signature(t)}) == 3


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("shape", [(K,), (3, K), (2, 3, K), (2, 1, 3, K)], ids=len)
def test_shapes(shape, precision, g):
    t = random_layer(g, N, K)
    x = random_input(g, 1, torch.Size(shape[:-1]).numel(), K).view(shape)
    y = svdquant_linear(x, t, precision)
    assert y.shape == (*shape[:-1], N) and y.dtype == x.dtype and y.is_contiguous()
    assert relative_error(y.view(-1, N), reference(x.view(-1, K), t, precision, torch.float32)) < 2e-2
    out = torch.full((*shape[:-1], N + 16), float("nan"), dtype=x.dtype)[..., 8 : 8 + N]
    version = out._version
    assert svdquant_linear(x, t, precision, out=out) is out and out._version > version
    assert torch.equal(out, y)
    across = torch.empty((N, *shape[:-1]), dtype=x.dtype).movedim(0, -1)
    assert torch.equal(svdquant_linear(x, t, precision, out=across), y)
    with torch.inference_mode():
        assert torch.equal(svdquant_linear(x, t, precision), y)


@pytest.mark.parametrize("shape", [(0, K), (2, 0, K), (0, 3, K)])
def test_no_rows(shape, g):
    t, x = random_layer(g, N, K), torch.empty(shape, dtype=torch.bfloat16)
    assert svdquant_linear(x, t, "int8").shape == (*shape[:-1], N)
    out = torch.empty((*shape[:-1], N), dtype=x.dtype)
    assert svdquant_linear(x, t, "int8", out=out) is out


def test_inputs_in_any_order(g):
    t = random_layer(g, N, K)
    x = random_input(g, 2, 6, K)
    expected = svdquant_linear(x, t, "int8")
    for other in (
        x.transpose(1, 2).contiguous().transpose(1, 2),
        x.transpose(0, 1).contiguous().transpose(0, 1),
        torch.cat([x, x], -1)[..., K:],
    ):
        assert not other.is_contiguous()
        assert torch.equal(svdquant_linear(other, t, "int8"), expected)


@pytest.mark.parametrize("name", ["triton", "registers", "grouped"])
def test_parameters_in_any_order(name, g, monkeypatch):
    """A branch made by a decomposition often comes transposed."""
    monkeypatch.setenv("SVDQUANT_BACKEND", name)
    t = random_layer(g, N, K)
    x = random_input(g, 1, 5, K)
    expected = svdquant_linear(x, t, "int8")
    for parameter in ("proj_down", "proj_up"):
        value = getattr(t, parameter)
        setattr(t, parameter, value.t().contiguous().t())
        assert not getattr(t, parameter).is_contiguous()
    t.bias = t.bias[:, None].expand(-1, 2).contiguous()[:, 0]
    t.smooth_factor = t.smooth_factor[:, None].expand(-1, 2).contiguous()[:, 0]
    assert torch.equal(svdquant_linear(x, t, "int8"), expected)


def test_strengths_of_the_branch(g):
    t = random_layer(g, N, K)
    x = random_input(g, 2, 3, K)
    strengths = torch.rand(2, 32, generator=g)
    y = svdquant_linear(x, t, "int8", low_scales=strengths)
    for i in range(2):
        assert torch.equal(svdquant_linear(x[i : i + 1], t, "int8", low_scales=strengths[i])[0], y[i])
    # Rows of [M, K] are entries of a batch.
    assert torch.equal(svdquant_linear(x[:, 0], t, "int8", low_scales=strengths), y[:, 0])
    t.proj_down = t.proj_up = None
    assert torch.equal(svdquant_linear(x, t, "int8"), svdquant_linear(x, t, "int8", low_scales=torch.ones(0)))


def test_models_in_float32_are_left_alone(g):
    t, x = random_layer(g, N, K), torch.randn(3, K, generator=g)
    assert not gpu.supports(t, "int8", x.dtype, CPU)
    assert svdquant_linear(x, t, "int8").dtype == torch.float32
    assert not fused.usable(x)


class Wrong(EightBit):
    name = "wrong"

    def multiply(self, q, layers, out, epilogue=None):
        out.fill_(1)


class Broken(EightBit):
    name = "broken"

    def multiply(self, q, layers, out, epilogue=None):
        raise RuntimeError("no compiler\nand more")


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "interpreting", lambda: False)
    monkeypatch.setattr(trial, "_KNOWN", {})
    choice._first.cache_clear()
    yield
    choice._first.cache_clear()


@pytest.mark.parametrize(("product", "why"), [(Wrong, "off"), (Broken, "RuntimeError: no compiler$")])
def test_what_does_not_work_is_passed_over(product, why, g, tried, monkeypatch):
    monkeypatch.delenv("SVDQUANT_BACKEND")
    monkeypatch.setattr(trial, "_ROWS", (4,))
    known = {**choice.products(), product.name: product()}
    monkeypatch.setattr(choice, "products", lambda: known)
    monkeypatch.setitem(choice.ORDER, "int8", (product.name, "triton"))
    monkeypatch.setattr(choice, "works", lambda p, *rest: p.name == "triton" or trial.works(p, *rest))
    t = random_layer(g, N, K)
    with pytest.warns(UserWarning, match=f"{product.name}.*int8.*{why}"):
        assert gpu.choose(t, "int8", torch.bfloat16, CPU) == "triton"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert gpu.choose(random_layer(g, 2 * N, K), "int8", torch.bfloat16, CPU) == "triton"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_works_is_right(dtype, monkeypatch):
    monkeypatch.setattr(trial, "_ROWS", (4,))
    for name, activations in (("triton", "int8"), ("scaled_mm", "fp8"), ("grouped", "int4"), ("dot_scaled", "nvfp4")):
        if (name, dtype) != ("scaled_mm", torch.float16):
            assert trial.trial_error(choice.products()[name], activations, dtype, CPU) < 0.04
    assert trial.elementwise_error(dtype, CPU) < 0.005
    assert trial.weight_only_error(dtype, CPU) < 0.005


def test_kernels_between_products_that_do_not_compile(g, tried, monkeypatch):
    """Definitions in torch, and one warning, instead of an exception."""

    def fail(*args: object) -> float:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(trial, "elementwise_error", fail)
    monkeypatch.setattr(trial, "weight_only_error", fail)
    x, scale = torch.randn(2, 3, 64, generator=g).bfloat16(), torch.randn(2, 64, generator=g).bfloat16()
    with torch.no_grad(), pytest.warns(UserWarning, match="between products.*no compiler"):
        assert fused._kernels(x) is None
        fused.norm_modulate(x, scale, scale, 1e-6)
    t = random_layer(g, N, K)
    with pytest.warns(UserWarning, match="W4A16.*no compiler"):
        assert not linear.supports_weight_only(t.qweight, t.wscales, torch.bfloat16, "int4")


def test_importing_imports_neither_triton_nor_the_compiler():
    code = "import sys, svdquant.kernels; print([m for m in ('triton', 'torch._dynamo') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_what_a_capture_assumes_is_forgotten(monkeypatch, g):
    asked = []
    monkeypatch.setattr(choice, "works", lambda *args: asked.append(args) or True)
    layer = choice.signature(random_layer(g, N, K))
    args = (layer, "int8", torch.float16, torch.device("cpu"))
    choice._first.cache_clear()
    monkeypatch.setattr(choice, "capturing", lambda device: True)
    assert choice._chosen(*args) == choice._chosen(*args) and len(asked) == 2
    monkeypatch.setattr(choice, "capturing", lambda device: False)
    assert choice._chosen(*args) == choice._chosen(*args) and len(asked) == 3
    choice._first.cache_clear()
