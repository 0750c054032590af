"""Which door each unit has, step by step: the plan in force and what it is re-made from.

At the first layer of a step, on the `dual` path: ask what memory there is (at most twice a
second), take the hits that the last measured sweep had, and let the controller say which few units
move. It moves them before the step reads or writes anything.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from dualblade.config import Path
from dualblade.geometry import Part, UnitId
from dualblade.host.memory import OwnMemory
from dualblade.metrics import ResidencyEvent, UnitPlacement
from dualblade.pipeline.hits import HitSweep
from dualblade.pipeline.layer import Layer
from dualblade.pipeline.memory_watch import MemoryWatch
from dualblade.pipeline.unit import Unit
from dualblade.residency import (
    WHOLE,
    BudgetShares,
    Controller,
    ControlPolicy,
    DoorSpeeds,
    Event,
    Ladder,
    Lessons,
    Observation,
    Placement,
    PlanInputs,
    ResidencyPlan,
    UnitDemand,
    after,
    decide,
    plan_fixed,
)
from dualblade.store import Store
from dualblade.units import format_size

log = logging.getLogger("dualblade.residency")

DECIDE_SECONDS = 0.1
"""Between two decisions that no news asks for; waits end and dwells are over by then."""

_AHEAD_SHARE = 32
"""A plan is for a 32nd more tokens than there are, a tile at least. What is planned for and not
there yet is memory that waits, where units barely fit: of an eighth more it was a tenth of the
speed. As the KV grows units give way when what is planned stands above the room by more than the
slack."""

_EVENTS_MAX = 256
"""Events that are kept, the newest; each was logged. A squeeze and its release are about ten, a KV
that doubles beside less room than it wants some twenty."""


class _Room(NamedTuple):
    """For the page cache, under the budget in force: to plan for, and what a plan that was made
    may stand above it."""

    size_bytes: int
    slack_bytes: int

    @property
    def most(self) -> int:
        return self.size_bytes + self.slack_bytes


class Placements:
    """The residency plan in force, the controller that changes it, and the doors that follow.

    A fixed path and a fixed split (`cache_percent`) have a plan and no controller. Only the `dual`
    path looks at memory. `before_cut` is called before segments are cut or joined: nobody may hold
    pieces of them, or write to them, when it has returned.
    """

    def __init__(
        self,
        path: Path,
        layer_count: int,
        tokens_max: int | None,
        store: Store,
        watch: MemoryWatch,
        *,
        before_cut: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
        speeds: DoorSpeeds | None = None,
        cache_percent: int | None = None,
    ) -> None:
        self._path = path
        self._before_cut = before_cut
        self._layer_count = layer_count
        self._tokens_max = tokens_max
        self._store = store
        self._watch = watch
        self._clock = clock
        self._speeds = speeds
        self._cache_percent = cache_percent
        self._policy = ControlPolicy()
        self._lessons = Lessons(self._policy)
        self.hits = HitSweep(2 * layer_count, store.cached_bytes)
        self._opened_at = clock()
        self._events: deque[ResidencyEvent] = deque(maxlen=_EVENTS_MAX)
        self._has_warned = False
        self._shares: BudgetShares | None = None
        self._budget_bytes = 0
        self._known: tuple[object, ...] = ()
        self._decided_at = float("-inf")
        self._room = _Room(0, 0)
        self.forget()

    def forget(self) -> None:
        """Plan afresh for the next prompt. The events stay, and what was learned of the room."""
        self._plan: ResidencyPlan | None = None
        self._controller: Controller | None = None
        self._cached: dict[UnitId, int] = {}
        self._demands: tuple[UnitDemand, ...] = ()
        self._planned_for: tuple[int, int, int] = (0, 0, 0)
        self._steps_since = 0  # of this prompt: a plan just made is not judged by the last one's
        self.hits.restart()

    # -- at a step boundary ----------------------------------------------------------------------

    @property
    def budget_bytes(self) -> int:
        """The budget in force."""
        return self._watch.budget_bytes

    def look(self, shares: BudgetShares) -> None:
        """Learn what memory there is, if it is time; at once if the controller waits for it, or if
        pages are gone: an older reading does not know of whoever took them. Raises: Unsupported."""
        if self._path is not Path.DUAL:
            return
        lost = awaited = False
        if self._controller is not None:
            lost = self._policy.are_few(self.hits.measured)
            awaited = self._controller.awaits_reading
        own = partial(self._own, shares, lost=lost)
        self._watch.look(self._clock(), own, at_once=lost or awaited)

    def _own(self, shares: BudgetShares, *, lost: bool) -> OwnMemory:
        mapped = self._store.mapped_bytes
        if lost:  # the kernel unmapped them, and nobody told the store
            mapped = min(mapped, self._store.page_cache_bytes())
        return OwnMemory(
            page_cache_bytes=self.page_cache_bytes,
            fixed_bytes=shares.fixed_bytes,
            mapped_bytes=mapped,
        )

    def follow(
        self, like: Layer, layers: Mapping[int, Layer], tokens: int, shares: BudgetShares
    ) -> None:
        """Have a plan for `tokens` and a while more, under the budget in force, and every unit at
        the door that it plans. Layers not seen yet are taken to be like `like`.

        `look` is called before. Blocks while units move; raises DeviceError (see Store.move).
        """
        horizon, batch, known = self._planned_for
        is_as_planned = tokens <= horizon and like.batch == batch and len(layers) == known
        if like.index and is_as_planned and shares is self._shares:
            return  # the other layers of a step
        has_changed = not is_as_planned and self._renew_demands(like, layers, tokens)
        budget = self._watch.budget_bytes
        if shares is not self._shares or budget != self._budget_bytes:
            self._shares, self._budget_bytes = shares, budget
            in_force = replace(shares, budget_bytes=budget)
            self._room = _Room(in_force.page_cache_bytes, in_force.slack_bytes)
        room = self._room
        if self._plan is None:
            self._begin(room)
        elif self._controller is None:
            return
        elif like.index == 0 or has_changed or room.most < self._controller.planned_bytes:
            self._steps_since += like.index == 0
            if has_changed or self._has_news():
                self._re_decide(self._controller, layers, room)
        if self._controller is not None:
            assert self._controller.planned_bytes <= room.most, "more is planned than there is room"
            self._warn_once(shares, budget)

    def visit(self, unit: Unit) -> None:
        """`unit` is about to be read, in the order of the sweep. Need be told of the first layer's
        units alone, until `hits.is_counting`."""
        if self._controller is None:
            return
        if self.hits.begins(unit):
            self.hits.begin(self._clock())
        if self.hits.is_counting:
            self.hits.visit(unit, self._clock())

    def _renew_demands(self, like: Layer, layers: Mapping[int, Layer], tokens: int) -> bool:
        """Whether what the units will need has changed; the same tuple as long as it has not."""
        horizon, _, _ = self._planned_for
        if tokens > horizon:
            ahead = tokens + max(like.rows, tokens // _AHEAD_SHARE)
            most = self._tokens_max
            horizon = ahead if most is None else max(tokens, min(ahead, most))
        demands = self._demands_for(horizon, like, layers)
        self._planned_for = (horizon, like.batch, len(layers))
        if demands == self._demands:
            return False
        self._demands = demands
        return True

    def _demands_for(
        self, horizon: int, like: Layer, layers: Mapping[int, Layer]
    ) -> tuple[UnitDemand, ...]:
        """What each unit has when there are `horizon` tokens. Tiles of another batch, stored
        before, count as they are."""
        demands = []
        for index in range(self._layer_count):
            layer = layers.get(index, like)
            tiles = max(horizon // layer.rows, 1)
            for part, half in zip(Part, layer.halves, strict=True):
                stored = layer.stored_tiles if index in layers else 0
                size = half.unit.stored_bytes if stored else 0
                geometry = half.unit.geometry
                size += max(0, tiles - stored) * geometry.tile_bytes(like.batch)
                is_even = all(s.batch == like.batch for s in half.unit.segments)
                demands.append(
                    UnitDemand(
                        unit=UnitId(index, part),
                        size_bytes=size,
                        grain_bytes=geometry.grain_bytes(like.batch) if is_even else 0,
                    )
                )
        return tuple(demands)

    def _begin(self, room: _Room) -> None:
        """The first plan. A prompt that does not fit is written directly where it does not."""
        if self._path is not Path.DUAL:
            self._plan = plan_fixed(self._demands, self._path)
            return
        self._plan = decide(
            PlanInputs(
                demands=self._demands,
                page_cache_bytes=self._lessons.room(room.size_bytes),
                speeds=self._speeds,
                cache_percent=self._cache_percent,
            )
        )
        self._cached = Ladder(self._demands).cached(self._plan.level)
        if self._cache_percent is None:
            self._controller = Controller(self._plan.level, self._policy, self._lessons)
            # Told at once, so that it knows sizes and room before the next boundary.
            event = self._controller.decide(self._observation(room))
            assert event is None, "a plan just made needs no change"

    def _observation(self, room: _Room, hits: float | None = None) -> Observation:
        return Observation(
            time_seconds=self._clock(),
            steps=self._steps_since,
            demands=self._demands,
            page_cache_bytes=room.size_bytes,
            slack_bytes=room.slack_bytes,
            speeds=self._speeds,
            hit_fraction=hits,
            stall_seconds=self._watch.stall_seconds,
            unused_bytes=self._watch.unused_bytes,
            told_at_seconds=self._watch.looked_at,
        )

    def _has_news(self) -> bool:
        """Whether anything that a decision follows from can have changed since the last one."""
        known = (self._room, self._watch.looked_at)
        return (
            known != self._known
            or self.hits.measured is not None
            or self._clock() - self._decided_at >= DECIDE_SECONDS
        )

    def _re_decide(self, controller: Controller, layers: Mapping[int, Layer], room: _Room) -> None:
        seen = self._observation(room, self.hits.take())
        self._known = (self._room, self._watch.looked_at)
        self._decided_at, self._steps_since = seen.time_seconds, 0
        if self._policy.are_few(seen.hit_fraction):
            self._demands = tuple(
                replace(d, stored_bytes=_stored_bytes(layers, d.unit)) for d in self._demands
            )
            seen = replace(
                seen, demands=self._demands, resident_bytes=self._store.page_cache_bytes()
            )
        event = controller.decide(seen)
        if event is None:
            return
        assert self._plan is not None
        self._plan = after(self._plan, event)
        self._cached = controller.cached
        self._carry_out(event, layers)
        self.hits.restart()

    def _carry_out(self, event: Event, layers: Mapping[int, Layer]) -> None:
        """Move the units of the event."""
        stored = sum(m.moved_bytes(_stored_bytes(layers, m.unit)) for m in event.moves)
        if any(0 < share < WHOLE for m in event.moves for share in (m.from_bytes, m.to_bytes)):
            self._before_cut()
        for move in event.moves:
            if move.unit.layer in layers:
                _unit(layers, move.unit).place(move.to_bytes)
        count = len(event.moves)
        told = ResidencyEvent(
            time_seconds=event.time_seconds - self._opened_at,
            cause=event.cause.value,
            from_bytes=event.from_bytes,
            to_bytes=event.to_bytes,
            moved_bytes=stored,
            demoted_units=count if event.is_down else 0,
            promoted_units=0 if event.is_down else count,
            reason=event.reason,
        )
        self._events.append(told)
        log.info(
            "%s: page cache planned %s -> %s, %d units demoted, %d promoted, %s of KV change "
            "their path (%s)",
            told.cause,
            format_size(told.from_bytes),
            format_size(told.to_bytes),
            told.demoted_units,
            told.promoted_units,
            format_size(told.moved_bytes),
            told.reason,
        )

    def _warn_once(self, shares: BudgetShares, budget_bytes: int) -> None:
        if self._has_warned or shares.fixed_bytes <= budget_bytes:
            return
        self._has_warned = True
        log.warning(
            "the memory there is fell to %s, below the %s of staging, gather buffers, tails and "
            "tables: all KV goes direct until there is more",
            format_size(budget_bytes),
            format_size(shares.fixed_bytes),
        )

    # -- what is in force ------------------------------------------------------------------------

    @property
    def page_cache_bytes(self) -> int:
        """Page cache that the plan counts on; on a fixed path the kernel decides, so 0."""
        if self._controller is not None:
            return self._controller.planned_bytes
        if self._plan is None or self._path is not Path.DUAL:
            return 0
        return sum(min(d.size_bytes, self.cached_bytes(d.unit)) for d in self._demands)

    def cached_bytes(self, unit: UnitId) -> int:
        """What of `unit`'s beginning is to go through the page cache: see `Unit.place`."""
        return WHOLE if self._path is Path.PAGE_CACHE else self._cached.get(unit, 0)

    def events(self) -> tuple[ResidencyEvent, ...]:
        """What moved since the cache was made, oldest first; the newest 256."""
        return tuple(self._events)

    def describe(self) -> tuple[UnitPlacement, ...]:
        """The plan in plain words, in the order of the sweep."""
        if self._plan is None:
            return ()
        reasons = {placement.unit: placement.reason for placement in self._plan.placements}
        return tuple(map(describe, self._placed(reasons)))

    def _placed(self, reasons: Mapping[UnitId, str]) -> Iterator[Placement]:
        for demand in self._demands:
            cached = min(demand.size_bytes, self.cached_bytes(demand.unit))
            yield Placement(
                unit=demand.unit,
                size_bytes=demand.size_bytes,
                cached_bytes=cached,
                reason=reasons[demand.unit],
            )


def describe(placed: Placement) -> UnitPlacement:
    """A placement in plain words."""
    return UnitPlacement(
        layer=placed.unit.layer,
        part=placed.unit.part.value,
        path=placed.path.value,
        bytes=placed.size_bytes,
        cached_bytes=placed.cached_bytes,
        reason=placed.reason,
    )


def _unit(layers: Mapping[int, Layer], unit: UnitId) -> Unit:
    layer = layers[unit.layer]
    return (layer.keys if unit.part is Part.KEYS else layer.values).unit


def _stored_bytes(layers: Mapping[int, Layer], unit: UnitId) -> int:
    return _unit(layers, unit).stored_bytes if unit.layer in layers else 0
