"""Memory of every model family: what `svdquant plan` estimates, and the layers of its blocks at real size, measured.

    python benchmarks/families.py [--family flux.1-dev --family …] [--threads 2] [--weights int4] [--rows 1024]

Plans come from the published configurations (tests/families/configs). Of each model one block of every kind is made,
with random weights in bfloat16: each distinct group of linears is solved once, data-free (rank 32, to nearest), and
multiplies `--rows` random rows (a modulation one), on a CPU. A family has a process of its own; it holds one group in
16 bits at a time, and the quantized layers of all. Peaks are resident memory above what was held before. A quarter of
an hour on two cores; --family replaces some of the results.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CONFIGS = HERE.parent / "tests" / "families" / "configs"
# One of those that differ in their shapes; small ones first.
FAMILIES = (
    "sana-0.6b", "pixart-sigma", "sana-1.6b", "wan2.1-t2v-1.3b", "sdxl-base", "ltx-video-2b", "sd3.5-medium", "z-image",
    "hunyuanvideo-1.5", "sd3.5-large", "flux.1-dev", "wan2.2-ti2v-5b", "qwen-image", "hunyuanvideo", "wan2.1-t2v-14b",
    "ltx-video-13b", "flux.2-klein-4b", "ltx-2", "flux.2-klein-9b", "flux.2-dev",
)  # fmt: skip


def measure(name: str, weights: str, rows: int, threads: int) -> dict[str, Any]:
    """One family, in this process."""
    import diffusers
    import torch

    from svdquant import SVDQuantConfig
    from svdquant.bench.device import CPU
    from svdquant.integrations.pipeline import skeleton
    from svdquant.ptq.memory import estimate
    from svdquant.ptq.plan import make_plan

    diffusers.utils.logging.set_verbosity_error()
    device = CPU(threads)
    config = SVDQuantConfig(weights=weights, smooth=False, gptq=False)
    model = skeleton(str(CONFIGS / f"{name}.json"), torch.bfloat16)
    plan = make_plan(model, config)
    expected = estimate(model, plan, config, calibrated=False)
    groups = distinct_groups(plan)
    noise = torch.randn((1 << 25) + 9)
    _layer(groups[-1][0], config, noise, 16, device)  # loads what the first call loads
    held: list[Any] = []
    before, began = device.resident() or 0, time.perf_counter()
    found = []
    for group, count in groups:
        layers, entry = _layer(group, config, noise, rows, device)
        held += layers
        found.append(entry | {"count": count})
    resident = (device.resident() or 0) - before
    measured = sum(p.numel() * p.element_size() for layer in held for p in layer.parameters())
    return {
        "name": name,
        "model_class": plan.model_class,
        "threads": threads,
        "rows": rows,
        "model": {
            "sixteen_bit": expected.sixteen_bit,
            "quantized": expected.weights,
            "multiplying": expected.multiplying,
            "solving": expected.solving,
        },
        "block": {
            "layers": len(held),
            "in_blocks": sum(entry["layers"] * entry["count"] for entry in found),
            "sixteen_bit": sum(entry["sixteen_bit"] for entry in found),
            "estimated": sum(entry["estimated"] for entry in found),
            "measured": measured,
            "resident": resident,
            "solving_estimated": max(entry["solving_estimated"] for entry in found),
            "solving_peak": max(entry["solving_peak"] for entry in found),
            "forward_peak": max(entry["forward_peak"] for entry in found),
            "forward_peak_16": max(entry["forward_peak_16"] for entry in found),
            "error": (sum(entry["error"] ** 2 for entry in found) / len(found)) ** 0.5,
            "worst_error": max(entry["error"] for entry in found),
            "solving_seconds": sum(entry["seconds"] for entry in found),
        },
        "groups": found,
        "seconds": time.perf_counter() - began,
    }


def distinct_groups(plan: Any) -> list[tuple[Any, int]]:
    """(group, how many like it) of one block of every kind: groups that differ in more than their block's number."""
    from svdquant.ptq.names import joined_names

    def alike(group: Any) -> Any:
        return group.spec, group.in_features, tuple(m.out_features for m in group.members)

    groups = plan.groups
    one_block = [groups[at[0]] for _, at in joined_names([(group.name, alike(group)) for group in groups])]
    found: dict[Any, list[Any]] = {}
    for group in one_block:
        found.setdefault(alike(group), []).append(group)
    return [(same[0], len(same)) for same in found.values()]


def _layer(group: Any, config: Any, noise: Any, rows: int, device: Any) -> tuple[list[Any], dict[str, Any]]:
    """(quantized layers of a group, what was measured)."""
    import torch
    from torch import nn

    from svdquant.nn import make_layer
    from svdquant.ptq.memory import solving_bytes, stored_bytes
    from svdquant.ptq.solve import solve_group

    dense: dict[str, Any] = {}
    for number, member in enumerate(group.members):
        linear = nn.Linear(member.in_features, member.out_features, member.bias, dtype=torch.bfloat16, device="meta")
        linear = linear.to_empty(device="cpu").requires_grad_(False)
        _fill(linear.weight, noise, number, member.in_features**-0.5)
        if member.bias:
            _fill(linear.bias, noise, number, 0.01)
        dense[member.name] = linear
    solved: dict[str, Any] = {}

    def solve() -> None:
        weights = {name: linear.weight for name, linear in dense.items()}
        biases = {name: linear.bias for name, linear in dense.items()}
        solved.update(solve_group(group, weights, biases, None, config))

    began = time.perf_counter()
    peak = device.peak(solve)
    seconds = time.perf_counter() - began
    layers = {name: make_layer(linear, solved[name].tensors) for name, linear in dense.items()}
    modulation = group.spec.kind == "w4a16"
    x = noise[: (1 if modulation else rows) * group.in_features].view(-1, group.in_features).bfloat16()
    wrong = right = 0.0
    forward = sixteen = 0
    with torch.no_grad():
        for name, linear in dense.items():
            forward = max(forward, device.peak(lambda layer=layers[name]: layer(x)) or 0)
            sixteen = max(sixteen, device.peak(lambda layer=linear: layer(x)) or 0)
            reference = linear(x).float()
            wrong += float((layers[name](x).float() - reference).square().sum())
            right += float(reference.square().sum())
    return list(layers.values()), {
        "group": group.name,
        "kind": group.spec.kind,
        "inputs": group.in_features,
        "outputs": [member.out_features for member in group.members],
        "layers": len(layers),
        "sixteen_bit": sum(member.bytes_before for member in group.members),
        "estimated": sum(stored_bytes(member, calibrated=False) for member in group.members),
        "solving_estimated": solving_bytes(group, config, calibrated=False),
        "solving_peak": peak or 0,
        "forward_peak": forward,
        "forward_peak_16": sixteen,
        "error": (wrong / right) ** 0.5,
        "seconds": seconds,
    }


def _fill(tensor: Any, noise: Any, start: int, scale: float) -> None:
    """Normally distributed numbers from a pool whose length no row divides."""
    flat = tensor.view(-1)
    for at in range(0, flat.numel(), noise.numel()):
        part = flat[at : at + noise.numel()]
        part.copy_(noise.roll(start)[: part.numel()] * scale)


def gib(count: float) -> str:
    return f"{count / 2**30:.2f}" if count >= 2**29 else f"{count / 2**20:.0f}M"


def table(results: list[dict[str, Any]]) -> str:
    """Markdown; GiB, or MiB where an M follows."""
    head = (
        "model | 16 bits | quantized | layers measured | bytes: estimated | measured | resident | solving: estimated | "
        "measured | product: 16 bits | quantized | error | s"
    )
    lines = [head, " | ".join(["---"] * (head.count("|") + 1))]
    for result in results:
        model, block = result["model"], result["block"]
        cells = [
            result["name"],
            *(gib(model[key]) for key in ("sixteen_bit", "quantized")),
            str(block["layers"]),
            *(gib(block[key]) for key in ("estimated", "measured", "resident", "solving_estimated", "solving_peak")),
            *(gib(block[key]) for key in ("forward_peak_16", "forward_peak")),
            f"{block['error']:.3f}",
            f"{result['seconds']:.0f}",
        ]
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", action="append", choices=sorted(path.stem for path in CONFIGS.glob("*.json")))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--weights", choices=("int4", "nvfp4", "int8"), default="int4")
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--json", type=Path, default=HERE / "results" / "families.json")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.weights, arguments.rows, arguments.threads)))
        return
    settings = {"weights": arguments.weights}
    results = _results(arguments.json, settings) if arguments.family else {}
    for name in arguments.family or FAMILIES:
        command = [sys.executable, __file__, "--one", name, "--weights", arguments.weights]
        command += ["--rows", str(arguments.rows), "--threads", str(arguments.threads)]
        environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads)}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
        if done.returncode:
            print(f"{name}: failed", file=sys.stderr)
            continue
        results[name] = json.loads(done.stdout.splitlines()[-1])
        block = results[name]["block"]
        off = block["measured"] / block["estimated"] - 1
        print(
            f"{name}: {results[name]['seconds']:.0f} s, bytes {off:+.2%} of the estimate", file=sys.stderr, flush=True
        )
        _save(arguments.json, results, settings)
    print(table(_ordered(results)))


def _results(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Those of before, by family, where they were made alike."""
    data = json.loads(path.read_text()) if path.is_file() else {}
    alike = all(data.get(key) == value for key, value in settings.items())
    return {entry["name"]: entry for entry in data.get("families", [])} if alike else {}


def _ordered(results: dict[str, Any]) -> list[dict[str, Any]]:
    return sorted(results.values(), key=lambda entry: entry["model"]["sixteen_bit"])


def _save(path: Path, results: dict[str, Any], settings: dict[str, Any]) -> None:
    import torch

    data = settings | {
        "torch": torch.__version__,
        "machine": platform.platform(),
        "families": _ordered(results),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
