"""What a run on a GPU is asked to do, and the two sizes of it: FLUX.1's, and one that a CPU's interpreter bears."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ...errors import SVDQuantError
from ..cases import Shape
from ..settings import Progress, silent

# In order of importance, each with its weight where the budget is shared out.
SECTIONS: dict[str, float] = {
    "checks": 3.0,
    "ceilings": 0.3,
    "layers": 3.0,
    "step": 5.0,
    "costs": 1.0,
    "repeats": 0.7,
    "tuning": 3.0,
}
# Run by default. Tuning compares configurations of one kernel, for those who work on it.
USUAL = tuple(name for name in SECTIONS if name != "tuning")


def choose_sections(text: str | None) -> tuple[str, ...]:
    """Sections by names joined by commas, in the suite's order; None: all but tuning. Raises `SVDQuantError`."""
    if text is None:
        return USUAL
    wanted = [part.strip() for part in text.split(",") if part.strip()]
    unknown = [name for name in wanted if name not in SECTIONS]
    if unknown or not wanted:
        raise SVDQuantError(f"--only {text!r} is not some of {', '.join(SECTIONS)}, joined by commas")
    return tuple(name for name in SECTIONS if name in wanted)


@dataclass(frozen=True)
class Picture:
    """What one step works on. side: pixels, for the name; image, text: tokens."""

    side: int
    batch: int
    image: int
    text: int = 512

    def __str__(self) -> str:
        return f"{self.side}×{self.side}, batch {self.batch}"


@dataclass(frozen=True)
class Scale:
    """Sizes of everything.

    weights: per shape, how often a step of FLUX.1-dev multiplies by such a weight (q, k and v as one). flux: what
    differs from `FluxTransformer2DModel`'s default configuration, which is FLUX.1-dev's but for the guidance.
    """

    layers: tuple[tuple[int, int], ...]
    weights: tuple[int, ...]
    rows: tuple[int, ...]
    weight_only: Shape
    pictures: tuple[Picture, ...]
    flux: dict[str, object]
    copy_bytes: int
    matmul: int
    ragged: tuple[tuple[int, int, int], ...]
    invariant_rows: tuple[int, ...]
    repeats: int
    # How many of `ours.PRECISIONS` are checked, and how many of those are timed.
    checked: int = 8
    timed: int = 6
    rank: int = 32
    ranks: tuple[int, ...] = (0, 32, 128)
    adapter: int = 16

    @property
    def shapes(self) -> list[Shape]:
        return [Shape(m, k, n) for m in self.rows for k, n in self.layers]


FULL = Scale(
    layers=((3072, 3072), (3072, 9216), (3072, 12288), (12288, 3072), (15360, 3072)),
    weights=(19, 57, 57, 19, 38),
    rows=(4608, 1536),
    weight_only=Shape(1, 3072, 18432),
    pictures=(Picture(1024, 1, 4096), Picture(1024, 4, 4096), Picture(512, 1, 1024), Picture(2048, 1, 16384)),
    flux={"guidance_embeds": True},
    copy_bytes=4 << 30,
    matmul=8192,
    ragged=((1, 384, 320), (77, 448, 320), (300, 1152, 200)),
    invariant_rows=(1, 17, 4608),
    repeats=100,
)
SMOKE = Scale(
    layers=((128, 64),),
    weights=(1,),
    rows=(24,),
    weight_only=Shape(1, 128, 64),
    pictures=(Picture(64, 1, 16, 8),),
    flux={
        "guidance_embeds": True,
        "num_layers": 1,
        "num_single_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 64,
        "joint_attention_dim": 64,
        "pooled_projection_dim": 32,
        "in_channels": 16,
        "axes_dims_rope": (8, 28, 28),
    },
    copy_bytes=1 << 20,
    matmul=64,
    ragged=((5, 160, 48),),
    invariant_rows=(1,),
    repeats=1,
    checked=3,
    timed=3,
    rank=16,
    ranks=(0, 16),
)


@dataclass
class GPUSettings:
    """budget: seconds for everything, from the start. blocks: (double, single) of the transformer instead of all.

    smoke: tiny sizes, few rounds, compiled by nothing. save: called with the results after every section.
    """

    sections: tuple[str, ...] = USUAL
    budget: float = 3600.0
    smoke: bool = False
    blocks: tuple[int, int] | None = None
    rounds: int = 9
    progress: Progress = silent
    save: Callable[..., object] | None = field(default=None, repr=False)

    @property
    def scale(self) -> Scale:
        return SMOKE if self.smoke else FULL

    @property
    def sample_seconds(self) -> float:
        return 0.0 if self.smoke else 0.02
