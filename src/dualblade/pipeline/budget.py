"""The budget's division, kept in step with the shapes and the tokens."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from dualblade.pipeline.gather import GatherBuffers, no_room_to_gather
from dualblade.pipeline.layer import HalfLayer, Layer
from dualblade.residency import BudgetShares, DoorSpeeds, worth_caching
from dualblade.units import round_up

_GROWTH_SHARE = 8
_GROWTH_TOKENS_MIN = 256

CAPACITY_STEP_TOKENS = 64
"""Gather buffers hold a multiple of this many tokens."""

TABLE_ITEM_BYTES = 4 + 2 * 8
"""For each tile and sequence: an int32 of the sequence table, checksums of keys and of values."""


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


def tokens_ahead(tokens: int, tokens_max: int | None) -> int:
    """Tokens to prepare for when there are `tokens` now: the stated maximum, or an eighth more,
    so that buffers and plans change a few dozen times in a long generation, not at each step."""
    if tokens_max is not None:
        return max(tokens, tokens_max)
    return tokens + max(_GROWTH_TOKENS_MIN, tokens // _GROWTH_SHARE)


class MemoryBudget:
    """Claims on the budget: staging, gather buffers, tails and tables.

    `gather_on_host` is False when the gather buffers are on a GPU with memory of its own.
    `over_tiles`: they hold a group of tiles in fp32, not a whole layer. `layers_alike`: all have
    the same heads.
    """

    def __init__(
        self,
        budget_bytes: int,
        tokens_max: int | None,
        *,
        gather_on_host: bool = True,
        over_tiles: bool = False,
        layers_alike: bool = True,
    ) -> None:
        self._tokens_max = tokens_max
        self._gather_on_host = gather_on_host
        self.over_tiles = over_tiles
        self._layers_alike = layers_alike
        self._claimed: dict[int, tuple[int, int]] = {}
        self.capacity_tokens = 0
        self.keys_bytes = 0
        self.values_bytes = 0
        self.shares = BudgetShares(
            budget_bytes=budget_bytes, staging_bytes=0, gather_bytes=0, tail_bytes=0, table_bytes=0
        )

    def raise_to(self, budget_bytes: int) -> None:
        """Claims may take up to `budget_bytes`. It is not lowered: what is claimed stays, and
        less memory than that sends all KV direct instead."""
        if budget_bytes > self.shares.budget_bytes:
            self.shares = replace(self.shares, budget_bytes=budget_bytes)

    def needs_claim(self, layer: Layer, tokens: int) -> bool:
        """Whether `tokens` of `layer` pass what was claimed."""
        claimed = self._claimed.get(layer.index)
        return tokens > self.capacity_tokens or claimed != (layer.batch, layer.tail_bytes)

    def claim(
        self,
        layers: Collection[Layer],
        layer_count: int,
        staging_bytes: int,
        tokens: int,
        buffers: GatherBuffers,
    ) -> None:
        """Claim for `tokens` and a while more, or for `tokens` alone when that is all that fits,
        here and in `buffers`, which a GPU's own memory may have no room for.

        Layers not seen yet are taken to be like the ones that were.
        Raises: BudgetError with the bytes needed; the claims are then as before.
        """
        wide = round_up(tokens_ahead(tokens, self._tokens_max), CAPACITY_STEP_TOKENS)
        narrow = round_up(tokens, CAPACITY_STEP_TOKENS)
        for capacity in (max(wide, self.capacity_tokens), narrow):
            shares = self._divide(layers, layer_count, staging_bytes, capacity)
            gathered = self._gather_bytes(layers, capacity)
            fits = shares.fixed_bytes <= shares.budget_bytes
            if fits and (self.over_tiles or buffers.try_to_hold(*gathered)):
                break
        else:
            shares.require()
            raise no_room_to_gather(sum(gathered))
        self.shares, self.capacity_tokens = shares, capacity
        self.keys_bytes, self.values_bytes = gathered
        self._claimed = {layer.index: (layer.batch, layer.tail_bytes) for layer in layers}

    def staging_room(self, layers: Collection[Layer], layer_count: int) -> int:
        """Most that staging may have; 0 where whole layers are gathered, for their buffers grow
        with the context, and where the first layer tells nothing of the others."""
        if not self.over_tiles or not self._layers_alike:
            return 0
        group = max(layer.group_tiles * layer.rows for layer in layers)
        return staging_room(self._divide(layers, layer_count, 0, group))

    def fitting_staging(
        self, layers: Collection[Layer], layer_count: int, speeds: DoorSpeeds | None
    ) -> int:
        """See `fitting_staging`; 0 too where nobody said how many tokens there will be, or where
        the first layer tells nothing of the others."""
        if self._tokens_max is None or not self._layers_alike:
            return 0
        capacity = round_up(self._tokens_max, CAPACITY_STEP_TOKENS)
        kv_bytes = sum(layer.planned_bytes(self._tokens_max) for layer in layers)
        return fitting_staging(
            self._divide(layers, layer_count, 0, capacity),
            kv_bytes * layer_count // len(layers),
            speeds,
        )

    def forget(self) -> None:
        """No layer is known any more; staging and gather buffers stay."""
        self._claimed.clear()

    def _divide(
        self, layers: Collection[Layer], layer_count: int, staging_bytes: int, capacity: int
    ) -> BudgetShares:
        tails = sum(layer.tail_bytes for layer in layers)
        tables = sum(capacity // layer.rows * layer.batch * TABLE_ITEM_BYTES for layer in layers)
        gather = sum(
            GatherBuffers.allocated_bytes(size) for size in self._gather_bytes(layers, capacity)
        )
        return BudgetShares(
            budget_bytes=self.shares.budget_bytes,
            staging_bytes=staging_bytes,
            gather_bytes=gather if self._gather_on_host else 0,
            tail_bytes=tails * layer_count // len(layers),
            table_bytes=tables * layer_count // len(layers),
        )

    def group_tokens(self, layer: Layer) -> int:
        """Tokens of the layer that are copied together at a time."""
        whole = self.capacity_tokens
        return min(whole, layer.group_tiles * layer.rows) if self.over_tiles else whole

    def _gather_bytes(self, layers: Collection[Layer], capacity: int) -> tuple[int, int]:
        def largest(part: int) -> int:
            return max(
                gather_bytes(la, la.halves[part], capacity, self.over_tiles) for la in layers
            )

        return largest(0), largest(1)


def gather_bytes(layer: Layer, half: HalfLayer, capacity: int, over_tiles: bool) -> int:
    """What is gathered of `half` for `capacity` tokens: all, or a group of tiles in fp32."""
    geometry = half.unit.geometry
    row_elements = layer.batch * geometry.kv_heads * geometry.dim
    if over_tiles:
        return min(capacity, layer.group_tiles * layer.rows) * row_elements * 4
    return capacity * row_elements * geometry.item_bytes
