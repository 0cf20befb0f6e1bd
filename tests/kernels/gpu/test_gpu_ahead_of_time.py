"""Every kernel compiled for every chip that it is meant for, without a GPU, and the machine code read.

By default one form of each kernel per chip and tensor instruction; SVDQUANT_TEST_ALL_KERNELS=1 compiles all.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="kernels are compiled by Triton, which is not installed (pip install triton)")

import aot
from aot import count

from svdquant.kernels.gpu.ahead_of_time import MODULES, all_specializations, representatives, specializations_of

ALL = os.environ.get("SVDQUANT_TEST_ALL_KERNELS") == "1"


@pytest.fixture(scope="module")
def reports() -> list[dict[str, Any]]:
    return aot.reports(*([] if ALL else ["--brief"]))


def test_machine_code_is_as_expected(reports: list[dict[str, Any]]) -> None:
    problems = [f"{r['target']} {r['name']}: {r['problem']}" for r in reports if r["problem"]]
    assert not problems, "\n".join(problems)


def test_every_kernel_of_every_module_is_there(reports: list[dict[str, Any]]) -> None:
    compiled = {r["kernel"] for r in reports}
    for module in MODULES:
        assert {s.kernel.__name__ for s in specializations_of(module)} <= compiled, module
    targets = {r["target"] for r in reports}
    assert targets >= {"sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"}
    assert all(r["registers"] > 0 for r in reports)


def test_representatives_cover_every_instruction() -> None:
    every = all_specializations()
    chosen = {(s.kernel.__name__, n, s.expects[n]) for s, n in representatives(every)}
    instructions = {name for s in every for names in s.expects.values() for name in names if "MMA" in name}
    assert instructions <= {name for _, _, names in chosen for name in names}


def int4_steps(reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [r for r in reports if r["kernel"] == "int4_linear" and "128x128" in r["name"] and "part" not in r["name"]]


def test_int4_loop_is_only_what_it_must_be(reports: list[dict[str, Any]]) -> None:
    """Per `mma` of 16 x 8 outputs: eight multiply-adds per lane, and nothing that converts its integer sums."""
    found = int4_steps(reports)
    assert {r["target"] for r in found} >= {"sm_80", "sm_89"}
    for r in found:
        products = count(r, "IMMA.16864")
        # Two groups in the loop, 2 x 8 tiles of a warp.
        assert products == 32
        # The few are of divisions that find the tile.
        assert count(r, "I2F") <= 4
        assert count(r, "LDSM.16.M88.4") >= 12
        assert count(r, "LDGSTS.E.BYPASS.128") >= 4
        assert count(r, "LDG.E.64") >= 1
        assert 8 * products <= count(r, "FFMA") <= 8 * products + 300


def test_the_check_can_fail() -> None:
    done = aot.run(str(Path(__file__).with_name("aot_faults.py")))
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["good"]["problem"] is None and found["good"]["registers"] > 16
    assert found["spilled"]["spills"] > 0 and "spilled" in found["spilled"]["problem"]
    assert found["missing"]["problem"] == "none of its instructions is IMMA.16864 or QMMA"
    assert "Error" in found["broken"]["problem"]
    assert found["amd"]["problem"] is None and found["amd"]["registers"] > 0
    # A name that no kernel has must not be taken for success.
    assert found["nothing"] == 1
