"""Whether a pass goes on from what the cache holds.

`generate` is given the whole text so far and slices off what is cached, by count alone. A text that
is shorter than that, or one whose candidates begin anew (transformers 5.24 then passes all of it
on), would be attended to behind another text's tokens without an error.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import Cache

from dualblade.errors import ConfigError


def watch_texts(decoder: torch.nn.Module, cache: Cache) -> Callable[[], object]:
    """Check each pass of `decoder` through `cache`, for as long as that lives or until the returned
    function is called. A pass that does not go on from there raises ConfigError, and has changed
    nothing."""
    alive = weakref.ref(cache)

    def check(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ours = alive()
        if ours is None or not any(given is ours for given in kwargs.values()):
            return
        new = _new_tokens(args, kwargs)
        if new is not None:
            check_continues(ours.get_seq_length(), new, kwargs)

    handle = decoder.register_forward_pre_hook(check, with_kwargs=True)
    return weakref.finalize(cache, handle.remove)


def check_continues(past: int, new: int, given: dict[str, Any]) -> None:
    """`new` tokens are given to a cache that has `past`, with the arguments `given`: a mask of both
    must have a column for each, and without a mask no position is taken twice. Raises: ConfigError.
    """
    if not past:
        return
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    goes_on = new > 0
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        goes_on = mask.shape[1] == past + new
    elif mask is None and isinstance(positions, torch.Tensor) and positions.ndim == 2:
        if positions.device.type != "cpu" and new == 1:
            return  # to look at it would wait for the device at each step
        goes_on = positions.numel() > 0 and int(positions[:, -1].max()) + 1 >= past + new
    if not goes_on:
        raise ConfigError(
            f"{new} tokens are given to a cache that holds {past}, and do not go on from there",
            hint="reset() it for another text; candidates (prompt lookup, an assistant) begin "
            "with an empty one; an attention_mask covers what is cached too",
        )


def _new_tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Tokens that a pass is given; None where it is given none that we know of."""
    for given in (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")):
        if isinstance(given, torch.Tensor):
            return given.shape[1] if given.ndim > 1 else None
    return None
