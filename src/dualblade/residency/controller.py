"""Follows the memory that is there: which units to move at a step boundary. Pure: time and all
observations are passed in.

Down at once: when the room that the probe tells falls clearly below what is planned, when cached
pages turn out to be evicted, or when the machine stalls for want of memory. Up slowly: a few
units, of room that has been there for a while, and never more than half of it. Where no more
memory went meanwhile than those units hold nobody else takes it, and the next half follows at once.

The probe cannot see everything: to another process our page cache is reclaimable, as is its own
to us. So evictions and stalls teach by how much the room is overstated. That is tried again
after a wait, which doubles each time it fails: two of us on one machine come to rest.

Nothing is given back that nobody asks for, though computing may hide all reads: what the page cache
has costs nobody anything, for the kernel takes it as it likes, and reading costs processor time and
power at each step.
"""

from __future__ import annotations

from dataclasses import dataclass

from dualblade.geometry import UnitId
from dualblade.residency.events import Cause, Event, Move, Observation
from dualblade.residency.ladder import Ladder, Level, UnitDemand
from dualblade.residency.plan import MARGIN_FRACTION
from dualblade.residency.speeds import worth_caching
from dualblade.units import format_size

_PRESSURE_SHARE = 8
"""Under pressure an eighth of what is cached goes, twice a second at most."""

_BACK_FRACTION = 0.95
"""Of what is cached; with as much a sweep has left all that it read where it was."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlPolicy:
    """How eager the controller is.

    dwell_seconds       room must have been there this long, and no unit moved, before a promotion,
                        unless nobody else takes it.
    units_max           promoted at a time, or parts of them, until a reading has shown that nobody
                        else takes the memory.
    hit_fraction_min    fewer hits mean evictions: a sweep over too much gets none at all, one
                        over what fits gets nearly all.
    settle_steps        hits are not judged before: the sweep after a move reads cold pages.
    stall_fraction_max  of wall time, in which some task waits for memory, over the last
                        stall_window_seconds.
    retry_seconds       first wait before room that was found overstated is tried again, with one
                        unit, then two, four ...; doubles with each failure to retry_seconds_max.
    """

    dwell_seconds: float = 1.0
    units_max: int = 8
    hit_fraction_min: float = 0.8
    settle_steps: int = 2
    stall_fraction_max: float = 0.1
    stall_window_seconds: float = 0.5
    retry_seconds: float = 10.0
    retry_seconds_max: float = 300.0

    def are_few(self, hits: float | None) -> bool:
        """Whether pages that were to be cached are gone."""
        return hits is not None and hits < self.hit_fraction_min


class Lessons:
    """By how much the room that is told was found overstated, and when more of it may be tried.
    Kept from one prompt to the next: others who use the memory do not go with a text."""

    def __init__(self, policy: ControlPolicy) -> None:
        self._policy = policy
        self._overstated_bytes = 0
        self._told_bytes = 0
        self._at = float("-inf")
        self._wait = self._next_wait = policy.retry_seconds
        self._retry_at = float("inf")
        self.retry_units = 1

    def room(self, told_bytes: int) -> int:
        """What of the room told is there."""
        return max(0, told_bytes - self._overstated_bytes)

    def hear(self, seen: Observation) -> None:
        """Clearly more room than when we learned: what was learned may be tried again soon."""
        clearly = self._told_bytes + self._told_bytes // 10
        if self._overstated_bytes and seen.page_cache_bytes > clearly:
            self._next_wait = self._policy.retry_seconds
            self._retry_at = min(self._retry_at, seen.time_seconds + self._next_wait)
            self._told_bytes = seen.page_cache_bytes

    def learn(self, seen: Observation, beyond_bytes: int) -> None:
        """Of the room that is told now, `beyond_bytes` are not there."""
        self._overstated_bytes = beyond_bytes
        self._told_bytes = seen.page_cache_bytes
        if seen.time_seconds - self._at > self._policy.retry_seconds:  # a new incident
            self._wait = self._next_wait
            self._next_wait = min(2 * self._next_wait, self._policy.retry_seconds_max)
        self._at = seen.time_seconds
        self._retry_at = seen.time_seconds + self._wait
        self.retry_units = 1

    def are_to_try(self, seen: Observation) -> bool:
        """Whether it is time to see if more is there by now."""
        return self._overstated_bytes > 0 and seen.time_seconds >= self._retry_at

    def tried(self, seen: Observation, beyond_bytes: int | None) -> None:
        """More was looked for: `beyond_bytes` are not known to be there yet; None: none was to be
        had."""
        self._retry_at = seen.time_seconds + self._policy.retry_seconds
        if beyond_bytes is not None:
            self.retry_units = min(2 * self.retry_units, self._policy.units_max)
            self._overstated_bytes = min(self._overstated_bytes, beyond_bytes)


class Controller:
    """Decides at each step boundary; the caller moves the units of the event before the step.

    Costs about 10 us when nothing moves (docs/decisions/0004).
    """

    def __init__(
        self, level: Level, policy: ControlPolicy | None = None, lessons: Lessons | None = None
    ) -> None:
        self._policy = policy or ControlPolicy()
        self._lessons = lessons or Lessons(self._policy)
        self._level = level
        self._demands: tuple[UnitDemand, ...] = ()
        self._ladder = Ladder(())
        self._total_bytes = 0
        self._planned_bytes = 0
        self._told_bytes = 0
        self._moved_at = float("-inf")
        self._steps_since_move = 0
        self._room_since: float | None = None
        self._were_cold = False
        self._unused_before: int | None = None  # when units were promoted last
        self._promoted_bytes = 0
        self._settled_at: float | None = None
        self._stalls = _StallWindow(self._policy.stall_window_seconds)

    @property
    def cached(self) -> dict[UnitId, int]:
        """What of each unit is in the page cache once the last event is carried out; see
        `Ladder.cached`."""
        return self._ladder.cached(self._level)

    @property
    def planned_bytes(self) -> int:
        """Bytes of all of that, as the last demands have them."""
        return self._planned_bytes

    @property
    def awaits_reading(self) -> bool:
        """Whether the next reading of the memory says who else takes it: sooner is better."""
        return self._unused_before is not None and self._settled_at is not None

    def decide(self, seen: Observation) -> Event | None:
        """What to move before the next step; None: nothing. Call at step boundaries, at each one
        that brings news."""
        grew = self._take_demands(seen.demands)
        fell = seen.page_cache_bytes < self._told_bytes
        self._steps_since_move += seen.steps
        self._lessons.hear(seen)
        stalled = self._stalls.share(seen) > self._policy.stall_fraction_max
        if grew and not fell:  # as a prompt does at each chunk: others are to be heard meanwhile
            event = self._distress(seen, stalled) or self._shortage(seen, Cause.KV_GREW)
        else:  # what the probe tells comes first: hits of the sweep before a squeeze teach nothing
            event = self._shortage(seen, Cause.BUDGET_FELL) or self._distress(seen, stalled)
        if event is None and not stalled:
            event = self._promotion(seen)
        self._told_bytes = seen.page_cache_bytes
        return event

    def _take_demands(self, demands: tuple[UnitDemand, ...]) -> bool:
        """Whether what is planned has grown. Free while the demands stay the same object."""
        if demands is self._demands:
            return False
        before = self._planned_bytes
        self._demands, self._ladder = demands, Ladder(demands)
        self._level = self._ladder.within(self._level)
        self._total_bytes = self._ladder.size_bytes(self._ladder.top)
        self._planned_bytes = self._ladder.size_bytes(self._level)
        return self._planned_bytes > before

    @property
    def _settled(self) -> bool:
        return self._steps_since_move > self._policy.settle_steps

    def _room(self, seen: Observation) -> int:
        return self._lessons.room(seen.page_cache_bytes)

    def _distress(self, seen: Observation, stalled: bool) -> Event | None:
        """Evictions and stalls: the room is less than it is told to be."""
        if not self._planned_bytes:
            return None
        if seen.hit_fraction is not None and self._settled:
            event = self._judge_hits(seen, seen.hit_fraction)
            if event is not None:
                return event
        if stalled:
            room = self._planned_bytes - self._planned_bytes // _PRESSURE_SHARE - 1
            room = min(room, self._room(seen))
            return self._learn(seen, room, Cause.PRESSURE, "tasks wait for memory")
        return None

    def _judge_hits(self, seen: Observation, hits: float) -> Event | None:
        """Few hits mean evictions. Where the same sweep has brought all back it may have been cold:
        nobody generated, and others passed through the page cache. Then the next one tells."""
        if not self._policy.are_few(hits):
            self._were_cold = False
            return None
        holds = self._resident_fraction(seen)
        if holds >= _BACK_FRACTION and not self._were_cold:
            self._were_cold = True
            self._steps_since_move = 0
            return None
        self._were_cold = False
        room = min(int(self._planned_bytes * holds * (1 - MARGIN_FRACTION)), self._room(seen))
        words = f"{hits:.0%} hits; about {format_size(room)} are kept"
        return self._learn(seen, room, Cause.EVICTED, words)

    def _resident_fraction(self, seen: Observation) -> float:
        """How much of the cached units is held. A sweep over too much hits nothing, while what
        it left behind shows the room. At least a half, so that one bad reading is no disaster."""
        cached = self.cached
        stored = sum(min(d.now_bytes, cached.get(d.unit, 0)) for d in self._demands)
        if seen.resident_bytes is None or not stored:
            return max(0.5, seen.hit_fraction or 0.0)
        return min(1.0, max(0.5, seen.resident_bytes / stored))

    def _learn(self, seen: Observation, room: int, cause: Cause, words: str) -> Event | None:
        event = self._move(seen, cause, words, self._down_to(room))
        self._lessons.learn(seen, self._beyond_use(seen.page_cache_bytes, self._planned_bytes))
        return event

    def _beyond_use(self, told: int, used: int) -> int:
        """Of the room told, what is beyond that used and half a step: the next reading is a few
        pages off, which is no reason to move anything."""
        return max(0, told - used - self._ladder.step_bytes // 2)

    def _shortage(self, seen: Observation, cause: Cause) -> Event | None:
        room = self._room(seen)
        if self._planned_bytes <= room + seen.slack_bytes:
            return None
        words = f"{format_size(self._planned_bytes)} planned, room for {format_size(room)}"
        return self._move(seen, cause, words, self._down_to(room))

    def _promotion(self, seen: Observation) -> Event | None:
        if self._level == self._ladder.top:
            self._unused_before = None
            return None
        room, is_alone = self._room(seen), self._is_alone(seen)
        worth = worth_caching(self._total_bytes, room, seen.speeds).cache_bytes
        higher = self._up_in(room, worth, self._policy.units_max)
        if higher != self._level:
            if self._room_since is None:
                self._room_since = seen.time_seconds
            if is_alone:
                unused = self._planned_bytes + (seen.unused_bytes or 0)
                higher = self._up_in(min(room, unused), worth, self._ladder.top.whole)
            elif not self._dwelt(seen, self._room_since):
                return None
            words = f"{format_size(self._planned_bytes)} planned, room for {format_size(room)}"
            return self._move(seen, Cause.ROOM_ROSE, words, higher)
        self._room_since = None
        return self._retry(seen)

    def _retry(self, seen: Observation) -> Event | None:
        """Try units in room that was found overstated; evictions or stalls would teach again."""
        if not self._lessons.are_to_try(seen) or not self._settled:
            return None
        told = seen.page_cache_bytes
        worth = worth_caching(self._total_bytes, told, seen.speeds).cache_bytes
        higher = self._up_in(told, worth, self._lessons.retry_units)
        if higher == self._level:
            self._lessons.tried(seen, None)
            return None
        taken = self._ladder.size_bytes(higher)
        self._lessons.tried(seen, self._beyond_use(told, taken))
        words = f"room for {format_size(taken)} of {format_size(told)} told"
        return self._move(seen, Cause.RETRY, words, higher)

    def _dwelt(self, seen: Observation, since: float) -> bool:
        """Whether nothing changed for the dwell, and the last move was judged by its hits."""
        calm_seconds = seen.time_seconds - max(since, self._moved_at)
        return calm_seconds >= self._policy.dwell_seconds and self._settled

    def _is_alone(self, seen: Observation) -> bool:
        """Whether as much memory went as the units hold that were promoted last: said once, by the
        first reading after the sweeps that filled them, for somebody may come later."""
        before = self._unused_before
        if before is None or seen.unused_bytes is None or not self._settled:
            return False
        if self._settled_at is None:
            self._settled_at = seen.time_seconds
        if seen.read_at < self._settled_at:
            return False
        self._unused_before = None
        went, slack = before - seen.unused_bytes, seen.slack_bytes
        return self._promoted_bytes * 3 // 4 - slack <= went <= self._promoted_bytes + slack

    def _down_to(self, room_bytes: int) -> Level:
        """The level in force, or the highest below it that `room_bytes` hold."""
        return min(self._level, self._ladder.fitting(room_bytes))

    def _up_in(self, room: int, worth: int, units_max: int) -> Level:
        """A few units more, of at most half of the free room, so that two of us who take it at
        once do not take too much; or the level in force."""
        left = min((room - self._planned_bytes) // 2, worth - self._planned_bytes)
        most = Level(self._level.whole + units_max, 0)
        return max(self._level, min(most, self._ladder.fitting(self._planned_bytes + left)))

    def _move(self, seen: Observation, cause: Cause, reason: str, level: Level) -> Event | None:
        if level == self._level:
            return None
        moving, old = self._ladder.between(self._level, level), self.cached
        before, self._level = self._planned_bytes, level
        self._planned_bytes, new = self._ladder.size_bytes(level), self.cached
        moves = tuple(
            Move(unit=d.unit, from_bytes=old.get(d.unit, 0), to_bytes=new.get(d.unit, 0))
            for d in moving
        )
        self._moved_at = seen.time_seconds
        self._room_since = self._settled_at = None
        self._promoted_bytes = self._planned_bytes - before
        self._unused_before = seen.unused_bytes if self._promoted_bytes > 0 else None
        if cause is not Cause.KV_GREW:  # a text that grows is told of all along: what stays is warm
            self._steps_since_move = 0
            self._stalls.restart()  # what was lost before says nothing of the memory there is now
        return Event(
            time_seconds=seen.time_seconds,
            cause=cause,
            from_bytes=before,
            to_bytes=self._planned_bytes,
            level=level,
            moves=moves,
            reason=reason,
        )


class _StallWindow:
    """The share of wall time lost to stalls, over windows long enough to mean something."""

    def __init__(self, window_seconds: float) -> None:
        self._window_seconds = window_seconds
        self._began: tuple[float, float] | None = None
        self._share = 0.0

    def share(self, seen: Observation) -> float:
        """Of the last whole window, from reading to reading; 0 before there is one."""
        if seen.stall_seconds is None:
            self.restart()
            return 0.0
        if self._began is None:
            self._began = (seen.read_at, seen.stall_seconds)
        elapsed = seen.read_at - self._began[0]
        if elapsed >= self._window_seconds:
            self._share = (seen.stall_seconds - self._began[1]) / elapsed
            self._began = (seen.read_at, seen.stall_seconds)
        return self._share

    def restart(self) -> None:
        """Measure anew."""
        self._began, self._share = None, 0.0
