"""`svdquant quantize`: a pipeline on disk to a quantized pipeline on disk, in bounded memory, resumable."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.layout import Checkpoint
from ..checkpoint.streaming import SHARD_BYTES, ShardWriter, WeightReader
from ..config import SVDQuantConfig
from ..errors import SVDQuantError
from ..ptq.capture import CalibrationStore, capture
from ..ptq.plan import Plan, make_plan, trace_model
from ..ptq.quantize import make_report
from ..ptq.report import LayerReport, Report
from ..ptq.stream import SolvedGroups, solve_to_files, write_atomically
from ..ptq.trace import LayerTrace
from .calibration import CalibrationDrawing, StageProgress, checkpoints_of, working_dtype
from .pipeline import (
    PipelineOptions,
    build_skeleton,
    check_files,
    model_class,
    parse_dtype,
    pick_device,
    resolve_model,
)
from .single_file import check_single_file, origin_of, unpack
from .work_folder import (
    check_disk,
    check_output,
    clear_folder,
    copy_entries,
    digest,
    locked,
    other_components,
    publish,
    size_of,
    storing,
    write_text,
)

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
    config, out = config or SVDQuantConfig(), Path(os.path.abspath(out))
    source = resolve_model(model)
    check_output(out, source, overwrite)
    where, wanted = pick_device(device), parse_dtype(dtype)
    if prompts is None and config.int8_activations_above is not None:
        raise SVDQuantError(
            "int8_activations_above needs the output errors that calibration measures; give prompts (no --data-free)"
            " or leave it out"
        )
    if source.is_file():
        check_single_file(source, base)
    elif prompts is not None and not (source / "model_index.json").is_file():
        raise SVDQuantError(f"{source}: is a model without its pipeline; name the pipeline folder, or pass --data-free")
    else:
        check_files(source)
        checkpoints_of(source)
    say = progress or (lambda *_: None)
    work = out.with_name(out.name + ".partial")
    with locked(work, out):
        # Another process may have finished since.
        check_output(out, source, overwrite)
        if restart:
            clear_folder(work)
        origin = None
        if source.is_file():
            assert base is not None
            origin = origin_of(source, base, wanted)
            source = unpack(source, base, work, wanted, origin)
        drawing = None
        if prompts is not None:
            drawing = CalibrationDrawing(
                source, prompts, options or PipelineOptions(), seed, wanted, where, max_memory, work, say
            )
        try:
            report = _quantize(source, out, work, config, drawing, origin, wanted, str(where), shard_bytes, say)
        finally:
            if drawing is not None:
                drawing.close()
    return report


def _quantize(
    source: Path,
    out: Path,
    work: Path,
    config: SVDQuantConfig,
    drawing: CalibrationDrawing | None,
    origin: dict[str, Any] | None,
    dtype: torch.dtype | None,
    device: str,
    shard_bytes: int,
    say: StageProgress,
) -> Report:
    """From a pipeline or model folder to `out`, by way of `work`."""
    is_pipeline = (source / "model_index.json").is_file()
    jobs = {
        part: _Job(part, checkpoint, config, work, dtype, drawing)
        for part, checkpoint in checkpoints_of(source).items()
    }
    copied = other_components(source, set(jobs)) if is_pipeline else []
    _claim(work, jobs, config, drawing, origin, copied)
    if drawing is not None:
        for job in jobs.values():
            job.calibrate(drawing)
        drawing.close()
    report = Report("+".join(job.checkpoint.model_class for job in jobs.values()))
    for job in jobs.values():
        job.solve(device, say)
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
    copy_entries(copied, result)
    report.save(result)
    publish(result, out, work)
    say("write", len(jobs), len(jobs), str(out))
    return report


class _Job:
    """One denoiser on its way: plan, inputs and solved groups under `work`."""

    def __init__(
        self,
        part: str,
        checkpoint: Checkpoint,
        config: SVDQuantConfig,
        work: Path,
        dtype: torch.dtype | None,
        drawing: CalibrationDrawing | None,
    ) -> None:
        self.part, self.checkpoint, self.config = part, checkpoint, config
        self.inputs, self.solved = work / "inputs" / part, work / "solved" / part
        self.dtype = dtype or working_dtype(checkpoint)
        cls = model_class(checkpoint.model_class)
        self.fp32 = tuple(getattr(cls, "_keep_in_fp32_modules", None) or ())
        self.reader = WeightReader(checkpoint, self.dtype, self.fp32)
        skeleton = build_skeleton(cls, checkpoint.config, self.dtype)
        self.plan: Plan = make_plan(skeleton, config)
        if not self.plan.traced and drawing is not None:
            # Names alone say little of a model without example inputs; its pipeline shows what reads what.
            self.plan = make_plan(skeleton, config, traces=self._traces(work / "traces" / f"{part}.json", drawing))
        self.store: CalibrationStore | None = None
        self.groups: SolvedGroups | None = None

    def _traces(self, file: Path, drawing: CalibrationDrawing) -> dict[str, LayerTrace]:
        """Of the first prompt's first step; kept for the run that continues this one."""
        key = digest([self.reader.fingerprint(), str(self.dtype), drawing.key()])
        if file.is_file():
            saved = json.loads(file.read_text(encoding="utf-8"))
            if saved["key"] == key:
                return {name: _trace_from(fields) for name, fields in saved["layers"].items()}
        drawing.say("calibrate", 0, len(drawing.prompts), f"tracing the {self.part}")
        traces = trace_model(getattr(drawing.pipe, self.part), lambda _model: drawing.picture(0))
        text = json.dumps({"key": key, "layers": {name: asdict(trace) for name, trace in traces.items()}})
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, lambda path: write_text(path, text))
        return traces

    def calibrate(self, drawing: CalibrationDrawing) -> None:
        """Runs the 16-bit pipeline over the prompts, unless that has been done."""
        count = len(drawing.prompts)
        if not CalibrationStore.complete(self.inputs):
            shutil.rmtree(self.inputs, ignore_errors=True)
            model = getattr(drawing.pipe, self.part)

            def run(_model: Any) -> None:
                for number, prompt in enumerate(drawing.prompts):
                    drawing.say("calibrate", number, count, prompt)
                    drawing.picture(number)

            with storing(self.inputs):
                capture(model, self.plan.groups, run, self.inputs, self.config.calibration_rows, self.config.seed)
        drawing.say("calibrate", count, count, "")
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
        write_atomically(folder / "config.json", lambda path: write_text(path, text))


def _trace_from(fields: dict[str, Any]) -> LayerTrace:
    """From JSON, which knows no tuples."""
    ranges = {key: tuple((a, b) for a, b in value) for key, value in fields.items() if isinstance(value, list)}
    return LayerTrace(**(fields | ranges))


def _claim(
    work: Path,
    jobs: dict[str, _Job],
    config: SVDQuantConfig,
    drawing: CalibrationDrawing | None,
    origin: dict[str, Any] | None,
    copied: list[Path],
) -> None:
    """Records what this work folder is for; raises `SVDQuantError` where it was begun for something else."""
    solving = {k: v for k, v in config.to_dict().items() if k not in _JUDGING}
    job = {
        "config": solving,
        "calibration": None if drawing is None else digest(drawing.key()),
        # What a single file was unpacked to is made anew with other times.
        "weights": origin or {part: entry.reader.fingerprint() for part, entry in jobs.items()},
        "dtype": {part: str(entry.dtype) for part, entry in jobs.items()},
        "format": 1,
    }
    file = work / "job.json"
    before = json.loads(file.read_text()) if file.is_file() else {}
    if before == job:
        return
    if any((work / "solved").rglob("*.safetensors")):
        changed = [key for key in job if before.get(key) != job[key]]
        if "config" in changed and isinstance(before.get("config"), dict):
            changed += [key for key, value in solving.items() if before["config"].get(key) != value]
            changed.remove("config")
        raise SVDQuantError(
            f"{work}: was begun with other {', '.join(changed)}; repeat that command to finish it, or pass --restart "
            "to begin anew"
        )
    # Nothing is lost by beginning anew, e.g. after broken weights were replaced. What is kept says what it is of.
    clear_folder(work, keep=("source", "traces", "offload"))
    check_disk(work, _disk_needed(jobs, config, drawing, copied))
    write_atomically(file, lambda path: write_text(path, json.dumps(job, indent=1)))


def _disk_needed(
    jobs: dict[str, _Job], config: SVDQuantConfig, drawing: CalibrationDrawing | None, copied: list[Path]
) -> int:
    """Bytes: solved groups and the result made of them, copied models, calibration inputs, offloaded weights."""
    needed = 2 * sum(job.plan.bytes_after for job in jobs.values()) + sum(size_of(path) for path in copied)
    if drawing is not None:
        for job in jobs.values():
            columns = [group.in_features for group in job.plan.groups]
            # The largest is there twice while it is finished.
            needed += config.calibration_rows * (sum(columns) + max(columns)) * job.dtype.itemsize
            if drawing.max_memory is not None:
                needed += job.plan.bytes_before
    return needed
