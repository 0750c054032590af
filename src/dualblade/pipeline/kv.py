"""The KV cache in time: what happens to a layer's rows and tiles at each step.

One decode step, read aloud: for each layer, check that the step fits; attend to the stored tiles
(they were read ahead) and the tail, or gather them; take in the new rows, full tiles leave behind
compute; let the reads for the layers to come go on.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from dualblade.attention import AttentionQuery
from dualblade.config import EngineConfig, Path
from dualblade.errors import Closed, ConfigError, DualBladeError
from dualblade.io import Engine
from dualblade.metrics import (
    EngineFacts,
    MemoryUse,
    ResidencyEvent,
    StageSeconds,
    TransferTotals,
    UnitPlacement,
)
from dualblade.pipeline.attend import Arrived, NewRows, attend
from dualblade.pipeline.budget import TAIL_SHARE_OF_BUDGET, MemoryBudget
from dualblade.pipeline.facts import engine_facts, transfer_totals
from dualblade.pipeline.gather import GatherBuffers, scatter
from dualblade.pipeline.layer import HalfLayer, Layer, LayerMaker, check_continues, check_rows
from dualblade.pipeline.machinery import Machinery
from dualblade.pipeline.offer import Offer
from dualblade.pipeline.read_ahead import Landing, ReadAhead
from dualblade.pipeline.residence import MemorySource, MemoryWatch, Placements
from dualblade.pipeline.staging import staging_shape
from dualblade.pipeline.unit import Unit
from dualblade.residency import DoorSpeeds
from dualblade.store import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class KVSettings:
    """What a `KVPipeline` is made of. `layer_count` counts the offloaded layers only; `over_tiles`:
    attention works on tiles, and no layer is gathered whole. `memory` None: the budget holds, and
    nobody asks what memory there is. `speeds` None: not measured."""

    path: Path
    budget_bytes: int
    layer_count: int
    tokens_max: int | None
    device: torch.device
    config: EngineConfig
    over_tiles: bool = False
    memory: MemorySource | None = None
    speeds: DoorSpeeds | None = None


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
        self._machinery: Machinery | None = None
        self._reads: ReadAhead | None = None
        self._gather = GatherBuffers(settings.device)
        self._budget = MemoryBudget(
            settings.budget_bytes,
            settings.tokens_max,
            gather_on_host=settings.device.type == "cpu",
            over_tiles=settings.over_tiles,
        )
        source = settings.memory or MemorySource(asked_bytes=settings.budget_bytes)
        self._placements = Placements(
            settings.path,
            settings.layer_count,
            settings.tokens_max,
            store,
            MemoryWatch(source, settings.budget_bytes),
            clock=source.clock,
            speeds=settings.speeds,
            cache_percent=settings.config.cache_percent,
        )
        self._maker = LayerMaker(
            space=store,
            tokens_max=settings.tokens_max,
            tile_tokens=settings.config.tile_tokens,
            tail_bytes_max=settings.budget_bytes // TAIL_SHARE_OF_BUDGET // settings.layer_count,
        )
        self._offer: Offer | None = None
        self._failure: BaseException | None = None
        self._closed = False
        self._read_wait_seconds = 0.0
        self._attention_seconds = 0.0
        self._gather_seconds = 0.0
        self._append_seconds = 0.0
        self._dead_read_bytes = 0

    # -- one step ----------------------------------------------------------------------------

    def offer(self, index: int, key_rows: torch.Tensor, value_rows: torch.Tensor) -> Offer:
        """New rows of layer `index`, to attend to (or to gather) and so to take in.

        Raises: ConfigError, BudgetError, NoSpace before anything changed; DeviceError, Closed.
        """
        layer = self._admit(index, key_rows, value_rows)
        self._offer = Offer(self, layer, NewRows(key_rows, value_rows))
        return self._offer

    def update(
        self, index: int, key_rows: torch.Tensor, value_rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values of layer `index`, the new rows included; the rows are taken in.

        What is returned belongs to the cache and is valid until the next layer's update.
        Raises: as `offer`.
        """
        return self.offer(index, key_rows, value_rows).gather()

    def append(self, index: int, key_rows: torch.Tensor, value_rows: torch.Tensor) -> None:
        """Take in rows of layer `index` without attending to them. Raises: as `offer`."""
        self.offer(index, key_rows, value_rows).settle()

    def attend_to(self, layer: Layer, new: NewRows, query: AttentionQuery) -> torch.Tensor:
        """See `Offer.attend`."""
        machinery = self._require_machinery()
        started, waited = time.perf_counter(), self._wait_seconds()

        def arriving() -> Iterator[Arrived]:
            for landing in self._sweep().take(layer.index) if layer.tokens else ():
                piece = landing.piece
                with machinery.copies.issuing():
                    tiles = machinery.landed_tiles(landing, layer.dtype)
                machinery.copies.landed(landing.slot)
                # Without this the model's stream could read tiles that are not copied yet.
                machinery.copies.end()
                yield Arrived(landing.half, tiles, piece.tile, piece.sequence)
                self._count_dead(layer, landing)

        out = attend(layer, new, query, arriving(), partial(self._group_buffers, layer))
        waited = self._wait_seconds() - waited
        self._read_wait_seconds += waited
        self._attention_seconds += time.perf_counter() - started - waited
        return out

    def gather_all(self, layer: Layer, new: NewRows) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Offer.gather`."""
        if not layer.tokens:
            return new.keys.contiguous(), new.values.contiguous()
        self._gather_whole_layers(layer, new.count)
        machinery = self._require_machinery()
        started, waited = time.perf_counter(), self._wait_seconds()
        capacity = self._budget.capacity_tokens
        together = {
            id(half): buffer(_buffer_shape(layer, half, capacity), layer.dtype)
            for half, buffer in zip(
                layer.halves, (self._gather.keys, self._gather.values), strict=True
            )
        }
        machinery.copies.begin()
        for landing in self._sweep().take(layer.index):
            with machinery.copies.issuing():
                tiles = machinery.landed_tiles(landing, layer.dtype)
                geometry = landing.half.unit.geometry
                out = together[id(landing.half)]
                scatter(landing.piece, tiles, layer.table, geometry, out, machinery.copies.copy)
            machinery.copies.landed(landing.slot)
            self._count_dead(layer, landing)
        stored, past = layer.stored_tiles * layer.rows, layer.tokens
        for half, rows in zip(layer.halves, (new.keys, new.values), strict=True):
            out = together[id(half)]
            out[:, :, stored:past] = half.tail[:, :, : layer.tail_rows]
            out[:, :, past : past + new.count] = rows
        machinery.copies.end()
        waited = self._wait_seconds() - waited
        self._read_wait_seconds += waited
        self._gather_seconds += time.perf_counter() - started - waited
        keys, values = (together[id(half)][:, :, : past + new.count] for half in layer.halves)
        return keys, values

    def take_in(self, layer: Layer, new: NewRows, *, is_sweeping: bool) -> None:
        """See `Taker`."""
        started = time.perf_counter()
        if self._reads is not None and not (is_sweeping and layer.tokens):
            self._reads.cancel()  # what was read ahead would miss the tiles that are stored now
        layer.append(new.keys, new.values, self._require_machinery().store_tiles)
        self._append_seconds += time.perf_counter() - started
        if is_sweeping and len(self._layers) == self._settings.layer_count:
            self._sweep().finish(layer.index)

    def fail(self, cause: BaseException) -> None:
        """See `Taker`."""
        self._failure = cause

    # -- before a step: does it fit? -----------------------------------------------------------

    def _admit(self, index: int, key_rows: torch.Tensor, value_rows: torch.Tensor) -> Layer:
        """The layer, with memory, blocks and doors ready for the new rows.

        A refusal at the first layer of a step leaves everything as it was; later in a step the
        layers before it have the new rows already, and the content is lost.
        """
        self.check_usable()
        self._settle()
        in_step = index > 0 and self._tokens_of(0) != self._tokens_of(index)
        layer = self._layers.get(index)
        is_new = layer is None
        try:
            check_rows(key_rows, value_rows)
            if layer is None:
                layer = self._layers[index] = self._maker.make(index, key_rows, value_rows)
                self._drop_sweep()
            check_continues(layer, key_rows, value_rows)
            self._reserve(layer, key_rows.shape[2])
        except DualBladeError as exc:
            if in_step:
                self._failure = exc
            elif is_new:
                self._layers.pop(index, None)
            raise
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
        if layer.index == 0:
            self._placements.look(self._budget.shares)
            self._budget.raise_to(self._placements.budget_bytes)
        if self._budget.needs_claim(layer, tokens) or self._machinery is None:
            self._claim(layer, tokens)
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
            self._machinery = Machinery(shape, self._store, self._engine, self._settings.device)
        if not self._budget.over_tiles:
            self._gather.ensure(self._budget.keys_bytes, self._budget.values_bytes)

    def _gather_whole_layers(self, layer: Layer, new_rows: int) -> None:
        """From here on layers are gathered whole. Raises: BudgetError when there is no room."""
        if self._budget.over_tiles:
            self._budget.over_tiles = False
            self._claim(layer, layer.tokens + new_rows)
            self._place(layer, layer.tokens + new_rows)

    def _group_buffers(self, layer: Layer, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Where a group of the layer's tiles is copied together, for attention of many rows."""
        self._gather.ensure(self._budget.keys_bytes, self._budget.values_bytes)
        tokens = self._budget.group_tokens(layer)
        shapes = [_buffer_shape(layer, half, tokens) for half in layer.halves]
        return self._gather.keys(shapes[0], dtype), self._gather.values(shapes[1], dtype)

    def _place(self, layer: Layer, tokens: int) -> None:
        """Have each unit at the door of the plan, made again where memory or tokens ask for it."""
        try:
            self._placements.follow(layer, self._layers, tokens, self._budget.shares)
        except BaseException as exc:
            self._failure = exc  # a unit may be between two doors
            raise

    def _before_visit(self, unit: Unit) -> None:
        self._require_machinery().writes.wait(unit.id)
        self._placements.visit(unit)

    def _sweep(self) -> ReadAhead:
        """The reads over all layers known so far, in order."""
        if self._reads is None:
            machinery = self._require_machinery()
            ordered = [self._layers[index] for index in sorted(self._layers)]
            assert [layer.index for layer in ordered] == list(range(len(ordered)))
            self._reads = ReadAhead(
                self._store,
                machinery.read_slots,
                ordered,
                lookahead=self._settings.config.lookahead,
                before_visit=self._before_visit,
            )
        return self._reads

    def _wait_seconds(self) -> float:
        return 0.0 if self._reads is None else self._reads.wait_seconds

    def _count_dead(self, layer: Layer, landing: Landing) -> None:
        piece = landing.piece
        if not layer.table.is_identity and piece.sequence == 0:
            dead = layer.table.dead_sequences(
                piece.tile, piece.tile + piece.tiles, piece.segment.batch
            )
            self._dead_read_bytes += dead * landing.half.unit.geometry.slab_bytes

    def _require_machinery(self) -> Machinery:
        assert self._machinery is not None, "no rows yet"
        return self._machinery

    def _tokens_of(self, index: int) -> int:
        layer = self._layers.get(index)
        return 0 if layer is None else layer.tokens

    # -- sequences and tokens --------------------------------------------------------------------

    def tokens(self, index: int) -> int:
        """Tokens of each sequence in layer `index`, those on offer included."""
        if self._offer is not None and self._offer.layer.index == index:
            return self._offer.tokens
        return self._tokens_of(index)

    def select(self, index: int, indices: torch.Tensor) -> None:
        """In layer `index`, sequence i becomes what `indices[i]` was. No stored byte moves."""
        self.check_usable()
        self._settle()
        layer = self._layers.get(index)
        if layer is not None and layer.tokens:
            layer.select(indices)

    def batch(self, index: int) -> int:
        """Sequences in layer `index`; 0 before its first rows."""
        layer = self._layers.get(index)
        return layer.batch if layer is not None and layer.tokens else 0

    def set_recall(self, index: int, recall: bool) -> None:
        """Keep a tile's worth of rows more in memory, for candidates that may be taken back."""
        self._settle()
        if index in self._layers:
            self._layers[index].recall = recall

    def crop(self, index: int, count: int) -> None:
        """Forget the newest `count` tokens of layer `index`. Raises: DeviceError, Closed."""
        self.check_usable()
        self._settle()
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
            machinery = self._require_machinery()
            layer.drop_tokens(
                count,
                machinery.shape.slot_bytes,
                lambda half, piece: machinery.fetch(layer, half, piece),
            )
        except BaseException as exc:
            self._failure = exc
            raise

    def reset(self) -> None:
        """Forget all tokens; memory and blocks stay for the next prompt. Raises: DeviceError."""
        self.check_usable()
        self._settle()
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

    def _settle(self) -> None:
        """Take in what is still on offer."""
        offer, self._offer = self._offer, None
        if offer is not None:
            offer.settle()
            self.check_usable()

    def _drop_sweep(self) -> None:
        if self._reads is not None:
            self._reads.cancel()
            self._reads = None

    def close(self) -> None:
        """End all transfers, discard the store, free memory. Twice is once."""
        if self._closed:
            return
        self._closed = True
        self._offer = None
        self._drop_sweep()
        if self._machinery is not None:
            self._machinery.writes.abandon()
        try:
            self._store.close()
        finally:
            self._engine.close()
            if self._machinery is not None:
                self._machinery.close()

    def engine_facts(self) -> EngineFacts:
        """The engine in force."""
        return engine_facts(self._engine)

    def memory_use(self) -> MemoryUse:
        """Host memory now; asks the kernel for the store's page cache."""
        shares = self._budget.shares
        return MemoryUse(
            budget_bytes=self._placements.budget_bytes,
            staging_bytes=shares.staging_bytes,
            gather_bytes=shares.gather_bytes,
            tail_bytes=sum(layer.tail_bytes for layer in self._layers.values()),
            table_bytes=sum(layer.table.size_bytes for layer in self._layers.values()),
            page_cache_planned_bytes=self._placements.page_cache_bytes,
            page_cache_bytes=0 if self._closed else self._store.page_cache_bytes(),
        )

    def transfers(self) -> TransferTotals:
        """Bytes asked of the store so far."""
        return transfer_totals(self._store, self._dead_read_bytes)

    def seconds(self) -> StageSeconds:
        """Where the model's thread spent time in the cache."""
        writes = self._machinery.writes.wait_seconds if self._machinery else 0.0
        return StageSeconds(
            read_wait=self._read_wait_seconds,
            attention=self._attention_seconds,
            gather=self._gather_seconds,
            append=self._append_seconds,
            write_wait=writes,
        )

    def placements(self) -> tuple[UnitPlacement, ...]:
        """The plan in force, unit by unit."""
        return self._placements.describe()

    def events(self) -> tuple[ResidencyEvent, ...]:
        """What the plan in force was changed by, oldest first."""
        return self._placements.events()

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
