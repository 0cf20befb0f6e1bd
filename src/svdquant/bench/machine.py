"""Versions of what took part in a run."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterable
from importlib import metadata

from .peers import Peer

_PACKAGES = ("torch", "diffusers", "numpy")
# What a GPU's suite runs with besides, where installed.
GPU_PACKAGES = ("triton", "torchao", "bitsandbytes")


def versions(peers: Iterable[type[Peer]], more: Iterable[str] = ()) -> dict[str, str]:
    """Package → version: Python, ours, and of what we stand on, the peers' packages and `more` those installed."""
    from .. import __version__

    found = {"svdquant": __version__, "python": platform.python_version()}
    for name in (*_PACKAGES, *more):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    for peer in peers:
        found |= peer.versions()
    return found
