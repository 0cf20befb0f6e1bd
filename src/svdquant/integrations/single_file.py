"""A fine-tune that comes as weights alone, in whatever names and types: read tensor by tensor, beside its pipeline."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint.hub import looks_like_hub_id
from ..checkpoint.layout import DENOISERS, open_checkpoint, read_json
from ..checkpoint.skeleton import set_tensor
from ..checkpoint.streaming import ShardWriter
from ..errors import SVDQuantError
from ..ptq.stream import write_atomically
from .fine_tune import FineTune, finite
from .lazy_tensor import LazyTensor
from .own_parts import SCHEDULER, own_parts, part_tensors
from .slots import read_index
from .sources import check_files, hub_json, model_class, resolve_model
from .work_folder import check_disk, copy_entries, other_components, size_of, storing, write_text

_NOISE = re.compile(r"(low|high)[-_. ]?noise")
# A remark for the user: (stage "note", 0, 0, text).
Say = Callable[[str, int, int, str], None]


def config_of_file(path: Path, base: str | None = None) -> dict[str, Any]:
    """The configuration of a bare file's model: that of `base`, else from shapes. Reads headers only."""
    if base is None:
        with FineTune(path) as tune:
            return tune.config()
    config = _config(path, base, part_of(base, path))
    with FineTune(path, config) as tune:
        tune.converted(config, base)
    return config


def check_single_file(file: Path, base: str | None, say: Say) -> str:
    """`fitting_base`, of which everything but the model is there, undamaged."""
    base = fitting_base(file, base, say)
    part = part_of(base, file)
    folder = resolve_model(base, skip=(part,))
    check_files(folder, skip=(part,))
    tell(file, base, folder, say)
    return base


def tell(file: Path, base: str, folder: Path, say: Say) -> None:
    """Says what is taken from the file and what from its pipeline, `base`, which is in `folder`."""
    part = part_of(base, file)
    with FineTune(file, _config(file, base, part)) as tune:
        for note in _notes(tune, base, folder, part):
            say("note", 0, 0, note)


def fitting_base(file: Path, base: str | None, say: Say | None = None) -> str:
    """The pipeline of a bare file: `base`, or the one that its names and shapes point to; `say` is told which.

    Raises `SVDQuantError` where the file is no model, or no such model as `base` has. Reads headers only.
    """
    guessed = base is None
    base = base or _likely_base(file)
    try:
        part = part_of(base, file)
        config = _config(file, base, part)
    except SVDQuantError as error:
        if not guessed:
            raise
        raise SVDQuantError(
            f"{file}: seems to be made from {base}, which could not be loaded; name its pipeline (a folder or Hub id) "
            "with --base, or accept its terms and run `hf auth login`"
        ) from error
    with FineTune(file, config) as tune:
        tune.converted(config, base)
    if guessed and say is not None:
        say("note", 0, 0, f"{file.name} is taken for a fine-tune of {base}; --base names another pipeline")
    return base


def _likely_base(file: Path) -> str:
    with FineTune(file) as tune:
        base = tune.default_base()
        if base is None:
            raise SVDQuantError(
                f"{file}: a single file lacks its configuration, and no pipeline is known for a "
                f"{tune.found.model_class}; name its pipeline with --base"
            )
        return base


def _notes(tune: FineTune, base: str, folder: Path, part: str) -> list[str]:
    notes, file = [], tune.path.name
    denoisers = [name for name in _denoisers(base) if name != part]
    if denoisers:
        notes.append(f"{file} takes the place of the {part}; {', '.join(denoisers)} stays that of {base}")
    own = own_parts(tune, folder)
    if own.prefixes:
        notes.append(f"the {', '.join(own.prefixes)} of {file} are taken too")
    if fields := tune.scheduler_fields():
        said = ", ".join(f"{name}={value}" for name, value in fields.items())
        notes.append(f"the scheduler is set to {said}, as {file} says")
    if left := tune.left_out(own.used):
        why = "".join(f" ({prefix}* {reason})" for prefix, reason in own.unread.items())
        notes.append(
            f"of {file} the {part} is used; {left} are left out{why} for those of {base}; if they were trained "
            "too, save the file as a pipeline with diffusers (from_single_file, save_pretrained) and give that"
        )
    return notes


def _denoisers(base: str) -> list[str]:
    """The denoising models that the pipeline names."""
    index = read_index(base)
    entries = {part: entry for part in DENOISERS if isinstance(entry := index.get(part), list)}
    found = [part for part, entry in entries.items() if entry and entry[-1] is not None]
    if not found:
        raise SVDQuantError(f"{base}: the pipeline has no {' or '.join(DENOISERS)}; give another as base")
    return found


def part_of(base: str, file: Path) -> str:
    """The denoiser whose place the file takes: of two that share the steps, by the name of the file or its folder."""
    parts = _denoisers(base)
    folder = file.resolve().parent.name.lower()
    said = _NOISE.search(file.name.lower()) or _NOISE.search(folder)
    second = folder == "transformer_2" if said is None else said[1] == "low"
    return "transformer_2" if second and "transformer_2" in parts else parts[0]


def _config(file: Path, base: str, part: str) -> dict[str, Any]:
    """Of the file's model: as the pipeline has it, but for what a model folder says in which the file lies."""
    config, own = _base_config(base, part), file.parent / "config.json"
    found = read_json(own) if own.is_file() else {}
    if found.get("_class_name") != config.get("_class_name"):
        return config
    return config | {key: value for key, value in found.items() if key != "quantization_config"}


def _base_config(base: str, part: str) -> dict[str, Any]:
    if looks_like_hub_id(base):
        config = hub_json(base, f"{part}/config.json")
    else:
        file = Path(base) / part / "config.json"
        config = read_json(file) if file.is_file() else None
    if config is None:
        raise SVDQuantError(f"{base}: has no {part}/config.json; download it again")
    return {key: value for key, value in config.items() if key != "quantization_config"}


def origin_of(file: Path, base: str, dtype: torch.dtype | None) -> dict[str, Any]:
    """What a single file is unpacked from."""
    files = open_checkpoint(file).files
    stats = [part.stat() for part in files]
    return {
        "file": str(file.resolve()),
        "size": sum(stat.st_size for stat in stats),
        "mtime_ns": max(stat.st_mtime_ns for stat in stats),
        "base": str(resolve_model(base, skip=(part_of(base, file),)).resolve()),
        "dtype": str(dtype or torch.bfloat16),
    }


def unpack(file: Path, base: str, work: Path, dtype: torch.dtype | None, origin: dict[str, Any]) -> Path:
    """A single file as a pipeline folder: its denoiser under diffusers' names, the rest of `base`.

    One tensor is in memory at a time, and one shard of the copy.
    """
    folder = work / "source"
    complete = folder / "complete"
    if complete.is_file() and complete.read_text(encoding="utf-8") == json.dumps(origin):
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    part, wanted = part_of(base, file), dtype or torch.bfloat16
    pipeline = resolve_model(base, skip=(part,))
    config = _config(file, base, part)
    with FineTune(file, config) as tune:
        tensors = tune.converted(config, base)
        prefixes = own_parts(tune, pipeline).prefixes
        own = {name: part_tensors(tune, name, prefix, pipeline) for name, prefix in prefixes.items()}
        rest = other_components(pipeline, {part, *own})
        every = [*tensors.values(), *(tensor for held in own.values() for tensor in held.values())]
        weights = sum(math.prod(tensor.shape) for tensor in every) * wanted.itemsize
        check_disk(work, weights + sum(size_of(entry) for entry in rest))
        fp32 = _kept_in_fp32(config)
        _write(folder / part, "diffusion_pytorch_model", tensors, wanted, fp32, file)
        with storing(folder / part):
            text = json.dumps(config, indent=2, sort_keys=True) + "\n"
            write_atomically(folder / part / "config.json", lambda path: write_text(path, text))
        for name, held in own.items():
            stem = "diffusion_pytorch_model" if name == "vae" else "model"
            _write(folder / name, stem, held, wanted, (), file)
            copy_entries(
                [entry for entry in (pipeline / name).glob("*.json") if "index" not in entry.name], folder / name
            )
        fields = tune.scheduler_fields()
    copy_entries(rest, folder)
    if fields:
        text = json.dumps(read_json(folder / SCHEDULER) | fields, indent=2) + "\n"
        write_atomically(folder / SCHEDULER, lambda path: write_text(path, text))
    write_atomically(complete, lambda path: write_text(path, json.dumps(origin)))
    return folder


def _write(
    folder: Path, stem: str, tensors: dict[str, LazyTensor], dtype: torch.dtype, fp32: tuple[str, ...], file: Path
) -> None:
    with storing(folder):
        folder.mkdir(parents=True)
        writer = ShardWriter(folder, stem)
        for name, tensor in tensors.items():
            writer.add(name, finite(name, tensor, dtype, fp32, file))
        writer.finish()


def load_single_file(file: Path, pipeline: Path, dtype: torch.dtype, part: str | None = None) -> nn.Module:
    """A bare file as the denoiser that `pipeline` has, in memory once and in evaluation mode."""
    from accelerate import init_empty_weights

    base = str(pipeline)
    config = _config(file, base, part or part_of(base, file))
    cls, fp32 = model_class(str(config.get("_class_name", ""))), _kept_in_fp32(config)
    with FineTune(file, config) as tune:
        tensors = tune.converted(config, base)
        with init_empty_weights():
            model: nn.Module = cls.from_config(config)
        for name, tensor in tensors.items():
            set_tensor(model, name, finite(name, tensor, dtype, fp32, file))
    return model.eval()


def _kept_in_fp32(config: dict[str, Any]) -> tuple[str, ...]:
    return tuple(getattr(model_class(config["_class_name"]), "_keep_in_fp32_modules", None) or ())
