"""No byte beyond an argument is touched: arguments end, or begin, where memory that may not be accessed does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import cpu_truth
import pytest

GUARDED = """
import copy, ctypes, mmap, sys
sys.path[:0] = {path!r}
import torch, cpu_truth
from svdquant.kernels import svdquant_linear, w4a16_linear

libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
PAGE = mmap.PAGESIZE
pages = []

def guarded(value, at_end):
    "A copy of a tensor whose neighbour is a page that may not be accessed."
    value = value.detach().contiguous()
    count = value.numel() * value.element_size()
    inner = -(-count // PAGE) * PAGE
    area = mmap.mmap(-1, inner + 2 * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    assert libc.mprotect(start, PAGE, 0) == 0 and libc.mprotect(start + PAGE + inner, PAGE, 0) == 0
    pages.append(area)
    offset = PAGE + (inner - count if at_end else 0)
    raw = torch.frombuffer(area, dtype=torch.uint8, count=count, offset=offset)
    out = raw.view(value.dtype).view(value.shape)
    return out.copy_(value)

def guard(t, at_end):
    moved = copy.copy(t)
    for name, value in t.named().items():
        setattr(moved, name, guarded(value, at_end))
    return moved

def check(a, b):
    assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))

LAYERS = [
    dict(), dict(weights="nvfp4"), dict(weights="int8"), dict(group=16), dict(group=128), dict(rotate=True),
    dict(unsigned=((0, 1),)), dict(rank=1, smooth=False, bias=False), dict(rank=33), dict(weights="int8", group=64),
]
PLAIN = [dict(), dict(zeros=True), dict(weights="int8"), dict(weights="nvfp4"), dict(group=16), dict(group=128)]
cases = 0
for path in cpu_truth.PATHS:
    with cpu_truth.running(path):
        for k, n in ((1, 1), (100, 65), (130, 7), (300, 128)):
            for dtype in cpu_truth.DTYPES:
                for rows in (1, 5):
                    x = cpu_truth.inputs(rows, k, dtype)
                    for options in LAYERS:
                        t = cpu_truth.layer(k, n, dtype=dtype, **options)
                        for a in ("int8", "int4"):
                            y = svdquant_linear(x, t, a)
                            for at_end in (True, False):
                                check(svdquant_linear(guarded(x, at_end), guard(t, at_end), a), y)
                                cases += 1
                    for options in PLAIN:
                        t = cpu_truth.layer(k, n, dtype=dtype, rank=0, kind="w4a16", smooth=False, **options)
                        y = w4a16_linear(x, t.qweight, t.wscales, t.bias, t.spec.weights, t.wzeros)
                        for at_end in (True, False):
                            m, there = guard(t, at_end), guarded(x, at_end)
                            check(w4a16_linear(there, m.qweight, m.wscales, m.bias, t.spec.weights, m.wzeros), y)
                            cases += 1
                    pages.clear()
print(cases)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="protects pages with mprotect")
@pytest.mark.skipif(cpu_truth.PATHS == ["dequantize"], reason="no code of ours reads memory there")
def test_arguments_at_the_edge_of_what_may_be_read():
    here = Path(__file__).parent
    env = dict(os.environ, SVDQUANT_BACKEND="native")
    code = GUARDED.format(path=[str(here), str(here.parent)])
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", code], capture_output=True, text=True, env=env, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 1000
