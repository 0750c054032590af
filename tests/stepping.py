"""One layer's turn in a step, as a model takes it: rows in, then attention to all of them."""

from __future__ import annotations

import torch

from dualblade import DualBladeCache
from dualblade.hf.tile_attention import tile_attention


def take_turn(
    cache: DualBladeCache, key_rows: torch.Tensor, value_rows: torch.Tensor, layer: int
) -> torch.Tensor:
    """Attention output [batch, tokens, kv_heads, value_dim] of the rows to all keys and values."""
    keys, values = cache.update(key_rows, value_rows, layer)
    return tile_attention(torch.nn.Module(), key_rows, keys, values, None)[0]
