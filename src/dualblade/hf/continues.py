"""Whether a pass goes on from what the cache holds.

`generate` is given the whole text so far and slices off what is cached, by count alone. A text that
is no longer than that, or one whose candidates begin anew (transformers 5.24 then passes all of it
on), would be attended to behind another text's tokens without an error. Where `generate` slices,
the text is at hand, and it is checked there, by count and against the tokens that were passed on
before (`HeldText`); passes of a loop of one's own tell less.
"""

from __future__ import annotations

import logging
import types
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
import transformers
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from dualblade.errors import ConfigError, Unsupported
from dualblade.hf.boundary import check_pass, check_text
from dualblade.hf.choice import MODELS_LOCK
from dualblade.hf.layer import MemoryLayer, StoredLayer
from dualblade.hf.whole_steps import WholeSteps
from dualblade.pipeline.layer import check_length

log = logging.getLogger("dualblade.hf")


def watch_generate(
    models: Iterable[PreTrainedModel], cache: WholeSteps
) -> list[Callable[[], object]]:
    """Check texts where `generate` of `models` slices them for `cache`, for as long as
    `watch_texts` does, and like it."""
    cache.is_watched = True
    ends: list[Callable[[], object]] = []
    for model in models:
        watch = object()
        with MODELS_LOCK:
            _WATCHED.setdefault(model, set()).add(watch)
            for method in _METHODS:
                name = method.__name__
                # A deep copy has its own: a bound method is copied with what it is bound to. One of
                # somebody else's stays; what unpickling left of ours is the class's.
                held, own = vars(model).get(name), getattr(type(model), name)
                if held is None or getattr(held, "__func__", None) in (method, own):
                    vars(model)[name] = types.MethodType(method, model)
        ends.append(weakref.finalize(cache, _end_watch, weakref.ref(model), watch))
    return ends


_WATCHED: weakref.WeakKeyDictionary[torch.nn.Module, set[object]] = weakref.WeakKeyDictionary()
"""What each model is watched for, one for each cache. No count: a finalizer of another cache may
come between reading and writing it."""


def _end_watch(model: weakref.ref[PreTrainedModel], watch: object) -> None:
    watched = model()
    if watched is None:
        return
    with MODELS_LOCK:
        watches = _WATCHED.get(watched, set())
        watches.discard(watch)
        if watches:
            return
        for method in _METHODS:
            held = vars(watched).get(method.__name__)
            if getattr(held, "__func__", None) is method:
                del vars(watched)[method.__name__]


def _prefill(
    self: Any, input_ids: torch.Tensor, generation_config: Any, model_kwargs: Any, **more: Any
) -> Any:
    """In place of a model's own, which it goes on with: transformers 5.24 slices there."""
    cache = _checked_cache(model_kwargs)
    is_first = more.get("is_first_iteration", True)  # not of an assistant, which is asked again
    embeds, mask = model_kwargs.get("inputs_embeds"), model_kwargs.get("attention_mask")
    past = 0 if cache is None else cache.get_seq_length()
    if embeds is not None and is_first:
        given = columns = embeds.shape[1]
    else:
        given = input_ids.shape[1]
        # What was all ones was dropped.
        dropped = getattr(generation_config, "_mask_length", past + given)
        columns = mask.shape[1] if isinstance(mask, torch.Tensor) else dropped
    if is_first:
        tokens = given if columns == given else past + given
        new = (generation_config.max_length or 0) - input_ids.shape[1]
        _check_room(model_kwargs, tokens, tokens + new - 1)  # the last token is not stored
        if _watched_cache(model_kwargs) is not None:
            chunk = getattr(generation_config, "prefill_chunk_size", None)
            check_text(self.config, past, tokens, tokens + new - 1, chunk)
    if cache is not None:
        # Of as many columns it is the whole text, of more the new tokens.
        if columns < past + (1 if columns == given else given):
            raise _does_not_go_on(given, past)
        if columns == given and embeds is None:
            _check_begin(cache, past, input_ids, mask)
        if is_first:
            cache.end_recording()
    elif is_first and (empty := _watched_cache(model_kwargs)) is not None and empty.has_candidates:
        empty.stop_recording()  # of candidates that were refused
    return type(self)._prefill(self, input_ids, generation_config, model_kwargs, **more)


def _check_room(model_kwargs: dict[str, Any], tokens: int, most: int) -> None:
    """Before the first chunk of a text of `tokens` in all, which may grow to `most`, is computed.
    Raises: ConfigError where it is longer than the cache was made for."""
    cache = _watched_cache(model_kwargs)
    if cache is None:
        return
    stated = (la for la in cache.layers if isinstance(la, StoredLayer | MemoryLayer))
    tokens_max = next((la.get_max_length() for la in stated), -1)
    if tokens_max < 0:
        return
    check_length(tokens, tokens_max)
    if most > tokens_max:
        log.warning(
            "the cache takes %d tokens, and generate may come to %d: it then ends with an error",
            tokens_max,
            most,
        )


def _check_begin(cache: WholeSteps, past: int, ids: torch.Tensor, mask: Any) -> None:
    """Raises: ConfigError where the text `ids` does not begin with the cached one."""
    seen = mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None
    shared = cache.held_text.shared_with(past, ids, seen)
    if shared < past:
        raise ConfigError(
            f"this text differs from the {past} tokens that the cache holds, from token "
            f"{shared} on",
            hint=f"reset() it for another text, or crop({shared - past}) it to what they share"
            if shared
            else "reset() it for another text",
        )


def _get_candidate_generator(self: Any, *args: Any, **given: Any) -> Any:
    """Likewise: decoding with candidates passes on all that it is given. That may be the new tokens
    under a mask of ones; or the model has a slicing of its own, as in `dualblade generate`."""
    model_kwargs = given.get("model_kwargs", {})
    watched = _watched_cache(model_kwargs)
    if watched is not None:
        watched.has_candidates = True  # transformers had its layers record before
    cache = _checked_cache(model_kwargs)
    if cache is not None and "prepare_inputs_for_generation" not in vars(self):
        embeds = model_kwargs.get("inputs_embeds")  # beside them input_ids are none
        new = (given["input_ids"] if embeds is None else embeds).shape[1]
        past = cache.get_seq_length()
        columns = getattr(given["generation_config"], "_mask_length", new)
        if model_kwargs.get("attention_mask") is not None or columns < past + new:
            raise _does_not_go_on(new, past)
    return type(self)._get_candidate_generator(self, *args, **given)


_METHODS = (_prefill, _get_candidate_generator)


def check_methods() -> None:
    """Raises: Unsupported for a transformers that slices texts elsewhere than it is checked."""
    for name in (method.__name__ for method in _METHODS):
        if not hasattr(GenerationMixin, name):
            raise Unsupported(
                f"transformers {transformers.__version__} has no {name}, where texts are checked",
                hint="install one that was tried: pip install 'transformers==5.24.*'",
            )


def _watched_cache(model_kwargs: dict[str, Any]) -> WholeSteps | None:
    """The cache that is given, where it is watched."""
    cache = model_kwargs.get("cache")
    return cache if isinstance(cache, WholeSteps) and cache.is_watched else None


def _checked_cache(model_kwargs: dict[str, Any]) -> WholeSteps | None:
    """The cache that is given, where it is watched and holds a text."""
    cache = _watched_cache(model_kwargs)
    if cache is None:
        return None
    cache.check_usable()
    if model_kwargs.get("use_cache") is False:
        raise ConfigError(
            "a cache is given, and use_cache=False: each pass would bring it the whole text",
            hint="leave one of them out",
        )
    # Half a step is told of by the layers, which know more.
    return cache if cache.get_seq_length() and _is_whole(cache) else None


def watch_texts(
    modules: Iterable[torch.nn.Module], cache: WholeSteps, boundary: int | None
) -> list[Callable[[], object]]:
    """Check each pass of `modules` through `cache`, for as long as that lives or until the returned
    functions are called. A pass that does not go on from there raises ConfigError, and has changed
    nothing; of a cache that lost its content `check_usable` tells first. `boundary`: see
    `rotation_boundary`."""
    check = _TextCheck(cache, boundary)
    hooks = [module.register_forward_pre_hook(check, with_kwargs=True) for module in modules]
    return [weakref.finalize(cache, hook.remove) for hook in hooks]


class _TextCheck:
    """The hook of one cache. torch runs a copy of a module's list of hooks, and gives one that was
    removed meanwhile (the collector, or another thread, ended its cache) no `kwargs`. Of a copied
    or saved model it looks at nothing."""

    def __init__(self, cache: WholeSteps | None, boundary: int | None = None) -> None:
        self._cache = (lambda: None) if cache is None else weakref.ref(cache)
        self._boundary = boundary

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (None,)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        cache = self._cache()
        if cache is None or kwargs is None:
            return
        if not any(given is cache for given in (*args, *kwargs.values())):
            return
        cache.check_usable()
        past, brought = cache.get_seq_length(), _brought(args, kwargs)
        new = None if brought is None else brought.shape[1]
        # Half a step is told of by the layers, which know more.
        if new is not None and not goes_on(past, new, kwargs) and _is_whole(cache):
            raise _does_not_go_on(new, past)
        if new is not None:
            check_pass(self._boundary, past, past + new)
        are_ids = brought is not None and brought.ndim == 2 and not brought.is_floating_point()
        cache.held_text.bring(past, brought if are_ids else None)


def _does_not_go_on(new: int, past: int) -> ConfigError:
    return ConfigError(
        f"{new} tokens are given to a cache that holds {past}, and do not go on from there",
        hint="reset() it for another text; candidates (prompt lookup, an assistant) begin with an "
        "empty one; an attention_mask covers what is cached too",
    )


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


def _brought(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """What a pass is given, [batch, tokens, ...]; None where it is none that we know of."""
    for given in (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")):
        if isinstance(given, torch.Tensor):
            return given if given.ndim > 1 else None
    return None


def _is_whole(cache: Cache) -> bool:
    """Whether all layers that hold tokens have as many."""
    with_rows = (la for la in cache.layers if isinstance(la, StoredLayer | DynamicLayer))
    return len({layer.get_seq_length() for layer in with_rows} - {0}) <= 1
