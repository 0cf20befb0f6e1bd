"""`import nunchaku` by another name: same modules, nothing heavy, and back again. Each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parents[2] / "src"
PATHS = {
    "nunchaku": (
        "NunchakuFluxTransformer2dModel",
        "NunchakuFluxTransformer2DModelV2",
        "NunchakuSanaTransformer2DModel",
        "NunchakuQwenImageTransformer2DModel",
        "NunchakuZImageTransformer2DModel",
        "NunchakuT5EncoderModel",
        "NunchakuSDXLUNet2DConditionModel",
    ),
    "nunchaku.models": ("NunchakuFluxTransformer2dModel", "NunchakuT5EncoderModel"),
    "nunchaku.models.transformer_flux": ("NunchakuFluxTransformer2dModel",),
    "nunchaku.models.transformer_sana": ("NunchakuSanaTransformer2DModel",),
    "nunchaku.models.transformers": (
        "NunchakuFluxTransformer2dModel",
        "NunchakuFluxTransformer2DModelV2",
        "NunchakuSanaTransformer2DModel",
        "NunchakuQwenImageTransformer2DModel",
        "NunchakuZImageTransformer2DModel",
    ),
    "nunchaku.models.transformers.transformer_flux": ("NunchakuFluxTransformer2dModel",),
    "nunchaku.models.transformers.transformer_flux_v2": ("NunchakuFluxTransformer2DModelV2",),
    "nunchaku.models.transformers.transformer_sana": ("NunchakuSanaTransformer2DModel",),
    "nunchaku.models.transformers.transformer_qwenimage": ("NunchakuQwenImageTransformer2DModel",),
    "nunchaku.models.transformers.transformer_zimage": ("NunchakuZImageTransformer2DModel",),
    "nunchaku.models.unets.unet_sdxl": ("NunchakuSDXLUNet2DConditionModel",),
    "nunchaku.models.text_encoders.t5_encoder": ("NunchakuT5EncoderModel",),
    "nunchaku.pipelines": ("flux",),
    "nunchaku.pipelines.flux": ("from_pretrained",),
    "nunchaku.pipeline.pipeline_qwenimage": ("NunchakuQwenImagePipeline",),
    "nunchaku.utils": ("get_precision", "is_turing", "get_gpu_memory", "check_hardware_compatibility"),
    "nunchaku.caching.diffusers_adapters": ("apply_cache_on_pipe",),
    "nunchaku.caching.diffusers_adapters.flux": ("apply_cache_on_pipe", "apply_cache_on_transformer"),
    "nunchaku.caching.diffusers_adapters.flux_v2": ("apply_cache_on_pipe", "apply_cache_on_transformer"),
    "nunchaku.caching.diffusers_adapters.sana": ("apply_cache_on_pipe", "apply_cache_on_transformer"),
    "nunchaku.lora.flux.compose": ("compose_lora",),
    "nunchaku.lora.flux": ("compose_lora",),
}


def run(code: str, folder: Path) -> str:
    """The output of a script, run where no other module is in reach."""
    script = folder / "script.py"
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(SRC), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def imports(root: str) -> str:
    return "\n".join(
        f"from {root}{path.removeprefix('nunchaku')} import {', '.join(names)}" for path, names in PATHS.items()
    )


def test_scripts_with_the_import_line_changed(tmp_path: Path) -> None:
    run(imports("svdquant.nunchaku"), tmp_path)


def test_scripts_unchanged(tmp_path: Path) -> None:
    check = """
import sys, svdquant.nunchaku, nunchaku, nunchaku.pipelines.flux
assert nunchaku is svdquant.nunchaku and nunchaku.pipelines.flux is svdquant.nunchaku.pipelines.flux
for name, module in list(sys.modules.items()):
    if name == "nunchaku" or name.startswith("nunchaku."):
        assert module is sys.modules["svdquant." + name], name
        assert module.__spec__.name == module.__name__ == "svdquant." + name, name
        assert module.__loader__ is module.__spec__.loader
from nunchaku.models.transformers.transformer_flux import NunchakuFluxTransformer2dModel as a
from svdquant.nunchaku import NunchakuFluxTransformer2dModel as b
assert a is b
import importlib
importlib.reload(svdquant.nunchaku.utils)
"""
    install = "from svdquant.nunchaku import install\ninstall()\ninstall()\n"
    finders = "import sys\nassert sum(type(f).__name__ == '_AliasFinder' for f in sys.meta_path) == 1\n"
    run(install + imports("nunchaku") + "\n" + finders + check, tmp_path)


def test_uninstall(tmp_path: Path) -> None:
    code = """
import sys
from svdquant.nunchaku import install, uninstall
uninstall()
install()
from nunchaku import NunchakuFluxTransformer2dModel
from nunchaku.utils import get_precision
uninstall()
uninstall()
assert not [finder for finder in sys.meta_path if "nunchaku" in type(finder).__module__]
assert not [name for name in sys.modules if name.partition(".")[0] == "nunchaku"]
try:
    import nunchaku
except ModuleNotFoundError:
    pass
else:
    raise AssertionError
import svdquant.nunchaku.utils
assert svdquant.nunchaku.utils.get_precision is get_precision
install()
import nunchaku
"""
    run(code, tmp_path)


@pytest.mark.parametrize("loaded", [True, False])
def test_another_nunchaku(loaded: bool, tmp_path: Path) -> None:
    (tmp_path / "nunchaku").mkdir()
    (tmp_path / "nunchaku" / "__init__.py").write_text("OTHER = True\n")
    code = """
from svdquant import SVDQuantError
from svdquant.nunchaku import install, uninstall
"""
    if loaded:
        code += """
import nunchaku
try:
    install()
except SVDQuantError as error:
    assert "another nunchaku is imported already" in str(error)
else:
    raise AssertionError
uninstall()
import sys
assert sys.modules["nunchaku"].OTHER
"""
    else:
        code += """
install()
import nunchaku
assert not hasattr(nunchaku, "OTHER")
uninstall()
import nunchaku
assert nunchaku.OTHER
"""
    run(code, tmp_path)


def test_missing_names_are_import_errors(tmp_path: Path) -> None:
    code = """
from svdquant.nunchaku import install
install()
for line in ("import nunchaku.nothing", "from nunchaku import Nothing", "from nunchaku.models import nothing"):
    try:
        exec(line)
    except ImportError as error:
        assert "othing" in str(error), error
    else:
        raise AssertionError(line)
"""
    run(code, tmp_path)


@pytest.mark.parametrize("module", ["svdquant", "svdquant.nunchaku", "svdquant.nunchaku.utils"])
def test_importing_is_light(module: str, tmp_path: Path) -> None:
    heavy = "{'torch', 'diffusers', 'transformers', 'huggingface_hub', 'safetensors'}"
    code = f"""
import sys, {module}
from svdquant.nunchaku import install
install()
import nunchaku.models, nunchaku.utils
assert "NunchakuT5EncoderModel" in dir(nunchaku.models)
print(sorted({heavy} & set(sys.modules)))
"""
    assert run(code, tmp_path).strip() == "[]"
