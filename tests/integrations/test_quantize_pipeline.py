"""`quantize_pipeline`: from a folder to a folder, in bounded memory, killed and continued."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file

import svdquant
from svdquant import SVDQuantConfig, SVDQuantError
from svdquant.integrations.pipeline import PipelineOptions, draw, load_pipeline, resolve_model, skeleton
from svdquant.integrations.quantize import quantize_pipeline
from svdquant.nn import quantized_layers

OPTIONS = PipelineOptions(num_inference_steps=2, height=16, width=16, max_sequence_length=32)
PROMPTS = ["a cat", "a dog on a mat"]


def config(**fields: Any) -> SVDQuantConfig:
    return SVDQuantConfig(**({"rank": 16, "smooth": 3, "calibration_rows": 256} | fields))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "pipe"
    tiny.flux_pipeline().to(torch.bfloat16).save_pretrained(folder)
    return folder


def weights_of(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted((folder / "transformer").glob("*.safetensors"))}


@pytest.mark.parametrize("prompts", [None, PROMPTS], ids=["data-free", "calibrated"])
def test_folder_to_folder_draws_the_same_scene(source: Path, tmp_path: Path, prompts: list[str] | None) -> None:
    out = tmp_path / "out"
    report = quantize_pipeline(source, out, config(), prompts=prompts, options=OPTIONS)
    assert not out.with_name("out.partial").exists()
    assert report.bytes_after < report.bytes_before
    assert {layer.error_of for layer in report.layers} == {"weight" if prompts is None else "output"}
    assert json.loads((out / "svdquant_report.json").read_text())["layers"][0]["name"] == report.layers[0].name
    assert report.worst(1)[0].name in (out / "svdquant_report.txt").read_text()
    pipe, original = load_pipeline(out), load_pipeline(source)
    assert len(quantized_layers(pipe.transformer)) == len(report.layers)
    a, b = (np.asarray(draw(p, ["a cat"], [0], OPTIONS)[0], float) for p in (pipe, original))
    assert 0 < np.abs(a - b).mean() < 8


def test_in_memory_and_streamed_give_the_same_tensors(source: Path, tmp_path: Path) -> None:
    quantize_pipeline(source, tmp_path / "out", config(), prompts=PROMPTS, options=OPTIONS)
    pipe = load_pipeline(source)

    def calibrate(_model: Any) -> None:
        for number, prompt in enumerate(PROMPTS):
            draw(pipe, [prompt], [number], OPTIONS)

    svdquant.quantize(pipe.transformer, config(), calibrate)
    streamed = load_pipeline(tmp_path / "out").transformer.state_dict()
    in_memory = pipe.transformer.state_dict()
    assert streamed.keys() == in_memory.keys()
    for name, value in in_memory.items():
        assert torch.equal(streamed[name].view(torch.uint8), value.view(torch.uint8)), name


def test_small_shards_load_alike(source: Path, tmp_path: Path) -> None:
    quantize_pipeline(source, tmp_path / "one", config())
    quantize_pipeline(source, tmp_path / "many", config(), shard_bytes=100_000)
    assert len(weights_of(tmp_path / "many")) > 3
    one, many = (load_pipeline(tmp_path / name).transformer.state_dict() for name in ("one", "many"))
    assert all(torch.equal(one[name].view(torch.uint8), many[name].view(torch.uint8)) for name in one)


_KILLED = """
import sys, os, signal
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_quantize_pipeline import OPTIONS, PROMPTS, config, quantize_pipeline
count = 0
def progress(stage, done, total, text):
    global count
    count += 1
    if count == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
quantize_pipeline({source!r}, Path(sys.argv[1]), config(), prompts=PROMPTS, options=OPTIONS, progress=progress)
"""


def test_killed_anywhere_and_continued_is_bit_identical(source: Path, tmp_path: Path) -> None:
    """kill -9 while calibrating, between groups and while writing; the same call then ends with the same bits."""
    quantize_pipeline(source, tmp_path / "whole", config(), prompts=PROMPTS, options=OPTIONS)
    expected = weights_of(tmp_path / "whole")
    script = tmp_path / "run.py"
    script.write_text(_KILLED.format(tests=str(Path(__file__).parent), source=str(source)))
    paths = [str(Path(__file__).parents[1]), str(Path(svdquant.__file__).parents[1])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    out = tmp_path / "killed"
    # Calls of progress: 2 prompts + 1, then one per group, then writing; each run dies later than the one before.
    for calls in (2, 5, 6):
        run = subprocess.run([sys.executable, str(script), str(out), str(calls)], env=environment, capture_output=True)
        assert run.returncode == -signal.SIGKILL, run.stderr.decode()
        assert not out.exists() and out.with_name("killed.partial").exists()
    solved = sorted((out.with_name("killed.partial") / "solved" / "transformer").glob("*.safetensors"))
    stamps = {f: f.stat().st_mtime_ns for f in solved}
    assert len(stamps) >= 3
    calls_left: list[str] = []

    def progress(stage: str, done: int, total: int, text: str) -> None:
        calls_left.append(stage)
        if stage == "solve" and done == total:
            # What had been solved was not solved again.
            assert all(f.stat().st_mtime_ns == stamp for f, stamp in stamps.items())

    quantize_pipeline(source, out, config(), prompts=PROMPTS, options=OPTIONS, progress=progress)
    assert "solve" in calls_left
    assert weights_of(out) == expected


def test_other_settings_are_refused_until_restart(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def stop(stage: str, *_: Any) -> None:
        if stage == "solve":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_pipeline(source, out, config(), progress=stop)
    with pytest.raises(SVDQuantError, match=r"begun with other rank.*--restart"):
        quantize_pipeline(source, out, config(rank=8))
    quantize_pipeline(source, out, config(rank=8), restart=True)
    assert load_pipeline(out).transformer.transformer_blocks[0].attn.to_q.spec.rank == 8


def test_existing_output_is_kept_unless_overwritten(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize_pipeline(source, out, config())
    before = weights_of(out)
    with pytest.raises(SVDQuantError, match="exists already"):
        quantize_pipeline(source, out, config(rank=8))
    assert weights_of(out) == before
    quantize_pipeline(source, out, config(rank=8), overwrite=True)
    assert weights_of(out) != before
    assert not list(tmp_path.glob("out.*"))


def test_max_error_writes_nothing_and_can_be_relaxed(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(SVDQuantError, match=r"layers exceed the relative error 0\.0001: .*--max-error"):
        quantize_pipeline(source, out, config(max_error=1e-4))
    assert not out.exists()
    report = quantize_pipeline(source, out, config(max_error=0.9))
    assert report.layers and out.exists()


def test_keep_16bit_above_keeps_the_worst_layers(source: Path, tmp_path: Path) -> None:
    errors = sorted(layer.error for layer in quantize_pipeline(source, tmp_path / "all", config()).layers)
    limit = (errors[-3] + errors[-4]) / 2
    report = quantize_pipeline(source, tmp_path / "some", config(keep_16bit_above=limit))
    kept = [layer.name for layer in report.layers if layer.kind == "keep"]
    assert len(kept) == 3
    model = load_pipeline(tmp_path / "some").transformer
    original = load_pipeline(source).transformer
    for name in kept:
        assert torch.equal(model.get_submodule(name).weight, original.get_submodule(name).weight)
    assert not set(kept) & set(quantized_layers(model))


def test_calibration_with_little_host_memory_equals_the_plain_one(source: Path, tmp_path: Path) -> None:
    """The 16-bit transformer goes through accelerate's offload to disk."""
    quantize_pipeline(source, tmp_path / "plain", config(), prompts=PROMPTS, options=OPTIONS)
    quantize_pipeline(source, tmp_path / "small", config(), prompts=PROMPTS, options=OPTIONS, max_memory="500KB")
    assert weights_of(tmp_path / "plain") == weights_of(tmp_path / "small")


def test_single_file_of_a_fine_tune(source: Path, tmp_path: Path) -> None:
    state = load_file(source / "transformer" / "diffusion_pytorch_model.safetensors")
    file = tmp_path / "fine_tune.safetensors"
    save_file(state, file)
    quantize_pipeline(file, tmp_path / "out", config(), base=str(source))
    quantize_pipeline(source, tmp_path / "same", config())
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "same")
    with pytest.raises(SVDQuantError, match="--base"):
        quantize_pipeline(file, tmp_path / "other", config())


def test_nan_and_wrong_shape_name_the_layer(source: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(source, broken)
    file = broken / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    name = "transformer_blocks.0.ff.net.2.weight"
    save_file(state | {name: torch.full_like(state[name], float("nan"))}, file)
    with pytest.raises(SVDQuantError, match=r"transformer_blocks\.0\.ff\.net\.2\.weight holds NaN"):
        quantize_pipeline(broken, tmp_path / "out", config())
    save_file(state | {name: state[name][:, :64].contiguous()}, file)
    with pytest.raises(SVDQuantError, match=r"transformer_blocks\.0\.ff\.net\.2\.weight has shape"):
        quantize_pipeline(broken, tmp_path / "out2", config())
    assert not (tmp_path / "out").exists() and not (tmp_path / "out2").exists()


def test_quantizing_twice_is_refused(source: Path, tmp_path: Path) -> None:
    quantize_pipeline(source, tmp_path / "once", config())
    with pytest.raises(SVDQuantError, match="quantized already"):
        quantize_pipeline(tmp_path / "once", tmp_path / "twice", config())


_PEAK = """
import resource, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_quantize_pipeline import config, quantize_pipeline
import torch, diffusers
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
quantize_pipeline(Path(sys.argv[1]), Path(sys.argv[2]), config(), shard_bytes=4 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base)
"""


def test_peak_memory_is_flat_in_the_number_of_blocks(tmp_path: Path) -> None:
    """Four times the blocks, the same peak: what is held is one group and one shard."""
    script = tmp_path / "peak.py"
    script.write_text(_PEAK.format(tests=str(Path(__file__).parent)))
    paths = [str(Path(__file__).parents[1]), str(Path(svdquant.__file__).parents[1])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    peaks, sizes = [], []
    for blocks in (3, 12):
        folder = tmp_path / f"model{blocks}"
        model = FluxTransformer2DModel(
            num_layers=0, num_single_layers=blocks, num_attention_heads=3, joint_attention_dim=128
        ).bfloat16()
        model.save_pretrained(folder)
        sizes.append(sum(p.nbytes for p in model.parameters()) / 2**20)
        del model
        out = subprocess.run(
            [sys.executable, str(script), str(folder), str(tmp_path / f"out{blocks}")],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append(int(out.stdout.split()[-1]) / 1024)
    assert sizes[1] - sizes[0] > 30, sizes
    assert peaks[1] - peaks[0] < 0.25 * (sizes[1] - sizes[0]), (peaks, sizes)


def test_skeletons_cost_no_memory_and_read_no_weights(source: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    model = skeleton("FluxTransformer2DModel")
    assert sum(p.numel() for p in model.parameters()) > 11e9
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000
    assert time.perf_counter() - began < 30
    assert sum(p.numel() for p in skeleton(source).parameters()) == sum(
        p.numel() for p in skeleton(source / "transformer" / "config.json").parameters()
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [("/no/such/folder", "does not exist"), ("model.ckpt", "pickle files can run code"), ("a.bin", "pickle")],
)
def test_resolve_model_refuses(name: str, message: str) -> None:
    with pytest.raises(SVDQuantError, match=message):
        resolve_model(name)
