"""The 16-bit pipeline that draws the pictures to calibrate with."""

from __future__ import annotations

import gc
import hashlib
import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import torch

from ..checkpoint.layout import DENOISERS, Checkpoint, read_json
from ..checkpoint.skeleton import stored_dtype
from .components import checkpoints_of
from .conditions import read_picture
from .drawing import GENERATION_FIELDS, calibration_note, draw_to_calibrate, generation_defaults
from .pipeline import PipelineOptions, host_memory_for, load_pipeline, pipeline_bytes

# (stage, done, total, what is being worked on); stages: "calibrate", "solve", "write", and "note" for a remark.
StageProgress = Callable[[str, int, int, str], None]


class _FirstStep(BaseException):
    """Not an `Exception`, so that a pipeline's own error handling lets it through."""


def _scheduler(pipeline: Path) -> dict[str, Any]:
    """How the pipeline's scheduler is set."""
    file = pipeline / "scheduler" / "scheduler_config.json"
    return read_json(file) if file.is_file() else {}


class CalibrationDrawing:
    """The 16-bit pipeline and what it draws to calibrate; loaded when first needed."""

    def __init__(
        self,
        source: Path,
        prompts: list[str],
        options: PipelineOptions,
        seed: int,
        dtype: torch.dtype | None,
        device: torch.device,
        max_memory: str | None,
        work: Path,
        say: StageProgress,
    ) -> None:
        self.source, self.prompts, self.options, self.seed = source, prompts, options, seed
        self.dtype, self.device, self.given_memory, self.say = dtype, device, max_memory, say
        self.offload = work / "offload"
        self._pipe: Any = None

    def key(self) -> list[Any]:
        """What decides the pictures, but for the weights: prompts, options, and what the pipeline adds to them."""
        options = vars(self.options) | {"extra": {name: _told(value) for name, value in self.options.extra.items()}}
        for name in ("image", "mask_image"):
            if options[name] is not None:
                options[name] = _told(read_picture(Path(options[name])))
        own = generation_defaults(self.source)
        defaults = {name: own[name] for name in GENERATION_FIELDS if name in own}
        return [self.prompts, options, self.seed, defaults, _scheduler(self.source)]

    def _load_dtype(self) -> torch.dtype:
        return self.dtype or working_dtype(next(iter(checkpoints_of(self.source).values())))

    @cached_property
    def max_memory(self) -> str | None:
        """As given, or chosen where the pipeline would not fit into the host's memory."""
        if self.given_memory is not None or self.device.type != "cpu":
            return self.given_memory
        needed, available = pipeline_bytes(self.source, self._load_dtype()), psutil.virtual_memory().available
        chosen = host_memory_for(needed, available)
        if chosen is not None:
            text = (
                f"the 16-bit pipeline takes {needed / 2**30:.1f} GiB and {available / 2**30:.1f} GiB of memory are "
                f"free: {chosen} of its denoiser stay in memory, the rest on disk; --max-memory sets how much"
            )
            self.say("note", 0, 0, text)
        return chosen

    @property
    def pipe(self) -> Any:
        if self._pipe is None:
            self.offload.mkdir(parents=True, exist_ok=True)
            self._pipe = load_pipeline(
                self.source,
                dtype=self._load_dtype(),
                device=str(self.device),
                max_memory=self.max_memory,
                offload_folder=self.offload,
            )
            if note := calibration_note(self._pipe, self.options):
                self.say("note", 0, 0, note)
        return self._pipe

    def picture(self, number: int) -> None:
        draw_to_calibrate(self.pipe, self.prompts[number], self.seed + number, self.options)

    def encode(self, number: int) -> None:
        """The beginning of a picture, up to its first step: text encoders have run by then."""

        def stop(*_: Any) -> None:
            raise _FirstStep

        models = [model for name in DENOISERS if (model := getattr(self.pipe, name, None)) is not None]
        handles = [model.register_forward_pre_hook(stop) for model in models]
        try:
            self.picture(number)
        except _FirstStep:
            pass
        finally:
            for handle in handles:
                handle.remove()

    def close(self) -> None:
        self._pipe = None
        gc.collect()
        shutil.rmtree(self.offload, ignore_errors=True)


def _told(value: Any) -> Any:
    """Of a picture, tensor or array its contents: as text it would be where it lies in memory."""
    if isinstance(value, (list, tuple)):
        return [_told(item) for item in value]
    if isinstance(value, torch.Tensor):
        value = value.detach().float().cpu().numpy()
    if not hasattr(value, "tobytes"):
        return value
    shape = getattr(value, "shape", None) or (value.mode, *value.size)
    return [*map(str, shape), hashlib.sha256(value.tobytes()).hexdigest()]


def working_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """As stored; bfloat16 for float32."""
    stored = stored_dtype(checkpoint.tensors)
    return stored if stored != torch.float32 else torch.bfloat16
