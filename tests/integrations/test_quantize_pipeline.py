"""`quantize_pipeline`: from a folder to a folder, in bounded memory, killed and continued."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from diffusers import DDIMScheduler, FluxTransformer2DModel, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file

import svdquant
from svdquant import SVDQuantConfig, SVDQuantError
from svdquant.checkpoint.layout import open_checkpoint
from svdquant.checkpoint.streaming import WeightReader
from svdquant.integrations import calibration, job, on_disk
from svdquant.integrations.on_disk import quantize_pipeline
from svdquant.integrations.pipeline import (
    PipelineOptions,
    draw,
    host_memory_for,
    load_pipeline,
    pick_device,
    pipeline_bytes,
    resolve_model,
    skeleton,
)
from svdquant.nn import quantized_layers
from svdquant.ptq import plan

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


def test_killed_at_any_moment_and_continued_is_bit_identical(source: Path, tmp_path: Path) -> None:
    """kill -9 from outside, whatever the run is doing."""
    quantize_pipeline(source, tmp_path / "whole", config(), prompts=PROMPTS, options=OPTIONS)
    out = tmp_path / "killed"
    script = tmp_path / "run.py"
    script.write_text(_KILLED.format(tests=str(Path(__file__).parent), source=str(source)))
    paths = [str(Path(__file__).parents[1]), str(Path(svdquant.__file__).parents[1])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    delays = random.Random(time.time_ns())
    for _ in range(2):
        if out.exists():
            break
        run = subprocess.Popen([sys.executable, str(script), str(out), "0"], env=environment)
        began = time.monotonic()
        while not out.with_name("killed.partial").exists() and run.poll() is None and time.monotonic() < began + 120:
            time.sleep(0.02)
        delay = delays.uniform(0, 3)
        print(f"killed after {delay:.3f} s")
        time.sleep(delay)
        run.kill()
        run.wait()
    if not out.exists():
        quantize_pipeline(source, out, config(), prompts=PROMPTS, options=OPTIONS)
    assert weights_of(out) == weights_of(tmp_path / "whole")
    assert not out.with_name("killed.partial").exists()


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


def test_pictures_to_calibrate_with_are_known_by_their_contents(source: Path, tmp_path: Path) -> None:
    """Another picture under the same name makes other inputs; the same one elsewhere, or in memory again, does not."""

    def key(**options: Any) -> list[Any]:
        arguments: Any = (PipelineOptions(**options), 0, None, torch.device("cpu"), None, tmp_path, print)
        return calibration.CalibrationDrawing(source, PROMPTS, *arguments).key()

    def picture(name: str, level: int) -> Path:
        Image.new("RGB", (8, 4), (level, 0, 0)).save(tmp_path / name)
        return tmp_path / name

    first = key(image=str(picture("a.png", 0)))
    assert key(image=str(picture("b.png", 0))) == first
    assert key(image=str(picture("a.png", 9))) != first
    with pytest.raises(SVDQuantError, match=r"none.png: cannot be read"):
        key(image=str(tmp_path / "none.png"))
    for make in (lambda level: Image.new("L", (8, 4), level), lambda level: torch.full((2, 3), level).bfloat16()):
        assert key(extra={"pictures": [make(0)]}) == key(extra={"pictures": [make(0)]})
        assert key(extra={"pictures": [make(0)]}) != key(extra={"pictures": [make(1)]})


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


def test_overwriting_touches_nothing_else(source: Path, tmp_path: Path) -> None:
    """Not the neighbour that happens to be called `out.old`, no file, no folder without a model, not the source."""
    out, neighbour = tmp_path / "out", tmp_path / "out.old"
    neighbour.mkdir()
    (neighbour / "thesis.txt").write_text("all of it")
    for _ in range(2):
        quantize_pipeline(source, out, config(), overwrite=True)
    assert (neighbour / "thesis.txt").read_text() == "all of it"
    (tmp_path / "file").write_text("kept")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("kept")
    own = Path(shutil.copytree(source, tmp_path / "own"))
    before = sorted(tmp_path.rglob("*"))
    for path, message in (
        (tmp_path / "file", "is a file"),
        (tmp_path / "notes", "without a model"),
        (own, "holds the"),
    ):
        with pytest.raises(SVDQuantError, match=message):
            quantize_pipeline(own, path, config(), overwrite=True)
    with pytest.raises(SVDQuantError, match="holds the model"):
        quantize_pipeline(own / "transformer", own, config(), overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_partial_folder_of_someone_else_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine.txt").write_text("")
    for restart in (False, True):
        with pytest.raises(SVDQuantError, match=r"out\.partial: is not svdquant's"):
            quantize_pipeline(source, tmp_path / "out", config(), restart=restart)
    assert (tmp_path / "out.partial" / "mine.txt").is_file()


@pytest.mark.parametrize("name", [".", "../here/"])
def test_relative_output(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    quantize_pipeline(source, name, config())
    assert {f.name for f in tmp_path.iterdir()} == {"here"} and (here / "model_index.json").is_file()
    with pytest.raises(SVDQuantError, match=f"{tmp_path}: exists already"):
        quantize_pipeline(source, here / "..", config())


def test_a_refused_run_leaves_no_folder(source: Path, tmp_path: Path) -> None:
    with pytest.raises(SVDQuantError, match="rank"):
        quantize_pipeline(source, tmp_path / "a" / "b" / "out", config(rank=200))
    assert list(tmp_path.iterdir()) == []


def test_two_runs_do_not_share_an_output(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    out = tmp_path / "out"
    refused = []

    def second(stage: str, *_: Any) -> None:
        if stage == "solve" and not refused:
            for restart in (False, True):
                with pytest.raises(SVDQuantError, match=f"another svdquant is working on {out}; wait"):
                    quantize_pipeline(source, out, config(), restart=restart)
                refused.append(restart)

    quantize_pipeline(source, out, config(), progress=second)
    assert refused == [False, True] and weights_of(out)
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


def test_disk_estimate_counts_everything(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies there at the end, before anything is removed, fits into the estimate."""
    wanted, found, publish = [], [], on_disk.publish

    def measured(*folders: Path) -> None:
        found.append(sum(f.stat().st_size for f in tmp_path.rglob("*") if f.is_file()))
        publish(*folders)

    monkeypatch.setattr(on_disk, "check_disk", lambda _folder, needed: wanted.append(needed))
    monkeypatch.setattr(on_disk, "publish", measured)
    options = replace(OPTIONS, height=64, width=64)
    quantize_pipeline(source, tmp_path / "out", config(calibration_rows=64), prompts=PROMPTS, options=options)
    assert len(wanted) == 1 and found[0] <= wanted[0] < 1.25 * found[0], (wanted, found)
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: shutil._ntuple_diskusage(1, 1, wanted[0] - 1))
    with pytest.raises(SVDQuantError, match="GiB of disk"):
        quantize_pipeline(source, tmp_path / "two", config(), prompts=PROMPTS, options=OPTIONS)
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


def test_data_free_cannot_compare_output_errors(source: Path, tmp_path: Path) -> None:
    with pytest.raises(SVDQuantError, match="int8_activations_above needs"):
        quantize_pipeline(source, tmp_path / "out", config(int8_activations_above=0.1))


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


def test_too_little_host_memory_is_noticed(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert host_memory_for(80, 100) is None
    assert host_memory_for(90 << 20, 100 << 20) == "50MiB"
    models = [c for c in load_pipeline(source).components.values() if isinstance(c, torch.nn.Module)]
    loaded = sum(p.nbytes for model in models for p in model.parameters())
    assert pipeline_bytes(source) == pytest.approx(loaded, rel=0.01)
    quantize_pipeline(source, tmp_path / "plain", config(), prompts=PROMPTS, options=OPTIONS)
    notes = []
    monkeypatch.setattr(calibration.psutil, "virtual_memory", lambda: SimpleNamespace(available=2 << 20))
    arguments = {"prompts": PROMPTS, "options": OPTIONS, "device": "cpu"}
    quantize_pipeline(
        source, tmp_path / "small", config(), **arguments,
        progress=lambda stage, _done, _total, text: notes.append(text) if stage == "note" else None,
    )  # fmt: skip
    assert len(notes) == 1 and "1MiB of its denoiser" in notes[0]
    assert weights_of(tmp_path / "plain") == weights_of(tmp_path / "small")


def test_models_without_example_inputs_are_traced_once(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names alone do not show what follows a GELU; the pipeline does, once, also of a run that is continued.

    Nor do they for some layers of a model of which example inputs reach the others.
    """
    quantize_pipeline(source, tmp_path / "known", config(), prompts=PROMPTS, options=OPTIONS)
    example_traces = plan.example_traces
    monkeypatch.setattr(
        plan,
        "example_traces",
        lambda *a: {n: t for n, t in example_traces(*a).items() if "ff" not in n and "mlp" not in n},
    )
    traced = []
    trace = job.trace_model
    monkeypatch.setattr(job, "trace_model", lambda *a: traced.append(1) or trace(*a))

    def stop(stage: str, *_: Any) -> None:
        if stage == "solve":
            raise KeyboardInterrupt

    out = tmp_path / "unknown"
    arguments = {"prompts": PROMPTS, "options": OPTIONS}
    with pytest.raises(KeyboardInterrupt):
        quantize_pipeline(source, out, config(), **arguments, progress=stop)
    assert (out.with_name("unknown.partial") / "traces" / "transformer.json").is_file()
    quantize_pipeline(source, out, config(), **arguments)
    assert traced == [1]
    assert weights_of(out) == weights_of(tmp_path / "known")


def test_unet_without_example_inputs(tmp_path: Path) -> None:
    """Planned by what its pipeline shows, as `svdquant.quantize` plans it by what calibration shows."""
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        norm_num_groups=8,
    )
    models = {"vae": tiny.vae(), "text_encoder": tiny.clip(), "tokenizer": tiny.clip_tokenizer(), "unet": unet}
    pipe = StableDiffusionPipeline(
        **models, scheduler=DDIMScheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipe.to(torch.bfloat16).save_pretrained(tmp_path / "sd")
    options, settings = PipelineOptions(num_inference_steps=1, height=16, width=16), config(rank=8, calibration_rows=64)
    quantize_pipeline(tmp_path / "sd", tmp_path / "out", settings, prompts=["a cat"], options=options)
    pipe = load_pipeline(tmp_path / "sd")
    svdquant.quantize(pipe.unet, settings, lambda _: draw(pipe, ["a cat"], [0], options))
    in_memory, streamed = pipe.unet.state_dict(), load_pipeline(tmp_path / "out").unet.state_dict()
    assert in_memory.keys() == streamed.keys()
    assert all(torch.equal(streamed[name], value) for name, value in in_memory.items() if value.dtype.itemsize > 1)


def test_single_file_of_a_fine_tune(source: Path, tmp_path: Path) -> None:
    state = load_file(source / "transformer" / "diffusion_pytorch_model.safetensors")
    file = tmp_path / "fine_tune.safetensors"
    save_file(state, file)
    quantize_pipeline(file, tmp_path / "out", config(), base=str(source))
    quantize_pipeline(source, tmp_path / "same", config())
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "same")
    with pytest.raises(SVDQuantError, match="--base"):
        quantize_pipeline(file, tmp_path / "other", config())


def test_single_file_resumes_only_with_the_same_file_and_options(source: Path, tmp_path: Path) -> None:
    state = load_file(source / "transformer" / "diffusion_pytorch_model.safetensors")
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    save_file(state, files[0])
    save_file(
        {name: value * 2 if name.endswith("to_out.0.weight") else value for name, value in state.items()}, files[1]
    )
    for number, file in enumerate(files):
        quantize_pipeline(file, tmp_path / f"whole{number}", config(), base=str(source))
    assert weights_of(tmp_path / "whole0") != weights_of(tmp_path / "whole1")
    out, base = tmp_path / "out", str(source)

    def stopped(file: Path, solved: int, **fields: Any) -> None:
        def progress(stage: str, done: int, *_: Any) -> None:
            if stage == "solve" and done == solved:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            quantize_pipeline(file, out, config(**fields), base=base, progress=progress)

    stopped(files[0], 2)
    with pytest.raises(SVDQuantError, match="begun with other weights"):
        quantize_pipeline(files[1], out, config(), base=base)
    quantize_pipeline(files[0], out, config(), base=base)
    assert weights_of(out) == weights_of(tmp_path / "whole0")
    shutil.rmtree(out)
    # Before a group is solved, the file and the options may change.
    stopped(files[0], 1, gptq=False)
    shutil.rmtree(tmp_path / "out.partial" / "solved")
    quantize_pipeline(files[1], out, config(), base=base)
    assert weights_of(out) == weights_of(tmp_path / "whole1")


def test_single_file_around_its_pipeline(source: Path, tmp_path: Path) -> None:
    """Drawing with a 16-bit file, or the folder of a 16-bit model, and `base`."""
    file = tmp_path / "model.safetensors"
    save_file(load_file(source / "transformer" / "diffusion_pytorch_model.safetensors"), file)
    pictures = [
        np.asarray(draw(pipe, ["a cat"], [0], OPTIONS)[0])
        for pipe in (
            load_pipeline(source),
            *(load_pipeline(m, base=str(source)) for m in (file, source / "transformer")),
        )
    ]
    assert (pictures[0] == pictures[1]).all() and (pictures[0] == pictures[2]).all()
    assert skeleton(file).state_dict().keys() == skeleton(source).state_dict().keys()


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


def test_weights_read_are_not_mapped(source: Path) -> None:
    """A mapped tensor keeps the file open and changes with it, also where it has the wanted type already."""
    checkpoint = open_checkpoint(source)
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        pytest.skip("no /proc/self/maps")
    for dtype in (None, torch.bfloat16, torch.float32):
        value = WeightReader(checkpoint, dtype).get("proj_out.weight")
        spans = [
            line.split()[0].split("-") for line in maps.read_text().splitlines() if str(checkpoint.files[0]) in line
        ]
        assert not any(int(start, 16) <= value.data_ptr() < int(stop, 16) for start, stop in spans)


@pytest.mark.parametrize("pipeline", [True, False])
def test_of_a_hub_pipeline_only_what_diffusers_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pipeline: bool
) -> None:
    import diffusers
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    def index(repo: str, name: str) -> str:
        if not pipeline:
            raise EntryNotFoundError.__new__(EntryNotFoundError)
        return name

    calls: list[Any] = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", index)
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda repo, allow_patterns: calls.append(allow_patterns) or str(tmp_path)
    )
    monkeypatch.setattr(
        diffusers.DiffusionPipeline, "download", lambda repo, **options: calls.append(options) or str(tmp_path)
    )
    assert resolve_model("someone/something") == tmp_path
    if pipeline:
        assert calls == [{"use_safetensors": True}, ["prompts.json", "LICENSE*"]]
    else:
        assert len(calls) == 1 and "*.safetensors" in calls[0]


def test_an_accelerator_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    assert pick_device().type == "xpu"
