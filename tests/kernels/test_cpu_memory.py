"""Bytes: what a layer holds, what a call needs beside its result, what stays behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import cpu_truth
import pytest
import torch
from cpu_truth import BF16

from svdquant.config import LayerSpec
from svdquant.kernels import svdquant_linear
from svdquant.nn.linear import empty_tensors

MB = 2**20
native = pytest.mark.skipif(cpu_truth.PATHS == ["dequantize"], reason="the dequantize path makes dense weights")
linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from /proc")

MEASURE = """
import ctypes, json, sys
sys.path[:0] = {path!r}
import torch, cpu_truth
from svdquant.kernels import svdquant_linear, w4a16_linear

def status(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

def growth(run):
    "(bytes at the peak of run(), bytes left after it) beyond those before."
    trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: 0)
    trim(0)
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    run()
    trim(0)
    return status("VmHWM") - before, status("VmRSS") - before

out = {{}}
torch.set_num_threads({threads})
with torch.inference_mode():
{body}
print(json.dumps(out))
"""


def measure(body: str, threads: int = 1) -> dict[str, list[int]]:
    here = Path(__file__).parent
    code = MEASURE.format(path=[str(here), str(here.parent)], body=body, threads=threads)
    # Every large block is mapped and unmapped, so that the resident bytes are those in use.
    env = dict(os.environ, MALLOC_ARENA_MAX="2", MALLOC_MMAP_THRESHOLD_="1048576")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_bytes_of_a_layer():
    """0.30 of a bf16 linear's, at K = N = 3072 and rank 32."""
    stored = empty_tensors(3072, 3072, True, LayerSpec(), BF16)
    assert sum(t.numel() * t.element_size() for t in stored.values()) <= 0.30 * 2 * (3072 * 3072 + 3072)


@native
@linux
def test_running_keeps_no_second_copy_of_the_weights():
    """Eight layers of 3072², 43 MB packed: what is left after their first calls is no copy of them."""
    out = measure("""
    small = cpu_truth.layer(256, 256, dtype=torch.bfloat16)
    svdquant_linear(torch.ones(4, 256, dtype=torch.bfloat16), small, "int8")
    w4a16_linear(torch.ones(1, 256, dtype=torch.bfloat16), small.qweight, small.wscales, small.bias)
    layers = [cpu_truth.layer(3072, 3072, dtype=torch.bfloat16, rank=32, seed=i) for i in range(8)]
    x = cpu_truth.inputs(64, 3072, torch.bfloat16)
    packed = sum(t.nbytes() for t in layers)
    def run():
        for t in layers:
            svdquant_linear(x, t, "int8"), svdquant_linear(x, t, "int4")
            w4a16_linear(x[:1], t.qweight, t.wscales, t.bias)
    out["first"] = growth(run)
    out["second"] = growth(run)
    out["packed"] = packed
""")
    assert out["packed"] > 40 * MB
    assert out["first"][1] < out["packed"] / 8, out
    assert out["second"][1] < out["packed"] / 8, out


@native
@linux
def test_scratch_of_a_long_input():
    """16,384 tokens: beside the result, a call needs no more than SCRATCH_LIMIT and what a small call does."""
    from svdquant.kernels.cpu.linear import SCRATCH_LIMIT

    out = measure(
        """
    t = cpu_truth.layer(3072, 256, dtype=torch.bfloat16, rank=32)
    plain = cpu_truth.layer(3072, 256, dtype=torch.bfloat16, rank=0, kind="w4a16", smooth=False)
    x = torch.ones(16384, 3072, dtype=torch.bfloat16)
    svdquant_linear(x[:64], t, "int8"), svdquant_linear(x[:64], t, "int4")
    w4a16_linear(x[:64], plain.qweight, plain.wscales, plain.bias)
    out["A8"] = growth(lambda: svdquant_linear(x, t, "int8"))
    out["A4"] = growth(lambda: svdquant_linear(x, t, "int4"))
    out["16 bits"] = growth(lambda: w4a16_linear(x, plain.qweight, plain.wscales, plain.bias))
    def forget():
        global x
        svdquant_linear(x, t, "int8")
        x = x.clone()
    out["after x"] = growth(forget)
    x = x.half()
    w4a16_linear(x[:64], plain.qweight, plain.wscales, plain.bias)
    out["16 bits, float16"] = growth(lambda: w4a16_linear(x, plain.qweight, plain.wscales, plain.bias))
    """,
        threads=2,
    )
    result = 16384 * 256 * 2
    beside = {name: round((peak - result) / MB, 1) for name, (peak, _) in out.items() if name != "after x"}
    # Scales and sums of codes come beside the codes.
    assert max(beside.values()) < 1.25 * SCRATCH_LIMIT / MB + 4, beside
    # Codes of the last input stay for linears that read it too, as long as it lives.
    assert max(left for _, left in out.values()) < SCRATCH_LIMIT, out
    assert out["after x"][1] < 4 * MB, out


@native
@linux
def test_nothing_is_lost_call_by_call():
    out = measure("""
    t = cpu_truth.layer(640, 256, dtype=torch.bfloat16)
    plain = cpu_truth.layer(640, 256, dtype=torch.bfloat16, rank=0, kind="w4a16", smooth=False)
    def run(calls):
        for i in range(calls):
            x = torch.ones(1 + i % 60, 640, dtype=torch.bfloat16)
            svdquant_linear(x, t, "int8"), svdquant_linear(x, t, "int4")
            w4a16_linear(x, plain.qweight, plain.wscales, plain.bias)
    run(120)
    out["many"] = growth(lambda: run(600))
    """)
    assert out["many"][1] < 2 * MB, out


def test_results_own_their_memory(path):
    """No result is a view of scratch that the next call overwrites."""
    t = cpu_truth.layer(200, 64, dtype=BF16)
    x = cpu_truth.inputs(20, 200, BF16)
    first = svdquant_linear(x, t, "int8")
    kept = first.clone()
    for seed in range(5):
        svdquant_linear(cpu_truth.inputs(20, 200, BF16, seed + 5), t, "int8")
    assert torch.equal(first, kept) and first.untyped_storage().nbytes() == first.numel() * 2
