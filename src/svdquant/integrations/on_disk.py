"""`svdquant quantize`: a pipeline on disk to a quantized pipeline on disk, in bounded memory, resumable."""

from __future__ import annotations

import errno
import gc
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, TextIO

import psutil
import torch
from safetensors import SafetensorError

from ..checkpoint.layout import Checkpoint, open_checkpoint
from ..checkpoint.skeleton import stored_dtype
from ..checkpoint.streaming import SHARD_BYTES, ShardWriter, WeightReader
from ..config import SVDQuantConfig
from ..errors import SVDQuantError
from ..ptq.capture import CalibrationStore, capture
from ..ptq.plan import Plan, make_plan, trace_model
from ..ptq.quantize import make_report
from ..ptq.report import LayerReport, Report
from ..ptq.stream import SolvedGroups, solve_to_files, write_atomically
from ..ptq.trace import LayerTrace
from .pipeline import (
    PipelineOptions,
    build_skeleton,
    check_files,
    denoisers,
    draw,
    host_memory_for,
    load_pipeline,
    load_single_file,
    model_class,
    parse_dtype,
    pick_device,
    pipeline_bytes,
    resolve_model,
)

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two processes apart
    fcntl = None  # type: ignore[assignment]

# (stage, done, total, what is being worked on); stages: "calibrate", "solve", "write", and "note" for a remark.
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
    config, out = config or SVDQuantConfig(), Path(os.path.abspath(out))
    source = resolve_model(model)
    _check_output(out, source, overwrite)
    where, wanted = pick_device(device), parse_dtype(dtype)
    if prompts is None and config.int8_activations_above is not None:
        raise SVDQuantError(
            "int8_activations_above needs the output errors that calibration measures; give prompts (no --data-free)"
            " or leave it out"
        )
    if source.is_file():
        _check_single_file(source, base)
    elif prompts is not None and not (source / "model_index.json").is_file():
        raise SVDQuantError(f"{source}: is a model without its pipeline; name the pipeline folder, or pass --data-free")
    else:
        check_files(source)
        _checkpoints(source)
    say = progress or (lambda *_: None)
    work = out.with_name(out.name + ".partial")
    with _locked(work, out):
        # Another process may have finished since.
        _check_output(out, source, overwrite)
        if restart:
            _clear(work)
        origin = None
        if source.is_file():
            assert base is not None
            origin = _origin(source, base, wanted)
            source = _unpack_single_file(source, base, work, wanted, origin)
        drawing = None
        if prompts is not None:
            drawing = _Drawing(
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
    drawing: _Drawing | None,
    origin: dict[str, Any] | None,
    dtype: torch.dtype | None,
    device: str,
    shard_bytes: int,
    say: StageProgress,
) -> Report:
    """From a pipeline or model folder to `out`, by way of `work`."""
    is_pipeline = (source / "model_index.json").is_file()
    jobs = {
        part: _Job(part, checkpoint, config, work, dtype, drawing) for part, checkpoint in _checkpoints(source).items()
    }
    copied = _rest(source, set(jobs)) if is_pipeline else []
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
    _copy(copied, result)
    report.save(result)
    _publish(result, out, work)
    say("write", len(jobs), len(jobs), str(out))
    return report


def _checkpoints(source: Path) -> dict[str, Checkpoint]:
    """The 16-bit denoisers of a pipeline folder by name; of a model folder itself, under the name ""."""
    parts = denoisers(source) if (source / "model_index.json").is_file() else [""]
    checkpoints = {part: open_checkpoint(source, part or None) for part in parts}
    for checkpoint in checkpoints.values():
        if checkpoint.quantization is not None:
            raise SVDQuantError(f"{checkpoint.path}: is quantized already; start from the 16-bit model")
    return checkpoints


class _Drawing:
    """The 16-bit pipeline and what it draws to calibrate; loaded when first needed."""

    def __init__(
        self,
        source: Path,
        prompts: list[str],
        options: PipelineOptions,
        seed: int,
        dtype: torch.dtype | None,
        device: torch.device,
        max_memory: str | None,
        work: Path,
        say: StageProgress,
    ) -> None:
        self.source, self.prompts, self.options, self.seed = source, prompts, options, seed
        self.dtype, self.device, self.given_memory, self.say = dtype, device, max_memory, say
        self.offload = work / "offload"
        self._pipe: Any = None

    def key(self) -> list[Any]:
        """What decides the pictures, but for the model."""
        return [self.prompts, vars(self.options), self.seed]

    def _load_dtype(self) -> torch.dtype:
        return self.dtype or _working_dtype(next(iter(_checkpoints(self.source).values())))

    @cached_property
    def max_memory(self) -> str | None:
        """As given, or chosen where the pipeline would not fit into the host's memory."""
        if self.given_memory is not None or self.device.type != "cpu":
            return self.given_memory
        needed, available = pipeline_bytes(self.source, self._load_dtype()), psutil.virtual_memory().available
        chosen = host_memory_for(needed, available)
        if chosen is not None:
            text = (
                f"the 16-bit pipeline takes {needed / 2**30:.1f} GiB and {available / 2**30:.1f} GiB of memory are "
                f"free: {chosen} of its denoiser stay in memory, the rest on disk; --max-memory sets how much"
            )
            self.say("note", 0, 0, text)
        return chosen

    @property
    def pipe(self) -> Any:
        if self._pipe is None:
            self.offload.mkdir(parents=True, exist_ok=True)
            self._pipe = load_pipeline(
                self.source,
                dtype=self._load_dtype(),
                device=str(self.device),
                max_memory=self.max_memory,
                offload_folder=self.offload,
            )
        return self._pipe

    def picture(self, number: int) -> None:
        draw(self.pipe, [self.prompts[number]], [self.seed + number], self.options)

    def close(self) -> None:
        self._pipe = None
        gc.collect()
        shutil.rmtree(self.offload, ignore_errors=True)


def _working_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """As stored; bfloat16 for float32."""
    stored = stored_dtype(checkpoint.tensors)
    return stored if stored != torch.float32 else torch.bfloat16


class _Job:
    """One denoiser on its way: plan, inputs and solved groups under `work`."""

    def __init__(
        self,
        part: str,
        checkpoint: Checkpoint,
        config: SVDQuantConfig,
        work: Path,
        dtype: torch.dtype | None,
        drawing: _Drawing | None,
    ) -> None:
        self.part, self.checkpoint, self.config = part, checkpoint, config
        self.inputs, self.solved = work / "inputs" / part, work / "solved" / part
        self.dtype = dtype or _working_dtype(checkpoint)
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

    def _traces(self, file: Path, drawing: _Drawing) -> dict[str, LayerTrace]:
        """Of the first prompt's first step; kept for the run that continues this one."""
        key = _digest([self.reader.fingerprint(), str(self.dtype), drawing.key()])
        if file.is_file():
            saved = json.loads(file.read_text(encoding="utf-8"))
            if saved["key"] == key:
                return {name: _trace_from(fields) for name, fields in saved["layers"].items()}
        drawing.say("calibrate", 0, len(drawing.prompts), f"tracing the {self.part}")
        traces = trace_model(getattr(drawing.pipe, self.part), lambda _model: drawing.picture(0))
        text = json.dumps({"key": key, "layers": {name: asdict(trace) for name, trace in traces.items()}})
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, lambda path: _write(path, text))
        return traces

    def calibrate(self, drawing: _Drawing) -> None:
        """Runs the 16-bit pipeline over the prompts, unless that has been done."""
        count = len(drawing.prompts)
        if not CalibrationStore.complete(self.inputs):
            shutil.rmtree(self.inputs, ignore_errors=True)
            model = getattr(drawing.pipe, self.part)

            def run(_model: Any) -> None:
                for number, prompt in enumerate(drawing.prompts):
                    drawing.say("calibrate", number, count, prompt)
                    drawing.picture(number)

            with _storing(self.inputs):
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
        write_atomically(folder / "config.json", lambda path: _write(path, text))


def _trace_from(fields: dict[str, Any]) -> LayerTrace:
    """From JSON, which knows no tuples."""
    ranges = {key: tuple((a, b) for a, b in value) for key, value in fields.items() if isinstance(value, list)}
    return LayerTrace(**(fields | ranges))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()[:16]


@contextmanager
def _storing(path: Path) -> Iterator[None]:
    """Turns errors of the disk into one sentence."""
    try:
        yield
    except (OSError, SafetensorError, shutil.Error) as error:
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or ["disk full?"])[0]
        raise SVDQuantError(
            f"{path}: could not be stored ({reason}); free disk space or fix the permissions, then run the same "
            "command again to go on"
        ) from error


def _check_output(out: Path, source: Path, overwrite: bool) -> None:
    """Refuses an output that would replace something else than a model, or the model itself."""
    if not out.name:
        raise SVDQuantError(f"{out}: cannot be replaced; choose a folder in it")
    if not out.exists():
        return
    if not out.is_dir():
        raise SVDQuantError(f"{out}: is a file; choose a folder that does not exist yet")
    if not any(out.iterdir()):
        return
    if not overwrite:
        raise SVDQuantError(f"{out}: exists already; choose another folder or pass --overwrite")
    if out.resolve() in (source.resolve(), *source.resolve().parents):
        raise SVDQuantError(f"{out}: holds the model that is to be quantized; choose another folder")
    if not any((out / name).is_file() for name in ("model_index.json", "config.json", "svdquant_report.json")):
        raise SVDQuantError(f"{out}: is a folder without a model, so it is not replaced; empty it or choose another")


@contextmanager
def _locked(work: Path, out: Path) -> Iterator[None]:
    """Holds `work` for this process. A folder in which no job was begun goes again at the end."""
    made = [folder for folder in (work, *work.parents) if not folder.exists()]
    if work.exists() and not _is_ours(work):
        raise SVDQuantError(f"{work}: is not svdquant's, but in the way; move it or choose another output folder")
    try:
        lock = _lock(work, out)
    except OSError as error:
        raise SVDQuantError(f"{work}: cannot be made ({error.strerror}); choose another output folder") from error
    try:
        yield
    finally:
        if not (work / "job.json").is_file():
            shutil.rmtree(work, ignore_errors=True)
            for folder in made[1:]:
                if folder.exists() and not any(folder.iterdir()):
                    folder.rmdir()
        lock.close()


def _is_ours(work: Path) -> bool:
    return work.is_dir() and ((work / "lock").is_file() or (work / "job.json").is_file() or not any(work.iterdir()))


def _lock(work: Path, out: Path) -> TextIO:
    """Opens `work`/lock for this process alone, until it is closed."""
    while True:
        work.mkdir(parents=True, exist_ok=True)
        lock = (work / "lock").open("a")
        if fcntl is None:
            lock.close()
            return lock
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                return lock  # a file system without locks
            lock.close()
            raise SVDQuantError(
                f"another svdquant is working on {out}; wait for it or choose another output"
            ) from error
        try:
            if os.path.samestat(os.fstat(lock.fileno()), (work / "lock").stat()):
                return lock
        except FileNotFoundError:
            pass
        lock.close()  # of a run that has just finished and removed it


def _clear(work: Path, keep: tuple[str, ...] = ()) -> None:
    for entry in work.iterdir():
        if entry.name in ("lock", *keep):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink()


def _claim(
    work: Path,
    jobs: dict[str, _Job],
    config: SVDQuantConfig,
    drawing: _Drawing | None,
    origin: dict[str, Any] | None,
    copied: list[Path],
) -> None:
    """Records what this work folder is for; raises `SVDQuantError` where it was begun for something else."""
    solving = {k: v for k, v in config.to_dict().items() if k not in _JUDGING}
    job = {
        "config": solving,
        "calibration": None if drawing is None else _digest(drawing.key()),
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
    _clear(work, keep=("source", "traces", "offload"))
    _check_disk(work, _disk_needed(jobs, config, drawing, copied))
    write_atomically(file, lambda path: _write(path, json.dumps(job, indent=1)))


def _disk_needed(jobs: dict[str, _Job], config: SVDQuantConfig, drawing: _Drawing | None, copied: list[Path]) -> int:
    """Bytes: solved groups and the result made of them, copied models, calibration inputs, offloaded weights."""
    needed = 2 * sum(job.plan.bytes_after for job in jobs.values()) + sum(_size_of(path) for path in copied)
    if drawing is not None:
        for job in jobs.values():
            columns = [group.in_features for group in job.plan.groups]
            # The largest is there twice while it is finished.
            needed += config.calibration_rows * (sum(columns) + max(columns)) * job.dtype.itemsize
            if drawing.max_memory is not None:
                needed += job.plan.bytes_before
    return needed


def _check_disk(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise SVDQuantError(
            f"{folder}: needs about {needed / 2**30:.1f} GiB of disk, {free / 2**30:.1f} GiB are free; free some or "
            "choose another output folder"
        )


_NOT_COPIED = (".*", "*.bin", "*.pt", "*.ckpt")


def _rest(source: Path, skip: set[str]) -> list[Path]:
    """Everything of the pipeline but the denoisers: other models, tokenizers, scheduler, licence."""
    entries = [e for e in sorted(source.iterdir()) if not e.name.startswith(".") and e.name not in skip | {"README.md"}]
    return [
        e for e in entries if e.is_dir() or e.suffix in (".json", ".txt", ".md") or e.name.upper().startswith("LICENSE")
    ]


def _size_of(path: Path) -> int:
    """Of a file, or of those in a folder that are copied."""
    files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
    return sum(f.stat().st_size for f in files if not any(f.match(pattern) for pattern in _NOT_COPIED))


def _copy(entries: list[Path], target: Path) -> None:
    for entry in entries:
        with _storing(target / entry.name):
            if entry.is_dir():
                shutil.copytree(entry, target / entry.name, ignore=shutil.ignore_patterns(*_NOT_COPIED))
            else:
                shutil.copy2(entry, target / entry.name)


def _publish(result: Path, out: Path, work: Path) -> None:
    """Moves the finished folder to its place; what stood there goes only then."""
    replaced = work / "replaced"
    shutil.rmtree(replaced, ignore_errors=True)
    if out.exists():
        os.replace(out, replaced)
    try:
        os.replace(result, out)
    except OSError:
        if replaced.exists():
            os.replace(replaced, out)
        raise
    shutil.rmtree(work, ignore_errors=True)


def _check_single_file(file: Path, base: str | None) -> None:
    checkpoint = open_checkpoint(file)
    if checkpoint.quantization is not None:
        raise SVDQuantError(f"{file}: is quantized already; start from the 16-bit model")
    if base is None:
        raise SVDQuantError(f"{file}: a single file lacks its configuration; name its pipeline with --base")
    pipeline = resolve_model(base)
    denoisers(pipeline)
    check_files(pipeline)


def _origin(file: Path, base: str, dtype: torch.dtype | None) -> dict[str, Any]:
    """What a single file is unpacked from."""
    stat = file.stat()
    return {
        "file": str(file.resolve()),
        "size": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "base": str(resolve_model(base).resolve()),
        "dtype": str(dtype or torch.bfloat16),
    }


def _unpack_single_file(file: Path, base: str, work: Path, dtype: torch.dtype | None, origin: dict[str, Any]) -> Path:
    """A single 16-bit .safetensors as a pipeline folder: its denoiser converted by diffusers, the rest of `base`."""
    folder, pipeline = work / "source", resolve_model(base)
    complete = folder / "complete"
    if complete.is_file() and complete.read_text(encoding="utf-8") == json.dumps(origin):
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    part, wanted = denoisers(pipeline)[0], dtype or torch.bfloat16
    rest = _rest(pipeline, {part})
    weights = sum(math.prod(t.shape) for t in open_checkpoint(file).tensors.values()) * wanted.itemsize
    _check_disk(work, weights + sum(_size_of(entry) for entry in rest))
    model: Any = load_single_file(file, pipeline, wanted)
    with _storing(folder):
        model.save_pretrained(folder / part)
    _copy(rest, folder)
    write_atomically(complete, lambda path: _write(path, json.dumps(origin)))
    return folder
