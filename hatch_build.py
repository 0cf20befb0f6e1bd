"""Compiles the CPU library into the wheel.

SVDQUANT_BUILD_TARGETS: "host" (a wheel for this platform), the name of another platform (a wheel for that one), "all"
(one wheel with every platform's library) or "none". Unset it is "host", and without a compiler "none" with a warning.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_PACKAGE = Path("src/svdquant/kernels/cpu")


class CustomBuildHook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        asked = os.environ.get("SVDQUANT_BUILD_TARGETS", "")
        if asked == "none":
            return
        build = _load(Path(self.root, _PACKAGE, "build.py"))
        try:
            self._compile(build, asked or "host", version == "editable", build_data)
        except build.BuildError as error:
            if asked:
                raise
            self.app.display_warning(f"no CPU library in this wheel, products on a CPU will be slow: {error}")

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if hasattr(self, "_folder"):
            self._folder.cleanup()

    def _compile(self, build: ModuleType, asked: str, editable: bool, build_data: dict[str, Any]) -> None:
        if editable:
            build.build([asked])
            return
        self._folder = tempfile.TemporaryDirectory()
        libraries = build.build([asked], Path(self._folder.name))
        build_data["force_include"] |= {str(path): f"svdquant/kernels/cpu/lib/{path.name}" for path in libraries}
        if asked != "all":
            target = build.host_target() if asked == "host" else build.TARGETS[asked]
            build_data["tag"] = f"py3-none-{build.find_compiler().wheel_tag(target)}"
            build_data["pure_python"] = False


def _load(path: Path) -> ModuleType:
    """The package itself cannot be imported where it is built: torch is not there."""
    spec = importlib.util.spec_from_file_location("svdquant_build", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
