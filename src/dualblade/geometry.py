"""Shapes of stored KV: units, tiles, slabs. Pure arithmetic, no torch.

A unit is the keys or the values of one layer. It is a sequence of tiles [batch, kv_heads, rows,
dim]; one sequence's part of a tile is a slab [kv_heads, rows, dim], padded to whole blocks, so
that every slab can be read on its own and n tiles are one contiguous range.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum

from dualblade.units import BLOCK_BYTES, EXTENT_ALIGN_BYTES, MIB, round_up

TILE_ROWS_DEFAULT = 64
"""Rows in a tile: small enough that tails stay small, large enough that a slab is tens of KiB."""

_WIDER_ROWS = (128, 256, 512)
_NARROWER_ROWS = (32, 16, 8, 4, 2, 1)


GRAIN_BYTES_MIN = 4 * MIB
"""Readings of the memory that there is swing by as much; less would be moved to and fro."""


class Part(StrEnum):
    """Which half of a layer's KV a unit is."""

    KEYS = "keys"
    VALUES = "values"


@dataclass(frozen=True, slots=True, order=True)
class UnitId:
    """The keys or the values of one layer: the thing that is placed, whole or in two parts. In a
    pipeline `layer` counts the layers that are stored, in a plan those of the model."""

    layer: int
    part: Part

    def __str__(self) -> str:
        return f"layer {self.layer} {self.part.value}"


@dataclass(frozen=True, slots=True, kw_only=True)
class TileGeometry:
    """The shape of one unit's tiles. `dim` counts elements; `*_bytes` are bytes. `slab_bytes`: one
    sequence's part of one tile as stored, in whole blocks."""

    kv_heads: int
    rows: int
    dim: int
    item_bytes: int
    slab_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        # Once, not at each of the hundreds of times that a step asks.
        slab_bytes = round_up(self.slab_payload_bytes, BLOCK_BYTES)
        object.__setattr__(self, "slab_bytes", slab_bytes)

    @property
    def slab_payload_bytes(self) -> int:
        """Bytes of one sequence's rows in one tile, without padding."""
        return self.kv_heads * self.rows * self.dim * self.item_bytes

    def tile_bytes(self, batch: int) -> int:
        """Stored bytes of one tile of `batch` sequences."""
        return batch * self.slab_bytes

    def cut_bytes(self, batch: int) -> int:
        """A segment may be cut after whole tiles that fill pages of the page cache: at multiples of
        this."""
        return math.lcm(self.tile_bytes(batch), EXTENT_ALIGN_BYTES)

    def grain_bytes(self, batch: int) -> int:
        """What of a unit is worth being placed by itself: at least `GRAIN_BYTES_MIN`, where it may
        be cut."""
        return round_up(GRAIN_BYTES_MIN, self.cut_bytes(batch))

    def stored_bytes(self, batch: int, tokens: int) -> int:
        """Stored bytes of the whole tiles in `tokens` rows of `batch` sequences."""
        return tokens // self.rows * self.tile_bytes(batch)

    def planned_bytes(self, batch: int, tokens: int) -> int:
        """The same for a plan: of fewer tokens than a tile has, those of the tile to come."""
        return self.stored_bytes(batch, max(tokens, self.rows))


def choose_tile_rows(
    *,
    kv_heads: int,
    dims: tuple[int, int],
    item_bytes: int,
    batch: int,
    tail_bytes_max: int | None,
    slab_bytes_max: int | None = None,
) -> int:
    """Rows in a tile of a layer whose keys and values have `dims` = (key_dim, value_dim).

    64, when a slab of both is then whole blocks; else the next that is (128, 256, 512), else 64
    with padding. When both tails would exceed `tail_bytes_max`, or a slab `slab_bytes_max` (None:
    no limit), the largest smaller whole-block count that fits, else the smallest one.
    """

    def is_whole(rows: int) -> bool:
        return all(kv_heads * rows * dim * item_bytes % BLOCK_BYTES == 0 for dim in dims)

    def fits(rows: int) -> bool:
        row_bytes = kv_heads * item_bytes
        tails, slab = batch * rows * sum(dims) * row_bytes, rows * max(dims) * row_bytes
        return (tail_bytes_max is None or tails <= tail_bytes_max) and (
            slab_bytes_max is None or round_up(slab, BLOCK_BYTES) <= slab_bytes_max
        )

    wanted = (TILE_ROWS_DEFAULT, *_WIDER_ROWS)
    rows = next((rows for rows in wanted if is_whole(rows)), TILE_ROWS_DEFAULT)
    if fits(rows):
        return rows
    smaller = [less for less in (*wanted, *_NARROWER_ROWS) if less < rows and is_whole(less)]
    smaller.sort(reverse=True)
    return next((less for less in smaller if fits(less)), smaller[-1] if smaller else rows)
