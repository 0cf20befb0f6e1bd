"""Recipes: the fields of `SVDQuantConfig` as a TOML file. No torch here, as in `config`."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Collection, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from .config import SVDQuantConfig, matches
from .errors import SVDQuantError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# What quantizing fills in, and what tells the file format.
_NOT_CHOSEN = ("layers", "format_version", "quant_method")
_TYPES: dict[str, tuple[str, tuple[type, ...]]] = {
    "weights": ("a string", (str,)),
    "activations": ("a string", (str,)),
    "group_size": ("a whole number", (int,)),
    "rank": ("a whole number", (int,)),
    "smooth": ("true, false or a number of grid steps", (bool, int)),
    "refine": ("a whole number", (int,)),
    "gptq": ("true or false", (bool,)),
    "rotate": ("true or false", (bool,)),
    "modulation": ("a string", (str,)),
    "text_kv": ("a string", (str,)),
    "skip": ("a list of patterns", (list,)),
    "overrides": ("a table of patterns", (dict,)),
    "components": ("a table of components", (dict,)),
    "keep_16bit_above": ("a number", (int, float)),
    "int8_activations_above": ("a number", (int, float)),
    "max_error": ("a number", (int, float)),
    "calibration_rows": ("a whole number", (int,)),
    "seed": ("a whole number", (int,)),
}


def read_recipe(path: str | Path) -> SVDQuantConfig:
    """The configuration that a recipe describes; what it leaves out has its default.

    A recipe has the fields of `SVDQuantConfig`: `rank = 64`, `skip = ["*.proj_out"]`, `[overrides."*.ff.net.2"]` with
    fields of its own, `[components.text_encoder_2]` likewise. Raises `SVDQuantError` naming the file where it cannot be
    read, is no TOML, or has a field that does not exist or has another type.
    """
    return SVDQuantConfig(**recipe_fields(path))


def recipe_fields(path: str | Path) -> dict[str, Any]:
    """The fields that a recipe gives, checked as by `read_recipe`."""
    path = Path(path)
    try:
        # Editors on Windows begin a file with a mark of its encoding.
        data = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise SVDQuantError(f"{path}: cannot be read ({error.strerror or error}); give a recipe as TOML") from error
    except UnicodeDecodeError as error:
        raise SVDQuantError(f"{path}: is no UTF-8 text; give a recipe as TOML") from error
    except tomllib.TOMLDecodeError as error:
        raise SVDQuantError(f"{path}: is not valid TOML ({error}); correct that line") from error
    except RecursionError as error:
        raise SVDQuantError(f"{path}: has values within values too deep to read; give a recipe as TOML") from error
    try:
        _check(data, "")
        SVDQuantConfig(**data)
    except SVDQuantError as error:
        raise SVDQuantError(f"{path}: {error}") from error
    return data


def _check(data: dict[str, Any], where: str) -> None:
    """Names and types of the fields in a table, and in the tables below it. where: its name, "" for the whole."""
    known = [f.name for f in fields(SVDQuantConfig) if f.name not in _NOT_CHOSEN]
    if where:
        known = [name for name in known if name != "components"]
    inside = f" in [{where}]" if where else ""
    for name, value in data.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
            raise SVDQuantError(f"{name}{inside} is no field of a recipe; {hint}")
        words, types = _TYPES[name]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise SVDQuantError(f"{name}{inside} is {value!r}; it has to be {words}")
    if not all(isinstance(pattern, str) for pattern in data.get("skip", ())):
        raise SVDQuantError(f"skip{inside} is {data['skip']!r}; it has to be a list of patterns")
    for kind in ("overrides", "components"):
        for name, values in data.get(kind, {}).items():
            table = f'{where}{"." if where else ""}{kind}."{name}"'
            if not isinstance(values, dict):
                raise SVDQuantError(f"{table} is {values!r}; it has to be a table of fields")
            _check(values, table)


def merged(recipe: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The fields of a recipe with those given besides it in their place; `skip` and `overrides` are joined."""
    both = recipe | given
    if "skip" in recipe and "skip" in given:
        both["skip"] = [*recipe["skip"], *given["skip"]]
    if "overrides" in recipe and "overrides" in given:
        # What comes last wins where several patterns match.
        kept = {pattern: value for pattern, value in recipe["overrides"].items() if pattern not in given["overrides"]}
        both["overrides"] = kept | given["overrides"]
    return both


def check_patterns(path: str | Path, recipe: dict[str, Any], names: Collection[str], model: str) -> None:
    """Raises `SVDQuantError` naming a pattern of a recipe, or of one component's table, that fits no layer.

    names: of the model's layers. model: what to call it.
    """
    for pattern in _patterns(recipe):
        if not any(matches(pattern, name) for name in names):
            raise SVDQuantError(
                f"{path}: the pattern {pattern!r} fits no layer of {model}; correct it or leave it out (`svdquant plan "
                "--all` lists the layers)"
            )


def _patterns(recipe: dict[str, Any]) -> Iterator[str]:
    yield from recipe.get("skip", ())
    yield from recipe.get("overrides", {})
