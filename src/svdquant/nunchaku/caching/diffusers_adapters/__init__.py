"""`apply_cache_on_pipe`: first-block caching of a pipeline's transformer."""

from __future__ import annotations

from typing import Any

from ....errors import SVDQuantError
from ..._lazy import lazy

__all__ = ["apply_cache_on_pipe", "apply_cache_on_transformer"]

__getattr__, __dir__ = lazy(__name__, {}, ("flux", "flux_v2", "sana"))


def apply_cache_on_pipe(
    pipe: Any,
    residual_diff_threshold: float = 0.12,
    use_double_fb_cache: bool = False,
    residual_diff_threshold_multi: float | None = None,
    residual_diff_threshold_single: float | None = None,
    shallow_patch: bool = False,
) -> Any:
    """`apply_cache_on_transformer`, with the same options, on the transformer of `pipe`; returns the pipeline.

    Raises `SVDQuantError` for a pipeline without transformer.
    """
    transformer = getattr(pipe, "transformer", None)
    if transformer is None:
        raise SVDQuantError(f"{type(pipe).__name__} has no transformer whose blocks could be skipped")
    apply_cache_on_transformer(
        transformer,
        residual_diff_threshold,
        use_double_fb_cache,
        residual_diff_threshold_multi,
        residual_diff_threshold_single,
    )
    return pipe


def apply_cache_on_transformer(
    transformer: Any,
    residual_diff_threshold: float = 0.12,
    use_double_fb_cache: bool = False,
    residual_diff_threshold_multi: float | None = None,
    residual_diff_threshold_single: float | None = None,
    shallow_patch: bool = False,
) -> Any:
    """Skips, in a step whose first block changes little, the blocks after it; returns the model.

    residual_diff_threshold: largest relative change; higher is faster and less exact, 0 and less switch the cache off.
    use_double_fb_cache: the joint and the single blocks of FLUX are tested and skipped separately, by
    `residual_diff_threshold_multi` and `residual_diff_threshold_single` (None = `residual_diff_threshold`); otherwise
    the former covers both. A second call replaces the first. shallow_patch: changes nothing.
    """
    from .._first_block import apply

    first = residual_diff_threshold if residual_diff_threshold_multi is None else residual_diff_threshold_multi
    second = residual_diff_threshold if residual_diff_threshold_single is None else residual_diff_threshold_single
    joint, single = "transformer_blocks", "single_transformer_blocks"
    if use_double_fb_cache:
        thresholds: dict[tuple[str, ...], float] = {(joint,): first, (single,): second}
    else:
        thresholds = {(joint, single): first}
    return apply(transformer, thresholds)
