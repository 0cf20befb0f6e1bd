"""What a denoiser's configuration, and the documentation of its `forward`, tell about the shapes of its inputs."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

FRAMES, SIDE, TEXT = 1, 4, 8
TOKENS = FRAMES * SIDE * SIDE

_LINES = re.DOTALL | re.MULTILINE
# Words of a documented shape → axis: batch, channels, frames, rows, columns, tokens.
_AXES = (
    ("N", r"b|batch(_size)?"),
    ("C", r"c|\w*channels|dim|in_dim"),
    ("F", r"f|t|(num_)?(latent_)?frames"),
    ("H", r"h|(latent_)?height"),
    ("W", r"w|(latent_)?width"),
    ("L", r"l|s|\w*(len|length|tokens)|sample_size"),
)


class Shapes:
    """parameters: those that `forward` takes, by name."""

    def __init__(self, model: nn.Module, parameters: Mapping[str, inspect.Parameter]) -> None:
        config: Any = model.config
        self.config: dict[str, Any] = dict(config)
        self.model, self.parameters = model, set(parameters)
        self.required = {name for name, parameter in parameters.items() if parameter.default is parameter.empty}
        self.kinds = {name: parameter.annotation for name, parameter in parameters.items()}
        patch = self.config.get("patch_size")
        sizes = list(patch) if isinstance(patch, (tuple, list)) else [patch or 1]
        self.patch = int(sizes[-1])
        self.patch_t = int(sizes[0]) if len(sizes) == 3 else int(self.config.get("patch_size_t") or 1)
        self.patch_volume = math.prod(int(size) for size in sizes)

    def widths(self, *patterns: str) -> list[int]:
        """Whole numbers of the configuration whose names match, those of the first pattern first, once each."""
        found: dict[int, None] = {}
        for pattern in patterns:
            for key, value in self.config.items():
                for one in value if isinstance(value, (tuple, list)) else (value,):
                    if re.search(pattern, key) and isinstance(one, int) and not isinstance(one, bool) and one > 0:
                        found[one] = None
        return list(found)

    @property
    def side(self) -> int:
        """Of the latents, in their own pixels: twice as long where attention is in blocks of 8×8 patches."""
        blocks = "nabla_window" in self.config and "visual_rope_pos" not in self.parameters
        return (2 if blocks else 1) * SIDE * self.patch

    @property
    def frames(self) -> int:
        """Of the latents: one more where the first is a picture of reference, and a pose comes with the others."""
        return (FRAMES + ("pose_hidden_states" in self.parameters)) * self.patch_t

    @property
    def context_channels(self) -> int:
        """Of latents that a forward has to be given besides the noise, and joins with it; 0 for none."""
        if not self.required & {"context_latents", "condition_latents"}:
            return 0
        whole, own = self.widths("^in_channels$", "^in_dim$"), self.widths("^out_dim$", "^out_channels$", "acoustic")
        return whole[0] - own[0] if whole and own and whole[0] > own[0] else 0

    def layouts(self) -> tuple[str, ...]:
        """Orders of batch, channels, frames, rows and columns, or of batch, channels and tokens, likeliest first."""
        documented = self._documented("hidden_states") or self._documented("sample")
        return tuple(dict.fromkeys((*([documented] if documented else []), *self._usual_layouts())))

    def _usual_layouts(self) -> tuple[str, ...]:
        name = type(self.model).__name__
        if "1D" in name:
            return ("NLC", "NCL", "NCHW")
        if self.parameters & {"img_ids", "img_shapes", "height", "target_timestep"}:
            return ("NLC", "NCHW", "NCFHW")
        if "Temporal" in name or "VGen" in name:
            return ("NFCHW", "NCFHW", "NCHW")
        if "3D" in name or "Video" in name or "Motion" in name or self.patch_t > 1:
            return ("NCFHW", "NFCHW", "NLC", "NFHWC", "NCHW")
        return ("NCHW", "NCFHW", "NLC", "NFHWC")

    def _documented(self, name: str) -> str:
        """The order of axes that the documentation of `forward` gives this parameter; "" where it gives none."""
        text = inspect.getdoc(type(self.model).forward) or ""
        # "name (`torch.Tensor` of shape `(batch_size, …)`)", or a line later, before the next parameter.
        between = r"((?!\n\s*\w+ \().){0,160}?shape[\s`]*"
        shape = re.search(rf"^\s*{name}\b{between}\((?P<axes>[\w\s,*+]+)\)", text, _LINES)
        if shape is None:
            return ""
        words = [word.strip(" `\n").lower() for word in shape["axes"].split(",")]
        axes = [next((axis for axis, pattern in _AXES if re.fullmatch(pattern, word)), "") for word in words]
        order = "".join(axes)
        return order if all(axes) and len(set(order)) == len(order) and {"N", "C"} < set(order) else ""


Maker = Callable[[Shapes], Iterator[Any]]


def meta(*shape: int) -> Tensor:
    return torch.zeros(shape, device="meta")
