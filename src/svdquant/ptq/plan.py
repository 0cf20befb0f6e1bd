"""Which linears are quantized, how, and which belong together: decided before any weight is touched."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from ..config import GROUP_SIZES, LayerSpec, SVDQuantConfig, matches
from ..errors import SVDQuantError
from ..families import family_of
from ..numerics import FORMATS, groups_of, padded_columns
from .example import example_traces, trace_model
from .linears import block_of, find_blocks, find_linears, projection_lists, read_directly, shared_linears
from .roles import Roles, routers, shortcut
from .trace import LayerTrace, Run

# Below this a layer saves too little to be worth an error.
_SMALLEST = 64 * 64
_NARROW = "narrower than the rank"


@dataclass(frozen=True)
class LayerPlan:
    """One linear: kind is "svdquant", "w4a16" or "keep"; `spec` is None for "keep"; `reason` says why it is so."""

    name: str
    kind: str
    in_features: int
    out_features: int
    bias: bool
    dtype_bytes: int
    block: str
    group: str
    reason: str
    conv: bool = False
    spec: LayerSpec | None = None
    segments: tuple[tuple[int, int], ...] = ()

    @property
    def bytes_before(self) -> int:
        return (self.in_features * self.out_features + self.out_features * self.bias) * self.dtype_bytes

    @property
    def bytes_after(self) -> int:
        """As stored, scales, smoothing, branch and bias included."""
        if self.spec is None:
            return self.bytes_before
        spec, k, n, unit = self.spec, self.in_features, self.out_features, self.dtype_bytes
        total = n * padded_columns(k, spec) * FORMATS[spec.weights].bits // 8
        total += n * groups_of(k, spec) * (1 if spec.weights == "nvfp4" else unit)
        # A shifted layer has a bias in any case: it takes the shift out again.
        total += n * unit * ((self.bias or bool(spec.unsigned)) + (spec.weights == "nvfp4"))
        if spec.kind == "svdquant":
            total += (k + n) * spec.rank * unit + k * unit * spec.smooth
        return total


@dataclass(frozen=True)
class GroupPlan:
    """Linears that read the same tensor: one smooth factor, one down-projection. Named after the first."""

    name: str
    members: tuple[LayerPlan, ...]

    @property
    def spec(self) -> LayerSpec:
        spec = self.members[0].spec
        assert spec is not None
        return spec

    @property
    def in_features(self) -> int:
        return self.members[0].in_features


@dataclass
class Plan:
    """What will happen to a model. `layers` in the model's order; `other_bytes` are parameters of no linear.

    unreached: quantized layers that the traced forward did not call, planned by their names.
    """

    model_class: str
    family: str
    traced: bool
    layers: dict[str, LayerPlan] = field(default_factory=dict)
    other_bytes: int = 0
    unreached: list[str] = field(default_factory=list)

    @property
    def groups(self) -> list[GroupPlan]:
        members: dict[str, list[LayerPlan]] = {}
        for layer in self.layers.values():
            if layer.kind != "keep":
                members.setdefault(layer.group, []).append(layer)
        return [GroupPlan(name, tuple(group)) for name, group in members.items()]

    @property
    def specs(self) -> dict[str, LayerSpec]:
        return {name: layer.spec for name, layer in self.layers.items() if layer.spec is not None}

    @property
    def bytes_before(self) -> int:
        return self.other_bytes + sum(layer.bytes_before for layer in self.layers.values())

    @property
    def bytes_after(self) -> int:
        return self.other_bytes + sum(layer.bytes_after for layer in self.layers.values())


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of a linear or 1×1 convolution."""
    m: Any = module
    return (m.in_channels, m.out_channels) if isinstance(module, nn.Conv2d) else (m.in_features, m.out_features)


def make_plan(
    model: nn.Module,
    config: SVDQuantConfig,
    run: Run | None = None,
    traces: dict[str, LayerTrace] | None = None,
) -> Plan:
    """Plans `model`, which may live on the meta device: no weight is read.

    run: calls the model once; traces: what `trace_model` found earlier. Without either, the family's own example
    inputs or, for a diffusers model, guessed ones are used, and where none fit, names alone decide. Raises
    `SVDQuantError` where nothing is left to quantize, every layer is narrower than the rank or a pattern matches none.
    """
    family = family_of(model)
    linears = find_linears(model)
    blocks = find_blocks(model, family)
    where = {name: block_of(name, blocks) for name in linears}
    if traces is None:
        traces = trace_model(model, run) if run is not None else example_traces(model, family, where)
    refused = dict.fromkeys(shared_linears(model, linears), "shared with another module")
    refused |= dict.fromkeys(read_directly(model, linears), "torch's fused attention reads its weight directly")
    refused |= dict.fromkeys(routers(model, linears), "chooses among experts")
    plan = Plan(type(model).__name__, family.name, traced=bool(traces))
    _check_patterns(config, list(linears))

    roles = Roles(family, where, traces, tuple(projection_lists(model, family)))
    # diffusers' list; that of transformers only protects float16 from overflow, which the float32 sum here does too.
    fp32 = () if hasattr(model, "config_class") else tuple(getattr(model, "_keep_in_fp32_modules", None) or ())
    linear_bytes = 0
    for name, module in linears.items():
        layer = _plan_layer(name, module, config, roles, fp32)
        if layer.kind != "keep" and name in refused:
            layer = replace(layer, kind="keep", spec=None, reason=refused[name])
        plan.layers[name] = layer
        linear_bytes += layer.bytes_before
    plan.unreached = [name for name, layer in plan.layers.items() if layer.kind != "keep" and name not in traces]
    plan.other_bytes = max(sum(p.numel() * p.element_size() for p in model.parameters()) - linear_bytes, 0)
    _assign_groups(plan, roles, config)
    if "" in linears:
        raise SVDQuantError("the model is a single linear; wrap it in a module, so that it can be replaced")
    _check_rank(plan, config)
    if not plan.groups:
        raise SVDQuantError(f"{plan.model_class} has no linear left to quantize; loosen skip, overrides or the family")
    return plan


def _check_rank(plan: Plan, config: SVDQuantConfig) -> None:
    """Raises `SVDQuantError` where the rank is too large for every layer that should have a branch."""
    narrow = [layer for layer in plan.layers.values() if layer.reason == _NARROW]
    if narrow and not any(layer.kind == "svdquant" for layer in plan.layers.values()):
        widest = max(narrow, key=lambda layer: min(layer.in_features, layer.out_features))
        k, n = widest.in_features, widest.out_features
        rank = getattr(config.for_layer(widest.name), "rank", config.rank)
        raise SVDQuantError(f"rank {rank} exceeds {widest.name}, which is {n}×{k}; use --rank {min(k, n)} or less")


def _check_patterns(config: SVDQuantConfig, names: list[str]) -> None:
    for pattern in (*config.skip, *config.overrides):
        if not any(matches(pattern, name) for name in names):
            raise SVDQuantError(
                f"pattern {pattern!r} matches no linear of the model; one is {names[0] if names else None}"
            )


def _plan_layer(name: str, module: nn.Module, config: SVDQuantConfig, roles: Roles, fp32: tuple[str, ...]) -> LayerPlan:
    k, n = linear_shape(module)
    weight: Any = module.weight
    layer = LayerPlan(
        name,
        "keep",
        k,
        n,
        module.bias is not None,
        weight.element_size(),
        roles.where[name],
        name,
        "",
        isinstance(module, nn.Conv2d),
    )
    mine = config.for_layer(name)
    if mine is None:
        return replace(layer, reason="skipped by the configuration")
    if roles.outside(name):
        return replace(layer, reason=roles.why_outside(name, k, n))
    if why := roles.family.why_kept(name):
        return replace(layer, reason=why)
    if shortcut(module, name):
        return replace(layer, reason="shortcut around convolutions")
    if any(part in name.split(".") for part in fp32):
        return replace(layer, reason="the model keeps it in float32")
    if k * n < _SMALLEST:
        return replace(layer, reason="too small")
    if roles.modulates(name):
        if mine.modulation_weights == "none":
            return replace(layer, reason="modulation, kept by the configuration")
        return _weights_only(layer, mine.modulation_weights, "modulation: few rows, weights only")
    if condition := roles.condition_read(name):
        if mine.text_kv == "none":
            return replace(layer, reason=f"reads the {condition} of a cross-attention")
        return _weights_only(layer, mine.text_kv, f"{condition} keys and values: weights only")
    if mine.weights_only:
        return _weights_only(layer, mine.weights, "weights only", mine.weight_group_size)
    if mine.rank > min(k, n):
        return replace(layer, reason=_NARROW)
    spec, segments = _layer_spec(mine, k, roles.traces.get(name))
    reason = "after GELU: shifted, unsigned" if spec.unsigned else ""
    return replace(layer, kind="svdquant", spec=spec, segments=segments, reason=reason)


def _weights_only(layer: LayerPlan, weights: str, reason: str, group_size: int | None = None) -> LayerPlan:
    group = GROUP_SIZES[weights] if group_size is None else group_size
    spec = LayerSpec("w4a16", weights, group, 0, "none", (), False, False)
    return replace(layer, kind="w4a16", spec=spec, reason=reason)


def _layer_spec(
    config: SVDQuantConfig, in_features: int, trace: LayerTrace | None
) -> tuple[LayerSpec, tuple[tuple[int, int], ...]]:
    group = config.weight_group_size
    segments = trace.segments if trace is not None else ((0, in_features),)
    if any(start % 64 for start, _ in segments):
        segments = ((0, in_features),)
    unsigned: tuple[tuple[int, int], ...] = ()
    if trace is not None and config.weights == "int4":
        # No group may hold signed and unsigned columns.
        step = math.lcm(group, 64)
        unsigned = tuple((a, b) for a, b in trace.gelu if a % step == 0 and (b % step == 0 or b == in_features))
    # Rotated channels mix all signs: the two exclude each other, and after a GELU unsigned codes are worth more.
    rotate = config.use_rotation and not unsigned
    spec = LayerSpec(
        "svdquant", config.weights, group, config.rank, config.activations, unsigned, rotate, config.smooth_grid > 0
    )
    return spec, segments


def _assign_groups(plan: Plan, roles: Roles, config: SVDQuantConfig) -> None:
    """Layers of one block that read the same tensor, and agree on how they are solved and stored, form a group."""
    first: dict[Any, str] = {}
    for name, layer in plan.layers.items():
        # A modulation's input is a row per sample: there is nothing to save.
        if layer.kind == "keep" or roles.modulates(name):
            continue
        mine = config.for_layer(name)
        assert mine is not None
        solved_like = (layer.block, layer.spec, mine.to_json_string())
        key: Any = (*solved_like, name)
        if name in roles.traces:
            key = (*solved_like, roles.traces[name].source)
        elif siblings := roles.siblings(name):
            key = (*solved_like, name.rpartition(".")[0], siblings, layer.in_features)
        plan.layers[name] = replace(layer, group=first.setdefault(key, name))
