"""Runs a Gluon kernel's source on the CPU: tensors are torch's, layouts are ignored, shared memory is checked.

Gluon has no interpreter. A kernel that spells out the lanes of a warp as dimensions of its tensors needs none: what is
left is element by element, but for the inline assembly, which is interpreted here. `mma` follows the fragment layouts
of the PTX ISA ("Matrix Fragments for mma.m16n8k64" and "… mma.m16n8k16 with floating point type"), lane by lane.

Reads and writes outside a tensor fail, and so does writing an element twice; shared memory is garbage until a copy into
it has been waited for, from the moment the copy is started.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

GARBAGE = torch.Generator().manual_seed(5)


class Pointer:
    """An address, or a tensor of addresses, in the memory behind a tensor, from its first element on."""

    def __init__(self, memory: Tensor, offset: Any = 0, written: Tensor | None = None):
        self.memory, self.offset, self.written = memory, offset, written
        self.dtype = SimpleNamespace(element_ty=memory.dtype)

    @classmethod
    def to(cls, x: Tensor) -> Pointer:
        size = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) + 1
        memory = x.as_strided((size,), (1,))
        return cls(memory, 0, torch.zeros(size, dtype=torch.bool))

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.memory, self.offset + offset, self.written)

    def load(self) -> Tensor:
        assert (self.offset >= 0).all() and (self.offset < len(self.memory)).all(), "reads outside the tensor"
        return self.memory[self.offset.long()]

    def store(self, value: Tensor, mask: Tensor) -> None:
        at = self.offset[mask.expand(self.offset.shape)].long()
        assert (at >= 0).all() and (at < len(self.memory)).all(), "writes outside the tensor"
        assert self.written is not None and not self.written[at].any() and len(at.unique()) == len(at), "written twice"
        self.written[at] = True
        self.memory[at] = value[mask.expand(value.shape)]


class Shared:
    def __init__(self, memory: Tensor):
        self.memory = memory
        self.shape = list(memory.shape)

    def index(self, i: Any) -> Shared:
        assert 0 <= int(i) < self.shape[0]
        return Shared(self.memory[int(i)])

    def slice(self, start: int, length: int, dim: int) -> Shared:
        return Shared(self.memory.narrow(dim, start, length))

    def permute(self, order: list[int]) -> Shared:
        return Shared(self.memory.permute(order))

    def load(self, layout: Any) -> Tensor:
        return self.memory.clone()

    def store(self, value: Tensor) -> None:
        assert value.shape == self.memory.shape
        self.memory.copy_(value)

    def spoil(self) -> None:
        bits = torch.randint(-(2**31), 2**31, tuple(self.shape), generator=GARBAGE).to(torch.int32)
        self.memory.copy_(bits.view(self.memory.dtype))


class AsyncCopy:
    """Copies take effect when the group that they were committed in has been waited for."""

    def __init__(self) -> None:
        self.open: list[tuple[Shared, Tensor]] = []
        self.groups: list[list[tuple[Shared, Tensor]]] = []

    def async_copy_global_to_shared(self, ring: Shared, pointer: Pointer) -> None:
        assert list(pointer.offset.shape) == ring.shape
        self.open.append((ring, pointer.load()))
        ring.spoil()

    def commit_group(self) -> None:
        self.groups.append(self.open)
        self.open = []

    def wait_group(self, outstanding: int) -> None:
        while len(self.groups) > outstanding:
            for ring, value in self.groups.pop(0):
                ring.store(value)


def _minimum(a: Any, b: Any) -> Any:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return torch.minimum(torch.as_tensor(a), torch.as_tensor(b))
    return min(a, b)


def _jit(kernel: Callable[..., Any] | None = None, **options: Any) -> Any:
    return kernel if kernel is not None else _jit


def language(program: list[int]) -> SimpleNamespace:
    """`triton.experimental.gluon.language`; program: [id], changed from launch to launch."""

    def allocate(dtype: torch.dtype, shape: list[int], layout: Any) -> Shared:
        shared = Shared(torch.empty(shape, dtype=dtype))
        shared.spoil()
        return shared

    def inert(*args: Any, **kwargs: Any) -> None:
        return None

    return SimpleNamespace(
        constexpr=lambda value: value,
        int32=torch.int32,
        int64=torch.int64,
        float32=torch.float32,
        float16=torch.float16,
        bfloat16=torch.bfloat16,
        BlockedLayout=inert,
        SliceLayout=inert,
        SwizzledSharedLayout=inert,
        program_id=lambda axis: torch.tensor(program[0]),
        static_range=range,
        cdiv=lambda a, b: -(-a // b),
        minimum=_minimum,
        arange=lambda start, stop, layout: torch.arange(start, stop, dtype=torch.int32),
        expand_dims=lambda x, dim: x.unsqueeze(dim),
        zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
        split=lambda x: (x[..., 0], x[..., 1]),
        join=lambda a, b: torch.stack(torch.broadcast_tensors(a, b), -1),
        permute=lambda x, order: x.permute(order),
        reshape=lambda x, shape: x.reshape(shape),
        convert_layout=lambda x, layout, assert_trivial=False: x,
        exp=torch.exp,
        load=lambda pointer: pointer.load(),
        store=lambda pointer, value, mask: pointer.store(value, mask),
        allocate_shared_memory=allocate,
        inline_asm_elementwise=inline_asm,
    )


def emulated(path: Path, program: list[int]) -> ModuleType:
    """The module of Gluon kernels at `path`, to be called as plain functions."""
    gl = language(program)
    copies = AsyncCopy()
    gluon = SimpleNamespace(jit=_jit, constexpr_function=lambda f: f, language=gl)
    ampere = SimpleNamespace(async_copy=copies)
    fakes: dict[str, Any] = {
        "triton.experimental": SimpleNamespace(gluon=gluon),
        "triton.experimental.gluon": gluon,
        "triton.experimental.gluon.language": gl,
        "triton.experimental.gluon.language.nvidia": SimpleNamespace(ampere=ampere),
        "triton.experimental.gluon.language.nvidia.ampere": ampere,
    }
    spec = importlib.util.spec_from_file_location("emulated_gluon", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with patch.dict(sys.modules, {"triton": ModuleType("triton"), **fakes}):
        spec.loader.exec_module(module)
    return module


# PTX


def _bits(x: Tensor) -> Tensor:
    return x if x.dtype == torch.int32 else x.contiguous().view(torch.int32)


def inline_asm(
    text: str, constraints: str, args: list[Any], dtype: tuple[torch.dtype, ...], is_pure: bool, pack: int
) -> tuple[Tensor, ...]:
    """Registers hold the bits of [row tiles, column tiles, 8, 4]: one value per lane."""
    assert constraints.count("=") == len(dtype) and constraints.count(",") + 1 == len(dtype) + len(args)
    values = torch.broadcast_tensors(*args)
    registers = {f"${len(dtype) + n}": _bits(v.contiguous()) for n, v in enumerate(values)}
    for line in (line.strip().rstrip(";") for line in text.splitlines()):
        if line in ("{", "}") or line.startswith(".reg"):
            continue
        operation, _, rest = line.partition(" ")
        if operation == "mov.b32":
            target, source = (part.strip() for part in rest.split(","))
            registers[target] = _constant(source, values[0]) if source.startswith("0x") else registers[source]
        elif operation == "fma.rn.f32":
            target, *sources = (part.strip() for part in rest.split(","))
            a, b, c = (registers[s].view(torch.float32).double() for s in sources)
            registers[target] = _bits((a * b + c).float())
        elif operation.startswith("mma.sync.aligned."):
            lists = [[r.strip() for r in group.split(",")] for group in re.findall(r"\{([^}]*)\}", rest)]
            d, a, b, c = lists
            results = mma(operation, [registers[r] for r in a], [registers[r] for r in b], [registers[r] for r in c])
            registers.update(zip(d, results, strict=True))
        else:
            raise NotImplementedError(line)
    return tuple(registers[f"${n}"].view(kind) for n, kind in enumerate(dtype))


def _constant(text: str, like: Tensor) -> Tensor:
    return torch.full(like.shape, int(text, 16), dtype=torch.int32)


def mma(operation: str, a: list[Tensor], b: list[Tensor], c: list[Tensor]) -> list[Tensor]:
    """d = a·b + c of tiles 16 x 8, every register [..., 8, 4] with lane = 4·first + second."""
    shape = operation.split(".")[3]
    types = operation.split(".")[6:]
    if shape == "m16n8k64":
        assert types[0] == "s32" and types[2:] == ["s4", "s32"] and types[1] in ("s4", "u4")
        unpack_a, unpack_b = (lambda r: _nibbles(r, types[1] == "s4")), (lambda r: _nibbles(r, True))
        per, depth = 8, 64
    else:
        assert shape == "m16n8k16" and types[0] == types[3] == "f32" and types[1] == types[2]
        half = {"bf16": torch.bfloat16, "f16": torch.float16}[types[1]]
        unpack_a = unpack_b = lambda r: r.unsqueeze(-1).contiguous().view(half).double()
        per, depth = 2, 16
    outer = a[0].shape[:-2]
    matrix_a = torch.zeros(*outer, 16, depth, dtype=torch.float64)
    matrix_b = torch.zeros(*outer, depth, 8, dtype=torch.float64)
    values_a = torch.cat([unpack_a(r).flatten(-3, -2) for r in a], -1)  # [..., lane, i]
    values_b = torch.cat([unpack_b(r).flatten(-3, -2) for r in b], -1)
    for lane in range(32):
        group, thread = lane >> 2, lane % 4
        for i in range(4 * per):
            row = group if i < per or 2 * per <= i < 3 * per else group + 8
            column = thread * per + i % per + (depth // 2 if i >= 2 * per else 0)
            matrix_a[..., row, column] = values_a[..., lane, i]
        for i in range(2 * per):
            row = thread * per + i % per + (depth // 2 if i >= per else 0)
            matrix_b[..., row, group] = values_b[..., lane, i]
    product = matrix_a @ matrix_b
    results = []
    for i in range(4):
        part = torch.zeros(*outer, 32, dtype=torch.float64)
        for lane in range(32):
            row = (lane >> 2) + (8 if i >= 2 else 0)
            part[..., lane] = product[..., row, lane % 4 * 2 + i % 2]
        part = part.unflatten(-1, (8, 4))
        if depth == 64:
            results.append((c[i].long() + part.long()).to(torch.int32))
        else:
            results.append(_bits((c[i].view(torch.float32).double() + part).float()))
    return results


def _nibbles(register: Tensor, signed: bool) -> Tensor:
    codes = torch.stack([register >> 4 * i & 15 for i in range(8)], -1).double()
    return torch.where(codes >= 8, codes - 16, codes) if signed else codes


def launch(kernel: Callable[..., None], program: list[int], grid: int, arguments: Mapping[str, Any]) -> None:
    """Runs programs 0…grid − 1, one after the other; tensors among the arguments become pointers."""
    pointers = {name: Pointer.to(v) if isinstance(v, Tensor) else v for name, v in arguments.items()}
    for i in range(grid):
        program[0] = i
        kernel(**pointers)
