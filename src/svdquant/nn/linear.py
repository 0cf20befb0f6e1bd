"""The layers that replace `nn.Linear` (and 1×1 `nn.Conv2d`) in a quantized model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import ACTIVATIONS, LayerSpec, matches
from ..errors import SVDQuantError
from ..kernels import svdquant_linear, w4a16_linear
from ..numerics import FORMATS, SVDQuantTensors, groups_of, padded_columns
from .adapters import Branch

# These keep the type they were stored in, whatever the model is cast to: a scale in another type is another weight.
FIXED_DTYPE = ("qweight", "wscales", "wcscales", "wzeros", "smooth_factor")
TENSOR_NAMES = (*FIXED_DTYPE, "proj_down", "proj_up", "bias")
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def empty_tensors(
    in_features: int, out_features: int, bias: bool, spec: LayerSpec, dtype: torch.dtype, device: Any = None
) -> dict[str, Tensor]:
    """Uninitialised storage of one layer, by name: shapes and types as of `SVDQuantTensors`."""
    fmt, columns = FORMATS[spec.weights], padded_columns(in_features, spec)
    four_bit = fmt.bits == 4
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    if spec.kind == "svdquant" and spec.rank:
        # First, because a model's dtype is that of its first floating parameter.
        shapes["proj_down"] = ((spec.rank, in_features), dtype)
        shapes["proj_up"] = ((out_features, spec.rank), dtype)
    if bias:
        shapes["bias"] = ((out_features,), dtype)
    if spec.kind == "svdquant" and spec.smooth:
        shapes["smooth_factor"] = ((in_features,), dtype)
    shapes["qweight"] = (
        (out_features, columns // 2 if four_bit else columns),
        torch.uint8 if four_bit else torch.int8,
    )
    nvfp4 = spec.weights == "nvfp4"
    shapes["wscales"] = (
        (out_features, groups_of(in_features, spec)),
        torch.float8_e4m3fn if nvfp4 else dtype,
    )
    if nvfp4:
        shapes["wcscales"] = ((out_features,) if spec.outer_blocks == 1 else (out_features, spec.outer_blocks), dtype)
    if spec.zeros:
        shapes["wzeros"] = shapes["wscales"]
    return {name: torch.empty(shape, dtype=t, device=device) for name, (shape, t) in shapes.items()}


class QuantizedMixin:
    """What the quantized layers share: packed parameters, a weight that is a view of nothing, a guard on casts."""

    spec: LayerSpec
    in_features: int
    out_features: int
    activations: str
    _dtype: torch.dtype
    fixed: tuple[str, ...] = FIXED_DTYPE

    def _init_storage(self, tensors: dict[str, Tensor], dtype: torch.dtype | None) -> None:
        module: Any = self
        for name in ("proj_down", "proj_up", "bias", "smooth_factor", "qweight", "wscales", "wcscales", "wzeros"):
            value = tensors.get(name)
            parameter = None if value is None else nn.Parameter(value, requires_grad=False)
            module.register_parameter(name, parameter)
        kept = [t.dtype for n in ("smooth_factor", "wscales", "wcscales") if (t := tensors.get(n)) is not None]
        self._dtype = dtype or next((t for t in kept if t not in _FLOAT8), torch.bfloat16)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The model's type: that of the branch or the bias, which follow a cast, else what was last cast to."""
        module: Any = self
        cast = (getattr(module, name) for name in ("proj_up", "bias") if name not in self.fixed)
        return next((p.dtype for p in cast if p is not None), self._dtype)

    @property
    def weight(self) -> Tensor:
        """Shape, type and device of the dense weight, one NaN behind them: code that computes with it fails visibly."""
        one = torch.full((1,), float("nan"), dtype=self.compute_dtype, device=self.qweight.device)  # type: ignore[attr-defined]
        view = one.expand(*self._weight_shape())
        view._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers must not initialise it
        return view

    def _weight_shape(self) -> tuple[int, ...]:
        return (self.out_features, self.in_features)

    def tensors(self) -> SVDQuantTensors:
        """The record behind this layer; it shares the parameters' storage."""
        module: Any = self
        record = SVDQuantTensors(self.spec, self.in_features, **{n: getattr(module, n) for n in TENSOR_NAMES})
        if not torch.compiler.is_compiling():
            record.memory = self.__dict__.setdefault("_memory", {})
        return record

    def _multiply(self, x: Tensor, gelu: bool, out: Tensor | None, branch: Branch | None) -> Tensor:
        record = self.tensors()
        if branch is None:
            return svdquant_linear(x, record, self.activations, gelu, out)
        record.proj_down, record.proj_up = branch.proj_down, branch.proj_up
        return svdquant_linear(x, record, self.activations, gelu, out, branch.low_scales)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_memory"}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        module: Any = self
        for parameter in module.parameters(recurse=False):
            # Asked of an empty tensor first: a refused cast must leave the layer as it was.
            if parameter.dtype not in _FLOAT8 and fn(parameter.data.new_empty(0)).dtype in _FLOAT8:
                raise SVDQuantError(
                    "a quantized layer's scales and low-rank branch cannot be stored in 8 bits; leave svdquant models "
                    "out of layerwise casting"
                )
        dtype = fn(torch.empty(0, dtype=self.compute_dtype, device=module.qweight.device)).dtype
        originals = {name: p.data for name in self.fixed if (p := getattr(self, name)) is not None}
        super()._apply(fn, recurse)  # type: ignore[misc]
        self._dtype = dtype
        for name, original in originals.items():
            parameter = getattr(self, name)
            if parameter.dtype != original.dtype:
                # A cast of the model: move the original, so that no rounding has happened on the way.
                setattr(self, name, nn.Parameter(original.to(parameter.device), requires_grad=False))
        return self

    def dequantize(self) -> nn.Module:
        """A dense module in the compute type that equals this one with 16-bit activations."""
        weight, bias = self.tensors().dense()
        return self._dense_module(weight.to(self.compute_dtype), None if bias is None else bias.to(self.compute_dtype))

    def _dense_module(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        linear = nn.Linear(self.in_features, self.out_features, bias is not None, device="meta", dtype=weight.dtype)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        return linear

    def extra_repr(self) -> str:
        s = self.spec
        group = f"g{s.group_size}" if s.group_size else "per row"
        text = f"in_features={self.in_features}, out_features={self.out_features}, {s.weights} {group}"
        if s.kind == "svdquant":
            text += f", rank={s.rank}, activations={self.activations}" + (", rotate" if s.rotate else "")
        return text


class SVDQuantLinear(QuantizedMixin, nn.Linear):
    """y = Q(x/s)·Ŵᵀ + (x·Dᵀ)·Uᵀ + b with packed weights; everything else is an `nn.Linear`.

    activations: "auto", "int4", "int8", "fp8", "nvfp4" or "none"; may be changed at any time.
    """

    # Fused forwards may call this very class with all arguments of its forward; see `families.fused`.
    takes_options = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        spec: LayerSpec | None = None,
        dtype: torch.dtype | None = None,
        device: Any = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.spec = spec or LayerSpec()
        self.activations = "auto"
        dtype = dtype or torch.bfloat16
        self._init_storage(empty_tensors(in_features, out_features, bias, self.spec, dtype, device), dtype)

    @classmethod
    def from_tensors(cls, tensors: SVDQuantTensors, dtype: torch.dtype | None = None) -> SVDQuantLinear:
        """A layer around existing tensors, without copying them. dtype: of the model; None reads it off the tensors."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = tensors.in_features, tensors.out_features
        layer.spec = tensors.spec
        layer.activations = "auto"
        layer._init_storage(tensors.named(), dtype)
        return layer

    def forward(self, x: Tensor, gelu: bool = False, out: Tensor | None = None, branch: Branch | None = None) -> Tensor:
        """The product, or its GELU (tanh); into `out`, which is returned, where a fused forward gives one.

        branch: stands in for the layer's own, with adapters in it.
        """
        return self._multiply(x, gelu, out, branch)


class W4A16Linear(SVDQuantLinear):
    """y = x·Ŵᵀ + b with 4-bit weights and 16-bit activations: AdaLN modulation (few rows), text encoders."""

    # Published files add 1 to a modulation's bias; taken out again, it may need more bits than the model has.
    fixed = (*FIXED_DTYPE, "bias")
    takes_options = False

    @property
    def fused_down(self) -> Tensor | None:
        """A [r, K] of what `fuse` added, or None."""
        return self._parameters.get("fused_down")

    @property
    def fused_up(self) -> Tensor | None:
        """B [N, r] of what `fuse` added, or None."""
        return self._parameters.get("fused_up")

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        if x.shape[-1] != self.in_features:
            raise SVDQuantError(f"input has {x.shape[-1]} features, the layer takes {self.in_features}")
        y = w4a16_linear(x, self.qweight, self.wscales, self.bias, self.spec.weights, self.wzeros)
        if self.fused_down is None or self.fused_up is None:
            return y
        return y + F.linear(F.linear(x, self.fused_down.to(x.dtype)), self.fused_up.to(x.dtype))

    def dequantize(self) -> nn.Module:
        dense: Any = super().dequantize()
        if self.fused_down is not None and self.fused_up is not None:
            delta = self.fused_up.float() @ self.fused_down.float()
            dense.weight = nn.Parameter((dense.weight.float() + delta).to(dense.weight.dtype), requires_grad=False)
        return dense

    def fuse(self, down: Tensor | None, up: Tensor | None) -> None:
        """Adds x·Aᵀ·Bᵀ to every output from now on, in place of what was added before; None = nothing.

        down: A [r, K]; up: B [N, r].
        """
        for name, value in (("fused_down", down), ("fused_up", up)):
            self._parameters.pop(name, None)
            if value is not None:
                self._parameters[name] = nn.Parameter(value.to(self.qweight.device), requires_grad=False)


class SVDQuantConv2d(QuantizedMixin, nn.Conv2d):
    """A 1×1 convolution as the linear that it is: one product per pixel. x [B, C, H, W] or [C, H, W]."""

    def __init__(self, tensors: SVDQuantTensors, dtype: torch.dtype | None = None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = tensors.in_features, tensors.out_features
        self.in_channels, self.out_channels = tensors.in_features, tensors.out_features
        self.kernel_size, self.stride, self.dilation = (1, 1), (1, 1), (1, 1)
        self.padding, self.groups, self.padding_mode = (0, 0), 1, "zeros"
        self.spec = tensors.spec
        self.activations = "auto"
        self._init_storage(tensors.named(), dtype)

    @classmethod
    def from_tensors(cls, tensors: SVDQuantTensors, dtype: torch.dtype | None = None) -> SVDQuantConv2d:
        return cls(tensors, dtype)

    def _weight_shape(self) -> tuple[int, ...]:
        return (self.out_features, self.in_features, 1, 1)

    def _dense_module(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        n, k = self.out_features, self.in_features
        conv = nn.Conv2d(k, n, 1, bias=bias is not None, device="meta", dtype=weight.dtype)
        conv.weight = nn.Parameter(weight[:, :, None, None], requires_grad=False)
        conv.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        return conv

    def forward(self, x: Tensor, branch: Branch | None = None) -> Tensor:
        return self._multiply(x.movedim(-3, -1), False, None, branch).movedim(-1, -3)


QUANTIZED = (SVDQuantLinear, SVDQuantConv2d)


def is_pointwise_conv(module: nn.Module) -> bool:
    """A convolution that is a linear applied to every pixel."""
    return (
        isinstance(module, nn.Conv2d)
        and tuple(module.kernel_size) == (1, 1)
        and tuple(module.stride) == (1, 1)
        and module.groups == 1
        and module.padding in ((0, 0), 0)
    )


def make_layer(original: nn.Module, tensors: SVDQuantTensors) -> nn.Module:
    """The quantized layer that takes the place of `original`."""
    dtype: torch.dtype = original.weight.dtype  # type: ignore[assignment,union-attr]
    if isinstance(original, nn.Conv2d):
        return SVDQuantConv2d.from_tensors(tensors, dtype)
    cls = W4A16Linear if tensors.spec.kind == "w4a16" else SVDQuantLinear
    return cls.from_tensors(tensors, dtype)


def empty_layer(original: nn.Module, spec: LayerSpec, dtype: torch.dtype) -> nn.Module:
    """The quantized layer with uninitialised tensors on the device of `original` ("meta" while a model is loading)."""
    conv = isinstance(original, nn.Conv2d)
    k = original.in_channels if conv else original.in_features  # type: ignore[union-attr]
    n = original.out_channels if conv else original.out_features  # type: ignore[union-attr]
    device = original.weight.device  # type: ignore[union-attr]
    bias = original.bias is not None or bool(spec.unsigned)  # which compensates the shift
    storage = empty_tensors(int(k), int(n), bias, spec, dtype, device)  # type: ignore[arg-type]
    return make_layer(original, SVDQuantTensors(spec, int(k), **storage))  # type: ignore[arg-type]


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Puts `new` in the place of the submodule `name`, in its training mode. Hooks stay behind."""
    parent_name, _, child = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    new.training = getattr(parent, child).training
    setattr(parent, child, new)


def quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Name → module of every quantized layer."""
    return {name: m for name, m in model.named_modules() if isinstance(m, QUANTIZED)}


def set_activations(model: Any, activations: str | dict[str, str]) -> Any:
    """Sets the activation precision of a loaded model; returns the model.

    model: a module, or a pipeline (then every component that holds quantized layers). activations: one of "auto",
    "int4", "int8", "fp8", "nvfp4", "none" for all layers, or patterns → precision for some. Raises `SVDQuantError` for
    an unknown precision, a model without quantized layers, or a pattern that matches none.
    """
    modules = [model] if isinstance(model, nn.Module) else _components(model)
    # PEFT puts a layer with adapters one level down.
    layers = [
        (name.replace(".base_layer", ""), layer)
        for module in modules
        for name, layer in quantized_layers(module).items()
    ]
    if not layers:
        raise SVDQuantError(f"{type(model).__name__} has no quantized layers; quantize or load a quantized model first")
    wanted = {"*": activations} if isinstance(activations, str) else activations
    changes: list[tuple[Any, str]] = []
    for pattern, precision in wanted.items():
        if precision not in ACTIVATIONS:
            raise SVDQuantError(f"activations={precision!r} is not one of {', '.join(ACTIVATIONS)}")
        hit = [layer for name, layer in layers if matches(pattern, name)]
        if not hit:
            raise SVDQuantError(f"pattern {pattern!r} matches no quantized layer, e.g. {layers[0][0]}")
        changes += [(layer, precision) for layer in hit]
    for layer, precision in changes:
        layer.activations = precision
    return model


def _components(pipeline: Any) -> list[nn.Module]:
    components = getattr(pipeline, "components", {})
    return [c for c in components.values() if isinstance(c, nn.Module)]
