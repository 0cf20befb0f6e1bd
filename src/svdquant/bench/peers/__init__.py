"""The contenders besides ours, by name."""

from __future__ import annotations

from ...errors import SVDQuantError
from .base import Peer
from .bitsandbytes import BitsAndBytesNF4
from .dense import TorchBFloat16, TorchFloat32
from .ggml import GgmlQ4, GgmlQ4Repacked, GgmlQ8
from .openvino import OpenVINOInt4, OpenVINOInt8Dynamic, OpenVINOInt8Static
from .sdnq import SDNQInt8
from .torchao import TorchaoCompiled, TorchaoEager

BASELINE = TorchBFloat16
DENSE: tuple[type[Peer], ...] = (TorchBFloat16, TorchFloat32)
PEERS: tuple[type[Peer], ...] = (
    TorchaoEager,
    TorchaoCompiled,
    OpenVINOInt8Static,
    OpenVINOInt8Dynamic,
    OpenVINOInt4,
    BitsAndBytesNF4,
    GgmlQ8,
    GgmlQ4,
    GgmlQ4Repacked,
    SDNQInt8,
)


def choose_peers(text: str) -> tuple[type[Peer], ...]:
    """Peers by "all", "none", or names and families joined by commas. Raises `SVDQuantError` for unknown ones."""
    wanted = [part.strip().lower() for part in text.split(",") if part.strip()]
    if wanted in (["all"], ["none"]):
        return PEERS if wanted == ["all"] else ()
    known = {name for peer in PEERS for name in (peer.name, peer.family)}
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted:
        families = list(dict.fromkeys(peer.family for peer in PEERS))
        raise SVDQuantError(
            f"--peers {text!r} names no peer; use all, none, or some of {', '.join(families)}, joined by commas"
        )
    return tuple(peer for peer in PEERS if peer.name in wanted or peer.family in wanted)


__all__ = ["BASELINE", "DENSE", "PEERS", "Peer", "choose_peers"]
