"""Finds what a path holds: one file, a model folder or a pipeline folder; reads JSON and headers only."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import FORMAT_VERSION, MAX_STORED_RANK, LayerSpec, SVDQuantConfig
from ..errors import SVDQuantError
from .header import TensorInfo, read_header

METADATA_KEY = "svdquant"
# Nunchaku's folders.
BLOCKS_FILE, REST_FILE, T5_FILE = (
    "transformer_blocks.safetensors",
    "unquantized_layers.safetensors",
    "svdq-t5.safetensors",
)
PICKLES = (".pt", ".bin", ".ckpt", ".pth", ".pkl")
DENOISERS = ("transformer", "unet", "prior", "transformer_2")
ACCEPTED = "a model folder with config.json, a pipeline folder with model_index.json, a .safetensors file or a Hub id"


@dataclass(frozen=True)
class Checkpoint:
    """One model on disk. `config` is the model's own; `quantization` its quantization_config or None."""

    path: Path
    files: tuple[Path, ...]
    config: dict[str, Any]
    quantization: dict[str, Any] | None
    library: str
    model_class: str
    tensors: dict[str, TensorInfo] = field(repr=False)
    metadata: dict[str, str] = field(repr=False)
    is_file: bool = False

    @property
    def method(self) -> str | None:
        """The quant_method, None for an unquantized model."""
        return None if self.quantization is None else str(self.quantization.get("quant_method"))

    @property
    def blocks_only(self) -> bool:
        """Whether it is one of Nunchaku's oldest files, whose other tensors have to come from a 16-bit model."""
        blocks = ("transformer_blocks.", "single_transformer_blocks.")
        return self.method == "nunchaku" and all(name.startswith(blocks) for name in self.tensors)


def open_checkpoint(path: str | Path, component: str | None = None) -> Checkpoint:
    """The model at a local path. component: which model of a pipeline folder; None takes its denoiser.

    Raises `SVDQuantError` for a missing, unreadable, damaged or pickled one.
    """
    path = Path(path)
    try:
        is_dir, is_file = path.is_dir(), path.is_file()
        has_index = is_dir and (path / "model_index.json").is_file()
    except OSError as error:
        raise SVDQuantError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    suffix = path.suffix.lower()
    if suffix in PICKLES:
        raise SVDQuantError(f"{path}: pickle files can run code; convert to safetensors")
    if suffix == ".gguf":
        raise SVDQuantError(
            f"{path}: GGUF holds quantized weights; give the .safetensors of the model in 16 bits or fp8"
        )
    if is_file and suffix in (".safetensors", ".sft"):
        return _single_file(path)
    if is_file and path.name.endswith(".safetensors.index.json"):
        files, tensors, metadata = _shards(path)
        return Checkpoint(path, files, {}, None, "", "", tensors, metadata, is_file=True)
    if is_file:
        raise SVDQuantError(f"{path}: is not a model; give {ACCEPTED}")
    if not is_dir:
        raise SVDQuantError(f"{path}: does not exist; give {ACCEPTED}")
    return _model_folder(_component_folder(path, component) if has_index else path)


def open_model_config(path: Path) -> Checkpoint:
    """The denoiser of a model or pipeline folder without its weights, which need not be there."""
    folder = _component_folder(path, None) if (path / "model_index.json").is_file() else path
    if not (folder / "config.json").is_file():
        raise SVDQuantError(f"{folder}: has no config.json; give {ACCEPTED}")
    config = read_json(folder / "config.json")
    quantization = _quantization(config.get("quantization_config"), folder / "config.json")
    return Checkpoint(folder, (), config, quantization, "diffusers", str(config.get("_class_name", "")), {}, {})


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises `SVDQuantError` naming it."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SVDQuantError(f"{path}: cannot be read ({error.strerror or error}); check its permissions") from error
    except (ValueError, RecursionError) as error:
        raise SVDQuantError(f"{path}: is not valid JSON ({error}); download it again") from error
    if not isinstance(data, dict):
        raise SVDQuantError(f"{path}: holds no JSON object; download it again")
    return data


def _component_folder(path: Path, component: str | None) -> Path:
    if component is not None:
        if not (path / component / "config.json").is_file():
            raise SVDQuantError(f"{path}: the pipeline has no model {component!r}")
        return path / component
    present = [name for name in DENOISERS if (path / name / "config.json").is_file()]
    if not present:
        raise SVDQuantError(f"{path}: the pipeline has no {' or '.join(DENOISERS)} to load")
    quantized = [name for name in present if "quantization_config" in read_json(path / name / "config.json")]
    return path / (quantized or present)[0]


def _model_folder(path: Path) -> Checkpoint:
    config_file = path / "config.json"
    try:
        names = sorted(entry.name for entry in path.iterdir())
    except OSError as error:
        raise SVDQuantError(f"{path}: cannot be read ({error.strerror or error}); check its permissions") from error
    if BLOCKS_FILE in names or T5_FILE in names:
        return _nunchaku_folder(path, names)
    if config_file.name not in names:
        raise SVDQuantError(f"{path}: has no config.json; give {ACCEPTED}")
    config = read_json(config_file)
    files, tensors, metadata = _weights(path, names)
    diffusers_class, architectures = config.get("_class_name"), config.get("architectures")
    architecture = architectures[0] if isinstance(architectures, list) and architectures else architectures or ""
    return Checkpoint(
        path=path,
        files=files,
        config=config,
        quantization=_quantization(config.get("quantization_config"), config_file),
        library="diffusers" if diffusers_class else "transformers",
        model_class=str(diffusers_class or architecture),
        tensors=tensors,
        metadata=metadata,
    )


def _weights(path: Path, names: list[str]) -> tuple[tuple[Path, ...], dict[str, TensorInfo], dict[str, str]]:
    indices = [name for name in names if name.endswith(".safetensors.index.json")]
    if indices:
        return _shards(path / indices[0])
    files = [path / name for name in names if name.endswith(".safetensors")]
    if not files:
        pickled = [name for name in names if name.endswith(PICKLES)]
        if pickled:
            raise SVDQuantError(f"{path / pickled[0]}: pickle files can run code; convert to safetensors")
        raise SVDQuantError(f"{path}: has no .safetensors file; download it again")
    # Variants ("model.fp16.safetensors") and adapters may stand beside the plain file.
    plain = [f for f in files if f.name in ("diffusion_pytorch_model.safetensors", "model.safetensors")]
    file = plain[0] if plain else min(files, key=lambda f: len(f.name))
    tensors, metadata = read_header(file)
    return (file,), tensors, metadata


def _shards(index: Path) -> tuple[tuple[Path, ...], dict[str, TensorInfo], dict[str, str]]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise SVDQuantError(f"{index}: has no weight_map; download it again")
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    files = []
    for name in sorted(set(weight_map.values())):
        file = index.parent / name
        if Path(name).name != name or not file.is_file():
            raise SVDQuantError(f"{index}: names the shard {name!r}, which is not in that folder; download it again")
        found, metadata = read_header(file)
        wanted = {tensor for tensor, shard in weight_map.items() if shard == name}
        if lacking := sorted(wanted - found.keys()):
            raise SVDQuantError(f"{file}: lacks tensor {lacking[0]}, which {index.name} promises; download it again")
        if extra := sorted(found.keys() - wanted):
            raise SVDQuantError(f"{file}: holds tensor {extra[0]}, which {index.name} does not name; download it again")
        tensors |= found
        files.append(file)
    return tuple(files), tensors, metadata


def _single_file(path: Path) -> Checkpoint:
    tensors, metadata = read_header(path)
    if METADATA_KEY not in metadata:
        if any(name.endswith(".qweight") for name in tensors):
            return _nunchaku(path, (path,), {}, tensors, metadata, is_file=True)
        return Checkpoint(path, (path,), {}, None, "", "", tensors, metadata, is_file=True)
    try:
        record = json.loads(metadata[METADATA_KEY])
        config, quantization = record["config"], record["quantization_config"]
        library, model_class, version = record["library"], record["model_class"], int(record["format_version"])
    except (ValueError, KeyError, TypeError) as error:
        raise SVDQuantError(f"{path}: its {METADATA_KEY} record is damaged ({error}); save the model again") from error
    quantization = _quantization(quantization | {"format_version": version}, path)
    return Checkpoint(path, (path,), config, quantization, library, model_class, tensors, metadata, is_file=True)


def _nunchaku_folder(path: Path, names: list[str]) -> Checkpoint:
    if T5_FILE in names:
        # The packed linears in one file, the 16-bit rest in others.
        files = tuple(path / name for name in names if name.endswith(".safetensors"))
    elif REST_FILE in names:
        files = (path / BLOCKS_FILE, path / REST_FILE)
    else:
        files = (path / BLOCKS_FILE,)
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    for file in files:
        found, more = read_header(file)
        tensors |= found
        metadata |= more
    config = read_json(path / "config.json") if "config.json" in names else {}
    return _nunchaku(path, files, config, tensors, metadata)


def _nunchaku(
    path: Path,
    files: tuple[Path, ...],
    config: dict[str, Any],
    tensors: dict[str, TensorInfo],
    metadata: dict[str, str],
    is_file: bool = False,
) -> Checkpoint:
    """A checkpoint in one of Nunchaku's containers; the oldest say nothing about themselves."""
    config = config or _json_metadata(metadata, "config", path)
    declared = _json_metadata(metadata, "quantization_config", path)
    name = str(metadata.get("model_class", ""))
    t5 = "T5" in name or any(n.endswith(".scaled_zeros") for n in tensors)
    # The encoder alone, whatever the configuration was made for.
    model_class = "T5EncoderModel" if t5 else str(config.get("_class_name") or name)
    quantization = declared | {"quant_method": "nunchaku"}
    library = "transformers" if t5 else "diffusers"
    return Checkpoint(path, files, config, quantization, library, model_class, tensors, metadata, is_file)


def _json_metadata(metadata: dict[str, str], key: str, where: Path) -> dict[str, Any]:
    if key not in metadata:
        return {}
    try:
        data = json.loads(metadata[key])
    except (ValueError, TypeError, RecursionError) as error:
        raise SVDQuantError(f"{where}: its metadata {key!r} is not JSON ({error}); download it again") from error
    if not isinstance(data, dict):
        raise SVDQuantError(f"{where}: its metadata {key!r} holds no JSON object; download it again")
    return data


def _quantization(data: Any, where: Path) -> dict[str, Any] | None:
    if data is None:
        return None
    if not isinstance(data, dict) or "quant_method" not in data:
        raise SVDQuantError(f"{where}: its quantization_config names no quant_method; download it again")
    return data


def parse_config(quantization: dict[str, Any], where: Path | str) -> SVDQuantConfig:
    """The configuration of a quantized checkpoint, its layers checked. Raises `SVDQuantError` naming the file."""
    method = quantization.get("quant_method")
    if method != "svdquant":
        raise SVDQuantError(f"{where}: quant_method {method!r} is not svdquant; load it with the library that wrote it")
    version = quantization.get("format_version", FORMAT_VERSION)
    if not isinstance(version, int):
        raise SVDQuantError(f"{where}: format_version {version!r} is no number; save the model again")
    try:
        config = SVDQuantConfig.from_dict(quantization)
    except SVDQuantError as error:
        raise SVDQuantError(f"{where}: {error}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise SVDQuantError(f"{where}: its quantization_config is damaged ({error}); save the model again") from error
    assert isinstance(config, SVDQuantConfig)
    layer_specs(config, where)
    return config


def layer_specs(config: SVDQuantConfig, where: Path | str) -> dict[str, LayerSpec]:
    """Every quantized layer's stored form; raises `SVDQuantError` for one that no version of the format has."""
    if config.layers is None:
        raise SVDQuantError(f"{where}: its quantization_config names no layers; save the model again")
    specs = {}
    for name in config.layers:
        try:
            spec = config.layer_spec(name)
            spec_is_sound(spec)
        except (TypeError, ValueError, AttributeError) as error:
            raise SVDQuantError(f"{where}: layer {name} cannot be read ({error}); save the model again") from error
        specs[name] = spec
    return specs


def spec_is_sound(spec: LayerSpec) -> None:
    """Raises `ValueError` naming the first field of a layer that cannot be."""
    config = SVDQuantConfig(weights=spec.weights, activations=spec.activations, group_size=spec.group_size)
    if isinstance(spec.rank, bool) or not isinstance(spec.rank, int) or not 0 <= spec.rank <= MAX_STORED_RANK:
        raise ValueError(f"rank={spec.rank!r}")
    if spec.kind not in ("svdquant", "w4a16"):
        raise ValueError(f"kind={spec.kind!r}")
    if config.weights == "nvfp4" and spec.group_size != 16:
        raise ValueError(f"group_size={spec.group_size}")
    if spec.kind == "w4a16" and spec.weights == "nvfp4":
        raise ValueError("kind='w4a16' with nvfp4 weights")
    if spec.zeros and (spec.kind != "w4a16" or spec.weights != "int4"):
        raise ValueError("zeros belong to kind='w4a16' with int4 weights")
    blocks = spec.outer_blocks
    if not isinstance(blocks, int) or blocks < 1 or (blocks > 1 and spec.weights != "nvfp4"):
        raise ValueError(f"outer_blocks={blocks!r}")
    if spec.rotate and spec.unsigned:
        raise ValueError("rotate and unsigned exclude each other")
    if any(not 0 <= start < stop for start, stop in spec.unsigned):
        raise ValueError(f"unsigned={spec.unsigned!r}")
