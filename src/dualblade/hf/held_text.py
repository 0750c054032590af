"""The tokens whose KV a cache holds, as far as passes told them: a text that goes on from there
begins with them."""

from __future__ import annotations

import torch

from dualblade.hf.lazy import lasting


class HeldText:
    """Ids of one cache's tokens, 4 bytes each, on the CPU. Known from the first token on, or not at
    all until the cache is empty again: passes may bring embeddings, and models tokens of their own.
    """

    def __init__(self) -> None:
        self._room = torch.empty((0, 0), dtype=torch.int32, device="cpu")  # [batch, capacity]
        self._tokens: int | None = 0  # None: unknown
        self._coming: torch.Tensor | None = None  # what the last pass brought

    def bring(self, past: int, ids: torch.Tensor | None) -> None:
        """A pass begins that brings `ids` [batch, tokens] (None: it does not say) to `past` cached
        tokens. Modules within each other may tell of the same one."""
        self._settle(past)
        if ids is None:
            self._tokens = None
        elif self._tokens is not None:
            # A copy where it is: a GPU's is waited for a pass later, when it is there for long.
            self._coming = ids.detach().to(torch.int32, copy=True)

    def shared_with(self, past: int, ids: torch.Tensor, seen: torch.Tensor | None) -> int:
        """Of the `past` tokens that the cache holds, with how many `ids` [batch, more tokens]
        begins; `past` where they are not known. Those not `seen` (a mask, 0) may differ."""
        self._settle(past)
        held = self._room[:, :past]
        if self._tokens is None or len(held) != len(ids):
            return past
        differ = ids[:, :past].to("cpu", torch.int32) != held
        if seen is not None:
            differ &= seen[:, :past].to("cpu", torch.bool)
        columns = differ.any(dim=0).nonzero()
        return int(columns[0]) if len(columns) else past

    def crop(self, past: int, left: int) -> None:
        """Of `past` tokens the first `left` are kept."""
        self._settle(past)
        if self._tokens is not None:
            self._tokens = min(self._tokens, left)

    def forget(self) -> None:
        """What the cache holds is not known, until it is empty again."""
        self._tokens = self._coming = None
        self._room = self._room[:0, :0].clone()

    def _settle(self, past: int) -> None:
        """Take in what the last pass brought, if the cache has as many more tokens now. As many as
        before: it did not come to pass, or is told of twice. Any other number is somebody else's
        doing."""
        coming, self._coming = self._coming, None
        if not past:
            self._tokens = 0
            return
        if self._tokens is None or past == self._tokens:
            return
        if coming is None or past != self._tokens + coming.shape[1]:
            self._tokens = None
            return
        if self._tokens and len(coming) != len(self._room):
            self._tokens = None
            return
        with lasting():
            if past > self._room.shape[1] or len(coming) != len(self._room):
                shape = (len(coming), past + max(past // 4, 64))
                room = torch.empty(shape, dtype=torch.int32, device="cpu")
                if self._tokens:
                    room[:, : self._tokens] = self._room[:, : self._tokens]
                self._room = room
            self._room[:, self._tokens : past] = coming.cpu()
        self._tokens = past
