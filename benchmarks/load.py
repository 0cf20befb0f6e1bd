"""Loading a checkpoint of FLUX.1-dev's shapes: seconds and peak memory, beside plainly reading the same file.

    python benchmarks/load.py [--json OUT] [--weights int4|nvfp4] [--layers N --single-layers N] [--folder FOLDER]

The tensors are random and written on the fly (6.6 GB at full size; --folder says where). Each load runs in a process of
its own, whose peak resident memory is measured with the mapped pages of the file in it. Page cache: the file has just
been written, so that it is warm for every load alike where memory allows.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

RANK = 32


def write_checkpoint(path: Path, weights: str, layers: int, single_layers: int) -> int:
    """A Nunchaku file of a FLUX.1-dev with random numbers; returns its size in bytes."""
    from diffusers import FluxTransformer2DModel

    from svdquant.checkpoint.mapped import streamed_file
    from svdquant.checkpoint.nunchaku import plain_names
    from svdquant.checkpoint.nunchaku_layouts import layout_of

    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True, num_layers=layers, num_single_layers=single_layers)
    layout = layout_of(model, lambda _name: True)
    assert layout is not None
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for linear in layout.linears:
        modules: list[Any] = [model.get_submodule(name) for name in linear.members]
        n, k = sum(m.out_features for m in modules), modules[0].in_features
        for piece in linear.pieces:
            shapes |= _linear(piece.name, n, (piece.stop or k) - piece.start, linear.kind, weights)
    state = model.state_dict()
    for tensor in layout.tensors:
        shapes[tensor.name] = (torch.bfloat16, tuple(state[tensor.targets[0]].shape))
    shapes |= {name: (torch.bfloat16, tuple(state[name].shape)) for name in plain_names(model, layout)}
    config = json.loads(model.to_json_string())
    fmt = {"int4": ("int4", 64), "nvfp4": ("fp4_e2m1_all", 16)}[weights]
    metadata = {
        "config": json.dumps(config),
        "model_class": layout.model_class,
        "quantization_config": json.dumps({"weight": {"dtype": fmt[0], "group_size": fmt[1]}, "rank": RANK}),
    }
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (64 << 20,), dtype=torch.uint8, generator=generator)
    floats = (torch.rand(32 << 20, generator=generator) * 0.01 + 0.001).bfloat16()
    with streamed_file(path, list(shapes), metadata) as file:
        for name, (dtype, shape) in shapes.items():
            count = torch.Size(shape).numel()
            source = floats if dtype == torch.bfloat16 else noise.view(dtype)
            if dtype == torch.float8_e4m3fn:
                source = floats.float().to(dtype)
            repeats = -(-count // source.numel())
            flat = source if repeats == 1 else torch.cat([source.view(torch.uint8)] * repeats).view(dtype)
            file.add(name, flat[:count].view(shape))
    return path.stat().st_size


def _linear(name: str, n: int, k: int, kind: str, weights: str) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    half = torch.bfloat16
    if kind == "w4a16":
        scales = (k // 64, n)
        leaves = {"qweight": (torch.int32, (n // 4, k // 2)), "wscales": (half, scales), "wzeros": (half, scales)}
    else:
        scale = (torch.float8_e4m3fn, (k // 16, n)) if weights == "nvfp4" else (half, (k // 64, n))
        leaves = {
            "qweight": (torch.int8, (n, k // 2)),
            "wscales": scale,
            "smooth": (half, (k,)),
            "lora_down": (half, (k, RANK)),
            "lora_up": (half, (n, RANK)),
        }
    leaves["bias"] = (half, (n,))
    return {f"{name}.{leaf}": entry for leaf, entry in leaves.items()}


LOADS = {
    "load_model": "import svdquant; held = svdquant.load_model(sys.argv[1])",
    "safetensors, read only": "from safetensors.torch import load_file; held = load_file(sys.argv[1])\n"
    "total = sum(int(t.view(torch.uint8).flatten()[::4096].sum()) for t in held.values())",
}
_CHILD = """
import resource, sys, time
import torch, svdquant.checkpoint.nunchaku, diffusers
from diffusers import FluxTransformer2DModel
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
began = time.perf_counter()
{load}
seconds = time.perf_counter() - began
print(seconds, before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def measure(load: str, path: Path) -> tuple[float, int, int]:
    """(seconds, bytes resident before, peak bytes) of one load in a new process."""
    command = [sys.executable, "-c", _CHILD.format(load=load), str(path)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-3:]
    return float(out[0]), int(out[1]) << 10, int(out[2]) << 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--weights", choices=("int4", "nvfp4"), default="int4")
    parser.add_argument("--layers", type=int, default=19)
    parser.add_argument("--single-layers", type=int, default=38)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = Path(folder) / "flux.safetensors"
        size = write_checkpoint(path, arguments.weights, arguments.layers, arguments.single_layers)
        rows = {}
        for name, load in LOADS.items():
            runs = [measure(load, path) for _ in range(arguments.repeats)]
            peak = max(run[2] for run in runs)
            rows[name] = {
                "seconds": statistics.median(run[0] for run in runs),
                "all_seconds": [run[0] for run in runs],
                "resident_before_bytes": runs[0][1],
                "peak_bytes": peak,
                "peak_over_file": peak / size,
                "added_over_file": (peak - runs[0][1]) / size,
            }
    print(f"{size / 1e9:.2f} GB {arguments.weights}, {torch.get_num_threads()} threads, {platform.machine()}")
    for name, row in rows.items():
        print(
            f"{name:24} {row['seconds']:7.1f} s   peak {row['peak_bytes'] / 1e9:6.2f} GB = "
            f"{row['peak_over_file']:.3f}× the file ({row['added_over_file']:.3f}× without what was there before)"
        )
    if arguments.json:
        result = {
            "file_bytes": size,
            "weights": arguments.weights,
            "torch": torch.__version__,
            "machine": platform.platform(),
            "threads": torch.get_num_threads(),
            "loads": rows,
        }
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
