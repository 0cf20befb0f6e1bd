"""The suite of layers on small shapes: errors against independent products, reasons, bytes, the JSON's form."""

from __future__ import annotations

import itertools
import json
from dataclasses import fields

import numpy as np
import pytest
import torch

from svdquant.bench.cases import LinearCase, Shape, linear_case, parse_shape
from svdquant.bench.device import CPU
from svdquant.bench.layers import parts, run_layer, run_layers
from svdquant.bench.ours import OurLayer, Variant, solve, variants
from svdquant.bench.peers import PEERS, choose_peers
from svdquant.bench.peers.base import Peer
from svdquant.bench.report import HEADER, cells, markdown
from svdquant.bench.results import SCHEMA, Case, Results, Row
from svdquant.bench.settings import Settings
from svdquant.errors import SVDQuantError

SHAPE = Shape(8, 256, 192)


class Absent(Peer):
    name, family = "absent", "absent"
    packages = {"no-such-package": "no_such_package_at_all"}  # noqa: RUF012

    def prepare(self, case: LinearCase) -> None:
        raise AssertionError

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        raise AssertionError


class Broken(Absent):
    name, packages = "broken", {}

    def prepare(self, case: LinearCase) -> None:
        raise RuntimeError("no such kernel\nand more")


class Halved(Absent):
    """Multiplies by half the weight: an error of one half, where there is no bias."""

    name, packages = "halved", {}

    def prepare(self, case: LinearCase) -> None:
        self.weight = case.weight.float() / 2
        self.bias = case.bias.float() / 2

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x.float(), self.weight, self.bias)

    @property
    def bytes(self) -> int:
        return 1000


def settings(*peers: type[Peer], **more: object) -> Settings:
    return Settings([SHAPE], peers=peers, rank=16, rounds=2, sample_seconds=0.0, **more)


@pytest.fixture(scope="module")
def case() -> Case:
    return run_layer(SHAPE, settings(Absent, Broken, Halved), CPU(), lambda *_: None)


def test_everyone_has_a_row(case: Case) -> None:
    names = [row.contender for row in case.rows]
    assert names == [v.name for v in variants(SHAPE, 16)] + ["torch bf16", "torch fp32", "absent", "broken", "halved"]
    for row in case.rows:
        assert bool(row.reason) == (row.milliseconds is None) == (row.contender in ("absent", "broken"))


def test_reasons(case: Case) -> None:
    assert case.row("absent").reason == "not installed: pip install no-such-package"
    assert case.row("broken").reason == "failed: RuntimeError: no such kernel"


def test_ratios_and_bytes(case: Case) -> None:
    reference = case.row("torch bf16")
    assert reference.speedup is not None and reference.speedup.median == 1 and reference.bytes == 2 * (256 * 192 + 192)
    for row in case.rows:
        if not row.reason:
            expected = [a / b for a, b in zip(reference.samples_ms, row.samples_ms, strict=True)]
            assert row.speedup is not None and row.speedup.median == pytest.approx(np.median(expected))
            assert row.bytes_ratio == pytest.approx(row.bytes / reference.bytes)
    first, second = (case.row(f"ours W4A8 rank {rank}").samples_ms for rank in (16, 0))
    expected = [1 - b / a for a, b in zip(first, second, strict=True)]
    assert case.shares["low-rank branch"].median == pytest.approx(np.median(expected))
    assert list(case.shares) == ["low-rank branch", "quantizing the input", "new memory for the output"]
    # 4-bit codes, a scale per 64, smoothing, branch and bias.
    k, n = SHAPE.k, SHAPE.n
    assert case.row("ours W4A8 rank 16").bytes == n * k // 2 + 2 * (n * k // 64 + k + 16 * (k + n) + n)


@torch.inference_mode()
def test_parts_are_the_same_product() -> None:
    """Only quantizing and new memory may be missing in them."""
    data = linear_case(SHAPE, torch.bfloat16, 1)
    layer = OurLayer(variants(SHAPE, 16)[0])
    layer.prepare(data)
    known, kept = (part.calls[0] for part in parts(layer, data, itertools.repeat(data.x)))
    expected = layer(data.x)
    assert torch.equal(known(), expected)
    first = kept()
    assert torch.equal(first, expected) and kept().data_ptr() == first.data_ptr()


def test_the_error_of_a_known_product(case: Case) -> None:
    assert case.row("halved").error == pytest.approx(0.5, abs=1e-6)
    assert case.row("torch fp32").error < 1e-6 < case.row("torch bf16").error < 4e-3


def test_the_error_of_ours_in_numpy(case: Case) -> None:
    data = linear_case(SHAPE, torch.bfloat16, 1)
    x, weight, bias = (t.double().numpy() for t in (data.x, data.weight, data.bias))
    expected = x @ weight.T + bias
    assert np.allclose(expected, data.reference.numpy(), atol=1e-3)
    for variant in variants(SHAPE, 16)[:3]:
        with torch.inference_mode():
            y = solve(variant, data.weight, data.bias, data.calibration)(data.x).double().numpy()
        error = np.linalg.norm(y - expected) / np.linalg.norm(expected)
        assert case.row(variant.name).error == pytest.approx(error, rel=1e-3)


def test_quick_solving_means_the_weight() -> None:
    data = linear_case(Shape(4, 384, 256), torch.bfloat16, 1)
    relative = {}
    kinds = (("plain", 0, False, False), ("rank", 32, False, False), ("rotated", 32, True, True))
    for name, rank, rotate, gptq in kinds:
        layer = solve(Variant(name, "int4", "int8", rank, rotate), data.weight, data.bias, data.calibration, gptq)
        dense, bias = layer.tensors().dense()
        assert bias is not None and torch.equal(bias, data.bias.float())
        difference = data.calibration.float() @ (dense - data.weight.float()).T
        relative[name] = float(difference.norm() / (data.calibration.float() @ data.weight.float().T).norm())
    assert relative["plain"] < 0.12 and relative["rank"] < 0.6 * relative["plain"]
    assert relative["rotated"] < relative["rank"]


def test_no_layer_finds_its_input_quantized(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours reuses what it quantized for the call before, where the input is the same; then too little is measured."""
    read: list[int] = []

    def seen(self: OurLayer, x: torch.Tensor) -> torch.Tensor:
        read.append(x.data_ptr())
        return torch.zeros(SHAPE.m, SHAPE.n)

    monkeypatch.setattr(OurLayer, "__call__", seen)
    monkeypatch.setattr(OurLayer, "prepare", lambda *_: None)
    monkeypatch.setattr(OurLayer, "bytes", 1)
    monkeypatch.setattr("svdquant.bench.layers.parts", lambda *_: [])  # one of them is to find it quantized
    run_layer(SHAPE, Settings([SHAPE], rounds=4, rank=16, sample_seconds=0.001), CPU(), lambda *_: None)
    timed = read[2 * len(variants(SHAPE, 16)) :]
    assert len(timed) > 50 and all(a != b for a, b in itertools.pairwise(timed))


def test_modulation_finds_weights_cold() -> None:
    shape = Shape(1, 256, 384)
    case = run_layer(shape, Settings([shape], peers=(Halved,), rounds=1, sample_seconds=0.0), CPU(), lambda *_: None)
    assert [row.contender for row in case.rows[:2]] == ["ours W4A16", "ours W8A16"] and case.facts["cold"]
    assert all(row.more["copies"] == 12 for row in case.rows) and not case.shares
    assert case.row("ours W8A16").error < 0.02 < case.row("ours W4A16").error < 0.2


def test_json_and_tables(case: Case) -> None:
    results = Results("svdquant bench", CPU().describe(), {"torch": "2"}, {"rounds": 2}, "2026-01-01", [case], 1.0)
    data = json.loads(json.dumps(results.to_dict()))
    assert data["schema"] == SCHEMA
    assert set(data) == {"schema", *(f.name for f in fields(Results))}
    assert {"name", "cores", "threads", "instructions"} <= set(data["machine"])
    assert all(set(row) == {f.name for f in fields(Row)} for row in data["cases"][0]["rows"])
    assert all(len(row["samples_ms"]) == (0 if row["reason"] else 2) for row in data["cases"][0]["rows"])
    text = markdown(results)
    assert all(len(cells(row)) == len(HEADER) for row in case.rows)
    assert "not run: absent: not installed: pip install no-such-package" in text
    assert "| halved |" in text and "low-rank branch:" in text


def test_rank_that_does_not_fit() -> None:
    with pytest.raises(SVDQuantError, match="rank 17 exceeds a layer of shape 4x64x16; use --rank 16 or less"):
        run_layers(Settings([Shape(4, 64, 16)], rank=17, rounds=1), CPU())


@pytest.mark.parametrize("text", ["", "12", "1x2", "0x64x64", "4x64x1", "axbxc", "4x64x64x4", "1000000x1000000x64"])
def test_bad_shapes(text: str) -> None:
    with pytest.raises(SVDQuantError, match="shape"):
        parse_shape(text)


def test_peers_by_name() -> None:
    assert parse_shape(" 4X64×128 ") == Shape(4, 64, 128)
    assert choose_peers("all") == PEERS and choose_peers("none") == ()
    assert {peer.family for peer in choose_peers("torchao, openvino")} == {"torchao", "openvino"}
    assert [peer.name for peer in choose_peers("openvino int8 static")] == ["openvino int8 static"]
    for text in ("", "torchao,nothing", "none,all"):
        with pytest.raises(SVDQuantError, match="--peers"):
            choose_peers(text)


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_a_peer_runs_or_says_why(peer: type[Peer]) -> None:
    """Those that are installed are right about the product; the others give a reason."""
    reason = peer.available()
    if reason is not None:
        assert reason and "\n" not in reason
        return
    data = linear_case(Shape(40, 256, 128), torch.bfloat16, 1)
    assert peer.fits(data) is None and peer.versions()
    entry = peer()
    with torch.inference_mode():
        entry.prepare(data)
        y = entry(entry.input(data)).float()
    assert float((y - data.reference).norm() / data.reference.norm()) < 0.25
