"""The `memory` path over tiles: laid out and attended to as in a store, but never leaving memory.

It is what computing costs when no byte has to be fetched: the yardstick of the other paths.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from dualblade.attention import AttentionQuery
from dualblade.errors import Closed, ConfigError
from dualblade.io import Arena
from dualblade.metrics import StageSeconds
from dualblade.pipeline.attend import Arrived, NewRows, attend
from dualblade.pipeline.gather import scatter
from dualblade.pipeline.layer import HalfLayer, Layer, LayerMaker, check_continues, check_rows
from dualblade.pipeline.offer import Offer
from dualblade.pipeline.unit import Piece, Unit, paired_pieces, tile_view
from dualblade.store import Door, Extent
from dualblade.store.extents import Range
from dualblade.units import EXTENT_ALIGN_BYTES, round_up

_NO_LIMIT = 1 << 62


def _copy(place: torch.Tensor, rows: torch.Tensor) -> None:
    place.copy_(rows)


class TileMemory:
    """Extents of memory. Nothing is copied to make room: segments stay where they are."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._held: dict[Extent, torch.Tensor] = {}

    @property
    def allocated_bytes(self) -> int:
        """Memory of all extents."""
        return sum(memory.nbytes for memory in self._held.values())

    def allocate(self, size_bytes: int, door: Door) -> Extent:
        """See `Space`."""
        size = round_up(size_bytes, EXTENT_ALIGN_BYTES)
        extent = Extent(range=Range(0, size), door=door)
        if self._device.type == "cpu":
            # Huge pages, as staging has: attention sweeps all of it at every step.
            self._held[extent] = torch.frombuffer(Arena(size).buffer, dtype=torch.uint8)
        else:
            self._held[extent] = torch.empty(size, dtype=torch.uint8, device=self._device)
        return extent

    def free(self, extent: Extent) -> None:
        """See `Space`."""
        del self._held[extent]

    def move(self, extent: Extent, door: Door) -> None:
        """See `Space`; memory has one door."""

    def view(self, unit: Unit, piece: Piece, dtype: torch.dtype) -> torch.Tensor:
        """The piece's tiles [tiles, sequences, kv_heads, rows, dim], where they lie."""
        at, size = piece.offset(unit.geometry), piece.size_bytes(unit.geometry)
        memory = self._held[piece.segment.extent][at : at + size]
        return tile_view(memory, unit.geometry, dtype, piece.tiles, piece.sequences)


class MemoryKV:
    """The KV of all full-attention layers, in memory. Like `KVPipeline`, without a store."""

    def __init__(
        self,
        device: torch.device,
        tile_tokens: int | None,
        tokens_max: int | None,
        *,
        memory: TileMemory | None = None,
    ) -> None:
        self._memory = TileMemory(device) if memory is None else memory
        self._maker = LayerMaker(
            space=self._memory,
            tokens_max=tokens_max,
            tile_tokens=tile_tokens,
            tail_bytes_max=_NO_LIMIT,
        )
        self._layers: dict[int, Layer] = {}
        self._offer: Offer | None = None
        self._failure: BaseException | None = None
        self._closed = False
        self._attention_seconds = 0.0
        self._append_seconds = 0.0

    @property
    def kv_bytes(self) -> int:
        """Bytes of all rows."""
        return sum(layer.tokens * layer.token_bytes() for layer in self._layers.values())

    def offer(self, index: int, key_rows: torch.Tensor, value_rows: torch.Tensor) -> Offer:
        """New rows of layer `index`. Raises: ConfigError, Closed."""
        self.check_usable()
        self._settle()
        check_rows(key_rows, value_rows)
        layer = self._layers.get(index)
        if layer is None:
            layer = self._layers[index] = self._maker.make(index, key_rows, value_rows)
        check_continues(layer, key_rows, value_rows)
        layer.fit_tails()
        self._offer = Offer(self, layer, NewRows(key_rows, value_rows))
        return self._offer

    def update(
        self, index: int, key_rows: torch.Tensor, value_rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values of layer `index`, the new rows included; the rows are taken in."""
        return self.offer(index, key_rows, value_rows).gather()

    def append(self, index: int, key_rows: torch.Tensor, value_rows: torch.Tensor) -> None:
        """Take in rows of layer `index` without attending to them."""
        self.offer(index, key_rows, value_rows).settle()

    def attend_to(self, layer: Layer, new: NewRows, query: AttentionQuery) -> torch.Tensor:
        """See `Offer.attend`."""
        started = time.perf_counter()

        def buffers(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
            tokens = min(layer.group_tiles * layer.rows, layer.tokens + new.count)
            keys, values = (
                half.tail.new_empty(
                    (layer.batch, half.unit.geometry.kv_heads, tokens, half.unit.geometry.dim),
                    dtype=dtype,
                )
                for half in layer.halves
            )
            return keys, values

        out = attend(layer, new, query, self._arriving(layer), buffers)
        self._attention_seconds += time.perf_counter() - started
        return out

    def gather_all(self, layer: Layer, new: NewRows) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Offer.gather`."""
        if not layer.tokens:
            return new.keys.contiguous(), new.values.contiguous()
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

    def take_in(self, layer: Layer, new: NewRows, *, is_sweeping: bool) -> None:  # noqa: ARG002
        """See `Taker`."""
        started = time.perf_counter()
        tiles = layer.full_tiles(new.count)
        for half in layer.halves:
            half.unit.make_room(tiles, layer.batch, Door.DIRECT)
        layer.append(
            new.keys, new.values, lambda unit, tile, rows: self._store(layer, unit, tile, rows)
        )
        self._append_seconds += time.perf_counter() - started

    def fail(self, cause: BaseException) -> None:
        """See `Taker`."""
        self._failure = cause

    def _store(self, layer: Layer, unit: Unit, first_tile: int, rows: torch.Tensor) -> None:
        tiles = rows.unflatten(2, (-1, unit.geometry.rows)).permute(2, 0, 1, 3, 4)
        for piece in unit.pieces(first_tile, first_tile + len(tiles), _NO_LIMIT):
            low = piece.tile - first_tile
            self._memory.view(unit, piece, layer.dtype).copy_(tiles[low : low + piece.tiles])

    def _arriving(self, layer: Layer) -> Iterator[Arrived]:
        units = (layer.keys.unit, layer.values.unit)
        for pair in paired_pieces(*units, layer.stored_tiles, _NO_LIMIT, layer.group_tiles):
            for half, piece in zip(layer.halves, pair, strict=True):
                tiles = self._memory.view(half.unit, piece, layer.dtype)
                yield Arrived(half, tiles, piece.tile, piece.sequence)

    def tokens(self, index: int) -> int:
        """Tokens of each sequence in layer `index`, those on offer included."""
        if self._offer is not None and self._offer.layer.index == index:
            return self._offer.tokens
        return self._layers[index].tokens if index in self._layers else 0

    def batch(self, index: int) -> int:
        """Sequences in layer `index`; 0 before its first rows."""
        layer = self._layers.get(index)
        return layer.batch if layer is not None and layer.tokens else 0

    def select(self, index: int, indices: torch.Tensor) -> None:
        """In layer `index`, sequence i becomes what `indices[i]` was."""
        self.check_usable()
        self._settle()
        if self.batch(index):
            self._layers[index].select(indices)

    def set_recall(self, index: int, recall: bool) -> None:
        """Keep a tile's worth of rows more in the tail, as a store does: the same arithmetic."""
        self._settle()
        if index in self._layers:
            self._layers[index].recall = recall

    def crop(self, index: int, count: int) -> None:
        """Forget the newest `count` tokens of layer `index`."""
        self.check_usable()
        self._settle()
        layer = self._layers.get(index)
        if layer is None or count == 0:
            return
        if count > layer.tokens:
            raise ConfigError(f"cannot take back {count} tokens of {layer.tokens}")

        def fetch(half: HalfLayer, piece: Piece) -> None:
            layer.recall_tile(half, piece, self._memory.view(half.unit, piece, layer.dtype)[0])

        layer.drop_tokens(count, _NO_LIMIT, fetch)

    def reset(self) -> None:
        """Forget all tokens and give the memory back."""
        self.check_usable()
        self._settle()
        for layer in self._layers.values():
            for half in layer.halves:
                half.unit.free()
        self._layers.clear()

    def check_usable(self) -> None:
        """Raises: Closed after close, or after an error that lost the content."""
        if self._closed:
            raise Closed("this cache is closed", hint="make a new one with for_model")
        if self._failure is not None:
            raise Closed(
                f"this cache failed earlier ({self._failure}) and its content is lost",
                hint="close it and start again with a new one",
            ) from self._failure

    def _settle(self) -> None:
        offer, self._offer = self._offer, None
        if offer is not None:
            offer.settle()
            self.check_usable()

    def close(self) -> None:
        """Free all memory. Twice is once."""
        self._closed = True
        self._offer = None
        self._layers.clear()
        self._memory = TileMemory(torch.device("cpu"))

    def seconds(self) -> StageSeconds:
        """Where the model's thread spent time in the cache."""
        return StageSeconds(attention=self._attention_seconds, append=self._append_seconds)
