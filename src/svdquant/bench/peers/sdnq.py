"""SDNQ: int8 weights and activations as its users get them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..cases import LinearCase
from .base import Peer


class SDNQInt8(Peer):
    name = "sdnq int8"
    family = "sdnq"
    packages = {"sdnq": "sdnq"}  # noqa: RUF012
    _weights = "int8"
    _options: dict[str, Any] = {}  # noqa: RUF012

    def prepare(self, case: LinearCase) -> None:
        from sdnq import SDNQConfig
        from sdnq.quantizer import sdnq_quantize_layer

        _set_threads(case.threads)
        linear = nn.Linear(case.shape.k, case.shape.n, device="meta", dtype=case.dtype)
        linear.weight = nn.Parameter(case.weight.clone(), requires_grad=False)
        linear.bias = nn.Parameter(case.bias.clone(), requires_grad=False)
        config = SDNQConfig(weights_dtype=self._weights, use_quantized_matmul=True, **self._options)
        self._layer, _ = sdnq_quantize_layer(linear, config, torch_dtype=case.dtype)
        if not self._layer.sdnq_dequantizer.use_quantized_matmul:
            raise RuntimeError("it multiplies dequantized weights at this shape")

    def __call__(self, x: Tensor) -> Tensor:
        return self._layer(x)

    @property
    def bytes(self) -> int | None:
        return sum(p.nbytes for p in self._layer.parameters())


def _set_threads(threads: int) -> None:
    """SDNQ multiplies with OpenVINO where that is installed, which would otherwise choose its own number."""
    try:
        from sdnq.kernels.openvino_mm import get_ov_core
    except ImportError:
        return
    core, device = get_ov_core()
    if device == "CPU":
        core.set_property("CPU", {"INFERENCE_NUM_THREADS": threads})
