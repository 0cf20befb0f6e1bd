"""OpenVINO's CPU plugin, given one quantized linear as its own tools would write it.

int8 static: per-row weights, one activation scale from the calibration's largest magnitude, as of its post-training
quantization. int8 and int4 weights: compressed constants, activations quantized as it runs: per token for int8, in the
weights' groups of 128 for int4, which was the fastest setting of each.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from ..cases import LinearCase
from .base import Peer

_GROUP = 128


class _OpenVINO(Peer):
    family = "openvino"
    packages = {"openvino": "openvino.opset13"}  # noqa: RUF012
    keeps_output = True
    counts_bytes = False

    @abstractmethod
    def _product(self, x: Any, case: LinearCase) -> Any:
        """The node of x·Ŵᵀ for a float32 node x."""

    def _dynamic_group(self, case: LinearCase) -> int:
        """Activations per scale; 0 = they are not quantized as it runs."""
        return 0

    def prepare(self, case: LinearCase) -> None:
        import openvino
        import openvino.properties as properties
        from openvino import opset13 as ops
        from openvino.properties import hint

        self._dtype = torch.float32 if case.dtype == torch.float32 else torch.bfloat16
        # Constants may share the memory of what they are made from.
        self._kept: list[Any] = []
        kind = openvino.Type.f32 if self._dtype == torch.float32 else openvino.Type.bf16
        parameter = ops.parameter([case.shape.m, case.shape.k], kind)
        y = self._product(ops.convert(parameter, "f32"), case)
        y = ops.add(y, ops.constant(case.bias.float()[None].numpy()))
        model = openvino.Model([ops.convert(y, kind.get_type_name())], [parameter])
        options = {
            properties.inference_num_threads(): case.threads,
            hint.performance_mode(): hint.PerformanceMode.LATENCY,
            hint.num_requests(): 1,
            hint.inference_precision(): kind,
            hint.dynamic_quantization_group_size(): self._dynamic_group(case),
        }
        self._request = openvino.Core().compile_model(model, "CPU", options).create_infer_request()
        self._y = torch.empty(case.shape.m, case.shape.n, dtype=self._dtype)
        self._request.set_output_tensor(_shared(self._y))
        self._bound: Tensor | None = None
        self._kept.clear()

    def input(self, case: LinearCase) -> Tensor:
        return case.x.to(torch.float32 if case.dtype == torch.float32 else torch.bfloat16)

    def __call__(self, x: Tensor) -> Tensor:
        if self._bound is not x:
            self._request.set_input_tensor(_shared(x))
            self._bound = x
        self._request.infer()
        return self._y

    def _constant(self, array: Any, shape: list[int] | None = None, kind: str | None = None) -> Any:
        """A constant of a numpy array, or of one whose bytes hold numbers of another type."""
        import openvino
        from openvino import opset13 as ops

        self._kept.append(array)
        if kind is None:
            return ops.constant(array)
        tensor = openvino.Tensor(array, openvino.Shape(shape), getattr(openvino.Type, kind))
        self._kept.append(tensor)
        return ops.constant(tensor)


class OpenVINOInt8Static(_OpenVINO):
    name = "openvino int8 static"

    def _product(self, x: Any, case: LinearCase) -> Any:
        import numpy as np
        from openvino import opset13 as ops

        high = np.float32(float(case.calibration.abs().max()))
        low = np.float32(-high * 128 / 127)
        x = ops.fake_quantize(x, low, high, low, high, 256)
        return ops.matmul(x, _int8_weight(self, case), False, True)


class OpenVINOInt8Dynamic(_OpenVINO):
    name = "openvino int8 dynamic"

    def _product(self, x: Any, case: LinearCase) -> Any:
        from openvino import opset13 as ops

        return ops.matmul(x, _int8_weight(self, case), False, True)

    def _dynamic_group(self, case: LinearCase) -> int:
        return case.shape.k


class OpenVINOInt4(_OpenVINO):
    name = "openvino int4 weights"

    @classmethod
    def fits(cls, case: LinearCase) -> str | None:
        return f"K must be a multiple of {_GROUP}" if case.shape.k % _GROUP else None

    def _product(self, x: Any, case: LinearCase) -> Any:
        import numpy as np
        from openvino import opset13 as ops

        n, k = case.shape.n, case.shape.k
        codes, zeros, scales = _four_bit(case.weight.float())
        weight = ops.convert(self._constant(_packed(codes), [n, k // _GROUP, _GROUP], "u4"), "f16")
        zero = ops.convert(self._constant(_packed(zeros), [n, k // _GROUP, 1], "u4"), "f16")
        weight = ops.multiply(ops.subtract(weight, zero), self._constant(scales.half().numpy()))
        weight = ops.reshape(weight, ops.constant(np.array([n, k], np.int64)), False)
        return ops.matmul(x, ops.convert(weight, "f32"), False, True)

    def _dynamic_group(self, case: LinearCase) -> int:
        return _GROUP


def _int8_weight(peer: _OpenVINO, case: LinearCase) -> Any:
    from openvino import opset13 as ops

    weight = case.weight.float()
    scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
    codes = (weight / scale).round().to(torch.int8)
    return ops.multiply(ops.convert(peer._constant(codes.numpy()), "f32"), peer._constant(scale.numpy()))


def _four_bit(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(codes [N, G, 128], zero points [N, G, 1], both uint8 of 0…15, scales [N, G, 1]) of a float32 weight."""
    groups = weight.unflatten(1, (-1, _GROUP))
    low, high = groups.amin(2, keepdim=True).clamp_max(0), groups.amax(2, keepdim=True).clamp_min(0)
    scale = ((high - low) / 15).clamp_min(1e-12)
    zero = (-low / scale).round()
    codes = ((groups / scale).round() + zero).clamp(0, 15)
    return codes.to(torch.uint8), zero.to(torch.uint8), scale


def _packed(codes: Tensor) -> Any:
    """4-bit codes two to a byte, low half first; a single one left over has a byte of its own."""
    flat = codes.flatten()
    if len(flat) % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    return (flat[0::2] | (flat[1::2] << 4)).numpy()


def _shared(tensor: Tensor) -> Any:
    """The same memory as OpenVINO sees it. numpy knows no bfloat16, so its bytes are passed."""
    import openvino

    if tensor.dtype == torch.bfloat16:
        raw = tensor.view(torch.int16).numpy().view("uint16")
        return openvino.Tensor(raw, openvino.Shape(list(tensor.shape)), openvino.Type.bf16)
    return openvino.Tensor(tensor.numpy(), shared_memory=True)
