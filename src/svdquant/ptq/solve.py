"""One group from 16-bit weights and inputs to `SVDQuantTensors`; it depends on no other group."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..config import LayerSpec, SVDQuantConfig
from ..errors import SVDQuantError
from ..numerics import SVDQuantTensors, dequantize_weight, padded_columns
from ..numerics.hadamard import rotate
from .damage import UnusableInputsError, UnusableModelError, check_weight
from .low_rank import truncated_svd
from .plan import GroupPlan
from .problem import Problem
from .report import LayerReport
from .residual import ROWS, HessianFactor, packed_residual
from .smooth import SmoothResult, evaluation_rows, search_segments


@dataclass
class SolvedLayer:
    """What became of one linear."""

    tensors: SVDQuantTensors
    report: LayerReport

    @property
    def spec(self) -> LayerSpec:
        return self.tensors.spec


@dataclass
class GroupInputs:
    """Calibration inputs of a group: rows [M, K] and, over all tokens seen, max|x| per channel [K]."""

    rows: Tensor
    amax: Tensor


def group_generator(seed: int, name: str) -> torch.Generator:
    """Random numbers of one group: the same whatever was solved before it."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def solve_group(
    group: GroupPlan,
    weights: dict[str, Tensor],
    biases: dict[str, Tensor | None],
    inputs: GroupInputs | None,
    config: SVDQuantConfig,
) -> dict[str, SolvedLayer]:
    """Solves one group.

    weights: member name → W [N, K] (or [N, K, 1, 1]); biases: member name → [N] or None, in the model's type, which is
    also the type of scales, factors and branch. inputs: None = data-free. Raises `SVDQuantError` for a weight or an
    input with NaN or infinity in it, naming the layer.
    """
    began = time.perf_counter()
    flat = {m.name: weights[m.name].flatten(1) for m in group.members}
    for member in group.members:
        check_weight(member.name, flat[member.name], member.in_features, member.out_features)
    first = flat[group.name]
    device = first.device
    if inputs is not None:
        inputs = GroupInputs(inputs.rows.to(device).float(), inputs.amax.to(device).float())
        if not bool(torch.isfinite(inputs.rows).all()):
            raise UnusableInputsError(
                f"calibration inputs of {group.name} hold NaN or infinity, so the 16-bit model draws nothing valid; "
                "draw with it to find out with which options and dtype it does, or quantize data-free"
            )
    mine = config.for_layer(group.name)
    assert mine is not None
    solved = _solve(group, flat, biases, inputs, mine, group.spec)
    limit = mine.int8_activations_above
    if limit is not None and inputs is None:
        raise SVDQuantError(
            "int8_activations_above judges outputs, so it needs calibration; leave it out, or calibrate"
        )
    if limit is not None and group.spec.kind == "svdquant" and inputs is not None:
        worst = max(layer.report.error for layer in solved.values())
        if worst > limit and mine.solve_activations in ("int4", "nvfp4"):
            eight_bit = replace(group.spec, activations="int8", unsigned=(), rotate=False)
            solved = _solve(group, flat, biases, inputs, replace(mine, activations="int8"), eight_bit)
    seconds = time.perf_counter() - began
    for layer in solved.values():
        layer.report.seconds = seconds / len(solved)
    return solved


def _solve(
    group: GroupPlan,
    weights: dict[str, Tensor],
    biases: dict[str, Tensor | None],
    inputs: GroupInputs | None,
    config: SVDQuantConfig,
    spec: LayerSpec,
) -> dict[str, SolvedLayer]:
    names = [m.name for m in group.members]
    dtype = weights[names[0]].dtype
    generator = group_generator(config.seed, group.name)
    stacked = torch.cat([weights[name].float() for name in names])
    smoothing = spec.kind == "svdquant" and spec.smooth and inputs is not None and config.smooth_grid > 0
    spec = replace(spec, smooth=bool(smoothing))
    problem = Problem(
        stacked,
        [len(weights[name]) for name in names],
        None if inputs is None else inputs.rows,
        spec,
        padded_columns(group.in_features, spec),
        config.solve_activations if spec.kind == "svdquant" else "none",
        dtype,
    )
    ones = torch.ones(group.in_features, device=stacked.device)
    found = [SmoothResult(ones, 0.0, 0.0, float("nan"))]
    if smoothing:
        assert inputs is not None
        segments = group.members[0].segments or ((0, group.in_features),)
        found = search_segments(problem, inputs.amax, segments, config.smooth_grid, generator)
    smooth = torch.cat([result.factor for result in found])

    down, up, rounds = _branch(problem, smooth, config.refine, generator)
    smoothed = problem.smoothed_weight(smooth)
    residual = smoothed
    if spec.rank:
        # The branch as it will be stored; its own rounding then goes into the residual instead of the output.
        residual = smoothed - up.float() @ problem._padded_rotated(down.float() * smooth).to(smoothed)
    hessian = None
    if config.gptq and problem.inputs is not None:
        rows = problem.smoothed_inputs(problem.inputs, smooth)
        hessian = HessianFactor(rows.T @ rows)

    # Of a modulation, whose input has outliers of its own, no weight is clipped: measured, pictures get worse by it.
    fit_scales = config.weights_only and not group.members[0].reason.startswith("modulation")
    out: dict[str, SolvedLayer] = {}
    start = 0
    for name, rows_of in zip(names, problem.splits, strict=True):
        part = slice(start, start + rows_of)
        start += rows_of
        qweight, wscales, wcscales = packed_residual(
            residual[part], spec.weights, spec.group_size, dtype, hessian, fit_scales
        )
        bias = biases[name]
        stored_bias = None if bias is None else bias.detach().clone()
        if spec.unsigned:
            dequantized = dequantize_weight(qweight, wscales, wcscales, spec.weights, torch.float32)
            stored_bias = _compensated(stored_bias, dequantized, smooth, spec, problem)
        tensors = SVDQuantTensors(
            spec,
            group.in_features,
            qweight,
            wscales,
            wcscales,
            smooth.to(dtype, copy=True) if smoothing else None,
            down.clone() if spec.rank else None,
            up[part].clone() if spec.rank else None,
            stored_bias,
        )
        error = _error(problem, smooth, tensors, stacked[part], bias)
        if not math.isfinite(error):
            remedy = f"keep it in 16 bits with --skip {name}"
            if dtype == torch.float16:
                remedy = f"use --dtype bfloat16, or {remedy}"
            raise UnusableModelError(
                f"{name} does not fit into {str(dtype).removeprefix('torch.')} once quantized; {remedy}"
            )
        first = found[-1]
        out[name] = SolvedLayer(
            tensors,
            LayerReport(
                name=name,
                kind=spec.kind,
                weights=spec.weights,
                activations=problem.activations,
                rank=spec.rank,
                rotate=spec.rotate,
                error=error,
                error_of="output" if inputs is not None else "weight",
                alpha=first.alpha,
                beta=first.beta,
                rounds=rounds,
                rows=0 if inputs is None else len(inputs.rows),
                group=group.name,
                bytes_before=weights[name].numel() * weights[name].element_size()
                + (0 if bias is None else bias.numel() * bias.element_size()),
                bytes_after=tensors.nbytes(),
            ),
        )
    return out


def _branch(problem: Problem, smooth: Tensor, rounds: int, generator: torch.Generator) -> tuple[Tensor, Tensor, int]:
    """(D [r, K] for the raw x, U [N, r], both in the model's type; the round that won).

    Round t fits the branch to what round t − 1's rounding lost; the best round on the evaluation rows is kept.
    """
    spec = problem.spec
    weight = problem.smoothed_weight(smooth)
    up, down = truncated_svd(weight, spec.rank, generator)
    best = (up, down, 0)
    if rounds and spec.rank and problem.inputs is not None:
        rows = evaluation_rows(problem, generator)
        target = rows @ problem.weight.T
        quantized, exact = problem.quantized_inputs(rows, smooth), problem.smoothed_inputs(rows, smooth)
        rounded = torch.empty_like(weight)
        lowest = problem.score(target, quantized, exact, weight, up, down, keep=rounded)
        for number in range(1, rounds + 1):
            up, down = truncated_svd(weight - rounded, spec.rank, generator, down, iterations=1)
            score = problem.score(target, quantized, exact, weight, up, down, keep=rounded)
            if score < lowest:
                lowest, best = score, (up, down, number)
    elif rounds and spec.rank:
        best = _refine_data_free(problem, weight, rounds, generator, up, down)
    up, down, won = best
    raw = rotate(down) if spec.rotate else down
    return (raw[:, : problem.weight.shape[1]] / smooth).to(problem.dtype), up.to(problem.dtype), won


def _refine_data_free(
    problem: Problem, weight: Tensor, rounds: int, generator: torch.Generator, up: Tensor, down: Tensor
) -> tuple[Tensor, Tensor, int]:
    """The same alternation scored by the weight's own error."""
    best, lowest = (up, down, 0), float("inf")
    rounded = torch.empty_like(weight)
    for number in range(rounds + 1):
        if number:
            up, down = truncated_svd(weight - rounded, problem.spec.rank, generator, down, iterations=1)
        score = 0.0
        for rows in problem.chunks():
            rest = torch.addmm(weight[rows], up[rows], down, alpha=-1)
            rounded[rows] = problem.round_to_nearest(rest)
            score += float((rounded[rows] - rest).square().sum())
        if score < lowest:
            lowest, best = score, (up, down, number)
    return best


def _compensated(bias: Tensor | None, residual: Tensor, smooth: Tensor, spec: LayerSpec, problem: Problem) -> Tensor:
    """b − Ŵ·(shift/s): what the shift adds to the product is taken out of the bias."""
    from ..kernels import reference

    shift = reference.shift_vector(spec, len(smooth), residual.device) / smooth
    added = residual[:, : len(smooth)] @ shift
    plain = torch.zeros_like(added) if bias is None else bias.float()
    return (plain - added).to(problem.dtype)


def _error(problem: Problem, smooth: Tensor, tensors: SVDQuantTensors, weight: Tensor, bias: Tensor | None) -> float:
    """‖y − ref‖/‖ref‖ of the finished layer: on the calibration inputs, or of the weight itself without any."""
    if problem.inputs is None:
        lost = sum(float((_rows(tensors, start) - part).double().square().sum()) for start, part in _parts(weight))
        return math.sqrt(lost) / max(float(weight.norm()), 1e-30)
    residual = tensors.residual()
    wrong = right = 0.0
    for rows in problem.inputs.split(1024):
        expected = rows @ weight.T
        actual = problem.quantized_inputs(rows, smooth) @ residual.T
        if tensors.proj_down is not None and tensors.proj_up is not None:
            actual += rows @ tensors.proj_down.float().T @ tensors.proj_up.float().T
        wrong += float((actual - expected).square().sum())
        if bias is not None:
            expected = expected + bias.float()
        right += float(expected.square().sum())
    return (wrong / max(right, 1e-300)) ** 0.5


def _parts(weight: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows) of a weight, some rows at a time."""
    return ((start, weight[start : start + ROWS]) for start in range(0, len(weight), ROWS))


def _rows(tensors: SVDQuantTensors, start: int) -> Tensor:
    """Some rows of the dense weight that a record means."""
    rows = slice(start, start + ROWS)
    part: dict[str, Any] = {n: getattr(tensors, n) for n in ("qweight", "wscales", "wcscales", "wzeros", "proj_up")}
    part = {name: None if value is None else value[rows] for name, value in part.items()}
    return replace(tensors, bias=None, **part).dense()[0]
