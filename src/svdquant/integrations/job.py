"""One model of a pipeline on its way from a 16-bit folder to a quantized one, by way of files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.layout import Checkpoint
from ..checkpoint.streaming import ShardWriter, WeightReader
from ..config import SVDQuantConfig
from ..ptq.capture import CalibrationStore, capture
from ..ptq.damage import UnusableInputsError, UnusableModelError, damage
from ..ptq.example import trace_model
from ..ptq.plan import Plan, make_plan
from ..ptq.quantize import make_report
from ..ptq.report import LayerReport, Report
from ..ptq.stream import SolvedGroups, solve_to_files, write_atomically
from ..ptq.trace import LayerTrace
from .calibration import CalibrationDrawing, StageProgress, working_dtype
from .skeletons import build_skeleton
from .sources import model_class
from .work_folder import copy_entries, digest, storing, write_text

_STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}


def calibrate(jobs: Iterable[Job], drawing: CalibrationDrawing) -> None:
    """Runs the 16-bit pipeline over the prompts for the jobs for which that has not been done.

    All denoisers of a pipeline see the same pictures; what reads the prompt alone has read it before the first step.
    """
    jobs = list(jobs)
    waiting = [job for job in jobs if not CalibrationStore.complete(job.inputs)]
    encoders = [[job] for job in waiting if job.checkpoint.library == "transformers"]
    denoisers = [job for job in waiting if job.checkpoint.library != "transformers"]
    for together in (*encoders, *([denoisers] if denoisers else [])):
        _capture(together, drawing, drawing.picture if together is denoisers else drawing.encode)
    drawing.say("calibrate", len(drawing.prompts), len(drawing.prompts), "")
    for job in jobs:
        job.store = CalibrationStore(job.inputs)


def _capture(jobs: list[Job], drawing: CalibrationDrawing, run_one: Callable[[int], None]) -> None:
    """One drawing of the prompts, with every job's model watched."""
    if not jobs:
        for number, prompt in enumerate(drawing.prompts):
            drawing.say("calibrate", number, len(drawing.prompts), prompt)
            run_one(number)
        return
    job, *others = jobs
    shutil.rmtree(job.inputs, ignore_errors=True)
    model = getattr(drawing.pipe, job.part)
    with storing(job.inputs):
        capture(
            model,
            job.plan.groups,
            lambda _model: _capture(others, drawing, run_one),
            job.inputs,
            job.config.calibration_rows,
            job.config.seed,
        )


class Job:
    """Plan, inputs and solved groups of one model, under `work`.

    part: the component's name, "" for a model without a pipeline. config: of this model alone.
    """

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
        cls = model_class(checkpoint.model_class, checkpoint.library)
        self.reader = WeightReader(checkpoint, self.dtype, _kept_in_fp32(cls, checkpoint.library, self.dtype))
        self.skeleton = build_skeleton(cls, checkpoint.config, self.dtype)
        self.names = _model_names(self.reader.names, self.skeleton, checkpoint.library)
        self._stored = {name: stored for stored, name in self.names.items()}
        self.plan: Plan = make_plan(self.skeleton, config)
        if self.plan.unreached and drawing is not None and not config.weights_only:
            # Names alone say little of layers that no example inputs reach; the pipeline shows what reads what.
            traces = self._traces(work / "traces" / f"{part}.json", drawing)
            self.plan = make_plan(self.skeleton, config, traces=traces)
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

    def get(self, name: str) -> torch.Tensor:
        """A tensor of the 16-bit model by its name in the model."""
        return self.reader.get(self._stored.get(name, name))

    def solve(self, device: str, say: StageProgress) -> None:
        try:
            self.groups = solve_to_files(
                self.plan,
                self.get,
                self.store,
                self.config,
                self.solved,
                lambda done, total, name: say("solve", done, total, name),
                device,
            )
        except UnusableInputsError:
            # One damaged tensor spoils what all layers read.
            for name in self.reader.names:
                value = self.reader.get(name)
                if value.is_floating_point() and (why := damage(value)):
                    raise UnusableModelError(f"{name} holds {why}; download or export the weights again") from None
            raise

    def report(self) -> Report:
        assert self.groups is not None
        layers: dict[str, LayerReport] = {}
        for number in range(len(self.plan.groups)):
            layers |= {name: entry[1] for name, entry in self.groups.layers(number).items()}
        return make_report(self.plan, layers, self.config, self.skeleton)

    def write(self, folder: Path, shard_bytes: int) -> None:
        """The quantized model folder: shards under the names, and in the order, of the 16-bit ones; config.json."""
        assert self.groups is not None
        folder.mkdir(parents=True)
        kept = {layer.name for layer in self.report().layers if layer.kind == "keep"}
        number_of = {m.name: i for i, group in enumerate(self.plan.groups) for m in group.members}
        specs = {}
        writer = ShardWriter(folder, _STEMS[self.checkpoint.library], shard_bytes)
        written: set[str] = set()
        for stored, name in self.names.items():
            layer = name.rpartition(".")[0]
            if layer not in number_of or layer in kept:
                writer.add(stored, self.reader.get(stored))
            elif layer not in written:
                written.add(layer)
                specs[layer] = self.groups.layers(number_of[layer])[layer][0]
                for key, value in self.groups.tensors(number_of[layer], layer):
                    writer.add(f"{stored.rpartition('.')[0]}.{key.rpartition('.')[2]}", value)
        writer.finish()
        ordered = {name: specs[name] for name in self.plan.layers if name in specs}
        config = _with_dtype(self.checkpoint.config, self.dtype)
        config["quantization_config"] = self.config.with_layers(ordered).to_dict()
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        write_atomically(folder / "config.json", lambda path: write_text(path, text))
        copy_entries(self.extras(), folder)

    def extras(self) -> list[Path]:
        """What stands beside the weights: a generation_config.json, a chat template."""
        files = [f for f in sorted(self.checkpoint.path.iterdir()) if f.suffix in (".json", ".jinja", ".txt")]
        return [f for f in files if f.name != "config.json" and ".index." not in f.name]


def _kept_in_fp32(cls: Any, library: str, dtype: torch.dtype) -> tuple[str, ...]:
    """Parts of names whose tensors the library loads in float32. That of transformers protects float16 alone."""
    names = set(getattr(cls, "_keep_in_fp32_modules", None) or ())
    if library == "transformers":
        names = names if dtype == torch.float16 else set()
        names |= set(getattr(cls, "_keep_in_fp32_modules_strict", None) or ())
    return tuple(sorted(names))


def _model_names(stored: list[str], skeleton: Any, library: str) -> dict[str, str]:
    """Name in the files → name in the model; transformers renames while it loads."""
    if library != "transformers":
        return {name: name for name in stored}
    from .transformers import model_keys

    return dict(zip(stored, model_keys(stored, skeleton), strict=True))


def _with_dtype(config: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """A configuration that names this type wherever it names one: models are loaded in it."""
    changed = {}
    for key, value in config.items():
        if isinstance(value, dict):
            value = _with_dtype(value, dtype)
        elif key in ("dtype", "torch_dtype") and value is not None:
            value = str(dtype).removeprefix("torch.")
        changed[key] = value
    return changed


def _trace_from(fields: dict[str, Any]) -> LayerTrace:
    """From JSON, which knows no tuples."""
    ranges = {key: tuple((a, b) for a, b in value) for key, value in fields.items() if isinstance(value, list)}
    return LayerTrace(**(fields | ranges))
