"""Keys and values for bench decode: random rows instead of a long prefill, the same in every run.

Rows are a pure function of (seed, layer, keys or values, chunk), so all modes see one KV cache and
must produce the same tokens. They come from one block of normal numbers, read from another start
each time: no two tiles are alike, no drive can compress them, and making them costs one copy.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from dualblade.errors import Unsupported
from dualblade.units import MIB

BLOCK_ELEMENTS = 1 << 20
"""2 MiB of bfloat16, made once in about 10 ms; more would only cost cache misses."""

CHUNK_BYTES = 4 * MIB
"""Rows handed to the cache at a time, per tensor: small beside any budget, large beside a tile."""

_CHUNK_TOKENS = 64
_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: consecutive numbers land far apart


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """Keys and values of one layer for one sequence. `grows`: all tokens are kept."""

    kv_heads: int
    key_dim: int
    value_dim: int
    item_bytes: int
    grows: bool

    def token_bytes(self, batch: int) -> int:
        """Keys and values of one token, `batch` sequences."""
        return batch * self.kv_heads * (self.key_dim + self.value_dim) * self.item_bytes


class RandomRows:
    """Rows of every layer, made on demand into buffers that are reused.

    Owner of what it returns: valid until the next call.
    """

    def __init__(self, shapes: list[LayerShape], batch: int, dtype: torch.dtype, seed: int) -> None:
        self.shapes = shapes
        self.batch = batch
        self._seed = seed
        generator = torch.Generator().manual_seed(seed)
        # Unit variance, as after the norms that models put before their projections.
        self._block = torch.randn(BLOCK_ELEMENTS, generator=generator).to(dtype)
        largest = max(batch * s.kv_heads * max(s.key_dim, s.value_dim) for s in shapes)
        self._buffers = torch.zeros(2, largest * self.chunk_tokens, dtype=dtype)

    @property
    def chunk_tokens(self) -> int:
        """Tokens in a chunk: whole tiles, about CHUNK_BYTES in the widest layer."""
        token_bytes = max(shape.token_bytes(self.batch) for shape in self.shapes)
        return max(1, 2 * CHUNK_BYTES // token_bytes // _CHUNK_TOKENS) * _CHUNK_TOKENS

    def chunk(self, layer: int, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of tokens [start, start + count): [batch, kv_heads, count, dim] each.

        `start` is a multiple of chunk_tokens, `count` at most that.
        """
        assert start % self.chunk_tokens == 0, start
        assert 0 < count <= self.chunk_tokens, count
        shape = self.shapes[layer]
        made = []
        for kind, dim in enumerate((shape.key_dim, shape.value_dim)):
            size = self.batch * shape.kv_heads * count * dim
            rows = self._buffers[kind, :size]
            number = (self._seed << 40) + (layer << 33) + (kind << 32) + start // self.chunk_tokens
            self._draw(rows, number)
            made.append(rows.view(self.batch, shape.kv_heads, count, dim))
        return made[0], made[1]

    def _draw(self, rows: torch.Tensor, number: int) -> None:
        """Fill `rows` with the block, again and again from another start."""
        done, piece = 0, 0
        while done < len(rows):
            start = ((number * 4099 + piece) * _GOLDEN >> 24) % (BLOCK_ELEMENTS // 2)
            count = min(len(rows) - done, BLOCK_ELEMENTS - start)
            rows[done : done + count] = self._block[start : start + count]
            done += count
            piece += 1


def probe_layers(model: Any) -> list[LayerShape]:
    """The KV shapes of `model`'s layers, learned from one token through transformers' own cache.

    Raises: Unsupported when a layer keeps something other than keys and values.
    """
    from transformers import DynamicCache  # here: costs seconds to import

    from dualblade.hf.geometry import offloadable

    cache = DynamicCache(config=model.config)
    token = torch.ones(1, 1, dtype=torch.long, device=model.device)
    with torch.inference_mode():
        model(input_ids=token, cache=cache, use_cache=True)
    shapes = []
    layers: list[Any] = list(cache.layers)
    stored = offloadable(model.config, layers)  # windows that never bind are, too
    for index, layer in enumerate(layers):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None or keys.ndim != 4:
            raise Unsupported(f"bench decode cannot fill layer {index} ({type(layer).__name__})")
        shapes.append(
            LayerShape(
                kv_heads=keys.shape[1],
                key_dim=keys.shape[3],
                value_dim=values.shape[3],
                item_bytes=keys.element_size(),
                grows=stored[index] or not layer.is_sliding,
            )
        )
    return shapes


def kv_bytes(shapes: list[LayerShape], batch: int, tokens: int) -> int:
    """Bytes of `tokens` tokens in the layers that keep all of them."""
    return sum(shape.token_bytes(batch) * tokens for shape in shapes if shape.grows)


def fill(rows: RandomRows, tokens: int, cache: Any, device: torch.device) -> None:
    """Hand `tokens` tokens of all layers to a DualBladeCache, in the order of a chunked prefill.
    All is on the drive then: no step pays for what a mode had not written yet.

    Layers that do not grow are transformers' own, and take their window from what they are given.
    """
    for start, count in _chunks(tokens, rows.chunk_tokens):
        for layer, shape in enumerate(rows.shapes):
            keys, values = rows.chunk(layer, start, count)
            take_in = cache.append if shape.grows else cache.update
            take_in(keys.to(device), values.to(device), layer)
    os.sync()


def whole_layer(
    rows: RandomRows, layer: int, tokens: int, device: torch.device, *, spare: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a whole layer, [batch, kv_heads, tokens + spare, dim]; spare rows 0."""
    shape = rows.shapes[layer]
    dtype = rows.chunk(layer, 0, 1)[0].dtype
    lead = (rows.batch, shape.kv_heads, tokens + spare)
    keys = torch.zeros(*lead, shape.key_dim, dtype=dtype, device=device)
    values = torch.zeros(*lead, shape.value_dim, dtype=dtype, device=device)
    for start, count in _chunks(tokens, rows.chunk_tokens):
        new_keys, new_values = rows.chunk(layer, start, count)
        keys[:, :, start : start + count] = new_keys
        values[:, :, start : start + count] = new_values
    return keys, values


def _chunks(tokens: int, chunk_tokens: int) -> Iterator[tuple[int, int]]:
    for start in range(0, tokens, chunk_tokens):
        yield start, min(chunk_tokens, tokens - start)
