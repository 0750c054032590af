"""The KV cache in time: what happens to a layer's rows and tiles at each step.

One decode step, read aloud: for each layer, check that the step fits; attend to the stored tiles
(they were read ahead) and the tail, or gather them; take in the new rows, full tiles leave behind
compute; let the reads for the layers to come go on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from dualblade.errors import BudgetError, DualBladeError, NoSpace, Unsupported
from dualblade.io import Engine
from dualblade.metrics import (
    EngineFacts,
    MemoryUse,
    PipelineStages,
    PipelineTuning,
    ResidencyEvent,
    StageSeconds,
    TransferTotals,
    UnitPlacement,
)
from dualblade.pipeline.attend import Arrived, NewRows
from dualblade.pipeline.budget import MemoryBudget
from dualblade.pipeline.checksums import Checksums
from dualblade.pipeline.copies import shares_host_memory
from dualblade.pipeline.division import CAPACITY_STEP_TOKENS, Division, least_budget, too_small
from dualblade.pipeline.facts import engine_facts, transfer_totals
from dualblade.pipeline.gather import GatherBuffers, scatter
from dualblade.pipeline.layer import HalfLayer, Layer, LayerMaker, check_continues, check_rows
from dualblade.pipeline.layers import LayeredKV
from dualblade.pipeline.machinery import Machinery
from dualblade.pipeline.memory_watch import MemorySource, MemoryWatch
from dualblade.pipeline.pace import Pace
from dualblade.pipeline.read_ahead import Landing, ReadAhead
from dualblade.pipeline.residence import Placements
from dualblade.pipeline.settings import KVSettings
from dualblade.pipeline.staging import CopyEvent, StagingShape
from dualblade.pipeline.tails import TailLimit
from dualblade.pipeline.timeline import Lane, now_ns
from dualblade.pipeline.unit import Unit
from dualblade.residency import BudgetShares
from dualblade.store import Store
from dualblade.units import round_up


class KVPipeline(LayeredKV):
    """The KV of the offloaded layers of one model, in one store."""

    def __init__(self, store: Store, engine: Engine, settings: KVSettings) -> None:
        super().__init__(settings.config.trace_events)
        self._store = store
        self._engine = engine
        self._settings = settings
        self._shape: StagingShape | None = None
        self._machinery: Machinery | None = None  # made for that shape
        self._reads: ReadAhead | None = None
        self.checksums = Checksums(store, settings.config.checksums)
        self._gather = GatherBuffers(settings.device)
        self._budget = MemoryBudget(
            settings.budget_bytes,
            settings.tokens_max,
            layer_count=settings.layer_count,
            gather_on_host=shares_host_memory(settings.device),
            over_tiles=settings.over_tiles,
            layers_alike=settings.layers_alike,
        )
        source = settings.memory or MemorySource(asked_bytes=settings.budget_bytes)
        self._placements = Placements(
            settings.path,
            settings.layer_count,
            settings.tokens_max,
            store,
            MemoryWatch(source, settings.budget_bytes),
            before_cut=self._hold_nothing,
            clock=source.clock,
            speeds=settings.speeds,
            cache_percent=settings.config.cache_percent,
        )
        self._maker = LayerMaker(
            space=store,
            tokens_max=settings.tokens_max,
            tile_tokens=settings.config.tile_tokens,
            tail_limit=TailLimit(settings.budget_bytes, settings.layer_count, settings.over_tiles),
        )
        self._gather_ns = 0
        self._pace: Pace | None = None  # made with the machinery
        self._dead_read_bytes = 0

    # -- one step ----------------------------------------------------------------------------

    def _arriving(self, layer: Layer, *, any_size: bool) -> Iterator[Arrived]:
        if not layer.tokens:
            return
        machinery, sweep = self._require_machinery(), self._sweep()
        copies, copied = machinery.copies, deque[tuple[Arrived, CopyEvent | None]]()
        keys: Arrived | None = None  # whose values follow
        for landing in sweep.take(layer.index, any_size=any_size):
            piece = landing.piece
            with copies.issuing():
                tiles = machinery.landed_tiles(landing, layer.dtype)
            copies.landed(landing.slot)
            arrived = Arrived(landing.half, tiles, piece.tile, piece.sequence)
            self._count_dead(layer, landing)
            if landing.values_follow:
                keys = arrived
                continue
            if keys is not None:
                arrived, keys = replace(keys, values=tiles), None
            copied.append((arrived, landing.slot.busy))
            # Copies run ahead of attention, but no read is waited for while tiles are at hand.
            while copied and (len(copied) > copies.ahead or not sweep.has_landed()):
                arrived, event = copied.popleft()
                if event is not None:
                    began = now_ns()
                    # Without this the model could read tiles that are not copied yet.
                    copies.use(event)
                    self._timeline.stall(Lane.COPIES, began, now_ns())
                yield arrived

    def _gathered(self, layer: Layer, new: NewRows) -> tuple[torch.Tensor, torch.Tensor]:
        timeline = self._timeline
        self._gather_whole_layers(layer, new.count)
        machinery = self._require_machinery()
        self._gather.ensure(self._budget.keys_bytes, self._budget.values_bytes)
        began, stalled = now_ns(), timeline.stalled_ns
        capacity = self._budget.capacity_tokens
        together = {
            id(half): buffer(_buffer_shape(layer, half, capacity), layer.dtype)
            for half, buffer in zip(
                layer.halves, (self._gather.keys, self._gather.values), strict=True
            )
        }
        machinery.copies.begin()
        for landing in self._sweep().take(layer.index, any_size=True):
            copying = now_ns()
            with machinery.copies.issuing():
                tiles = machinery.landed_tiles(landing, layer.dtype)
                geometry = landing.half.unit.geometry
                out = together[id(landing.half)]
                scatter(landing.piece, tiles, layer.table, geometry, out, machinery.copies.copy)
            machinery.copies.landed(landing.slot)
            size = landing.piece.size_bytes(geometry)
            if landing.slot.busy is None:  # the copy has ended: here, in this thread
                timeline.copied("gather", copying, now_ns(), layer.index, size)
            self._count_dead(layer, landing)
        stored, past = layer.stored_tiles * layer.rows, layer.tokens
        for half, rows in zip(layer.halves, (new.keys, new.values), strict=True):
            out = together[id(half)]
            out[:, :, stored:past] = half.tail[:, :, : layer.tail_rows]
            out[:, :, past : past + new.count] = rows
        machinery.copies.end()
        self._gather_ns += now_ns() - began - (timeline.stalled_ns - stalled)
        keys, values = (together[id(half)][:, :, : past + new.count] for half in layer.halves)
        return keys, values

    def _append(self, layer: Layer, new: NewRows, *, is_sweeping: bool) -> None:
        if self._reads is not None and not (is_sweeping and layer.tokens):
            self._reads.cancel()  # what was read ahead would miss the tiles that are stored now
        machinery = self._require_machinery()
        if self._reads is None or self._reads.is_idle:
            machinery.writes.spare = machinery.read_slots
        layer.append(new.keys, new.values, machinery.store_tiles)
        if is_sweeping and len(self._layers) == self._settings.layer_count:
            if layer.index == self._settings.layer_count - 1:
                self._end_step(new.count, layer.tokens)
            self._sweep().finish(layer.index)

    def _end_step(self, rows: int, tokens: int) -> None:
        """Learn from what the step took, for the reads of those to come."""
        assert self._pace is not None, "made with the machinery"
        self._pace.end_step(
            rows=rows,
            tokens=tokens,
            layers=len(self._layers),
            busy_seconds=self._engine.counters().direct_busy_seconds,
            read_bytes=self._store.counters.direct_read_bytes,
        )
        self._sweep().setting = self._pace.setting

    # -- before a step: does it fit? -----------------------------------------------------------

    def _admit(self, index: int, key_rows: torch.Tensor, value_rows: torch.Tensor) -> Layer:
        """The layer, with memory, blocks and doors ready for the new rows.

        A refusal at the first layer of a step leaves everything as it was; later in a step the
        layers before it have the new rows already, and the content is lost.
        """
        in_step = index > 0 and self._tokens_of(0) != self._tokens_of(index)
        layer = self._layers.get(index)
        is_new = layer is None
        try:
            check_rows(key_rows, value_rows, self._settings.device)
            if layer is None:
                layer = self._maker.make(index, key_rows, value_rows, index in self._recalls)
                self._layers[index] = layer
                self._drop_sweep()
            check_continues(layer, key_rows, value_rows)
            self._reserve(layer, key_rows.shape[2])
        except BaseException as exc:
            is_refusal = self._failure is None and isinstance(exc, DualBladeError)
            made = self._layers.pop(index, None) if is_new else None
            if made is not None and self._failure is None:
                made.free()
            if in_step and isinstance(exc, DualBladeError):
                self._was_refused = is_refusal and isinstance(exc, BudgetError | NoSpace)
                self.fail(exc)
            raise
        return layer

    def _reserve(self, layer: Layer, new_rows: int) -> None:
        """Memory, plan and blocks for `new_rows` more rows. At the first layer of a step for all
        layers, so that a step that does not fit is refused whole."""
        tokens = layer.tokens + new_rows
        together = [layer]
        if layer.index == 0:
            others = (other for other in self._layers.values() if other is not layer)
            together += [other for other in others if other.tokens == layer.tokens]
        if layer.index == 0:
            self._placements.look(self._budget.shares)
            self._budget.raise_to(self._placements.budget_bytes)
        is_made = self._machinery is not None and self._machinery.is_registered
        if not is_made or any(self._budget.needs_claim(other, tokens) for other in together):
            self._claim(tokens)
        for other in together:
            other.fit_tails()
        self._place(layer, tokens)
        for other in together:
            tiles = other.full_tiles(new_rows)
            for half in other.halves if tiles else ():
                # A fair share of what is left: else the first would leave the last without blocks.
                share = self._store.free_bytes // (2 * self._settings.layer_count)
                half.unit.cached_bytes = self._placements.cached_bytes(half.unit.id)
                try:
                    half.unit.make_room(tiles, other.batch, growth_bytes_max=share)
                except BaseException as exc:
                    if half.unit.is_torn:
                        self.fail(exc)
                    raise

    def _claim(self, tokens: int) -> None:
        layers = self._layers.values()
        shape = self._shape or self._staging(self._budget.division(layers))
        self._budget.claim(
            layers,
            tokens,
            staging_bytes=shape.total_bytes,
            in_force_bytes=self._placements.budget_bytes,
            buffers=self._gather,
            too_small=partial(self._too_small, tokens),
        )
        if self._machinery is None:
            device, sums, timeline = self._settings.device, self.checksums, self._timeline
            self._pace = Pace(
                self._settings.config.pipeline,
                shape,
                timeline,
                in_flight_bytes=self._engine.queue_depth * self._engine.chunk_bytes,
                lookahead=self._settings.config.lookahead,
            )
            self._shape = shape
            self._maker = replace(self._maker, slot_bytes=shape.slot_bytes)
            self._machinery = Machinery(
                shape, self._store, device, sums, timeline, self._settings.copies
            )
        self._machinery.register(self._engine)

    def _staging(self, division: Division) -> StagingShape:
        settings = self._settings
        return division.staging(
            settings.config,
            multiplied_bytes=settings.multiplied_bytes(division.layers[0].batch),
            fitting_tokens=settings.tokens_max
            if settings.config.has_choice(settings.path)
            else None,
            speeds=settings.speeds,
        )

    def _too_small(self, tokens: int, shares: BudgetShares) -> BudgetError:
        """That `shares` for `tokens` do not fit, and with what budget a new cache's would."""
        here = self._budget.division(self._layers.values())
        # As it was made: a model that touches keys turns a cache over tiles to gathering later.
        made = replace(here, over_tiles=self._settings.over_tiles)

        def anew(budget_bytes: int) -> BudgetShares:
            begun = made.under(budget_bytes, self._settings.config.tile_tokens)
            staging = self._staging(begun).total_bytes
            then = replace(begun, over_tiles=here.over_tiles)
            return then.shares(round_up(tokens, CAPACITY_STEP_TOKENS), staging_bytes=staging)

        return too_small(
            shares,
            least_budget(shares.budget_bytes, anew),
            batch=here.layers[0].batch,
            tokens=tokens,
            over_tiles=here.over_tiles,
        )

    def _gather_whole_layers(self, layer: Layer, new_rows: int) -> None:
        """From here on layers are gathered whole. Raises: BudgetError when there is no room."""
        if self._budget.over_tiles:
            self._budget.over_tiles = False
            try:
                self._claim(layer.tokens + new_rows)
            except BudgetError:
                self._was_refused = True  # before anything was read: a reset is all that it takes
                raise
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
            self.fail(exc)  # a unit may be between two doors
            raise

    def _hold_nothing(self) -> None:
        """Nobody reads, writes or keeps pieces of segments, which are to be cut."""
        if self._reads is not None:
            self._reads.cancel()
        if self._machinery is not None:
            self._machinery.writes.drain()

    def _before_visit(self, unit: Unit) -> None:
        writes = self._require_machinery().writes
        writes.give_back()
        writes.wait(unit.id)
        if unit.id.layer == 0 or self._placements.hits.is_counting:
            self._placements.visit(unit)

    def _sweep(self) -> ReadAhead:
        """The reads over all layers known so far, in order."""
        if self._reads is None:
            machinery = self._require_machinery()
            assert self._pace is not None, "made with the machinery"
            ordered = [self._layers[index] for index in sorted(self._layers)]
            if ordered[-1].index >= len(ordered):
                why = "the model gives one of its cached layers no keys and values"
                raise Unsupported(why, hint="path='memory' takes it, and transformers' own cache")
            self._reads = ReadAhead(
                self._store,
                machinery.read_slots,
                self.checksums,
                ordered,
                setting=self._pace.setting,
                in_place=machinery.copies.in_place and self._settings.config.in_place,
                before_visit=self._before_visit,
                timeline=self._timeline,
            )
        return self._reads

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

    def select(self, index: int, indices: torch.Tensor) -> None:
        """See `LayeredKV.select`."""
        before = self.batch(index)
        super().select(index, indices)
        if self._reads is not None and self.batch(index) != before:
            self._reads.cancel()  # its pieces end where groups of the old batch did

    def _drop_tokens(self, layer: Layer, count: int) -> None:
        machinery = self._require_machinery()
        if count > layer.tail_rows:
            self._drop_sweep()
            for half in layer.halves:
                machinery.writes.wait(half.unit.id)
        fetch = partial(machinery.fetch, layer)
        layer.drop_tokens(count, machinery.shape.slot_bytes, fetch)

    def _forget(self) -> None:
        self._placements.forget()
        self._budget.forget()
        if self._pace is not None:
            self._pace.restart()
        self._maker = self._maker.beside(self._budget.shares.staging_bytes)

    def _quiesce(self) -> None:
        self._drop_sweep()
        if self._machinery is not None:
            self._machinery.writes.forget()

    # -- the end, and what there is to tell ------------------------------------------------------

    def _drop_sweep(self) -> None:
        if self._reads is not None:
            self._reads.cancel()
            self._reads = None

    def close(self) -> None:
        """End all transfers, discard the store, free memory. Idempotent; what Ctrl-C left is
        ended by the next call. A forked child has let go of the store when it began."""
        self._closed = True
        if self._store.is_inherited:
            self._store.close()
            return
        self._offer = self._reads = None  # the store ends all its transfers
        try:
            self._store.close()
        finally:
            self._engine.close()
            self._free_memory()  # only then is nothing in flight any more, whatever was raised

    def _free_memory(self) -> None:
        if self._machinery is not None:
            self._machinery.close()
            self._machinery = None
        self._gather = GatherBuffers(self._settings.device)
        for layer in self._layers.values():
            layer.drop_tails()

    def engine_facts(self) -> EngineFacts:
        """The engine in force."""
        return engine_facts(self._engine)

    def memory_use(self) -> MemoryUse:
        """Host memory now; asks the kernel for the store's page cache."""
        shares, layers = self._budget.shares, list(self._layers.values())
        return MemoryUse(
            budget_bytes=self._placements.budget_bytes,
            staging_bytes=shares.staging_bytes,
            gather_bytes=shares.gather_bytes,
            tail_bytes=sum(layer.tail_bytes for layer in layers),
            table_bytes=sum(layer.table_bytes for layer in layers),
            page_cache_planned_bytes=self._placements.page_cache_bytes,
            page_cache_bytes=0 if self._closed else self._store.page_cache_bytes(),
        )

    def transfers(self) -> TransferTotals:
        """Bytes asked of the store so far."""
        return transfer_totals(self._store, self._dead_read_bytes)

    def seconds(self) -> StageSeconds:
        """Where the model's thread spent time in the cache."""
        return StageSeconds(
            read_wait=self._timeline.stalled_seconds(Lane.READS),
            attention=self._attention_ns / 1e9,
            gather=self._gather_ns / 1e9,
            append=self._append_ns / 1e9,
            write_wait=self._timeline.stalled_seconds(Lane.WRITES),
            checksums=self.checksums.seconds,
        )

    def stages(self) -> PipelineStages:
        """How long each stage had something to do, and what was waited for."""
        moved, speeds = self.transfers(), self._settings.speeds
        return self._timeline.stages(
            direct_bytes=moved.direct_read_bytes + moved.direct_write_bytes,
            profile_bytes_per_second=None if speeds is None else speeds.direct_bytes_per_s,
        )

    def tuning(self) -> PipelineTuning | None:
        """How reads and compute share a step; None before the first rows."""
        return None if self._pace is None else self._pace.describe()

    def placements(self) -> tuple[UnitPlacement, ...]:
        """The plan in force, unit by unit."""
        return self._placements.describe()

    def events(self) -> tuple[ResidencyEvent, ...]:
        """What the plan in force was changed by, oldest first."""
        return self._placements.events()

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tiles in the store."""
        layers = list(self._layers.values())  # a step of another thread adds some
        return sum(half.unit.stored_bytes for layer in layers for half in layer.halves)


def _buffer_shape(layer: Layer, half: HalfLayer, capacity: int) -> tuple[int, int, int, int]:
    return layer.batch, half.unit.geometry.kv_heads, capacity, half.unit.geometry.dim
