"""The `memory` path over tiles: laid out and attended to as in a store, but never leaving memory.

It is what computing costs when no byte has to be fetched: the yardstick of the other paths.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dualblade.errors import Closed
from dualblade.io import Arena
from dualblade.metrics import PipelineStages, StageSeconds
from dualblade.pipeline.attend import Arrived, NewRows
from dualblade.pipeline.gather import scatter
from dualblade.pipeline.layer import HalfLayer, Layer, LayerMaker, check_continues, check_rows
from dualblade.pipeline.layers import LayeredKV
from dualblade.pipeline.unit import Piece, Unit, paired_pieces, tile_view
from dualblade.store import Door, Extent
from dualblade.store.extents import Range
from dualblade.units import HUGE_PAGE_BYTES, round_up

_NO_LIMIT = 1 << 62


def _copy(place: torch.Tensor, rows: torch.Tensor) -> None:
    place.copy_(rows)


class TileMemory:
    """Extents of memory. Nothing is copied to make room: segments stay where they are."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._held: dict[Extent, torch.Tensor] = {}

    def allocate(self, size_bytes: int, door: Door) -> Extent:
        """See `Space`."""
        size = round_up(size_bytes, HUGE_PAGE_BYTES)
        extent = Extent(range=Range(0, size), door=door)
        if self._device.type == "cpu":
            # Huge pages, as staging has: attention sweeps all of it at every step.
            self._held[extent] = torch.frombuffer(Arena(size).buffer, dtype=torch.uint8)
        else:
            self._held[extent] = torch.empty(size, dtype=torch.uint8, device=self._device)
        return extent

    def free(self, extent: Extent) -> None:
        """See `Space`."""
        self._held.pop(extent, None)

    def clear(self) -> None:
        """Give all extents back."""
        self._held.clear()

    def move(self, extent: Extent, door: Door) -> None:
        """See `Space`; memory has one door."""

    def split(self, extent: Extent, at_bytes: int) -> Extent:  # noqa: ARG002
        """See `Space`."""
        raise AssertionError("memory has one door")

    def join(self, extent: Extent, rest: Extent) -> None:  # noqa: ARG002
        """See `Space`."""
        raise AssertionError("memory has one door")

    def view(self, unit: Unit, piece: Piece, dtype: torch.dtype) -> torch.Tensor:
        """The piece's tiles [tiles, sequences, kv_heads, rows, dim], where they lie.

        Raises: Closed.
        """
        at, size = piece.offset(unit.geometry), piece.size_bytes(unit.geometry)
        held = self._held.get(piece.segment.extent)
        if held is None:  # by another thread, in the middle of a step
            raise Closed("this cache is closed", hint="make a new one with for_model")
        return tile_view(held[at : at + size], unit.geometry, dtype, piece.tiles, piece.sequences)


class MemoryKV(LayeredKV):
    """The KV of all full-attention layers, in memory. Like `KVPipeline`, without a store."""

    def __init__(
        self,
        device: torch.device,
        tile_tokens: int | None,
        tokens_max: int | None,
        trace_events: int = 0,
        *,
        memory: TileMemory | None = None,
    ) -> None:
        super().__init__(trace_events)
        self._device = device
        self._memory = TileMemory(device) if memory is None else memory
        self._maker = LayerMaker(
            space=self._memory,
            tokens_max=tokens_max,
            tile_tokens=tile_tokens,
            tail_limit=None,
        )

    def _admit(self, index: int, key_rows: torch.Tensor, value_rows: torch.Tensor) -> Layer:
        check_rows(key_rows, value_rows, self._device)
        layer = self._layers.get(index)
        if layer is None:
            layer = self._maker.make(index, key_rows, value_rows, index in self._recalls)
        check_continues(layer, key_rows, value_rows)
        self._layers[index] = layer
        layer.fit_tails()
        return layer

    def _group_buffers(self, layer: Layer, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = layer.group_tiles * layer.rows
        shapes = (
            (layer.batch, half.unit.geometry.kv_heads, tokens, half.unit.geometry.dim)
            for half in layer.halves
        )
        keys, values = (layer.keys.tail.new_empty(shape, dtype=dtype) for shape in shapes)
        return keys, values

    def _gathered(self, layer: Layer, new: NewRows) -> tuple[torch.Tensor, torch.Tensor]:
        past, total = layer.tokens, layer.tokens + new.count
        together = []
        for half, rows in zip(layer.halves, (new.keys, new.values), strict=True):
            out = rows.new_empty((*rows.shape[:2], total, rows.shape[3]))
            for piece in half.unit.pieces(0, layer.stored_tiles, _NO_LIMIT):
                tiles = self._memory.view(half.unit, piece, layer.dtype)
                scatter(piece, tiles, layer.table, half.unit.geometry, out, _copy)
            out[:, :, layer.stored_tiles * layer.rows : past] = half.tail[:, :, : layer.tail_rows]
            out[:, :, past:] = rows
            together.append(out)
        return together[0], together[1]

    def _append(self, layer: Layer, new: NewRows, *, is_sweeping: bool) -> None:  # noqa: ARG002
        tiles = layer.full_tiles(new.count)
        for half in layer.halves:
            half.unit.make_room(tiles, layer.batch)
        layer.append(
            new.keys, new.values, lambda unit, tile, rows: self._store(layer, unit, tile, rows)
        )

    def _store(self, layer: Layer, unit: Unit, first_tile: int, rows: torch.Tensor) -> None:
        tiles = rows.unflatten(2, (-1, unit.geometry.rows)).permute(2, 0, 1, 3, 4)
        for piece in unit.pieces(first_tile, first_tile + len(tiles), _NO_LIMIT):
            low = piece.tile - first_tile
            self._memory.view(unit, piece, layer.dtype).copy_(tiles[low : low + piece.tiles])

    def _arriving(self, layer: Layer, *, any_size: bool) -> Iterator[Arrived]:
        units = (layer.keys.unit, layer.values.unit)
        edge_tiles = layer.stored_tiles if any_size else layer.group_tiles
        for pair in paired_pieces(*units, range(layer.stored_tiles), _NO_LIMIT, edge_tiles):
            keys, values = (
                self._memory.view(half.unit, piece, layer.dtype)
                for half, piece in zip(layer.halves, pair, strict=True)
            )
            yield Arrived(layer.keys, keys, pair[0].tile, pair[0].sequence, values)

    def _forget(self) -> None:
        """Nothing is planned."""

    def _drop_tokens(self, layer: Layer, count: int) -> None:
        def fetch(half: HalfLayer, piece: Piece) -> None:
            layer.recall_tile(half, piece, self._memory.view(half.unit, piece, layer.dtype)[0])

        layer.drop_tokens(count, _NO_LIMIT, fetch)

    def _quiesce(self) -> None:
        """Nothing moves by itself here."""

    def close(self) -> None:
        """Free all memory. Idempotent."""
        self._closed = True
        self._offer = None
        self._layers.clear()
        self._memory.clear()

    def seconds(self) -> StageSeconds:
        """Where the model's thread spent time in the cache."""
        return StageSeconds(attention=self._attention_ns / 1e9, append=self._append_ns / 1e9)

    def stages(self) -> PipelineStages:
        """How long each stage had something to do."""
        return self._timeline.stages()
