"""What attention is asked, and the rows that it is given piece by piece."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch


@dataclass(slots=True, kw_only=True, eq=False)  # frozen would cost 4 us a layer
class AttentionQuery:
    """The query rows of one layer and what they may see.

    Shapes:
        query          [batch, heads, tokens, key_dim]; heads are a multiple of the KV heads, and
                       those of one group lie side by side
        first_visible  [batch] int64 on the CPU: tokens before it are padding; None: none are
        mask           [batch or 1, heads or 1, tokens, all tokens], bool (True is seen) or added to
                       the scores; it then says alone what is seen. None: each token sees itself and
                       what is before it
        bias           [batch or 1, heads or 1, tokens, all tokens], added to the scores
        sinks          [heads]: a score that takes part in the softmax and has no value

    `past` is the number of tokens before the query's first; scores are multiplied by `scaling`,
    then squeezed to +-`softcap` where there is one.
    """

    query: torch.Tensor
    past: int
    scaling: float
    first_visible: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        """Query rows of one head."""
        return self.query.shape[2]

    def rows(self, kv_heads: int) -> int:
        """Query rows that share one KV head."""
        return self.query.shape[1] // kv_heads * self.tokens

    def is_causal_from(self, first: int) -> bool:
        """Whether each row sees itself and all before it, of the tokens from `first` on."""
        starts = self.first_visible
        return self.mask is None and (starts is None or first >= int(starts.max()))

    def visible(self, first: int, last: int) -> torch.Tensor | None:
        """What of tokens [first, last) is seen: [batch or 1, heads or 1, tokens, last - first] as
        `mask`, or None when all of it is."""
        if self.mask is not None:
            return self.mask[..., first:last]
        device, seen = self.query.device, None
        columns = torch.arange(first, last, device=device)
        if last > self.past + 1:
            own = torch.arange(self.past, self.past + self.tokens, device=device)
            seen = (columns <= own[:, None])[None, None]
        if self.first_visible is not None and first < int(self.first_visible.max()):
            real = (columns >= self.first_visible.to(device)[:, None])[:, None, None]
            seen = real if seen is None else seen & real
        return seen


@dataclass(slots=True, eq=False)
class Rows:
    """Keys or values of tokens in order: [tiles, sequences, kv_heads, tile_rows, dim], `tokens` of
    which count; elements of a row lie side by side.

    `first_sequence` is the number of the first stored sequence here. `table` int32 [tiles, batch]
    maps logical sequences to stored ones; None: they are the same.
    """

    tiles: torch.Tensor
    first_token: int
    tokens: int
    first_sequence: int = 0
    table: npt.NDArray[np.int32] | None = None

    @property
    def end_token(self) -> int:
        """The token after the last."""
        return self.first_token + self.tokens


class Running(Protocol):
    """Attention that takes in keys and values piece by piece, in the order of the tokens."""

    def keys(self, rows: Rows) -> None:
        """The next tokens' keys; `rows` may change as soon as the call has returned."""

    def values(self, rows: Rows) -> None:
        """The same tokens' values."""

    def both(self, keys: Rows, values: Rows) -> None:
        """Keys and values of the same tokens; faster than one after the other."""

    def finish(self) -> torch.Tensor:
        """[batch, tokens, heads, value_dim], contiguous, in the query's dtype."""
