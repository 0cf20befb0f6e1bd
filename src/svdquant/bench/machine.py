"""Versions of what took part in a run."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from importlib import metadata

from .peers import Peer

_PACKAGES = ("torch", "diffusers", "numpy")


def versions(peers: Iterable[type[Peer]]) -> dict[str, str]:
    """Package → version: Python, ours, what we stand on, and of the peers' packages those installed."""
    from .. import __version__

    found = {"svdquant": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        found[name] = metadata.version(name)
    for peer in peers:
        found |= peer.versions()
    return found
