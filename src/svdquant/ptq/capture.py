"""Calibration inputs, kept on disk: a bounded sample of rows per distinct input, whatever the number of forwards."""

from __future__ import annotations

import errno
import hashlib
import inspect
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import SVDQuantError
from .plan import GroupPlan
from .solve import GroupInputs, group_generator
from .trace import Run


class _Reservoir:
    """A uniform sample of at most `budget` of the rows seen (Vitter's algorithm R), in a memory-mapped file."""

    def __init__(self, path: Path, budget: int, generator: torch.Generator) -> None:
        self.path, self.budget, self.generator = path, budget, generator
        self.seen = 0
        self.amax: Tensor | None = None
        self._rows: Tensor | None = None
        self._digests: set[bytes] = set()

    def add(self, rows: Tensor) -> None:
        """rows [M, K]; a tensor that was seen before (the text of every step, say) adds nothing."""
        digest = _digest(rows)
        if digest in self._digests or rows.shape[0] == 0:
            return
        self._digests.add(digest)
        amax = rows.abs().amax(0).float()
        self.amax = amax if self.amax is None else torch.maximum(self.amax, amax)
        if self._rows is None:
            size = self.budget * rows.shape[1]
            _allocate(self.path, size * rows.element_size())
            flat = torch.from_file(str(self.path), shared=True, size=size, dtype=rows.dtype)
            self._rows = flat.view(self.budget, rows.shape[1])
        filled = min(self.seen, self.budget)
        room = min(self.budget - filled, rows.shape[0])
        if room:
            self._rows[filled : filled + room] = rows[:room].cpu()
        rest = rows.shape[0] - room
        if rest:
            # Row number t of the stream replaces a random slot with probability budget / t.
            numbers = torch.arange(self.seen + room, self.seen + rows.shape[0]) + 1
            slots = (torch.rand(rest, generator=self.generator, dtype=torch.float64) * numbers).long()
            # Of rows that drew the same slot the last one stays.
            accepted = torch.nonzero(slots < self.budget).flatten()
            last = dict(zip(slots[accepted].tolist(), (accepted + room).tolist(), strict=True))
            picked = torch.tensor(list(last.values()), dtype=torch.long, device=rows.device)
            self._rows[torch.tensor(list(last), dtype=torch.long)] = rows[picked].cpu()
        self.seen += rows.shape[0]

    def finish(self) -> dict[str, Any]:
        """What is needed to read the file again."""
        if self._rows is None or self.amax is None:
            return {}
        kept = min(self.seen, self.budget)
        save_file({"rows": self._rows[:kept].clone(), "amax": self.amax.cpu()}, self.path.with_suffix(".safetensors"))
        self._rows = None
        self.path.unlink()
        return {"file": self.path.with_suffix(".safetensors").name, "rows": kept, "seen": self.seen}


def _allocate(path: Path, size: int) -> None:
    """A file of `size` bytes that has its disk space: writing to a mapped sparse file on a full disk ends in SIGBUS.

    Raises `OSError` where there is no room.
    """
    with path.open("wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
            return
        except AttributeError:  # no POSIX system
            pass
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise OSError(error.errno, error.strerror, str(path)) from error
        zeros = bytes(1 << 20)
        for start in range(0, size, len(zeros)):
            file.write(zeros[: size - start])


def _digest(rows: Tensor) -> bytes:
    """Of 64 evenly spaced rows, the shape and the sum: equal tensors always agree, others practically never."""
    step = max(rows.shape[0] // 64, 1)
    sample = rows[::step].contiguous().cpu()
    digest = hashlib.blake2b(f"{tuple(rows.shape)} {float(rows.sum(dtype=torch.float64))}".encode(), digest_size=16)
    digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.digest()


class CalibrationStore:
    """A folder of calibration inputs, one file per distinct input tensor of the model."""

    INDEX = "inputs.json"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index: dict[str, dict[str, Any]] = json.loads((folder / self.INDEX).read_text())

    def inputs(self, group: str) -> GroupInputs:
        data = load_file(self.folder / self.index[group]["file"])
        return GroupInputs(data["rows"], data["amax"])

    @classmethod
    def complete(cls, folder: Path) -> bool:
        """Whether a capture finished here; an interrupted one is made again."""
        return (folder / cls.INDEX).is_file()


class _TokenMask:
    """Which tokens of a text encoder's present forward are words: nobody reads those that are masked out.

    Prompts are mostly padding; calibration is not to be about that.
    """

    def __init__(self, model: nn.Module) -> None:
        # Without self, as a hook gets them.
        self._names = list(inspect.signature(type(model).forward).parameters)[1:]
        self._mask: Tensor | None = None

    def note(self, _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = (dict(zip(self._names, args, strict=False)) | kwargs).get("attention_mask")
        self._mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None

    def rows(self, x: Tensor) -> Tensor:
        """The inputs [M, K] of a layer, x [..., K], without those of masked tokens."""
        if self._mask is not None and self._mask.shape == x.shape[:-1]:
            return x[self._mask.bool().to(x.device)]
        return x.reshape(-1, x.shape[-1])


def capture(
    model: nn.Module, groups: list[GroupPlan], run: Run, folder: Path, rows: int, seed: int
) -> CalibrationStore:
    """Runs `run(model)` and keeps up to `rows` input rows of every group under `folder`; of text no padding.

    The model is not changed; all inputs are those of the 16-bit model. Memory does not grow with the number of
    forwards: the samples are memory-mapped files. Raises `SVDQuantError` naming a layer that no forward reached.
    """
    folder.mkdir(parents=True, exist_ok=True)
    reservoirs: dict[str, _Reservoir] = {}
    mask = _TokenMask(model) if hasattr(model, "config_class") else None
    handles = [] if mask is None else [model.register_forward_pre_hook(mask.note, with_kwargs=True)]
    for number, group in enumerate(groups):
        reservoir = _Reservoir(folder / f"{number:05d}.rows", rows, group_generator(seed, f"capture:{group.name}"))
        reservoirs[group.name] = reservoir
        handles.append(
            model.get_submodule(group.name).register_forward_pre_hook(_hook(reservoir, mask), with_kwargs=True)
        )
    try:
        with torch.no_grad():
            run(model)
    finally:
        for handle in handles:
            handle.remove()
    index = {name: entry for name, reservoir in reservoirs.items() if (entry := reservoir.finish())}
    missed = [group.name for group in groups if group.name not in index]
    if missed:
        more = f" and {len(missed) - 1} more" if len(missed) > 1 else ""
        raise SVDQuantError(
            f"calibration never reached {missed[0]}{more}; let calibrate run every branch of the model, or put the "
            "layer into skip"
        )
    partial = folder / (CalibrationStore.INDEX + ".partial")
    partial.write_text(json.dumps(index))
    partial.replace(folder / CalibrationStore.INDEX)
    return CalibrationStore(folder)


def _hook(reservoir: _Reservoir, mask: _TokenMask | None) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        if isinstance(module, nn.Conv2d):
            x = x.movedim(-3, -1)
        x = x.detach()
        reservoir.add(x.reshape(-1, x.shape[-1]) if mask is None else mask.rows(x))

    return hook
