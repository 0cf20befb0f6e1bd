"""transformers: text encoders that are quantized, saved and loaded with the method "svdquant"."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer

from ..checkpoint.header import TensorInfo, read_header
from ..checkpoint.skeleton import DTYPES, check_load_dtype, check_tensors, fixed_names, install_layers, set_tensor
from ..config import SVDQuantConfig
from ..errors import SVDQuantError
from ..nn import FIXED_DTYPE, quantized_layers
from . import common


def register(module: ModuleType) -> None:
    """Adds "svdquant" to the tables of `transformers.quantizers.auto`."""
    module.AUTO_QUANTIZER_MAPPING["svdquant"] = SVDQuantHfQuantizer
    module.AUTO_QUANTIZATION_CONFIG_MAPPING["svdquant"] = SVDQuantConfig


def attach(model: Any, config: SVDQuantConfig) -> None:
    """Marks a transformers model whose layers are quantized already."""
    config = common.record_layers(model, config)
    common.mark(model, SVDQuantHfQuantizer(config, pre_quantized=True))
    model.config.quantization_config = config
    common.protect(model)


class SVDQuantHfQuantizer(HfQuantizer):
    """Loads quantized checkpoints; quantizes 16-bit ones, data-free, once they are loaded."""

    requires_calibration = False
    quantization_config: SVDQuantConfig
    pre_quantized: bool

    def __init__(self, quantization_config: SVDQuantConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._where = ""

    def validate_environment(self, *_args: Any, device_map: Any = None, **_kwargs: Any) -> None:
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise SVDQuantError("device_map puts layers on disk, which would cast their scales; keep them on cpu")

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        check_load_dtype(dtype)
        return dtype

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        names = getattr(converter, "target_patterns", None) or [""]
        if str(names[0]).rpartition(".")[2] in FIXED_DTYPE:
            return None
        return super().get_new_dtype(converter, param, dtype)

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **_kwargs: Any
    ) -> Any:
        if not self.pre_quantized:
            return model
        files = [Path(file) for file in checkpoint_files or []]
        self._where = str(files[0].parent) if files else type(model).__name__
        for name in self.quantization_config.layers or {}:
            _widen(model, name)
        install_layers(model, self.quantization_config, self._where)
        found: dict[str, TensorInfo] = {}
        for file in files:
            if file.suffix != ".safetensors":
                raise SVDQuantError(f"{file}: pickle files can run code; convert to safetensors")
            found |= read_header(file)[0]
        if files:
            self._check(model, found)
        return model

    def _check(self, model: Any, found: dict[str, TensorInfo]) -> None:
        """Compares our layers only; tied and renamed weights of the rest are transformers' own business."""
        prefixes = tuple(f"{name}." for name in quantized_layers(model))
        expected = {name: t for name, t in model.state_dict().items() if name.startswith(prefixes)}
        renamed = dict(zip(model_keys(list(found), model, self), found.values(), strict=True))
        packed = {"qweight", "wscales", "wcscales", "smooth_factor", "proj_down", "proj_up"}
        ours = {n: i for n, i in renamed.items() if n in expected or n.rpartition(".")[2] in packed}
        fixed = fixed_names(model)
        check_tensors(expected, ours, self._where, fixed)
        for name in fixed:
            # transformers casts to the type of the model's own parameter.
            dtype = DTYPES[ours[name].dtype]
            if expected[name].dtype != dtype:
                set_tensor(model, name, torch.empty_like(expected[name], dtype=dtype, device="meta"))

    def _process_model_after_weight_loading(self, model: Any, **_kwargs: Any) -> Any:
        if self.pre_quantized:
            for name, layer in quantized_layers(model).items():
                _check_arrived(name, layer, self._where)
                layer.requires_grad_(False)
            attach(model, self.quantization_config)
            return model
        from ..ptq.quantize import quantize

        quantize(model, self.quantization_config)
        attach(model, self.quantization_config)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[Any, dict[str, str]]:
        common.refuse_adapters(model.state_dict())
        return None, {}

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        common.dequantize_layers(model)
        common.unprotect(model)
        return model

    def is_serializable(self, *_args: Any, **_kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def _widen(model: Any, name: str) -> None:
    """Gives a linear that transformers will keep in float32 that type before it is replaced.

    A packed one without branch has no tensor to show it by, and T5 asks `wo` for the type of its input.
    """
    dtype = model.dtype
    kept = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        kept |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    if kept & set(name.split(".")) and dtype != torch.float32:
        with contextlib.suppress(AttributeError):  # a missing layer is named later
            model.get_submodule(name).to(torch.float32)


def _check_arrived(name: str, layer: nn.Module, where: str) -> None:
    # transformers initialises what a file lacks, and marks what it loaded.
    for leaf, parameter in layer.named_parameters():
        if not getattr(parameter, "_is_hf_initialized", False):
            raise SVDQuantError(f"{where}: tensor {name}.{leaf} is missing; download or save the model again")


def model_keys(keys: list[str], model: Any, quantizer: HfQuantizer | None = None) -> list[str]:
    """The names in the model of the tensors in a file: transformers adds, drops or renames parts of them."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    state = model.state_dict()
    renamings = [r for r in get_model_conversion_mapping(model, None, quantizer) if isinstance(r, WeightRenaming)]
    out = []
    for key in keys:
        candidates = (rename_source_key(key, rules, [], model.base_model_prefix, state)[0] for rules in (renamings, []))
        out.append(key if key in state else next((name for name in candidates if name in state), key))
    return out


# Where this module is imported before the library's table, importing it is what has loaded that table.
if "transformers.quantizers.auto" in sys.modules:
    register(sys.modules["transformers.quantizers.auto"])
