"""16-bit pipelines and models: where they are, what their configurations say, what their files weigh."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Collection
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.header import read_header
from ..checkpoint.hub import fetch, looks_like_hub_file, looks_like_hub_id, unreachable
from ..checkpoint.layout import ACCEPTED, DENOISERS, PICKLES, open_checkpoint, read_json
from ..checkpoint.skeleton import FLOATS
from ..errors import SVDQuantError
from .drawing import DEFAULTS_FILE

# Names under which repositories keep 16-bit weights beside, or instead of, the plain ones.
VARIANTS = ("bf16", "fp16")
_VARIANT = re.compile(r"\.(bf16|fp16)[.-]")


def embedded_model() -> Path:
    """The pipeline folder inside the package: a trained FLUX in miniature."""
    return Path(str(files("svdquant") / "assets" / "tiny_flux"))


def resolve_model(model: str | Path, skip: Collection[str] = ()) -> Path:
    """A local folder or .safetensors file; what is on the Hub is downloaded.

    skip: components of a pipeline whose weights are not needed. Raises `SVDQuantError` for a missing path, a pickle
    file, or a repository that cannot be reached.
    """
    path = Path(model)
    if path.suffix.lower() in PICKLES:
        raise SVDQuantError(f"{path}: pickle files can run code; convert to safetensors")
    if looks_like_hub_file(model):
        return fetch(model)
    if not looks_like_hub_id(model):
        if not path.exists():
            raise SVDQuantError(f"{path}: does not exist; give {ACCEPTED}")
        return path
    try:
        return _download(str(model), skip)
    except Exception as error:  # the hub client raises of many kinds
        raise unreachable(str(model), error) from error


def resolve_checkpoint(model: str | Path) -> Path:
    """`resolve_model` for what may be quantized: of a repository in Nunchaku's layouts the checkpoint alone."""
    if looks_like_hub_id(model):
        found = fetch(model)
        if found.exists() and not (found / "model_index.json").is_file():
            return found
    return resolve_model(model)


def _download(repo: str, skip: Collection[str] = ()) -> Path:
    """Of a pipeline what diffusers loads, not the original weights, variants and pickles next to it."""
    from diffusers import DiffusionPipeline
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        hf_hub_download(repo, "model_index.json")
    except EntryNotFoundError:
        return Path(snapshot_download(repo, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]))
    # diffusers leaves out components that it is handed, whatever they are.
    options: dict[str, Any] = {"use_safetensors": True} | dict.fromkeys(skip)
    try:
        folder = Path(DiffusionPipeline.download(repo, **options))
    except OSError as error:
        if "necessary `safetensors`" not in str(error):
            raise
        folder = _download_variant(repo, options, error)
    snapshot_download(repo, allow_patterns=[DEFAULTS_FILE, "LICENSE*"])
    return folder


def _download_variant(repo: str, options: dict[str, Any], error: OSError) -> Path:
    """Of a pipeline that has some weights under a variant's name alone."""
    from diffusers import DiffusionPipeline

    for variant in VARIANTS:
        try:
            return Path(DiffusionPipeline.download(repo, variant=variant, **options))
        except OSError:
            continue
    raise error


def variant_of(folder: Path, skip: Collection[str] = ()) -> str | None:
    """The variant ("bf16", "fp16") in which alone a component's weights exist; None where plain ones do."""
    for part in sorted(entry for entry in folder.iterdir() if entry.is_dir() and entry.name not in skip):
        marks = [_VARIANT.search(file.name) for file in part.glob("*.safetensors")]
        named = [mark[1] for mark in marks if mark is not None]
        if named and len(named) == len(marks):
            return min(named, key=VARIANTS.index)
    return None


def hub_json(repo: str, name: str) -> dict[str, Any] | None:
    """A JSON file of a Hub repository; None where the repository has none of that name.

    Raises `SVDQuantError` where the repository cannot be reached.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return read_json(Path(hf_hub_download(repo, name)))
    except LocalEntryNotFoundError as error:
        raise unreachable(repo, error) from error
    except EntryNotFoundError:
        return None
    except SVDQuantError:
        raise
    except Exception as error:  # as above
        raise unreachable(repo, error) from error


def model_class(name: str, library: str = "diffusers") -> Any:
    """A model class of diffusers or transformers by its name. Raises `SVDQuantError` for what is none."""
    module = importlib.import_module(library)
    base = module.ModelMixin if library == "diffusers" else module.PreTrainedModel
    cls = getattr(module, name, None)
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise SVDQuantError(f"{name} is no model class of {library} {module.__version__}; upgrade {library}")
    return cls


def denoisers(path: Path) -> list[str]:
    """Names of a pipeline folder's denoising models."""
    present = [name for name in DENOISERS if (path / name / "config.json").is_file()]
    if not present:
        raise SVDQuantError(f"{path}: the pipeline has no {' or '.join(DENOISERS)} to quantize")
    return present


def check_files(path: Path, skip: Collection[str] = ()) -> None:
    """Reads the header of every weight file of a folder: damage is found before anything is loaded.

    skip: components that are not going to be loaded.
    """
    weights = sorted(file for file in path.rglob("*.safetensors") if file.relative_to(path).parts[0] not in skip)
    for file in weights:
        read_header(file)
    if not weights:
        pickled = [file for file in sorted(path.rglob("*")) if file.suffix in PICKLES]
        if pickled:
            raise SVDQuantError(f"{pickled[0]}: pickle files can run code; convert to safetensors")


def pipeline_bytes(path: Path, dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes of a pipeline's models once loaded in `dtype`, from the files' headers."""
    total = 0
    for folder in sorted(entry for entry in path.iterdir() if (entry / "config.json").is_file()):
        if any(folder.glob("*.safetensors")):
            tensors = open_checkpoint(folder).tensors.values()
            total += sum(math.prod(t.shape) * dtype.itemsize if t.dtype in FLOATS else t.nbytes for t in tensors)
    return total


def host_memory_for(needed: int, available: int) -> str | None:
    """What a denoiser may take of the host's memory, as `max_memory`; None where the whole pipeline fits.

    needed, available: bytes of the pipeline, and of memory that is free. Beyond 80 % of it the pipeline would not fit
    next to what drawing takes; the denoiser then gets half, the other models and the activations the rest.
    """
    return None if needed <= 0.8 * available else f"{max(available // 2 >> 20, 1)}MiB"
