"""The library's operations in a program for another processor (`c/driver.c`), called as the library itself is."""

from __future__ import annotations

import ctypes
import struct
import subprocess
from collections.abc import Sequence
from typing import Any

from svdquant.kernels.cpu.structures import Input, Weight

_BYTES = (4, 2, 2, 1)
_SELECT, _LINEAR, _WEIGHT_ONLY = range(3)


class Remote:
    """Stands in for `svdquant.kernels.cpu.linear.operations()`. command: the program, behind its emulator."""

    def __init__(self, command: Sequence[str]) -> None:
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def close(self) -> None:
        """Ends the program."""
        self._input.close()
        self.process.stdout.close()  # type: ignore[union-attr]
        self.process.wait()

    @property
    def _input(self) -> Any:
        return self.process.stdin

    def select(self, variant: str) -> bool:
        """Whether the processor has it."""
        self._send(_SELECT, 0, 0, 0)
        self._part(variant.encode() + b"\0")
        return struct.unpack("<q", self._receive(8)) == (0,)

    # Buffers are the program's own.
    def svdq_input_bytes(self, record: Any) -> int:
        return 1

    def svdq_linear_bytes(self, record: Any, weight: Any) -> int:
        return 1

    def svdq_weight_only_bytes(self, record: Any, weight: Any) -> int:
        return 1

    def svdq_linear(
        self, record: Any, weight: Any, fresh: bool, gelu: bool, y: int, stride: int, y_type: int, scratch: int
    ) -> None:
        self._operate(_LINEAR, record._obj, weight._obj, gelu, y, stride, y_type)

    def svdq_weight_only(self, record: Any, weight: Any, y: int, stride: int, y_type: int, scratch: int) -> None:
        self._operate(_WEIGHT_ONLY, record._obj, weight._obj, False, y, stride, y_type)

    def _operate(self, what: int, r: Input, w: Weight, gelu: bool, y: int, stride: int, y_type: int) -> None:
        assert stride == w.outputs or r.rows < 2
        size = r.rows * w.outputs * _BYTES[y_type]
        self._send(what, gelu, y_type, size)
        self._input.write(bytes(r) + bytes(w))
        elements = {
            r.x: ((r.rows - 1) * r.x_stride + r.features) * _BYTES[r.x_type] if r.rows else 0,
            r.smooth: r.features * _BYTES[r.smooth_type],
            r.ranges: 16 * r.range_count,
            r.low_scales: 4 * w.rank * ((r.low_first + r.rows - 1) // max(r.low_rows, 1) + 1),
        }
        for pointer in (r.x, r.smooth, r.ranges, r.low_scales):
            self._part(None if pointer is None else ctypes.string_at(pointer, elements[pointer]))
        scales = w.outputs * w.groups
        for pointer, count, kind in (
            (w.qweight, w.outputs * w.row_bytes, 3),
            (w.scales, scales, w.scales_type),
            (w.outer, w.outputs * w.outer_blocks, w.outer_type),
            (w.zeros, scales, w.zeros_type),
            (w.down, w.rank * r.features, w.down_type),
            (w.up, w.outputs * w.rank, w.up_type),
            (w.bias, w.outputs, w.bias_type),
        ):
            self._part(None if pointer is None else ctypes.string_at(pointer, count * _BYTES[kind]))
        ctypes.memmove(y, self._receive(size), size)

    def _send(self, *header: int) -> None:
        self._input.write(struct.pack("<4q", *header))

    def _part(self, content: bytes | None) -> None:
        self._input.write(struct.pack("<q", -1 if content is None else len(content)) + (content or b""))

    def _receive(self, size: int) -> bytes:
        self._input.flush()
        data: bytes = self.process.stdout.read(size)  # type: ignore[union-attr]
        assert len(data) == size, "the program ended"
        return data
