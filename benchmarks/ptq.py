"""What solving one group costs, at FLUX.1's sizes, beside the published way of searching (a dense SVD per candidate).

    python benchmarks/ptq.py [--json OUT] [--quick]

Synthetic weights with a decaying spectrum and inputs with outlier channels. All times are of this machine and run.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

import svdquant
from svdquant import LayerSpec, SVDQuantConfig
from svdquant.integrations.pipeline import draw, embedded_model, generation_defaults, load_pipeline
from svdquant.ptq.low_rank import dense_svd, truncated_svd
from svdquant.ptq.plan import GroupPlan, LayerPlan
from svdquant.ptq.problem import Problem
from svdquant.ptq.smooth import search
from svdquant.ptq.solve import GroupInputs, solve_group


def make_case(k: int, n: int, rows: int, seed: int = 0) -> tuple[torch.Tensor, GroupInputs]:
    """A weight [n, k] and inputs [rows, k] in bfloat16."""
    g = torch.Generator().manual_seed(seed)
    directions = torch.randn(n, 48, generator=g) @ (
        torch.randn(48, k, generator=g) * torch.logspace(0, -1.5, 48)[:, None]
    )
    weight = torch.randn(n, k, generator=g) * 0.02 + directions * 0.01
    x = torch.randn(rows, k, generator=g) * torch.exp(0.5 * torch.randn(k, generator=g))
    x[:, torch.randperm(k, generator=g)[: k // 100]] *= 12
    x = x.bfloat16()
    return weight.bfloat16(), GroupInputs(x, x.abs().amax(0).float())


def solve(weight: torch.Tensor, inputs: GroupInputs | None, config: SVDQuantConfig) -> tuple[float, float]:
    """(seconds, relative error) of one group of one linear."""
    n, k = weight.shape
    spec = LayerSpec(
        "svdquant", config.weights, config.weight_group_size, config.rank, config.activations, (), config.use_rotation
    )
    layer = LayerPlan("layer", "svdquant", k, n, False, 2, "", "layer", "", spec=spec)
    began = time.perf_counter()
    solved = solve_group(GroupPlan("layer", (layer,)), {"layer": weight}, {"layer": None}, inputs, config)
    return time.perf_counter() - began, solved["layer"].report.error


def search_both(k: int, n: int, rows: int, steps: int) -> dict[str, float]:
    """The smoothing search with truncated and with dense SVD; the error is that of the factor each of them found."""
    weight, inputs = make_case(k, n, rows)
    problem = Problem(weight.float(), [n], inputs.rows.float(), LayerSpec(), k, "int4", torch.bfloat16)
    out: dict[str, float] = {}
    for name, exact in (("truncated", False), ("dense", True)):
        began = time.perf_counter()
        found = search(problem, inputs.amax, steps, torch.Generator().manual_seed(0), exact_svd=exact)
        out[f"{name}_s"] = time.perf_counter() - began
        smoothed = problem.smoothed_weight(found.factor)
        up, down = dense_svd(smoothed, 32)
        x = problem.inputs
        assert x is not None
        score = problem.score(
            x @ problem.weight.T, problem.quantized_inputs(x, found.factor), x / found.factor, smoothed, up, down
        )
        out[f"{name}_error"] = (score / float((x @ problem.weight.T).square().sum())) ** 0.5
    out["speedup"] = out["dense_s"] / out["truncated_s"]
    out["error_loss"] = out["truncated_error"] / out["dense_error"] - 1
    return out


def one_svd(k: int, n: int) -> dict[str, float]:
    """A single decomposition of the full-size weight, both ways."""
    weight = make_case(k, n, 1)[0].float()
    began = time.perf_counter()
    truncated_svd(weight, 32, torch.Generator().manual_seed(0))
    truncated = time.perf_counter() - began
    began = time.perf_counter()
    dense_svd(weight, 32)
    dense = time.perf_counter() - began
    return {"truncated_s": truncated, "dense_s": dense, "speedup": dense / truncated}


def embedded(prompts: int) -> dict[str, float]:
    """The whole embedded model, calibrated: drawing the prompts included."""
    pipe = load_pipeline(embedded_model())
    texts = generation_defaults(embedded_model())["calibration"][:prompts]
    began = time.perf_counter()
    report = svdquant.quantize(pipe.transformer, SVDQuantConfig(), lambda _: draw(pipe, texts, [0]))
    return {"prompts": prompts, "seconds": time.perf_counter() - began, "mean_error": report.mean_error()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="small shapes: checks that the benchmark runs")
    args = parser.parse_args()
    k, n, rows = (256, 512, 512) if args.quick else (3072, 12288, 4096)
    result: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "shape": {"K": k, "N": n, "rows": rows},
    }
    weight, inputs = make_case(k, n, rows)
    cases = {
        "calibrated, 39 candidates, 20 refinement rounds, GPTQ": (inputs, SVDQuantConfig(refine=20)),
        "calibrated, defaults (39 candidates, GPTQ)": (inputs, SVDQuantConfig()),
        "data-free": (None, SVDQuantConfig()),
    }
    for name, (x, config) in cases.items():
        seconds, error = solve(weight, x, config)
        result[name] = {"seconds": seconds, "error": error}
        print(f"{name:56} {seconds:7.2f} s   error {error:.4f}", flush=True)
    result["embedded model, calibrated"] = whole = embedded(2 if args.quick else 16)
    print(f"embedded model, calibrated on {whole['prompts']} prompts, defaults: {whole['seconds']:.1f} s", flush=True)
    small = (128, 256, 256, 4) if args.quick else (1024, 4096, 4096, 20)
    result["search K={} N={}".format(*small)] = both = search_both(*small)
    print(
        f"smoothing search K={small[0]} N={small[1]}: truncated {both['truncated_s']:.2f} s, dense "
        f"{both['dense_s']:.2f} s, {both['speedup']:.1f}x faster, output error {both['error_loss']:+.2%}"
    )
    result[f"one SVD K={k} N={n}"] = one = one_svd(k, n)
    times = f"truncated {one['truncated_s']:.2f} s, dense {one['dense_s']:.2f} s, {one['speedup']:.0f}x"
    print(f"one SVD K={k} N={n}: {times}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    sys.exit(main())
