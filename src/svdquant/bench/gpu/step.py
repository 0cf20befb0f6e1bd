"""One step of the whole FLUX.1-dev transformer: ours beside bf16, FP8 and NF4."""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...config import SVDQuantConfig
from ...nn import set_activations
from ...numerics import relative_error
from ..results import BASELINE, OURS, PEER, Case, Row
from . import models
from .modules import stored_bytes
from .session import Session
from .settings import Picture
from .timing import Timed, by_kind, launches, measure_rows

BF16, BF16_EAGER = "bf16, compiled", "bf16, eager"
FP8, FP8_TORCHAO = "fp8 row-wise, compiled", "torchao fp8 row-wise, compiled"
NF4, NF4_TORCH = "bitsandbytes NF4, eager", "NF4 by compiled torch"
OURS_NAMES = ("ours W4A8, eager", "ours W4A8, compiled")
_DTYPE = torch.bfloat16
# What building and compiling take at most, of which so much has to be left.
_BUILD_SECONDS, _COMPILE_SECONDS, _TIME_SECONDS = 15.0, 60.0, 5.0
_KERNELS = 12


@dataclass
class Weights:
    """A model that several contenders share. make(meta, device); package: without which it cannot be made."""

    make: Callable[[Any, torch.device], Any]
    package: str | None = None
    model: Any = None
    bytes: int = 0
    reason: str = ""
    compiled: dict[Any, Any] = field(default_factory=dict)
    mode: tuple[bool, str | None] | None = None

    def run_as(self, compiled: bool, activations: str | None) -> Any:
        """The model, so that its next call is run that way. Costs time only where it was run in another."""
        if self.mode != (compiled, activations):
            models.set_compiled(self.model, self.compiled if compiled else {})
            if activations is not None:
                set_activations(self.model, activations)
            self.mode = compiled, activations
        return self.model


@dataclass(frozen=True)
class Runner:
    """A contender: the weights' name, how they are run, and with which activations of ours."""

    name: str
    weights: str
    compiled: bool
    kind: str = PEER
    activations: str | None = None


def _weights(rank: int) -> dict[str, Weights]:
    config = SVDQuantConfig(rank=rank)
    return {
        "ours": Weights(lambda meta, device: models.random_quantized(meta, config, device)),
        "bf16": Weights(models.bf16_model),
        "fp8": Weights(models.fp8_model),
        "nf4": Weights(models.bitsandbytes_model, "bitsandbytes"),
        "nf4 torch": Weights(models.nf4_torch_model),
        "torchao": Weights(models.torchao_model, "torchao"),
    }


# The most important first: time may run out.
RUNNERS = (
    Runner(OURS_NAMES[0], "ours", False, OURS, "int8"),
    Runner(BF16, "bf16", True, BASELINE),
    Runner(FP8, "fp8", True),
    Runner(OURS_NAMES[1], "ours", True, OURS, "int8"),
    Runner(BF16_EAGER, "bf16", False, BASELINE),
    Runner("ours W4 fp8, eager", "ours", False, OURS, "fp8"),
    Runner(NF4, "nf4", False),
    Runner(NF4_TORCH, "nf4 torch", True),
    Runner(FP8_TORCHAO, "torchao", True),
)


def run_step(session: Session) -> None:
    """A case per picture. Contenders' weights stay on the device between them, as far as there is room."""
    if importlib.util.find_spec("diffusers") is None:
        session.note("not run, because diffusers is not installed: pip install diffusers")
        return
    scale, settings = session.settings.scale, session.settings
    meta = models.meta_model(dict(scale.flux), settings.blocks, _DTYPE)
    held = _weights(scale.rank)
    for picture in scale.pictures:
        name = case_name(picture, settings.blocks)
        if not session.has(name) and session.fits(2 * _TIME_SECONDS * session.on_gpu, name):
            _picture(session, meta, held, picture, name)
    held.clear()
    gc.collect()
    if session.on_gpu:
        torch.cuda.empty_cache()


def case_name(picture: Picture, blocks: tuple[int, int] | None) -> str:
    """Says so where it is not the whole transformer."""
    whole = "one step" if blocks is None else f"only {blocks[0]} double and {blocks[1]} single blocks"
    return f"{whole}, {picture}"


@torch.inference_mode()
def _picture(session: Session, meta: Any, held: dict[str, Weights], picture: Picture, name: str) -> None:
    torch._dynamo.reset()
    facts = {"image_tokens": picture.image, "text_tokens": picture.text, "batch": picture.batch}
    case = Case(session.suite, name, BF16, facts)
    inputs = models.model_inputs(meta, picture, _DTYPE, session.torch_device)
    timed, calls, outputs = [], {}, {}
    for runner in RUNNERS:
        row = Row(runner.name, runner.kind)
        case.rows.append(row)
        row.reason = _build(session, meta, held[runner.weights], runner)
        if row.reason:
            continue
        call = partial(_step, held[runner.weights], runner, inputs)
        output, row.reason = session.attempt(
            f"{name}: {runner.name}", partial(_first, session, held[runner.weights], row, call), limit=400
        )
        if output is not None:
            calls[runner.name], outputs[runner.name] = call, output
            timed.append(Timed(row, [call]))
    _agreement(case, outputs)
    if picture == session.settings.scale.pictures[0]:
        _check_blocks(session, held["ours"], case, inputs, picture)
    _, reason = session.attempt(f"{name}: timing", lambda: _time(session, case, timed), limit=400)
    if reason:
        session.note(f"{name}: timing {reason}")
    dense = held["bf16"].bytes
    for row in case.rows:
        row.bytes_ratio = row.bytes / dense if row.bytes and dense else None
    for runner in RUNNERS:
        if runner.name in calls and session.fits(3 * session.on_gpu, f"{name}: profile of {runner.name}"):
            _profile(session, case, runner.name, calls[runner.name])
    session.add(case)


def _build(session: Session, meta: Any, weights: Weights, runner: Runner) -> str:
    """Makes the weights if nobody has; why the runner cannot run, or ""."""
    if weights.package is not None and importlib.util.find_spec(weights.package) is None:
        return f"not installed: pip install {weights.package}"
    if weights.model is None and not weights.reason:
        if not session.fits(_BUILD_SECONDS * session.on_gpu, f"weights of {runner.weights}"):
            return "no time was left"
        what = f"weights of {runner.weights}"
        weights.model, weights.reason = session.attempt(what, lambda: weights.make(meta, session.torch_device))
        if weights.model is not None:
            weights.bytes = stored_bytes(weights.model)
    if weights.reason:
        return weights.reason
    if runner.compiled and not session.fits(_COMPILE_SECONDS * session.on_gpu, f"compiling {runner.name}"):
        return "no time was left"
    if runner.compiled and not weights.compiled:
        weights.compiled = models.compile_blocks(weights.model, "eager" if session.settings.smoke else "inductor")
        weights.mode = None
    return ""


def _step(weights: Weights, runner: Runner, inputs: dict[str, Any]) -> Tensor:
    y: Tensor = weights.run_as(runner.compiled, runner.activations)(**inputs)[0]
    return y


def _first(session: Session, weights: Weights, row: Row, call: Callable[[], Tensor]) -> Tensor:
    output = call()
    if not bool(output.isfinite().all()):
        raise ArithmeticError("the output is not finite")
    row.bytes = weights.bytes
    row.scratch_bytes = session.device.peak(call)
    row.more["peak_bytes"] = weights.bytes + (row.scratch_bytes or 0)
    return output


def _agreement(case: Case, outputs: dict[str, Tensor]) -> None:
    """Runs of the same weights against the first of them."""
    for first, *others in ([BF16, BF16_EAGER], [*OURS_NAMES, "ours W4 fp8, eager"]):
        for other in others:
            if first in outputs and other in outputs:
                case.row(other).more[f"differs from {first}"] = relative_error(
                    outputs[other].float(), outputs[first].float()
                )


def _time(session: Session, case: Case, timed: list[Timed]) -> None:
    settings = session.settings
    rounds = min(settings.rounds, 5) if session.on_gpu else 1
    # Compiled calls and others change places on one model: launches are part of what a step takes.
    measure_rows(timed, session.device, rounds, 10 * settings.sample_seconds, case.reference, graphs=False)


def _check_blocks(session: Session, ours: Weights, case: Case, inputs: dict[str, Any], picture: Picture) -> None:
    """The first block of each kind against its own dense weights: kernels and activations, not weights."""
    if ours.model is None:
        return

    def check() -> float:
        model = ours.run_as(False, "int8")
        seen: dict[int, Any] = {}
        firsts = [getattr(model, name)[0] for name in models.BLOCKS if len(getattr(model, name))]
        hooks = [
            block.register_forward_pre_hook(
                lambda block, args, kwargs: seen.setdefault(id(block), (args, kwargs)), with_kwargs=True
            )
            for block in firsts
        ]
        model(**inputs)
        for hook in hooks:
            hook.remove()
        worst = 0.0
        for block in firsts:
            args, kwargs = seen[id(block)]
            found, exact = block(*args, **kwargs), models.dequantized_block(block)(*args, **kwargs)
            before = torch.cat([kwargs["encoder_hidden_states"], kwargs["hidden_states"]], 1).float()
            added = [torch.cat(y, 1).float() - before for y in (found, exact)]
            worst = max(worst, relative_error(*added))
        return worst

    error, reason = session.attempt("first blocks against dense weights", check)
    row = case.row(OURS_NAMES[0])
    row.error = error
    if reason:
        session.note(f"first blocks against dense weights: {reason}")


def _profile(session: Session, case: Case, name: str, call: Callable[[], Any]) -> None:
    found, reason = session.attempt(f"profile of {name}", lambda: launches(call, session.device))
    if found is None:
        session.note(f"profile of {name}: {reason}")
        return
    case.profiles[name] = by_kind(found)
    row = case.row(name)
    row.more["launches"] = sum(count for _, count, _ in found)
    row.more["kernels"] = [
        {"name": kernel[:120], "count": count, "ms": round(ms, 4)} for kernel, count, ms in found[:_KERNELS]
    ]
