"""Smoothing: how much of the activations' outliers moves into the weight (paper, section 4.1).

s_c = max|x_c|^α / max|w_c|^β over the calibration inputs and all members of the group. The grid is the published
recipe's: no smoothing, (α, 0) and (α, 1 − α).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..numerics import padded_columns
from .low_rank import dense_svd, truncated_svd
from .problem import Problem

# Rows × N × K of one evaluation; enough rows for the ranking, few enough to try dozens of candidates.
EVALUATION_WORK = 1e10
FEWEST_ROWS, MOST_ROWS = 256, 1024


@dataclass
class SmoothResult:
    """factor: s [K] float32, exactly representable in the model's type; error: relative, of the winner on the rows."""

    factor: Tensor
    alpha: float
    beta: float
    error: float


def grid(steps: int) -> list[tuple[float, float]]:
    """The 2·steps − 1 candidates (α, β)."""
    pairs = [(0.0, 0.0)]
    for i in range(1, steps):
        pairs += [(i / steps, 0.0), (i / steps, 1 - i / steps)]
    return pairs


def smooth_factor(x_amax: Tensor, w_amax: Tensor, alpha: float, beta: float, dtype: torch.dtype) -> Tensor:
    """s [K], rounded to `dtype`; ones where it would not be finite and positive. Scaled to a geometric mean of 1."""
    factor = x_amax.double() ** alpha / w_amax.double() ** beta
    factor = torch.where((factor > 0) & torch.isfinite(factor), factor, torch.ones_like(factor))
    factor = factor / factor.log().mean().exp()
    # Half precision ends at 65504; a factor beyond 10⁴ says nothing that 10⁴ does not.
    factor = factor.clamp(1e-4, 1e4).to(dtype).float()
    return factor


def evaluation_rows(problem: Problem, generator: torch.Generator) -> Tensor:
    """The rows of the inputs that candidates are scored on."""
    inputs = problem.inputs
    assert inputs is not None
    rows = int(EVALUATION_WORK / (problem.weight.shape[0] * problem.columns))
    rows = min(max(rows, FEWEST_ROWS), MOST_ROWS)
    if rows >= inputs.shape[0]:
        return inputs
    return inputs[torch.randperm(inputs.shape[0], generator=generator)[:rows].to(inputs.device)]


def search(
    problem: Problem, x_amax: Tensor, steps: int, generator: torch.Generator, exact_svd: bool = False
) -> SmoothResult:
    """The best factor of the grid, scored on the group's output with quantized inputs and the branch in place.

    exact_svd: a dense SVD per candidate, as published; only to check what the truncated one costs.
    """
    rows = evaluation_rows(problem, generator)
    target = rows @ problem.weight.T
    w_amax = problem.weight.abs().amax(0)
    norm = float(target.double().square().sum())
    best: SmoothResult | None = None
    down: Tensor | None = None
    tried: list[Tensor] = []
    for alpha, beta in grid(steps):
        factor = smooth_factor(x_amax, w_amax, alpha, beta, problem.dtype)
        if any(torch.equal(factor, other) for other in tried):
            continue
        tried.append(factor)
        weight = problem.smoothed_weight(factor)
        if exact_svd:
            up, down = dense_svd(weight, problem.spec.rank)
        else:
            # Neighbours on the grid have nearly the same subspace.
            iterations = 1 if down is not None else 4
            up, down = truncated_svd(weight, problem.spec.rank, generator, down, iterations)
        quantized = problem.quantized_inputs(rows, factor)
        score = problem.score(target, quantized, problem.smoothed_inputs(rows, factor), weight, up, down)
        error = (score / max(norm, 1e-300)) ** 0.5
        if best is None or error < best.error:
            best = SmoothResult(factor, alpha, beta, error)
    assert best is not None
    return best


def search_segments(
    problem: Problem, x_amax: Tensor, segments: tuple[tuple[int, int], ...], steps: int, generator: torch.Generator
) -> list[SmoothResult]:
    """One search per column range, each on the part of the product that it makes.

    An input concatenated from several tensors has statistics of several kinds. Each factor is scaled so that its part
    of x/s has unit mean square: the shared branch then weighs the parts as the output does.
    """
    results = []
    for start, stop in segments:
        part = _columns(problem, start, stop)
        result = search(part, x_amax[start:stop], steps, generator)
        if len(segments) > 1:
            assert part.inputs is not None
            power = (part.inputs / result.factor).square().mean().sqrt().clamp(1e-4, 1e4)
            scaled = (result.factor * power).clamp(1e-4, 6e4)
            result = replace(result, factor=scaled.to(problem.dtype).float())
        results.append(result)
    return results


def _columns(problem: Problem, start: int, stop: int) -> Problem:
    """The problem restricted to some input columns."""
    assert problem.inputs is not None
    width = stop - start
    if width == problem.weight.shape[1]:
        return problem
    inside = tuple(
        (max(a, start) - start, min(b, stop) - start) for a, b in problem.spec.unsigned if a < stop and b > start
    )
    spec = replace(problem.spec, unsigned=inside, rank=min(problem.spec.rank, width))
    return replace(
        problem,
        weight=problem.weight[:, start:stop].contiguous(),
        inputs=problem.inputs[:, start:stop].contiguous(),
        spec=spec,
        columns=padded_columns(width, spec),
    )
