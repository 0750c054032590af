"""When each stage worked: busy times that are always kept, and a trace when it is asked for.

A stage is busy while at least one thing in it goes on: two reads at once count once. So the sum of
the stages' times over the wall time says how much went on at the same time.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path
from typing import Any

from dualblade.errors import Unsupported
from dualblade.metrics import PipelineStages

now_ns = time.monotonic_ns
"""The clock of all spans; the engine's tickets end on it."""


class Lane(IntEnum):
    """The stages, in the order of the way of a tile, as a trace shows them."""

    READS = 0
    COPIES = 1
    COMPUTE = 2
    WRITES = 3
    CONTROL = 4


_OVERLAPPING = (Lane.READS, Lane.COPIES, Lane.WRITES)
"""Several at a time: shown side by side. What the model's thread does comes one after another."""

Event = tuple[int, str, int, int, int, int]
"""(lane, name, start, end, layer, bytes); times in nanoseconds of `now_ns`."""


class Timeline:
    """Of one cache. `events_max`: newest spans that are kept for a trace; 0 keeps none.

    Used by the model's thread. A span costs 0.25 us, kept for a trace 0.3 us (docs/decisions/0009).
    """

    def __init__(self, events_max: int = 0) -> None:
        self._events: deque[Event] | None = deque(maxlen=events_max) if events_max else None
        self._busy_ns = [0] * len(Lane)
        self._until_ns = [0] * len(Lane)
        self._stall_ns = [0] * len(Lane)
        self.copied_ns = 0
        self._began_ns = 0
        self._wall_ns = 0  # of prompts before the one in hand, which began at:
        self._prompt_ns = 0
        self._left_ns = 0
        self._is_inside = False

    def span(
        self,
        lane: Lane,
        name: str,
        start_ns: int,
        end_ns: int,
        layer: int = -1,
        size_bytes: int = 0,
        idle_ns: int = 0,
    ) -> None:
        """Something in `lane` went on from `start_ns` to `end_ns`, but for `idle_ns` of it. Spans
        of a lane are told in the order of their starts."""
        until = self._until_ns[lane]
        if end_ns > until:
            self._busy_ns[lane] += end_ns - (start_ns if start_ns > until else until) - idle_ns
            self._until_ns[lane] = end_ns
        if self._events is not None:
            self._events.append((lane, name, start_ns, end_ns, layer, size_bytes))

    def stall(self, cause: Lane, start_ns: int, end_ns: int) -> None:
        """The model's thread waited for the stage `cause`."""
        self._stall_ns[cause] += end_ns - start_ns

    @property
    def stalled_ns(self) -> int:
        """Time that the model's thread waited for any stage."""
        return sum(self._stall_ns)

    def copied(self, name: str, start_ns: int, end_ns: int, layer: int, size_bytes: int) -> None:
        """The model's thread copied; `copied_ns` is all that it did of this."""
        self.copied_ns += end_ns - start_ns
        self.span(Lane.COPIES, name, start_ns, end_ns, layer, size_bytes)

    def stalled_seconds(self, cause: Lane) -> float:
        """Time that the model's thread waited for the stage."""
        return self._stall_ns[cause] / 1e9

    def enter(self) -> None:
        """The model's thread comes into the cache: what it did outside was the model's compute."""
        if self._is_inside:
            return
        self._is_inside = True
        now = now_ns()
        if self._left_ns:
            self.span(Lane.COMPUTE, "model", self._left_ns, now)
        self._began_ns = self._began_ns or now
        self._prompt_ns = self._prompt_ns or now

    def leave(self) -> None:
        """The model's thread goes out of the cache."""
        self._is_inside = False
        self._left_ns = now_ns()

    def seconds_at(self, time_ns: int) -> float:
        """`time_ns` as seconds since the first rows."""
        return (time_ns - self._began_ns) / 1e9

    def pause(self) -> None:
        """What comes until the next `enter` is nobody's compute: between two prompts."""
        self._wall_ns = self._so_far_ns()
        self._is_inside, self._prompt_ns, self._left_ns = False, 0, 0

    def _so_far_ns(self) -> int:
        """Between the first rows of a prompt and the last time that it left, of all prompts."""
        return self._wall_ns + max(0, self._left_ns - self._prompt_ns)

    def stages(
        self, *, direct_bytes: int = 0, profile_bytes_per_second: float | None = None
    ) -> PipelineStages:
        """Totals so far, for `direct_bytes` moved through the direct door."""
        busy = [ns / 1e9 for ns in self._busy_ns]
        return PipelineStages(
            wall_seconds=self._so_far_ns() / 1e9,
            reads_seconds=busy[Lane.READS],
            copies_seconds=busy[Lane.COPIES],
            compute_seconds=busy[Lane.COMPUTE],
            writes_seconds=busy[Lane.WRITES],
            control_seconds=busy[Lane.CONTROL],
            stalled_on_reads_seconds=self.stalled_seconds(Lane.READS),
            stalled_on_copies_seconds=self.stalled_seconds(Lane.COPIES),
            stalled_on_writes_seconds=self.stalled_seconds(Lane.WRITES),
            direct_bytes=direct_bytes,
            profile_bytes_per_second=profile_bytes_per_second,
        )

    def write_trace(self, path: Path) -> int:
        """Write the kept spans as Chrome's trace JSON (Perfetto opens it); the number of them.

        Raises: Unsupported where none are kept, OSError.
        Source: Trace Event Format, section 'Duration events' and 'Async events'.
        """
        if self._events is None:
            raise Unsupported(
                "no spans are kept", hint="give for_model config=EngineConfig(trace_events=100_000)"
            )
        events = sorted(self._events, key=lambda event: event[2])
        with path.open("w", encoding="utf-8") as out:
            out.write('{"displayTimeUnit":"ms","traceEvents":[\n')
            out.write(",\n".join(json.dumps(line) for line in _trace_lines(events)))
            out.write("\n]}\n")
        return len(events)


def _trace_lines(events: list[Event]) -> Iterator[dict[str, Any]]:
    for stage in Lane:
        about = {"ph": "M", "pid": 1, "tid": int(stage)}
        yield {**about, "name": "thread_name", "args": {"name": stage.name.lower()}}
        yield {**about, "name": "thread_sort_index", "args": {"sort_index": int(stage)}}
    first = events[0][2] if events else 0
    for number, (lane, name, start, end, layer, size) in enumerate(events):
        args: dict[str, Any] = {"what": name}
        if layer >= 0:
            args["layer"] = layer
        if size:
            args["bytes"] = size
        common = {"pid": 1, "tid": int(lane), "cat": Lane(lane).name.lower()}
        begin, microseconds = (start - first) / 1e3, (end - start) / 1e3
        if lane in _OVERLAPPING:
            both = {**common, "name": Lane(lane).name.lower(), "id": number}
            yield {**both, "ph": "b", "ts": begin, "args": args}
            yield {**both, "ph": "e", "ts": begin + microseconds}
        else:
            yield {
                **common,
                "name": name,
                "ph": "X",
                "ts": begin,
                "dur": microseconds,
                "args": args,
            }
