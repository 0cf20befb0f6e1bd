"""What quantizing did to each layer: a table for people, JSON for programs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..errors import SVDQuantError
from .leftovers import Leftovers


@dataclass
class LayerReport:
    """error: relative output error on the calibration inputs, or of the weight itself (`error_of`) without any.

    kind: "svdquant", "w4a16" or "keep" (a layer whose error sent it back to 16 bits). alpha, beta: of the smoothing
    factor (of the last column range where there are several). rounds: the refinement round that won. seconds: the
    layer's share of its group.
    """

    name: str
    kind: str
    weights: str
    activations: str
    rank: int
    rotate: bool
    error: float
    error_of: str
    alpha: float
    beta: float
    rounds: int
    rows: int
    group: str
    bytes_before: int
    bytes_after: int
    seconds: float = 0.0


@dataclass
class Report:
    """The layers in the model's order, and the model's bytes. leftovers: what stayed in 16 bits, where it is known."""

    model_class: str
    layers: list[LayerReport] = field(default_factory=list)
    bytes_before: int = 0
    bytes_after: int = 0
    seconds: float = 0.0
    leftovers: Leftovers | None = None

    @property
    def quantized(self) -> list[LayerReport]:
        return [layer for layer in self.layers if layer.kind != "keep"]

    def worst(self, count: int = 5) -> list[LayerReport]:
        """The quantized layers with the largest errors, largest first."""
        return sorted(self.quantized, key=lambda layer: -layer.error)[:count]

    def mean_error(self) -> float:
        errors = [layer.error for layer in self.quantized]
        return sum(errors) / len(errors) if errors else 0.0

    def check(self, max_error: float | None) -> None:
        """Raises `SVDQuantError` naming the worst layers where one exceeds `max_error`."""
        bad = [
            layer for layer in self.worst(len(self.layers)) if max_error is not None and not layer.error <= max_error
        ]
        if bad:
            named = ", ".join(f"{layer.name} ({layer.error:.3f})" for layer in bad[:3])
            raise SVDQuantError(
                f"{len(bad)} layers exceed the relative error {max_error}: {named}; raise --max-error, or keep them in "
                "16 bits with --keep-16bit-above"
            )

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Report:
        data = json.loads(text)
        data["layers"] = [LayerReport(**layer) for layer in data["layers"]]
        if data.get("leftovers") is not None:
            data["leftovers"] = Leftovers.from_dict(data["leftovers"])
        return cls(**data)

    def add(self, part: Report, component: str = "") -> None:
        """Takes in the report of one model of a pipeline; what stayed in 16 bits is named after the component."""
        self.layers += part.layers
        self.bytes_before += part.bytes_before
        self.bytes_after += part.bytes_after
        self.seconds += part.seconds
        if part.leftovers is not None:
            held = {"": self.leftovers} if self.leftovers is not None else {}
            self.leftovers = Leftovers.together(held | {component: part.leftovers})

    def table(self) -> str:
        """Plain text, one line per layer, below it the worst layers and what stayed in 16 bits."""
        width = max([len(layer.name) for layer in self.layers] + [5])
        header = f"{'kind':8} {'weights':7} {'acts':5} {'error':>7} {'α':>5} {'β':>5} {'round':>5} {'s':>6}"
        lines = [f"{'layer':{width}}  {header}"]
        for layer in self.layers:
            lines.append(
                f"{layer.name:{width}}  {layer.kind:8} {layer.weights:7} {layer.activations:5} {layer.error:7.4f} "
                f"{layer.alpha:5.2f} {layer.beta:5.2f} {layer.rounds:5d} {layer.seconds:6.2f}"
            )
        lines.append("")
        lines.append("worst: " + ", ".join(f"{layer.name} {layer.error:.4f}" for layer in self.worst()))
        lines.append(
            f"{self.bytes_before / 2**20:.1f} MiB -> {self.bytes_after / 2**20:.1f} MiB, mean error "
            f"{self.mean_error():.4f}, {self.seconds:.1f} s"
        )
        if self.leftovers is not None:
            lines += ["", self.leftovers.table(), *filter(None, [self.leftovers.hint()])]
        return "\n".join(lines) + "\n"

    def save(self, folder: Path) -> None:
        """Writes `svdquant_report.json` and `svdquant_report.txt`."""
        (folder / "svdquant_report.json").write_text(self.to_json())
        (folder / "svdquant_report.txt").write_text(self.table())
