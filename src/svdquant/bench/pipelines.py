"""The suite of pipelines: the embedded model from prompt to picture, quantized beside 16 bits."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch

from ..config import SVDQuantConfig
from ..integrations import quantize
from ..integrations.pipeline import PipelineOptions, draw, embedded_model, generation_defaults, load_pipeline
from ..nn import set_activations
from ..numerics import relative_error
from .device import Device
from .measure import Contender, measure
from .profile import profile
from .results import BASELINE, OURS, Case, Row
from .settings import Settings

_SEED = 0
_ROWS = 2048


def run_pipelines(settings: Settings, device: Device) -> list[Case]:
    """The embedded model, quantized to 4 and to 8 bits. The error is that of the picture's pixels against 16 bits."""
    size = settings.picture
    source = embedded_model()
    texts = generation_defaults(source)
    prompts, calibration = texts["demo"][: size.prompts], texts["calibration"][: size.calibration_prompts]
    options = PipelineOptions(num_inference_steps=size.steps, height=size.height, width=size.width)
    total = 3 + settings.rounds
    settings.progress("pipeline", 0, total, "embedded model: 16 bits")
    pipe = load_pipeline(source, dtype=settings.dtype, device=str(device.torch))
    reference = str(settings.dtype).removeprefix("torch.").replace("bfloat16", "bf16")
    models: dict[str, tuple[Any, str | None]] = {f"diffusers {reference}": (pipe.transformer, None)}
    for number, weights in enumerate(("int4", "int8")):
        settings.progress("pipeline", 1 + number, total, f"embedded model: quantizing to {weights}")
        activations = "int4" if weights == "int4" else "int8"
        config = SVDQuantConfig(weights=weights, activations=activations, rank=settings.rank, calibration_rows=_ROWS)
        model = copy.deepcopy(models[f"diffusers {reference}"][0])
        pipe.transformer = model
        quantize(model, config, lambda _: draw(pipe, calibration, [_SEED], options))
        if weights == "int4":
            models["ours W4A8"], models["ours W4A4"] = (model, "int8"), (model, "int4")
        else:
            models["ours W8A8"] = (model, "int8")

    def drawing(model: Any, activations: str | None) -> Any:
        def call() -> Any:
            pipe.transformer = model
            if activations is not None:
                set_activations(model, activations)
            return draw(pipe, prompts, [_SEED], options)

        return call

    baseline = next(iter(models))
    case = Case("pipeline", f"embedded model, {len(prompts)} pictures per call", baseline, {"prompts": prompts})
    contenders = [Contender(name, [drawing(*entry)]) for name, entry in models.items()]
    exact = _pixels(contenders[0].calls[0]())
    dense_bytes = _bytes(models[baseline][0])
    for contender in contenders:
        row = Row(contender.name, BASELINE if contender.name == baseline else OURS)
        row.bytes = _bytes(models[contender.name][0])
        row.bytes_ratio = row.bytes / dense_bytes
        pictures = _pixels(contender.calls[0]())
        row.error = relative_error(pictures, exact)
        row.scratch_bytes = device.peak(contender.calls[0])
        row.more["psnr"] = _psnr(pictures, exact)
        case.rows.append(row)

    def tell(done: int, _rounds: int) -> None:
        settings.progress("pipeline", 3 + done, total, f"embedded model: round {done + 1}")

    seconds = measure(contenders, device, settings.rounds, settings.sample_seconds, tell)
    for row in case.rows:
        row.set_times(seconds[row.contender], seconds[baseline])
        row.more["seconds_per_picture"] = row.milliseconds.median / 1e3 / len(prompts) if row.milliseconds else None
    for contender in contenders:
        case.profiles[contender.name] = profile(contender.calls[0], models[contender.name][0])
    return [case]


def _pixels(pictures: list[Any]) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(picture.convert("RGB"), np.float32) for picture in pictures]))


def _psnr(pictures: torch.Tensor, exact: torch.Tensor) -> float | None:
    """Decibels at a range of 255; None where all pixels are equal."""
    mean = float((pictures - exact).square().mean())
    return None if mean == 0 else float(10 * np.log10(255**2 / mean))


def _bytes(model: torch.nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters())
