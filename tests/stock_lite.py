"""diffusers' own `nunchaku_lite` on a CPU: its loader, modules and forwards as they are, its kernels in float64.

The kernels are written from their arguments and from `nunchaku64`; nothing of the package takes part. Activations are
not quantized, so that what a stock model computes is what its file means.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers.utils
import numpy as np
import nunchaku64
import torch
from diffusers.utils import constants
from torch import Tensor

_MODULE = "diffusers.quantizers.nunchaku.utils"


class Kernels:
    """What the stock module calls `ops`. calls: how many products of each kind there were."""

    def __init__(self) -> None:
        self.calls = {"w4a4": 0, "w4a16": 0}
        self._inputs: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def quantize_w4a4_act_fuse_lora(
        self, x: Tensor, codes: Tensor, ascales: Tensor, down: Tensor, low: Tensor, smooth: Tensor, *_flags: bool
    ) -> None:
        assert codes.shape[0] % 256 == 0 and low.shape == (codes.shape[0], down.shape[1])
        self._inputs = {id(codes): (x, down, smooth)}

    def gemm_w4a4(self, codes: Tensor, qweight: Tensor, out: Tensor, *rest: Any) -> None:
        names = ("ascales", "wscales", "low", "up", "bias", "unsigned", "nvfp4", "alpha", "wcscales")
        at = dict(zip(names, (1, 2, 5, 6, 12, 16, 19, 20, 21), strict=True))
        given = {name: rest[place] for name, place in at.items()}
        x, down, smooth = self._inputs.pop(id(codes))
        layer = {"qweight": qweight, "wscales": given["wscales"], "smooth_factor": smooth, "proj_down": down}
        layer |= {"proj_up": given["up"], "bias": given["bias"]}
        layer |= {"wtscale": given["alpha"], "wcscales": given["wcscales"]} if given["nvfp4"] else {}
        layer = {name: value.detach() for name, value in layer.items() if value is not None}
        assert not given["unsigned"]
        out.copy_(torch.from_numpy(nunchaku64.run_w4a4(layer, x.detach().double().numpy())))
        self.calls["w4a4"] += 1

    def gemv_awq(self, x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor, *sizes: int) -> Tensor:
        rows, n, k, group = sizes
        assert rows == len(x) and group == 64
        layer = {"qweight": qweight.detach(), "wscales": scales.detach(), "wzeros": zeros.detach()}
        weight, _ = nunchaku64.dense_awq(layer, n, k, group)
        self.calls["w4a16"] += 1
        return torch.from_numpy(np.asarray(x.detach().double()) @ weight.T).to(x.dtype)

    def awq_gemm_w4a16_g64_int32(self, x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        return self.gemv_awq(x, qweight, scales, zeros, len(x), 4 * qweight.shape[0], x.shape[1], 64)


@contextlib.contextmanager
def stock_lite() -> Iterator[Kernels]:
    """diffusers as on a machine with the kernels and a GPU that they support."""
    kernels, before = Kernels(), sys.modules.pop(_MODULE, None)
    package = types.ModuleType("kernels")
    package.get_kernel = lambda *_args, **_kwargs: types.SimpleNamespace(ops=kernels)  # type: ignore[attr-defined]
    quantizer = diffusers.quantizers.nunchaku.nunchaku_quantizer.NunchakuLiteQuantizer
    with (
        mock.patch.dict(sys.modules, {"kernels": package}),
        mock.patch.object(diffusers.utils, "is_kernels_available", lambda: True),
        mock.patch.object(diffusers.utils, "is_kernels_version", lambda *_: True),
        mock.patch.object(constants, "DIFFUSERS_TRUST_REMOTE_KERNELS", True),
        mock.patch.object(quantizer, "validate_environment", lambda *_args, **_kwargs: None),
    ):
        try:
            yield kernels
        finally:
            sys.modules.pop(_MODULE, None)
            if before is not None:
                sys.modules[_MODULE] = before


def load(folder: Path, cls: Any, dtype: torch.dtype) -> Any:
    """A folder, within `stock_lite`; fails where a name or a shape is not one that diffusers' modules have."""
    model, info = cls.from_pretrained(folder, torch_dtype=dtype, output_loading_info=True, low_cpu_mem_usage=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    return model.eval()
