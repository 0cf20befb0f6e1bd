"""LoRA methods of the FLUX transformer: one adapter, or several composed into one, at one strength."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ...errors import SVDQuantError

# Beside others that were loaded by diffusers' own calls.
_NAME = "nunchaku"


class AdapterMethods:
    """Nunchaku's three, on top of the adapters that every quantized model has."""

    def update_lora_params(self, path_or_state_dict: str | Path | dict[str, Tensor]) -> None:
        """Loads an adapter at strength 1 in place of the one that this method loaded before.

        path_or_state_dict: a file, a Hub path ("owner/name/file.safetensors") or tensors, in any format. Raises
        `SVDQuantError` where it fits nothing; the former adapter is then gone.
        """
        from ...integrations.adapters import load_adapter
        from ._hub_files import adapter_file

        self.reset_lora()
        source = path_or_state_dict if isinstance(path_or_state_dict, dict) else adapter_file(path_or_state_dict)
        load_adapter(self, source, name=_NAME)

    def set_lora_strength(self, strength: float = 1.0) -> None:
        """How strongly the adapter acts; of a composed one, on top of the strengths it was composed with."""
        if _NAME not in getattr(self, "peft_config", {}):
            raise SVDQuantError("no LoRA is loaded; call update_lora_params first")
        from ...integrations.adapters import set_strength

        set_strength(self, _NAME, strength)

    def reset_lora(self) -> None:
        """Takes out what `update_lora_params` loaded, and narrows an embedder again that it has widened."""
        from ...integrations.adapters import remove_adapter

        remove_adapter(self, _NAME)

    def reset_x_embedder(self) -> None:
        """What `reset_lora` does to the embedder."""
        self.reset_lora()
