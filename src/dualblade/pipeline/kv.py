"""The KV cache in time: what happens to a layer's rows and tiles at each step.

One decode step, read aloud: for each layer, check that the step fits; gather the stored tiles
(they were read ahead) and the tail; take in the new rows, full tiles leave behind compute; let
the reads for the layers to come go on.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from dualblade.config import EngineConfig, Path
from dualblade.errors import Closed, ConfigError, DualBladeError
from dualblade.geometry import Part, TileGeometry, UnitId, choose_tile_rows
from dualblade.io import Arena, Engine
from dualblade.metrics import (
    EngineFacts,
    MemoryUse,
    StageSeconds,
    TransferTotals,
    UnitPlacement,
)
from dualblade.pipeline.budget import TAIL_SHARE_OF_BUDGET, MemoryBudget, Placements
from dualblade.pipeline.copies import CudaCopies, HostCopies, copies_for
from dualblade.pipeline.gather import GatherBuffers, scatter
from dualblade.pipeline.layer import HalfLayer, Layer, check_continues, check_rows
from dualblade.pipeline.read_ahead import ReadAhead
from dualblade.pipeline.staging import Slots, StagingShape, staging_shape
from dualblade.pipeline.unit import Piece, Unit, tile_view
from dualblade.pipeline.write_behind import WriteBehind
from dualblade.store import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class KVSettings:
    """What a `KVPipeline` is made of. `layer_count` counts the offloaded layers only."""

    path: Path
    budget_bytes: int
    layer_count: int
    tokens_max: int | None
    device: torch.device
    config: EngineConfig


@dataclass(slots=True, eq=False)
class _Machinery:
    """What exists from the first rows on, when the shapes are known."""

    shape: StagingShape
    arena: Arena
    read_slots: Slots
    writes: WriteBehind
    copies: HostCopies | CudaCopies


class KVPipeline:
    """The KV of the offloaded layers of one model, in one store.

    Layers are numbered by their order in the sweep. Tensors are [batch, kv_heads, tokens, dim].
    Used by one thread. After an error in the middle of a step the content is lost: every further
    call raises `Closed` with the cause; `close` always works.
    """

    def __init__(self, store: Store, engine: Engine, settings: KVSettings) -> None:
        self._store = store
        self._engine = engine
        self._settings = settings
        self._layers: dict[int, Layer] = {}
        self._machinery: _Machinery | None = None
        self._reads: ReadAhead | None = None
        self._gather = GatherBuffers(settings.device)
        self._budget = MemoryBudget(
            settings.budget_bytes,
            settings.tokens_max,
            gather_on_host=settings.device.type == "cpu",
        )
        self._placements = Placements(settings.path, settings.layer_count, settings.tokens_max)
        self._failure: BaseException | None = None
        self._closed = False
        self._read_wait_seconds = 0.0
        self._gather_seconds = 0.0
        self._append_seconds = 0.0
        self._dead_read_bytes = 0

    # -- one step ----------------------------------------------------------------------------

    def update(
        self, index: int, key_rows: torch.Tensor, value_rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values of layer `index`, the new rows included; the rows are taken in.

        What is returned belongs to the cache and is valid until the next layer's update.
        Raises: ConfigError, BudgetError, NoSpace before anything changed; DeviceError, Closed.
        """
        layer = self._admit(index, key_rows, value_rows)
        try:
            if layer.tokens:
                together = self._gather_layer(layer, key_rows, value_rows)
            else:
                together = (key_rows.contiguous(), value_rows.contiguous())
                self._forget_reads()
            self._take_in(layer, key_rows, value_rows)
            if len(self._layers) == self._settings.layer_count:
                self._sweep().finish((2 * layer.index, 2 * layer.index + 1))
        except BaseException as exc:
            self._failure = exc
            raise
        return together

    def append(self, index: int, key_rows: torch.Tensor, value_rows: torch.Tensor) -> None:
        """Take in rows of layer `index` without attending to them. Raises: as `update`."""
        layer = self._admit(index, key_rows, value_rows)
        try:
            self._forget_reads()
            self._take_in(layer, key_rows, value_rows)
        except BaseException as exc:
            self._failure = exc
            raise

    def _gather_layer(
        self, layer: Layer, key_rows: torch.Tensor, value_rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        capacity = self._budget.capacity_tokens
        keys = self._gather.keys(_buffer_shape(layer, layer.keys, capacity), layer.dtype)
        values = self._gather.values(_buffer_shape(layer, layer.values, capacity), layer.dtype)
        machinery = self._require_machinery()
        started, waited = time.perf_counter(), self._sweep().wait_seconds
        machinery.copies.begin()
        for part, (half, out, rows) in enumerate(
            ((layer.keys, keys, key_rows), (layer.values, values, value_rows))
        ):
            self._gather_stored(layer, half, 2 * layer.index + part, out)
            stored, past = layer.stored_tiles * layer.rows, layer.tokens
            out[:, :, stored:past] = half.tail[:, :, : layer.tail_rows]
            out[:, :, past : past + rows.shape[2]] = rows
        machinery.copies.end()
        waited = self._sweep().wait_seconds - waited
        self._read_wait_seconds += waited
        self._gather_seconds += time.perf_counter() - started - waited
        tokens = layer.tokens + key_rows.shape[2]
        return keys[:, :, :tokens], values[:, :, :tokens]

    def _gather_stored(
        self, layer: Layer, half: HalfLayer, position: int, out: torch.Tensor
    ) -> None:
        geometry, copies = half.unit.geometry, self._require_machinery().copies
        for landing in self._sweep().take(position):
            piece = landing.piece
            with copies.issuing():
                staged = tile_view(
                    copies.land(landing.slot, piece.size_bytes(geometry)),
                    geometry,
                    layer.dtype,
                    piece.tiles,
                    piece.sequences,
                )
                scatter(piece, staged, layer.table, geometry, out, copies.copy)
            copies.landed(landing.slot)
            if not layer.table.is_identity and piece.sequence == 0:
                dead = layer.table.dead_sequences(
                    piece.tile, piece.tile + piece.tiles, piece.segment.batch
                )
                self._dead_read_bytes += dead * geometry.slab_bytes

    def _take_in(self, layer: Layer, key_rows: torch.Tensor, value_rows: torch.Tensor) -> None:
        started = time.perf_counter()
        layer.append(key_rows, value_rows, self._store_tiles)
        self._append_seconds += time.perf_counter() - started

    def _store_tiles(self, unit: Unit, first_tile: int, rows: torch.Tensor) -> None:
        """Send `rows` [batch, kv_heads, n x tile_rows, dim] behind compute as whole tiles."""
        machinery = self._require_machinery()
        geometry, size = unit.geometry, unit.geometry.rows
        tiles = rows.shape[2] // size
        for piece in unit.pieces(first_tile, first_tile + tiles, machinery.shape.slot_bytes):
            slot = machinery.writes.slot()
            view = tile_view(slot.memory, geometry, rows.dtype, piece.tiles, piece.sequences)
            low = (piece.tile - first_tile) * size
            some = rows[piece.sequence : piece.sequence + piece.sequences]
            some = some[:, :, low : low + piece.tiles * size].unflatten(2, (piece.tiles, size))
            machinery.copies.fill(slot, view, some.permute(2, 0, 1, 3, 4))
            machinery.writes.write(unit, piece, slot)

    def _forget_reads(self) -> None:
        """Rows are taken in without a gather: what was read ahead would miss their tiles."""
        if self._reads is not None:
            self._reads.cancel()

    def _sweep(self) -> ReadAhead:
        """The reads over all layers known so far, in order."""
        if self._reads is None:
            machinery = self._require_machinery()
            ordered = [self._layers[index] for index in sorted(self._layers)]
            assert [layer.index for layer in ordered] == list(range(len(ordered)))
            self._reads = ReadAhead(
                self._store,
                machinery.read_slots,
                [half.unit for layer in ordered for half in layer.halves],
                lookahead_units=2 * self._settings.config.lookahead,
                before_visit=lambda unit: machinery.writes.wait(unit.id),
            )
        return self._reads

    # -- before a step: does it fit? -----------------------------------------------------------

    def _admit(self, index: int, key_rows: torch.Tensor, value_rows: torch.Tensor) -> Layer:
        """The layer, with memory, blocks and doors ready for the new rows.

        A refusal at the first layer of a step leaves everything as it was; later in a step the
        layers before it have the new rows already, and the content is lost.
        """
        self.check_usable()
        in_step = index > 0 and self._tokens_of(0) != self._tokens_of(index)
        layer = self._layers.get(index)
        is_new = layer is None
        try:
            check_rows(key_rows, value_rows)
            if layer is None:
                layer = self._make_layer(index, key_rows, value_rows)
            check_continues(layer, key_rows, value_rows)
            self._reserve(layer, key_rows.shape[2])
        except DualBladeError as exc:
            if in_step:
                self._failure = exc
            elif is_new:
                self._layers.pop(index, None)
            raise
        return layer

    def _make_layer(self, index: int, key_rows: torch.Tensor, value_rows: torch.Tensor) -> Layer:
        batch, heads, _, key_dim = key_rows.shape
        item_bytes = key_rows.element_size()
        dims = (key_dim, value_rows.shape[3])
        share = self._settings.budget_bytes // TAIL_SHARE_OF_BUDGET
        rows = self._settings.config.tile_tokens or choose_tile_rows(
            kv_heads=heads,
            dims=dims,
            item_bytes=item_bytes,
            batch=batch,
            tail_bytes_max=share // self._settings.layer_count,
        )
        halves = []
        for part, tensor in ((Part.KEYS, key_rows), (Part.VALUES, value_rows)):
            geometry = TileGeometry(
                kv_heads=tensor.shape[1], rows=rows, dim=tensor.shape[3], item_bytes=item_bytes
            )
            unit = Unit(
                UnitId(index, part), geometry, self._store, tokens_max=self._settings.tokens_max
            )
            tail = tensor.new_empty((batch, tensor.shape[1], rows, tensor.shape[3]))
            halves.append(HalfLayer(unit, tail))
        layer = Layer(index, halves[0], halves[1], batch, key_rows.dtype)
        self._layers[index] = layer
        self._drop_sweep()
        return layer

    def _reserve(self, layer: Layer, new_rows: int) -> None:
        """Memory, plan and blocks for `new_rows` more rows. At the first layer of a step for all
        layers, so that a step that does not fit is refused whole."""
        layer.fit_tails()
        tokens = layer.tokens + new_rows
        if self._settings.tokens_max is not None and tokens > self._settings.tokens_max:
            raise ConfigError(
                f"the context would grow to {tokens} tokens, past max_tokens="
                f"{self._settings.tokens_max}",
                hint="give for_model a larger max_tokens, or none",
            )
        together = [
            other
            for other in self._layers.values()
            if other is layer or (layer.index == 0 and other.tokens == layer.tokens)
        ]
        if self._budget.needs_claim(layer, tokens) or self._machinery is None:
            self._claim(layer, tokens)
        if self._placements.needs_plan(layer, tokens, self._budget.shares):
            self._place(layer, tokens)
        for other in together:
            tiles = other.full_tiles(new_rows)
            for half in other.halves:
                if tiles:
                    half.unit.make_room(tiles, other.batch, self._placements.door(half.unit.id))

    def _claim(self, layer: Layer, tokens: int) -> None:
        if self._machinery is None:
            slabs = [half.unit.geometry.slab_bytes for half in layer.halves]
            shape = staging_shape(self._settings.config, self._settings.budget_bytes, max(slabs))
        else:
            shape = self._machinery.shape
        self._budget.claim(
            self._layers.values(), self._settings.layer_count, shape.total_bytes, tokens
        )
        if self._machinery is None:
            self._machinery = self._build(shape)
        self._gather.ensure(self._budget.keys_bytes, self._budget.values_bytes)

    def _build(self, shape: StagingShape) -> _Machinery:
        arena = Arena(shape.total_bytes)
        self._engine.register_arena(arena)
        read_bytes = shape.read_slots * shape.slot_bytes
        writes = Slots(arena, read_bytes, shape.write_slots, shape.slot_bytes)
        return _Machinery(
            shape=shape,
            arena=arena,
            read_slots=Slots(arena, 0, shape.read_slots, shape.slot_bytes),
            writes=WriteBehind(self._store, writes),
            copies=copies_for(self._settings.device, arena),
        )

    def _place(self, layer: Layer, tokens: int) -> None:
        """Plan for `tokens` and a while more; move what the plan moves."""
        self._placements.plan(layer, self._layers, tokens, self._budget.shares)
        for other in self._layers.values():
            for half in other.halves:
                half.unit.move(self._placements.door(half.unit.id))

    def _require_machinery(self) -> _Machinery:
        assert self._machinery is not None, "no rows yet"
        return self._machinery

    def _tokens_of(self, index: int) -> int:
        layer = self._layers.get(index)
        return 0 if layer is None else layer.tokens

    # -- sequences and tokens --------------------------------------------------------------------

    def tokens(self, index: int) -> int:
        """Tokens of each sequence in layer `index`."""
        return self._tokens_of(index)

    def select(self, index: int, indices: torch.Tensor) -> None:
        """In layer `index`, sequence i becomes what `indices[i]` was. No stored byte moves."""
        self.check_usable()
        layer = self._layers.get(index)
        if layer is not None and layer.tokens:
            layer.select(indices)

    def batch(self, index: int) -> int:
        """Sequences in layer `index`; 0 before its first rows."""
        layer = self._layers.get(index)
        return layer.batch if layer is not None and layer.tokens else 0

    def set_recall(self, index: int, recall: bool) -> None:
        """Keep a tile's worth of rows more in memory, for candidates that may be taken back."""
        if index in self._layers:
            self._layers[index].recall = recall

    def crop(self, index: int, count: int) -> None:
        """Forget the newest `count` tokens of layer `index`. Raises: DeviceError, Closed."""
        self.check_usable()
        layer = self._layers.get(index)
        if layer is None or count == 0:
            return
        if count > layer.tokens:
            raise ConfigError(f"cannot take back {count} tokens of {layer.tokens}")
        try:
            if count > layer.tail_rows:
                self._drop_sweep()
                for half in layer.halves:
                    self._require_machinery().writes.wait(half.unit.id)
            layer.drop_tokens(
                count,
                self._require_machinery().shape.slot_bytes,
                lambda half, piece: self._fetch_piece(layer, half, piece),
            )
        except BaseException as exc:
            self._failure = exc
            raise

    def _fetch_piece(self, layer: Layer, half: HalfLayer, piece: Piece) -> None:
        """Read sequences of one stored tile back into the tail."""
        machinery, geometry = self._require_machinery(), half.unit.geometry
        slot = machinery.read_slots.acquire()
        assert slot is not None, "the sweep was dropped"
        size = piece.size_bytes(geometry)
        extent = piece.segment.extent
        self._store.read(extent, piece.offset(geometry), slot.address, size).wait()
        staged = tile_view(slot.memory, geometry, layer.dtype, 1, piece.sequences)
        for run in layer.table.runs(piece.tile, piece.tile + 1):
            if piece.sequence <= run.physical < piece.sequence + piece.sequences:
                rows = staged[0, run.physical - piece.sequence]
                half.tail[run.logical, :, : geometry.rows] = rows.to(half.tail.device)
        machinery.read_slots.release(slot)

    def reset(self) -> None:
        """Forget all tokens; memory and blocks stay for the next prompt. Raises: DeviceError."""
        self.check_usable()
        self._drop_sweep()
        if self._machinery is not None:
            self._machinery.writes.drain()
        for layer in self._layers.values():
            for half in layer.halves:
                half.unit.free()
        self._layers.clear()
        self._placements.forget()
        self._budget.forget()

    # -- the end, and what there is to tell ------------------------------------------------------

    def check_usable(self) -> None:
        """Raises: Closed after close, or after an error that lost the content."""
        if self._closed:
            raise Closed("this cache is closed", hint="make a new one with for_model")
        if self._failure is not None:
            cause = str(self._failure).splitlines()[0] if str(self._failure) else ""
            raise Closed(
                f"this cache failed earlier ({type(self._failure).__name__}: {cause}) "
                "and its content is lost",
                hint="close it and start again with a new one",
            ) from self._failure

    def _drop_sweep(self) -> None:
        if self._reads is not None:
            self._reads.cancel()
            self._reads = None

    def close(self) -> None:
        """End all transfers, discard the store, free memory. Twice is once."""
        if self._closed:
            return
        self._closed = True
        self._drop_sweep()
        if self._machinery is not None:
            self._machinery.writes.abandon()
        try:
            self._store.close()
        finally:
            self._engine.close()
            if self._machinery is not None:
                self._machinery.copies.close()
                self._machinery.arena.close()

    def engine_facts(self) -> EngineFacts:
        """The engine in force."""
        return EngineFacts(
            name=self._engine.name,
            reason=self._engine.reason,
            queue_depth=self._engine.queue_depth,
            chunk_bytes=self._engine.chunk_bytes,
            notes=tuple(self._engine.notes),
        )

    def memory_use(self) -> MemoryUse:
        """Host memory now; asks the kernel for the store's page cache."""
        shares = self._budget.shares
        return MemoryUse(
            budget_bytes=self._settings.budget_bytes,
            staging_bytes=shares.staging_bytes,
            gather_bytes=shares.gather_bytes,
            tail_bytes=sum(layer.tail_bytes for layer in self._layers.values()),
            table_bytes=sum(layer.table.size_bytes for layer in self._layers.values()),
            page_cache_planned_bytes=self._placements.page_cache_bytes,
            page_cache_bytes=0 if self._closed else self._store.page_cache_bytes(),
        )

    def transfers(self) -> TransferTotals:
        """Bytes asked of the store so far."""
        counters = self._store.counters
        return TransferTotals(
            direct_read_bytes=counters.direct_read_bytes,
            direct_write_bytes=counters.direct_write_bytes,
            page_cache_read_bytes=counters.page_cache_read_bytes,
            page_cache_write_bytes=counters.page_cache_write_bytes,
            dead_read_bytes=self._dead_read_bytes,
            promotions=counters.promotions,
            demotions=counters.demotions,
        )

    def seconds(self) -> StageSeconds:
        """Where the model's thread spent time in the cache."""
        writes = self._machinery.writes.wait_seconds if self._machinery else 0.0
        return StageSeconds(
            read_wait=self._read_wait_seconds,
            gather=self._gather_seconds,
            append=self._append_seconds,
            write_wait=writes,
        )

    def placements(self) -> tuple[UnitPlacement, ...]:
        """The plan in force, unit by unit."""
        return self._placements.describe()

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tiles in the store."""
        return sum(half.unit.stored_bytes for la in self._layers.values() for half in la.halves)

    @property
    def kv_bytes(self) -> int:
        """Bytes of all rows, stored or in tails."""
        return sum(layer.tokens * layer.token_bytes() for layer in self._layers.values())


def _buffer_shape(layer: Layer, half: HalfLayer, capacity: int) -> tuple[int, int, int, int]:
    return layer.batch, half.unit.geometry.kv_heads, capacity, half.unit.geometry.dim
