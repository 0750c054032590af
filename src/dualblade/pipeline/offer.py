"""Rows that a layer was given and that wait for their attention.

With attention over tiles the model's layer first hands over new rows and then asks for attention.
Between the two the rows are offered. If attention is never asked for, the next use of the cache
takes them in all the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch

from dualblade.attention import AttentionQuery
from dualblade.errors import DualBladeError
from dualblade.pipeline.attend import NewRows
from dualblade.pipeline.layer import Layer

if TYPE_CHECKING:
    from dualblade.pipeline.layers import LayeredKV

Result = TypeVar("Result")


class Offer:
    """New rows of one layer. Exactly one of `attend`, `gather` and `settle` takes them in."""

    def __init__(self, kv: LayeredKV, layer: Layer, new: NewRows) -> None:
        self._kv = kv
        self.layer = layer
        self.new = new
        self.is_open = True
        self._gathered: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def tokens(self) -> int:
        """All tokens of each sequence, the new ones included."""
        return self.layer.tokens + (self.new.count if self.is_open else 0)

    def attend(self, query: AttentionQuery) -> torch.Tensor:
        """Attention of `query` to all tokens: [batch, tokens, heads, value_dim].

        Raises: DeviceError; DualBladeError when the rows were taken in already.
        """
        self._require_open()
        return self._resolve(lambda: self._kv.attend_to(self.layer, self.new, query))

    def gather(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and all values as plain tensors, valid until the next layer's turn; asked twice
        they are the same. Raises: DeviceError; DualBladeError when that turn has come."""
        if self._gathered is None:
            self._require_open()
            self._gathered = self._resolve(lambda: self._kv.gather_all(self.layer, self.new))
        return self._gathered

    def settle(self) -> None:
        """The layer's turn is over: take the rows in without attention, unless that happened."""
        self._gathered = None  # the next layer's come to the same place
        if self.is_open:
            self._resolve(lambda: None, is_sweeping=False)

    def _resolve(self, work: Callable[[], Result], *, is_sweeping: bool = True) -> Result:
        try:
            result = work()
            self.is_open = False
            self._kv.take_in(self.layer, self.new, is_sweeping=is_sweeping)
        except BaseException as exc:
            self.is_open = False
            self._kv.fail(exc)
            raise
        return result

    def _require_open(self) -> None:
        if not self.is_open:
            raise DualBladeError(
                f"keys and values of layer {self.layer.index} were used too late",
                hint="use attention='exact' for models that keep them",
            )
