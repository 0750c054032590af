"""The `exact` way into attention: tiles gathered into one [batch, kv_heads, tokens, dim] buffer."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dualblade.errors import BudgetError
from dualblade.geometry import TileGeometry
from dualblade.io import Arena
from dualblade.pipeline.order import SequenceTable
from dualblade.pipeline.unit import Piece
from dualblade.units import HUGE_PAGE_BYTES, format_size, round_up


class GatherBuffers:
    """One buffer for keys and one for values, shared by all layers: a layer's attention has read
    them before the next layer's tiles are gathered. Reallocated only when the claim changes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._keys = torch.empty(0, dtype=torch.uint8)
        self._values = torch.empty(0, dtype=torch.uint8)

    def ensure(self, keys_bytes: int, values_bytes: int) -> None:
        """Have room for a layer of that size, and no more. Contents are lost at a change. Raises:
        BudgetError when the device has no room."""
        if not self.try_to_hold(keys_bytes, values_bytes):
            raise no_room_to_gather(keys_bytes + values_bytes)

    def try_to_hold(self, keys_bytes: int, values_bytes: int) -> bool:
        """As `ensure`; False when the device has no room."""
        try:
            self._hold(keys_bytes, values_bytes)
        except torch.OutOfMemoryError:
            return False
        return True

    def _hold(self, keys_bytes: int, values_bytes: int) -> None:
        if self._keys.nbytes != self.allocated_bytes(keys_bytes):
            self._keys = torch.empty(0, dtype=torch.uint8)  # free before taking the new one
            self._keys = self._buffer(keys_bytes)
        if self._values.nbytes != self.allocated_bytes(values_bytes):
            self._values = torch.empty(0, dtype=torch.uint8)
            self._values = self._buffer(values_bytes)

    def keys(self, shape: tuple[int, int, int, int], dtype: torch.dtype) -> torch.Tensor:
        """The keys' buffer as [batch, kv_heads, capacity, dim]."""
        return _shaped(self._keys, shape, dtype)

    def values(self, shape: tuple[int, int, int, int], dtype: torch.dtype) -> torch.Tensor:
        """The values' buffer as [batch, kv_heads, capacity, dim]."""
        return _shaped(self._values, shape, dtype)

    @staticmethod
    def allocated_bytes(size_bytes: int) -> int:
        """Memory that a buffer of `size_bytes` takes: whole huge pages."""
        return round_up(size_bytes, HUGE_PAGE_BYTES)

    def _buffer(self, size_bytes: int) -> torch.Tensor:
        if self._device.type != "cpu":
            size_bytes = self.allocated_bytes(size_bytes)
            return torch.empty(size_bytes, dtype=torch.uint8, device=self._device)
        # Huge pages: attention sweeps the buffer at every step, and 4 KiB pages cost TLB misses.
        # The arena's memory lives as long as the tensor does.
        arena = Arena(self.allocated_bytes(size_bytes))
        return torch.frombuffer(arena.buffer, dtype=torch.uint8)


def no_room_to_gather(size_bytes: int) -> BudgetError:
    """That the model's device has no memory for what is gathered at a time."""
    return BudgetError(
        f"the device has no room for {format_size(size_bytes)} of gathered keys and values",
        needed_bytes=size_bytes,
        hint="fewer sequences, or a shorter context; attention='tiles' gathers no whole layer",
    )


def _shaped(
    buffer: torch.Tensor, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> torch.Tensor:
    batch, heads, capacity, dim = shape
    return buffer.view(dtype)[: batch * heads * capacity * dim].view(shape)


def scatter(
    piece: Piece,
    staged: torch.Tensor,
    table: SequenceTable,
    geometry: TileGeometry,
    out: torch.Tensor,
    copy: Callable[[torch.Tensor, torch.Tensor], None],
) -> None:
    """Copy a landed piece to its tokens in `out`, by `copy(place, tiles)`.

    Shapes: staged [tiles, sequences, kv_heads, rows, dim]; out [batch, kv_heads, capacity, dim].
    """
    rows = geometry.rows
    first, last = piece.sequence, piece.sequence + piece.sequences
    if table.is_identity:
        tokens = slice(piece.tile * rows, (piece.tile + piece.tiles) * rows)
        place = out[first:last, :, tokens].unflatten(2, (piece.tiles, rows))
        copy(place, staged.permute(1, 2, 0, 3, 4))
        return
    for run in table.runs(piece.tile, piece.tile + piece.tiles):
        if first <= run.physical < last:
            tiles = staged[run.start - piece.tile : run.stop - piece.tile, run.physical - first]
            place = out[run.logical, :, run.start * rows : run.stop * rows]
            place = place.unflatten(1, (run.stop - run.start, rows))
            copy(place, tiles.permute(1, 0, 2, 3))
