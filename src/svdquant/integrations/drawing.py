"""What a drawing is made with: options under diffusers' names, devices, and the call itself."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint.layout import read_json
from ..checkpoint.skeleton import check_device
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
    check_device(name)
    return torch.device(name)


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
