"""The example of docs/add-a-family.md, run as it is written."""

import re
import types
from pathlib import Path

import diffusers
import pytest
import test_family_plans
import torch

from svdquant import SVDQuantConfig, families
from svdquant.ptq.plan import make_plan

DOCUMENT = Path(__file__).parents[2] / "docs" / "add-a-family.md"


@pytest.fixture
def blocks():
    return re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)


def planned():
    with torch.device("meta"):
        model = diffusers.Krea2Transformer2DModel().bfloat16()
    return model, make_plan(model, SVDQuantConfig())


def test_the_example(blocks, monkeypatch):
    source, row = blocks
    assert len(source.splitlines()) < 40
    _, before = planned()
    module = types.ModuleType("svdquant.families.krea2")
    module.__package__ = "svdquant.families"
    exec(compile(source, str(DOCUMENT), "exec"), module.__dict__)
    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, module.FAMILY))
    model, after = planned()

    expected = eval(row, vars(test_family_plans))
    for made, family, quantized, groups in ((before, "generic", 256, 128), (after, expected.family, 224, 112)):
        assert (made.family, made.traced, len(made.groups)) == (family, True, groups)
        assert f"({family}): {quantized} of 264 linears in {groups} groups" in DOCUMENT.read_text()
    # Its own inputs tell what guessed ones do.
    same = {name for name, layer in after.layers.items() if layer == before.layers[name]}
    assert same == {name for name in after.layers if not name.startswith("text_fusion.") or name.endswith("projector")}
    test_family_plans.check(expected, model, after)
