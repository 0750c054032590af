"""Whether a store can be at a place, asked before the work that would want it there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dualblade.host.drives import find_drive
from dualblade.io import open_engine
from dualblade.store import as_places, nearest_cache_folder
from dualblade.store.backing import check_place, file_room, is_device, refuse_special
from dualblade.store.device import device_error, recognise
from dualblade.store.format import Superblock
from dualblade.store.members import check_kinds, check_members, held_members
from dualblade.store.place import read_superblock, storage_error

if TYPE_CHECKING:
    from dualblade.config import EngineConfig


def check_store(stores: Sequence[Path] | None, config: EngineConfig, *, direct: bool) -> None:
    """Take what a store would stand on, and give it back: nothing is written (a store file of ours
    that others could read is private now), and a file that was not there is gone. Raises: as
    `Store.open`, but for the room that there is."""
    with (
        open_engine(
            config.io_engine, chunk_bytes=config.chunk_bytes, io_poll=config.io_poll
        ) as engine,
        held_members(stores, engine, direct=direct) as held,
    ):
        found = [(each.path, each.superblock) for each in held]
        _check_together([(path, block) for path, block in found if block is not None])
        while held:  # what has been let go must not be once more, whatever ends this
            held.pop().let_go()


def look_at_store(stores: Sequence[Path] | None) -> None:
    """Only look: at what is there, not at who has it, nor for direct I/O. Raises: StorageError,
    NotAStore, Unsupported as `Store.open`."""
    places = as_places(stores) or ()
    check_kinds(places)
    found = [(os.fspath(place), superblock_at(os.fspath(place))) for place in places]
    _check_together([(path, block) for path, block in found if block is not None])


def store_room(stores: Sequence[Path] | None) -> int:
    """Bytes of KV that there is room for at the places of one store (None: a private one). Raises:
    as `look_at_store`."""
    places = [os.fspath(place) for place in as_places(stores) or (nearest_cache_folder(),)]
    folders = [
        place if os.path.exists(place) else os.path.dirname(place) or "." for place in places
    ]
    systems = [os.stat(folder).st_dev for folder in folders]
    rooms = []
    for place, folder, system in zip(places, folders, systems, strict=True):
        block = superblock_at(place) if is_device(place) else None
        stored = os.stat(place).st_blocks if os.path.isfile(place) else 0
        free = file_room(os.statvfs(folder), stored, systems.count(system))
        rooms.append(free if block is None else block.capacity_bytes)
    return min(rooms) * len(rooms)


def _check_together(found: list[tuple[str, Superblock]]) -> None:
    if found:
        check_members(found)


def superblock_at(place: str) -> Superblock | None:
    """Of the store at `place`; None for a folder, and where a file would be made."""
    if is_device(place):
        drive = find_drive(place)
        try:
            with open(drive.block_path, "rb", buffering=0) as node:
                return recognise(node.fileno(), drive)
        except OSError as exc:
            raise device_error("open", place, exc) from exc
    try:
        if not os.path.lexists(place):
            check_place(place)
            return None
        if os.path.isdir(place):
            return None
        refuse_special(place)
        with open(place, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            return Superblock.decode(read_superblock(file.fileno(), 0), path=place, file_bytes=size)
    except OSError as exc:
        raise storage_error("open", place, exc) from exc
