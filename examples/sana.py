"""SANA 1.6B: text to picture with linear attention."""

from __future__ import annotations

from collections.abc import Sequence

from common import draw, flags, size
from PIL import Image

import svdquant

MODEL = "nunchaku-tech/nunchaku-sana/svdq-int4_r32-sana1.6b.safetensors"
BASE = "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers"


def main(argv: Sequence[str] | None = None) -> Image.Image:
    parser = flags(__doc__, MODEL, BASE, "sana.png", steps=20, guidance=4.5)
    parser.add_argument("--prompt", default="a fox reading a map in a birch forest, watercolour")
    size(parser)
    args = parser.parse_args(argv)

    pipe = svdquant.load_pipeline(args.model, args.base, device=args.device)

    # Without binning the size is the one asked for, not the nearest that the model was trained with.
    return draw(
        pipe,
        args,
        prompt=args.prompt,
        guidance_scale=args.guidance,
        height=args.height,
        width=args.width,
        use_resolution_binning=False,
    )


if __name__ == "__main__":
    main()
