"""Several LoRAs as one."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ....errors import SVDQuantError

_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"


def compose_lora(
    loras: list[tuple[str | Path | dict[str, Tensor], float]], output_path: str | Path | None = None
) -> dict[str, Tensor]:
    """One adapter that does what `loras`, pairs of file (or tensors) and strength, do together; in diffusers' names.

    Its rank is the sum of theirs; strengths are multiplied into the up-projections. output_path: a .safetensors file
    to be written as well. Raises `SVDQuantError` for an adapter that changes more than linears.
    """
    downs: dict[str, list[Tensor]] = {}
    ups: dict[str, list[Tensor]] = {}
    for source, strength in loras:
        for module, (down, up) in _pairs(source).items():
            first = downs.get(module, [down])[0]
            if down.shape[1] != first.shape[1]:
                raise SVDQuantError(
                    f"{module}: adapters of {first.shape[1]} and of {down.shape[1]} input channels are for different "
                    "models and cannot be composed"
                )
            downs.setdefault(module, []).append(down)
            ups.setdefault(module, []).append((up.float() * strength).to(up.dtype))
    composed = {}
    for module in downs:
        composed[f"{module}{_DOWN}"] = torch.cat(downs[module]).contiguous()
        composed[f"{module}{_UP}"] = torch.cat(ups[module], 1).contiguous()
    if output_path is not None:
        from safetensors.torch import save_file

        Path(output_path).parent.mkdir(parents=True, exist_ok=True)
        save_file(composed, output_path, metadata={"format": "pt"})
    return composed


def _pairs(source: str | Path | dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Module in diffusers' names → (A, B), with alpha in B."""
    from diffusers.loaders.lora_pipeline import FluxLoraLoaderMixin

    from ....integrations.adapter_formats import kind_of, to_lora
    from ....integrations.lora_loading import fetch_state
    from ...models._hub_files import adapter_file

    what = "the tensors given" if isinstance(source, dict) else str(source)
    state = dict(source) if isinstance(source, dict) else fetch_state(str(adapter_file(source)))[0]
    if kind_of(state) == "nunchaku":
        raise SVDQuantError(f"{what}: was converted for one checkpoint and cannot be composed; take the original LoRA")
    state, alphas = FluxLoraLoaderMixin.lora_state_dict(to_lora(state).state, return_alphas=True)
    pairs = {}
    for key in state:
        module, found, _ = key.partition(_DOWN)
        if not found:
            if not key.endswith(_UP):
                raise SVDQuantError(f"{what}: {key} is no part of a LoRA of a linear and cannot be composed")
            continue
        down, up = state[key], state[f"{module}{_UP}"]
        alpha = (alphas or {}).get(f"{module}.alpha")
        if alpha is not None:
            up = (up.float() * (float(alpha) / down.shape[0])).to(up.dtype)
        pairs[module] = (down, up)
    return pairs
