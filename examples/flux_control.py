"""FLUX.1-Depth and FLUX.1-Canny: a picture with the depths or the edges of another."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import torch
from common import draw, flags, multiple_of_16
from diffusers import FluxControlPipeline
from diffusers.utils import load_image
from PIL import Image

from svdquant.nunchaku import NunchakuFluxTransformer2dModel
from svdquant.nunchaku.utils import get_precision

MODEL = f"nunchaku-tech/nunchaku-flux.1-KIND-dev/svdq-{get_precision()}_r32-flux.1-KIND-dev.safetensors"
BASE = "black-forest-labs/FLUX.1-Kind-dev"
DEPTH_MODEL = "LiheYoung/depth-anything-large-hf"


def main(argv: Sequence[str] | None = None) -> Image.Image:
    args = parse(argv)
    transformer = NunchakuFluxTransformer2dModel.from_pretrained(args.model, device=args.device)
    pipe = FluxControlPipeline.from_pretrained(args.base, transformer=transformer, torch_dtype=torch.bfloat16)
    pipe.to(args.device)

    picture = load_image(args.image)
    if args.ready:
        control = picture
    else:
        control = depth(picture, args.depth_model, args.device) if args.kind == "depth" else edges(picture)
    return draw(
        pipe,
        args,
        prompt=args.prompt,
        control_image=control,
        guidance_scale=args.guidance,
        **multiple_of_16(picture),
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = flags(__doc__, MODEL, BASE, "flux_control.png", steps=30, guidance=10.0)
    parser.add_argument("kind", choices=("depth", "canny"))
    parser.add_argument("--image", required=True, help="picture to follow: file or URL")
    parser.add_argument("--ready", action="store_true", help="the picture is a depth or edge map already")
    parser.add_argument("--depth-model", default=DEPTH_MODEL)
    parser.add_argument("--prompt", default="a lighthouse keeper's kitchen, oil painting, evening light")
    args = parser.parse_args(argv)
    if args.model == MODEL:
        args.model = MODEL.replace("KIND", args.kind)
    if args.base == BASE:
        args.base = BASE.replace("Kind", args.kind.title())
    return args


def depth(picture: Image.Image, model: str, device: str) -> Image.Image:
    """Near is bright."""
    from transformers import pipeline

    estimate = pipeline("depth-estimation", model=model, device=device)
    return estimate(picture)["depth"].convert("RGB")


def edges(picture: Image.Image, low: float = 50.0, high: float = 100.0) -> Image.Image:
    """Edges one pixel wide, white on black.

    A pixel belongs to one where the brightness is steepest across it, if it rises there by more than `high` (of 255),
    or by more than `low` and the pixel touches another of the edge.
    """
    grey = np.asarray(picture.convert("L"), dtype=np.float32)
    grey = _filter(grey, [1, 4, 6, 4, 1], [1, 4, 6, 4, 1]) / 256
    dx, dy = _filter(grey, [1, 2, 1], [-1, 0, 1]) / 4, _filter(grey, [-1, 0, 1], [1, 2, 1]) / 4
    steepness = np.hypot(dx, dy)
    # The neighbours before and behind in one of four directions, whichever is nearest to the slope's.
    sector = np.round(np.arctan2(dy, dx) / (np.pi / 4)).astype(int) % 4
    padded = np.pad(steepness, 1)
    ridge = np.zeros(steepness.shape, bool)
    for number, (down, right) in enumerate(((0, 1), (1, 1), (1, 0), (1, -1))):
        ahead, behind = _moved(padded, down, right), _moved(padded, -down, -right)
        ridge |= (sector == number) & (steepness >= ahead) & (steepness > behind)
    weak, edge = ridge & (steepness > low), ridge & (steepness > high)
    while True:
        around = np.pad(edge, 1)
        grown = weak & np.any([_moved(around, y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)], axis=0)
        if (grown == edge).all():
            return Image.fromarray((edge * 255).astype(np.uint8)).convert("RGB")
        edge = grown


def _filter(image: np.ndarray, down: list[int], right: list[int]) -> np.ndarray:
    """Correlates with the outer product of two odd kernels; the border is repeated."""
    rows, columns = image.shape
    padded = np.pad(image, ((len(down) // 2,) * 2, (len(right) // 2,) * 2), mode="edge")
    padded = sum(weight * padded[i : i + rows] for i, weight in enumerate(down))
    return sum(weight * padded[:, i : i + columns] for i, weight in enumerate(right))


def _moved(padded: np.ndarray, down: int, right: int) -> np.ndarray:
    """What lies `down` and `right` of each pixel of an image that was padded by one."""
    rows, columns = padded.shape
    return padded[1 + down : rows - 1 + down, 1 + right : columns - 1 + right]


if __name__ == "__main__":
    main()
