"""How many staging slots reads may hold, and how many layers ahead. Pure: what steps took is passed
in, once a step.

More slots than the drive needs to stay busy only spread its transfers over more memory, which the
caches then hold less of (on the development machine the drive itself delivers 10-20 % less into
240 MiB than into 16). Too few, and it stands still while the model computes. So: begin with all,
take a quarter away as long as steps stay as fast as they were, put it back when they do not. Each
answer is a median of some steps, compared with the best and not with the last, so that small losses
cannot add up. After a while, or when steps take another time than they did, begin anew; each time
the while doubles.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum


class Mode(StrEnum):
    """How reads and compute share a step, in the words that users see."""

    SERIAL = "serial"
    """A piece is read, then attended to, then the next is read."""
    KEY_VALUE = "key-value"
    """The values of some tiles are read while their keys are attended to."""
    TILED = "tiled"
    """A layer's pieces are read ahead of attention, none of the next layer's."""
    LAYERS = "layers"
    """Reads go on across layers and steps, into all slots."""
    AUTO = "auto"
    """Across layers, into as many slots as steps are the faster for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What the read-ahead may do: slots held by pieces that are read or attended to, and layers
    ahead of the one that computes; 0: a layer's reads begin when its turn comes."""

    slots: int
    lookahead: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningPolicy:
    """How eager the tuner is.

    window_steps    medians are over so many steps; the first after a change is not counted, its
                    reads were issued under the old setting.
    loss_fraction   a step that is longer by more than this is worse. Steps of one setting differ by
                    1-2 % from median to median here.
    change_fraction at rest, steps that differ by more mean other work or another drive: begin anew.
    slots_min       keys and values of some tiles, and the ones after them.
    hold_steps      at rest, before all of it is measured anew; doubles each time, up to
                    hold_steps_max: a search of at most 60 steps in 3,200.
    """

    window_steps: int = 5
    loss_fraction: float = 0.02
    change_fraction: float = 0.25
    slots_min: int = 4
    hold_steps: int = 100
    hold_steps_max: int = 3200


Tell = Callable[[int, int, str], None]
"""Of a change: slots before, slots after, why."""


class Tuner:
    """Of one cache. `tell` hears of every change."""

    def __init__(
        self,
        mode: Mode,
        *,
        slots: int,
        lookahead: int,
        tell: Tell,
        policy: TuningPolicy | None = None,
    ) -> None:
        assert slots >= 2, "keys and values of some tiles"
        self._policy = policy or TuningPolicy()
        self._most = slots
        self._tell = tell
        self._is_fixed = mode is not Mode.AUTO
        self.setting = {
            Mode.SERIAL: Setting(slots=1, lookahead=0),
            Mode.KEY_VALUE: Setting(slots=2, lookahead=0),
            Mode.TILED: Setting(slots=slots, lookahead=0),
        }.get(mode, Setting(slots=slots, lookahead=lookahead))
        self._hold = self._policy.hold_steps
        self._steps_at_rest = 0
        self._reference: float | None = None
        self._before_try: int | None = None
        self._is_at_rest = False
        self._seen: deque[float] = deque(maxlen=self._policy.window_steps)
        self._to_skip = 1

    def step(self, seconds: float) -> None:
        """A step with the setting in force took `seconds`."""
        if self._is_fixed:
            return
        if self._to_skip:
            self._to_skip -= 1
            return
        self._seen.append(seconds)
        self._steps_at_rest += self._is_at_rest
        if len(self._seen) < self._policy.window_steps:
            return
        took = statistics.median(self._seen)
        if self._reference is None:
            self._reference = took
            self._try_fewer()
        elif self._before_try is not None:
            self._judge(took, self._reference, self._before_try)
        else:
            self._rest(took, self._reference)

    def _try_fewer(self) -> None:
        fewer = max(self._policy.slots_min, self.setting.slots * 3 // 4)
        if fewer < self.setting.slots:
            self._before_try = self.setting.slots
            self._change(fewer, "steps may be as fast with fewer")
        else:
            self._come_to_rest()

    def _judge(self, took: float, reference: float, before: int) -> None:
        """Fewer slots were tried: keep them, or go back."""
        self._before_try = None
        longer = took / reference - 1
        if longer <= self._policy.loss_fraction:
            self._reference = min(reference, took)
            self._try_fewer()
        else:
            self._change(before, f"steps were {longer:.0%} longer with fewer")
            self._come_to_rest()

    def _come_to_rest(self) -> None:
        self._is_at_rest, self._steps_at_rest = True, 0
        self._seen.clear()

    def _rest(self, took: float, reference: float) -> None:
        """Begin anew when it was long enough, or when steps are not what they were."""
        is_other = abs(took / reference - 1) > self._policy.change_fraction
        if not is_other and self._steps_at_rest < self._hold:
            return
        self._hold = min(2 * self._hold, self._policy.hold_steps_max)
        self._is_at_rest, self._reference = False, None
        self._seen.clear()
        if self.setting.slots < self._most:
            why = "steps take another time than they did" if is_other else "time to look again"
            self._change(self._most, why)

    def _change(self, slots: int, reason: str) -> None:
        before = self.setting.slots
        self.setting = Setting(slots=slots, lookahead=self.setting.lookahead)
        self._seen.clear()
        self._to_skip = 1
        self._tell(before, slots, reason)
