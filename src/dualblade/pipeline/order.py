"""Which stored sequence each logical sequence of each tile is.

Beam search reorders sequences at every step. Stored tiles are never rewritten for that: a table
[tiles, batch] maps the logical sequence to the physical one, and repeat, select and reorder are
all one indexing of its columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Run:
    """Tiles [start, stop) whose logical sequence `logical` is the stored `physical`."""

    logical: int
    physical: int
    start: int
    stop: int


class SequenceTable:
    """Rows grow in steps of doubling, so that appending a tile is cheap. int32.

    Until the first reorder everything is the identity and no row is looked at.
    """

    def __init__(self) -> None:
        self._rows: npt.NDArray[np.int32] = np.empty((0, 0), dtype=np.int32)
        self._tiles = 0
        self.is_identity = True

    @property
    def size_bytes(self) -> int:
        """Memory of the table."""
        return self._rows.nbytes

    def append(self, tiles: int, batch: int) -> None:
        """`tiles` more tiles, written in the order of the `batch` logical sequences."""
        needed = self._tiles + tiles
        if self._rows.shape[1] != batch:
            assert self._tiles == 0, "the table follows every change of batch"
            self._rows = np.empty((0, batch), dtype=np.int32)
        if needed > len(self._rows):
            grown = np.empty((max(needed, 2 * len(self._rows)), batch), dtype=np.int32)
            grown[: self._tiles] = self._rows[: self._tiles]
            self._rows = grown
        self._rows[self._tiles : needed] = np.arange(batch, dtype=np.int32)
        self._tiles = needed

    def select(self, indices: npt.NDArray[np.int64]) -> None:
        """Logical sequence i becomes what `indices[i]` was, in every tile so far."""
        if self._tiles:
            self._rows = np.ascontiguousarray(self._rows[: self._tiles, indices])
            self.is_identity = False

    def crop(self, tiles: int) -> None:
        """Forget all tiles from `tiles` on."""
        self._tiles = min(tiles, self._tiles)
        if self._tiles == 0:
            self._rows = np.empty((0, 0), dtype=np.int32)
            self.is_identity = True

    def rows_of(self, start: int, stop: int) -> npt.NDArray[np.int32] | None:
        """The table's rows [stop - start, batch] of these tiles; None for the identity."""
        return None if self.is_identity else self._rows[start:stop]

    def runs(self, start: int, stop: int) -> Iterator[Run]:
        """What to copy for tiles [start, stop): runs with one physical sequence, per logical."""
        rows = self._rows[start:stop]
        for logical in range(rows.shape[1]):
            column = rows[:, logical]
            edges = np.flatnonzero(np.diff(column)) + 1
            bounds = [0, *edges.tolist(), len(column)]
            for low, high in pairwise(bounds):
                yield Run(logical, int(column[low]), start + low, start + high)

    def dead_sequences(self, start: int, stop: int, physical_batch: int) -> int:
        """Stored (tile, sequence) pairs in [start, stop) that no logical sequence uses."""
        if self.is_identity:
            return 0
        rows = np.sort(self._rows[start:stop], axis=1)
        live = (np.diff(rows, axis=1) != 0).sum() + len(rows)
        return int((stop - start) * physical_batch - live)
