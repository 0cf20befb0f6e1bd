"""FLUX.1-Redux: variations of a picture. The prior turns the picture into prompt embeddings for FLUX.1-dev."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from common import draw, flags, size
from diffusers import FluxPriorReduxPipeline
from diffusers.utils import load_image
from PIL import Image

import svdquant
from svdquant.nunchaku.utils import get_precision

MODEL = f"nunchaku-tech/nunchaku-flux.1-dev/svdq-{get_precision()}_r32-flux.1-dev.safetensors"
BASE = "black-forest-labs/FLUX.1-dev"
PRIOR = "black-forest-labs/FLUX.1-Redux-dev"
TEXT = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")


def main(argv: Sequence[str] | None = None) -> Image.Image:
    parser = flags(__doc__, MODEL, BASE, "flux_redux.png", steps=50, guidance=2.5)
    parser.add_argument("--prior", default=PRIOR, help="pipeline folder or Hub id")
    parser.add_argument("--image", required=True, help="picture to vary: file or URL")
    parser.add_argument("--prompt", help="mixed with the picture; without one, no text encoder is loaded")
    size(parser)
    args = parser.parse_args(argv)

    unused = {} if args.prompt else dict.fromkeys(TEXT)
    pipe = svdquant.load_pipeline(args.model, args.base, device=args.device, **unused)
    text = {name: getattr(pipe, name) for name in TEXT}
    prior = FluxPriorReduxPipeline.from_pretrained(args.prior, torch_dtype=torch.bfloat16, **text).to(args.device)

    embeddings = prior(load_image(args.image), prompt=args.prompt)
    return draw(pipe, args, guidance_scale=args.guidance, height=args.height, width=args.width, **embeddings)


if __name__ == "__main__":
    main()
