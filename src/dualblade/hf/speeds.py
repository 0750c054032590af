"""The speeds that a store's device was measured to have, as the plan takes them."""

from __future__ import annotations

from collections.abc import Sequence

from dualblade.host.profile import load_profile
from dualblade.residency import DoorSpeeds
from dualblade.store import Place, as_places, cache_directory


def door_speeds(store: Place | Sequence[Place] | None) -> DoorSpeeds | None:
    """Of what is below `store` (None: of private stores), all its members together; None when that
    was not measured."""
    profile = load_profile(*(as_places(store) or (cache_directory(),)))
    if profile is None:
        return None
    return DoorSpeeds(
        direct_bytes_per_s=profile.direct_bytes_per_s,
        cache_hit_bytes_per_s=profile.cache_hit_bytes_per_s,
        cache_miss_bytes_per_s=profile.cache_miss_bytes_per_s,
    )
