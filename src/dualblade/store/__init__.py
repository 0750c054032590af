"""Where bytes are on a drive, and ways to them: extents, doors and the on-disk format."""

from dualblade.store.backing import cache_directory, nearest_cache_folder
from dualblade.store.doors import Door
from dualblade.store.extent import Extent
from dualblade.store.in_place import InPlace
from dualblade.store.members import Place, as_places, member_count
from dualblade.store.store import Store

__all__ = [
    "Door",
    "Extent",
    "InPlace",
    "Place",
    "Store",
    "as_places",
    "cache_directory",
    "member_count",
    "nearest_cache_folder",
]
