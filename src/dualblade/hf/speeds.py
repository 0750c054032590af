"""The speeds of a store's device, as the plan takes them: what `tune` saved, else a short
measurement at the first use of the device, which is saved as such until `tune` replaces it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import UTC, datetime

from dualblade.config import EngineConfig
from dualblade.errors import DualBladeError, StorageError
from dualblade.host.mapped import can_hold_pages
from dualblade.host.profile import DeviceProfile, device_identity, load_profile, save_profile
from dualblade.io import Arena, Engine
from dualblade.residency import DoorSpeeds
from dualblade.store import Place, Store, as_places, member_count, nearest_cache_folder
from dualblade.store.measure import SWEEP_BYTES, measure_rates
from dualblade.units import GIB, MIB, format_size, round_up

log = logging.getLogger("dualblade.residency")

FIRST_USE_BYTES = 32 * MIB
"""Written once and read seven times, 0.1 s at 3 GiB/s; made whole sweeps of all members. A drive
that has not taken them after _FILL_SECONDS_MAX is judged by fewer: at 80 MB/s by 8 MiB, in 0.7 s.
"""

FIRST_USE_KV_BYTES_MIN = 256 * MIB
"""Less KV, or less memory for it, is cached by size alone: it would cost about as much I/O to
measure as could be saved."""

IN_PLACE_BYTES_PER_S = 1024.0 * GIB
"""Of cached pages that are attended to where they lie: nothing beside any drive. What finding their
entries in the page table takes, 0.2 ms a GiB with entries of 2 MiB, 14 with 4 KiB, is the model's
thread's time, and does not go on beside attention as a copy would: a part for the drive, so that
both end together, is no gain. Reading the pages is the attention's part."""

_FILL_SECONDS_MAX = 0.05
_REPEATS = 2


def known_profile(store: Place | Sequence[Place] | None) -> DeviceProfile | None:
    """Of what is below `store` (None: of private stores), all its members together; None when it
    was not measured."""
    return load_profile(*_places(store))


def _places(store: Place | Sequence[Place] | None) -> tuple[Place, ...]:
    return as_places(store) or (nearest_cache_folder(),)


def reads_in_place(
    config: EngineConfig, device: str, store: Place | Sequence[Place] | None
) -> bool:
    """Whether a model on `device` attends to cached pages where they lie; see Store.in_place."""
    can = config.in_place and device == "cpu" and member_count(store) == 1
    return can and can_hold_pages()


def door_speeds(profile: DeviceProfile | None, *, in_place: bool) -> DoorSpeeds | None:
    """Its speeds, as plan and controller take them. `in_place`: cached pages are not copied."""
    if profile is None:
        return None
    hit = profile.cache_hit_bytes_per_s
    return DoorSpeeds(
        direct_bytes_per_s=profile.direct_bytes_per_s,
        cache_hit_bytes_per_s=max(hit, IN_PLACE_BYTES_PER_S) if in_place else hit,
        cache_miss_bytes_per_s=profile.cache_miss_bytes_per_s,
    )


def measure_at_first_use(
    place: Place | Sequence[Place] | None, store: Store, engine: Engine
) -> DeviceProfile | None:
    """Measure both doors of `store`, just opened at `place`, and save them; None when that does
    not work out, which is no error: the plan then goes by size.

    The best of few sweeps: what disturbs one makes it slower, never faster. Misses and hits are
    told apart by the kernel's count of cached pages. A hit may come from the processor's cache;
    so the page cache looks at most too good, and the plan as it would be by size.
    """
    try:
        sweep_bytes = SWEEP_BYTES * store.member_count
        with Arena(sweep_bytes) as arena:
            # Not registered: the engine would keep it for good.
            try:
                rates = measure_rates(
                    store,
                    arena,
                    round_up(FIRST_USE_BYTES, sweep_bytes),
                    _REPEATS,
                    fill_seconds_max=_FILL_SECONDS_MAX,
                )
            except DualBladeError:
                engine.drain()
                raise
            except BaseException:
                engine.keep(arena.buffer)  # Ctrl-C ends waits for what is still on its way there
                raise
        profile = DeviceProfile(
            device=device_identity(*_places(place)),
            engine=engine.name,
            measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
            direct_bytes_per_s=max(rates.direct),
            cache_hit_bytes_per_s=max(rates.hit),
            cache_miss_bytes_per_s=max(rates.miss),
            quick=True,
        )
    except DualBladeError as exc:
        log.info("the device's speeds were not measured: %s", exc.message)
        return None
    log.info(
        "measured at first use: direct %s/s, page cache %s/s, %s/s when missed; dualblade tune "
        "measures them well",
        *(
            format_size(int(rate))
            for rate in (
                profile.direct_bytes_per_s,
                profile.cache_hit_bytes_per_s,
                profile.cache_miss_bytes_per_s,
            )
        ),
    )
    try:
        save_profile(profile)
    except StorageError as exc:
        log.info("%s: it is measured again next time", exc.message)
    return profile
