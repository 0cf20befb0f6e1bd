"""How long solving a group takes: its arithmetic, counted, over rates measured on a CPU."""

from __future__ import annotations

from ..config import SVDQuantConfig
from ..numerics import padded_columns
from ..ptq.low_rank import ITERATIONS, OVERSAMPLE
from ..ptq.plan import GroupPlan
from ..ptq.smooth import EVALUATION_WORK, FEWEST_ROWS, MOST_ROWS, grid

# Fitted to seven groups of 256-2048 inputs on one core of an AMD EPYC with AVX-512: 5.0e10 and 3.6e7 a second, each
# group within 26 %. A second core is counted as 0.8 of the first.
FLOPS_PER_SECOND = 5.0e10 * 1.8
QUANTIZED_PER_SECOND = 3.6e7 * 1.8


def minutes(group: GroupPlan, config: SVDQuantConfig, calibrated: bool = True) -> float:
    """Of solving one group on two CPU cores."""
    flops, quantized = group_work(group, config, calibrated)
    return (flops / FLOPS_PER_SECOND + quantized / QUANTIZED_PER_SECOND) / 60


def group_work(group: GroupPlan, config: SVDQuantConfig, calibrated: bool = True) -> tuple[float, float]:
    """(floating-point operations, numbers quantized) of the stages of `solve_group`."""
    mine, spec = config.for_layer(group.name) or config, group.spec
    k = padded_columns(group.in_features, spec)
    dense = float(k) * sum(member.out_features for member in group.members)
    rows = mine.calibration_rows if calibrated else 0
    # Xᵀ·X, factorisations in float64, and the sweep over the columns.
    gptq = 2 * rows * k * k + 3 * k**3 + dense * k if calibrated and mine.gptq else 0.0
    if spec.kind == "w4a16":
        if not calibrated:
            # Five scales are tried for each weight, which costs what quantizing 1.4 activations does.
            return 0.0, 1.4 * dense
        # A modulation is drawn a row a step.
        modulates = group.members[0].reason.startswith("modulation")
        return gptq + (0 if modulates else 4 * rows * dense), 0.0
    width = spec.rank + OVERSAMPLE if spec.rank else 0
    flops = (2 * ITERATIONS + 2) * 2 * dense * width
    if not calibrated:
        return flops + mine.refine * 10 * dense * width, 0.0
    scored = min(rows, MOST_ROWS, max(FEWEST_ROWS, EVALUATION_WORK / dense))
    tries = mine.refine + (len(grid(mine.smooth_grid)) if spec.smooth else 0)
    # Four products with the subspace, the branch taken out, and the scored product.
    flops += tries * (10 * dense * width + 2 * dense * scored)
    return flops + gptq + 4 * rows * dense, (tries * scored + rows) * k
