"""transformers' own caches, for comparison: what a decode step costs without dualblade."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from dualblade.bench.decode_rows import LayerShape, RandomRows, whole_layer
from dualblade.bench.workload import OFFLOADED
from dualblade.errors import Unsupported


def transformers_cache(model: Any, mode: str) -> DynamicCache:
    """An empty cache of one of TRANSFORMERS. Raises: Unsupported."""
    is_offloaded = mode == OFFLOADED
    if is_offloaded and model.device.type != "cuda":
        raise Unsupported(
            f"{OFFLOADED} keeps KV out of a GPU's memory, and the model is on the "
            f"{model.device.type}",
            hint="run it where torch finds a CUDA GPU; dynamic-cache is the same without a GPU",
        )
    return DynamicCache(config=model.config, offloading=is_offloaded)


def filled(cache: DynamicCache, model: Any, rows: RandomRows, tokens: int) -> DynamicCache:
    """`cache`, which was empty, with `tokens` random tokens."""
    for index in range(len(rows.shapes)):
        cache.update(*whole_layer(rows, index, tokens, model.device), index)
    return cache


class _SharedLayer(DynamicLayer):
    """A layer that always holds the same rows, in buffers that other layers use too; the last
    `new_tokens` of them are to come."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, new_tokens: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lazy_initialization(keys, values)
        self._buffers = keys, values
        self._new_tokens = new_tokens

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self._buffers
        past = self.get_seq_length()
        end = past + self._new_tokens
        keys[:, :, past:end], values[:, :, past:end] = key_states, value_states
        return keys[:, :, :end], values[:, :, :end]

    def get_seq_length(self) -> int:
        return int(self._buffers[0].shape[2]) - self._new_tokens - _slack(self._new_tokens)


def _slack(new_tokens: int) -> int:
    """Rows at the end of a buffer that are never used: what a prefill is handed is the front of a
    buffer that has room for more, and attention of many rows may copy what is not contiguous."""
    return 1 if new_tokens > 1 else 0


def shared_cache(model: Any, rows: RandomRows, tokens: int, new_tokens: int = 1) -> DynamicCache:
    """A cache whose layers of one shape share one layer's memory; `new_tokens` a forward pass.

    With it a step has the activations of the full context, while the KV cache costs one
    layer: so the memory that a process needs besides its cache can be measured.
    """
    cache = DynamicCache(config=model.config)
    buffers: dict[LayerShape, tuple[torch.Tensor, torch.Tensor]] = {}
    for index, shape in enumerate(rows.shapes):
        if not shape.grows:
            if tokens:  # else the pass begins with an empty window
                cache.update(*whole_layer(rows, index, tokens, model.device), index)
            continue
        if shape not in buffers:
            spare = new_tokens + _slack(new_tokens)
            buffers[shape] = whole_layer(rows, index, tokens, model.device, spare=spare)
        cache.layers[index] = _SharedLayer(*buffers[shape], new_tokens)
    return cache
