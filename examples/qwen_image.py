"""Qwen-Image: text to picture, with lettering."""

from __future__ import annotations

from collections.abc import Sequence

from common import draw, flags, size
from PIL import Image

import svdquant
from svdquant.nunchaku.utils import get_precision

MODEL = f"nunchaku-tech/nunchaku-qwen-image/svdq-{get_precision()}_r32-qwen-image.safetensors"
BASE = "Qwen/Qwen-Image"


def main(argv: Sequence[str] | None = None) -> Image.Image:
    parser = flags(__doc__, MODEL, BASE, "qwen_image.png", steps=50, guidance=4.0)
    parser.add_argument("--prompt", default='a bookshop window with a hand-painted sign "OPEN UNTIL LATE", dusk')
    parser.add_argument("--negative-prompt", default=" ")
    size(parser, height=928, width=1664)
    args = parser.parse_args(argv)

    pipe = svdquant.load_pipeline(args.model, args.base, device=args.device)

    # Guidance here is the classifier-free kind: two forwards a step, with and without the prompt.
    return draw(
        pipe,
        args,
        prompt=args.prompt,
        negative_prompt=args.negative_prompt,
        true_cfg_scale=args.guidance,
        height=args.height,
        width=args.width,
    )


if __name__ == "__main__":
    main()
