"""FLUX.1 from a file of November 2024, which holds the transformer blocks alone; the base has the rest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from common import draw, flags, size
from PIL import Image

from svdquant.nunchaku.pipelines import flux as nunchaku_flux

MODEL = "mit-han-lab/svdquant-models/svdq-int4-flux.1-schnell.safetensors"
BASE = "black-forest-labs/FLUX.1-schnell"


def main(argv: Sequence[str] | None = None) -> Image.Image:
    parser = flags(__doc__, MODEL, BASE, "flux_2024.png", steps=4, guidance=0.0)
    parser.add_argument("--prompt", default="a tram in the rain, seen through a café window")
    size(parser)
    args = parser.parse_args(argv)

    pipe = nunchaku_flux.from_pretrained(
        args.base, torch_dtype=torch.bfloat16, qmodel_path=args.model, qmodel_device=args.device
    )
    pipe.to(args.device)

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
