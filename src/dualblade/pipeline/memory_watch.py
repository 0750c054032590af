"""The budget while a cache lives: what was asked for, or what memory there is."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from dualblade.host.memory import MemoryReading, OwnMemory

PROBE_SECONDS = 0.5
"""Between two readings of the memory: one costs 0.1 ms, 0.7 with the processor's caches cold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySource:
    """Where a budget comes from while the cache lives.

    asked_bytes  the budget asked for. None (`auto`): what there is.
    read         asks for the memory there is, given what the cache holds. None: nobody does, and
                 `asked_bytes` holds.
    clock        monotonic seconds.
    """

    asked_bytes: int | None
    read: Callable[[OwnMemory], MemoryReading] | None = None
    clock: Callable[[], float] = time.monotonic


class MemoryWatch:
    """The budget in force: what was asked for or what there is, whichever is less; and what else
    the last reading told."""

    def __init__(self, source: MemorySource, start_bytes: int) -> None:
        self.budget_bytes = start_bytes
        self.stall_seconds: float | None = None
        self.unused_bytes: int | None = None
        self._source = source
        self.looked_at = float("-inf")

    def look(self, now: float, own: Callable[[], OwnMemory], *, at_once: bool = False) -> None:
        """Ask again, if it is time, or `at_once`. Raises: Unsupported without /proc/meminfo."""
        source = self._source
        if source.read is None or (now - self.looked_at < PROBE_SECONDS and not at_once):
            return
        self.looked_at = now
        found = source.read(own())
        there = found.budget_bytes
        self.budget_bytes = there if source.asked_bytes is None else min(source.asked_bytes, there)
        self.stall_seconds = found.pressure.some_seconds if found.pressure else None
        self.unused_bytes = found.unused_bytes
