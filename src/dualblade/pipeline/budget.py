"""The budget's division, kept in step with the shapes and the tokens."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

from dualblade.errors import BudgetError
from dualblade.pipeline.division import CAPACITY_STEP_TOKENS, Division
from dualblade.pipeline.gather import GatherBuffers, no_room_to_gather
from dualblade.pipeline.layer import Layer
from dualblade.residency import BudgetShares
from dualblade.units import round_up

_GROWTH_SHARE = 8
_GROWTH_TOKENS_MIN = 256


def tokens_ahead(tokens: int, tokens_max: int | None) -> int:
    """Tokens to prepare for when there are `tokens` now: the stated maximum, or an eighth more,
    so that buffers and plans change a few dozen times in a long generation, not at each step."""
    if tokens_max is not None:
        return max(tokens, tokens_max)
    return tokens + max(_GROWTH_TOKENS_MIN, tokens // _GROWTH_SHARE)


class MemoryBudget:
    """Claims on the budget: staging, gather buffers, tails and tables. See `Division` for
    `layer_count`, `gather_on_host`, `over_tiles` and `layers_alike`.
    """

    def __init__(
        self,
        budget_bytes: int,
        tokens_max: int | None,
        *,
        layer_count: int,
        gather_on_host: bool = True,
        over_tiles: bool = False,
        layers_alike: bool = True,
    ) -> None:
        self._tokens_max = tokens_max
        self._layer_count = layer_count
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
        return tokens > self.capacity_tokens or claimed != (layer.batch, layer.tail_capacity)

    def claim(
        self,
        layers: Collection[Layer],
        tokens: int,
        *,
        staging_bytes: int,
        in_force_bytes: int,
        buffers: GatherBuffers,
        too_small: Callable[[BudgetShares], BudgetError],
    ) -> None:
        """Claim for `tokens` and a while more, or for `tokens` alone where `in_force_bytes`, the
        budget in force, or `buffers`, a GPU's own memory, have no room for more.

        Layers not seen yet are taken to be like the ones that were.
        Raises: what `too_small` makes of shares that pass the budget, BudgetError; the claims are
        then as before.
        """
        division = self.division(layers)
        wide = round_up(tokens_ahead(tokens, self._tokens_max), CAPACITY_STEP_TOKENS)
        narrow = round_up(tokens, CAPACITY_STEP_TOKENS)
        most = self.shares.budget_bytes
        for capacity, there in (
            (max(wide, self.capacity_tokens), min(most, in_force_bytes)),
            (narrow, most),
        ):
            shares = division.shares(capacity, staging_bytes=staging_bytes)
            gathered = division.gathered_bytes(capacity)
            fits = shares.fixed_bytes <= there
            if fits and (self.over_tiles or buffers.try_to_hold(*gathered)):
                break
        else:
            if not shares.fits:
                raise too_small(shares)
            raise no_room_to_gather(sum(gathered))
        self.keys_bytes, self.values_bytes = gathered
        self._claimed = {layer.index: (layer.batch, layer.tail_capacity) for layer in layers}
        self.shares, self.capacity_tokens = shares, capacity  # last: Ctrl-C before claims anew

    def forget(self) -> None:
        """No layer is known any more; staging and gather buffers stay."""
        self._claimed.clear()

    def group_tokens(self, layer: Layer) -> int:
        """Tokens of the layer that are copied together at a time."""
        whole = self.capacity_tokens
        return min(whole, layer.group_tiles * layer.rows) if self.over_tiles else whole

    def division(self, layers: Collection[Layer]) -> Division:
        """The budget as it is, and `layers`, of those that there will be."""
        return Division(
            budget_bytes=self.shares.budget_bytes,
            layers=tuple(layer.sizes for layer in layers),
            layer_count=self._layer_count,
            are_alike=self._layers_alike,
            over_tiles=self.over_tiles,
            gather_on_host=self._gather_on_host,
        )
