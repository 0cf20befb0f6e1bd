"""Plan, capture, solve and swap, in place, for a model in memory."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..config import SVDQuantConfig
from ..errors import SVDQuantError
from ..nn import QUANTIZED, make_layer, replace_module
from .capture import capture
from .leftovers import find_leftovers
from .plan import GroupPlan, Plan, make_plan
from .report import LayerReport, Report
from .solve import SolvedLayer, solve_group
from .trace import Run

# Called after each solved group: (groups done, groups in all, name of the group).
Progress = Callable[[int, int, str], None]


def quantize(
    model: nn.Module,
    config: SVDQuantConfig | None = None,
    calibrate: Run | None = None,
    *,
    work_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> Report:
    """Quantizes `model` in place and returns the report; see `svdquant.quantize`."""
    config = config or SVDQuantConfig()
    if not isinstance(model, nn.Module):
        raise SVDQuantError(f"quantize takes a model, not a {type(model).__name__}; give it e.g. pipe.transformer")
    if any(isinstance(m, QUANTIZED) for m in model.modules()):
        raise SVDQuantError(f"{type(model).__name__} is quantized already; start from the 16-bit model")
    check_single_model(config)
    began = time.perf_counter()
    plan = make_plan(model, config, calibrate)
    groups = plan.groups
    solved: dict[str, SolvedLayer] = {}
    with tempfile.TemporaryDirectory(prefix="svdquant-", dir=work_dir) as folder:
        store = None
        if calibrate is not None:
            store = capture(model, groups, calibrate, Path(folder), config.calibration_rows, config.seed)
        for number, group in enumerate(groups):
            weights, biases = _tensors_of(model, group)
            solved |= solve_group(group, weights, biases, None if store is None else store.inputs(group.name), config)
            if progress is not None:
                progress(number + 1, len(groups), group.name)
    report = make_report(plan, {name: layer.report for name, layer in solved.items()}, config, model)
    report.check(config.max_error)
    kept = {layer.name for layer in report.layers if layer.kind == "keep"}
    for name, layer in solved.items():
        if name not in kept:
            original = model.get_submodule(name)
            replace_module(model, name, make_layer(original, layer.tensors))
    report.seconds = time.perf_counter() - began
    return report


def check_single_model(config: SVDQuantConfig) -> None:
    """Raises `SVDQuantError` for a configuration that is a whole pipeline's."""
    if config.components:
        raise SVDQuantError(
            f"components names {next(iter(config.components))} of a pipeline, and this quantizes one model; give each "
            "model a configuration of its own, or quantize the pipeline's folder with `svdquant quantize`"
        )


def make_report(
    plan: Plan, layers: dict[str, LayerReport], config: SVDQuantConfig, model: nn.Module | None = None
) -> Report:
    """The whole model's report; layers above `keep_16bit_above` are marked as staying in 16 bits.

    model: in 16 bits, on any device ("meta" included); without it the report does not say what stayed.
    """
    report = Report(plan.model_class, bytes_before=plan.bytes_before)
    saved = 0
    for name in plan.layers:
        if name not in layers:
            continue
        layer = layers[name]
        limit = (config.for_layer(name) or config).keep_16bit_above
        if limit is not None and not layer.error <= limit:
            layer.kind, layer.bytes_after = "keep", layer.bytes_before
        saved += layer.bytes_before - layer.bytes_after
        report.layers.append(layer)
    report.bytes_after = plan.bytes_before - saved
    if model is not None:
        back = {layer.name for layer in report.layers if layer.kind == "keep"}
        report.leftovers = find_leftovers(model, plan, config, back)
        report.leftovers.stored = sum(layer.bytes_after for layer in report.quantized)
    return report


def _tensors_of(model: nn.Module, group: GroupPlan) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    weights: dict[str, Tensor] = {}
    biases: dict[str, Tensor | None] = {}
    for member in group.members:
        module: Any = model.get_submodule(member.name)
        if module.weight.is_meta:
            raise SVDQuantError(f"{member.name} has no weights in memory; quantize before enabling offload")
        weights[member.name] = module.weight.detach()
        biases[member.name] = None if module.bias is None else module.bias.detach()
    return weights, biases
