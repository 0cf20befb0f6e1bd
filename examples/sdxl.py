"""Stable Diffusion XL: text to picture with a 4-bit UNet."""

from __future__ import annotations

from collections.abc import Sequence

from common import draw, flags, size
from PIL import Image

import svdquant

MODEL = "nunchaku-tech/nunchaku-sdxl/svdq-int4_r32-sdxl.safetensors"
BASE = "stabilityai/stable-diffusion-xl-base-1.0"


def main(argv: Sequence[str] | None = None) -> Image.Image:
    parser = flags(__doc__, MODEL, BASE, "sdxl.png", steps=50, guidance=5.0)
    parser.add_argument("--prompt", default="a greenhouse on the moon, tomatoes in the foreground, photograph")
    size(parser)
    args = parser.parse_args(argv)

    pipe = svdquant.load_pipeline(args.model, args.base, device=args.device)

    return draw(pipe, args, prompt=args.prompt, guidance_scale=args.guidance, height=args.height, width=args.width)


if __name__ == "__main__":
    main()
