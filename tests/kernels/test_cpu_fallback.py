"""Without the compiled library everything runs, and means the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import cpu_truth
import pytest
import torch
from cpu_truth import BF16, DTYPES

from svdquant import SVDQuantError
from svdquant.kernels import svdquant_linear, w4a16_linear

WITHOUT = """
import sys
sys.path[:0] = {path!r}
import torch, cpu_truth
from svdquant.kernels import device_path, svdquant_linear, w4a16_linear
assert device_path(torch.device("cpu")).backend == "dequantize", device_path(torch.device("cpu"))
out = []
for dtype in cpu_truth.DTYPES:
    t = cpu_truth.layer(130, 65, dtype=dtype, rotate=True)
    plain = cpu_truth.layer(130, 65, dtype=dtype, rank=0, kind="w4a16", smooth=False, zeros=True)
    x = cpu_truth.inputs(9, 130, dtype)
    out += [svdquant_linear(x, t, a) for a in ("auto", "int8", "int4", "none")]
    out.append(w4a16_linear(x, plain.qweight, plain.wscales, plain.bias, "int4", plain.wzeros))
torch.save(out, sys.argv[1])
"""


def test_switched_off_by_the_environment(tmp_path):
    here = Path(__file__).parent
    env = {k: v for k, v in os.environ.items() if k not in ("SVDQUANT_BACKEND", "SVDQUANT_CPU_ISA")}
    env["SVDQUANT_CPU_LIBRARY"] = "0"
    code = WITHOUT.format(path=[str(here), str(here.parent)])
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out.pt")], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr
    results = iter(torch.load(tmp_path / "out.pt"))
    for dtype in DTYPES:
        t = cpu_truth.layer(130, 65, dtype=dtype, rotate=True)
        plain = cpu_truth.layer(130, 65, dtype=dtype, rank=0, kind="w4a16", smooth=False, zeros=True)
        x = cpu_truth.inputs(9, 130, dtype)
        for activations in ("int8", "int8", "int4", "none"):
            cpu_truth.check("dequantize", next(results), cpu_truth.output(x, t, activations), t, (dtype, activations))
        cpu_truth.check("dequantize", next(results), cpu_truth.weight_only(x, plain), plain)


@pytest.mark.parametrize("activations", ["fp8", "nvfp4", "none"])
def test_precisions_that_are_not_the_cpus(path, activations, monkeypatch):
    """Dequantized on every path: the same bits."""
    for dtype in DTYPES:
        t = cpu_truth.layer(130, 65, dtype=dtype)
        x = cpu_truth.inputs(9, 130, dtype)
        y = svdquant_linear(x, t, activations)
        monkeypatch.setenv("SVDQUANT_BACKEND", "dequantize")
        assert torch.equal(y, svdquant_linear(x, t, activations))
        monkeypatch.undo()
        if activations == "none":
            cpu_truth.check("dequantize", y, cpu_truth.output(x, t, "none"), t)


def test_backends_by_name(monkeypatch):
    """Whichever is asked for, within a call; unknown ones are refused."""
    t = cpu_truth.layer(130, 65, dtype=BF16)
    x = cpu_truth.inputs(9, 130, BF16)
    expected = cpu_truth.output(x, t, "int8")
    for backend in ("native", "reference", "dequantize", "native"):
        if backend == "native" and cpu_truth.PATHS == ["dequantize"]:
            continue
        monkeypatch.setenv("SVDQUANT_BACKEND", backend)
        cpu_truth.check("dequantize", svdquant_linear(x, t, "int8"), expected, t, backend)
    monkeypatch.setenv("SVDQUANT_BACKEND", "fpga")
    with pytest.raises(SVDQuantError, match="SVDQUANT_BACKEND='fpga' is not one of"):
        svdquant_linear(x, t, "int8")


def test_records_that_do_not_fit(path):
    """Sizes that contradict each other are an error of Python, never a read beyond the end."""
    t = cpu_truth.layer(192, 64, dtype=BF16)
    x = cpu_truth.inputs(4, 192, BF16)
    with pytest.raises(SVDQuantError, match=r"191 features.* takes 192"):
        svdquant_linear(x[:, :191], t, "int8")
    for name, wrong in (
        ("smooth_factor", t.smooth_factor[:100]),
        ("proj_down", t.proj_down[:, :100]),
        ("proj_down", t.proj_down[:3]),
        ("proj_up", t.proj_up[:10]),
        ("bias", t.bias[:10]),
        ("wscales", t.wscales[:10]),
        ("qweight", t.qweight[:, :64]),
    ):
        broken = cpu_truth.layer(192, 64, dtype=BF16)
        setattr(broken, name, wrong.contiguous())
        for activations in ("int8", "int4"):
            with pytest.raises((SVDQuantError, RuntimeError, ValueError)):
                svdquant_linear(x, broken, activations)
    if path != "dequantize":
        # Two scales in place of three: that path would see groups of 96.
        broken = cpu_truth.layer(192, 64, dtype=BF16)
        broken.wscales = broken.wscales[:, :2].contiguous()
        with pytest.raises((SVDQuantError, RuntimeError, ValueError)):
            svdquant_linear(x, broken, "int8")
    plain = cpu_truth.layer(192, 64, dtype=BF16, rank=0, kind="w4a16", smooth=False)
    for arguments in (
        (plain.qweight[:, :64], plain.wscales[:, :2], plain.bias),
        (plain.qweight, plain.wscales[:10], plain.bias),
        (plain.qweight, plain.wscales, plain.bias[:10]),
    ):
        for rows in (1, 4):
            with pytest.raises((SVDQuantError, RuntimeError, ValueError)):
                w4a16_linear(x[:rows], *(a.contiguous() for a in arguments))


def test_inputs_that_are_no_floats(path):
    t = cpu_truth.layer(130, 65, dtype=BF16)
    for dtype in (torch.int64, torch.bool, torch.complex64):
        try:
            y = svdquant_linear(torch.ones(2, 130, dtype=dtype), t, "int8")
        except (SVDQuantError, RuntimeError, TypeError):
            continue
        assert y.shape == (2, 65)
