"""Our own format: `load_model` and `save_model`."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import FORMAT_VERSION, SVDQuantConfig
from ..errors import SVDQuantError
from ..nn import quantized_layers, replace_module
from .hub import ACCESS, fetch, load_from_hub, looks_like_hub_file, looks_like_hub_id
from .layout import ACCEPTED, METADATA_KEY, Checkpoint, open_checkpoint, parse_config
from .mapped import MappedTensors
from .nunchaku_check import check_depth
from .skeleton import (
    cast_floating,
    check_device,
    check_load_dtype,
    check_tensors,
    fixed_names,
    install_layers,
    set_tensor,
    stored_dtype,
)

FOREIGN = ("nunchaku", "nunchaku_lite")
FORMATS = ("svdquant", *FOREIGN)
FILE_SUFFIXES = (".safetensors", ".sft")
_OWN_WEIGHTS = re.compile(
    r"(diffusion_pytorch_model|model)(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?"
    r"|(transformer_blocks|unquantized_layers|svdq-t5)\.safetensors|comfy_config\.json"
)
# Models are built empty by patching torch for the whole process: one at a time.
_LOADING = threading.RLock()


def load_model(
    path: str | Path,
    torch_dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    *,
    component: str | None = None,
    model: nn.Module | None = None,
    base: str | Path | None = None,
    **kwargs: Any,
) -> Any:
    """A quantized model, ready to run, in evaluation mode. Its format is found out.

    path: a model folder, a pipeline folder (then its quantized denoiser, or `component`), a file that `save_model`
        wrote, a Hub id; the same in Nunchaku's formats and diffusers' `nunchaku_lite`; "owner/name/file.safetensors".
    torch_dtype: of the layers in 16 bits, the branch and the biases; None = as saved. Scales keep their stored type.
    model: for a file of a model that is neither diffusers' nor transformers': the unquantized module to load into.
    base: for the oldest Nunchaku files, which hold transformer blocks alone: the 16-bit pipeline that has the rest.
    kwargs: go to `from_pretrained` where a folder or Hub id is loaded (`revision`, `token`, `device_map`, …).

    May be called from several threads; loads wait for each other, and other threads should not build models meanwhile.
    Raises `SVDQuantError` for whatever is missing, damaged, pickled or newer than this version; nothing is then loaded.
    """
    check_load_dtype(torch_dtype)
    check_device(device)
    if looks_like_hub_id(path) or looks_like_hub_file(path):
        path = fetch(path, **{key: value for key, value in kwargs.items() if key in (*ACCESS, "subfolder")})
    with _LOADING:
        if looks_like_hub_id(path):
            loaded = load_from_hub(str(path), torch_dtype, component, kwargs)
        else:
            loaded = _load_local(path, torch_dtype, device, component, model, base, kwargs)
        return loaded if device is None else loaded.to(device)


def _load_local(
    path: str | Path,
    torch_dtype: torch.dtype | None,
    device: torch.device | str | None,
    component: str | None,
    model: nn.Module | None,
    base: str | Path | None,
    kwargs: dict[str, Any],
) -> Any:
    checkpoint = open_checkpoint(path, component)
    _refuse_unquantized(checkpoint)
    foreign = checkpoint.method in FOREIGN
    if foreign or checkpoint.is_file:
        if unknown := sorted(kwargs.keys() - {*ACCESS, "subfolder"}):
            raise SVDQuantError(f"{checkpoint.path}: load_model takes no {unknown[0]} for this format; leave it out")
        if model is not None and (foreign or checkpoint.library):
            raise SVDQuantError(f"{checkpoint.path}: holds a {checkpoint.model_class}; leave out model=")
    if foreign:
        return _from_nunchaku(checkpoint, torch_dtype, device, base)
    config = parse_config(checkpoint.quantization or {}, checkpoint.path)
    dtype = torch_dtype or stored_dtype(checkpoint.tensors)
    if checkpoint.is_file:
        return _from_file(checkpoint, config, dtype, device, model)
    return _from_folder(checkpoint, dtype, kwargs)


def save_model(model: Any, path: str | Path, format: str = "svdquant", **kwargs: Any) -> Path:
    """Writes a quantized model: one file where `path` ends in .safetensors, else a folder.

    format: "svdquant", "nunchaku" (a file with metadata, or the folder of two files) or "nunchaku_lite" (a folder).
    Neither of the others can hold every svdquant model; `svdquant convert` requantizes where that helps.
    The files appear under their names only when they are complete. kwargs: go to `save_pretrained` (`max_shard_size`,
    …); for "nunchaku" `blocks_only=True` leaves out what a 16-bit base has. Raises `SVDQuantError` where the model
    cannot be saved or the disk refuses.
    """
    path = Path(path)
    if format not in FORMATS:
        raise SVDQuantError(f"format={format!r} is not one of {', '.join(FORMATS)}")
    _check_saveable(model)
    if format != "svdquant":
        save_foreign(model, path, format, **kwargs)
        return path
    if path.suffix in FILE_SUFFIXES:
        _atomically(path, lambda temporary: _write_file(model, temporary))
    elif not hasattr(model, "save_pretrained"):
        raise SVDQuantError(f"{type(model).__name__} has no save_pretrained; give a path that ends in .safetensors")
    else:
        _atomically(path, lambda temporary: model.save_pretrained(temporary, **kwargs))
    return path


def save_foreign(model: Any, path: Path, format: str, **kwargs: Any) -> list[str]:
    """`save_model` for the formats of others; returns what could not be held exactly, one sentence each."""
    from . import nunchaku_lite, nunchaku_save

    notes: list[str] = []
    blocks_only = bool(kwargs.pop("blocks_only", False))
    if kwargs:
        raise SVDQuantError(f"{path}: format {format!r} takes no {sorted(kwargs)[0]}; leave it out")
    to_file = path.suffix in FILE_SUFFIXES
    if blocks_only and (format != "nunchaku" or not to_file):
        raise SVDQuantError(f"{path}: blocks_only makes one Nunchaku file; end the path in .safetensors")
    if format == "nunchaku":
        _atomically(path, lambda temporary: notes.extend(nunchaku_save.save(model, temporary, blocks_only)))
    elif to_file:
        raise SVDQuantError(f"{path}: nunchaku_lite is a folder; leave out .safetensors")
    else:
        _atomically(path, lambda temporary: notes.extend(nunchaku_lite.save(model, temporary)))
    return notes


def _from_nunchaku(
    checkpoint: Checkpoint, dtype: torch.dtype | None, device: torch.device | str | None, base: str | Path | None
) -> Any:
    from . import nunchaku, nunchaku_lite

    dtype = dtype or stored_dtype(checkpoint.tensors)
    if checkpoint.method == "nunchaku_lite":
        return nunchaku_lite.load(checkpoint, dtype, device)
    opened = None if base is None else nunchaku.open_base(base, checkpoint)
    return nunchaku.load(checkpoint, dtype, device, opened)


def _refuse_unquantized(checkpoint: Checkpoint) -> None:
    if checkpoint.method is not None:
        return
    if checkpoint.is_file:
        raise SVDQuantError(
            f"{checkpoint.path}: has no {METADATA_KEY} record, so it is no file of save_model; give {ACCEPTED}"
        )
    raise SVDQuantError(
        f"{checkpoint.path}: holds an unquantized {checkpoint.model_class}; quantize it first with svdquant.quantize"
    )


def model_class(library: str, name: str, where: Path) -> Any:
    if library not in ("diffusers", "transformers"):
        raise SVDQuantError(f"{where}: holds a {name}; pass that module, unquantized, as load_model(..., model=...)")
    import importlib

    cls = getattr(importlib.import_module(library), name, None)
    if cls is None or not hasattr(cls, "from_pretrained"):
        raise SVDQuantError(f"{where}: {library} has no model {name!r}; upgrade {library}")
    return cls


def _from_folder(checkpoint: Checkpoint, dtype: torch.dtype, kwargs: dict[str, Any]) -> Any:
    cls = model_class(checkpoint.library, checkpoint.model_class, checkpoint.path)
    name = "torch_dtype" if checkpoint.library == "diffusers" else "dtype"
    options = {name: dtype, "use_safetensors": True} | kwargs
    try:
        return cls.from_pretrained(checkpoint.path, **options)
    except SVDQuantError:
        raise
    except (OSError, TypeError, ValueError, KeyError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SVDQuantError(f"{checkpoint.path}: {checkpoint.library} cannot load it ({reason})") from error


def _from_file(
    checkpoint: Checkpoint,
    config: SVDQuantConfig,
    dtype: torch.dtype,
    device: torch.device | str | None,
    model: nn.Module | None,
) -> Any:
    if model is None and checkpoint.library == "transformers":
        return _text_encoder(checkpoint, config, dtype)
    skeleton = model
    if skeleton is None:
        cls = model_class(checkpoint.library, checkpoint.model_class, checkpoint.path)
        check_depth(checkpoint.config, checkpoint.tensors, checkpoint.path)
        skeleton = empty_model(cls, checkpoint.config, dtype)
    fixed = _prepare(skeleton, checkpoint, config)
    keep = tuple(getattr(skeleton, "_keep_in_fp32_modules", None) or ())

    def cast(name: str, value: Tensor) -> Tensor:
        return value if name in fixed else cast_floating(name, value, dtype, keep, checkpoint.path)

    with MappedTensors(checkpoint.tensors) as file:
        for name in checkpoint.tensors:
            value = cast(name, file.get(name))
            set_tensor(skeleton, name, value if device is None else value.to(device))
    if model is None:
        from ..integrations import attach

        attach(skeleton, config)
    return skeleton.eval()


def _text_encoder(checkpoint: Checkpoint, config: SVDQuantConfig, dtype: torch.dtype) -> Any:
    from accelerate import init_empty_weights
    from safetensors.torch import load_file

    cls = model_class(checkpoint.library, checkpoint.model_class, checkpoint.path)
    with init_empty_weights():
        skeleton = cls(cls.config_class.from_dict(checkpoint.config))
    install_layers(skeleton, config, checkpoint.path)
    tied = getattr(skeleton, "all_tied_weights_keys", {})
    absent = {*tied, *tied.values()} - checkpoint.tensors.keys()
    expected = {name: tensor for name, tensor in skeleton.state_dict().items() if name not in absent}
    check_tensors(expected, checkpoint.tensors, checkpoint.path, fixed_names(skeleton))
    hf_config = cls.config_class.from_dict(checkpoint.config | {"quantization_config": checkpoint.quantization})
    return cls.from_pretrained(None, config=hf_config, state_dict=load_file(checkpoint.files[0]), dtype=dtype)


def _prepare(skeleton: nn.Module, checkpoint: Checkpoint, config: SVDQuantConfig) -> set[str]:
    """Installs the quantized layers and compares everything with the file; a failure leaves the module as it was."""
    originals = dict(skeleton.named_modules())
    try:
        install_layers(skeleton, config, checkpoint.path)
        fixed = fixed_names(skeleton)
        check_tensors(skeleton.state_dict(), checkpoint.tensors, checkpoint.path, fixed)
    except SVDQuantError:
        for name in quantized_layers(skeleton):
            replace_module(skeleton, name, originals[name])
        raise
    return fixed


def empty_model(cls: Any, config: dict[str, Any], dtype: torch.dtype) -> Any:
    """A diffusers model on the meta device, of this floating type; its non-persistent buffers are real."""
    from accelerate import init_empty_weights

    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with init_empty_weights():
            return cls.from_config(config)
    finally:
        torch.set_default_dtype(default)


def _check_saveable(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise SVDQuantError(f"{type(model).__name__} is no model; save a pipeline by its own save_pretrained")
    if not quantized_layers(model):
        raise SVDQuantError(f"{type(model).__name__} has no quantized layers; quantize it first")
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise SVDQuantError(f"{name} is offloaded; call remove_all_hooks() on the pipeline, then save")
        if ".base_layer." in name:
            raise SVDQuantError(
                f"a LoRA is attached to {name.partition('.base_layer.')[0]}; call unload_lora_weights() before saving"
            )


def _write_file(model: Any, path: Path) -> None:
    from safetensors.torch import save_file

    owners = {"ModelMixin": "diffusers", "PreTrainedModel": "transformers"}
    library = next((owners[base.__name__] for base in type(model).__mro__ if base.__name__ in owners), "")
    tensors: dict[str, Tensor] = {}
    stored = set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() in stored and tensor.numel():
            # transformers ties these again when it loads; elsewhere each name needs its tensor.
            if library == "transformers":
                continue
            tensor = tensor.clone()
        stored.add(tensor.data_ptr())
        tensors[name] = tensor.detach().contiguous()
    config, quantization = _configs(model)
    record = {
        "format_version": FORMAT_VERSION,
        "model_class": type(model).__name__,
        "library": library,
        "config": config,
        "quantization_config": quantization.to_dict(),
    }
    save_file(tensors, path, metadata={"format": "pt", METADATA_KEY: json.dumps(record)})
    _sort_metadata(path)


def _sort_metadata(path: Path) -> None:
    """safetensors writes metadata in random order; the same model is to give the same file."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:
            file.seek(8)
            file.write(text.ljust(length))


def _configs(model: Any) -> tuple[dict[str, Any], SVDQuantConfig]:
    specs = {name: layer.spec for name, layer in quantized_layers(model).items()}
    held = getattr(getattr(model, "config", None), "quantization_config", None)
    if isinstance(held, dict):
        held = SVDQuantConfig.from_dict(held)
    quantization = (held if isinstance(held, SVDQuantConfig) else SVDQuantConfig()).with_layers(specs)  # type: ignore[arg-type]
    if hasattr(model, "to_json_string"):
        config = json.loads(model.to_json_string())
    elif hasattr(getattr(model, "config", None), "to_json_string"):
        config = json.loads(model.config.to_json_string(use_diff=False))
    else:
        config = {}
    config.pop("quantization_config", None)
    return config, quantization


def _atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Lets `write` fill a temporary path beside `path`, then moves what it wrote into place."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise SVDQuantError(f"{path}: cannot be written ({error.strerror or error}); choose another path") from error
    try:
        temporary = scratch / path.name
        write(temporary)
        _move(temporary, path)
    except SVDQuantError:
        raise
    except Exception as error:
        # safetensors wraps the system's errors ("I/O error: No space left on device") in its own type.
        if not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":
            raise
        reason = getattr(error, "strerror", None) or error
        raise SVDQuantError(f"{path}: could not be saved ({reason}); nothing was changed there") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _move(source: Path, target: Path) -> None:
    if source.is_file() or not target.exists():
        os.replace(source, target)
        return
    # Only what an earlier save of a model left: an adapter beside it is none of our business.
    stale = {file for file in target.iterdir() if _OWN_WEIGHTS.fullmatch(file.name)}
    new = sorted(source.iterdir(), key=lambda f: f.name)
    for file in new:
        if file.name != "config.json":
            os.replace(file, target / file.name)
    # What says how to read them comes last, when nothing else is left to be read.
    for file in stale - {target / file.name for file in new}:
        file.unlink()
    if (source / "config.json").is_file():
        os.replace(source / "config.json", target / "config.json")
