"""Attention to one layer: its tiles as they come, then the rows that are not in tiles yet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from dualblade.attention import (
    BLOCK_TOKENS,
    AttentionQuery,
    GroupedAttention,
    KernelAttention,
    Rows,
    Running,
    widening_pays,
)
from dualblade.pipeline.layer import HalfLayer, Layer

Buffers = Callable[[torch.dtype], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, slots=True, eq=False)
class NewRows:
    """The rows of this step [batch, kv_heads, n, dim], not yet taken in."""

    keys: torch.Tensor
    values: torch.Tensor

    @property
    def count(self) -> int:
        """Tokens."""
        return self.keys.shape[2]


@dataclass(frozen=True, slots=True, eq=False)
class Arrived:
    """Stored tiles of `half` from `tile` on, at hand: [tiles, sequences, kv_heads, rows, dim].

    `values`, with keys only: those of the same tiles, when they are at hand too. They do not come
    again.
    """

    half: HalfLayer
    tiles: torch.Tensor
    tile: int
    first_sequence: int
    values: torch.Tensor | None = None

    @property
    def words(self) -> str:
        """What it is, in a trace."""
        return self.half.unit.id.part.value if self.values is None else "keys and values"

    @property
    def size_bytes(self) -> int:
        """Of all that is here."""
        return self.tiles.nbytes + (0 if self.values is None else self.values.nbytes)


def attend(
    layer: Layer,
    new: NewRows,
    query: AttentionQuery,
    arriving: Iterator[Arrived],
    buffers: Buffers | None,
) -> torch.Tensor:
    """Attention of `query` to all of `layer` and `new`: [batch, tokens, heads, value_dim].

    `arriving` brings all stored tiles, keys before the values of the same tiles. `buffers(dtype)`
    are the two that hold a group of many-row attention: [batch, kv_heads, group tokens, dim]. None
    of them: the kernel serves the query.
    """
    running = _running(layer, layer.tokens + new.count, query, buffers)
    for some in arriving:
        first, tokens = some.tile * layer.rows, some.tiles.shape[0] * layer.rows
        order = layer.table.rows_of(some.tile, some.tile + some.tiles.shape[0])
        rows = Rows(some.tiles, first, tokens, some.first_sequence, order)
        if some.values is not None:
            running.both(rows, Rows(some.values, first, tokens, some.first_sequence, order))
        elif some.half is layer.keys:
            running.keys(rows)
        else:
            running.values(rows)
    edge = layer.group_tiles * layer.rows
    recent = zip(
        _recent(layer, layer.keys, new.keys), _recent(layer, layer.values, new.values), strict=True
    )
    for (first, keys), (_, values) in recent:
        at = first
        while at < first + keys.shape[2]:
            last = min(first + keys.shape[2], (at // edge + 1) * edge)
            cut = slice(at - first, last - first)
            running.both(
                Rows(keys[None, :, :, cut], at, last - at),
                Rows(values[None, :, :, cut], at, last - at),
            )
            at = last
    return running.finish()


def _running(layer: Layer, tokens: int, query: AttentionQuery, buffers: Buffers | None) -> Running:
    if buffers is None:
        keys, values = layer.keys.unit.geometry, layer.values.unit.geometry
        return KernelAttention(query, keys.kv_heads, values.dim)
    is_one_group = tokens <= layer.group_tiles * layer.rows
    is_slow = query.query.is_cpu and widening_pays(layer.dtype)
    is_kept = is_one_group and not is_slow
    return GroupedAttention(query, *buffers(layer.dtype if is_kept else torch.float32))


def _recent(layer: Layer, half: HalfLayer, new: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """(first token, rows) of what is in no tile yet: the tail's whole blocks where they lie; the
    rest of it and the new rows copied together."""
    first = layer.stored_tiles * layer.rows
    whole = layer.tail_rows // BLOCK_TOKENS * BLOCK_TOKENS
    if whole:
        yield first, half.tail[:, :, :whole]
    if whole < layer.tail_rows:
        new = torch.cat([half.tail[:, :, whole : layer.tail_rows], new], dim=2)
    yield first + whole, new if new.stride(3) == 1 else new.contiguous()
