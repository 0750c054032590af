"""Tensor to place: extents, doors and the on-disk format."""

from dualblade.store.backing import cache_directory
from dualblade.store.doors import Door
from dualblade.store.store import Extent, Store

__all__ = ["Door", "Extent", "Store", "cache_directory"]
