"""What a store is made of: one file or device, or several that are striped.

Opening looks at all members before it writes to any: each is locked and compared with what it
says of itself, then all with one another.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
import uuid as uuid_module
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from dualblade.errors import ConfigError, NoSpace, NotAStore, StorageError
from dualblade.io import Engine
from dualblade.store.backing import check_engine, hold_file, is_device
from dualblade.store.device import hold_store
from dualblade.store.format import DATA_OFFSET, MEMBERS_MAX, MemberSection, Superblock
from dualblade.store.place import Backing, Held, Location, storage_error
from dualblade.store.stripes import Stripes
from dualblade.units import EXTENT_ALIGN_BYTES, format_size, round_up

Place = str | os.PathLike[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Members:
    """The open members of a store, in their order, and how it lies on them."""

    backings: tuple[Backing, ...]
    stripes: Stripes
    capacity_bytes: int
    was_unclean: bool
    _closed: list[Backing] = field(default_factory=list)

    @property
    def path(self) -> str:
        """For people: all of them."""
        return " + ".join(backing.path for backing in self.backings)

    @property
    def descriptors(self) -> dict[int, str]:
        """All descriptors, and the path of each."""
        return {
            fd: backing.path
            for backing in self.backings
            for fd in (backing.direct_fd, backing.buffered_fd)
            if fd is not None
        }

    def ranges(self, offset: int, size_bytes: int) -> list[tuple[Backing, int, int]]:
        """(member, offset, bytes) of a range of the store, one for each member that has some."""
        found = self.stripes.ranges(offset, size_bytes)
        return [(self.backings[member], at, size) for member, at, size in found]

    def allocate(self, offset: int, size_bytes: int) -> None:
        """Have blocks for a range of the store on all; where that fails (Ctrl-C too: they may take
        seconds to come) those that came are given back. Raises: NoSpace, StorageError."""
        ends: list[tuple[Backing, int]] = []
        try:
            for backing, at, size in self.ranges(offset, size_bytes):
                ends.append((backing, backing.end))
                backing.allocate(at, size)
        except BaseException as exc:
            for grown, end in ends:  # what there was room for: the file system would stay full
                with contextlib.suppress(OSError):
                    grown.cut(end)
            if not isinstance(exc, OSError):
                raise
            kind = NoSpace if exc.errno in (errno.ENOSPC, errno.EDQUOT) else StorageError
            raise kind(
                f"{backing.path} cannot grow by {size} bytes: {exc.strerror}",
                operation="allocate",
                path=backing.path,
                offset=at,
                size_bytes=size,
                hint="free some space there, or name a store on another drive",
            ) from exc

    def discard(self, offset: int, size_bytes: int) -> None:
        """As Backing.discard, for a range of the store. Raises: StorageError."""
        for backing, at, size in self.ranges(offset, size_bytes):
            try:
                backing.discard(at, size)
            except OSError as exc:
                raise storage_error("discard", backing.path, exc) from exc

    def locate(self, offset: int) -> Location:
        """Where `offset` of the store is on its member."""
        ((backing, at, _),) = self.ranges(offset, 1)
        return backing.locate(at)

    def ends(self, end: int) -> list[tuple[Backing, int]]:
        """Each member, and how far what lies before `end` of the store reaches on it."""
        found = self.stripes.ranges(DATA_OFFSET, end - DATA_OFFSET)
        reached = {member: at + size for member, at, size in found}
        return [
            (backing, reached.get(member, DATA_OFFSET))
            for member, backing in enumerate(self.backings)
        ]

    def fragments(self) -> int | None:
        """Contiguous ranges on the devices; None where a file system cannot tell."""
        counts = [backing.fragments() for backing in self.backings]
        return None if None in counts else sum(filter(None, counts))

    def close(self, *, keep_blocks: bool, end: int) -> None:
        """As Backing.close, for all, whatever closing one of them ends with; `end` is of the store.
        Those that Ctrl-C left open are closed by the next call.
        Raises: StorageError of the last that failed."""
        with contextlib.ExitStack() as stack:
            for backing, member_end in reversed(self.ends(end)):
                stack.callback(self._close_once, backing, keep_blocks, member_end)

    def _close_once(self, backing: Backing, keep_blocks: bool, end: int) -> None:
        if not any(backing is closed for closed in self._closed):
            self._closed.append(backing)  # before: its numbers may be other files' afterwards
            backing.close(keep_blocks=keep_blocks, end=end)

    @property
    def is_closed(self) -> bool:
        """Whether all are."""
        return len(self._closed) == len(self.backings)

    def let_go(self) -> None:
        """As Backing.let_go, for all."""
        for backing in self.backings:
            if not any(backing is closed for closed in self._closed):
                self._closed.append(backing)
                backing.let_go()


def as_places(path: Place | Sequence[Place] | None) -> tuple[Place, ...] | None:
    """The members that `path` names; None for None (a private store).

    Raises: ConfigError for none, too many, or the same one twice.
    """
    if path is None:
        return None
    places = (path,) if isinstance(path, str | os.PathLike) else tuple(path)
    if not 1 <= len(places) <= MEMBERS_MAX:
        raise ConfigError(f"a store of {len(places)} members", hint=f"name 1 to {MEMBERS_MAX}")
    names = Counter(os.path.realpath(place) for place in places)
    for place in places:
        if names[os.path.realpath(place)] > 1:
            raise ConfigError(f"{os.fspath(place)} is named twice", hint="name each member once")
    return places


def member_count(path: Place | Sequence[Place] | None) -> int:
    """How many members `path` names. Raises: ConfigError."""
    return len(as_places(path) or ("private",))


def open_members(
    path: Place | Sequence[Place] | None,
    engine: Engine | None,
    *,
    direct: bool,
    capacity_bytes: int | None,
) -> Members:
    """Open what is at `path`: a store on a device, a store file, several of one kind that are
    members of one store; for a folder or None a private file. Files are made where all are missing.

    `engine` may be missing where all are files. With `direct` each place must do O_DIRECT.
    `capacity_bytes` None: free space less a reserve; a device has what it was formatted with.
    Raises: ConfigError, NotAStore, NoSpace, StorageError, Unsupported; nothing is left behind.
    """
    with held_members(path, engine, direct=direct) as held:
        return _begin(held, capacity_bytes)


@contextlib.contextmanager
def held_members(
    path: Place | Sequence[Place] | None, engine: Engine | None, *, direct: bool
) -> Iterator[list[Held]]:
    """What a store at `path` would stand on, as `open_members` has it; what is still in the list
    is let go when an exception leaves the block. Raises: as `open_members`."""
    places = as_places(path)
    if places is not None:
        check_kinds(places)
    held: list[Held] = []
    try:
        for place in places or (None,):
            if engine is not None:
                check_engine(place, engine, direct=direct)
            if place is not None and is_device(place):
                assert engine is not None
                held.append(hold_store(place, engine, direct=direct))
            else:
                held.append(hold_file(place, direct=direct))
        yield held
    except BaseException:
        with contextlib.ExitStack() as stack:
            for each in held:
                stack.callback(each.let_go)
        raise


def check_kinds(places: Sequence[Place]) -> None:
    """All devices, all files that exist, all files to be made, or all folders for private files.
    Raises: NotAStore."""
    kinds = {place: is_device(place) for place in places}
    if len(set(kinds.values())) > 1:
        file = os.fspath(next(place for place in places if not kinds[place]))
        raise NotAStore(
            f"{file} is a file and others are devices: a store's members are of one kind",
            operation="open",
            path=file,
            hint="name devices only, or files only",
        )
    folders = [os.fspath(place) for place in places if os.path.isdir(place)]
    if 0 < len(folders) < len(places):
        raise NotAStore(
            f"{folders[0]} is a directory and others are files",
            operation="open",
            path=folders[0],
            hint=f"name a file, such as {folders[0]}/kv.store; or directories only",
        )
    missing = [os.fspath(place) for place in places if not os.path.lexists(place)]
    if 0 < len(missing) < len(places):
        hint = "name all members as they were made; or delete the others, to make a new store"
        if any(kinds.values()):
            hint = "a store needs all its members; lsblk shows what is there"
        raise NotAStore(
            f"{missing[0]} does not exist, and other members of the store do",
            operation="open",
            path=missing[0],
            hint=hint,
        )


def check_members(found: Sequence[tuple[str, Superblock]]) -> list[int]:
    """In which order the places of `found`, (path, superblock), make up one store.

    Raises: NotAStore naming the one that is missing, foreign, or there twice.
    """

    def refuse(path: str, why: str, hint: str) -> NotAStore:
        return NotAStore(f"{path} {why}", operation="open", path=path, hint=hint)

    if len(found) == 1:
        path, block = found[0]
        if block.member is not None:
            hint = f"name all {block.member.count} members, in any order"
            raise refuse(path, f"is {block.member.words} of a striped store", hint)
        return [0]
    (uuid, _), *_ = Counter(block.uuid for _, block in found).most_common()
    others = next(path for path, block in found if block.uuid == uuid)
    places: dict[int, int] = {}
    sections: dict[MemberSection, str] = {}
    for number, (path, block) in enumerate(found):
        if block.member is None:
            raise refuse(path, "is a whole store, no member of a striped one", "name it alone")
        if block.uuid != uuid:
            hint = "dualblade store inspect shows the uuid of each"
            raise refuse(path, f"is a member of another store than {others}", hint)
        if block.member.index in places:
            twin = found[places[block.member.index]][0]
            why = f"and {twin} are both {block.member.words}: one is a copy"
            raise refuse(path, why, "leave out the copy, and wipe it")
        places[block.member.index] = number
        sections[replace(block.member, index=0)] = path
    if len(sections) > 1:
        path = list(sections.values())[-1]
        raise refuse(path, f"disagrees with {others} on how the store is striped", "wipe them all")
    count = next(iter(sections)).count
    missing = next((index for index in range(count) if index not in places), None)
    if missing is not None:
        words = MemberSection(index=missing, count=count).words
        why = f"and the others named lack {words} of their store"
        raise refuse(others, why, f"name all {count} members, in any order")
    return [places[index] for index in range(count)]


def _begin(held: list[Held], wanted: int | None) -> Members:
    """Compare all with one another; then write to each, and not before."""
    old = [(each.path, each.superblock) for each in held if each.superblock is not None]
    if old:
        held = [held[number] for number in check_members([(p, b) for p, b in old])]
    blocks = [block for _, block in old]
    stripe = next((block.member.stripe_bytes for block in blocks if block.member), None)
    stripes = Stripes(len(held)) if stripe is None else Stripes(len(held), stripe)
    each_bytes, capacity = _capacity(held, stripes, wanted)
    uuid = blocks[0].uuid if blocks else uuid_module.uuid4()
    generations = {block.generation for block in blocks}
    # A crash between the members' superblocks leaves one generation behind; the KV is gone anyway.
    unclean = any(block.in_use for block in blocks) or len(generations) > 1
    backings = []
    for index, each in enumerate(held):
        block = each.superblock or Superblock(
            uuid=uuid,
            capacity_bytes=0,
            generation=0,
            created_unix_seconds=int(time.time()),
            in_use=True,
            member=MemberSection(index=index, count=len(held)) if len(held) > 1 else None,
        )
        size = each_bytes if block.device is None else block.capacity_bytes
        block = replace(
            block,
            capacity_bytes=size,
            generation=max(generations, default=0) + 1,
            in_use=True,
        )
        backings.append(each.take(block, unclean=unclean))
    return Members(
        backings=tuple(backings), stripes=stripes, capacity_bytes=capacity, was_unclean=unclean
    )


def _capacity(held: list[Held], stripes: Stripes, wanted: int | None) -> tuple[int, int]:
    """Bytes for extents, of each member and of the store; multiples of 2 MiB. Raises: NoSpace."""
    each_wanted = wanted
    if wanted is not None and len(held) > 1:
        each_wanted = round_up(stripes.member_bytes(wanted), EXTENT_ALIGN_BYTES)
    systems = [each.file_system for each in held]
    rooms = [each.capacity(each_wanted, systems.count(each.file_system)) for each in held]
    each_bytes = min(rooms)
    each_bytes = max(0, each_bytes // EXTENT_ALIGN_BYTES * EXTENT_ALIGN_BYTES)
    most = each_bytes * len(held)
    capacity = (most if wanted is None else min(most, wanted)) // EXTENT_ALIGN_BYTES
    if capacity < 1:
        smallest = held[rooms.index(min(rooms))].path
        raise NoSpace(
            f"no room for a store at {smallest}: {format_size(max(0, min(rooms)))}",
            operation="open",
            path=smallest,
            hint="free some space, or raise disk_capacity_bytes to at least 2 MiB",
        )
    return each_bytes, capacity * EXTENT_ALIGN_BYTES
