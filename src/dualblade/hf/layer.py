"""Layers of a transformers cache: one whose rows are in tiles, in a store or in memory, and one
whose rows lie in memory side by side."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from dualblade.errors import ConfigError, Unsupported
from dualblade.hf.choice import AttentionChoice
from dualblade.hf.lazy import lasting, offered_tensors
from dualblade.hf.tile_attention import refuse_gradients
from dualblade.pipeline import KVPipeline, MemoryKV
from dualblade.pipeline.layer import check_length, check_removal


class StoredLayer(CacheLayerMixin):
    """A full-attention layer whose KV is in tiles, in a store or in memory. Thin: all is done by
    the pipeline. `index` is its place among such layers.
    """

    is_sliding = False
    is_croppable = True

    def __init__(
        self,
        pipeline: KVPipeline | MemoryKV,
        index: int,
        tokens_max: int | None,
        attention: AttentionChoice,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._pipeline = pipeline
        self._index = index
        self._attention = attention
        self._tokens_max = tokens_max
        self._record_past = False

    @property
    def keys(self) -> torch.Tensor:
        """Nothing that a model's code could look into. Raises: Unsupported."""
        raise _not_to_look_into()

    @keys.setter
    def keys(self, value: torch.Tensor | None) -> None:
        """What the base class begins with: None."""

    @property
    def values(self) -> torch.Tensor:
        """See `keys`. Raises: Unsupported."""
        raise _not_to_look_into()

    @values.setter
    def values(self, value: torch.Tensor | None) -> None:
        """See `keys`."""

    def __deepcopy__(self, memo: dict[int, Any]) -> StoredLayer:
        raise _not_to_look_into()

    @property
    def record_past(self) -> bool:
        """Whether candidates may be taken back soon: a tile more then stays in memory."""
        return self._record_past

    @record_past.setter
    def record_past(self, value: bool) -> None:
        with lasting():
            self._pipeline.set_recall(self._index, value)
        self._record_past = value

    def activate_past_recording(self) -> None:
        """transformers is about to append candidates and crop the rejected ones."""
        self.record_past = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to allocate here: the pipeline does it when rows come."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take in new rows [batch, kv_heads, n, dim]; return all keys and values for attention.

        With attention over tiles they stand for tiles, and are made real only when the model does
        more with them than pass them on. Valid until the next layer's update.
        Raises: ConfigError, BudgetError, NoSpace, DeviceError, Closed, Unsupported.
        """
        refuse_gradients(key_states, value_states)
        key_states = _as_autocast(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        with lasting():
            if self._attention.over_tiles and self.get_seq_length():
                offer = self._pipeline.offer(self._index, key_states, value_states)
                return offered_tensors(offer, self._attention.fall_back)
            return self._pipeline.update(self._index, key_states, value_states)

    def append(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take in new rows without attending to them. Raises: as `update`."""
        refuse_gradients(key_states, value_states)
        key_states = _as_autocast(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        with lasting():
            self._pipeline.append(self._index, key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(tokens that attention will see, offset 0), asked before `update`."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens of each sequence."""
        return self._pipeline.tokens(self._index)

    @property
    def batch(self) -> int:
        """Sequences; 0 before the first rows."""
        return self._pipeline.batch(self._index)

    def get_max_length(self) -> int:
        """The stated maximum, -1 without one."""
        return -1 if self._tokens_max is None else self._tokens_max

    def reset(self) -> None:
        """Forget all tokens, of all layers over tiles: they are one cache."""
        self.is_initialized = False  # models ask: a prefix may see itself whole in the first pass
        if not self._pipeline.is_empty:
            with lasting():
                self._pipeline.reset()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Beam search: sequence i becomes what `beam_idx[i]` was. Stored tiles do not move."""
        with lasting():
            self._pipeline.select(self._index, beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the sequences that `indices` name (numbers, or a mask), in that order."""
        with lasting():
            self._pipeline.select(self._index, indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence `repeats` times, copies side by side."""
        with lasting():
            self._pipeline.select(self._index, torch.arange(self.batch).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest `-tokens_to_remove` tokens. Raises: ConfigError for a positive one."""
        count = removed_count(tokens_to_remove)
        with lasting():
            self._pipeline.crop(self._index, count)

    def offload(self) -> None:
        """Nothing to do: the rows are in the store already."""

    def prefetch(self) -> None:
        """Nothing to do: the pipeline reads ahead by itself."""


class MemoryLayer(DynamicLayer):
    """A full-attention layer in memory: like `DynamicLayer`, with the same results, but rows are
    written in place instead of copying everything at each step.

    `tokens_max` None: capacity grows by an eighth at a time.
    """

    def __init__(self, tokens_max: int | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tokens_max = tokens_max
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take in new rows; return views of all rows."""
        refuse_gradients(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past, new = self.get_seq_length(), key_states.shape[-2]
        check_length(past + new, self._tokens_max)
        if past and self.keys is not None:
            was, now = ((len(rows), rows.dtype) for rows in (self.keys, key_states))
            if was != now:
                raise ConfigError(
                    f"keys changed: they were {was[0]} sequences of {was[1]}, now {now[0]} of "
                    f"{now[1]}",
                    hint="reset the cache before another prompt or batch",
                )
        with lasting():
            buffers = self._room_for(past + new, key_states, value_states)
            for buffer, rows in zip(buffers, (key_states, value_states), strict=True):
                buffer[:, :, past : past + new] = rows
            self.keys, self.values = (buffer[:, :, : past + new] for buffer in buffers)
        return self.keys, self.values

    def get_max_length(self) -> int:
        """The stated maximum, -1 without one."""
        return -1 if self._tokens_max is None else self._tokens_max

    def append(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take in new rows without attending to them."""
        self.update(key_states, value_states)

    def _room_for(
        self, tokens: int, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._buffers is not None and self._buffers[0].shape[2] >= tokens:
            return self._buffers
        capacity = self._tokens_max or tokens + max(tokens // 8, 64)
        grown = []
        for rows, old in ((key_states, self.keys), (value_states, self.values)):
            buffer = rows.new_empty((*rows.shape[:2], capacity, rows.shape[3]))
            if old is not None and old.numel():
                buffer[:, :, : old.shape[2]] = old
            grown.append(buffer)
        self._buffers = (grown[0], grown[1])
        return self._buffers

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest `-tokens_to_remove` tokens. Raises: ConfigError for a positive number,
        or more than there are."""
        count, tokens = removed_count(tokens_to_remove), self.get_seq_length()
        if not tokens:
            return  # as a stored layer: there is nothing yet
        check_removal(count, tokens)
        if count == tokens:
            self.reset()  # another batch may come
        else:
            super().crop(-count)

    def reset(self) -> None:
        """Forget all tokens and give the memory back."""
        self._buffers = None
        super().reset()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Beam search; the rows are copied, as in `DynamicLayer`."""
        self._buffers = None
        super().reorder_cache(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the sequences that `indices` name."""
        self._buffers = None
        super().batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence `repeats` times."""
        self._buffers = None
        super().batch_repeat_interleave(repeats)


def _not_to_look_into() -> Unsupported:
    return Unsupported(
        "this model's code looks into the layers of its cache, whose KV is in tiles",
        hint="use transformers' own cache for it, or path='memory' with attention='exact'",
    )


def _as_autocast(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Keys as autocast's attention would take them: rotated in float32, values are of its dtype."""
    if keys.dtype != values.dtype and torch.is_autocast_enabled(keys.device.type):
        return keys.to(values.dtype)
    return keys


def removed_count(tokens_to_remove: int) -> int:
    """How many tokens `crop` is to forget, of what it is given. Raises: ConfigError."""
    if tokens_to_remove > 0:
        raise ConfigError(
            f"crop({tokens_to_remove}): tokens to remove are given as a negative number"
        )
    return -tokens_to_remove
