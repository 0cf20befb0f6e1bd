"""Parts of the GPU suite: wrong kernels are found, a broken device restarts the run, targets are computed right."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from svdquant import SVDQuantConfig
from svdquant.bench.cases import Shape
from svdquant.bench.device import CPU
from svdquant.bench.gpu import GPUSettings, models, run_gpu, session, step
from svdquant.bench.gpu.data import layer_data, random_record, spec_of
from svdquant.bench.gpu.modules import FP8Linear, NF4Linear, UnfusedSVDQuant, stored_bytes
from svdquant.bench.gpu.session import Session
from svdquant.bench.gpu.settings import FULL
from svdquant.bench.gpu.suite import _fresh
from svdquant.bench.gpu.targets import evaluate
from svdquant.bench.gpu.truth import expected_product, sample_input
from svdquant.bench.measure import Spread
from svdquant.bench.results import OURS, Case, Row
from svdquant.kernels import gpu
from svdquant.kernels.gpu.types import Epilogue, HeadNorm, Reading
from svdquant.nn import quantized_layers
from svdquant.numerics import relative_error

CPU_DEVICE = torch.device("cpu")


class Fake:
    """A product that multiplies right, in torch, and then does something to the result."""

    def __init__(self, name: str, change: Any) -> None:
        self.name, self.change = name, change

    def why_not(self, t: Any, activations: str, dtype: Any, arch: Any) -> str | None:
        return None if activations == "int8" else "only int8"

    def reading(self, activations: str) -> Reading:
        return Reading("int8")

    def fuses(self, epilogue: Epilogue, layers: Any) -> bool:
        return epilogue == Epilogue()

    def multiply(self, q: Any, layers: Any, out: torch.Tensor, epilogue: Epilogue = Epilogue()) -> None:  # noqa: B008
        (t,) = layers
        y = (q.codes.float() * q.scales[:, None])[:, : t.qweight.shape[1] * 2] @ t.residual().T
        y += q.low.float() @ t.proj_up.float().T + t.bias.float()
        self.change(y, out)


def right(y: torch.Tensor, out: torch.Tensor) -> None:
    out[0] = y.to(out.dtype)


def wrong(y: torch.Tensor, out: torch.Tensor) -> None:
    out[0] = (1.2 * y).to(out.dtype)


def unwritten(y: torch.Tensor, out: torch.Tensor) -> None:
    out[0, :, 1:] = y[:, 1:].to(out.dtype)


def beyond(y: torch.Tensor, out: torch.Tensor) -> None:
    torch.as_strided(out, (1, y.shape[0], y.shape[1] + 1), out.stride()).zero_()
    out[0] = y.to(out.dtype)


def broken(y: torch.Tensor, out: torch.Tensor) -> None:
    raise RuntimeError("no such instruction\nand more")


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {f.__name__: Fake(f.__name__, f) for f in (right, wrong, unwritten, beyond, broken)}
    monkeypatch.setattr(gpu, "products", lambda: found)
    monkeypatch.setattr("svdquant.kernels.gpu.linear.products", lambda: found)


def test_wrong_products_are_found_and_not_timed(fakes: None) -> None:
    found = run_gpu(GPUSettings(("checks", "layers"), smoke=True, rounds=1), CPU(), "")
    (checked,) = [case for case in found.cases if case.name == "int4 weights, int8 activations"]
    reasons = {row.contender.split(", ")[1]: row.reason for row in checked.rows}
    assert reasons["right"] == "" and reasons["wrong"].startswith("wrong: error 0.2,")
    assert reasons["unwritten"].startswith("wrong: error nan") and reasons["beyond"].startswith("wrong: error inf")
    assert reasons["broken"] == "failed: RuntimeError: no such instruction"
    (layer,) = [case for case in found.cases if case.name == "24x128x64"]
    rows = {row.contender: row for row in layer.rows if row.contender.startswith("ours W4 int8")}
    assert rows["ours W4 int8, right"].milliseconds and rows["ours W4 int8, right: product alone"].milliseconds
    for name in ("wrong", "unwritten", "beyond", "broken"):
        row = rows[f"ours W4 int8, {name}"]
        assert row.reason and row.milliseconds is None
        assert f"ours W4 int8, {name}: product alone" not in rows


class Restarted(BaseException):
    """In place of a process that becomes another."""


def test_a_broken_device_restarts_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def execv(*arguments: Any) -> None:
        raise Restarted

    def synchronize(*_: Any) -> None:
        if healthy[0]:
            return
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    healthy = [True]
    monkeypatch.setattr(session.os, "execv", execv)
    monkeypatch.setattr(session.os, "closerange", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(Session, "on_gpu", True)
    settings = GPUSettings(("checks",), smoke=True)
    run = Session(settings, CPU(), _fresh(settings, CPU(), "command"), tmp_path)
    run.enter("checks")
    run.add(Case("gpu checks", "first", "", {}))
    assert run.attempt("good", lambda: 3) == (3, "")

    def breaks() -> None:
        healthy[0] = False

    with pytest.raises(Restarted):
        run.attempt("bad", breaks)
    healthy[0] = True
    state = session.restored()
    assert state is not None and session.restored() is None and list(tmp_path.iterdir()) == []
    again = Session(settings, CPU(), state, tmp_path)
    again.enter("checks")
    value, reason = again.attempt("bad", lambda: 4)
    assert value is None and reason.startswith("broke the device: RuntimeError: CUDA error: an illegal memory")
    assert again.has("first") and again.attempt("good", lambda: 5) == (5, "")


def test_a_call_that_hangs_restarts_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    monkeypatch.setattr(session.os, "execv", lambda *_: ended.set())
    monkeypatch.setattr(session.os, "closerange", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(Session, "on_gpu", True)
    settings = GPUSettings(("checks",), smoke=True)
    run = Session(settings, CPU(), _fresh(settings, CPU(), ""), tmp_path)
    run.enter("checks")
    run.attempt("endless", lambda: ended.wait(20), limit=0.05)
    state = session.restored()
    assert ended.is_set() and state is not None and state.crashed == {"checks: endless": "hung for 0 s"}


def test_failures_are_remarks() -> None:
    settings = GPUSettings(("checks",), smoke=True)
    run = Session(settings, CPU(), _fresh(settings, CPU(), ""))
    run.enter("checks")

    def fails() -> None:
        raise ValueError("of this kind\nand more")

    assert run.attempt("x", fails) == (None, "failed: ValueError: of this kind")
    run.until = 0.0
    assert not run.fits(1, "y") and run.state.results.notes == [
        "checks: y: left out, 0 of 1 s are left to this section"
    ]


def test_the_truth_in_numpy() -> None:
    """Two stacked layers with norm, rotation; int8 activations."""
    layers = [random_record(64, 32, spec_of("int4", "int8", 4), torch.bfloat16, CPU_DEVICE, seed) for seed in (0, 1)]
    layers[1].smooth_factor, layers[1].proj_down = layers[0].smooth_factor, layers[0].proj_down
    x = sample_input(5, 64, torch.bfloat16, CPU_DEVICE)
    angles = torch.rand(5, 8).repeat_interleave(2, 1)
    weight = torch.rand(16)
    norm = HeadNorm((weight,), 1e-6, 16, angles.cos(), angles.sin())
    found = expected_product(x, layers, "int8", Epilogue(norm=norm)).numpy()
    xs = x.double().numpy() / layers[0].smooth_factor.double().numpy()
    scale = np.abs(xs.astype(np.float32)).max(1, keepdims=True) / np.float32(127)
    codes = np.rint(xs.astype(np.float32) / scale).astype(np.float64) * scale
    outputs = []
    for t in layers:
        nibbles = np.stack([t.qweight.numpy() & 15, t.qweight.numpy() >> 4], -1).reshape(32, 64).astype(int)
        dense = np.where(nibbles > 7, nibbles - 16, nibbles) * t.wscales.double().numpy()
        low = torch.from_numpy(x.double().numpy() @ t.proj_down.double().numpy().T).bfloat16().double().numpy()
        outputs.append(codes @ dense.T + low @ t.proj_up.double().numpy().T + t.bias.double().numpy())
    heads = outputs[0].reshape(5, 2, 16)
    heads = heads / np.sqrt((heads**2).mean(-1, keepdims=True) + 1e-6) * weight.numpy()
    turns = np.exp(1j * angles[:, ::2].double().numpy())[:, None]
    pairs = (heads[..., ::2] + 1j * heads[..., 1::2]) * turns
    outputs[0] = np.stack([pairs.real, pairs.imag], -1).reshape(5, 32)
    assert np.allclose(found, np.concatenate(outputs, 1), rtol=1e-6, atol=1e-6)


def test_linears_of_others() -> None:
    data = layer_data(Shape(64, 256, 128), 16, torch.bfloat16, CPU_DEVICE, 0)
    x = data.inputs[0]
    errors = {}
    for make in (FP8Linear, NF4Linear):
        module = make(data.weight, data.bias)
        errors[make] = relative_error(module(x).float(), data.reference)
        assert module(x[None]).shape == (1, 64, 128)
    # Three bits of mantissa on both sides; sixteen levels of a normal distribution.
    assert 0.02 < errors[FP8Linear] < 0.05 < 0.07 < errors[NF4Linear] < 0.11
    assert stored_bytes(FP8Linear(data.weight, data.bias)) == 256 * 128 + 4 * 128 + 2 * 128
    assert stored_bytes(NF4Linear(data.weight, data.bias)) == 256 * 128 // 2 + 4 * 256 * 128 // 64 + 64 + 2 * 128
    t = data.record("int4", "int8")
    for eight_bit, most in ((False, 0.11), (True, 0.12)):
        unfused = UnfusedSVDQuant(t.residual(), data.smooth, data.down, data.up, data.bias, eight_bit)
        assert relative_error(unfused(x).float(), data.reference) < most


def test_random_quantized_models_are_what_quantizing_makes() -> None:
    pytest.importorskip("diffusers")
    meta = models.meta_model(dict(step_config()), None, torch.bfloat16)
    made = models.random_quantized(meta, SVDQuantConfig(rank=16), CPU_DEVICE)
    assert not any(p.is_meta for p in made.parameters()) and all(p.is_meta for p in meta.parameters())
    layers = quantized_layers(made)
    q, k = layers["transformer_blocks.0.attn.to_q"], layers["transformer_blocks.0.attn.to_k"]
    assert torch.equal(q.proj_down, k.proj_down) and not torch.equal(q.qweight, k.qweight)
    assert layers["transformer_blocks.0.norm1.linear"].spec.kind == "w4a16"
    assert layers["transformer_blocks.0.ff.net.2"].spec.unsigned
    weight = layers["transformer_blocks.0.attn.to_q"].dequantize().weight
    assert 0.01 < float(weight.float().std()) < 0.06


def step_config() -> dict[str, Any]:
    from svdquant.bench.gpu.settings import SMOKE

    return SMOKE.flux


def row(name: str, milliseconds: float, bf16: float = 1.0, **more: Any) -> Row:
    made = Row(name, OURS, more=more)
    made.set_times([milliseconds / 1e3] * 2, [bf16 / 1e3] * 2)
    return made


def test_targets() -> None:
    settings = GPUSettings()
    results = _fresh(settings, CPU(), "").results
    for shape, bf16, int8, fp8 in zip(
        FULL.shapes, (1.0, 3.0, 4.0, 4.0, 5.0), (0.5, 1.5, 2.0, 2.5, 4.0), (0.4, 1.8, 2.4, 2.4, 3.0), strict=False
    ):
        rows = [row("torch bf16", bf16, bf16)]
        rows += [row("int8", int8, bf16, weights="int4"), row("fp8", fp8, bf16, weights="int4")]
        rows += [row("w8", 0.01, bf16, weights="int8")]
        results.cases.append(Case("gpu layers", str(shape), "torch bf16", {}, rows))
    weights = np.array([19, 57, 57, 19, 38])
    totals = [float(weights @ times) for times in ([1, 3, 4, 4, 5], [0.5, 1.5, 2, 2.5, 4], [0.4, 1.8, 2.4, 2.4, 3.0])]
    picture = Case("gpu step", step.case_name(FULL.pictures[0], None), step.BF16, {})
    for name, ms, size in ((step.BF16, 100, 24), (step.FP8, 72, 12), (step.NF4_TORCH, 130, 7)):
        picture.rows.append(row(name, ms, 100))
        picture.rows[-1].bytes = size << 30
    for name in step.OURS_NAMES:
        picture.rows.append(row(name, 80 if "eager" in name else 75, 100))
        picture.rows[-1].bytes = 6 << 30
    results.cases.append(picture)
    costs = Case("gpu costs", "ranks", "", {}, shares={"low-rank branch": Spread.of([0.06])})
    results.cases.append(costs)
    found = {target.name: target for target in evaluate(results, settings)}
    linears = found["linears with 4-bit weights against bf16"]
    assert linears.value == pytest.approx(totals[0] / min(totals[1:])) and linears.met
    values = {name: (round(t.value or 0, 4), t.met) for name, t in found.items() if t is not linears}
    assert values == {
        "step against compiled bf16": (round(100 / 75, 4), False),
        "step against compiled FP8": (round(72 / 75, 4), True),
        "weight memory against FP8": (0.5, True),
        "step against NF4": (round(130 / 75, 4), False),
        "low-rank branch, share of a linear": (0.06, False),
    }
    undecided = evaluate(_fresh(settings, CPU(), "").results, settings)
    assert len(undecided) == 6 and all(t.met is None and t.value is None and t.detail for t in undecided)


def test_the_command_asks_for_the_interpreter(tmp_path: Path) -> None:
    code = (
        "import os, sys; os.environ.pop('TRITON_INTERPRET', None); from svdquant.cli.main import run; "
        "code = run(['bench', '--suite', 'gpu', '--smoke', '--device', 'cpu', '--only', 'ceilings', '-o', "
        "sys.argv[1]]); "
        "from svdquant.kernels.gpu.device import INTERPRET; sys.exit(code or not INTERPRET)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "results.json").is_file()
