"""Z-Image-Turbo: text to picture in eight forwards."""

from __future__ import annotations

from collections.abc import Sequence

from common import draw, flags, size
from PIL import Image

import svdquant
from svdquant.nunchaku.utils import get_precision

MODEL = f"nunchaku-tech/nunchaku-z-image-turbo/svdq-{get_precision()}_r32-z-image-turbo.safetensors"
BASE = "Tongyi-MAI/Z-Image-Turbo"


def main(argv: Sequence[str] | None = None) -> Image.Image:
    # Nine steps: the last one moves nothing, so the transformer works eight times.
    parser = flags(__doc__, MODEL, BASE, "z_image.png", steps=9, guidance=0.0)
    parser.add_argument("--prompt", default="a paper theatre stage with a dragon and a very small knight")
    size(parser)
    args = parser.parse_args(argv)

    pipe = svdquant.load_pipeline(args.model, args.base, device=args.device)

    return draw(pipe, args, prompt=args.prompt, guidance_scale=args.guidance, height=args.height, width=args.width)


if __name__ == "__main__":
    main()
