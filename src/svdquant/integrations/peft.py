"""PEFT: its LoRA layers around quantized ones, computed in the low-rank branch.

PEFT and diffusers keep the adapters, their names, strengths and files; the layers here are PEFT's own but for the
products. Whatever the branch cannot hold (DoRA, biases, dropout in training) is computed as PEFT does.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Conv2d, Linear
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ..errors import SVDQuantError
from ..kernels import eager
from ..nn import SVDQuantConv2d, SVDQuantLinear, W4A16Linear
from ..nn.adapters import (
    Adapter,
    Branch,
    BranchCache,
    fits,
    join,
    low_scales,
    traced_low_scales,
    widened,
)
from .peft_dense import RequestLayer, unit_strength
from .peft_dora import active_specials, is_special, with_specials

_MODULE = "peft.tuners.lora.model"
_made = 0
# Options of PEFT's with which an adapter's meaning depends on the weight below it.
_WEIGHT_READERS = ("use_bdlora", "kasa_config", "monteclora_config")


def layers_made() -> int:
    """How many LoRA layers this process has made: a model whose layers were counted at this number has no others."""
    return _made


def register(module: ModuleType) -> None:
    """Lets `peft.tuners.lora.model` choose the layers below for quantized ones. Idempotent."""
    theirs = module.dispatch_default
    if getattr(theirs, "_svdquant", False):
        return

    def dispatch_default(target: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> nn.Module | None:
        global _made
        _made += 1
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        cls = _layer_class(base)
        if cls is None or kwargs.get("parameter_name") is not None:
            return theirs(target, adapter_name, config=config, **kwargs)
        if special := [name for name in _WEIGHT_READERS if getattr(config, name, None)]:
            raise SVDQuantError(
                f"an adapter with {special[0]} reads a layer's 16-bit weights, which a quantized model does not have; "
                "take it as a plain LoRA"
            )
        if config.fan_in_fan_out:
            config.fan_in_fan_out = False
        kwargs.pop("parameter_name", None)
        return cls(target, adapter_name, config=config, **kwargs)

    dispatch_default._svdquant = True  # type: ignore[attr-defined]
    module.dispatch_default = dispatch_default  # type: ignore[attr-defined]


def _layer_class(base: nn.Module) -> Any:
    if isinstance(base, W4A16Linear):
        return WeightOnlyLoraLinear
    if isinstance(base, SVDQuantLinear):
        return LoraLinear
    return LoraConv2d if isinstance(base, SVDQuantConv2d) else None


class QuantizedLayer(RequestLayer):
    """On top of a LoRA layer of PEFT around a quantized one."""

    def check_fusable(self, names: list[str]) -> None:
        """Raises `SVDQuantError` where one of these adapters cannot become part of the layer."""
        for name in names:
            if is_special(self, name) or self.lora_bias.get(name):  # type: ignore[attr-defined]
                raise SVDQuantError(
                    f"adapter {name!r} is no plain LoRA and cannot be fused into a quantized layer; bake it in by "
                    "`svdquant lora merge`"
                )


class FusedLayer(QuantizedLayer):
    """On top of a LoRA layer of PEFT: the adapters join the branch of the quantized layer below."""

    takes_options = False  # only the classes whose base takes them say otherwise

    def forward(self, x: Tensor, *args: Any, gelu: bool = False, out: Tensor | None = None, **kwargs: Any) -> Tensor:
        layer: Any = self
        if not args and not kwargs and _reachable(layer.base_layer):
            names = self._fusable(x)
            if names is not None:
                branch = self._branch(x, names) if names else None
                return self._call(x, gelu, out, branch)
        if not args and not kwargs and (names := active_specials(layer)):
            y = with_specials(layer, x, names)
        else:
            y = super().forward(x, *args, **kwargs)
        if gelu:
            y = F.gelu(y, approximate="tanh")
        return y if out is None else out.copy_(y)

    def _call(self, x: Tensor, gelu: bool, out: Tensor | None, branch: Branch | None) -> Tensor:
        base: Any = self.base_layer  # type: ignore[attr-defined]
        y: Tensor = base(x, gelu=gelu, out=out, branch=branch)
        return y

    def _fusable(self, x: Tensor) -> list[str] | None:
        """The adapters that take part, in the order in which they were loaded; None where PEFT has to compute."""
        layer: Any = self
        if layer._disable_adapters or layer.merged_adapters:
            return None if layer._disable_adapters and layer.merged_adapters else []
        wanted = layer.active_adapters if self.requests is None else self.requests.names
        if not wanted:
            return []
        names = [name for name in layer.lora_A if name in wanted]
        if self.requests is None:
            # A strength of 0 is no adapter, bit for bit.
            names = [name for name in names if isinstance(s := layer.scaling[name], Tensor) or s != 0]
        training = torch.is_grad_enabled()
        for name in names:
            if is_special(layer, name) or layer.lora_bias.get(name):
                return None
            if layer.training and not isinstance(layer.lora_dropout[name], nn.Identity):
                return None
            if training and (layer.lora_A[name].weight.requires_grad or layer.lora_B[name].weight.requires_grad):
                return None
        return names if fits(layer.base_layer, [layer.lora_A[name].weight.shape[0] for name in names]) else None

    def _branch(self, x: Tensor, names: list[str]) -> Branch:
        layer: Any = self
        base = layer.base_layer
        adapters = [Adapter(n, layer.lora_A[n].weight, layer.lora_B[n].weight) for n in names]
        base_rank = 0 if base.proj_down is None else base.proj_down.shape[0]
        ranks = tuple(a.rank for a in adapters)
        if self.requests is not None:
            lines = zip(*(self.requests.strengths(n, unit_strength(layer, n)) for n in names), strict=True)
            repeats = self.requests.repeats(x.shape[0])
            factors = low_scales(x.device, base_rank, ranks, tuple(lines), repeats)
        else:
            strengths = tuple(layer.scaling[n] for n in names)
            if torch.compiler.is_compiling() or any(isinstance(s, Tensor) for s in strengths):
                factors = traced_low_scales(x.device, base_rank, ranks, strengths)
            else:
                factors = low_scales(x.device, base_rank, ranks, strengths)
        if eager.is_unwatched(x):
            return Branch(*self.branches.get(base, adapters), factors)
        return Branch(*join(base, adapters), factors)

    @property
    def branches(self) -> BranchCache:
        """What this layer has joined, kept beside the module: no part of its state, of copies or of pickles."""
        cache: BranchCache = self.__dict__.setdefault("_branches", BranchCache())
        return cache

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.branches.clear()
        return super()._apply(*args, **kwargs)  # type: ignore[misc]

    def delete_adapter(self, adapter_name: str) -> None:
        self.branches.forget(adapter_name)
        super().delete_adapter(adapter_name)  # type: ignore[misc]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Makes adapters at their present strength part of the branch. Raises `SVDQuantError` where that cannot be."""
        layer: Any = self
        names = [n for n in check_adapters_to_merge(layer, adapter_names) or () if n in layer.lora_A]
        if not names:
            return
        down, up = self._to_merge(names)
        if safe_merge and not (bool(down.isfinite().all()) and bool(up.isfinite().all())):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {names[0]} seems to be broken")
        self.branches.clear()
        self._take_in(down, up)
        layer.merged_adapters += names

    def _to_merge(self, names: list[str]) -> tuple[Tensor, Tensor]:
        layer: Any = self
        base, adapters = layer.base_layer, []
        self.check_fusable(names)
        for name in names:
            up = _matrix(layer.lora_B[name].weight).float() * layer.scaling[name]
            adapters.append(Adapter(name, _matrix(layer.lora_A[name].weight), up))
        ranks = [a.rank for a in adapters]
        if not fits(base, ranks):
            raise SVDQuantError(f"fusing {', '.join(names)} would make a branch of more than 1024; fuse fewer adapters")
        with torch.no_grad():
            return join(base, adapters)

    def _take_in(self, down: Tensor, up: Tensor) -> None:
        base: Any = self.base_layer  # type: ignore[attr-defined]
        self.__dict__.setdefault("_unmerged", (base.proj_down, base.proj_up, base.spec))
        widened(base, down, up)

    def unmerge(self) -> None:
        """Gives the layer back the branch it had."""
        layer: Any = self
        if not layer.merged_adapters:
            return
        base = layer.base_layer
        down, up, base.spec = self.__dict__.pop("_unmerged")
        for name, value in (("proj_down", down), ("proj_up", up)):
            # The layer may have been moved or cast meanwhile.
            if value is not None and getattr(base, name) is not None:
                value = nn.Parameter(value.to(getattr(base, name)), requires_grad=False)
            setattr(base, name, value)
        self.branches.clear()
        layer.merged_adapters.clear()


class LoraLinear(FusedLayer, Linear):
    """PEFT's LoRA around an `SVDQuantLinear`."""

    takes_options = True


class LoraConv2d(FusedLayer, Conv2d):
    """PEFT's LoRA around a quantized 1×1 convolution."""

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        # PEFT makes A of the class of what it wraps.
        layer: Any = self
        base = layer.base_layer
        geometry = ("kernel_size", "stride", "padding", "dilation", "groups")
        plain = nn.Conv2d(base.in_channels, base.out_channels, 1, bias=base.bias is not None, device="meta")
        assert all(getattr(plain, name) == getattr(base, name) for name in geometry)
        plain.weight = nn.Parameter(base.weight, requires_grad=False)
        layer.base_layer = plain
        try:
            super().update_layer(*args, **kwargs)
        finally:
            layer.base_layer = base

    def _call(self, x: Tensor, gelu: bool, out: Tensor | None, branch: Branch | None) -> Tensor:
        y: Tensor = self.base_layer(x, branch=branch)
        return y


class WeightOnlyLoraLinear(QuantizedLayer, Linear):
    """PEFT's LoRA around a W4A16 linear: two more products of a few rows."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not args and not kwargs and (names := active_specials(self)):
            return with_specials(self, x, names)
        return super().forward(x, *args, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        for name in check_adapters_to_merge(self, adapter_names) or ():
            if name not in self.lora_A:
                continue
            self.check_fusable([name])
            base = self.base_layer
            before = base.fused_down, base.fused_up
            down = self.lora_A[name].weight.detach().to(base.compute_dtype)
            up = (self.lora_B[name].weight.detach().float() * self.scaling[name]).to(base.compute_dtype)
            if safe_merge and not (bool(down.isfinite().all()) and bool(up.isfinite().all())):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            self.__dict__.setdefault("_unmerged", before)
            if before[0] is not None:
                down, up = torch.cat([before[0], down]), torch.cat([before[1], up], 1)
            base.fuse(down, up)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        if self.merged_adapters:
            self.base_layer.fuse(*self.__dict__.pop("_unmerged"))
            self.merged_adapters.clear()


def _matrix(weight: Tensor) -> Tensor:
    """A or B [r, K], of a convolution too."""
    return weight if weight.dim() == 2 else weight.flatten(1)


def _reachable(base: Any) -> bool:
    """Whether the quantized layer below reads its parameters where they lie: nobody moves them when it is called."""
    hooked = hasattr(base, "_hf_hook") or hasattr(base, "_diffusers_hook")
    return type(base) in (SVDQuantLinear, SVDQuantConv2d) and not hooked and "forward" not in base.__dict__


# Where this module is imported before PEFT's, importing it is what has loaded that.
if _MODULE in sys.modules:
    register(sys.modules[_MODULE])
