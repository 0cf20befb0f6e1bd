"""LoRA methods of the FLUX transformer."""

from __future__ import annotations

from typing import Any, NoReturn

from ...errors import SVDQuantError


def not_yet(name: str) -> NoReturn:
    raise SVDQuantError(
        f"{name} comes with adapters, which this version does not have yet; draw without the LoRA, or fuse it into the "
        "16-bit model before quantizing"
    )


class AdapterMethods:
    """Each raises `SVDQuantError`."""

    def update_lora_params(self, path_or_state_dict: Any) -> NoReturn:
        not_yet("update_lora_params")

    def set_lora_strength(self, strength: float = 1.0) -> NoReturn:
        not_yet("set_lora_strength")

    def reset_lora(self) -> NoReturn:
        not_yet("reset_lora")
