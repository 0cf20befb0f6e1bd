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
        model = diffusers.QwenImage21Transformer2DModel().bfloat16()
    return model, make_plan(model, SVDQuantConfig())


def test_the_example(blocks, monkeypatch):
    source, row = blocks
    assert len(source.splitlines()) < 40
    _, before = planned()
    module = types.ModuleType("svdquant.families.qwen_image21")
    module.__package__ = "svdquant.families"
    exec(compile(source, str(DOCUMENT), "exec"), module.__dict__)
    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, module.FAMILY))
    model, after = planned()

    expected = eval(row, vars(test_family_plans))
    for made, family, traced, groups in ((before, "generic", False, 160), (after, expected.family, True, 128)):
        assert (made.family, made.traced, len(made.groups)) == (family, traced, groups)
        assert f"({family}): 224 of 232 linears in {groups} groups" in DOCUMENT.read_text()
    test_family_plans.check(expected, model, after)
