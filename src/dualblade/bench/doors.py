"""Measuring both doors of a store on a device, copies in memory and computing: what `dualblade
tune` saves.

A folder or a file: a scratch store beside it, gone at the end. A device: the store on it, which
has to be formatted for dualblade and free; nothing else is ever written to. Medians.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from dualblade.bench.compute import measure_compute
from dualblade.bench.workload import at_least
from dualblade.config import EngineConfig
from dualblade.errors import BudgetError
from dualblade.host.memory import available_memory
from dualblade.host.profile import DeviceProfile, device_identity
from dualblade.io import Arena, open_engine
from dualblade.store import Store
from dualblade.store.backing import check_place, is_device
from dualblade.store.measure import SWEEP_BYTES, measure_rates
from dualblade.units import MIB, format_size, round_up


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneOptions:
    """`places`: a folder, a store file in one (it may be missing), or a device formatted for us;
    of a striped store, one for each member. `size_bytes` is made whole sweeps."""

    places: Sequence[Path]
    size_bytes: int = 256 * MIB
    repeats: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        at_least("the size", self.size_bytes, 1)
        at_least("repeats", self.repeats, 1)
        object.__setattr__(self, "size_bytes", round_up(self.size_bytes, self.sweep_bytes))

    @property
    def sweep_bytes(self) -> int:
        """Read at a time."""
        return SWEEP_BYTES * len(self.places)


def measure_doors(
    options: TuneOptions, progress: Callable[[str], None] = lambda _: None
) -> DeviceProfile:
    """Speeds of both doors on the devices of `options.places`. Blocks for seconds.

    Raises: ConfigError, StorageError for a folder that is not there; BudgetError when the hits do
        not fit memory; NotAStore for a device that is not formatted or in use; Unsupported without
        O_DIRECT; NoSpace, DeviceError.
    """
    for place in options.places:
        if not is_device(place):
            check_place(place)
    free = available_memory().available_bytes
    if free < 2 * options.size_bytes:
        raise BudgetError(
            f"hits cannot be measured: {format_size(free)} of memory are free",
            needed_bytes=2 * options.size_bytes,
            hint="measure when there is more, or with a smaller --size",
        )
    places: Sequence[Path] = options.places
    are_files = not any(map(is_device, places))
    scratch: list[Path] = []
    if are_files:  # private files, which have no name that a kill could leave
        places = [place if place.is_dir() else place.absolute().parent for place in places]
        if len({place.resolve() for place in places}) < len(places):  # members need names then
            name = f".dualblade-tune-{os.getpid()}-{time.monotonic_ns()}"
            scratch = [folder / f"{name}-{index}.store" for index, folder in enumerate(places)]
    try:
        with (
            Arena(options.sweep_bytes) as arena,  # outlives the engine that it is registered with
            open_engine("auto", queue_depth=EngineConfig().queue_depth * len(places)) as engine,
            Store.open(
                scratch or places, engine, capacity_bytes=options.size_bytes if are_files else None
            ) as store,
        ):
            engine.register_arena(arena)
            progress(f"measuring {store.path}")
            rates = measure_rates(
                store, arena, options.size_bytes, options.repeats, seed=options.seed
            )
            engine_name = engine.name
    finally:
        for file in scratch:
            with suppress(OSError):  # it could not be made
                file.unlink()
    progress("measuring the processor")
    return DeviceProfile(
        device=device_identity(*options.places),
        engine=engine_name,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        direct_bytes_per_s=statistics.median(rates.direct),
        cache_hit_bytes_per_s=statistics.median(rates.hit),
        cache_miss_bytes_per_s=statistics.median(rates.miss),
        memory_copy_bytes_per_s=_copy_rate(options.repeats),
        compute=measure_compute(options.repeats),
    )


def _copy_rate(repeats: int) -> float:
    """Bytes per second of a copy too large for the processor's caches."""
    source, target = np.ones(64 * MIB, np.uint8), np.ones(64 * MIB, np.uint8)
    rates = []
    for _ in range(repeats):
        began = time.perf_counter()
        np.copyto(target, source)
        rates.append(source.nbytes / (time.perf_counter() - began))
    return statistics.median(rates)
