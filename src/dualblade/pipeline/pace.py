"""What the tuner is told of each step, and what it changed: how much is read ahead of compute."""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass

from dualblade.config import PipelineMode
from dualblade.metrics import PipelineTuning, TuningEvent
from dualblade.pipeline.staging import StagingShape
from dualblade.pipeline.timeline import Lane, Timeline, now_ns
from dualblade.pipeline.tuner import Setting, StepTimes, Tuner

log = logging.getLogger("dualblade.pipeline")

_EVENTS_MAX = 64
"""Changes that are kept, the newest; each was logged."""


@dataclass(frozen=True, slots=True)
class _StepEnd:
    """When a step ended, in seconds; until then the direct door was busy, the model waited for
    reads, and so much was read directly."""

    at: float = 0.0
    busy_seconds: float = 0.0
    stalled_seconds: float = 0.0
    read_bytes: int = 0


class Pace:
    """Of one cache, for staging of `shape`; `in_flight_bytes`: what the drive's queue holds."""

    def __init__(
        self,
        mode: PipelineMode,
        shape: StagingShape,
        timeline: Timeline,
        *,
        in_flight_bytes: int,
        lookahead: int,
    ) -> None:
        self._mode = mode
        self._shape = shape
        self._timeline = timeline
        self._tuner = Tuner(
            mode,
            slots=shape.read_slots,
            slots_first=shape.slots_first(in_flight_bytes),
            lookahead=lookahead,
            tell=self._note,
        )
        self._events: deque[TuningEvent] = deque(maxlen=_EVENTS_MAX)
        self._last = _StepEnd()

    @property
    def setting(self) -> Setting:
        """What reads may do now."""
        return self._tuner.setting

    def end_step(
        self, *, rows: int, tokens: int, layers: int, busy_seconds: float, read_bytes: int
    ) -> None:
        """A step of `rows` new tokens ended, with which a sequence has `tokens`. In all the direct
        door was busy for `busy_seconds` by now, and `read_bytes` were read through it."""
        last, stalled = self._last, self._timeline.stalled_seconds(Lane.READS)
        self._last = end = _StepEnd(now_ns() / 1e9, busy_seconds, stalled, read_bytes)
        seconds = end.at - last.at
        self._tuner.step(
            StepTimes(
                rows=rows,
                tokens=tokens,
                seconds=seconds,
                idle_seconds=seconds - (end.busy_seconds - last.busy_seconds),
                stalled_seconds=end.stalled_seconds - last.stalled_seconds,
                slots_read=(end.read_bytes - last.read_bytes) / self._shape.slot_bytes,
                layers=layers,
            )
        )

    def restart(self) -> None:
        """See `Tuner.restart`."""
        self._tuner.restart()

    def describe(self) -> PipelineTuning:
        """The setting in force, and how it came to be."""
        return PipelineTuning(
            mode=self._mode,
            slots=self.setting.slots,
            slots_max=self._shape.read_slots,
            slot_bytes=self._shape.slot_bytes,
            lookahead=self.setting.lookahead,
            events=tuple(self._events),
        )

    def _note(self, before: int, after: int, reason: str) -> None:
        at = self._timeline.seconds_at(now_ns())
        self._events.append(
            TuningEvent(time_seconds=at, from_slots=before, to_slots=after, reason=reason)
        )
        log.info("reads may hold %d staging slots, not %d: %s", after, before, reason)
