"""Whether a pass goes on from what the cache holds.

`generate` is given the whole text so far and slices off what is cached, by count alone. A text that
is no longer than that, or one whose candidates begin anew (transformers 5.24 then passes all of it
on), would be attended to behind another text's tokens without an error.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from dualblade.errors import ConfigError
from dualblade.hf.layer import StoredLayer


def watch_texts(
    modules: Iterable[torch.nn.Module], cache: Cache, check_usable: Callable[[], object]
) -> Callable[[], object]:
    """Check each pass of `modules` through `cache`, for as long as that lives or until the returned
    function is called. A pass that does not go on from there raises ConfigError, and has changed
    nothing; of a cache that lost its content `check_usable` tells first."""
    alive = weakref.ref(cache)

    def check(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ours = alive()
        if ours is None or not any(given is ours for given in (*args, *kwargs.values())):
            return
        check_usable()
        past, new = ours.get_seq_length(), _new_tokens(args, kwargs)
        # Half a step is told of by the layers, which know more.
        if new is not None and not goes_on(past, new, kwargs) and _is_whole(ours):
            raise ConfigError(
                f"{new} tokens are given to a cache that holds {past}, and do not go on from there",
                hint="reset() it for another text; candidates (prompt lookup, an assistant) begin "
                "with an empty one; an attention_mask covers what is cached too",
            )

    hooks = [module.register_forward_pre_hook(check, with_kwargs=True) for module in modules]
    ends = [weakref.finalize(cache, hook.remove) for hook in hooks]

    def end() -> None:
        for one in ends:
            one()

    return end


def goes_on(past: int, new: int, given: dict[str, Any]) -> bool:
    """Whether `new` tokens after `past` cached ones can be what the arguments `given` speak of. A
    mask has a column for each at least. Without a mask, positions of several tokens neither begin
    the text nor end within what is cached."""
    if not past:
        return True
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        return mask.shape[1] >= past + new
    if mask is None and new > 1 and isinstance(positions, torch.Tensor) and positions.ndim == 2:
        if not positions.numel():
            return False
        first, last = positions[:, 0].min(), positions[:, -1].max()
        return int(first) > 0 and int(last) >= past
    return new > 0


def _new_tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Tokens that a pass is given; None where it is given none that we know of."""
    for given in (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")):
        if isinstance(given, torch.Tensor):
            return given.shape[1] if given.ndim > 1 else None
    return None


def _is_whole(cache: Cache) -> bool:
    """Whether all layers that hold tokens have as many."""
    with_rows = (la for la in cache.layers if isinstance(la, StoredLayer | DynamicLayer))
    return len({layer.get_seq_length() for layer in with_rows} - {0}) <= 1
