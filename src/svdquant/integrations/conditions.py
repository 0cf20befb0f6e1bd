"""Pictures that some pipelines draw from, next to a prompt: read from files, or made up to calibrate with."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SVDQuantError

if TYPE_CHECKING:
    from PIL.Image import Image

# Names of pipelines that cannot draw without a picture, and of those that are not meant to; their calls do not say it.
_NEEDED = re.compile(r"Fill|Inpaint|Control|Edit|Img2Img|ImageToVideo|Image2Video|Upscale|Depth2Img|Pix2Pix")
_MEANT = re.compile(r"Kontext")
_PICTURES, _MASKS = ("image", "control_image"), ("mask_image",)
_MADE_UP_SIDE = 1024


def picture_arguments(cls: type) -> list[str]:
    """Arguments for pictures that a pipeline of this class is made to be called with; none for text to picture."""
    known = inspect.signature(cls.__call__).parameters
    meant = _cannot_without(cls) or bool(_MEANT.search(cls.__name__))
    return [name for name in (*_PICTURES, *_MASKS) if name in known and meant]


def _cannot_without(cls: type) -> bool:
    image = inspect.signature(cls.__call__).parameters.get("image")
    required = image is not None and image.default is inspect.Parameter.empty
    return required or bool(_NEEDED.search(cls.__name__))


def check_pictures(cls: type, image: str | None, mask_image: str | None, given: dict[str, Any]) -> None:
    """Raises `SVDQuantError` where a pipeline of this class lacks a picture, or takes none.

    image, mask_image: files; given: arguments from elsewhere.
    """
    known = inspect.signature(cls.__call__).parameters
    for flag, value, names in (("--image", image, _PICTURES), ("--mask-image", mask_image, _MASKS)):
        if value is not None and not any(name in known for name in names):
            raise SVDQuantError(f"{cls.__name__} takes no {flag[2:].replace('-', '_')}; leave {flag} out")
        missing = [name for name in picture_arguments(cls) if name in names and name not in given]
        if value is None and missing and _cannot_without(cls):
            raise SVDQuantError(f"{cls.__name__} draws from a picture ({missing[0]}); name a file by {flag}")


def read_pictures(cls: type, image: str | None, mask_image: str | None) -> dict[str, Any]:
    """Arguments of the call from the files given. Raises `SVDQuantError` for what is no picture."""
    known = inspect.signature(cls.__call__).parameters
    arguments: dict[str, Any] = {}
    for file, names, mode in ((image, _PICTURES, "RGB"), (mask_image, _MASKS, "L")):
        if file is not None:
            # Where a pipeline is made for a picture and a control picture, the same goes to both.
            chosen = [name for name in picture_arguments(cls) if name in names]
            chosen = chosen or [name for name in names if name in known][:1]
            arguments |= dict.fromkeys(chosen, read_picture(Path(file), mode))
    return arguments


def read_picture(file: Path, mode: str = "RGB") -> Image:
    """The picture the way up that it is looked at. Raises `SVDQuantError` where it cannot be read."""
    from PIL import Image as images
    from PIL import ImageOps

    try:
        with images.open(file) as picture:
            return ImageOps.exif_transpose(picture).convert(mode)
    # Pillow's decoders raise of many kinds for damaged files.
    except (OSError, SyntaxError, ValueError, images.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or "no picture that Pillow can read"
        raise SVDQuantError(f"{file}: cannot be read ({reason}); give a PNG, JPEG or WebP file") from error


def made_up_pictures(cls: type, seed: int, width: int | None, height: int | None) -> dict[str, Any]:
    """A picture for every argument that `picture_arguments` names; a mask is white in its middle."""
    size = (width or _MADE_UP_SIDE, height or _MADE_UP_SIDE)
    return {name: _mask(size) if name in _MASKS else _noise(seed, size) for name in picture_arguments(cls)}


def _noise(seed: int, size: tuple[int, int]) -> Image:
    """Coloured noise with the spectrum of photographs: amplitudes fall with the frequency."""
    import numpy as np
    from PIL import Image as images

    width, height = size
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    frequency[0, 0] = np.inf
    white = np.random.default_rng(seed).standard_normal((height, width, 3))
    noise = np.fft.ifft2(np.fft.fft2(white, axes=(0, 1)) / frequency[..., None], axes=(0, 1)).real
    levels = 0.5 + 0.2 * noise / max(float(noise.std()), 1e-9)
    return images.fromarray((levels.clip(0, 1) * 255).round().astype(np.uint8))


def _mask(size: tuple[int, int]) -> Image:
    from PIL import Image as images

    width, height = size
    mask = images.new("L", size)
    mask.paste(255, (width // 4, height // 4, width - width // 4, height - height // 4))
    return mask
