"""Measuring both doors of an open store, as a decode step uses them.

One extent of seeded incompressible data, written before it is read (holes never touch the device),
swept a few MiB at a time into huge-page memory that is touched. Direct sweeps come first; then the
page-cache door opens and the first sweep is all misses, those after it all hits. Whether the page
cache really held the extent is asked of the kernel: if not, that is an error, not a figure.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np

from dualblade.errors import BudgetError
from dualblade.io import Arena
from dualblade.store.doors import Door
from dualblade.store.extent import Extent
from dualblade.store.store import Store
from dualblade.units import MIB, format_size

SWEEP_BYTES = 8 * MIB
"""Read at a time of each device: eight requests of 1 MiB, the default queue."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DoorRates:
    """Bytes per second of each sweep that counts: direct, page-cache hits, page-cache misses."""

    direct: tuple[float, ...]
    hit: tuple[float, ...]
    miss: tuple[float, ...]


def measure_rates(
    store: Store,
    arena: Arena,
    size_bytes: int,
    repeats: int,
    *,
    seed: int = 0,
    fill_seconds_max: float = float("inf"),
) -> DoorRates:
    """Sweep an extent of `size_bytes` of `store` through both doors `repeats` times.

    The extent is free again at the end, its pages are dropped, and the store's counters tell KV
    alone. `arena` is read into whole: SWEEP_BYTES of it for each member. On a drive that writes
    slowly the extent is filled for `fill_seconds_max` only, and what is filled (at least one
    sweep of `arena`) is read.

    Raises: NoSpace; BudgetError when the pages did not stay cached; DeviceError.
    """
    assert size_bytes >= len(arena.buffer), "less than one read"
    assert size_bytes % len(arena.buffer) == 0, "not whole reads"
    assert repeats > 0, "no sweep that counts"
    counters = replace(store.counters)
    extent = store.allocate(size_bytes, Door.DIRECT)
    try:
        sweep = _Sweep(store, extent, arena)
        sweep.fill(size_bytes, seed, fill_seconds_max)
        sweep.read()  # the first is not counted
        direct = [sweep.read() for _ in range(repeats)]
        miss = []
        for _ in range(repeats):
            store.move(extent, Door.DIRECT)
            store.move(extent, Door.PAGE_CACHE)
            miss.append(sweep.read())
        hit = [sweep.read() for _ in range(repeats)]
        held = store.cached_bytes(extent)
    finally:
        store.free(extent)
        store.counters = counters
    if held < sweep.size_bytes:
        raise BudgetError(
            f"only {format_size(held)} of {format_size(sweep.size_bytes)} stayed cached",
            needed_bytes=sweep.size_bytes,
            hint="other programs need the memory now; try again",
        )
    return DoorRates(direct=tuple(direct), hit=tuple(hit), miss=tuple(miss))


class _Sweep:
    """Passes over the part of an extent that was filled."""

    def __init__(self, store: Store, extent: Extent, arena: Arena) -> None:
        self._store, self._extent, self._arena = store, extent, arena
        self._step_bytes = len(arena.buffer)
        self.size_bytes = 0

    def fill(self, size_bytes: int, seed: int, seconds_max: float) -> None:
        random = np.random.default_rng(seed)
        memory = np.frombuffer(self._arena.buffer, dtype=np.uint8)
        began = time.perf_counter()
        while self.size_bytes < size_bytes:
            memory[:] = np.frombuffer(random.bytes(self._step_bytes), dtype=np.uint8)
            address = self._arena.address
            self._store.write(self._extent, self.size_bytes, address, self._step_bytes).wait()
            self.size_bytes += self._step_bytes
            if time.perf_counter() - began > seconds_max:
                break

    def read(self) -> float:
        """One pass; bytes per second."""
        began = time.perf_counter()
        for at in range(0, self.size_bytes, self._step_bytes):
            self._store.read(self._extent, at, self._arena.address, self._step_bytes).wait()
        return self.size_bytes / (time.perf_counter() - began)
