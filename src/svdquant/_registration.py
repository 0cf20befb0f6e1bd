"""Registers "svdquant" with diffusers, transformers and PEFT without importing them.

Two keep their quantizers in dictionaries of a module `quantizers.auto`, PEFT and diffusers choose and load LoRA layers
in functions of a module. A finder on `sys.meta_path` lets those modules load as usual and then adds our entries; where
they are loaded already, these are added at once.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

_TARGETS = {
    "diffusers.quantizers.auto": "svdquant.integrations.diffusers",
    "transformers.quantizers.auto": "svdquant.integrations.transformers",
    "peft.tuners.lora.model": "svdquant.integrations.peft",
    "diffusers.loaders.peft": "svdquant.integrations.lora_loading",
    "diffusers.loaders.lora_pipeline": "svdquant.integrations.lora_loading",
}


class _RegisteringLoader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader, integration: str) -> None:
        self._loader = loader
        self._integration = integration

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        integration = importlib.import_module(self._integration)
        # An integration that is imported first is what loads this module; it registers itself once it is complete.
        if hasattr(integration, "register"):
            integration.register(module)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _TARGETS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader, _TARGETS[fullname])
        return spec


def install() -> None:
    """Idempotent."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for name, integration in _TARGETS.items():
        if name in sys.modules:
            importlib.import_module(integration).register(sys.modules[name])
