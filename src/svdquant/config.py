"""What to quantize, how, and what came of it. No torch here: `import svdquant` must stay light."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields, replace
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any

from .errors import SVDQuantError

FORMAT_VERSION = 1
WEIGHTS = ("int4", "nvfp4", "int8")
ACTIVATIONS = ("auto", "int4", "int8", "fp8", "nvfp4", "none")
GROUP_SIZES = {"int4": 64, "nvfp4": 16, "int8": 0}
MAX_RANK = 256
# Of one stored layer: published checkpoints split an input that is one here, and their two branches then add up.
MAX_STORED_RANK = 1024
_WHOLE_MODEL = {"max_error", "calibration_rows", "seed", "skip", "overrides", "components", "layers"}


class QuantizationMethod(str, Enum):
    """diffusers reads `quant_method.value`, so a plain string does not do."""

    SVDQUANT = "svdquant"


@dataclass(frozen=True)
class LayerSpec:
    """How one linear is stored. Everything a reader needs besides the tensors themselves.

    kind: "svdquant" (4/8-bit weights and activations plus low-rank branch) or "w4a16" (weights only).
    weights: stored number format; group_size: inputs per scale, 0 = the whole row.
    activations: what this layer was solved for, and what "auto" may not raise below ("auto" follows the device).
    unsigned: input-column ranges [start, stop) that follow a GELU: shifted, and unsigned in 4-bit activations.
    rotate: x/s and W·s are rotated by a block-Hadamard of 128 channels.
    zeros: "w4a16" with int4 weights only: codes are unsigned 0…15 and each group has a zero point (`wzeros`).
    outer_blocks: nvfp4 only: equal blocks of input columns, each with an outer scale (`wcscales`) of its own.
    """

    kind: str = "svdquant"
    weights: str = "int4"
    group_size: int = 64
    rank: int = 32
    activations: str = "auto"
    unsigned: tuple[tuple[int, int], ...] = ()
    rotate: bool = False
    smooth: bool = True
    zeros: bool = False
    outer_blocks: int = 1

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> LayerSpec:
        known = {f.name for f in fields(cls)}
        values = {k: v for k, v in data.items() if k in known}
        if "unsigned" in values:
            values["unsigned"] = tuple((int(a), int(b)) for a, b in values["unsigned"])
        return cls(**values)


@dataclass
class SVDQuantConfig:
    """Options of `svdquant.quantize`, and the `quantization_config` of a saved model.

    weights: "int4" (groups of 64), "nvfp4" (groups of 16) or "int8" (per row).
    activations: "auto", "int4", "int8", "fp8", "nvfp4" or "none"; the precision that the solver optimises for. "auto"
        solves for the most demanding one that the weights allow and lets the device decide at run time.
    group_size: inputs per weight scale; None takes the format's own.
    rank: of the 16-bit low-rank branch, 0-256.
    smooth: True (20 grid steps), False, or the number of grid steps.
    refine: rounds alternating branch and quantized residual (paper, section 4.2); the best is kept.
    gptq: quantize the residual with GPTQ where calibration inputs exist, else round to nearest.
    rotate: block-Hadamard of 128 channels on x/s and W·s; None = on for 4-bit activations with int4 weights.
    modulation: "int4" stores AdaLN linears as W4A16 (as W8A16 beside int8 weights), "none" keeps them in 16 bits.
    text_kv: "none" keeps the keys and values of cross-attentions, which read the text, in 16 bits, as published recipes
        do; "int8" or "int4" stores their weights in that (W8A16, W4A16).
    skip: patterns of modules that stay in 16 bits; overrides: pattern → dict of fields of this class, or None to skip.
    keep_16bit_above: layers whose relative output error exceeds it stay in 16 bits.
    int8_activations_above: layers whose error exceeds it are solved again for 8-bit activations.
    max_error: refuse the whole result when a layer's error exceeds it.
    components: of a pipeline besides its denoisers: name → dict of fields of this class. Only what quantizes whole
        pipelines reads it; every component's own configuration is stored without it.
    calibration_rows: input rows kept per group. seed: of every random number used.
    layers: filled by quantizing: module name → fields of `LayerSpec`.
    """

    weights: str = "int4"
    activations: str = "auto"
    group_size: int | None = None
    rank: int = 32
    smooth: bool | int = True
    refine: int = 0
    gptq: bool = True
    rotate: bool | None = None
    modulation: str = "int4"
    text_kv: str = "none"
    skip: list[str] = field(default_factory=list)
    overrides: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    components: dict[str, dict[str, Any]] = field(default_factory=dict)
    keep_16bit_above: float | None = None
    int8_activations_above: float | None = None
    max_error: float | None = None
    calibration_rows: int = 4096
    seed: int = 0
    layers: dict[str, dict[str, Any]] | None = None
    format_version: int = FORMAT_VERSION
    quant_method: QuantizationMethod = QuantizationMethod.SVDQUANT

    def __post_init__(self) -> None:
        self.quant_method = QuantizationMethod.SVDQUANT
        self.skip = [self.skip] if isinstance(self.skip, str) else list(self.skip or ())
        self.validate()

    def validate(self) -> None:
        """Raises `SVDQuantError` naming the first field that cannot be."""
        if int(self.format_version) > FORMAT_VERSION:
            raise SVDQuantError(
                f"checkpoint format version {self.format_version} is newer than {FORMAT_VERSION}, the newest this "
                "version of svdquant reads; upgrade svdquant"
            )
        if self.weights not in WEIGHTS:
            raise SVDQuantError(f"weights={self.weights!r} is not one of {', '.join(WEIGHTS)}")
        if self.activations not in ACTIVATIONS:
            raise SVDQuantError(f"activations={self.activations!r} is not one of {', '.join(ACTIVATIONS)}")
        if self.modulation not in ("int4", "none"):
            raise SVDQuantError(f"modulation={self.modulation!r} is not one of int4, none")
        if self.text_kv not in ("none", "int8", "int4"):
            raise SVDQuantError(f"text_kv={self.text_kv!r} is not one of none, int8, int4")
        for name in ("rank", "refine", "calibration_rows", "seed"):
            if isinstance(getattr(self, name), bool) or not isinstance(getattr(self, name), int):
                raise SVDQuantError(f"{name}={getattr(self, name)!r} is no whole number")
        if not isinstance(self.gptq, bool) or self.rotate not in (None, True, False):
            raise SVDQuantError("gptq and rotate are True or False")
        if not isinstance(self.smooth, int) or self.smooth < 0:
            raise SVDQuantError(f"smooth={self.smooth!r} is neither True, False nor a number of grid steps")
        for name in ("keep_16bit_above", "int8_activations_above", "max_error"):
            limit = getattr(self, name)
            if limit is not None and not limit > 0:
                raise SVDQuantError(f"{name}={limit!r} must be a relative error above 0")
        if not 0 <= self.rank <= MAX_RANK:
            raise SVDQuantError(f"rank={self.rank} is outside 0-{MAX_RANK}")
        if self.refine < 0:
            raise SVDQuantError(f"refine={self.refine} must not be negative")
        if not -(2**63) <= self.seed < 2**63:
            raise SVDQuantError(f"seed={self.seed} does not fit 64 bits")
        if self.calibration_rows < 1:
            raise SVDQuantError(f"calibration_rows={self.calibration_rows} must be at least 1")
        if self.group_size is not None:
            smallest = {"int4": 2, "nvfp4": 16, "int8": 0}[self.weights]
            valid = self.group_size == 16 if self.weights == "nvfp4" else self.group_size >= smallest
            if not valid or (self.weights == "int4" and self.group_size % 2):
                raise SVDQuantError(f"group_size={self.group_size} does not fit {self.weights} weights")
        for pattern, override in self.overrides.items():
            unknown = set(override or ()) - {f.name for f in fields(self)}
            if unknown:
                raise SVDQuantError(f"override {pattern!r} has unknown fields: {', '.join(sorted(unknown))}")
            whole = set(override or ()) & _WHOLE_MODEL
            if whole:
                raise SVDQuantError(f"override {pattern!r}: {', '.join(sorted(whole))} holds for the whole model only")
            if override:
                replace(self, overrides={}, components={}, **override)
        for name, values in self.components.items():
            self._check_component(name, values)

    def _check_component(self, name: str, values: dict[str, Any]) -> None:
        """Raises `SVDQuantError` where the configuration of a component cannot be."""
        if not isinstance(values, dict):
            raise SVDQuantError(f"component {name!r} is {values!r}, not options of its own")
        unknown = set(values) - {f.name for f in fields(self)} | set(values) & {"components", "layers"}
        if unknown:
            raise SVDQuantError(f"component {name!r} has unknown fields: {', '.join(sorted(unknown))}")
        try:
            SVDQuantConfig(**values)
        except SVDQuantError as error:
            raise SVDQuantError(f"component {name!r}: {error}") from error

    @property
    def weight_group_size(self) -> int:
        return GROUP_SIZES[self.weights] if self.group_size is None else self.group_size

    @property
    def solve_activations(self) -> str:
        """The activation precision that the solver scores against."""
        if self.activations != "auto":
            return self.activations
        return {"int4": "int4", "nvfp4": "nvfp4", "int8": "int8"}[self.weights]

    @property
    def modulation_weights(self) -> str:
        """Stored format of AdaLN linears, or "none"."""
        return "int8" if self.modulation == "int4" and self.weights == "int8" else self.modulation

    @property
    def weights_only(self) -> bool:
        """Whether nothing but the weights is quantized (W4A16): no branch, no smoothing, activations as they are."""
        return self.activations == "none" and self.rank == 0 and not self.smooth_grid and self.weights != "nvfp4"

    @property
    def use_rotation(self) -> bool:
        if self.rotate is None:
            return self.weights == "int4" and self.solve_activations == "int4"
        return bool(self.rotate)

    @property
    def smooth_grid(self) -> int:
        """Grid steps of the smoothing search; 0 = off."""
        if isinstance(self.smooth, bool):
            return 20 if self.smooth else 0
        return int(self.smooth)

    def for_layer(self, name: str) -> SVDQuantConfig | None:
        """This configuration with the overrides that match `name`, or None where the layer stays in 16 bits."""
        if any(matches(pattern, name) for pattern in self.skip):
            return None
        config = self
        for pattern, override in self.overrides.items():
            if matches(pattern, name):
                if override is None:
                    return None
                config = replace(config, **override)
        return config

    def layer_spec(self, name: str) -> LayerSpec:
        """The stored form of one layer. Raises `KeyError` where it stayed in 16 bits."""
        defaults: dict[str, Any] = {
            "weights": self.weights,
            "group_size": self.weight_group_size,
            "rank": self.rank,
            "activations": self.activations,
        }
        return LayerSpec.from_dict(defaults | (self.layers or {})[name])

    def with_layers(self, specs: dict[str, LayerSpec]) -> SVDQuantConfig:
        """A copy that records what each layer became; only what differs from this configuration is written."""
        base = LayerSpec(
            weights=self.weights, group_size=self.weight_group_size, rank=self.rank, activations=self.activations
        )
        layers = {}
        for name, spec in specs.items():
            full, default = asdict(spec), asdict(base)
            layers[name] = {
                k: ([list(r) for r in v] if k == "unsigned" else v)
                for k, v in full.items()
                if k == "kind" or v != default[k]
            }
        return replace(self, layers=layers)

    # What diffusers and transformers expect of a quantization config.

    def to_dict(self) -> dict[str, Any]:
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        data["quant_method"] = self.quant_method.value
        return json.loads(json.dumps(data))

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> SVDQuantConfig | tuple[SVDQuantConfig, dict[str, Any]]:
        known = {f.name for f in fields(cls)} - {"quant_method"}
        # Fields of a later minor revision are ignored; a changed meaning raises format_version instead.
        config = cls(**{k: v for k, v in config_dict.items() if k in known})
        unused = config.update(**kwargs)
        return (config, unused) if return_unused_kwargs else config

    def update(self, **kwargs: Any) -> dict[str, Any]:
        unused = {}
        for key, value in kwargs.items():
            if hasattr(self, key):
                setattr(self, key, value)
            else:
                unused[key] = value
        return unused

    def to_diff_dict(self) -> dict[str, Any]:
        default = SVDQuantConfig().to_dict()
        return {k: v for k, v in self.to_dict().items() if k == "quant_method" or v != default[k]}

    def to_json_string(self, use_diff: bool = True) -> str:
        return json.dumps(self.to_diff_dict() if use_diff else self.to_dict(), indent=2, sort_keys=True) + "\n"

    def get_loading_attributes(self) -> dict[str, Any]:
        return {}

    def __iter__(self) -> Any:
        yield from self.to_dict().items()


def matches(pattern: str, name: str) -> bool:
    """Whether a module name fits a pattern: a shell glob over the whole name, or a part of its path."""
    return fnmatchcase(name, pattern) or f".{pattern}." in f".{name}."
