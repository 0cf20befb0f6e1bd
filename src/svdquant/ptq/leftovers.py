"""What stayed in 16 bits: every parameter that belongs to no quantized layer, why, and its share of the bytes.

It looks at parameters, not at linears, so that a model of a new kind cannot hide its weights where no plan looks.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from ..config import SVDQuantConfig, matches
from ..nn import quantized_layers
from .linears import find_linears
from .names import joined_names
from .plan import Plan, linear_shape

# Above this share of the model's bytes something may have been forgotten.
HINT_ABOVE = 0.05
# A hint names what has at least this share, of at most so many reasons.
_WORTH_NAMING, _MOST_NAMED = 0.01, 3
CONVOLUTION, EMBEDDING, NORM = "convolution", "embedding", "norm"
STACKED, OTHER, LINEAR = "stacked weights", "parameter of its own", "linear that is not quantized"
KEPT = "its error exceeds keep_16bit_above"
_SKIPPED = "skipped by the configuration"
_NOTHING = "nothing in this version quantizes them"
# The beginning of a reason → what can be done about it.
_REMEDIES = (
    ("reads the ", "`--text-kv int8` stores them in 8 bits"),
    (_SKIPPED, "leave out that `--skip` or `--override`"),
    ("modulation, kept by the configuration", "`--modulation int4` quantizes them"),
    ("modulation shared by all blocks", "kept on purpose: what they lose, every block loses"),
    ("projects what one of the blocks", "kept on purpose: few layers, much quality"),
    ("narrower than", "lower `--rank`"),
    (KEPT, "raise `--keep-16bit-above`, or `--rank`"),
    (CONVOLUTION, _NOTHING),
    (STACKED, _NOTHING),
    (EMBEDDING + ", final", "kept on purpose: few layers, much quality"),
    (EMBEDDING, _NOTHING),
)


@dataclass(frozen=True)
class Leftover:
    """One parameter in 16 or 32 bits. dtype: as torch names it; bytes: of the whole parameter."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    reason: str


@dataclass(frozen=True)
class LeftoverLine:
    """Parameters that differ only in numbers of their path; bytes: of all of them."""

    name: str
    count: int
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    reason: str


@dataclass
class Leftovers:
    """The parameters that stay, and what the others weigh.

    quantized: bytes that the quantized layers had in 16 bits, biases included; so `total` is the 16-bit model's.
    stored: what these layers have now: codes, scales, smoothing, branch and bias.
    """

    entries: list[Leftover] = field(default_factory=list)
    quantized: int = 0
    stored: int = 0

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.entries)

    @property
    def total(self) -> int:
        return self.quantized + self.bytes

    @property
    def share(self) -> float:
        """Of the 16-bit model's bytes."""
        return self.bytes / self.total if self.total else 0.0

    def lines(self) -> list[LeftoverLine]:
        """Equal parameters of different blocks joined, the largest first."""
        names = [(entry.name, (entry.shape, entry.dtype, entry.reason)) for entry in self.entries]
        lines = []
        for name, positions in joined_names(names):
            first = self.entries[positions[0]]
            weigh = sum(self.entries[position].bytes for position in positions)
            lines.append(LeftoverLine(name, len(positions), first.shape, first.dtype, weigh, first.reason))
        return sorted(lines, key=lambda line: -line.bytes)

    def hint(self) -> str:
        """One or two sentences on what stays and what can be done about it; "" where 5 % or less stay."""
        if self.share <= HINT_ABOVE:
            return ""
        by_reason: dict[str, list[LeftoverLine]] = {}
        for line in self.lines():
            by_reason.setdefault(line.reason, []).append(line)
        weights = {reason: sum(line.bytes for line in lines) / self.total for reason, lines in by_reason.items()}
        largest = sorted(weights, key=lambda reason: -weights[reason])[:_MOST_NAMED]
        named = [reason for reason in largest if weights[reason] >= _WORTH_NAMING] or largest[:1]
        parts = [f"{percent(weights[reason])} {reason} ({_named(by_reason[reason], reason)})" for reason in named]
        return f"{percent(self.share)} of the model's bytes stay in 16 bits: {'; '.join(parts)}."

    def table(self) -> str:
        """Plain text, one line per pattern, the largest first, and what the quantized layers became."""
        rows = [
            [line.name, f"×{line.count}" if line.count > 1 else "", "×".join(map(str, line.shape)) or "1", line.dtype,
             f"{line.bytes:,}", f"{100 * line.bytes / self.total:.2f} %", line.reason]
            for line in self.lines()
        ]  # fmt: skip
        rows = [["stayed in 16 bits", "", "shape", "type", "bytes", "share", "reason"], *rows]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        marks = "<<<<>><"
        text = [
            "  ".join(f"{cell:{mark}{w}}" for cell, mark, w in zip(row, marks, widths, strict=True)).rstrip()
            for row in rows
        ]
        text.append(f"all of them: {self.bytes:,} bytes, {100 * self.share:.2f} % of the 16-bit model's {self.total:,}")
        text.append(f"of quantized layers: {self.quantized:,} bytes before, {self.stored:,} after")
        return "\n".join(text)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: sums, the hint, and the joined lines with their shares."""
        lines = [asdict(line) | {"share": round(line.bytes / self.total, 6)} for line in self.lines()]
        sums = {"bytes": self.bytes, "total": self.total, "share": round(self.share, 6)}
        return sums | {"quantized": self.quantized, "stored": self.stored, "hint": self.hint(), "lines": lines}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Leftovers:
        """From `dataclasses.asdict`."""
        entries = [Leftover(**(entry | {"shape": tuple(entry["shape"])})) for entry in data["entries"]]
        return cls(entries, data["quantized"], data["stored"])

    @classmethod
    def together(cls, parts: Mapping[str, Leftovers]) -> Leftovers:
        """Of a pipeline's models: names begin with the component's."""
        entries = [
            replace(entry, name=f"{part}.{entry.name}" if part else entry.name)
            for part, one in parts.items()
            for entry in one.entries
        ]
        quantized, stored = (sum(getattr(one, key) for one in parts.values()) for key in ("quantized", "stored"))
        return cls(entries, quantized, stored)


def find_leftovers(
    model: nn.Module,
    plan: Plan | None = None,
    config: SVDQuantConfig | None = None,
    sent_back: Collection[str] = (),
) -> Leftovers:
    """Of a 16-bit model (meta or real) and its plan, or of a quantized model without one. Buffers do not count.

    A parameter that several modules share counts once, and stays as long as one of them needs it in 16 bits. config:
    what the plan was made with; names the pattern that skipped a layer. sent_back: layers that the plan quantizes and
    whose error then exceeded `keep_16bit_above`. Of a quantized model, a bias that was made to hold a shift counts as
    one that the 16-bit model had.
    """
    shared: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shared.setdefault(id(parameter), []).append(name)
    packed = quantized_layers(model)
    if plan is not None:
        quantized = {name for name, layer in plan.layers.items() if layer.kind != "keep"} - set(sent_back)
        stored = sum(plan.layers[name].bytes_after for name in quantized)
    else:
        quantized = set(packed)
        stored = sum(p.numel() * p.element_size() for layer in packed.values() for p in layer.parameters(recurse=False))
    out = Leftovers(stored=stored)
    modules = dict(model.named_modules(remove_duplicate=False))
    linears = find_linears(model)
    for name, parameter in model.named_parameters():
        owners = [other for other in shared[id(parameter)] if _owner(other) not in quantized]
        weigh = parameter.numel() * parameter.element_size()
        if not owners:
            if _owner(name) not in packed:
                out.quantized += weigh
            continue
        owner = _owner(owners[0])
        shape = tuple(parameter.shape)
        reason = KEPT if owner in sent_back else _reason(owner, modules[owner], shape, owner in linears, plan, config)
        out.entries.append(Leftover(name, shape, str(parameter.dtype).removeprefix("torch."), weigh, reason))
    for layer in packed.values():
        module: Any = layer
        k, n = linear_shape(layer)
        out.quantized += (k * n + n * (module.bias is not None)) * module.compute_dtype.itemsize
    return out


def _owner(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _reason(
    owner: str,
    module: nn.Module,
    shape: tuple[int, ...],
    linear: bool,
    plan: Plan | None,
    config: SVDQuantConfig | None,
) -> str:
    if plan is not None and owner in plan.layers:
        why = plan.layers[owner].reason
        return _skipped_by(owner, config) if why == _SKIPPED and config is not None else why
    if isinstance(module, nn.Embedding):
        return EMBEDDING
    if linear:
        return LINEAR
    if isinstance(module, _ConvNd):
        return CONVOLUTION
    if "norm" in type(module).__name__.lower():
        return NORM
    return f"{STACKED}, of no linear" if _stacked(shape) else OTHER


def likely_reason(name: str, shape: tuple[int, ...]) -> str:
    """What a tensor of a file probably is, where only its name and shape are known."""
    if "norm" in name.lower() and len(shape) == 1:
        return NORM
    if len(shape) > 3:
        return CONVOLUTION
    if _stacked(shape):
        return f"{STACKED}, of no linear"
    if len(shape) == 1 and name.endswith((".weight", ".bias")):
        return "bias or vector"
    return "linear or embedding" if len(shape) == 2 and name.endswith(".weight") else OTHER


def _stacked(shape: tuple[int, ...]) -> bool:
    return len(shape) == 3 and min(shape[1:]) >= 64 and shape[0] > 1


def _skipped_by(layer: str, config: SVDQuantConfig) -> str:
    patterns = [*config.skip, *(pattern for pattern, override in config.overrides.items() if override is None)]
    found = next((pattern for pattern in patterns if matches(pattern, layer)), None)
    return _SKIPPED if found is None else f"{_SKIPPED} ({found!r})"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _named(lines: list[LeftoverLine], reason: str) -> str:
    """The largest of some lines, how many more there are, and the remedy."""
    first = lines[0].name + (f" ×{lines[0].count}" if lines[0].count > 1 else "")
    rest = sum(line.count for line in lines[1:])
    remedy = next((text for start, text in _REMEDIES if reason.startswith(start)), "")
    return (f"{first} and {rest} more" if rest else first) + (f"; {remedy}" if remedy else "")
