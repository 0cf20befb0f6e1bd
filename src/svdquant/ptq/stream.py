"""Solving group by group into files: bounded memory, and a run that was killed goes on where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..config import LayerSpec, SVDQuantConfig
from ..errors import SVDQuantError
from .capture import CalibrationStore
from .plan import Plan
from .report import LayerReport
from .solve import SolvedLayer, solve_group

# A weight or bias by its full name; None for a bias that the model does not have.
GetTensor = Callable[[str], Tensor]


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Calls `write(temporary)` and moves the result to `path`; a failed or killed write leaves no `path` behind.

    Raises `SVDQuantError` where the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise SVDQuantError(
            f"{path}: could not be written ({reason}); free disk space or fix the permissions, then run the same "
            "command again to go on"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


class SolvedGroups:
    """A folder with one safetensors file per solved group; its metadata holds the layers' specs and reports."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.safetensors"

    def save(self, number: int, solved: dict[str, SolvedLayer]) -> None:
        tensors = {
            f"{name}.{key}": value.contiguous()
            for name, s in solved.items()
            for key, value in s.tensors.named().items()
        }
        layers = {name: {"spec": asdict(s.spec), "report": asdict(s.report)} for name, s in solved.items()}
        metadata = {"format": "pt", "layers": json.dumps(layers)}
        write_atomically(self.path(number), lambda path: save_file(tensors, path, metadata))

    def done(self, number: int) -> bool:
        return self.path(number).is_file()

    def layers(self, number: int) -> dict[str, tuple[LayerSpec, LayerReport]]:
        """Specs and reports of one group, without its tensors."""
        with safe_open(self.path(number), "pt") as file:
            layers = json.loads(file.metadata()["layers"])
        return {
            name: (LayerSpec.from_dict(entry["spec"]), LayerReport(**entry["report"])) for name, entry in layers.items()
        }

    def tensors(self, number: int, layer: str) -> Iterator[tuple[str, Tensor]]:
        """(full name, tensor) of one layer."""
        with safe_open(self.path(number), "pt") as file:
            for key in file.keys():  # noqa: SIM118  # not a dict
                if key.rpartition(".")[0] == layer:
                    yield key, file.get_tensor(key)


def solve_to_files(
    plan: Plan,
    get: GetTensor,
    store: CalibrationStore | None,
    config: SVDQuantConfig,
    folder: Path,
    progress: Callable[[int, int, str], None] | None = None,
    device: str = "cpu",
) -> SolvedGroups:
    """Solves every group that has no file yet. Holds one group at a time.

    get: reads one tensor of the 16-bit model by name. The files do not depend on which run wrote them.
    """
    solved = SolvedGroups(folder)
    groups = plan.groups
    for number, group in enumerate(groups):
        if not solved.done(number):
            weights: dict[str, Tensor] = {}
            biases: dict[str, Tensor | None] = {}
            for member in group.members:
                weights[member.name] = get(f"{member.name}.weight").to(device)
                biases[member.name] = get(f"{member.name}.bias").to(device) if member.bias else None
            inputs = None if store is None else store.inputs(group.name)
            solved.save(number, solve_group(group, weights, biases, inputs, config))
        if progress is not None:
            progress(number + 1, len(groups), group.name)
    return solved
