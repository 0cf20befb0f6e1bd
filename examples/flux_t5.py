"""FLUX.1-dev with a 4-bit transformer and a 4-bit T5 text encoder."""

from __future__ import annotations

from collections.abc import Sequence

from common import draw, flags, size
from PIL import Image

import svdquant
from svdquant.nunchaku.utils import get_precision

MODEL = f"nunchaku-tech/nunchaku-flux.1-dev/svdq-{get_precision()}_r32-flux.1-dev.safetensors"
BASE = "black-forest-labs/FLUX.1-dev"
T5 = "nunchaku-tech/nunchaku-t5/awq-int4-flux.1-t5xxl.safetensors"


def main(argv: Sequence[str] | None = None) -> Image.Image:
    parser = flags(__doc__, MODEL, BASE, "flux_t5.png", steps=50, guidance=3.5)
    parser.add_argument("--t5", default=T5, help="4-bit text encoder: file or Hub path")
    parser.add_argument("--prompt", default="an orchestra of robots tuning up, the conductor looks worried, film still")
    size(parser)
    args = parser.parse_args(argv)

    pipe = svdquant.load_pipeline(args.model, args.base, text_encoder_2=args.t5, device=args.device)

    return draw(pipe, args, prompt=args.prompt, guidance_scale=args.guidance, height=args.height, width=args.width)


if __name__ == "__main__":
    main()
