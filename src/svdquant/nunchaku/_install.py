"""`import nunchaku` as another name of `svdquant.nunchaku`."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

from ..errors import SVDQuantError

ALIAS = "nunchaku"
_PACKAGE = __name__.rpartition(".")[0]


class _AliasLoader(importlib.abc.Loader):
    """Hands out the module that exists under its own name, and leaves that module's `__spec__` as it was."""

    def __init__(self, real_name: str) -> None:
        self._real_name = real_name
        self._spec: importlib.machinery.ModuleSpec | None = None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = importlib.import_module(self._real_name)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        # The import system has just put the alias' spec here.
        module.__spec__ = self._spec


class _AliasFinder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not _below_alias(fullname):
            return None
        real_name = _PACKAGE + fullname[len(ALIAS) :]
        try:
            real = importlib.util.find_spec(real_name)
        except ModuleNotFoundError:
            real = None
        if real is None:
            return None
        return importlib.machinery.ModuleSpec(
            fullname, _AliasLoader(real_name), is_package=real.submodule_search_locations is not None
        )


def install() -> None:
    """From here on, `import nunchaku` and everything below it give the modules of `svdquant.nunchaku`. Idempotent.

    A nunchaku that is installed but not imported is hidden. Raises `SVDQuantError` where another one is imported.
    """
    if _foreign():
        raise SVDQuantError(
            "another nunchaku is imported already; call svdquant.nunchaku.install() before the first import of nunchaku"
        )
    if not any(isinstance(finder, _AliasFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AliasFinder())


def uninstall() -> None:
    """Undoes `install`; modules that scripts hold stay usable. Idempotent."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _AliasFinder)]
    if not _foreign():
        for name in [name for name in sys.modules if _below_alias(name)]:
            del sys.modules[name]


def _below_alias(name: str) -> bool:
    return name == ALIAS or name.startswith(f"{ALIAS}.")


def _foreign() -> bool:
    module = sys.modules.get(ALIAS)
    return module is not None and module is not sys.modules.get(_PACKAGE)
