"""`svdquant convert`: a quantized checkpoint in another format, and what that changes in its numbers."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint.canonical import FORMATS, load_model, save_foreign, save_model
from ..checkpoint.header import TensorInfo
from ..checkpoint.layout import BLOCKS_FILE, T5_FILE, Checkpoint, open_checkpoint
from ..checkpoint.mapped import MappedTensors
from ..checkpoint.nunchaku import open_base, plain_names, rest_of, stock_class
from ..checkpoint.nunchaku_layouts import STOCK_CLASSES, layout_of
from ..checkpoint.skeleton import DTYPES, stored_dtype
from ..config import SVDQuantConfig
from ..errors import SVDQuantError
from ..nn import FIXED_DTYPE, quantized_layers
from . import attach
from .changes import Change
from .conform import Conform
from .pipeline import parse_dtype
from .sources import resolve_checkpoint
from .work_folder import check_disk

# (stage, done, total, what is being worked on); stages: "load", "convert", "write".
StageProgress = Callable[[str, int, int, str], None]
WEIGHTS = ("int4", "nvfp4")
# Nunchaku stores the other models as one file.
_IN_FOLDERS = ("FluxTransformer2DModel", "SanaTransformer2DModel")
# Leaves that a layer keeps in the type they were stored in.
_KEPT = {*FIXED_DTYPE, "smooth", "smooth_orig", "smooth_factor_orig", "scales", "scaled_zeros", "wtscale"}


@dataclass
class ConvertReport:
    """What a conversion did. changes: of numbers, with the error each costs; losses: sentences about others.

    remarks: what holds no number of the model. weights: of the W4A4 layers in the result, "" without any.
    """

    source: str
    target: str
    source_format: str
    format: str
    model_class: str
    weights: str
    layers: int
    changes: list[Change] = field(default_factory=list)
    losses: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    bytes_before: int = 0
    bytes_after: int = 0
    seconds: float = 0.0

    @property
    def exact(self) -> bool:
        """Whether every number that the model computes with is the same as before."""
        return not self.losses and all(error == 0 for change in self.changes for error in change.errors.values())

    def to_dict(self) -> dict[str, Any]:
        data = {k: v for k, v in self.__dict__.items() if k != "changes"}
        return data | {"exact": self.exact, "changes": [change.to_dict() for change in self.changes]}


def convert(
    source: str | Path,
    target: str | Path,
    to: str,
    *,
    weights: str | None = None,
    base: str | Path | None = None,
    component: str | None = None,
    blocks_only: bool = False,
    dtype: str | torch.dtype | None = None,
    overwrite: bool = False,
    progress: StageProgress | None = None,
) -> ConvertReport:
    """Writes the quantized model at `source` to `target` in the format `to`, and says what that changed.

    source: as of `load_model`. target: a path that ends in .safetensors, or a folder. to: "svdquant", "nunchaku" or
    "nunchaku_lite". weights: "int4" or "nvfp4", None = as they are. base: the 16-bit pipeline of a file of transformer
    blocks alone. component: which model of a pipeline folder. blocks_only: write such a file. dtype: of everything in
    16 bits. overwrite: replace a model at `target`.

    What the format holds is kept bit for bit; what it does not hold is requantized, to nearest, without calibration.
    Raises `SVDQuantError`; `target` is complete or as it was.
    """
    began = time.perf_counter()
    say = progress or (lambda *_: None)
    wanted = parse_dtype(dtype)
    out = Path(os.path.abspath(target))
    _check_arguments(to, out, weights, blocks_only)
    path = resolve_checkpoint(source)
    opened = open_checkpoint(path, component)
    check_target(out, opened.path, overwrite)
    _check_family(opened, to, out, blocks_only)
    say("load", 0, 1, opened.path.name)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = load_model(path, component=component, base=base)
    remarks = [str(w.message) for w in said if str(w.message).startswith(str(opened.path))]
    say("load", 1, 1, "")
    losses = _rounded_on_loading(opened, model, base)
    work = Conform(model, to, weights, wanted, stored_dtype(opened.tensors))
    work.run(lambda done, total, name: say("convert", done, total, name))
    _describe(model, work)
    say("write", 0, 1, out.name)
    losses += _save(model, out, to, blocks_only)
    say("write", 1, 1, out.name)
    written = open_checkpoint(out)
    kinds = {layer.spec.weights for layer in quantized_layers(model).values() if layer.spec.kind == "svdquant"}  # type: ignore[union-attr]
    return ConvertReport(
        source=str(source),
        target=str(target),
        source_format=str(opened.method),
        format=to,
        model_class=type(model).__name__,
        weights=" and ".join(sorted(kinds)),
        layers=len(quantized_layers(model)),
        changes=work.changes,
        losses=losses,
        remarks=remarks
        + _parts(opened, model, base, blocks_only)
        + _dropped(opened, to)
        + _padded_branches(model, written, to)
        + _unused(weights, kinds),
        bytes_before=sum(info.nbytes for info in opened.tensors.values()),
        bytes_after=sum(info.nbytes for info in written.tensors.values()),
        seconds=time.perf_counter() - began,
    )


def _check_arguments(to: str, out: Path, weights: str | None, blocks_only: bool) -> None:
    if to not in FORMATS:
        raise SVDQuantError(f"--to {to!r} is not one of {', '.join(FORMATS)}")
    if weights is not None and weights not in WEIGHTS:
        raise SVDQuantError(f"--weights {weights!r} is not one of {', '.join(WEIGHTS)}")
    if blocks_only and (to != "nunchaku" or out.suffix != ".safetensors"):
        raise SVDQuantError("--blocks-only writes one .safetensors file of --to nunchaku")
    if to == "nunchaku_lite" and out.suffix == ".safetensors":
        raise SVDQuantError(f"{out}: nunchaku_lite is a folder; leave out .safetensors")


def _check_family(opened: Checkpoint, to: str, out: Path, blocks_only: bool) -> None:
    """What the class alone tells, before anything is loaded."""
    if opened.method is None:
        raise SVDQuantError(f"{opened.path}: holds an unquantized model; quantize it first, with `svdquant quantize`")
    if to != "nunchaku":
        return
    name = stock_class(opened)
    if opened.library == "diffusers" and name and name not in STOCK_CLASSES.values():
        raise SVDQuantError(f"{opened.path}: Nunchaku has no {name}; convert it to nunchaku_lite or svdquant")
    if name and name not in _IN_FOLDERS and (blocks_only or out.suffix != ".safetensors"):
        raise SVDQuantError(f"{out}: Nunchaku stores a {name} as one whole file; end it in .safetensors")


def check_target(out: Path, source: Path, overwrite: bool) -> None:
    """Refuses an output that would replace the input, something that is no model, or a model by surprise.

    source: the local file or folder of the model that is read.
    """
    here = source.resolve()
    if out.resolve() == here or (source.is_dir() and here in out.resolve().parents):
        raise SVDQuantError(f"{out}: is the input, or in it; choose another path")
    existing = next(p for p in (out.parent, *out.parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise SVDQuantError(f"{out}: {existing} is no folder that can be written; choose another path")
    if not out.exists():
        return
    if out.suffix == ".safetensors" and out.is_dir():
        raise SVDQuantError(f"{out}: is a folder; choose another name, or remove it")
    if out.suffix != ".safetensors" and not out.is_dir():
        raise SVDQuantError(f"{out}: is a file; choose another name, or end it in .safetensors")
    if out.is_dir() and not any(out.iterdir()):
        return
    if not overwrite:
        raise SVDQuantError(f"{out}: exists already; choose another path or pass --overwrite")
    if out.resolve() in here.parents:
        raise SVDQuantError(f"{out}: holds the input; choose another path")
    if out.is_dir() and not any((out / name).is_file() for name in ("config.json", BLOCKS_FILE, T5_FILE)):
        raise SVDQuantError(f"{out}: is a folder without a model, so it is not replaced; empty it or choose another")


def _describe(model: Any, work: Conform) -> None:
    """The model's own record of its layers, where they changed."""
    held = getattr(model.config, "quantization_config", None)
    config = held if isinstance(held, SVDQuantConfig) else SVDQuantConfig()
    if config.weights != work.weights:
        rotate = config.rotate if work.weights == "int4" else False
        config = replace(config, weights=work.weights, group_size=None, rotate=rotate, layers=None)
    attach(model, config)


def _save(model: Any, out: Path, to: str, blocks_only: bool) -> list[str]:
    """Writes the model; returns what the format rounds. Files of a folder that are no model's stay."""
    parent = next(p for p in (out.parent, *out.parents) if p.exists())
    check_disk(parent, sum(t.nbytes for t in model.state_dict().values()))
    if to == "svdquant":
        save_model(model, out)
        return []
    return save_foreign(model, out, to, blocks_only=blocks_only)


def _rounded_on_loading(opened: Checkpoint, model: nn.Module, base: str | Path | None) -> list[str]:
    """Tensors of the files whose type is wider than the model's, and whose numbers it did not take."""
    dtype = stored_dtype(opened.tensors)
    state = model.state_dict()
    found = opened.tensors | _from_base(opened, model, base)
    rounded = []
    with MappedTensors(found) as file:
        for name, info in found.items():
            kind = DTYPES.get(info.dtype, dtype)
            if kind == dtype or name.rpartition(".")[2] in _KEPT or (name in state and state[name].dtype == kind):
                continue
            value = file.get(name)
            if not torch.equal(value.to(dtype).double(), value.double()):
                rounded.append(name)
    if not rounded:
        return []
    half = str(dtype).removeprefix("torch.")
    return [f"{len(rounded)} tensors of another type, such as {rounded[0]}, were rounded to {half} like the others"]


def _from_base(opened: Checkpoint, model: nn.Module, base: str | Path | None) -> dict[str, TensorInfo]:
    """The tensors that the base provides: all that a file of blocks alone lacks."""
    layout = layout_of(model, lambda name: f"{name}.qweight" in opened.tensors)
    if base is None or layout is None or opened.method != "nunchaku":
        return {}
    return rest_of(opened, open_base(base, opened), plain_names(model, layout))


def _parts(opened: Checkpoint, model: nn.Module, base: str | Path | None, blocks_only: bool) -> list[str]:
    """Where the 16-bit rest came from or went."""
    out = []
    if taken := _from_base(opened, model, base):
        out.append(f"{len(taken)} tensors that the input lacks were taken from {base}")
    if blocks_only:
        out.append("the blocks alone were written; whoever loads them needs the 16-bit pipeline for the rest")
    return out


def _dropped(opened: Checkpoint, to: str) -> list[str]:
    """What a file has and no model of diffusers has a place for."""
    other = []
    with MappedTensors(opened.tensors) as file:
        for name in opened.tensors:
            used = name.removesuffix("_orig")
            if name.endswith((".smooth_orig", ".smooth_factor_orig")) and used in opened.tensors:
                other += [] if torch.equal(file.get(name), file.get(used)) else [name]
    out = []
    if other:
        leaf = other[0].rpartition(".")[2]
        fate = "replaced by the first" if to == "nunchaku" else "left out"
        out.append(f"{leaf} of {len(other)} layers, a second smooth factor that nothing computes with: {fate}")
    if pag := {name.rpartition(".")[0] for name in opened.tensors if ".attn.pag_to_v." in name}:
        out.append(f"attn.pag_to_v of {len(pag)} blocks, a second copy for perturbed attention: left out")
    return out


def _unused(weights: str | None, kinds: set[str]) -> list[str]:
    """--weights means the W4A4 layers, which a text encoder may have none of; `kinds` are theirs."""
    return [f"--weights {weights} changes nothing: no layer is W4A4"] if weights and not kinds else []


def _padded_branches(model: nn.Module, written: Checkpoint, to: str) -> list[str]:
    """Formats with one rank for all layers fill the smaller branches up with zeros."""
    if to == "svdquant":
        return []
    ranks = [i.shape[-1] for n, i in written.tensors.items() if n.endswith((".lora_up", ".proj_up"))]
    specs = [layer.spec for layer in quantized_layers(model).values()]  # type: ignore[union-attr]
    smaller = [s for s in specs if s.kind == "svdquant" and ranks and s.rank < max(ranks)]
    if not smaller:
        return []
    return [f"the branches of {len(smaller)} layers are filled up with zeros to rank {max(ranks)}, the file's one rank"]
