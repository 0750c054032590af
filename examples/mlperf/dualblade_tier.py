"""The NVMe tier of MLPerf Storage's KV-cache benchmark, in a dualblade store.

    benchmark   write(key, array)                 read(key)                       delete(key)
                   |                                 |                               |
    tier        copied piece by piece into lanes  into memory of its own, aligned    |
                   |                                 |                               |
    dualblade   Store.write, a ticket a piece     Store.read, one ticket          Store.free

    PYTHONPATH=CHECKOUT/kv_cache_benchmark python dualblade_tier.py TIER [kv-cache.py's arguments]

runs the benchmark with TIER: `dualblade`, or `theirs` for the tier that it comes with. The
benchmark takes a read or write that raises for one that took no time: a run with any ends with 1.
"""

from __future__ import annotations

import logging
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import wraps
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

    What is written is copied into lanes, 64 MiB for all writers together, a piece ahead of the
    drive; what is read lands in the memory that the caller gets. A write ends when the drive has
    the bytes. It does not have the drive flush them: nothing here outlives the process.

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
                with self._lock:
                    ticket = self._store.write(extent, at, self._arena.address + lane, span_bytes)
                moving.append((lane, ticket))
            before = time.perf_counter()
            while moving:
                self._land(moving)
            waited += time.perf_counter() - before
        except BaseException:
            with self._lock:
                self._store.free(extent)  # when nothing is being written any more
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
            ticket = self._store.read(entry.extent, 0, memory.ctypes.data + lead, span_bytes)
        before = time.perf_counter()
        try:
            ticket.wait()
        finally:
            while not ticket.done:  # interrupted: the memory is the engine's yet
                time.sleep(0.001)
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


def watched(kind: type[StorageBackend], failures: list[BaseException]) -> type[StorageBackend]:
    """`kind`, whose failures are told and kept: the benchmark's cache swallows them."""

    def watch(method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def call(*arguments: Any) -> Any:
            try:
                return method(*arguments)
            except Exception as error:
                log.exception("%s failed", method.__name__)
                failures.append(error)
                raise

        return call

    methods = {name: watch(getattr(kind, name)) for name in ("write", "read", "delete")}
    return type(kind.__name__, (kind,), methods)


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in TIERS:
        raise SystemExit(__doc__)
    kind = TIERS[sys.argv.pop(1)]
    failures: list[BaseException] = []
    kv_cache.cache.NVMeBackend = watched(kind, failures)
    kv_cache.cli.main()
    if failures:
        raise SystemExit(f"{len(failures)} reads or writes failed, first: {failures[0]}")


if __name__ == "__main__":
    main()
