"""How much of the budget tails may take. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from dualblade.attention import BLOCK_TOKENS, group_tokens
from dualblade.geometry import choose_tile_rows

_SHARE_OF_BUDGET = 10
_SHARE_OF_TABLES = 16
_SHARE_LEFT = 4
_TOKENS_WANTED = BLOCK_TOKENS
"""Tiles of fewer cost twice the processor time and more, and their sums are rounded elsewhere."""

_FP32_BYTES = 4


@dataclass(frozen=True, slots=True)
class TailLimit:
    """Of a cache with `layer_count` layers. `over_tiles`: no layer is gathered whole.
    `staging_bytes`: what staging has already; 0: none yet."""

    budget_bytes: int
    layer_count: int
    over_tiles: bool
    staging_bytes: int = 0

    def bytes_max(self, token_elements: int, item_bytes: int) -> int:
        """Most memory for the tails of a layer whose tokens have `token_elements`, in keys and
        values of all sequences.

        A tenth of the budget. Over tiles as much as 16 tokens have, if that and a group of tiles
        leave a quarter of the budget, and what staging has already with something for tables; with
        `exact` buffers grow with the context, and want the room.
        """
        share = self.budget_bytes // _SHARE_OF_BUDGET // self.layer_count
        if not self.over_tiles:
            return share
        group = _FP32_BYTES * token_elements * group_tokens(token_elements, _TOKENS_WANTED)
        tables = self.budget_bytes // _SHARE_OF_TABLES
        left = max(self.budget_bytes // _SHARE_LEFT, self.staging_bytes + tables)
        room = self.budget_bytes - group - left
        wanted = _TOKENS_WANTED * token_elements * item_bytes
        return max(share, wanted) if wanted * self.layer_count <= room else share


def tile_rows(
    limit: TailLimit | None,
    *,
    kv_heads: int,
    dims: tuple[int, int],
    item_bytes: int,
    batch: int,
    slab_bytes_max: int | None = None,
) -> int:
    """`choose_tile_rows` of a new layer whose tails are within `limit`; None: none is set."""
    elements = batch * kv_heads * sum(dims)
    return choose_tile_rows(
        kv_heads=kv_heads,
        dims=dims,
        item_bytes=item_bytes,
        batch=batch,
        tail_bytes_max=None if limit is None else limit.bytes_max(elements, item_bytes),
        slab_bytes_max=slab_bytes_max,
    )
