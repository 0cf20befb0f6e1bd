"""`--recipe`: what a file says, below the flags given besides it, checked against the model that it is for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from ..config import SVDQuantConfig
from ..errors import SVDQuantError
from ..recipe import check_patterns, merged, recipe_fields

# Field of a configuration → the flags that set it, where they are called otherwise.
_FLAGS = {"smooth": ("smooth", "smooth_grid"), "overrides": ("override",)}


def with_recipe(ctx: typer.Context, recipe: Path | None, flags: dict[str, Any]) -> SVDQuantConfig:
    """The configuration of `flags`, fields with the defaults of those that were not given, and of a recipe.

    Flags given on the command line win over the recipe, the recipe wins over their defaults. Raises `SVDQuantError`
    naming the recipe where it is wrong, or has a pattern that fits no layer of the model.
    """
    if "seed" in ctx.params:
        flags = flags | {"seed": ctx.params["seed"]}
    if recipe is None:
        return SVDQuantConfig(**flags)
    fields = recipe_fields(recipe)
    given = {k: v for k, v in flags.items() if any(_is_given(ctx, flag) for flag in _FLAGS.get(k, (k,)))}
    try:
        config = SVDQuantConfig(**merged(fields, given))
    except SVDQuantError as error:
        raise SVDQuantError(f"{recipe}, with the flags besides it: {error}") from error
    _check_layers(recipe, fields, str(ctx.params["model"]), ctx.params.get("base"))
    return config


def _is_given(ctx: typer.Context, flag: str) -> bool:
    source = ctx.get_parameter_source(flag)
    return source is not None and source.name not in ("DEFAULT", "DEFAULT_MAP")


def _check_layers(recipe: Path, fields: dict[str, Any], model: str, base: str | None) -> None:
    from ..checkpoint.hub import looks_like_hub_id

    pipeline, components = base or model, fields.get("components", {})
    if not looks_like_hub_id(pipeline) and not (Path(pipeline) / "model_index.json").is_file():
        # A model by itself has no components.
        components = {}
    if not _has_patterns(fields) and not components:
        return
    from ..integrations.skeletons import component_class, skeleton
    from .console import quiet_libraries

    quiet_libraries()
    for name in components:
        try:
            component_class(pipeline, name)
        except SVDQuantError as error:
            raise SVDQuantError(f"{recipe}: [components.{name}]: {error}") from error
    if _has_patterns(fields):
        check_patterns(recipe, fields, _layers(skeleton(model, base=base)), model)
    for name, own in components.items():
        if _has_patterns(own):
            check_patterns(recipe, own, _layers(skeleton(pipeline, component=name)), f"the {name} of {pipeline}")


def _has_patterns(fields: dict[str, Any]) -> bool:
    return bool(fields.get("skip") or fields.get("overrides"))


def _layers(model: Any) -> list[str]:
    """Names of the modules with a matrix."""
    return [name for name, module in model.named_modules() if getattr(getattr(module, "weight", None), "ndim", 0) > 1]
