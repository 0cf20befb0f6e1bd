"""What each part of SVDQuant is worth, on the embedded model: same prompts, same seeds, one part at a time.

    python benchmarks/ablation.py [--prompts 32] [--json OUT] [--markdown OUT]

Noise-prediction error: ‖v − v16‖/‖v16‖ of the whole transformer, at the latents, prompts and steps that the 16-bit
model went through. PSNR: pictures against those of the 16-bit model, same seeds.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import svdquant
from svdquant import SVDQuantConfig
from svdquant.integrations.pipeline import PipelineOptions, draw, embedded_model, generation_defaults, load_pipeline

A4: dict[str, Any] = {"activations": "int4", "rotate": False, "gptq": False}
VARIANTS: dict[str, dict[str, Any]] = {
    "round to nearest W4A4": A4 | {"smooth": False, "rank": 0},
    "smoothing only": A4 | {"rank": 0},
    "low-rank only": A4 | {"smooth": False},
    "SVDQuant W4A4": A4,
    "+ 20 refinement rounds": A4 | {"refine": 20},
    "+ GPTQ": A4 | {"gptq": True},
    "+ GPTQ + rotation": A4 | {"gptq": True, "rotate": True},
    "+ refinement + GPTQ + rotation": A4 | {"gptq": True, "rotate": True, "refine": 20},
    "data-free W4A4": A4 | {"data_free": True},
    "W4A8": A4 | {"activations": "int8"},
    "W4A8 + GPTQ": A4 | {"activations": "int8", "gptq": True},
    "W8A8 round to nearest": A4 | {"weights": "int8", "activations": "int8"},
    "nvfp4": {"weights": "nvfp4", "activations": "nvfp4", "gptq": False},
    "nvfp4 + GPTQ": {"weights": "nvfp4", "activations": "nvfp4", "gptq": True},
}


class Recorder:
    """Keeps the arguments and outputs of every transformer call of the 16-bit model."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.calls: list[tuple[dict[str, Any], torch.Tensor]] = []
        self.handle = model.register_forward_hook(self._hook, with_kwargs=True)

    def _hook(self, _module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        self.calls.append(({k: copy.copy(v) for k, v in kwargs.items()}, output[0].clone()))


@torch.no_grad()
def prediction_error(model: torch.nn.Module, calls: list[tuple[dict[str, Any], torch.Tensor]]) -> float:
    wrong = right = 0.0
    for kwargs, expected in calls:
        actual = model(**kwargs)[0]
        wrong += float((actual.double() - expected.double()).square().sum())
        right += float(expected.double().square().sum())
    return math.sqrt(wrong / right)


def psnr(images: list[Any], references: list[Any]) -> float:
    """Mean over the pictures, data range 255."""
    values = []
    for a, b in zip(images, references, strict=True):
        mse = float(np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2))
        values.append(10 * math.log10(255**2 / max(mse, 1e-10)))
    return float(np.mean(values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(embedded_model()))
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--calibration-prompts", type=int, default=32)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    texts = generation_defaults(args.model)
    prompts = texts["held_out"][: args.prompts]
    calibration = texts["calibration"][: args.calibration_prompts]
    options = PipelineOptions()
    pipe = load_pipeline(args.model)
    original = pipe.transformer
    recorder = Recorder(original)
    references = [draw(pipe, [prompt], [seed], options)[0] for seed, prompt in enumerate(prompts)]
    recorder.handle.remove()
    # Every fourth step of every picture covers all noise levels.
    calls = recorder.calls[::4]
    rows = []
    for name, fields in VARIANTS.items():
        if args.only and name not in args.only:
            continue
        fields = dict(fields)
        data_free = fields.pop("data_free", False)
        pipe.transformer = copy.deepcopy(original)

        def calibrate(_model: torch.nn.Module) -> None:
            draw(pipe, calibration, [0], options)

        began = time.perf_counter()
        config = SVDQuantConfig(**fields)
        svdquant.quantize(pipe.transformer, config, None if data_free else calibrate)
        seconds = time.perf_counter() - began
        svdquant.set_activations(pipe.transformer, config.solve_activations)
        error = prediction_error(pipe.transformer, calls)
        images = [draw(pipe, [prompt], [seed], options)[0] for seed, prompt in enumerate(prompts)]
        rows.append({"variant": name, "error": error, "psnr": psnr(images, references), "seconds": seconds})
        print(f"{name:34} error {error:.4f}  PSNR {rows[-1]['psnr']:.2f} dB  quantized in {seconds:.1f} s", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"prompts": len(prompts), "torch": torch.__version__, "rows": rows}, indent=1))
    if args.markdown:
        lines = ["| variant | noise-prediction error | PSNR, dB |", "|---|---|---|"]
        lines += [f"| {r['variant']} | {r['error']:.4f} | {r['psnr']:.2f} |" for r in rows]
        args.markdown.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
