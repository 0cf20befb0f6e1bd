"""diffusers: `from_pretrained`, `save_pretrained` and pipelines know the quantization method "svdquant"."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from ..checkpoint.header import TensorInfo, read_header
from ..checkpoint.skeleton import (
    DTYPE_NAMES,
    aligned,
    check_load_dtype,
    check_tensors,
    fixed_names,
    install_layers,
    is_aligned,
    set_tensor,
)
from ..config import SVDQuantConfig
from ..errors import SVDQuantError
from ..families import family_of, fused
from ..nn import QUANTIZED
from ..ptq.linears import find_blocks
from . import common
from .on_load import GroupSolver, solving_device


def register(module: ModuleType) -> None:
    """Adds "svdquant" to the tables of `diffusers.quantizers.auto`."""
    module.AUTO_QUANTIZER_MAPPING["svdquant"] = SVDQuantQuantizer
    module.AUTO_QUANTIZATION_CONFIG_MAPPING["svdquant"] = SVDQuantConfig


def attach(model: Any, config: SVDQuantConfig) -> None:
    """Marks a diffusers model whose layers are quantized already."""
    config = common.record_layers(model, config)
    common.mark(model, SVDQuantQuantizer(config, pre_quantized=True))
    model.register_to_config(quantization_config=config)
    common.protect(model)
    name_repeated_blocks(model)
    fused.install(model)


def name_repeated_blocks(model: Any) -> None:
    """Where diffusers does not say what `compile_repeated_blocks` compiles: the blocks of this model."""
    if not model._repeated_blocks:
        blocks = [model.get_submodule(name) for name in find_blocks(model, family_of(model))]
        model._repeated_blocks = sorted({type(block).__name__ for block in blocks})


class SVDQuantQuantizer(DiffusersQuantizer):
    """Loads quantized checkpoints, and quantizes 16-bit ones, data-free, while they are loaded.

    Everything is compared with the files' headers before a tensor is loaded; a difference raises `SVDQuantError`.
    """

    use_keep_in_fp32_modules = True
    quantization_config: SVDQuantConfig
    pre_quantized: bool

    def __init__(self, quantization_config: SVDQuantConfig, **kwargs: Any) -> None:
        # Loading a single original file never says which of the two it is.
        kwargs.setdefault("pre_quantized", quantization_config.layers is not None)
        super().__init__(quantization_config, **kwargs)
        self._keys: list[str] = []
        self._files: list[Path] = []
        self._solver: GroupSolver | None = None
        self._solved: set[str] = set()

    def validate_environment(
        self, *_args: Any, torch_dtype: torch.dtype | None = None, device_map: Any = None, **_kwargs: Any
    ) -> None:
        check_load_dtype(torch_dtype)
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise SVDQuantError("device_map puts layers on disk, which would cast their scales; keep them on cpu")

    def adjust_max_memory(self, max_memory: dict[Any, Any]) -> dict[Any, Any]:
        return {device: size * 0.9 if isinstance(size, (int, float)) else size for device, size in max_memory.items()}

    def get_cuda_warm_up_factor(self) -> int:
        # Most elements are bytes, which are counted as if they had 16 bits.
        return 2

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        # Kept and edited later: diffusers compares this very list with the model to find missing keys.
        self._keys = list(loaded_keys)
        self._files = [Path(file) for file in checkpoint_files]
        return self._keys

    def _process_model_before_weight_loading(
        self,
        model: Any,
        device_map: Any = None,
        keep_in_fp32_modules: list[str] | None = None,
        state_dict: dict[str, Tensor] | None = None,
        **_kwargs: Any,
    ) -> None:
        where = str(self._files[0].parent) if self._files else type(model).__name__
        # Before accelerate's hooks take hold of the forwards.
        fused.install(model)
        if self.pre_quantized:
            install_layers(model, self.quantization_config, where)
            found = self._headers(state_dict)
            ignored = model._keys_to_ignore_on_load_unexpected or []
            check_tensors(model.state_dict(), found, where, fixed_names(model), ignored)
            return
        self._solver = GroupSolver(model, self.quantization_config, keep_in_fp32_modules, solving_device(device_map))
        if state_dict is not None:
            loaded = self._solver.take(state_dict)
            state_dict.clear()
            state_dict.update(loaded)
            return
        pending = self._solver.keys
        if lacking := sorted(pending - set(self._keys)):
            raise SVDQuantError(f"{where}: tensor {lacking[0]} is missing; download the 16-bit model again")
        # The weights will become other tensors: neither they nor those are to be reported.
        self._keys[:] = [key for key in self._keys if key not in pending]
        self._solved = {key.rpartition(".")[0] for key in pending}

    def _headers(self, state_dict: dict[str, Tensor] | None) -> dict[str, TensorInfo]:
        if state_dict is not None:
            return {
                name: TensorInfo(DTYPE_NAMES.get(t.dtype, str(t.dtype)), tuple(t.shape), t.nbytes)
                for name, t in state_dict.items()
            }
        found: dict[str, TensorInfo] = {}
        for file in self._files:
            if file.suffix != ".safetensors":
                raise SVDQuantError(f"{file}: pickle files can run code; convert to safetensors")
            found |= read_header(file)[0]
        return found

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        if self.pre_quantized:
            return missing_keys
        return [key for key in missing_keys if key.rpartition(".")[0] not in self._solved]

    def maybe_update_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        return state_dict if self._solver is None else self._solver.take(state_dict)

    @property
    def supports_parallel_loading(self) -> bool:
        return False

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **_kwargs: Any
    ) -> bool:
        return _keeps_type(model, param_name) or not is_aligned(param_value)

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: Any,
        state_dict: dict[str, Tensor],
        *_args: Any,
        **_kwargs: Any,
    ) -> None:
        if _keeps_type(model, param_name):
            # `param_value` has been cast to the model's type already; the stored one is in the state dict.
            set_tensor(model, param_name, state_dict[param_name].to(target_device))
        else:
            set_tensor(model, param_name, aligned(param_value).to(target_device))

    def check_quantized_param_shape(self, param_name: str, current: Tensor, loaded: Tensor) -> bool:
        if current.shape != loaded.shape:
            raise SVDQuantError(f"tensor {param_name} has the shape {list(loaded.shape)}, not {list(current.shape)}")
        return True

    def _process_model_after_weight_loading(self, model: Any, **_kwargs: Any) -> Any:
        if self._solver is not None:
            self._solver.finish(type(model).__name__)
        config = common.record_layers(model, self.quantization_config)
        self.quantization_config, self.pre_quantized = config, True
        self._keys, self._files, self._solver = [], [], None
        model.register_to_config(quantization_config=config)
        common.protect(model)
        name_repeated_blocks(model)
        return model

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Tensor], safe_serialization: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        if not safe_serialization:
            raise SVDQuantError("pickle files can run code; save with safe_serialization=True")
        common.refuse_adapters(state_dict)
        return state_dict, {}

    def _dequantize(self, model: Any) -> Any:
        common.dequantize_layers(model)
        common.unprotect(model)
        model.__dict__.pop("_repeated_blocks", None)
        fused.uninstall(model)
        model.quantization_method = None
        # A FrozenDict forgets nothing; a new one is made without the entry.
        model._internal_dict = type(model._internal_dict)(
            {key: value for key, value in model._internal_dict.items() if key != "quantization_config"}
        )
        return model

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def _keeps_type(model: nn.Module, name: str) -> bool:
    module_name, _, leaf = name.rpartition(".")
    module = model.get_submodule(module_name)
    return isinstance(module, QUANTIZED) and leaf in module.fixed


# Where this module is imported before the library's table, importing it is what has loaded that table.
if "diffusers.quantizers.auto" in sys.modules:
    register(sys.modules["diffusers.quantizers.auto"])
