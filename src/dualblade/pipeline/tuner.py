"""How many staging slots reads may hold, and how many layers ahead. Pure: what steps took is passed
in, once a step.

More slots than the drive needs to stay busy only spread its transfers over more memory, which the
caches then hold less of: on the development machine a step with 18 slots of 4 MiB takes up to 40 %
longer than one with 4. Too few, and the drive stands still while the model computes. So: begin with
what keeps the device's queue full while a slot is attended to. Then one of two searches. If the
drive stood still and the model waited for it all the same, more, as long as steps get shorter: as
many as it could have filled meanwhile, and half as many at least; if not, a third fewer, as long as
they get no longer. Each answer is a median of some steps, compared with the best and not with the
last, so that small losses cannot add up. After a while, or when steps take another time than they
did, look again; each time the while doubles.

Steps of a prompt teach nothing: each is longer than the one before, whatever the slots. Nor does a
step whose number of rows differs from the last one's, nor one for which hardly anything is read,
because all is cached. Where steps come to be of many more rows or fewer, as after a long prompt, or
to read twice as much or half, as when memory falls, everything begins anew.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from dualblade.config import PipelineMode


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What the read-ahead may do: slots held by pieces that are read or attended to, and layers
    ahead of the one that computes; 0: a layer's reads begin when its turn comes."""

    slots: int
    lookahead: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """Of one step of `rows` new tokens, with which a sequence has `tokens`. `idle_seconds`: nothing
    was in flight; `stalled_seconds`: the model waited for reads. `slots_read`: what was read past
    the page cache, in slots, for all of `layers`."""

    rows: int
    tokens: int
    seconds: float
    idle_seconds: float
    stalled_seconds: float
    slots_read: float
    layers: int

    @property
    def starved_fraction(self) -> float:
        """Of the step, what reading farther ahead could save at most: the drive stood still, and
        the model waited for it at another time."""
        return max(0.0, min(self.idle_seconds, self.stalled_seconds)) / self.seconds

    @property
    def missed_slots(self) -> float:
        """Slots that the drive could have filled while it stood still, for each layer."""
        starved = self.starved_fraction
        return self.slots_read / self.layers * starved / (1 - min(starved, 0.99))


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningPolicy:
    """How eager the tuner is.

    window_steps      medians are over so many steps; the first after a change is not counted, its
                      reads were issued under the old setting.
    window_seconds    steps that take so long together are enough, be it one: in a long step the
                      drive's moods even out, and what was issued before it is a small part. The
                      first answer is the shorter of two, for one may have been held up.
    differ_fraction   medians that differ by more are different. Those of one setting differ by
                      1-2 % here.
    starved_fraction  of a step; more is worth a try with more slots.
    change_fraction   at rest, steps that differ by more mean other work or another drive: look
                      again.
    growth_max        of the context in a step, as a fraction; more is a part of a prompt.
    other_rows        times as many rows, or as few, are other work: products of many rows take
                      long, of few they wait for the weights.
    other_reads       times as many bytes read, or as few, are too.
    slots_min         keys and values of some tiles, and the ones after them.
    hold_steps        at rest, before another look; doubles each time, up to hold_steps_max.
    """

    window_steps: int = 5
    window_seconds: float = 3.0
    differ_fraction: float = 0.02
    starved_fraction: float = 0.02
    change_fraction: float = 0.25
    growth_max: float = 1 / 256
    other_rows: int = 16
    other_reads: float = 2.0
    slots_min: int = 4
    hold_steps: int = 100
    hold_steps_max: int = 3200


Tell = Callable[[int, int, str], None]
"""Of a change: slots before, slots after, why."""


class Tuner:
    """Of one cache. `slots`: as many as there are; `auto` begins with `slots_first` of them. `tell`
    hears of every change."""

    def __init__(
        self,
        mode: PipelineMode,
        *,
        slots: int,
        slots_first: int,
        lookahead: int,
        tell: Tell,
        policy: TuningPolicy | None = None,
    ) -> None:
        assert slots >= 2, "keys and values of some tiles"
        self._policy = policy or TuningPolicy()
        self._most = slots
        self._least = min(slots, self._policy.slots_min)
        self._tell = tell
        self._is_fixed = mode != "auto"
        self._first = min(slots, max(self._least, slots_first))
        self.setting = {
            "serial": Setting(slots=1, lookahead=0),
            "key-value": Setting(slots=2, lookahead=0),
            "tiled": Setting(slots=slots, lookahead=0),
            "auto": Setting(slots=self._first, lookahead=lookahead),
        }.get(mode, Setting(slots=slots, lookahead=lookahead))
        self._seen: deque[StepTimes] = deque(maxlen=self._policy.window_steps)
        self._last: StepTimes | None = None
        self._begun: StepTimes | None = None
        self._hold = self._policy.hold_steps
        self._steps_at_rest = 0
        self._reference: float | None = None
        self._before_try: int | None = None
        self._is_at_rest = False
        self._to_skip = 1

    def step(self, times: StepTimes) -> None:
        """What a step took with the setting in force."""
        last, self._last = self._last, times
        is_prompt = times.rows > self._policy.growth_max * times.tokens
        if self._is_fixed or is_prompt or last is None or times.rows != last.rows:
            return
        if min(times.slots_read, last.slots_read) < self._first:
            return
        self._note_work(last, times)
        if self._to_skip and times.seconds < self._policy.window_seconds:
            self._to_skip -= 1
            return
        self._to_skip = 0
        self._seen.append(times)
        self._steps_at_rest += self._is_at_rest
        if not self._has_seen_enough():
            return
        took = statistics.median_low(times.seconds for times in self._seen)
        if self._reference is None:
            self._reference = took
            if not self._is_at_rest:
                self._try(is_more=self._is_starved())
        elif self._before_try is not None:
            self._judge(took, self._reference, self._before_try)
        else:
            self._rest(took, self._reference)

    def restart(self) -> None:
        """Another text: its steps are not compared with those of the last one. A setting that was
        found stays, one that was being tried does not."""
        self._seen.clear()
        before, self._before_try, self._reference = self._before_try, None, None
        if before is not None:
            self._change(before, "the text ended while another number was tried")

    def _note_work(self, last: StepTimes, times: StepTimes) -> None:
        """Begin anew where steps are other work than what was learned from."""
        begun = self._begun = self._begun or times
        fewer, more = sorted((times.rows, begun.rows))
        least, most = sorted((last.slots_read, times.slots_read))
        is_as_much = (
            least <= self._policy.other_reads * begun.slots_read
            and begun.slots_read <= self._policy.other_reads * most
        )
        if more <= self._policy.other_rows * fewer and is_as_much:
            return
        self._begun, self._hold = times, self._policy.hold_steps
        self._is_at_rest, self._reference, self._before_try = False, None, None
        self._seen.clear()
        if self.setting.slots != self._first:
            what = f"of {times.rows} rows" if is_as_much else "that read so much"
            self._change(self._first, f"steps {what} are other work")

    def _has_seen_enough(self) -> bool:
        if self._reference is None and len(self._seen) < 2:
            return False
        seconds = sum(times.seconds for times in self._seen)
        policy = self._policy
        return len(self._seen) == policy.window_steps or seconds >= policy.window_seconds

    def _is_starved(self) -> bool:
        fractions = (times.starved_fraction for times in self._seen)
        return statistics.median(fractions) > self._policy.starved_fraction

    def _try(self, *, is_more: bool) -> None:
        """Go on in one direction, if there is any way to go."""
        slots = self.setting.slots
        if is_more:
            missed = statistics.median(times.missed_slots for times in self._seen)
            more = max((slots + 1) // 2, math.ceil(missed))
            to, why = min(self._most, slots + more), "the drive stood still"
        else:
            to, why = max(self._least, slots * 2 // 3), "steps may be as short with fewer"
        if to == slots:
            self._come_to_rest()
        else:
            self._before_try = slots
            self._change(to, why)

    def _judge(self, took: float, reference: float, before: int) -> None:
        """Another number of slots was tried: keep it, or go back."""
        self._before_try = None
        longer, differ = took / reference - 1, self._policy.differ_fraction
        is_more = self.setting.slots > before
        if longer > (-differ if is_more else differ):
            found = "no shorter" if is_more else f"{longer:.0%} longer"
            self._change(before, f"steps were {found} with {self.setting.slots}")
            self._come_to_rest()
            return
        self._reference = min(reference, took)
        if is_more and not self._is_starved():
            self._come_to_rest()
        else:
            self._try(is_more=is_more)

    def _come_to_rest(self) -> None:
        self._is_at_rest, self._steps_at_rest = True, 0
        self._seen.clear()

    def _rest(self, took: float, reference: float) -> None:
        """Look again when it was long enough, or when steps are not what they were."""
        is_other = abs(took / reference - 1) > self._policy.change_fraction
        if not is_other and self._steps_at_rest < self._hold:
            return
        self._hold = min(2 * self._hold, self._policy.hold_steps_max)
        self._is_at_rest, self._reference = False, None
        self._seen.clear()

    def _change(self, slots: int, reason: str) -> None:
        before = self.setting.slots
        self.setting = Setting(slots=slots, lookahead=self.setting.lookahead)
        self._seen.clear()
        self._to_skip = 1
        self._tell(before, slots, reason)
