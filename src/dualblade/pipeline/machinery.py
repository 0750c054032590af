"""What moves tiles: staging, its slots, the writes behind compute, and copies to the device."""

from __future__ import annotations

import torch

from dualblade.io import Arena, Engine
from dualblade.pipeline.checksums import Checksums
from dualblade.pipeline.copies import Copies, MakeCopies
from dualblade.pipeline.layer import HalfLayer, Layer
from dualblade.pipeline.read_ahead import Landing
from dualblade.pipeline.staging import Slots, StagingShape
from dualblade.pipeline.timeline import Timeline, now_ns
from dualblade.pipeline.unit import Piece, Unit, tile_view
from dualblade.pipeline.write_behind import WriteBehind
from dualblade.store import Store


class Machinery:
    """Exists from the first rows on, when the shapes are known. Its owner has it before the engine
    hears of its arena: `register`."""

    def __init__(
        self,
        shape: StagingShape,
        store: Store,
        device: torch.device,
        checksums: Checksums,
        timeline: Timeline,
        make_copies: MakeCopies,
    ) -> None:
        self.shape = shape
        self.arena = Arena(shape.total_bytes)
        self.is_registered = False
        self.copies: Copies = make_copies(device, self.arena)
        self._store = store
        self._checksums = checksums
        self._timeline = timeline
        self.read_slots = Slots(self.arena, 0, shape.read_slots, shape.slot_bytes, timeline)
        self.writes = WriteBehind(
            store,
            Slots(
                self.arena,
                shape.read_slots * shape.slot_bytes,
                shape.write_slots,
                shape.slot_bytes,
                timeline,
            ),
            checksums,
            timeline,
        )

    def register(self, engine: Engine) -> None:
        """Make the arena known to the engine, which keeps it to its end. No part of the making:
        Ctrl-C would leave it pinned with nobody who has it, and the next attempt pin another. What
        was cut short is done again, and what the engine knows it does not pin twice."""
        if not self.is_registered:
            engine.register_arena(self.arena)
            self.is_registered = True

    def store_tiles(self, unit: Unit, first_tile: int, rows: torch.Tensor) -> None:
        """Send `rows` [batch, kv_heads, n x tile_rows, dim] behind compute as whole tiles."""
        geometry, size = unit.geometry, unit.geometry.rows
        tiles = rows.shape[2] // size
        for piece in unit.pieces(first_tile, first_tile + tiles, self.shape.slot_bytes):
            slot = self.writes.slot()
            view = tile_view(slot.memory, geometry, rows.dtype, piece.tiles, piece.sequences)
            low = (piece.tile - first_tile) * size
            some = rows[piece.sequence : piece.sequence + piece.sequences]
            some = some[:, :, low : low + piece.tiles * size].unflatten(2, (piece.tiles, size))
            began = now_ns()
            self.copies.fill(slot, view, some.permute(2, 0, 1, 3, 4))
            if slot.busy is None:  # the copy has ended: here, in this thread
                moved = piece.size_bytes(geometry)
                self._timeline.copied("fill", began, now_ns(), unit.id.layer, moved)
            self.writes.write(unit, piece, slot)

    def fetch(self, layer: Layer, half: HalfLayer, piece: Piece) -> None:
        """Read sequences of one stored tile back into the tail."""
        geometry = half.unit.geometry
        self.writes.give_back()
        slot = self.read_slots.acquire()
        assert slot is not None, "nothing is read ahead"
        size = piece.size_bytes(geometry)
        extent = piece.segment.extent
        self._store.read(extent, piece.offset(geometry), slot.address, size).wait()
        self._checksums.verify(half.unit, piece, slot, whole=True)
        staged = tile_view(slot.memory, geometry, layer.dtype, 1, piece.sequences)
        layer.recall_tile(half, piece, staged[0])
        self.read_slots.release(slot)

    def landed_tiles(self, landing: Landing, dtype: torch.dtype) -> torch.Tensor:
        """Landed tiles [tiles, sequences, kv_heads, rows, dim] where the model can read them."""
        piece, geometry = landing.piece, landing.half.unit.geometry
        memory = self.copies.land(landing.slot, piece.size_bytes(geometry))
        return tile_view(memory, geometry, dtype, piece.tiles, piece.sequences)

    def close(self) -> None:
        """Free staging; the drive may not touch it any more."""
        self.writes.abandon()
        self.copies.close()
        self.arena.close()
