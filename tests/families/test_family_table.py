"""README says of every family what its stand-in does."""

import re

import family_table
import pytest
from family_pipelines import PIPELINES


def test_every_stand_in_is_in_the_table():
    assert {name for row in family_table.ROWS for name in row.pipelines} == set(PIPELINES)


def test_every_published_configuration_exists():
    assert all(
        (family_table.CONFIGS / f"{config}.json").is_file() for row in family_table.ROWS for config in row.configs
    )


@pytest.mark.parametrize("row", family_table.ROWS, ids=lambda row: row.pipelines[0])
def test_readme_says_what_is(row):
    """`python tests/families/family_table.py` writes it anew."""
    line = f"| {' | '.join(family_table.cells(row))} |\n"
    assert line in family_table.in_readme(), f"run tests/families/family_table.py; README has no line {line}"


def test_the_table_can_be_wrong(monkeypatch):
    """What is compared comes from the models: without its fused forwards FLUX.1 has another line."""
    row = family_table.ROWS[0]
    monkeypatch.setattr(family_table.fused, "_classes", dict)
    line = " | ".join(family_table.cells(row))
    assert "products only" in line and line not in family_table.in_readme()
    assert re.search(r"\d+\.\d → \d+\.\d", line)
