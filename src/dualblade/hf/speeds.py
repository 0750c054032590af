"""The speeds that a store's device was measured to have, as the plan takes them."""

from __future__ import annotations

import os

from dualblade.host.profile import load_profile
from dualblade.residency import DoorSpeeds
from dualblade.store import cache_directory


def door_speeds(store: str | os.PathLike[str] | None) -> DoorSpeeds | None:
    """Of the device below `store` (None: of private stores); None when it was not measured."""
    profile = load_profile(cache_directory() if store is None else store)
    if profile is None:
        return None
    return DoorSpeeds(
        direct_bytes_per_s=profile.direct_bytes_per_s,
        cache_hit_bytes_per_s=profile.cache_hit_bytes_per_s,
        cache_miss_bytes_per_s=profile.cache_miss_bytes_per_s,
    )
