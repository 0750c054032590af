"""The KV of a model's full-attention layers: what is the same wherever their tiles are.

Rows come in as offers, layer after layer; sequences are selected, tokens are taken back. Where
tiles are, and how they come to attention, is for `KVPipeline` (a store) and `MemoryKV` to say.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from dualblade.attention import AttentionQuery, KernelAttention
from dualblade.errors import Closed
from dualblade.pipeline.attend import Arrived, NewRows, attend
from dualblade.pipeline.layer import Layer, check_removal, chosen_sequences
from dualblade.pipeline.offer import Offer
from dualblade.pipeline.timeline import Lane, Timeline, now_ns


class LayeredKV(ABC):
    """Layers by their order in the sweep. Tensors are [batch, kv_heads, tokens, dim].

    Used by one thread. After an error in the middle of a step the content is lost: every further
    call raises `Closed` with the cause. `close` always works, and `reset` where the step was only
    refused, or followed half a one: store and memory are as they were.
    """

    def __init__(self, trace_events: int) -> None:
        self._timeline = Timeline(trace_events)
        self._layers: dict[int, Layer] = {}
        self._recalls: set[int] = set()  # of layers that are not there yet, too
        self._offer: Offer | None = None
        self._failure: str | None = None
        self._was_refused = False  # the failure: a reset is all that it takes
        self._closed = False
        self._process = os.getpid()
        self._attention_ns = 0
        self._append_ns = 0

    # -- one step ----------------------------------------------------------------------------

    def offer(self, index: int, key_rows: torch.Tensor, value_rows: torch.Tensor) -> Offer:
        """New rows of layer `index`, to attend to (or to gather) and so to take in.

        Raises: ConfigError, BudgetError, NoSpace before anything changed; DeviceError, Closed.
        """
        self.check_usable()
        self._timeline.enter()
        self._settle()
        began = now_ns()
        layer = self._admit(index, key_rows, value_rows)
        self._offer = Offer(self, layer, NewRows(key_rows, value_rows))
        self._timeline.span(Lane.CONTROL, "admit", began, now_ns(), index)
        self._timeline.leave()
        return self._offer

    def update(
        self, index: int, key_rows: torch.Tensor, value_rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values of layer `index`, the new rows included; the rows are taken in.

        What is returned belongs to the cache and is valid until the next layer's update.
        Raises: as `offer`.
        """
        return self.offer(index, key_rows, value_rows).gather()

    def append(self, index: int, key_rows: torch.Tensor, value_rows: torch.Tensor) -> None:
        """Take in rows of layer `index` without attending to them. Raises: as `offer`."""
        self.offer(index, key_rows, value_rows).settle()

    @abstractmethod
    def _admit(self, index: int, key_rows: torch.Tensor, value_rows: torch.Tensor) -> Layer:
        """The layer, made when it is new, ready to take the rows. Raises: as `offer`."""

    def attend_to(self, layer: Layer, new: NewRows, query: AttentionQuery) -> torch.Tensor:
        """Attention of `query` to all of the layer and `new`: see `Offer.attend`, which calls."""
        timeline = self._timeline
        timeline.enter()
        self._check_whole(layer, new)
        began, stalled = now_ns(), timeline.stalled_ns
        computed = began
        kv_heads = layer.keys.unit.geometry.kv_heads
        by_kernel = KernelAttention.serves(query, kv_heads)
        any_size = by_kernel and KernelAttention.needs_little(query, kv_heads)

        def arriving() -> Iterator[Arrived]:
            nonlocal computed
            for some in self._arriving(layer, any_size=any_size):
                began = now_ns()
                yield some
                computed = now_ns()
                timeline.span(
                    Lane.COMPUTE, some.words, began, computed, layer.index, some.size_bytes
                )

        buffers = None if by_kernel else partial(self._group_buffers, layer)
        out = attend(layer, new, query, arriving(), buffers)
        self._check_not_closed()  # by a signal's handler or another thread: some of it read zeros
        ended = now_ns()
        timeline.span(Lane.COMPUTE, "newest rows", computed, ended, layer.index)
        self._attention_ns += ended - began - (timeline.stalled_ns - stalled)
        return out

    @abstractmethod
    def _arriving(self, layer: Layer, *, any_size: bool) -> Iterator[Arrived]:
        """The layer's stored tiles as they come to hand, keys before the values of the same.

        Without `any_size` none reach over the edge of a group (`Layer.group_tiles`).
        """

    @abstractmethod
    def _group_buffers(self, layer: Layer, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Where a group of the layer's tiles is copied together, for attention of many rows."""

    def gather_all(self, layer: Layer, new: NewRows) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values as plain tensors: see `Offer.gather`, which calls."""
        self._timeline.enter()
        self._check_whole(layer, new)
        if not layer.tokens:
            return new.keys.contiguous(), new.values.contiguous()
        gathered = self._gathered(layer, new)
        self._check_not_closed()
        return gathered

    @abstractmethod
    def _gathered(self, layer: Layer, new: NewRows) -> tuple[torch.Tensor, torch.Tensor]:
        """Stored tiles, tail and new rows together; there are tokens before the new ones."""

    def take_in(self, layer: Layer, new: NewRows, *, is_sweeping: bool) -> None:
        """Append `new` to the layer. `is_sweeping`: the model computes, layer after layer, and all
        the layer's tiles were read just before."""
        timeline = self._timeline
        began, others = now_ns(), timeline.copied_ns + timeline.stalled_ns
        self._append(layer, new, is_sweeping=is_sweeping)
        ended, others = now_ns(), timeline.copied_ns + timeline.stalled_ns - others
        self._append_ns += ended - began
        timeline.span(Lane.CONTROL, "take in", began, ended, layer.index, idle_ns=others)
        timeline.leave()

    @abstractmethod
    def _append(self, layer: Layer, new: NewRows, *, is_sweeping: bool) -> None:
        """Have the rows in the tail, and send on what fills tiles."""

    def fail(self, cause: BaseException) -> None:
        """The content is lost. Words of the cause are kept, not itself: its traceback holds the
        frames that it went through, and so a cache that nobody else has any more, open for good."""
        first, *_ = str(cause).splitlines() or [""]
        self._failure = f"{type(cause).__name__}: {first}"

    # -- sequences and tokens --------------------------------------------------------------------

    def tokens(self, index: int) -> int:
        """Tokens of each sequence in layer `index`, those on offer included."""
        if self._offer is not None and self._offer.layer.index == index:
            return self._offer.tokens
        return self._tokens_of(index)

    def batch(self, index: int) -> int:
        """Sequences in layer `index`; 0 before its first rows."""
        layer = self._layers.get(index)
        return layer.batch if layer is not None and layer.tokens else 0

    def select(self, index: int, indices: torch.Tensor) -> None:
        """In layer `index`, sequence i becomes what the i-th of `indices` names (see
        `chosen_sequences`). No stored byte moves. Raises: ConfigError before anything changed."""
        self.check_usable()
        self._settle()
        batch = self.batch(index)
        if not batch:
            return
        chosen = chosen_sequences(indices, batch)
        try:
            self._layers[index].select(chosen)
        except BaseException as exc:
            self.fail(exc)
            raise

    def set_recall(self, index: int, recall: bool) -> None:
        """Keep a tile's worth of rows more in the tail, for candidates that may be taken back."""
        self._settle()
        (self._recalls.add if recall else self._recalls.discard)(index)
        if index in self._layers:
            self._layers[index].recall = recall

    def crop(self, index: int, count: int) -> None:
        """Forget the newest `count` tokens of layer `index`. Raises: DeviceError, Closed."""
        self.check_usable()
        self._settle()
        layer = self._layers.get(index)
        if layer is None or count == 0:
            return
        check_removal(count, layer.tokens)
        try:
            self._drop_tokens(layer, count)
        except BaseException as exc:
            self.fail(exc)
            raise

    @abstractmethod
    def _drop_tokens(self, layer: Layer, count: int) -> None:
        """Take back `count` tokens; what is left of a tile that is cut becomes the tail."""

    def reset(self) -> None:
        """Forget all tokens; after a step that there was no room for, too, and after a reset that
        did not come to its end. Raises: DeviceError, Closed."""
        self._check_process()
        if self._closed or not self._was_refused:
            self.check_usable()
        else:
            self._offer = None
        self._settle()
        # Until it is done there may be tokens without their tiles, and writes that failed unheard:
        # only a reset goes on from there.
        why = self._failure or "its reset did not come to an end"
        self._failure, self._was_refused = why, True
        self._quiesce()
        for layer in self._layers.values():
            layer.free()
        self._layers.clear()
        self._forget()
        self._failure, self._was_refused = None, False
        self._timeline.pause()

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to forget."""
        return not self._layers and self._failure is None

    @abstractmethod
    def _forget(self) -> None:
        """Drop what was planned for the layers that there were."""

    @abstractmethod
    def _quiesce(self) -> None:
        """Return when nothing is read ahead or written behind any more, of what is forgotten."""

    def _tokens_of(self, index: int) -> int:
        layer = self._layers.get(index)
        return 0 if layer is None else layer.tokens

    # -- the end -----------------------------------------------------------------------------

    def check_usable(self) -> None:
        """Raises: Closed after close, or after an error that lost the content."""
        self._check_not_closed()
        self._check_process()
        if self._failure is not None:
            raise Closed(
                f"this cache failed earlier ({self._failure}) and its content is lost",
                hint="reset it for another prompt"
                if self._was_refused
                else "close it and start again with a new one",
            )

    def _check_not_closed(self) -> None:
        if self._closed:
            raise Closed("this cache is closed", hint="make a new one with for_model")

    def _check_process(self) -> None:
        """Memory of an arena is wiped in a fork. Raises: Closed."""
        if os.getpid() != self._process:
            raise Closed("this cache is the parent process's", hint="make one after the fork")

    def _check_whole(self, layer: Layer, new: NewRows) -> None:
        """At the first layer of a step all layers have as many tokens, and were selected from as
        often; at the others they have as many tokens as the first that is used has now. Ctrl-C
        anywhere in the model leaves half a step. Raises: Closed."""
        if layer.index == 0:
            is_whole = all(
                (other.tokens, other.selections) == (layer.tokens, layer.selections)
                for other in self._layers.values()
            )
        else:
            used = filter(None, map(self._tokens_of, range(layer.index)))
            is_whole = next(used, 0) in (0, layer.tokens + new.count)
        if not is_whole:
            self._was_refused = True  # before anything was read or written for it
            raise Closed(
                "the last step ended between two layers, and the content is lost",
                hint="reset it for another prompt",
            )

    def _settle(self) -> None:
        """Take in what is still on offer."""
        offer, self._offer = self._offer, None
        if offer is not None:
            offer.settle()
            self.check_usable()

    @abstractmethod
    def close(self) -> None:
        """Free everything. Idempotent."""

    def write_trace(self, path: Path) -> int:
        """See `Timeline.write_trace`."""
        return self._timeline.write_trace(path)

    @property
    def kv_bytes(self) -> int:
        """Bytes of all rows, stored or in tails."""
        # Asked by any thread: a step of another one adds layers meanwhile.
        return sum(layer.tokens * layer.token_bytes() for layer in list(self._layers.values()))
