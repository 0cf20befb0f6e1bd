"""Makes a quantized model one that another format can hold, in place, and counts what that costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.nunchaku_layouts import Layout, StoredLinear, layout_of
from ..checkpoint.nunchaku_linear import AWQ_GROUP, T5_GROUP
from ..checkpoint.nunchaku_pack import take_columns, unfit, unfit_w4a16
from ..checkpoint.nunchaku_save import TEXT_ENCODERS
from ..checkpoint.packing import AWQ_COLUMNS, AWQ_ROWS, TILE
from ..checkpoint.skeleton import set_tensor
from ..config import GROUP_SIZES, LayerSpec
from ..errors import SVDQuantError
from ..nn import SVDQuantConv2d, SVDQuantLinear, W4A16Linear, quantized_layers, replace_module
from ..numerics import SVDQuantTensors, relative_error
from ..ptq.requantize import (
    Ranges,
    cast,
    common_smoothing,
    dense_error,
    requantize,
    solve_together,
    weight_error,
    weights_only,
)
from ..ptq.solve import group_generator
from .changes import SIXTEEN, Change, describe

_DEFAULT_RANK = 32
_SCALES = ("wscales", "wcscales", "wzeros", "smooth_factor")

Step = Callable[[int, int, str], None]


class Conform:
    """The changes of one model towards one format.

    model: quantized, changed in place. to: "svdquant", "nunchaku" or "nunchaku_lite". weights: "int4" or "nvfp4"
    wanted, or None. dtype: the 16-bit type wanted, or None; stored: the model's own.
    """

    def __init__(
        self, model: Any, to: str, weights: str | None, dtype: torch.dtype | None, stored: torch.dtype, seed: int = 0
    ) -> None:
        self.model, self.to, self.seed = model, to, seed
        self.asked, self.cast_asked = weights, dtype is not None
        self.text_encoder = not hasattr(model, "to_json_string")
        self.half = dtype or (stored if to == "svdquant" or stored != torch.float32 else torch.bfloat16)
        self.stored = stored
        self.changes: list[Change] = []
        records = self.records()
        self.layout = self._layout(records)
        self._check()
        self.weights = self._weights(records)

    def records(self) -> dict[str, SVDQuantTensors]:
        return {name: layer.tensors() for name, layer in quantized_layers(self.model).items()}  # type: ignore[operator]

    def _layout(self, records: dict[str, SVDQuantTensors]) -> Layout | None:
        try:
            return layout_of(self.model, lambda name: name in records)
        except ValueError as error:
            if self.to != "nunchaku":
                return None
            raise SVDQuantError(f"{type(self.model).__name__}: Nunchaku cannot store it ({error})") from error

    def _check(self) -> None:
        name = type(self.model).__name__
        if self.to == "nunchaku" and self.text_encoder and name not in TEXT_ENCODERS:
            raise SVDQuantError(f"Nunchaku has no {name}; convert it to svdquant")
        if self.to == "nunchaku" and not self.text_encoder and self.layout is None:
            raise SVDQuantError(f"Nunchaku has no {name}; convert it to nunchaku_lite or svdquant")
        if self.to == "nunchaku_lite" and self.text_encoder:
            other = "nunchaku or svdquant" if name in TEXT_ENCODERS else "svdquant"
            raise SVDQuantError(f"nunchaku_lite holds models of diffusers, no {name}; convert it to {other}")
        if self.to != "svdquant" and self.half == torch.float32:
            raise SVDQuantError(f"{self.to} holds bfloat16 and float16; leave out --dtype float32")
        if self.to == "nunchaku" and self.layout and not self.layout.nvfp4 and self.asked == "nvfp4":
            raise SVDQuantError(f"Nunchaku has no nvfp4 {name}; leave out --weights nvfp4")

    def _weights(self, records: dict[str, SVDQuantTensors]) -> str:
        """The one precision of the W4A4 layers; what most of the model has, unless asked for."""
        if self.to == "nunchaku" and self.layout and not self.layout.nvfp4:
            return "int4"
        if self.asked:
            return self.asked
        sizes: Counter[str] = Counter()
        for record in records.values():
            if record.spec.kind == "svdquant" and record.spec.weights in ("int4", "nvfp4"):
                sizes[record.spec.weights] += record.qweight.numel()
        return max(sizes, key=lambda kind: sizes[kind]) if sizes else "int4"

    def run(self, step: Step) -> None:
        """Makes all changes. step(done, total, name) is called after each layer."""
        self._cast_all()
        jobs = self._jobs()
        for number, (name, job) in enumerate(jobs):
            job()
            step(number + 1, len(jobs), name)
        if not quantized_layers(self.model):
            raise SVDQuantError(
                f"{self.to} can hold none of the model's quantized layers; convert it to another format"
            )
        self.changes = [change for change in self.changes if change.errors]

    def _jobs(self) -> list[tuple[str, Callable[[], None]]]:
        records = self.records()
        jobs: list[tuple[str, Callable[[], None]]] = []
        if self.to == "nunchaku" and self.layout is not None:
            known = {member for linear in self.layout.linears for member in linear.members}
            why = "Nunchaku keeps them in 16 bits"
            jobs += [(n, lambda n=n: self._to_16_bits(n, why)) for n in records if n not in known]  # type: ignore[misc]
            jobs += [(linear.members[0], lambda l=linear: self._linear(l)) for linear in self.layout.linears]  # type: ignore[misc]
            return jobs
        one = {"nunchaku": self._t5_layer, "nunchaku_lite": self._lite_layer, "svdquant": self._own_layer}[self.to]
        return [(name, lambda name=name: one(name)) for name in records]  # type: ignore[misc]

    # Layer by layer, one method per format.

    def _own_layer(self, name: str) -> None:
        spec = self._record(name).spec
        if self.asked is None:
            return
        why = f"--weights {self.asked}"
        if spec.kind == "w4a16":
            if spec.weights != "int4":
                self._requantize(name, "int4", AWQ_GROUP, why)
        elif spec.weights != self.asked:
            self._requantize(name, self.asked, GROUP_SIZES[self.asked], why)

    def _t5_layer(self, name: str) -> None:
        record = self._record(name)
        reason = unfit_w4a16(record, T5_GROUP)
        if not reason:
            return
        if _packs(record, T5_GROUP):
            self._weights_only(name, T5_GROUP, "Nunchaku's text encoders are W4A16 in groups of 128")
        else:
            self._to_16_bits(name, f"Nunchaku cannot pack {_shape(record)}")

    def _lite_layer(self, name: str) -> None:
        record = self._record(name)
        spec = record.spec
        if isinstance(self.model.get_submodule(name), nn.Conv2d):
            self._to_16_bits(name, "nunchaku_lite has no quantized convolutions")
        elif spec.kind == "w4a16":
            if unfit_w4a16(record, AWQ_GROUP):
                if _packs(record, AWQ_GROUP):
                    self._requantize(name, "int4", AWQ_GROUP, "nunchaku_lite has W4A16 int4 in groups of 64")
                else:
                    self._to_16_bits(name, f"nunchaku_lite cannot pack {_shape(record)}")
        elif record.in_features % TILE or record.out_features % TILE:
            self._to_16_bits(name, f"nunchaku_lite has multiples of {TILE}, not {_shape(record)}")
        elif reason := self._misfit(record):
            self._requantize(name, self.weights, GROUP_SIZES[self.weights], reason, unsigned=())

    def _misfit(self, record: SVDQuantTensors, cut: bool = False) -> str:
        """Why a W4A4 layer has to be requantized, or ""."""
        spec = record.spec
        if spec.weights != self.weights:
            if spec.weights not in ("int4", "nvfp4"):
                return f"{self.to} has no {spec.weights}"
            if self.asked == self.weights:
                return f"--weights {self.asked}"
            if self.layout is not None and not self.layout.nvfp4 and self.to == "nunchaku":
                return f"Nunchaku has no nvfp4 {type(self.model).__name__}"
            return f"{self.to} has one precision for all layers"
        if spec.rotate:
            return "no published format holds a rotation"
        if spec.outer_blocks > 1 and not cut:
            return f"{self.to} has one outer scale per row"
        if unfit(record, cut):
            return f"{self.to} has {describe(LayerSpec(weights=self.weights, group_size=GROUP_SIZES[self.weights]))}"
        return ""

    def _linear(self, linear: StoredLinear) -> None:
        """The members of one linear of a Nunchaku file."""
        if linear.kind == "w4a16":
            for name in linear.members:
                record = self._record_or_none(name)
                if record is None:
                    self._weights_only(name, AWQ_GROUP, "Nunchaku has them in W4A16")
                elif unfit_w4a16(record, AWQ_GROUP):
                    self._weights_only(name, AWQ_GROUP, "Nunchaku has W4A16 int4 in groups of 64")
            return
        records = [self._record_or_none(name) for name in linear.members]
        held = [record for record in records if record is not None and record.spec.kind == "svdquant"]
        if len(held) < len(records) or not _alike(held):
            self._solve(linear, held)
            return
        for name, record in zip(linear.members, held, strict=True):
            reason = self._misfit(record, cut=len(linear.pieces) > 1)
            if not reason and not _can_be_cut(record, linear):
                reason = "Nunchaku cuts the layer elsewhere"
            if reason:
                self._requantize(name, self.weights, GROUP_SIZES[self.weights], reason)

    def _solve(self, linear: StoredLinear, held: Sequence[SVDQuantTensors]) -> None:
        """All members anew from their dense meaning, with what they have in common."""
        why = "Nunchaku stores them as one layer, with one smoothing"
        if len(held) < len(linear.members):
            why = "Nunchaku has them quantized (solved anew, without calibration)"
        olds = [self._record_or_none(name) for name in linear.members]
        dense = [self._dense(name) for name in linear.members]
        ranks = Counter(r.spec.rank for r in self.records().values() if r.spec.kind == "svdquant")
        rank = ranks.most_common(1)[0][0] if ranks else _DEFAULT_RANK
        spec = LayerSpec(weights=self.weights, group_size=GROUP_SIZES[self.weights], rank=rank)
        spec = replace(spec, unsigned=self._after_gelu(linear.members[0]) if self.weights == "int4" else ())
        generator = group_generator(self.seed, linear.members[0])
        news = solve_together(dense, spec, self.half, generator, common_smoothing(held))
        for name, old, new, (weight, _) in zip(linear.members, olds, news, dense, strict=True):
            self._note(describe(old.spec if old else None), describe(new.spec), why, name, _error_of(new, weight))
            self._install(name, new)

    def _after_gelu(self, name: str) -> Ranges:
        """Input columns of a layer that follow a GELU, as far as the family's layout says so."""
        for linear in self.layout.linears if self.layout else ():
            if name in linear.members:
                width = _in_features(self.model.get_submodule(name))
                return tuple((p.start, width if p.stop is None else p.stop) for p in linear.pieces if p.unsigned)
        return ()

    # The changes themselves.

    def _requantize(self, name: str, weights: str, group_size: int, why: str, unsigned: Ranges | None = None) -> None:
        old = self._record(name)
        if unsigned is None and old.spec.kind == "svdquant" and weights == "int4":
            unsigned = old.spec.unsigned or self._after_gelu(name)
        new = requantize(old, weights, group_size, self.half, unsigned)
        error = dense_error(new, old)
        # Groups that were only cut into smaller ones mean the same numbers.
        if error or new.spec.weights != old.spec.weights:
            self._note(describe(old.spec), describe(new.spec), why, name, error)
        self._install(name, new)

    def _weights_only(self, name: str, group_size: int, why: str) -> None:
        old = self._record_or_none(name)
        if old is not None and old.spec.kind == "w4a16" and old.spec.weights == "int4":
            self._requantize(name, "int4", group_size, why)
            return
        weight, bias = self._dense(name)
        new = weights_only(weight, bias, group_size, self.half)
        self._note(describe(old.spec if old else None), describe(new.spec), why, name, _error_of(new, weight))
        self._install(name, new)

    def _to_16_bits(self, name: str, why: str) -> None:
        layer: Any = self.model.get_submodule(name)
        weight, bias = layer.tensors().dense()
        rounded = weight.to(self.half)
        self._note(describe(layer.spec), SIXTEEN, why, name, weight_error(rounded, weight))
        replace_module(self.model, name, layer._dense_module(rounded, None if bias is None else bias.to(self.half)))

    def _cast_all(self) -> None:
        """Everything in the 16-bit type that the format has, or that was asked for."""
        if self.to == "svdquant" and not self.cast_asked:
            return
        before, after = (str(t).removeprefix("torch.") for t in (self.stored, self.half))
        why = f"--dtype {after}" if self.cast_asked else f"{self.to} holds bfloat16 and float16"
        for name, old in self.records().items():
            keep = self._kept(name, old)
            try:
                new = cast(old, self.half, keep)
            except SVDQuantError as error:
                raise SVDQuantError(f"{name} {error}") from error
            changed = [k for k, t in new.named().items() if not _same_numbers(t, old.named()[k])]
            if changed == ["bias"] and old.bias is not None and new.bias is not None:
                self._note(
                    str(old.bias.dtype).removeprefix("torch."), after, why, name,
                    relative_error(new.bias, old.bias), "bias",
                )  # fmt: skip
            elif changed:
                types = {str(old.named()[k].dtype).removeprefix("torch.") for k in changed}
                parts = ["scales"] * bool(set(changed) & set(_SCALES)) + ["branch"] * bool(set(changed) - set(_SCALES))
                self._note(
                    f"{' and '.join(parts)} in {' and '.join(sorted(types))}", after, why, name, dense_error(new, old)
                )
            if any(new.named()[k].dtype != t.dtype for k, t in old.named().items()):
                self._install(name, new)
        self._cast_plain(before, after, why)

    def _kept(self, name: str, record: SVDQuantTensors) -> tuple[str, ...]:
        """Tensors of a layer that stay in the type they have."""
        if self.to == "svdquant":
            # As where a model is loaded in another type.
            return (*_SCALES, "bias") if record.spec.kind == "w4a16" else _SCALES
        linear = next((x for x in self.layout.linears if name in x.members), None) if self.layout else None
        if self.to != "nunchaku" or linear is None:
            return ()
        # A modulation's bias gets its 1 back before it is rounded; a scale of the whole tensor is stored in 32 bits.
        keep = ("bias",) if linear.kind == "w4a16" and record.spec.kind == "w4a16" and linear.chunks else ()
        outer = record.wcscales
        whole = outer is not None and outer.dim() == 1 and bool((outer == outer[0]).all()) and len(linear.members) == 1
        return (*keep, "wcscales") if whole else keep

    def _cast_plain(self, before: str, after: str, why: str) -> None:
        packed = quantized_layers(self.model)
        kept = tuple(getattr(self.model, "_keep_in_fp32_modules", None) or ())
        tied = set(getattr(self.model, "all_tied_weights_keys", None) or ())
        for name, value in list(self.model.state_dict().items()):
            if name.rpartition(".")[0] in packed or not value.is_floating_point() or value.dtype == self.half:
                continue
            new = value.to(self.half)
            same = _same_numbers(new, value)
            # Transformers widens some when it loads float16, which no file has to repeat.
            wide = self.half == self.stored or (
                value.dtype == torch.float32 and any(p in kept for p in name.split("."))
            )
            if name in tied or (wide and not same):
                continue
            if not same:
                self._note(before, after, why, name, relative_error(new, value), "unquantized tensor")
            set_tensor(self.model, name, new)
        if tied:
            self.model.tie_weights()

    def _dense(self, name: str) -> tuple[Tensor, Tensor | None]:
        record = self._record_or_none(name)
        if record is not None:
            return record.dense()
        module: Any = self.model.get_submodule(name)
        bias = None if module.bias is None else module.bias.detach().float()
        return module.weight.detach().flatten(1).float(), bias

    def _record(self, name: str) -> SVDQuantTensors:
        record = self._record_or_none(name)
        assert record is not None
        return record

    def _record_or_none(self, name: str) -> SVDQuantTensors | None:
        module: Any = self.model.get_submodule(name)
        return module.tensors() if hasattr(module, "tensors") else None

    def _install(self, name: str, record: SVDQuantTensors) -> None:
        original = self.model.get_submodule(name)
        cls: Any = W4A16Linear if record.spec.kind == "w4a16" else SVDQuantLinear
        if isinstance(original, nn.Conv2d):
            cls = SVDQuantConv2d
        replace_module(self.model, name, cls.from_tensors(record, self.half))

    def _note(self, before: str, after: str, why: str, name: str, error: float, what: str = "layer") -> None:
        for change in self.changes:
            if (change.before, change.after, change.why, change.what) == (before, after, why, what):
                break
        else:
            change = Change(before, after, why, what)
            self.changes.append(change)
        change.errors[name] = error


def _alike(records: Sequence[SVDQuantTensors]) -> bool:
    """Whether linears of one input are smoothed and shifted in the same way."""
    first = records[0]
    for record in records[1:]:
        a, b = record.smooth_factor, first.smooth_factor
        if record.spec.unsigned != first.spec.unsigned or (a is None) != (b is None):
            return False
        if a is not None and b is not None and not torch.equal(a, b):
            return False
    return True


def _can_be_cut(record: SVDQuantTensors, linear: StoredLinear) -> bool:
    """Whether the outer scales, where there are several, end where the file cuts the layer."""
    if record.spec.outer_blocks == 1:
        return True
    try:
        for piece in linear.pieces:
            take_columns(record, piece.start, record.in_features if piece.stop is None else piece.stop, True)
    except ValueError:
        return False
    return True


def _packs(record: SVDQuantTensors, group: int) -> bool:
    return not (record.out_features % AWQ_ROWS or record.in_features % max(AWQ_COLUMNS, group))


def _shape(record: SVDQuantTensors) -> str:
    return f"{record.out_features}×{record.in_features}"


def _in_features(module: Any) -> int:
    return int(module.in_channels if isinstance(module, nn.Conv2d) else module.in_features)


def _error_of(new: SVDQuantTensors, weight: Tensor) -> float:
    return weight_error(new.dense()[0], weight)


def _same_numbers(new: Tensor, old: Tensor) -> bool:
    return new is old or torch.equal(new.double(), old.double())
