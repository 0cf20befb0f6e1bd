"""Post-training quantization: plan → capture → smooth → low-rank → residual → report."""

from .plan import GroupPlan, LayerPlan, Plan, make_plan
from .quantize import quantize
from .report import LayerReport, Report
from .solve import GroupInputs, SolvedLayer, solve_group

__all__ = [
    "GroupInputs",
    "GroupPlan",
    "LayerPlan",
    "LayerReport",
    "Plan",
    "Report",
    "SolvedLayer",
    "make_plan",
    "quantize",
    "solve_group",
]
