"""Whole pipelines by name: find, load, place on a device, draw."""

from __future__ import annotations

import inspect
import json
import math
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint import load_model
from ..checkpoint.header import read_header
from ..checkpoint.hub import looks_like_hub_id, unreachable
from ..checkpoint.layout import ACCEPTED, DENOISERS, PICKLES, open_checkpoint, read_json
from ..checkpoint.skeleton import FLOATS
from ..errors import SVDQuantError

# What a model folder may say about how it wants to be run; also where the embedded model keeps its prompts.
DEFAULTS_FILE = "prompts.json"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass
class PipelineOptions:
    """Arguments of a pipeline call under diffusers' names; None = the model's own default, then the pipeline's."""

    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    max_sequence_length: int | None = None
    negative_prompt: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def arguments(self, pipe: Any) -> dict[str, Any]:
        """Keyword arguments for `pipe`; what its call does not know raises `SVDQuantError`."""
        known = inspect.signature(type(pipe).__call__).parameters
        defaults = generation_defaults(getattr(pipe, "_svdquant_source", None))
        wanted: dict[str, Any] = {}
        for name in ("num_inference_steps", "guidance_scale", "height", "width", "max_sequence_length"):
            value = getattr(self, name)
            if value is None and name in known:
                value = defaults.get(name)
            if value is not None:
                wanted[name] = value
        if self.negative_prompt is not None:
            wanted["negative_prompt"] = self.negative_prompt
        wanted |= self.extra
        step = getattr(getattr(getattr(pipe, "image_processor", None), "config", None), "vae_scale_factor", 1)
        for name, value in wanted.items():
            if name not in known:
                raise SVDQuantError(f"{type(pipe).__name__} takes no {name}; leave that option out")
            if name in ("height", "width") and (value < 1 or value % step):
                raise SVDQuantError(f"{name}={value} is no positive multiple of {step}, which this model needs")
        return wanted


def embedded_model() -> Path:
    """The pipeline folder inside the package: a trained FLUX in miniature."""
    return Path(str(files("svdquant") / "assets" / "tiny_flux"))


def generation_defaults(path: Path | str | None) -> dict[str, Any]:
    """What the model's own prompts.json says; empty without one."""
    if path is None or not (Path(path) / DEFAULTS_FILE).is_file():
        return {}
    return read_json(Path(path) / DEFAULTS_FILE)


def parse_dtype(name: str | torch.dtype | None) -> torch.dtype | None:
    """A floating type by its name; raises `SVDQuantError` for any other."""
    if name is None or isinstance(name, torch.dtype):
        return name
    aliases = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32"}
    try:
        return DTYPES[aliases.get(name, name)]
    except KeyError:
        raise SVDQuantError(f"dtype {name!r} is not one of {', '.join(DTYPES)}") from None


def pick_device(name: str = "auto") -> torch.device:
    """ "auto" takes the first accelerator; raises `SVDQuantError` for one that is not there."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        if hasattr(torch, "xpu") and torch.xpu.is_available():
            return torch.device("xpu")
        return torch.device("mps") if torch.backends.mps.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it holds no data")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise SVDQuantError(f"device {name!r} cannot be used ({reason}); see `svdquant doctor`") from error
    return device


def resolve_model(model: str | Path) -> Path:
    """A local folder or .safetensors file; a Hub id is downloaded.

    Raises `SVDQuantError` for a missing path, a pickle file, or a repository that cannot be reached.
    """
    path = Path(model)
    if path.suffix in PICKLES:
        raise SVDQuantError(f"{path}: pickle files can run code; convert to safetensors")
    if not looks_like_hub_id(model):
        if not path.exists():
            raise SVDQuantError(f"{path}: does not exist; give {ACCEPTED}")
        return path
    try:
        return _download(str(model))
    except Exception as error:  # the hub client raises of many kinds
        raise unreachable(str(model), error) from error


def _download(repo: str) -> Path:
    """Of a pipeline what diffusers loads, not the original weights, variants and pickles next to it."""
    from diffusers import DiffusionPipeline
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        hf_hub_download(repo, "model_index.json")
    except EntryNotFoundError:
        return Path(snapshot_download(repo, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]))
    folder = Path(DiffusionPipeline.download(repo, use_safetensors=True))
    snapshot_download(repo, allow_patterns=[DEFAULTS_FILE, "LICENSE*"])
    return folder


def model_class(name: str) -> Any:
    """A model class of diffusers by its name."""
    import diffusers

    cls = getattr(diffusers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise SVDQuantError(f"{name} is no model class of diffusers {diffusers.__version__}; upgrade diffusers")
    return cls


def skeleton(model: str | Path, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """The denoiser on the meta device, from its configuration alone.

    model: a pipeline or model folder, a config.json, a Hub id (only its configuration is fetched) or the name of a
    diffusers model class (its default configuration).
    """
    import diffusers

    path = Path(model)
    if path.suffix in PICKLES:
        raise SVDQuantError(f"{path}: pickle files can run code; convert to safetensors")
    if str(model).isidentifier() and not path.exists() and hasattr(diffusers, str(model)):
        return build_skeleton(model_class(str(model)), None, dtype)
    if path.suffix == ".json" and path.is_file():
        config = read_json(path)
    elif looks_like_hub_id(model):
        config = _hub_config(str(model))
    else:
        config = _local_config(path)
    if "_class_name" not in config:
        raise SVDQuantError(f"{model}: its config.json names no diffusers model class (_class_name)")
    return build_skeleton(model_class(config["_class_name"]), config, dtype)


def build_skeleton(cls: Any, config: dict[str, Any] | None, dtype: torch.dtype) -> nn.Module:
    """A model of `cls` on the meta device, in evaluation mode."""
    with torch.device("meta"):
        # A quantized model's own configuration describes the same module tree.
        model = (
            cls()
            if config is None
            else cls.from_config({k: v for k, v in config.items() if k != "quantization_config"})
        )
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return model.eval()


def _local_config(path: Path) -> dict[str, Any]:
    if path.is_file():
        config = open_checkpoint(path).config
        if not config:
            raise SVDQuantError(
                f"{path}: a single file lacks its configuration; give its pipeline folder, its config.json or the name "
                "of its diffusers class"
            )
        return config
    if not path.is_dir():
        raise SVDQuantError(f"{path}: does not exist; give {ACCEPTED}")
    if (path / "model_index.json").is_file():
        return read_json(path / denoisers(path)[0] / "config.json")
    if (path / "config.json").is_file():
        return read_json(path / "config.json")
    raise SVDQuantError(f"{path}: has no config.json; give {ACCEPTED}")


def _hub_config(repo: str) -> dict[str, Any]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    for name in ("transformer/config.json", "unet/config.json", "config.json"):
        try:
            return json.loads(Path(hf_hub_download(repo, name)).read_text())
        except LocalEntryNotFoundError as error:
            raise unreachable(repo, error) from error
        except EntryNotFoundError:
            continue
        except Exception as error:  # as above
            raise unreachable(repo, error) from error
    raise SVDQuantError(f"{repo}: has no transformer/config.json, unet/config.json or config.json")


def denoisers(path: Path) -> list[str]:
    """Names of a pipeline folder's denoising models."""
    present = [name for name in DENOISERS if (path / name / "config.json").is_file()]
    if not present:
        raise SVDQuantError(f"{path}: the pipeline has no {' or '.join(DENOISERS)} to quantize")
    return present


def check_files(path: Path) -> None:
    """Reads the header of every weight file of a folder: damage is found before anything is loaded."""
    weights = sorted(path.rglob("*.safetensors"))
    for file in weights:
        read_header(file)
    if not weights:
        pickled = [file for file in sorted(path.rglob("*")) if file.suffix in PICKLES]
        if pickled:
            raise SVDQuantError(f"{pickled[0]}: pickle files can run code; convert to safetensors")


def check_model(model: str | Path, base: str | None = None) -> tuple[Path, Path | None]:
    """(pipeline, model to build it around or None) that `load_pipeline` will use: found, and its files' headers read.

    Raises `SVDQuantError` for what cannot be loaded, without loading any weight.
    """
    path = resolve_model(model)
    if (path / "model_index.json").is_file():
        check_files(path)
        return path, None
    open_checkpoint(path)
    if base is None:
        raise SVDQuantError(f"{path}: is a model without its pipeline; name the pipeline with --base")
    pipeline = resolve_model(base)
    denoisers(pipeline)
    check_files(pipeline)
    return pipeline, path


def load_pipeline(
    model: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    device: str = "auto",
    base: str | None = None,
    max_memory: str | None = None,
    offload_folder: Path | None = None,
) -> Any:
    """A diffusers pipeline, quantized or not, ready to draw on `device`.

    model: a pipeline folder or Hub id; or a model (folder or file), quantized or not, which `base`, a pipeline, is
    built around. max_memory: of the denoiser in host memory, e.g. "8GB"; the rest of it stays in `offload_folder`.
    """
    from diffusers import DiffusionPipeline

    where, wanted = pick_device(device), parse_dtype(dtype) or torch.bfloat16
    path, part = check_model(model, base)
    components: dict[str, Any] = {}
    if part is not None:
        components[denoisers(path)[0]] = _load_part(part, path, wanted)
    elif max_memory is not None:
        for name in denoisers(path):
            checkpoint = open_checkpoint(path, name)
            if checkpoint.quantization is None:
                components[name] = _offloaded(
                    checkpoint.path, checkpoint.model_class, wanted, max_memory, offload_folder
                )
    try:
        pipe = DiffusionPipeline.from_pretrained(path, torch_dtype=wanted, use_safetensors=True, **components)
    except SVDQuantError:
        raise
    except (OSError, ValueError, RuntimeError, AttributeError, KeyError, ImportError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SVDQuantError(f"{path}: diffusers could not load this pipeline ({reason})") from error
    pipe.set_progress_bar_config(disable=True)
    pipe._svdquant_source = path
    if max_memory is None:
        place(pipe, where)
    return pipe


def _load_part(path: Path, pipeline: Path, dtype: torch.dtype) -> nn.Module:
    """A denoiser that comes without its pipeline: quantized, or a 16-bit folder or file."""
    checkpoint = open_checkpoint(path)
    if checkpoint.quantization is not None:
        model: nn.Module = load_model(path, torch_dtype=dtype)
        return model
    if checkpoint.is_file:
        return load_single_file(path, pipeline, dtype)
    try:
        model = model_class(checkpoint.model_class).from_pretrained(path, torch_dtype=dtype, use_safetensors=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SVDQuantError(f"{path}: diffusers could not load this model ({reason})") from error
    return model


def load_single_file(file: Path, pipeline: Path, dtype: torch.dtype) -> nn.Module:
    """A 16-bit .safetensors as the denoiser that `pipeline` has; diffusers converts the names."""
    part = denoisers(pipeline)[0]
    cls = model_class(read_json(pipeline / part / "config.json").get("_class_name", ""))
    try:
        model: nn.Module = cls.from_single_file(
            str(file), config=str(pipeline), subfolder=part, torch_dtype=dtype, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, IndexError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SVDQuantError(f"{file}: is not a {cls.__name__} as {pipeline} has it ({reason})") from error
    return model


def _offloaded(folder: Path, name: str, dtype: torch.dtype, max_memory: str, offload: Path | None) -> nn.Module:
    """A 16-bit model of which `max_memory` stays in host memory and the rest on disk (accelerate)."""
    if offload is None:
        raise SVDQuantError("max_memory needs a folder for what does not fit")
    return model_class(name).from_pretrained(
        folder, torch_dtype=dtype, device_map="auto", max_memory={"cpu": max_memory}, offload_folder=str(offload)
    )


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


def place(pipe: Any, device: torch.device) -> None:
    """Moves a pipeline to a device: whole, one model at a time, or layer by layer, as its memory allows."""
    if device.type != "cuda":
        pipe.to(device)
        return
    sizes = [sum(p.nbytes for p in c.parameters()) for c in pipe.components.values() if isinstance(c, nn.Module)]
    free = torch.cuda.mem_get_info(device)[0] * 0.85
    if sum(sizes) < free:
        pipe.to(device)
    elif max(sizes) < free:
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.enable_sequential_cpu_offload(device=device)


def draw(pipe: Any, prompts: list[str], seeds: list[int], options: PipelineOptions | None = None) -> list[Any]:
    """One picture (PIL) per prompt and seed, prompt by prompt; each from its own generator on the CPU.

    A picture does not depend on which others are drawn with it, nor on the device that draws the noise.
    """
    arguments = (options or PipelineOptions()).arguments(pipe)
    images = []
    for prompt in prompts:
        for seed in seeds:
            generator = torch.Generator("cpu").manual_seed(seed)
            images += pipe(prompt=prompt, generator=generator, **arguments).images
    return images
