"""FLUX.1-Kontext: changes a picture as the prompt says."""

from __future__ import annotations

from collections.abc import Sequence

from common import draw, flags, size
from diffusers.utils import load_image
from PIL import Image

import svdquant
from svdquant.nunchaku.utils import get_precision

MODEL = f"nunchaku-tech/nunchaku-flux.1-kontext-dev/svdq-{get_precision()}_r32-flux.1-kontext-dev.safetensors"
BASE = "black-forest-labs/FLUX.1-Kontext-dev"


def main(argv: Sequence[str] | None = None) -> Image.Image:
    parser = flags(__doc__, MODEL, BASE, "flux_kontext.png", steps=28, guidance=2.5)
    parser.add_argument("--image", required=True, help="picture to change: file or URL")
    parser.add_argument("--prompt", default="make it winter, with snow on the roofs")
    parser.add_argument("--keep-size", action="store_true", help="show the model the picture in its own size")
    size(parser)
    args = parser.parse_args(argv)

    pipe = svdquant.load_pipeline(args.model, args.base, device=args.device)

    # The pipeline keeps the proportions of height and width and fits them to an area; by default it also resizes the
    # input to the nearest of the sizes that the model was trained with, about a megapixel.
    return draw(
        pipe,
        args,
        image=load_image(args.image),
        prompt=args.prompt,
        guidance_scale=args.guidance,
        height=args.height,
        width=args.width,
        max_area=args.height * args.width,
        _auto_resize=not args.keep_size,
    )


if __name__ == "__main__":
    main()
