"""Measuring both doors of a store on a device: what `dualblade tune` saves.

Workload: one extent of seeded incompressible data, written before it is read (holes never touch the
device), swept as a decode step does it, into huge-page staging that is touched. Direct passes come
first; then the page-cache door opens and the first pass is all misses, those after it all hits.
Medians; a pass that the page cache did not serve as it should is an error, not a figure.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from dualblade.config import EngineConfig
from dualblade.errors import BudgetError, ConfigError
from dualblade.host.memory import available_memory
from dualblade.host.profile import DeviceProfile, device_identity
from dualblade.io import Arena, open_engine
from dualblade.store import Door, Extent, Store
from dualblade.units import MIB, format_size

_SWEEP_BYTES = 8 * MIB
"""Read at a time of each device: eight requests of 1 MiB, the default queue."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneOptions:
    """`folders`: on the device to measure, or on each; the scratch store there is removed."""

    folders: Sequence[Path]
    size_bytes: int = 256 * MIB
    repeats: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        step = self.sweep_bytes
        if self.size_bytes < step or self.size_bytes % step or self.repeats < 1:
            raise ConfigError(f"the size must be a multiple of {format_size(step)}")

    @property
    def sweep_bytes(self) -> int:
        """Read at a time: whole rows of stripes, so that no device waits for another."""
        return _SWEEP_BYTES * len(self.folders)


def measure_doors(
    options: TuneOptions, progress: Callable[[str], None] = lambda _: None
) -> DeviceProfile:
    """Speeds of both doors on the devices of `folders`. Blocks for seconds.

    Raises: BudgetError when the hits do not fit memory; Unsupported without O_DIRECT; NoSpace,
        DeviceError.
    """
    free = available_memory().available_bytes
    if free < 2 * options.size_bytes:
        raise BudgetError(
            f"hits cannot be measured: {format_size(free)} of memory are free",
            needed_bytes=2 * options.size_bytes,
            hint="measure when there is more, or with a smaller --size",
        )
    name = f".dualblade-tune-{time.monotonic_ns()}"
    scratch = [folder / f"{name}-{index}" for index, folder in enumerate(options.folders)]
    depth = EngineConfig().queue_depth * len(scratch)
    try:
        with (
            Arena(options.sweep_bytes) as arena,  # outlives the engine that it is registered with
            open_engine("auto", queue_depth=depth) as engine,
            Store.open(scratch, engine, capacity_bytes=options.size_bytes) as store,
        ):
            engine.register_arena(arena)
            extent = store.allocate(options.size_bytes, Door.DIRECT)
            sweep = _Sweep(store, extent, arena, options)
            sweep.fill()
            sweep.read()  # the first pass is not counted
            direct = statistics.median(sweep.read() for _ in range(options.repeats))
            progress(f"direct: {format_size(int(direct))}/s")
            misses = []
            for _ in range(options.repeats):
                store.move(extent, Door.DIRECT)
                store.move(extent, Door.PAGE_CACHE)
                misses.append(sweep.read())
            hits = [sweep.read() for _ in range(options.repeats)]
            held = store.cached_bytes(extent)
            if held < options.size_bytes:
                raise BudgetError(
                    f"only {format_size(held)} of {format_size(options.size_bytes)} stayed cached",
                    needed_bytes=options.size_bytes,
                    hint="other programs need the memory now; try again",
                )
            engine_name = engine.name
    finally:
        for file in scratch:
            file.unlink(missing_ok=True)
    hit, miss = statistics.median(hits), statistics.median(misses)
    progress(f"page cache: {format_size(int(hit))}/s when cached, {format_size(int(miss))}/s not")
    return DeviceProfile(
        device=device_identity(*options.folders),
        engine=engine_name,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        direct_bytes_per_s=direct,
        cache_hit_bytes_per_s=hit,
        cache_miss_bytes_per_s=miss,
        memory_copy_bytes_per_s=_copy_rate(options.repeats),
    )


class _Sweep:
    """Passes over one extent, a few MiB at a time."""

    def __init__(self, store: Store, extent: Extent, arena: Arena, options: TuneOptions) -> None:
        self._store, self._extent, self._arena = store, extent, arena
        self._size_bytes, self._seed = options.size_bytes, options.seed
        self._step_bytes = options.sweep_bytes

    def fill(self) -> None:
        random = np.random.default_rng(self._seed)
        memory = np.frombuffer(self._arena.buffer, dtype=np.uint8)
        for at in range(0, self._size_bytes, self._step_bytes):
            memory[:] = np.frombuffer(random.bytes(len(memory)), dtype=np.uint8)
            self._store.write(self._extent, at, self._arena.address, self._step_bytes).wait()

    def read(self) -> float:
        """One pass; bytes per second."""
        began = time.perf_counter()
        for at in range(0, self._size_bytes, self._step_bytes):
            self._store.read(self._extent, at, self._arena.address, self._step_bytes).wait()
        return self._size_bytes / (time.perf_counter() - began)


def _copy_rate(repeats: int) -> float:
    """Bytes per second of a copy too large for the processor's caches."""
    source, target = np.ones(64 * MIB, np.uint8), np.ones(64 * MIB, np.uint8)
    rates = []
    for _ in range(repeats):
        began = time.perf_counter()
        np.copyto(target, source)
        rates.append(source.nbytes / (time.perf_counter() - began))
    return statistics.median(rates)
