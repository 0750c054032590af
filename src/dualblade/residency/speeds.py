"""Speeds of the two doors, the step time that they predict, and what is worth caching."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from dualblade.units import format_size

SAME_FRACTION = 0.05
"""Speeds closer than this are the same: medians of one virtual disk differ by as much."""

GAIN_FRACTION = 0.02
"""A plan must shorten the step by more than this to be worth the memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DoorSpeeds:
    """Measured on this machine: bytes per second through each door. A page-cache miss costs the
    drive's time and a copy."""

    direct_bytes_per_s: float
    cache_hit_bytes_per_s: float
    cache_miss_bytes_per_s: float

    def __post_init__(self) -> None:
        rates = (self.direct_bytes_per_s, self.cache_hit_bytes_per_s, self.cache_miss_bytes_per_s)
        assert min(rates) > 0, "a speed is positive"

    @property
    def direct_is_as_fast(self) -> bool:
        """Whether a hit gains nothing over the drive."""
        return self.direct_bytes_per_s >= self.cache_hit_bytes_per_s * (1 - SAME_FRACTION)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """The predicted time of one step and its parts; they overlap, so the longest decides."""

    compute_seconds: float
    drive_seconds: float
    copy_seconds: float

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return max(self.compute_seconds, self.drive_seconds, self.copy_seconds)

    @property
    def bound(self) -> str:
        """What decides, in words."""
        if self.seconds == self.compute_seconds:
            return "compute"
        return "the drive" if self.seconds == self.drive_seconds else "copies of cached pages"


def predict(
    total_bytes: int,
    cached_bytes: int,
    room_bytes: int,
    speeds: DoorSpeeds,
    *,
    compute_seconds: float = 0.0,
) -> StepTime:
    """The step that reads `total_bytes`, `cached_bytes` of them through the page cache.

    Both doors and compute go on at once (1536 MiB swept with 0, 384, 768 MiB of it cached: 1.1,
    1.8, 3.7 GiB/s, as if cached bytes were free). Past `room_bytes` a cyclic sweep hits nothing:
    all of the cached bytes then come from the drive, slower (900 MiB: 1.0 GiB/s).
    """
    direct = (total_bytes - cached_bytes) / speeds.direct_bytes_per_s
    fits = cached_bytes <= room_bytes
    missed = 0.0 if fits else cached_bytes / speeds.cache_miss_bytes_per_s
    return StepTime(
        compute_seconds=compute_seconds,
        drive_seconds=direct + missed,
        copy_seconds=cached_bytes / speeds.cache_hit_bytes_per_s if fits else 0.0,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Worth:
    """How many bytes are worth caching, and why not more (None: there is no room for more)."""

    cache_bytes: int
    reason: str | None


@lru_cache(maxsize=16)
def worth_caching(total_bytes: int, room_bytes: int, speeds: DoorSpeeds | None) -> Worth:
    """Most bytes that shorten the reading, of what there is room for. Never falls as room grows.

    That computing hides it is no reason to leave memory alone: reading takes processor time.
    Remembers its last answers: it is asked at each step boundary, and little changes between two.
    """
    room = min(total_bytes, room_bytes)
    if speeds is None:
        return Worth(cache_bytes=room, reason=None)
    if speeds.direct_is_as_fast:
        direct, hit = speeds.direct_bytes_per_s, speeds.cache_hit_bytes_per_s
        return Worth(
            cache_bytes=0,
            reason=f"direct reads ({format_size(direct)}/s) are as fast as "
            f"the page cache ({format_size(hit)}/s)",
        )
    # Without a limit the best split is where both doors end together; a little more does no harm.
    both = speeds.direct_bytes_per_s + speeds.cache_hit_bytes_per_s
    even = int(total_bytes * speeds.cache_hit_bytes_per_s / both)
    most = int(total_bytes / both * (1 + GAIN_FRACTION) * speeds.cache_hit_bytes_per_s)
    without = predict(total_bytes, 0, room, speeds).seconds
    within = predict(total_bytes, min(room, even), room, speeds).seconds
    if without <= within * (1 + GAIN_FRACTION):
        return Worth(
            cache_bytes=0, reason=f"{format_size(room)} of page cache would gain too little"
        )
    worth = min(room, most)
    if worth < room:
        return Worth(cache_bytes=worth, reason="copying more from the page cache would be slower")
    return Worth(cache_bytes=worth, reason=None)
