"""Model families: what to treat specially, one short file each."""

from torch import nn

from . import names, text
from .base import GENERIC, Family
from .dit import LTX2, PIXART, SANA, SD3
from .flux import FAMILY as FLUX

FAMILIES = (FLUX, SANA, PIXART, SD3, LTX2, *names.FAMILIES, *text.FAMILIES)


def family_of(model: nn.Module) -> Family:
    """The family of a model by its class name; `GENERIC` where none is known."""
    name = type(model).__name__
    return next((family for family in FAMILIES if name in family.model_classes), GENERIC)


__all__ = ["FAMILIES", "GENERIC", "Family", "family_of"]
