"""FLUX.1-schnell: text to picture in four steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from common import draw, flags, size
from diffusers import FluxPipeline
from PIL import Image

from svdquant.nunchaku import NunchakuFluxTransformer2dModel
from svdquant.nunchaku.utils import get_precision

MODEL = f"nunchaku-tech/nunchaku-flux.1-schnell/svdq-{get_precision()}_r32-flux.1-schnell.safetensors"
BASE = "black-forest-labs/FLUX.1-schnell"


def main(argv: Sequence[str] | None = None) -> Image.Image:
    parser = flags(__doc__, MODEL, BASE, "flux_schnell.png", steps=4, guidance=0.0)
    parser.add_argument("--prompt", default="a heron made of folded newspaper, standing in a puddle at dawn")
    size(parser)
    args = parser.parse_args(argv)

    transformer = NunchakuFluxTransformer2dModel.from_pretrained(args.model, device=args.device)
    pipe = FluxPipeline.from_pretrained(args.base, transformer=transformer, torch_dtype=torch.bfloat16)
    pipe.to(args.device)

    # schnell was trained with prompts of at most 256 tokens.
    return draw(
        pipe,
        args,
        prompt=args.prompt,
        guidance_scale=args.guidance,
        height=args.height,
        width=args.width,
        max_sequence_length=256,
    )


if __name__ == "__main__":
    main()
