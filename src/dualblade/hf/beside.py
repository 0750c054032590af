"""Layers that stay in transformers' own classes, beside those whose KV is ours.

They take in at once what a step brings, and cannot give it back. A step that is refused, or ended
between two layers, leaves them ahead of ours or behind; the next one would compute wrong tokens on
that without an error. So it is refused.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import (
    Cache,
    DummyLayer,
    DynamicLayer,
    LinearAttentionCacheLayerMixin,
)

from dualblade.errors import Closed
from dualblade.hf.layer import MemoryLayer, StoredLayer
from dualblade.hf.lazy import lasting


class Beside:
    """Of one cache, `layers`; `first` is the number of the first one that is ours.

    Layers with rows (windows, full attention that others read again, ours in memory) are compared
    with the first of ours.
    States (linear attention, convolutions) do not tell how many tokens they have seen: of models
    with those it is watched whether a pass that touched something came to its end.
    """

    def __init__(self, layers: list[Any]) -> None:
        ours = [isinstance(layer, StoredLayer | MemoryLayer) for layer in layers]
        self.first = ours.index(True) if any(ours) else len(layers)
        others = [(i, layer) for i, layer in enumerate(layers) if not ours[i]]
        self._rows = [(i, layer) for i, layer in others if isinstance(layer, DynamicLayer)]
        later = layers[self.first + 1 :]
        self._in_memory = [layer for layer in later if isinstance(layer, MemoryLayer)]
        self._states = [la for _, la in others if isinstance(la, LinearAttentionCacheLayerMixin)]
        self._hooks: list[Callable[[], object]] = []
        self._is_passing = self._is_touched = self._is_broken = False

    def watch(self, decoder: torch.nn.Module, cache: Cache) -> None:
        """Look at passes of `decoder` through `cache` for as long as that lives."""
        if not self._states:
            return
        passes = _Passes(self, cache)
        for handle in (
            decoder.register_forward_pre_hook(passes.begin, with_kwargs=True),
            decoder.register_forward_hook(passes.end, with_kwargs=True),
        ):
            self._hooks.append(weakref.finalize(cache, handle.remove))

    def begin(self) -> None:
        """A pass begins; of one before it that did not end some states may be left."""
        self._is_broken = self._is_broken or self._is_touched
        self._is_passing, self._is_touched = True, False

    def end(self) -> None:
        """A pass came to its end."""
        self._is_passing = self._is_touched = False

    def touch(self) -> None:
        """A layer takes in what a pass brings, or is about to."""
        self._is_touched = self._is_passing

    def check(self, past: int, new: int) -> None:
        """At our first layer of a step, which has `past` tokens and is given `new` ones: the layers
        before it have those too, the others not yet. Raises: Closed."""
        is_whole = not self._is_broken and all(
            layer.get_seq_length() == past + (new if index < self.first else 0)
            for index, layer in self._rows
        )
        # Of those that have none a model may have no use (Gemma 3n).
        is_whole &= all(layer.get_seq_length() in (0, past) for layer in self._in_memory)
        if not is_whole:
            raise _half_a_step()

    def check_along(self, tokens: int, first_tokens: int) -> None:
        """At a later layer in memory, which comes to have `tokens` where the first of ours that the
        model uses has `first_tokens` (0: it is that): a pass before may have ended between the two.
        Raises: Closed."""
        if first_tokens and tokens != first_tokens:
            raise _half_a_step()

    def change(self, layers: list[Any], change: Callable[[Any], object]) -> None:
        """Do `change` to all layers, one after the other: half of it is nothing to go on from. What
        the first of all refuses has changed nothing."""
        before, self._is_broken = self._is_broken, True
        for index, layer in enumerate(layers):
            try:
                with lasting():
                    change(layer)
            except Exception:
                self._is_broken = before or index > 0
                raise
        self._is_broken = before

    def forget(self) -> None:
        """All layers were reset."""
        self._is_passing = self._is_touched = self._is_broken = False

    def end_watch(self) -> None:
        """The model is as it was."""
        while self._hooks:
            self._hooks.pop()()


def reset_layer(layer: Any) -> None:
    """Empty it. States are dropped, where transformers would zero them: another batch has others,
    and those of a pass under inference_mode cannot be written outside it."""
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        for number in range(layer.number_of_states):
            layer.conv_states[number] = layer.recurrent_states[number] = None
            layer.is_conv_states_initialized[number] = False
            layer.is_recurrent_states_initialized[number] = False
    layer.reset()


def select_sequences(layer: Any, numbers: torch.Tensor) -> None:
    """Keep the sequences of these `numbers` (see `chosen_sequences`). Of states transformers'
    layers (5.24) can only be told a new order, which may be of more or fewer."""
    if not isinstance(layer, LinearAttentionCacheLayerMixin):
        layer.batch_select_indices(numbers)
    elif batch_of(layer):
        layer.reorder_cache(numbers)  # type: ignore[arg-type]


def batch_of(layer: Any) -> int:
    """Sequences that `layer` holds something of; 0: it is empty."""
    if isinstance(layer, StoredLayer):
        return layer.batch
    if isinstance(layer, DummyLayer):
        return 0
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        states = (*layer.conv_states.values(), *layer.recurrent_states.values())
        return next((len(state) for state in states if state is not None), 0)
    return len(layer.keys) if layer.get_seq_length() else 0


def _half_a_step() -> Closed:
    return Closed(
        "a step was refused or ended between two layers, and the content is lost",
        hint="reset the cache for another prompt",
    )


class _Passes:
    """The hooks of one cache, for `beside`. One that was removed while torch runs its copy of the
    list (the collector, or another thread, ended its cache) is given less. Those of a copied or
    saved model look at nothing."""

    def __init__(self, beside: Beside | None, cache: Cache | None) -> None:
        self._beside = beside
        self._cache = (lambda: None) if cache is None else weakref.ref(cache)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (None, None)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def begin(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        beside = None if kwargs is None else self._passed_through(args, kwargs)
        if beside is not None:
            beside.begin()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def end(self, _: Any, args: tuple[Any, ...], kwargs: Any, *result: Any) -> None:
        # Without one `kwargs` is the result.
        beside = self._passed_through(args, kwargs) if result else None
        if beside is not None:
            beside.end()

    def _passed_through(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Beside | None:
        cache = self._cache()
        is_ours = cache is not None and any(it is cache for it in (*args, *kwargs.values()))
        return self._beside if is_ours else None
