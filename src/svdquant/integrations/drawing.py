"""What a drawing is made with: options under diffusers' names, devices, and the call itself."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..checkpoint.layout import read_json
from ..checkpoint.skeleton import check_device
from ..errors import SVDQuantError
from .conditions import check_pictures, made_up_pictures, picture_arguments, read_pictures

if TYPE_CHECKING:
    from PIL.Image import Image

# What a model folder may say about how it wants to be run; also where the embedded model keeps its prompts.
DEFAULTS_FILE = "prompts.json"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


# Of clips of pipelines that do not ask for a rate; Wan's.
_FPS = 16.0
_OWN_DEFAULTS = ("num_inference_steps", "guidance_scale", "height", "width", "num_frames", "max_sequence_length")
# Of a prompts.json what decides how pictures are drawn.
GENERATION_FIELDS = (*_OWN_DEFAULTS, "fps")


@dataclass
class Clip:
    """A video: frames (PIL), and for pipelines that make sound too, samples [channels, N] from -1 to 1."""

    frames: list[Image]
    fps: float
    sound: torch.Tensor | None = None
    sound_rate: int = 0


@dataclass
class PipelineOptions:
    """Arguments of a pipeline call under diffusers' names; None = the model's own default, then the pipeline's.

    fps: of clips; pipelines that call it `frame_rate` are told. image, mask_image: files.
    """

    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    fps: float | None = None
    max_sequence_length: int | None = None
    negative_prompt: str | None = None
    image: str | None = None
    mask_image: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def check(self, cls: type) -> None:
        """Raises `SVDQuantError` where a pipeline of this class knows no such argument, or lacks a picture."""
        known = inspect.signature(cls.__call__).parameters
        for name in (*_OWN_DEFAULTS, "negative_prompt"):
            if getattr(self, name) is not None and name not in known:
                raise SVDQuantError(f"{cls.__name__} takes no {name}; leave that option out")
        if self.fps is not None and not makes_clips(cls):
            raise SVDQuantError(f"{cls.__name__} makes no videos; leave fps out")
        check_pictures(cls, self.image, self.mask_image, self.extra)

    def arguments(self, pipe: Any, made_up: int | None = None) -> dict[str, Any]:
        """Keyword arguments for `pipe`; what its call does not know or lacks raises `SVDQuantError`.

        made_up: a seed for made-up pictures in place of missing ones.
        """
        cls = type(pipe)
        known = inspect.signature(cls.__call__).parameters
        defaults = generation_defaults(getattr(pipe, "_svdquant_source", None))
        wanted: dict[str, Any] = {}
        for name in _OWN_DEFAULTS:
            value = getattr(self, name)
            if value is None and name in known:
                value = defaults.get(name)
            if value is not None:
                wanted[name] = value
        if self.negative_prompt is not None:
            wanted["negative_prompt"] = self.negative_prompt
        rate = self.fps or defaults.get("fps")
        if rate and "frame_rate" in known:
            wanted["frame_rate"] = rate
        if "output_type" in known:
            wanted["output_type"] = "pil"
        pictures = {} if made_up is None else made_up_pictures(cls, made_up, self.width, self.height)
        pictures |= read_pictures(cls, self.image, self.mask_image)
        wanted |= pictures | self.extra
        self.check_values(pipe, wanted)
        check_pictures(cls, self.image, self.mask_image, wanted)
        required = [n for n, p in known.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
        lacking = [name for name in required if name not in ("self", "prompt") and name not in wanted]
        if lacking:
            raise SVDQuantError(
                f"{cls.__name__} cannot draw without {lacking[0]}; pass it from Python, or quantize with --data-free"
            )
        return wanted

    def check_values(self, pipe: Any, wanted: dict[str, Any]) -> None:
        """Raises `SVDQuantError` for an unknown argument and for sides that no latent has."""
        known = inspect.signature(type(pipe).__call__).parameters
        processor = getattr(pipe, "image_processor", None) or getattr(pipe, "video_processor", None)
        step = getattr(getattr(processor, "config", None), "vae_scale_factor", 1)
        for name, value in wanted.items():
            if name not in known:
                raise SVDQuantError(f"{type(pipe).__name__} takes no {name}; leave that option out")
            if name in ("height", "width") and (value < 1 or value % step):
                raise SVDQuantError(f"{name}={value} is no positive multiple of {step}, which this model needs")

    def frames_per_second(self, pipe: Any) -> float:
        """As asked for, else the model's own, else the default of the pipeline's `frame_rate`, else 16."""
        known = inspect.signature(type(pipe).__call__).parameters
        defaults = generation_defaults(getattr(pipe, "_svdquant_source", None))
        own = known["frame_rate"].default if "frame_rate" in known else _FPS
        return float(self.fps or defaults.get("fps") or own)


def makes_clips(cls: type) -> bool:
    """Whether a pipeline class makes videos: its call says how many frames."""
    return "num_frames" in inspect.signature(cls.__call__).parameters


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
    """One picture (PIL) or `Clip` per prompt and seed, prompt by prompt; each from its own generator on the CPU.

    A picture does not depend on which others are drawn with it, nor on the device that draws the noise.
    """
    options = options or PipelineOptions()
    arguments = options.arguments(pipe)
    drawn: list[Any] = []
    for prompt in prompts:
        for seed in seeds:
            output = _call(pipe, prompt, seed, arguments)
            if hasattr(output, "images"):
                drawn += output.images
            elif hasattr(output, "frames"):
                drawn += _clips(pipe, output, options.frames_per_second(pipe))
            else:
                raise SVDQuantError(f"{type(pipe).__name__} makes neither pictures nor videos; run it from Python")
    return drawn


def draw_to_calibrate(pipe: Any, prompt: str, seed: int, options: PipelineOptions) -> None:
    """Draws for what the models read meanwhile; pictures that the pipeline needs and nobody gave are made up."""
    _call(pipe, prompt, seed, options.arguments(pipe, made_up=seed))


def calibration_note(pipe: Any, options: PipelineOptions) -> str | None:
    """What the user should know about pictures that calibration makes up; None where it makes up none."""
    given = options.extra.keys() | read_pictures(type(pipe), options.image, options.mask_image).keys()
    if all(name in given for name in picture_arguments(type(pipe))):
        return None
    return (
        f"{type(pipe).__name__} draws from pictures: calibrating with made-up ones; a real one by --image calibrates "
        "better"
    )


def _call(pipe: Any, prompt: str, seed: int, arguments: dict[str, Any]) -> Any:
    try:
        return pipe(prompt=prompt, generator=torch.Generator("cpu").manual_seed(seed), **arguments)
    except NameError as error:
        # Some pipelines use a package that diffusers imports only where it is installed, without asking again.
        raise SVDQuantError(f"{type(pipe).__name__} needs {error.name}; `pip install {error.name}`") from error


def _clips(pipe: Any, output: Any, fps: float) -> list[Clip]:
    """The videos of one call: one per prompt and `num_videos_per_prompt`."""
    sounds = getattr(output, "audio", None)
    rate = 0
    if sounds is not None:
        rate = int(pipe.vocoder.config.output_sampling_rate)
    return [
        Clip(list(frames), fps, None if sounds is None else sounds[number].detach().float().cpu(), rate)
        for number, frames in enumerate(output.frames)
    ]
