"""The NVMe tier of MLPerf Storage's KV-cache benchmark, in a dualblade store.

    benchmark   write(key, array)                 read(key)                       delete(key)
                   |                                 |                               |
    tier        copied piece by piece into lanes  into memory of its own, aligned    |
                   |                                 |                               |
    dualblade   Store.write, a ticket a piece     Store.read, one ticket          Store.free

    PYTHONPATH=CHECKOUT/kv_cache_benchmark python dualblade_tier.py TIER [kv-cache.py's arguments]

runs the benchmark with TIER: `dualblade`, or `theirs` for the tier that it comes with. What each
read and write took is kept in the file that DUALBLADE_TIER_LOG names: the benchmark's own rates
count what ends long after its clock was stopped, and it takes what raises for what took no time. A
run with any that raised ends with exit 1.
"""

# ruff: noqa: T201 - an example prints

from __future__ import annotations

import json
import logging
import os
import queue
import sys
import threading
import time
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kv_cache.cache
import kv_cache.cli
import numpy as np
from kv_cache.backends import NVMeBackend, StorageBackend

from dualblade.io import Arena, Ticket, open_engine
from dualblade.store import Door, Extent, Store, as_places, cache_directory
from dualblade.units import BLOCK_BYTES, MIB, round_up

log = logging.getLogger("dualblade.mlperf")

LANE_BYTES = 4 * MIB
LANES = 16

Array = np.ndarray[Any, Any]
Moving = deque[tuple[int, Ticket]]
"""Lanes that are being written from, the oldest first."""


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """An array in the store, from the beginning of `extent`."""

    extent: Extent
    size_bytes: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


class DualBladeBackend(StorageBackend):
    """Arrays in a private store in the folder `base_path`, past the page cache. Any thread may
    call it.

    What is written is copied into lanes, 64 MiB for all writers together, ahead of the drive; what
    is read lands in the memory that the caller gets. A write ends when the drive has the bytes. It
    does not have the drive flush them: nothing here outlives the process.

    Raises: KeyError for a key that is not there; NoSpace, StorageError, Unsupported.
    """

    def __init__(self, base_path: str | None = None) -> None:
        self.base_path = cache_directory() if base_path is None else Path(base_path)
        self.base_path.mkdir(parents=True, exist_ok=True)
        with ExitStack() as opened:
            engine = opened.enter_context(open_engine())
            places = as_places(str(self.base_path))
            self._store = opened.enter_context(Store.open(places, engine))
            self._arena = Arena(LANES * LANE_BYTES)
            engine.register_arena(self._arena)
            self._opened = opened.pop_all()
        self._memory = np.frombuffer(self._arena.buffer, np.uint8)
        self._lanes: queue.SimpleQueue[int] = queue.SimpleQueue()
        for lane in range(LANES):
            self._lanes.put(lane * LANE_BYTES)
        self._lock = threading.Lock()  # the store is used by one thread at a time
        self._entries: dict[str, Entry] = {}
        self._reading: dict[int, Array] = {}  # memory that is the engine's, by address

    def write(self, key: str, data: Array) -> Any:
        """Store `data` under `key`, in place of what was there. Returns: IOTiming, seconds."""
        start, waited = time.perf_counter(), 0.0
        content = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        with self._lock:
            extent = self._store.allocate(content.nbytes, Door.DIRECT)
        moving: Moving = deque()
        try:
            for at in range(0, content.nbytes, LANE_BYTES):
                piece = content[at : at + LANE_BYTES]
                before = time.perf_counter()
                lane = self._free_lane(moving)
                waited += time.perf_counter() - before
                self._memory[lane : lane + piece.nbytes] = piece
                span_bytes = round_up(piece.nbytes, BLOCK_BYTES)
                try:
                    with self._lock:
                        address = self._arena.address + lane
                        ticket = self._store.write(extent, at, address, span_bytes)
                except BaseException:
                    self._lanes.put(lane)
                    raise
                moving.append((lane, ticket))
            before = time.perf_counter()
            while moving:
                self._land(moving)
            waited += time.perf_counter() - before
        except BaseException:
            try:
                with self._lock:
                    self._store.free(extent)  # when nothing is being written any more
            finally:
                for lane, _ in moving:
                    self._lanes.put(lane)
            raise
        entry = Entry(extent, content.nbytes, data.dtype, data.shape)
        with self._lock:
            replaced = self._entries.get(key)
            self._entries[key] = entry
            if replaced is not None:
                self._store.free(replaced.extent)
        return _timing(start, waited)

    def read(self, key: str) -> tuple[Array, Any]:
        """What is stored under `key`, and IOTiming, seconds."""
        start = time.perf_counter()
        with self._lock:
            entry = self._entries[key]
            span_bytes = round_up(entry.size_bytes, BLOCK_BYTES)
            memory = np.empty(span_bytes + BLOCK_BYTES, np.uint8)
            lead = -memory.ctypes.data % BLOCK_BYTES
            address = memory.ctypes.data + lead
            self._reading[address] = memory
            ticket = self._store.read(entry.extent, 0, address, span_bytes)
        before = time.perf_counter()
        try:
            ticket.wait()
        finally:
            while not ticket.done:  # interrupted
                time.sleep(0.001)
            del self._reading[address]
        waited = time.perf_counter() - before
        found = memory[lead : lead + entry.size_bytes].view(entry.dtype).reshape(entry.shape)
        return found, _timing(start, waited)

    def delete(self, key: str) -> None:
        """Forget `key`, if it is there, when what is being read of it has landed."""
        with self._lock:
            entry = self._entries.pop(key, None)
            if entry is not None:
                self._store.free(entry.extent)

    def clear(self) -> None:
        """Forget all keys."""
        for key in list(self._entries):
            self.delete(key)

    def close(self) -> None:
        """Discard what is stored. Twice is once."""
        with self._lock:
            self._opened.close()

    def _free_lane(self, moving: Moving) -> int:
        """A lane to copy into. Who has some under way waits for those, never for others': so of
        any number of writers one goes on."""
        while True:
            try:
                return self._lanes.get(block=not moving)
            except queue.Empty:
                self._land(moving)

    def _land(self, moving: Moving) -> None:
        """Wait for the oldest of `moving`; its lane is free then."""
        lane, ticket = moving[0]
        ticket.wait()
        moving.popleft()
        self._lanes.put(lane)


def _timing(start: float, waited: float) -> Any:
    """`waited`: for the engine; all else since `start` is the host's."""
    total = time.perf_counter() - start
    return StorageBackend.IOTiming(total=total, device=waited, host=total - waited)


TIERS: dict[str, type[StorageBackend]] = {"dualblade": DualBladeBackend, "theirs": NVMeBackend}


@dataclass(frozen=True, slots=True)
class Call:
    """A read or write: when it began, seconds; how long it took; CPU seconds of the process at its
    end; None for the bytes of one that raised."""

    way: str
    began: float
    took: float
    cpu: float
    size_bytes: int | None


def watched(kind: type[StorageBackend], calls: list[Call]) -> type[StorageBackend]:
    """`kind`, whose reads and writes are kept in `calls`, and told when they raise."""

    class Watched(kind):
        def write(self, key: str, data: Array) -> Any:
            return self._watch("write", lambda: (super(Watched, self).write(key, data), data))

        def read(self, key: str) -> tuple[Array, Any]:
            def call() -> Any:
                data, timing = super(Watched, self).read(key)
                return (data, timing), data

            return self._watch("read", call)

        def _watch(self, way: str, call: Any) -> Any:
            began, size_bytes = time.perf_counter(), None
            try:
                result, data = call()
                size_bytes = data.nbytes
            except Exception:
                log.exception("a %s failed", way)
                raise
            finally:
                took = time.perf_counter() - began
                calls.append(Call(way, began, took, time.process_time(), size_bytes))
            return result

    return Watched


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in TIERS:
        raise SystemExit(__doc__)
    kind = TIERS[sys.argv.pop(1)]
    calls: list[Call] = []
    kv_cache.cache.NVMeBackend = watched(kind, calls)
    kv_cache.cli.main()
    calls = calls[:]  # the benchmark leaves threads behind in the middle of a read
    failed = sum(call.size_bytes is None for call in calls)
    if "DUALBLADE_TIER_LOG" in os.environ:
        lines = [json.dumps([getattr(call, name) for name in Call.__slots__]) for call in calls]
        Path(os.environ["DUALBLADE_TIER_LOG"]).write_text("\n".join(lines) + "\n")
    if failed:
        print(f"{failed} reads or writes failed", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1 if failed else 0)  # those threads are not Python's to end


if __name__ == "__main__":
    main()
