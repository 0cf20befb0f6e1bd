"""`svdquant quantize`: a pipeline on disk to a quantized pipeline on disk, in bounded memory, resumable."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.layout import Checkpoint, open_checkpoint
from ..checkpoint.skeleton import stored_dtype
from ..checkpoint.streaming import SHARD_BYTES, ShardWriter, WeightReader
from ..config import SVDQuantConfig
from ..errors import SVDQuantError
from ..ptq.capture import CalibrationStore, capture
from ..ptq.plan import Plan, make_plan
from ..ptq.quantize import make_report
from ..ptq.report import LayerReport, Report
from ..ptq.stream import SolvedGroups, solve_to_files, write_atomically
from .pipeline import (
    PipelineOptions,
    build_skeleton,
    check_files,
    denoisers,
    draw,
    load_pipeline,
    model_class,
    parse_dtype,
    pick_device,
    resolve_model,
)

# (stage, done, total, what is being worked on); stages: "calibrate", "solve", "write".
StageProgress = Callable[[str, int, int, str], None]
# These only judge the finished layers, so changing them does not invalidate what is solved.
_JUDGING = ("max_error", "keep_16bit_above")


def quantize_pipeline(
    model: str | Path,
    out: str | Path,
    config: SVDQuantConfig | None = None,
    *,
    prompts: list[str] | None = None,
    options: PipelineOptions | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str | torch.dtype | None = None,
    base: str | None = None,
    max_memory: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    restart: bool = False,
    overwrite: bool = False,
    progress: StageProgress | None = None,
) -> Report:
    """Quantizes the denoiser of a pipeline (or a model folder) and writes the whole pipeline to `out`.

    prompts: drawn by the 16-bit model for calibration; None = data-free. base: the pipeline that a single
    .safetensors file belongs to. max_memory: host memory for the 16-bit denoiser during calibration. Everything is
    built in `out`.partial; an interrupted run is continued by the same call and ends with the same bits. Raises
    `SVDQuantError`; `out` exists only when everything succeeded.
    """
    config, out = config or SVDQuantConfig(), Path(out)
    work = out.with_name(out.name + ".partial")
    if out.exists() and not overwrite and (not out.is_dir() or any(out.iterdir())):
        raise SVDQuantError(f"{out}: exists already; choose another folder or pass --overwrite")
    source = resolve_model(model)
    where = pick_device(device)
    wanted = parse_dtype(dtype)
    if restart:
        shutil.rmtree(work, ignore_errors=True)
    if source.is_file():
        source = _unpack_single_file(source, base, work, wanted)
    is_pipeline = (source / "model_index.json").is_file()
    if prompts is not None and not is_pipeline:
        raise SVDQuantError(f"{source}: is a model without its pipeline; name the pipeline folder, or pass --data-free")
    check_files(source)
    parts = denoisers(source) if is_pipeline else [""]
    checkpoints = {part: open_checkpoint(source, part or None) for part in parts}
    for checkpoint in checkpoints.values():
        if checkpoint.quantization is not None:
            raise SVDQuantError(f"{checkpoint.path}: is quantized already; start from the 16-bit model")
    say = progress or (lambda *_: None)
    jobs = {part: _Job(part, checkpoint, config, work, wanted) for part, checkpoint in checkpoints.items()}
    _claim(work, jobs, config, prompts, options, seed)
    report = Report("+".join(job.checkpoint.model_class for job in jobs.values()))
    for job in jobs.values():
        if prompts is not None:
            job.calibrate(source, prompts, options or PipelineOptions(), seed, device, max_memory, say)
        job.solve(str(where), say)
        part_report = job.report()
        report.layers += part_report.layers
        report.bytes_before += part_report.bytes_before
        report.bytes_after += part_report.bytes_after
    report.seconds = sum(layer.seconds for layer in report.layers)
    report.check(config.max_error)
    result = work / "result"
    shutil.rmtree(result, ignore_errors=True)
    for number, job in enumerate(jobs.values()):
        say("write", number, len(jobs), job.part or "model")
        job.write(result / job.part if job.part else result, shard_bytes)
    if is_pipeline:
        _copy_rest(source, result, set(parts))
    report.save(result)
    _publish(result, out, work)
    say("write", len(jobs), len(jobs), str(out))
    return report


class _Job:
    """One denoiser on its way: plan, inputs and solved groups under `work`."""

    def __init__(
        self, part: str, checkpoint: Checkpoint, config: SVDQuantConfig, work: Path, dtype: torch.dtype | None
    ) -> None:
        self.part, self.checkpoint, self.config = part, checkpoint, config
        self.inputs, self.solved = work / "inputs" / part, work / "solved" / part
        stored = stored_dtype(checkpoint.tensors)
        self.dtype = dtype or (stored if stored != torch.float32 else torch.bfloat16)
        cls = model_class(checkpoint.model_class)
        self.fp32 = tuple(getattr(cls, "_keep_in_fp32_modules", None) or ())
        self.reader = WeightReader(checkpoint, self.dtype, self.fp32)
        skeleton = build_skeleton(cls, checkpoint.config, self.dtype)
        self.plan: Plan = make_plan(skeleton, config)
        self.store: CalibrationStore | None = None
        self.groups: SolvedGroups | None = None

    def calibrate(
        self,
        source: Path,
        prompts: list[str],
        options: PipelineOptions,
        seed: int,
        device: str,
        max_memory: str | None,
        say: StageProgress,
    ) -> None:
        """Runs the 16-bit pipeline over the prompts, unless that has been done."""
        if not CalibrationStore.complete(self.inputs):
            shutil.rmtree(self.inputs, ignore_errors=True)
            offload = self.inputs.parent / "offload"
            offload.mkdir(parents=True, exist_ok=True)
            pipe = load_pipeline(source, dtype=self.dtype, device=device, max_memory=max_memory, offload_folder=offload)

            def run(_model: Any) -> None:
                for number, prompt in enumerate(prompts):
                    say("calibrate", number, len(prompts), prompt)
                    draw(pipe, [prompt], [seed + number], options)

            try:
                capture(
                    getattr(pipe, self.part),
                    self.plan.groups,
                    run,
                    self.inputs,
                    self.config.calibration_rows,
                    self.config.seed,
                )
            except OSError as error:
                raise SVDQuantError(
                    f"{self.inputs}: calibration inputs could not be stored ({error.strerror}); free disk space and "
                    "run the same command again"
                ) from error
            finally:
                del pipe
                gc.collect()
                shutil.rmtree(offload, ignore_errors=True)
        say("calibrate", len(prompts), len(prompts), "")
        self.store = CalibrationStore(self.inputs)

    def solve(self, device: str, say: StageProgress) -> None:
        self.groups = solve_to_files(
            self.plan,
            self.reader.get,
            self.store,
            self.config,
            self.solved,
            lambda done, total, name: say("solve", done, total, name),
            device,
        )

    def report(self) -> Report:
        assert self.groups is not None
        layers: dict[str, LayerReport] = {}
        for number in range(len(self.plan.groups)):
            layers |= {name: entry[1] for name, entry in self.groups.layers(number).items()}
        return make_report(self.plan, layers, self.config)

    def write(self, folder: Path, shard_bytes: int) -> None:
        """The quantized model folder: shards and config.json, in the order of the 16-bit checkpoint."""
        assert self.groups is not None
        folder.mkdir(parents=True)
        kept = {layer.name for layer in self.report().layers if layer.kind == "keep"}
        number_of = {m.name: i for i, group in enumerate(self.plan.groups) for m in group.members}
        specs = {}
        writer = ShardWriter(folder, shard_bytes=shard_bytes)
        written: set[str] = set()
        for name in self.reader.names:
            layer = name.rpartition(".")[0]
            if layer not in number_of or layer in kept:
                writer.add(name, self.reader.get(name))
            elif layer not in written:
                written.add(layer)
                specs[layer] = self.groups.layers(number_of[layer])[layer][0]
                for key, value in self.groups.tensors(number_of[layer], layer):
                    writer.add(key, value)
        writer.finish()
        ordered = {name: specs[name] for name in self.plan.layers if name in specs}
        config = self.checkpoint.config | {"quantization_config": self.config.with_layers(ordered).to_dict()}
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        write_atomically(folder / "config.json", lambda path: _write(path, text))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _claim(
    work: Path,
    jobs: dict[str, _Job],
    config: SVDQuantConfig,
    prompts: list[str] | None,
    options: PipelineOptions | None,
    seed: int,
) -> None:
    """Records what this work folder is for; raises `SVDQuantError` where it was begun for something else."""
    solving = {k: v for k, v in config.to_dict().items() if k not in _JUDGING}
    calibration = None
    if prompts is not None:
        text = json.dumps([prompts, vars(options or PipelineOptions()), seed], sort_keys=True)
        calibration = hashlib.sha256(text.encode()).hexdigest()[:16]
    job = {
        "config": solving,
        "calibration": calibration,
        "weights": {part: entry.reader.fingerprint() for part, entry in jobs.items()},
        "dtype": {part: str(entry.dtype) for part, entry in jobs.items()},
        "format": 1,
    }
    file = work / "job.json"
    solved = any((work / "solved").rglob("*.safetensors"))
    if file.is_file() and not solved:
        # Nothing is lost by beginning anew, e.g. after broken weights were replaced.
        before = json.loads(file.read_text())
        if before != job:
            shutil.rmtree(work, ignore_errors=True)
    if file.is_file():
        before = json.loads(file.read_text())
        changed = [key for key in job if before.get(key) != job[key]]
        if "config" in changed and isinstance(before.get("config"), dict):
            changed += [f"{key}" for key, value in solving.items() if before["config"].get(key) != value]
            changed.remove("config")
        if changed:
            raise SVDQuantError(
                f"{work}: was begun with other {', '.join(changed)}; repeat that command to finish it, or pass "
                "--restart to begin anew"
            )
        return
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SVDQuantError(f"{work}: cannot be made ({error.strerror}); choose another output folder") from error
    needed = sum(entry.plan.bytes_after for entry in jobs.values()) * 2
    free = shutil.disk_usage(work).free
    if free < needed:
        shutil.rmtree(work, ignore_errors=True)
        raise SVDQuantError(
            f"{work}: needs about {needed / 2**30:.1f} GiB of disk, {free / 2**30:.1f} GiB are free; free some or "
            "choose another output folder"
        )
    write_atomically(file, lambda path: _write(path, json.dumps(job, indent=1)))


def _copy_rest(source: Path, result: Path, skip: set[str]) -> None:
    """Everything of the pipeline but the denoisers: other models, tokenizers, scheduler, licence."""
    for entry in sorted(source.iterdir()):
        if entry.name in skip or entry.name.startswith(".") or entry.name == "README.md":
            continue
        target = result / entry.name
        try:
            if entry.is_dir():
                shutil.copytree(entry, target, ignore=shutil.ignore_patterns(".*", "*.bin", "*.pt", "*.ckpt"))
            elif entry.suffix in (".json", ".txt", ".md") or entry.name.upper().startswith("LICENSE"):
                shutil.copy2(entry, target)
        except (OSError, shutil.Error) as error:
            reason = getattr(error, "strerror", None) or "disk full?"
            raise SVDQuantError(
                f"{target}: could not be written ({reason}); free disk space, then run the same command again to go on"
            ) from error


def _publish(result: Path, out: Path, work: Path) -> None:
    """Moves the finished folder to its place; what stood there goes only then."""
    old = out.with_name(out.name + ".old")
    if out.exists():
        os.replace(out, old)
    os.replace(result, out)
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(work, ignore_errors=True)


def _unpack_single_file(file: Path, base: str | None, work: Path, dtype: torch.dtype | None) -> Path:
    """A single 16-bit .safetensors as a pipeline folder: its denoiser converted by diffusers, the rest of `base`."""
    checkpoint = open_checkpoint(file)
    if checkpoint.quantization is not None:
        raise SVDQuantError(f"{file}: is quantized already; start from the 16-bit model")
    if base is None:
        raise SVDQuantError(f"{file}: a single file lacks its configuration; name its pipeline with --base")
    pipeline = resolve_model(base)
    part = denoisers(pipeline)[0]
    folder = work / "source"
    if not (folder / "complete").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        cls = model_class(json.loads((pipeline / part / "config.json").read_text())["_class_name"])
        try:
            model = cls.from_single_file(
                str(file),
                config=str(pipeline),
                subfolder=part,
                torch_dtype=dtype or torch.bfloat16,
                local_files_only=True,
            )
        except (OSError, ValueError, RuntimeError, KeyError, IndexError, AttributeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise SVDQuantError(f"{file}: is not a {cls.__name__} as {pipeline} has it ({reason})") from error
        model.save_pretrained(folder / part)
        _copy_rest(pipeline, folder, {part})
        (folder / "complete").touch()
    return folder
