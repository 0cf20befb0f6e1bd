"""`svdquant quantize`: a pipeline on disk to a quantized pipeline on disk, in bounded memory, resumable."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.layout import DENOISERS
from ..checkpoint.streaming import SHARD_BYTES
from ..config import SVDQuantConfig
from ..errors import SVDQuantError
from ..ptq.damage import UnusableModelError
from ..ptq.report import LayerReport, Report
from ..ptq.stream import write_atomically
from .calibration import CalibrationDrawing, StageProgress
from .components import checkpoints_of, component_config, model_config, with_text_encoders
from .fine_tune import weights_alone
from .job import Job, calibrate
from .pipeline import PipelineOptions, check_files, parse_dtype, pick_device, resolve_model
from .single_file import check_single_file, origin_of, unpack
from .skeletons import component_class
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
    text_encoders: str = "none",
    max_memory: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    restart: bool = False,
    overwrite: bool = False,
    progress: StageProgress | None = None,
) -> Report:
    """Quantizes the denoisers of a pipeline (or a model folder) and writes the whole pipeline to `out`.

    config.components: other models of the pipeline that are quantized too, and options of a denoiser of its own.
    text_encoders: "int4" or "int8" adds the text encoders, weights only, of more than 2 % of the pipeline's bytes.
    prompts: drawn by the 16-bit model for calibration; None = data-free.
    base: the pipeline of what comes without one, a .safetensors file or a model folder; None takes for a file the one
    that its names and shapes point to.
    max_memory: host memory for the 16-bit denoiser during calibration. Everything is built in `out`.partial; an
    interrupted run is continued by the same call and ends with the same bits. Raises `SVDQuantError`; `out` exists
    only when everything succeeded.
    """
    config, out = config or SVDQuantConfig(), Path(os.path.abspath(out))
    source = resolve_model(model)
    check_output(out, source, overwrite)
    where, wanted = pick_device(device), parse_dtype(dtype)
    given = [config.int8_activations_above, *(c.get("int8_activations_above") for c in config.components.values())]
    if prompts is None and any(limit is not None for limit in given):
        raise SVDQuantError(
            "int8_activations_above needs the output errors that calibration measures; give prompts (no --data-free)"
            " or leave it out"
        )
    say = progress or (lambda *_: None)
    weights = weights_alone(source, base)
    if weights is not None:
        base = check_single_file(weights, base, say)
        check_output(out, Path(base), overwrite)
        for name in config.components:
            component_class(base, name)
    elif prompts is not None and not (source / "model_index.json").is_file():
        raise SVDQuantError(f"{source}: is a model without its pipeline; name the pipeline folder, or pass --data-free")
    else:
        check_files(source)
        config = _with_components(config, source, text_encoders)
        checkpoints_of(source, config)
    work = out.with_name(out.name + ".partial")
    with locked(work, out):
        # Another process may have finished since.
        check_output(out, source, overwrite)
        if restart:
            clear_folder(work)
        origin = None
        if weights is not None:
            assert base is not None
            origin = origin_of(weights, base, wanted)
            # Before a copy is made, and that of the other run is lost.
            if _is_solved(work) and _begun(work).get("weights") != origin:
                raise _other_job(work, ["weights"])
            source = unpack(weights, base, work, wanted, origin)
            config = _with_components(config, source, text_encoders)
        drawing = None
        if prompts is not None:
            drawing = CalibrationDrawing(
                source, prompts, options or PipelineOptions(), seed, wanted, where, max_memory, work, say
            )
        try:
            report = _quantize(source, out, work, config, drawing, origin, wanted, str(where), shard_bytes, say)
        except UnusableModelError:
            # Whatever the user does about it, it is another job.
            clear_folder(work)
            raise
        finally:
            if drawing is not None:
                drawing.close()
    return report


def _with_components(config: SVDQuantConfig, source: Path, text_encoders: str) -> SVDQuantConfig:
    if (source / "model_index.json").is_file():
        return with_text_encoders(config, source, text_encoders)
    if text_encoders != "none":
        raise SVDQuantError(f"{source}: is a model without its pipeline, so it has no text encoders; leave that out")
    return config


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
    jobs = {}
    for part, checkpoint in checkpoints_of(source, config).items():
        own = component_config if is_pipeline else model_config
        mine = own(config, checkpoint.library, part)
        jobs[part] = Job(part, checkpoint, mine, work, dtype, drawing)
    copied = other_components(source, set(jobs)) if is_pipeline else []
    _claim(work, jobs, config, drawing, origin, copied)
    if drawing is not None:
        calibrate(jobs.values(), drawing)
        drawing.close()
    report = Report("+".join(job.checkpoint.model_class for job in jobs.values()))
    for job in jobs.values():
        job.solve(device, say)
        part_report = job.report()
        if len(jobs) > 1:
            part_report.layers = [_within(job.part, layer) for layer in part_report.layers]
        part_report.check(job.config.max_error)
        report.add(part_report, job.part if len(jobs) > 1 else "")
    report.seconds = sum(layer.seconds for layer in report.layers)
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


def _solving(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if key not in _JUDGING}


def _agree(before: Any, now: Any) -> bool:
    """Whether two entries of job.json say the same, of the models that both are about."""
    if not isinstance(before, dict) or not isinstance(now, dict):
        return bool(before == now)
    shared = before.keys() & now.keys()
    return bool(shared) and all(before[key] == now[key] for key in shared)


def _within(part: str, layer: LayerReport) -> LayerReport:
    """Named after its component too: two of them may have layers of one name."""
    return replace(layer, name=f"{part}.{layer.name}", group=f"{part}.{layer.group}")


def _claim(
    work: Path,
    jobs: dict[str, Job],
    config: SVDQuantConfig,
    drawing: CalibrationDrawing | None,
    origin: dict[str, Any] | None,
    copied: list[Path],
) -> None:
    """Records what this work folder is for; raises `SVDQuantError` where it was begun for something else."""
    solving = _solving(config.to_dict())
    solving["components"] = {name: _solving(fields) for name, fields in config.components.items()}
    job = {
        "config": solving,
        "calibration": None if drawing is None else digest(drawing.key()),
        # What a single file was unpacked to is made anew with other times.
        "weights": origin or {part: entry.reader.fingerprint() for part, entry in jobs.items()},
        "dtype": {part: str(entry.dtype) for part, entry in jobs.items()},
        "format": 1,
    }
    file, before = work / "job.json", _begun(work)
    if before == job:
        return
    if _is_solved(work):
        changed = [key for key in job if not _agree(before.get(key), job[key])]
        if "config" in changed and isinstance(before.get("config"), dict):
            changed += [key for key, value in solving.items() if before["config"].get(key) != value]
            changed.remove("config")
        raise _other_job(work, changed)
    # Nothing is lost by beginning anew, e.g. after broken weights were replaced. What is kept says what it is of.
    clear_folder(work, keep=("source", "traces", "offload"))
    check_disk(work, _disk_needed(jobs, drawing, copied))
    write_atomically(file, lambda path: write_text(path, json.dumps(job, indent=1)))


def _begun(work: Path) -> dict[str, Any]:
    """What the work folder is for, {} where that is not settled."""
    file = work / "job.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return found


def _is_solved(work: Path) -> bool:
    return any((work / "solved").rglob("*.safetensors"))


def _other_job(work: Path, changed: list[str]) -> SVDQuantError:
    return SVDQuantError(
        f"{work}: was begun with other {', '.join(changed) or 'versions'}; repeat that command to finish it, or pass "
        "--restart to begin anew"
    )


def _disk_needed(jobs: dict[str, Job], drawing: CalibrationDrawing | None, copied: list[Path]) -> int:
    """Bytes: solved groups and the result made of them, copied models, calibration inputs, offloaded weights."""
    needed = 2 * sum(job.plan.bytes_after for job in jobs.values()) + sum(size_of(path) for path in copied)
    if drawing is not None:
        for job in jobs.values():
            columns = [group.in_features for group in job.plan.groups]
            # The largest is there twice while it is finished.
            needed += job.config.calibration_rows * (sum(columns) + max(columns)) * job.dtype.itemsize
            if drawing.max_memory is not None and job.part in DENOISERS:
                needed += job.plan.bytes_before
    return needed
