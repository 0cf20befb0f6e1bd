"""FLUX.1-Fill: paints what is white in a mask anew."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from common import draw, flags, multiple_of_16
from diffusers import FluxFillPipeline
from diffusers.utils import load_image
from PIL import Image

from svdquant.nunchaku import NunchakuFluxTransformer2dModel
from svdquant.nunchaku.utils import get_precision

MODEL = f"nunchaku-tech/nunchaku-flux.1-fill-dev/svdq-{get_precision()}_r32-flux.1-fill-dev.safetensors"
BASE = "black-forest-labs/FLUX.1-Fill-dev"


def main(argv: Sequence[str] | None = None) -> Image.Image:
    parser = flags(__doc__, MODEL, BASE, "flux_fill.png", steps=50, guidance=30.0)
    parser.add_argument("--image", required=True, help="picture: file or URL")
    parser.add_argument("--mask", required=True, help="of the picture's size, white where it is to be painted")
    parser.add_argument("--prompt", default="a brass telescope on the window sill", help="what to paint there")
    args = parser.parse_args(argv)

    transformer = NunchakuFluxTransformer2dModel.from_pretrained(args.model, device=args.device)
    pipe = FluxFillPipeline.from_pretrained(args.base, transformer=transformer, torch_dtype=torch.bfloat16)
    pipe.to(args.device)

    image, mask = load_image(args.image), load_image(args.mask)
    return draw(
        pipe,
        args,
        prompt=args.prompt,
        image=image,
        mask_image=mask,
        guidance_scale=args.guidance,
        **multiple_of_16(image),
    )


if __name__ == "__main__":
    main()
