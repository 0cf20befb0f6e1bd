"""Kernels with a fault each, and what the check says of them, as JSON: run as a program."""

from __future__ import annotations

import json

import triton
import triton.language as tl

from svdquant.kernels.gpu.ahead_of_time import GFX942, examine, main
from svdquant.kernels.gpu.types import Specialization


@triton.jit
def matmul(a, b, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    x = tl.load(a + i[:, None] * SIZE + i[None, :])
    y = tl.load(b + i[:, None] * SIZE + i[None, :])
    tl.store(out + i[:, None] * SIZE + i[None, :], tl.dot(x, y).to(tl.float16))


@triton.jit
def broken(a, b, out, SIZE: tl.constexpr):
    tl.store(out, tl.dot(a, b))


def specialization(kernel: object, size: int, warps: int, *wanted: str) -> Specialization:
    pointers = dict.fromkeys(("a", "b", "out"), "*fp16")
    return Specialization("fault", kernel, pointers, {"SIZE": size}, warps, 1, {80: wanted, GFX942: ("v_mfma",)})


if __name__ == "__main__":
    found = {
        "good": examine(specialization(matmul, 32, 4, "HMMA"), 80),
        # 128 x 128 sums are 256 registers of each lane of two warps, one more than there are.
        "spilled": examine(specialization(matmul, 128, 2, "HMMA"), 80),
        "missing": examine(specialization(matmul, 32, 4, "IMMA.16864", "QMMA"), 80),
        "broken": examine(specialization(broken, 32, 4), 80),
        "amd": examine(specialization(matmul, 32, 4), GFX942),
    }
    said = {k: {"problem": r.problem, "spills": r.spills, "registers": r.registers} for k, r in found.items()}
    print(json.dumps({**said, "nothing": main(["--json", "--module", "expand", "--name", "no such kernel"])}))
