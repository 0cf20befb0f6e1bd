"""Quantized models on the Hugging Face Hub: which files of a repository a checkpoint is, and how they get here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from ..errors import SVDQuantError
from .layout import BLOCKS_FILE, PICKLES, T5_FILE, parse_config, read_json

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_HUB_FILE = re.compile(r"([\w-][\w.-]*/[\w.-]+)/((?:[\w.-]+/)*)([^/\\]+)")
_WEIGHTS = (".safetensors", ".sft")
_LIBRARY_WEIGHTS = re.compile(r"(diffusion_pytorch_model|model)\b.*\.safetensors")
_DENOISERS = ("transformer", "unet")
# What huggingface_hub's functions may be told; the first four are also understood by diffusers.
ACCESS = (
    "revision",
    "token",
    "cache_dir",
    "local_files_only",
    "force_download",
    "local_dir",
    "etag_timeout",
    "endpoint",
)


def looks_like_hub_id(path: str | Path) -> bool:
    """Whether a path that does not exist could be "owner/name"."""
    name = str(path)
    if not _HUB_ID.fullmatch(name) or name.lower().endswith((*_WEIGHTS, ".json", *PICKLES)):
        return False
    return not _exists(Path(path))


def looks_like_hub_file(path: str | Path) -> bool:
    """Whether a path that does not exist could be "owner/name/file.safetensors", with or without folders between.

    A missing file of a folder that does exist is a missing file.
    """
    match = _HUB_FILE.fullmatch(str(path))
    return (
        match is not None
        and match[3].lower().endswith((*_WEIGHTS, *PICKLES))
        and not _exists(Path(path))
        and not _exists(Path(path).parent)
    )


def fetch(path: str | Path, *, subfolder: str | None = None, **access: Any) -> Path:
    """The local path of a checkpoint; what is on the Hub is downloaded first.

    path: a local path, returned as it is; "owner/name/file.safetensors", also with folders between; or "owner/name".
    Of a repository in one of Nunchaku's layouts (a folder with transformer_blocks.safetensors, a single checkpoint
    file) or in nunchaku_lite's, the configurations and weights are downloaded. Any other, i.e. a model or pipeline
    as diffusers and transformers save them, is returned as its id: `load_from_hub` loads it.
    access: `revision`, `token`, `cache_dir`, `local_files_only`, … as huggingface_hub has them.

    Raises `SVDQuantError` for a pickle, for several checkpoints of which one is to be named, and for a repository
    that cannot be reached.
    """
    options = {key: value for key, value in access.items() if key in ACCESS and value is not None}
    if looks_like_hub_file(path):
        return _fetch_file(str(path), subfolder, options)
    if not looks_like_hub_id(path):
        return Path(path) / subfolder if subfolder and Path(path).is_dir() else Path(path)
    try:
        return _fetch_repository(str(path), subfolder, options)
    except SVDQuantError:
        raise
    except Exception as error:  # the hub client raises of many kinds
        raise unreachable(str(path), error) from error


def load_from_hub(repo: str, dtype: torch.dtype | None, component: str | None, kwargs: dict[str, Any]) -> Any:
    """Loads a model by its Hub id, after its configuration has been read. dtype None = bfloat16.

    Raises `SVDQuantError` where the repository cannot be reached or holds no quantized model.
    """
    from diffusers import AutoModel

    subfolder = kwargs.pop("subfolder", component)
    access: dict[str, Any] = {key: kwargs[key] for key in ACCESS[:4] if key in kwargs}
    config, subfolder = _config(AutoModel, repo, subfolder, access)
    quantization = config.get("quantization_config")
    if quantization is None:
        raise SVDQuantError(f"{repo}: holds an unquantized model; quantize it first with svdquant.quantize")
    parse_config(quantization, repo)
    try:
        return AutoModel.from_pretrained(repo, subfolder=subfolder, torch_dtype=dtype or torch.bfloat16, **kwargs)
    except SVDQuantError:
        raise
    except (OSError, ValueError) as error:
        raise unreachable(repo, error) from error


def unreachable(repo: str, error: Exception, path: str | None = None) -> SVDQuantError:
    """path: what was asked for, where that is more than the repository."""
    reason = (str(error).splitlines() or [type(error).__name__])[0].partition(". ")[0]
    return SVDQuantError(
        f"{path or repo}: is no local path and could not be loaded from the Hub ({reason}); if it is gated or private, "
        f"accept its terms at https://huggingface.co/{repo} and run `hf auth login`; without network, run "
        f"`hf download {repo}` elsewhere and give the folder"
    )


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        # A name that no file system takes is no local path; one without permission is.
        return True


def _fetch_file(path: str, subfolder: str | None, options: dict[str, Any]) -> Path:
    from huggingface_hub import hf_hub_download

    match = _HUB_FILE.fullmatch(path)
    assert match is not None
    repo, folders, name = match[1], match[2], match[3]
    if name.endswith(PICKLES):
        raise SVDQuantError(f"{path}: pickle files can run code; convert to safetensors")
    inner = "/".join(part for part in (subfolder or "", folders.strip("/"), name) if part)
    try:
        return Path(hf_hub_download(repo, inner, **options))
    except Exception as error:  # as in `fetch`
        if type(error).__name__ in ("EntryNotFoundError", "RemoteEntryNotFoundError"):
            raise SVDQuantError(f"{repo}: has no {inner}; see https://huggingface.co/{repo}/tree/main") from error
        raise unreachable(repo, error, path) from error


def _fetch_repository(repo: str, subfolder: str | None, options: dict[str, Any]) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download

    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    names = [name[len(prefix) :] for name in _list(repo, options) if name.startswith(prefix)]
    here = [name for name in names if "/" not in name]
    weights = sorted(name for name in here if name.endswith(_WEIGHTS))
    configs = [name for name in here if name.endswith(".json")]

    def download(*patterns: str) -> Path:
        root = snapshot_download(repo, allow_patterns=[prefix + pattern for pattern in patterns], **options)
        return Path(root) / prefix if prefix else Path(root)

    if BLOCKS_FILE in weights or T5_FILE in weights:
        return download(*configs, *weights)
    if "model_index.json" in here:
        part = next((f for f in _DENOISERS if f"{f}/config.json" in names), None)
        if part and _method(hf_hub_download(repo, f"{prefix}{part}/config.json", **options)) == "nunchaku_lite":
            return download("model_index.json", f"{part}/*.json", f"{part}/*.safetensors")
        return Path(repo)
    if "config.json" in here:
        method = _method(hf_hub_download(repo, f"{prefix}config.json", **options))
        if method == "nunchaku_lite":
            return download(*configs, *weights)
        if method is not None or not weights or any(_LIBRARY_WEIGHTS.fullmatch(name) for name in weights):
            return Path(repo)
    if len(weights) == 1:
        return download(*configs, weights[0]) / weights[0]
    if weights:
        shown = ", ".join(f"{repo}/{prefix}{name}" for name in weights)
        raise SVDQuantError(f"{repo}: holds several checkpoints; name one of {shown}")
    pickled = sorted(name for name in here if name.endswith(PICKLES))
    if pickled:
        raise SVDQuantError(f"{repo}/{prefix}{pickled[0]}: pickle files can run code; convert to safetensors")
    return Path(repo)


def _list(repo: str, options: dict[str, Any]) -> list[str]:
    """Names of a repository's files; where the Hub cannot be asked, of those that have been downloaded."""
    from huggingface_hub import constants, list_repo_files
    from huggingface_hub.errors import HfHubHTTPError

    if options.get("local_files_only") or constants.HF_HUB_OFFLINE:
        return _downloaded(repo, options)
    try:
        return list_repo_files(repo, **{key: options[key] for key in ("revision", "token") if key in options})
    except HfHubHTTPError:
        raise
    except Exception as error:
        try:
            return _downloaded(repo, options)
        except Exception:
            raise error from None


def _downloaded(repo: str, options: dict[str, Any]) -> list[str]:
    from huggingface_hub import snapshot_download

    # Without a pattern, a repository of which only a part was wanted would count as incomplete.
    root = Path(snapshot_download(repo, allow_patterns=[".none"], **options | {"local_files_only": True}))
    return [file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file()]


def _method(config: str | Path) -> str | None:
    """The quant_method in a config.json, None where it has none."""
    quantization = read_json(Path(config)).get("quantization_config")
    return str(quantization.get("quant_method")) if isinstance(quantization, dict) else None


def _config(cls: Any, repo: str, subfolder: str | None, access: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    first: Exception | None = None
    for folder in (subfolder,) if subfolder else (None, *_DENOISERS):
        try:
            return dict(cls.load_config(repo, subfolder=folder, **access)), folder
        except (OSError, ValueError) as error:
            first = first or error
    assert first is not None
    raise unreachable(repo, first) from first
