"""`svdquant bench --suite gpu`: every line of it in tiny sizes on a CPU, kernels interpreted; refusals."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from svdquant.bench.device import CPU, make_device
from svdquant.bench.gpu import GPUSettings, choose_sections, run_gpu
from svdquant.bench.gpu.settings import SECTIONS, SMOKE, USUAL
from svdquant.bench.gpu.step import case_name
from svdquant.cli.main import run
from svdquant.errors import SVDQuantError
from svdquant.kernels import gpu


@pytest.fixture
def bench(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    monkeypatch.setenv("SVDQUANT_DEBUG", "0")

    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = run(["bench", "--suite", "gpu", *(str(argument) for argument in arguments)])
        return code, *capfd.readouterr()

    return call


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, Any], Path]]:
    """(what the smoke run printed, its JSON, its folder)."""
    folder = tmp_path_factory.mktemp("gpu")
    out = folder / "stdout"
    kept = sys.stdout
    with out.open("w") as sys.stdout:
        try:
            assert run(["bench", "--suite", "gpu", "--smoke", "--device", "cpu", "-o", str(folder)]) == 0
        finally:
            sys.stdout = kept
    yield out.read_text(), json.loads((folder / "results.json").read_text()), folder


def cases(data: dict[str, Any], section: str) -> list[dict[str, Any]]:
    return [case for case in data["cases"] if case["suite"] == f"gpu {section}"]


def test_all_sections_ran(results: tuple[str, dict[str, Any], Path]) -> None:
    _, data, folder = results
    assert {case["suite"] for case in data["cases"]} == {f"gpu {name}" for name in USUAL}
    assert data["notes"] == []
    reasons = {row["reason"].partition(":")[0] for case in data["cases"] for row in case["rows"]}
    assert reasons <= {"", "not installed"}
    assert {"results.json", "results.md"} <= {file.name for file in folder.iterdir()}
    assert data["settings"]["smoke"] and data["versions"]["triton"]


def test_every_interpreted_product_is_checked_and_timed(results: tuple[str, dict[str, Any], Path]) -> None:
    _, data, _ = results
    checked = {row["contender"] for case in cases(data, "checks") for row in case["rows"] if row["error"] is not None}
    timed = {row["contender"] for case in cases(data, "layers") for row in case["rows"] if row["milliseconds"]}
    for name in ("int8, triton", "int8, registers", "int8, grouped", "fp8, triton", "fp8, scaled_mm", "int4, grouped"):
        assert f"ours W4 {name}, the timed size" in checked and f"ours W4 {name}" in timed
    assert {"norm_rotate", "gate_add", "int4 input", "weights only nvfp4, 1 rows"} <= checked
    assert "ours W4A16" in timed


def test_errors_are_those_of_the_formats(results: tuple[str, dict[str, Any], Path]) -> None:
    layers = cases(results[1], "layers")[0]
    errors = {row["contender"]: row["error"] for row in layers["rows"] if row["error"] is not None}
    assert errors["torch bf16"] < 0.004 < errors["fp8 row-wise, eager"] < 0.05
    assert 0.05 < errors["ours W4 int8, triton"] < 0.12 < errors["ours W4 int4, grouped"] < 0.2
    assert errors["ours W4 int8, triton"] == pytest.approx(errors["ours W4 int8, grouped"], rel=0.05)


def test_the_whole_step(results: tuple[str, dict[str, Any], Path]) -> None:
    (case,) = cases(results[1], "step")
    rows = {row["contender"]: row for row in case["rows"]}
    ours, bf16, fp8 = rows["ours W4A8, eager"], rows["bf16, compiled"], rows["fp8 row-wise, compiled"]
    assert ours["bytes"] < fp8["bytes"] < bf16["bytes"] and 0 < ours["error"] < 0.1
    assert rows["ours W4A8, compiled"]["more"]["differs from ours W4A8, eager"] < 0.1
    assert all(row["more"]["peak_bytes"] >= row["bytes"] for row in (ours, bf16, fp8))
    assert set(case["profiles"]) == {row["contender"] for row in case["rows"] if not row["reason"]}


def test_what_is_printed(results: tuple[str, dict[str, Any], Path]) -> None:
    printed, data, folder = results
    text = (folder / "results.md").read_text()
    assert "## targets" in text and "| undecided |" in text and "of ceiling" in text
    assert "gpu repeats equal bits" in printed and "a smoke run is no measurement" in printed
    assert len(data["targets"]) == 6 and all(target["met"] is None for target in data["targets"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "cpu"], "measures nothing on a CPU; try it out there with --smoke"),
        (["--device", "cuda:77"], "--device 'cuda:77' is not here"),
        (["--device", "nonsense"], "--device 'nonsense' is not here"),
        (["--smoke", "--device", "cpu", "--only", "layers,speed"], "--only 'layers,speed' is not some of checks"),
        (["--smoke", "--device", "cpu", "--only", ""], "--only '' is not some of checks"),
        (["--smoke", "--device", "cpu", "--blocks", "2"], "--blocks '2' is not two numbers such as 2,4"),
        (["--smoke", "--device", "cpu", "--blocks", "0,1"], "--blocks '0,1' is not two numbers"),
    ],
)
def test_refusals(bench: Callable[..., Any], tmp_path: Path, arguments: list[str], said: str) -> None:
    code, out, err = bench("-o", tmp_path / "out", *arguments)
    assert (code, out) == (2, "") and len(err.splitlines()) == 1 and said in err
    assert not (tmp_path / "out").exists()


def test_sections_in_the_order_of_their_importance() -> None:
    assert choose_sections(" step, checks") == ("checks", "step")
    assert choose_sections(None) == USUAL and "tuning" in SECTIONS and "tuning" not in USUAL
    with pytest.raises(SVDQuantError, match="joined by commas"):
        choose_sections("all")


def test_devices() -> None:
    assert isinstance(make_device("cpu", None), CPU)
    with pytest.raises((ValueError, RuntimeError)):
        make_device("cuda:77", None)


def small(**more: Any) -> GPUSettings:
    return GPUSettings(smoke=True, rounds=1, **more)


def test_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    from svdquant.kernels.gpu import eight_bit

    two = dict(list(eight_bit.CANDIDATES.items())[:2])
    monkeypatch.setattr(eight_bit, "CANDIDATES", two)
    found = run_gpu(small(sections=("tuning",)), CPU(), "")
    assert [case.name for case in found.cases] == [f"{a} {SMOKE.shapes[0]}" for a in ("int8", "fp8")]
    for case in found.cases:
        names = {"default", *two, *(f"{name}, expanded before" for name in two)}
        assert {row.contender for row in case.rows} == names
        # All the same numbers, whatever the launch.
        assert len({row.error for row in case.rows if row.milliseconds}) == 1


def test_time_runs_out(tmp_path: Path) -> None:
    saved: list[int] = []
    settings = small(budget=0.5)
    settings.save = lambda results: saved.append(len(results.notes))
    found = run_gpu(settings, CPU(), "")
    assert found.cases == [] and len(found.notes) == len(USUAL)
    assert all("left out" in note for note in found.notes)
    assert saved == [*range(1, len(USUAL) + 1), len(USUAL)]


def test_without_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    found = run_gpu(small(sections=("step",)), CPU(), "")
    assert found.cases == [] and found.notes == [
        "step: not run, because diffusers is not installed: pip install diffusers"
    ]


def test_only_some_blocks_are_not_the_transformer() -> None:
    assert case_name(SMOKE.pictures[0], None) == "one step, 64×64, batch 1"
    assert case_name(SMOKE.pictures[0], (1, 2)) == "only 1 double and 2 single blocks, 64×64, batch 1"


def test_the_facade_lists_what_is_measured() -> None:
    assert set(gpu.products()) == set(gpu.PRODUCTS)
