"""Compiles every kernel for a chip that need not be there, and reads what came out: `python -m` this module.

Triton brings its own assembler and disassembler, so this shows on any machine whether the installed Triton turns each
kernel into the instructions it was written for, without spilling registers to memory.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from .types import Specialization

MODULES = (
    "quantize",
    "elementwise",
    "expand",
    "eight_bit",
    "scaled_mm",
    "registers",
    "grouped",
    "nvfp4",
    "weight_only",
    "int4_mma",
)
# AMD's chips have no sm number; their entry in `Specialization.expects` is this one.
GFX942 = 942


@dataclass(frozen=True)
class Report:
    """What one specialization became on one target.

    instructions: occurrences of each machine instruction, with its modifiers ("IMMA.16864.S4.S4"). registers: per
    thread; spills: loads and stores of local memory; shared: bytes of shared memory known at compile time.
    missing: the mnemonics of which one was expected, if none occurs. error: why it did not compile.
    """

    name: str
    kernel: str
    target: str
    seconds: float = 0.0
    registers: int = 0
    spills: int = 0
    shared: int = 0
    instructions: dict[str, int] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    error: str | None = None

    @property
    def problem(self) -> str | None:
        """What is wrong with it; None where nothing is."""
        if self.error is not None:
            return self.error
        if self.missing:
            return f"none of its instructions is {' or '.join(self.missing)}"
        if self.spills:
            return f"{self.spills} accesses to local memory: registers are spilled"
        return None

    def count(self, prefix: str) -> int:
        return sum(n for name, n in self.instructions.items() if name.startswith(prefix))


def specializations_of(module: str) -> list[Specialization]:
    """Those of one module of this package: of its function `specializations`, else of its classes."""
    loaded = importlib.import_module(f"{__package__}.{module}")
    if hasattr(loaded, "specializations"):
        return list(loaded.specializations())
    found: list[Specialization] = []
    for value in vars(loaded).values():
        if isinstance(value, type) and value.__module__ == loaded.__name__ and hasattr(value, "specializations"):
            found += value().specializations()
    if not found:
        raise LookupError(f"{loaded.__name__} has no specializations")
    return found


def all_specializations(modules: Iterable[str] = MODULES) -> list[Specialization]:
    return [s for module in modules for s in specializations_of(module)]


def target_name(number: int) -> str:
    return "gfx942" if number == GFX942 else f"sm_{number}"


def compile_for(s: Specialization, number: int) -> Any:
    """Triton's compiled kernel for sm_`number` (942: AMD's gfx942); raises whatever Triton raises."""
    import triton
    from triton.backends.compiler import GPUTarget

    names = list(s.kernel.arg_names)
    signature = {n: "constexpr" if n in s.constants else s.signature[n] for n in names}
    constants = {(names.index(n),): value for n, value in s.constants.items()}
    aligned = [n for n in names if n in s.aligned or signature[n].startswith("*")]
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    if s.gluon:
        from triton.experimental.gluon._runtime import GluonASTSource as Source
    else:
        from triton.compiler import ASTSource as Source
    source = Source(fn=s.kernel, signature=signature, constexprs=constants, attrs=attributes)
    target = GPUTarget("hip", "gfx942", 64) if number == GFX942 else GPUTarget("cuda", number, 32)
    options = {"num_warps": s.num_warps, "num_stages": s.num_stages}
    if s.maxnreg is not None:
        options["maxnreg"] = s.maxnreg
    return triton.compile(source, target=target, options=options)


def read_cubin(cubin: bytes) -> tuple[str, int]:
    """NVIDIA's machine code as text, and its registers per thread, by the tools in Triton's wheel."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        with open(path, "wb") as file:
            file.write(cubin)
        commands = [[knobs.nvidia.nvdisasm.path, "-c", path], [knobs.nvidia.cuobjdump.path, "-res-usage", path]]
        text, usage = (subprocess.run(c, capture_output=True, text=True, check=True).stdout for c in commands)
    return text, _number(r"REG:(\d+)", usage)


_TENSOR = re.compile(r"^[A-Z]?G?MMA|^UTC\w*MMA|^v_mfma")
_SASS = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.M)
_GCN = re.compile(r"^\s+([a-z]+_[a-z0-9_]+)\b", re.M)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


def examine(s: Specialization, number: int) -> Report:
    """Compiles for one target and reports; a failure to compile is a report too."""
    start = time.perf_counter()
    try:
        compiled = compile_for(s, number)
    except Exception as e:  # Triton's compiler raises many kinds, none of which may hide the other kernels.
        lines = f"{type(e).__name__}: {e}".strip().splitlines()
        reason = lines[0] if len(lines) == 1 else f"{lines[0]} … {lines[-1]}"
        return Report(s.name, s.kernel.__name__, target_name(number), time.perf_counter() - start, error=reason)
    seconds = time.perf_counter() - start
    if number == GFX942:
        text = compiled.asm["amdgcn"]
        instructions = Counter(_GCN.findall(text))
        registers = _number(r"\.vgpr_count:\s*(\d+)", text)
        spills = _number(r"\.vgpr_spill_count:\s*(\d+)", text)
    else:
        text, registers = read_cubin(compiled.asm["cubin"])
        instructions = Counter(_SASS.findall(text))
        spills = sum(n for name, n in instructions.items() if name.split(".")[0] in ("STL", "LDL"))
    expected = tuple(s.expects.get(number, ()))
    missing = () if not expected or any(name.startswith(expected) for name in instructions) else expected
    return Report(
        s.name,
        s.kernel.__name__,
        target_name(number),
        seconds,
        registers,
        spills,
        compiled.metadata.shared,
        dict(sorted(instructions.items())),
        missing,
    )


def representatives(specializations: Iterable[Specialization]) -> list[tuple[Specialization, int]]:
    """One specialization of each kernel per chip and per tensor instruction that it should use there.

    Kernels without such an instruction are only bound by memory and the same everywhere, so sm_90 stands for the other
    chips; sm_86 is left out, because it gets what sm_80 or sm_89 gets.
    """
    chosen: dict[tuple[Any, ...], tuple[Specialization, int]] = {}
    for s in specializations:
        for number, wanted in s.expects.items():
            tensor = any(_TENSOR.search(name) for names in s.expects.values() for name in names)
            if number != 86 and (tensor or number == 90):
                chosen.setdefault((s.kernel.__name__, number, wanted), (s, number))
    return list(chosen.values())


def _line(r: Report) -> str:
    tensor = Counter({k: n for k, n in r.instructions.items() if _TENSOR.search(k)})
    main = ", ".join(f"{n}× {k}" for k, n in tensor.most_common(2))
    state = "ok" if r.problem is None else f"FAIL {r.problem}"
    numbers = f"{r.registers:4d} {r.spills:6d} {r.shared:7d} {r.seconds:6.1f}"
    return f"{r.target:7s} {r.name:56s} {numbers}  {state}{'; ' + main if main else ''}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=f"python -m {__spec__.name if __spec__ else __name__}",
        description="Compile every GPU kernel, without a GPU, and check the machine code.",
    )
    parser.add_argument("--arch", action="append", default=[], help="sm number, e.g. 90, or gfx942; repeatable")
    parser.add_argument("--name", default="", help="only kernels whose name contains this")
    parser.add_argument("--module", action="append", choices=MODULES, help="only kernels of this file; repeatable")
    parser.add_argument("--brief", action="store_true", help="one of each kernel per chip and tensor instruction")
    parser.add_argument("--json", action="store_true", help="print one JSON object per kernel and target")
    options = parser.parse_args(arguments)
    # The interpreter's kernels cannot be compiled, and which kind they are is decided when they are imported.
    os.environ.pop("TRITON_INTERPRET", None)
    numbers = {int(re.sub(r"^(sm_|gfx)", "", a)) for a in options.arch}
    every = [s for s in all_specializations(options.module or MODULES) if options.name in s.name]
    pairs = representatives(every) if options.brief else [(s, number) for s in every for number in s.expects]
    failed = total = 0
    if not options.json:
        print(f"{'target':7s} {'kernel':56s} regs spills  shared      s", flush=True)
    for s, number in pairs:
        if numbers and number not in numbers:
            continue
        report = examine(s, number)
        total += 1
        failed += report.problem is not None
        if options.json:
            print(json.dumps({**asdict(report), "problem": report.problem}), flush=True)
        else:
            print(_line(report), flush=True)
    print(f"{total - failed} of {total} are as they should be", file=sys.stderr)
    return 1 if failed or not total else 0


if __name__ == "__main__":
    sys.exit(main())
