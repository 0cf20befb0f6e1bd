"""What a conversion changes in a model, counted and put into words."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..config import LayerSpec

SIXTEEN = "16 bits"


@dataclass
class Change:
    """Layers (or, for `what`, other things) that became something else for one reason.

    errors: name → ‖W′ − W‖/‖W‖ of the weight that the layer means, or of the tensor named.
    """

    before: str
    after: str
    why: str
    what: str = "layer"
    errors: dict[str, float] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return len(self.errors)

    @property
    def mean_error(self) -> float:
        return sum(self.errors.values()) / max(len(self.errors), 1)

    @property
    def worst(self) -> tuple[str, float]:
        return max(self.errors.items(), key=lambda item: item[1])

    def sentence(self) -> str:
        name, error = self.worst
        of = f"{self.count} {self.what}{'s' * (self.count != 1)}"
        return (
            f"{of}: {self.before} → {self.after}, because {self.why}; relative error {self.mean_error:.4g} on average, "
            f"{error:.4g} at worst ({name})"
        )

    def to_dict(self) -> dict[str, Any]:
        name, error = self.worst
        return {
            "what": self.what,
            "count": self.count,
            "before": self.before,
            "after": self.after,
            "why": self.why,
            "mean_error": self.mean_error,
            "worst_error": error,
            "worst": name,
        }


def describe(spec: LayerSpec | None) -> str:
    """How a layer is stored, in words; None is a layer that is not quantized."""
    if spec is None:
        return SIXTEEN
    group = f"groups of {spec.group_size}" if spec.group_size else "whole rows"
    more = ", rotated" if spec.rotate else ""
    if spec.outer_blocks > 1:
        more += f", {spec.outer_blocks} outer scales per row"
    return f"{'W4A16 ' if spec.kind == 'w4a16' else ''}{spec.weights} in {group}{more}"
