"""The 16-bit pipeline that draws the pictures to calibrate with."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import torch

from ..checkpoint.layout import Checkpoint, open_checkpoint
from ..checkpoint.skeleton import stored_dtype
from ..errors import SVDQuantError
from .pipeline import PipelineOptions, denoisers, draw, host_memory_for, load_pipeline, pipeline_bytes

# (stage, done, total, what is being worked on); stages: "calibrate", "solve", "write", and "note" for a remark.
StageProgress = Callable[[str, int, int, str], None]


def checkpoints_of(source: Path) -> dict[str, Checkpoint]:
    """The 16-bit denoisers of a pipeline folder by name; of a model folder itself, under the name ""."""
    parts = denoisers(source) if (source / "model_index.json").is_file() else [""]
    checkpoints = {part: open_checkpoint(source, part or None) for part in parts}
    for checkpoint in checkpoints.values():
        if checkpoint.quantization is not None:
            raise SVDQuantError(f"{checkpoint.path}: is quantized already; start from the 16-bit model")
    return checkpoints


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
        """What decides the pictures, but for the model."""
        return [self.prompts, vars(self.options), self.seed]

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
        return self._pipe

    def picture(self, number: int) -> None:
        draw(self.pipe, [self.prompts[number]], [self.seed + number], self.options)

    def close(self) -> None:
        self._pipe = None
        gc.collect()
        shutil.rmtree(self.offload, ignore_errors=True)


def working_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """As stored; bfloat16 for float32."""
    stored = stored_dtype(checkpoint.tensors)
    return stored if stored != torch.float32 else torch.bfloat16
