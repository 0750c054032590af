"""How a budget is divided between what the layers need. Pure arithmetic on their shapes: for
layers that are there, and for those of a model that is not loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from dualblade.attention import group_tokens
from dualblade.config import EngineConfig
from dualblade.errors import BudgetError
from dualblade.geometry import TileGeometry
from dualblade.pipeline.gather import GatherBuffers
from dualblade.pipeline.staging import StagingShape, staging_shape
from dualblade.pipeline.tails import TailLimit, tile_rows
from dualblade.residency import BudgetShares, DoorSpeeds, worth_caching
from dualblade.units import MIB, format_size, round_up

CAPACITY_STEP_TOKENS = 64
"""Gather buffers hold a multiple of this many tokens."""

_TABLE_ITEM_BYTES = 4 + 2 * 8
"""For each tile and sequence: an int32 of the sequence table, checksums of keys and of values."""

_FP32_BYTES = 4

_TRIES_MAX = 64
"""Of a larger budget staging and tails take less than half, so each try halves what is missing."""


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

    def with_tails(self, limit: TailLimit, tile_tokens: int | None) -> LayerSizes:
        """The layer with tiles of `tile_tokens`; None: of as many as `limit` allows a new layer.
        Its tail is one of them, or as many as it is now."""
        keys, values = self.halves
        rows = tile_tokens or tile_rows(
            limit,
            kv_heads=keys.kv_heads,
            dims=(keys.dim, values.dim),
            item_bytes=keys.item_bytes,
            batch=self.batch,
        )
        return replace(
            self,
            keys=replace(keys, rows=rows),
            values=replace(values, rows=rows),
            tail_rows=rows * max(1, self.tail_rows // self.rows),
        )

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

    def under(self, budget_bytes: int, tile_tokens: int | None) -> Division:
        """The same layers in a cache that is made with another budget. `tile_tokens`: as
        `EngineConfig` has it."""
        limit = TailLimit(budget_bytes, self.layer_count, self.over_tiles)
        layers = [layer.with_tails(limit, tile_tokens) for layer in self.layers]
        return replace(self, budget_bytes=budget_bytes, layers=layers)

    def staging(
        self,
        config: EngineConfig,
        *,
        multiplied_bytes: int,
        fitting_tokens: int | None,
        speeds: DoorSpeeds | None,
    ) -> StagingShape:
        """The slots for this budget. `fitting_tokens`: whose KV staging makes way for, where that
        is enough to keep all of it in the page cache; None: it makes none."""
        return staging_shape(
            config,
            self.budget_bytes,
            max(half.slab_bytes for half in self.layers[0].halves),
            room_bytes=self.staging_room(),
            multiplied_bytes=multiplied_bytes,
            fitting_bytes=0
            if fitting_tokens is None
            else self.fitting_staging(fitting_tokens, speeds),
        )

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


def least_budget(budget_bytes: int, shares_of: Callable[[int], BudgetShares]) -> int:
    """The least that does, each divided by `shares_of`: `budget_bytes`, or more in whole MiB."""
    for _ in range(_TRIES_MAX):
        shares = shares_of(budget_bytes)
        if shares.fits:
            break
        budget_bytes = round_up(max(shares.fixed_bytes, budget_bytes + 1), MIB)
    return budget_bytes


def too_small(
    shares: BudgetShares, needed_bytes: int, *, batch: int, tokens: int, over_tiles: bool
) -> BudgetError:
    """That `shares` pass their budget, and what would do for `tokens` of each sequence."""
    each = f"{batch} x {tokens}" if batch > 1 else f"{tokens}"
    return BudgetError(
        f"the memory budget of {format_size(shares.budget_bytes)} is too small: staging "
        f"{format_size(shares.staging_bytes)}, {_buffer_name(over_tiles=over_tiles)} "
        f"{format_size(shares.gather_bytes)}, tails and tables "
        f"{format_size(shares.tail_bytes + shares.table_bytes)}",
        needed_bytes=needed_bytes,
        hint=f"give it at least {needed_bytes // MIB} MiB, which do for {each} tokens"
        if needed_bytes > shares.budget_bytes
        else f"make a new cache, which has room for {each} tokens in as much",
    )


def _buffer_name(*, over_tiles: bool) -> str:
    """What attention puts together: a layer, or over tiles a group of them."""
    return "group buffer" if over_tiles else "gather buffer"


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
