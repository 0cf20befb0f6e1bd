"""Several LoRAs as one."""

from __future__ import annotations

from typing import Any, NoReturn

from ...models._adapters import not_yet


def compose_lora(loras: Any, output_path: str | None = None) -> NoReturn:
    """Raises `SVDQuantError`."""
    not_yet("compose_lora")
