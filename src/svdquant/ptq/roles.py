"""What a linear is to its model: modulation, a key of the text, an embedding; from a trace, else from names."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable
from dataclasses import dataclass, field

from torch import nn

from ..config import matches
from ..families import Family
from .trace import LayerTrace

_MODULATION = re.compile(r"(^|\.)(norm\d*(_\w+)?|(\w+_)?mod(ulation\w*)?|adaln\w*|time_emb_proj)(\.|$)", re.IGNORECASE)
# Of one linear outside of the blocks that modulates them all.
_SHARED = re.compile(r"(^|\.)(\w*modulation\w*|time_proj|adaln_single|time_embed|time_mod\w*)(\.(linear|\d+))?$")
_FINAL = re.compile(r"final|norm_out|last", re.IGNORECASE)
_CROSS = re.compile(r"(^|\.)cross_?att(n|ention)\w*$", re.IGNORECASE)
_QUERY = {
    **dict.fromkeys(("to_k", "to_v", "to_kv", "add_k_proj", "add_v_proj"), "to_q"),
    **dict.fromkeys(("to_key", "to_value"), "to_query"),
    "kv_linear": "q_linear",
}
_SIBLINGS = (
    ("to_q", "to_k", "to_v"),
    ("add_q_proj", "add_k_proj", "add_v_proj"),
    ("q", "k", "v"),
    ("to_query", "to_key", "to_value"),
    ("wi_0", "wi_1"),
    ("w1", "w3"),
)


@dataclass
class Roles:
    """A model's linears by name. where: of each its block, "" outside; traces: of those that a forward reached.

    projections: names of lists of linears outside of the blocks, one for each of them.
    """

    family: Family
    where: dict[str, str]
    traces: dict[str, LayerTrace]
    projections: tuple[str, ...] = ()
    tokens_seen: bool = field(init=False)
    _readers: dict[int, set[str]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.tokens_seen = any(trace.dims > 2 for trace in self.traces.values())
        for name, trace in self.traces.items():
            self._readers.setdefault(trace.source, set()).add(self.where[name])

    def outside(self, name: str) -> bool:
        """Whether the model has blocks and this linear is in none."""
        return not self.where[name] and any(self.where.values())

    def why_outside(self, name: str, in_features: int, out_features: int) -> str:
        """What a linear outside of the blocks is, which is why it stays in 16 bits."""
        if self.modulates_all(name, in_features, out_features):
            return "modulation shared by all blocks"
        if any(name.startswith(f"{projection}.") for projection in self.projections):
            return "projects what one of the blocks reads"
        return "embedding, final norm or projection"

    def modulates_all(self, name: str, in_features: int, out_features: int) -> bool:
        """Of a linear outside of the blocks: whether every block is shifted and scaled by it."""
        if any(matches(pattern, name) for pattern in self.family.shared):
            return True
        return bool(_SHARED.search(name)) and not _FINAL.search(name) and out_features >= 3 * in_features

    def modulates(self, name: str) -> bool:
        """Whether it sees one row per sample."""
        if any(matches(pattern, name) for pattern in self.family.w4a16):
            return True
        trace = self.traces.get(name)
        if trace is not None and self.tokens_seen:
            # Experts are given the tokens that chose them, in one list.
            return trace.dims == 2 and "experts" not in name.split(".")
        return bool(_MODULATION.search(name)) and trace is None

    def condition_read(self, name: str) -> str:
        """What a cross-attention's key or value reads: "text", "picture", or "" where it is neither of the two."""
        if not self._reads_condition(name):
            return ""
        return "picture" if name.endswith(("add_k_proj", "add_v_proj")) else "text"

    def _reads_condition(self, name: str) -> bool:
        trace = self.traces.get(name)
        if trace is not None and len(self._readers[trace.source]) > 1:
            return True
        parent, _, leaf = name.rpartition(".")
        if leaf not in _QUERY or not _names_cross_attention(parent, self.where):
            return False
        query = self.traces.get(f"{parent}.{_QUERY[leaf]}")
        return trace is None or (query is not None and query.source != trace.source)

    def siblings(self, name: str) -> tuple[str, ...]:
        """Leaves of the linears that usually read the same tensor as this one; empty where nothing is usual."""
        parent, _, leaf = name.rpartition(".")
        # Cross attention, of whatever with whatever, takes queries and keys from different tensors.
        if "cross" in parent.rpartition(".")[2] or _names_cross_attention(parent, self.where):
            return ()
        return next((leaves for leaves in _SIBLINGS if leaf in leaves), ())


def _names_cross_attention(attention: str, linears: Container[str]) -> bool:
    """An "attn2" beside an "attn1" reads the text; SD3.5 has one beside "attn", which reads the picture once more."""
    if attention.endswith("attn2"):
        return f"{attention[:-1]}1.to_k" in linears
    return bool(_CROSS.search(attention))


def shortcut(module: nn.Module, name: str) -> bool:
    """Whether it is a 1×1 convolution around others: they belong to a residual network, which stays in 16 bits."""
    return isinstance(module, nn.Conv2d) and "shortcut" in name


def routers(model: nn.Module, linears: Iterable[str]) -> set[str]:
    """Names of linears that choose among experts: a wrong choice is no small error."""
    found = set()
    for name in linears:
        parent, _, leaf = name.rpartition(".")
        if leaf in ("gate", "router") and hasattr(model.get_submodule(parent), "experts"):
            found.add(name)
    return found
