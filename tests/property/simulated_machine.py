"""A machine in arithmetic: memory, a hog, and caches that sweep through one page cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from dualblade.geometry import Part, UnitId
from dualblade.residency import (
    Controller,
    Event,
    Observation,
    PlanInputs,
    ResidencyPlan,
    UnitDemand,
    decide,
)

MARGIN = 0.95
"""What BudgetShares leaves of a room."""


def units(sizes: Sequence[int], grain: int = 0) -> tuple[UnitDemand, ...]:
    """Demands of these sizes, keys and values in turn."""
    return tuple(
        UnitDemand(unit=UnitId(i // 2, list(Part)[i % 2]), size_bytes=size, grain_bytes=grain)
        for i, size in enumerate(sizes)
    )


def by_size(demands: Sequence[UnitDemand], room: int) -> ResidencyPlan:
    """The plan without speeds: what fits in `room` is cached."""
    return decide(PlanInputs(demands=tuple(demands), page_cache_bytes=room))


@dataclass
class Cache:
    """One dualblade process; `warm` are the beginnings of units that a sweep filled pages with."""

    demands: tuple[UnitDemand, ...]
    controller: Controller
    warm: dict[UnitId, int] = field(default_factory=dict)
    hits: float | None = None
    resident: int | None = None
    events: list[Event] = field(default_factory=list)
    missed_steps: int = 0
    known: tuple[tuple[object, int] | None, dict[UnitId, int]] = (None, {})

    @classmethod
    def start(cls, demands: tuple[UnitDemand, ...], room: int) -> Cache:
        plan = by_size(demands, room)
        return cls(demands, Controller(plan.level))

    @property
    def planned(self) -> int:
        return sum(self.cached.values())

    @property
    def cached(self) -> dict[UnitId, int]:
        """Made anew where it may have changed: a simulated hour asks a hundred thousand times."""
        key = (self.demands, len(self.events))
        if self.known[0] is None or self.known[0][1:] != key[1:] or self.known[0][0] is not key[0]:
            parts = self.controller.cached
            cached = {d.unit: min(d.size_bytes, parts.get(d.unit, 0)) for d in self.demands}
            self.known = (key, cached)
        return self.known[1]


@dataclass
class Machine:
    """All file pages are reclaimable to everyone, so each cache is told the same room. Caches
    that want more than there is in all hit nothing: a cyclic sweep under least-recently-used."""

    memory: int
    caches: list[Cache]
    hog: int = 0
    polluted: int = 0
    time: float = 0.0
    stall_seconds: float = 0.0
    measures_hits: bool = True
    tells_unused: bool = True
    sees_peers: bool = False

    @property
    def told(self) -> int:
        return int((self.memory - self.hog) * MARGIN)

    def told_to(self, cache: Cache) -> int:
        """Mapped pages of another process are no room."""
        theirs = sum(sum(c.warm.values()) for c in self.caches if c is not cache)
        return self.told - int(theirs * MARGIN) if self.sees_peers else self.told

    @property
    def unused(self) -> int:
        warm = sum(sum(cache.warm.values()) for cache in self.caches)
        return max(0, self.memory - self.hog - self.polluted - warm)

    @property
    def slack(self) -> int:
        return int((self.memory - self.hog) * (1 - MARGIN) / 2)

    def step(self, seconds: float) -> None:
        """A boundary with a decision of each cache, then a sweep of each."""
        self.time += seconds
        for cache in self.caches:
            self._decide(cache)
        wanted = sum(cache.planned for cache in self.caches)
        there = max(0, self.memory - self.hog - self.polluted)
        for cache in self.caches:
            self._sweep(cache, fits=wanted <= there, share=min(1.0, there / max(wanted, 1)))

    def run(self, seconds: float, step: float) -> None:
        for _ in range(int(seconds / step)):
            self.step(step)

    def _decide(self, cache: Cache) -> None:
        event = cache.controller.decide(
            Observation(
                time_seconds=self.time,
                demands=cache.demands,
                page_cache_bytes=self.told_to(cache),
                slack_bytes=self.slack,
                hit_fraction=cache.hits if self.measures_hits else None,
                resident_bytes=cache.resident if self.measures_hits else None,
                stall_seconds=self.stall_seconds,
                unused_bytes=self.unused if self.tells_unused else None,
            )
        )
        if event is not None:
            cache.events.append(event)
            cache.hits = cache.resident = None
            for move in event.moves:
                cache.warm[move.unit] = min(cache.warm.get(move.unit, 0), move.to_bytes)

    @staticmethod
    def _sweep(cache: Cache, *, fits: bool, share: float) -> None:
        cached = cache.cached
        if not cache.planned:
            cache.hits = None
            return
        hit = sum(min(size, cache.warm.get(unit, 0)) for unit, size in cached.items())
        cache.hits = hit / cache.planned if fits else 0.0
        cache.warm = cached if fits else {}
        cache.resident = int(cache.planned * share)
        cache.missed_steps += cache.hits < 0.8


def fresh(demands: tuple[UnitDemand, ...], room: int) -> int:
    """Bytes that a plan made now would cache."""
    return by_size(demands, room).cached_bytes
