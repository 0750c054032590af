"""How a budget is divided between what the layers need. Pure arithmetic on their shapes: for
layers that are there, and for those of a model that is not loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dualblade.attention import group_tokens
from dualblade.geometry import TileGeometry
from dualblade.pipeline.gather import GatherBuffers
from dualblade.residency import BudgetShares, DoorSpeeds, worth_caching
from dualblade.units import round_up

CAPACITY_STEP_TOKENS = 64
"""Gather buffers hold a multiple of this many tokens."""

_TABLE_ITEM_BYTES = 4 + 2 * 8
"""For each tile and sequence: an int32 of the sequence table, checksums of keys and of values."""

_FP32_BYTES = 4


def group_tiles(batch: int, keys: TileGeometry, values: TileGeometry) -> int:
    """Tiles that attention of many rows takes at a time."""
    elements = batch * (keys.kv_heads * keys.dim + values.kv_heads * values.dim)
    return group_tokens(elements, keys.rows) // keys.rows


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSizes:
    """A layer of `batch` sequences, of which `tail_rows` rows of each are in memory."""

    batch: int
    keys: TileGeometry
    values: TileGeometry
    tail_rows: int

    @property
    def halves(self) -> tuple[TileGeometry, TileGeometry]:
        """Keys before values."""
        return self.keys, self.values

    @property
    def rows(self) -> int:
        """Tokens in a tile."""
        return self.keys.rows

    @property
    def group_tiles(self) -> int:
        """See the function of that name."""
        return group_tiles(self.batch, self.keys, self.values)

    @property
    def tail_bytes(self) -> int:
        """Memory of both tails."""
        return self.tail_rows * sum(self._row_bytes(half) for half in self.halves)

    def table_bytes(self, tokens: int) -> int:
        """Memory of what is kept about the tiles of `tokens`."""
        return tokens // self.rows * self.batch * _TABLE_ITEM_BYTES

    def planned_bytes(self, tokens: int) -> int:
        """Bytes of both units when there are `tokens`, as a plan counts them."""
        return sum(half.planned_bytes(self.batch, tokens) for half in self.halves)

    def gathered_bytes(self, half: TileGeometry, tokens: int, *, over_tiles: bool) -> int:
        """What is gathered of `half` for `tokens`: all, or a group of tiles in fp32."""
        if over_tiles:
            tokens = min(tokens, self.group_tiles * self.rows)
            return tokens * self.batch * half.kv_heads * half.dim * _FP32_BYTES
        return tokens * self._row_bytes(half)

    def _row_bytes(self, half: TileGeometry) -> int:
        return self.batch * half.kv_heads * half.dim * half.item_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Division:
    """A budget, and who shares it.

    `layer_count` layers are like the `layers` that are known. `are_alike`: all have the same
    heads. `over_tiles`: gather buffers hold a group of tiles in fp32, not a whole layer.
    `gather_on_host` is False where they are on a GPU with memory of its own.
    """

    budget_bytes: int
    layers: Sequence[LayerSizes]
    layer_count: int
    are_alike: bool
    over_tiles: bool
    gather_on_host: bool

    def shares(self, tokens: int, *, staging_bytes: int = 0) -> BudgetShares:
        """What each takes, with gather buffers and tables for `tokens`."""
        gathered = map(GatherBuffers.allocated_bytes, self.gathered_bytes(tokens))
        return BudgetShares(
            budget_bytes=self.budget_bytes,
            staging_bytes=staging_bytes,
            gather_bytes=sum(gathered) if self.gather_on_host else 0,
            tail_bytes=self._of_all(sum(layer.tail_bytes for layer in self.layers)),
            table_bytes=self._of_all(sum(layer.table_bytes(tokens) for layer in self.layers)),
        )

    def gathered_bytes(self, tokens: int) -> tuple[int, int]:
        """The most that is gathered at a time, of keys and of values."""

        def largest(part: int) -> int:
            return max(
                layer.gathered_bytes(layer.halves[part], tokens, over_tiles=self.over_tiles)
                for layer in self.layers
            )

        return largest(0), largest(1)

    def staging_room(self) -> int:
        """Most that staging may have; 0 where whole layers are gathered, for their buffers grow
        with the context, and where the layers that are known tell nothing of the others."""
        if not self.over_tiles or not self.are_alike:
            return 0
        group = max(layer.group_tiles * layer.rows for layer in self.layers)
        return staging_room(self.shares(group))

    def fitting_staging(self, tokens: int, speeds: DoorSpeeds | None) -> int:
        """Most that staging may have if all KV of `tokens` is to be in the page cache; 0 too where
        the layers that are known tell nothing of the others."""
        if not self.are_alike:
            return 0
        kv_bytes = self._of_all(sum(layer.planned_bytes(tokens) for layer in self.layers))
        claimed = self.shares(round_up(tokens, CAPACITY_STEP_TOKENS))
        return fitting_staging(claimed, kv_bytes, speeds)

    def _of_all(self, size_bytes: int) -> int:
        return size_bytes * self.layer_count // len(self.layers)


def staging_room(claimed: BudgetShares) -> int:
    """Most that staging may have beside what is `claimed` for a group of tiles: half of what is
    left, so that tables may grow and something is page cache; and no more than leaves room for
    tails of two tiles, which taking back tokens needs."""
    left = claimed.budget_bytes - claimed.fixed_bytes
    return max(0, min(left // 2, left - claimed.tail_bytes))


def fitting_staging(claimed: BudgetShares, kv_bytes: int, speeds: DoorSpeeds | None) -> int:
    """Most that staging may have beside what is `claimed` if all KV is to be in the page cache; 0
    where it does not fit, or would not all be put there."""
    is_worth_it = worth_caching(kv_bytes, kv_bytes, speeds).cache_bytes == kv_bytes
    return max(0, claimed.page_cache_bytes - kv_bytes) if is_worth_it else 0
