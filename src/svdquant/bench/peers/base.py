"""What a contender in the suite of layers is: another way of multiplying by the same weight."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from importlib import metadata
from typing import ClassVar

from torch import Tensor

from ..cases import LinearCase


class Peer(ABC):
    """One way of multiplying. A new instance is made for every case, and for every copy of a layer.

    name: as in tables and for `--peers`; it may be one of several under the same `family`. packages: what must be
    installed, as on PyPI, with their modules. keeps_output: every call writes the same output tensor. counts_bytes:
    `bytes` is known; else it is measured how the process grows.
    """

    name: ClassVar[str]
    family: ClassVar[str]
    kind: ClassVar[str] = "peer"
    packages: ClassVar[dict[str, str]] = {}
    keeps_output: ClassVar[bool] = False
    counts_bytes: ClassVar[bool] = True

    @classmethod
    def available(cls) -> str | None:
        """Why this peer cannot run here, or None."""
        for package, module in cls.packages.items():
            try:
                importlib.import_module(module)
            except ModuleNotFoundError as error:
                if (error.name or "").partition(".")[0] == module.partition(".")[0]:
                    return f"not installed: pip install {package}"
                return f"{package} lacks the module {error.name}"
            except Exception as error:  # a library may raise anything when its own parts are missing
                return f"{package} cannot be imported: {first_line(error)}"
        return None

    @classmethod
    def fits(cls, case: LinearCase) -> str | None:
        """Why this peer cannot take part in a case, or None."""
        return None

    @classmethod
    def versions(cls) -> dict[str, str]:
        """Of its packages."""
        found = {}
        for package in cls.packages:
            try:
                found[package] = metadata.version(package)
            except metadata.PackageNotFoundError:
                continue
        return found

    @abstractmethod
    def prepare(self, case: LinearCase) -> None:
        """Whatever is done once: quantize, pack, compile. The case's weight must not be needed afterwards."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """y [M, N] of the case's x."""

    def input(self, case: LinearCase) -> Tensor:
        """The case's x in the type that this peer takes."""
        return case.x

    def copy(self, case: LinearCase) -> Peer:
        """The same layer in memory of its own."""
        twin = type(self)()
        twin.prepare(case)
        return twin

    @property
    def bytes(self) -> int | None:
        """What the weights take, scales and bias included; None where only the process' growth tells."""
        return None


def first_line(error: BaseException) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
