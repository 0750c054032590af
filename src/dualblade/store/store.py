"""A store: extents in files or on devices, each reached through one of two doors."""

from __future__ import annotations

import contextlib
import logging
import os
import weakref
from collections.abc import Sequence

from dualblade.errors import Closed, ConfigError, StorageError
from dualblade.host.mapped import FileMemory
from dualblade.host.page_cache import cached_bytes
from dualblade.io import Engine, Op, Ticket, Transfer
from dualblade.store.doors import Door, as_door
from dualblade.store.extent import Extent
from dualblade.store.extents import ExtentAllocator, Range
from dualblade.store.format import DATA_OFFSET
from dualblade.store.in_place import DoorCounters, InPlace
from dualblade.store.members import Members, Place, open_members
from dualblade.store.pages import CachedPages
from dualblade.store.place import Location
from dualblade.units import EXTENT_ALIGN_BYTES, parse_size

log = logging.getLogger("dualblade.store")

_OPEN: weakref.WeakSet[Store] = weakref.WeakSet()


class Store:
    """Extents in one place, or striped over several. Used by one thread; transfers end on the
    engine's. The engine, and the memory of transfers, must outlive it.

    A write through the page-cache door counts as stored only when its ticket has ended: it
    carries a sync_file_range that waits for writeback on the descriptor that wrote, so that a
    failed writeback is an error of that ticket and never a page read back wrong later.
    """

    def __init__(
        self,
        members: Members,
        engine: Engine,
        *,
        keep_blocks: bool = False,
        discard: bool = False,
        read_ahead: bool = False,
    ) -> None:
        self._members = members
        self._engine = engine
        self._keep_blocks = keep_blocks
        self._reads_ahead = read_ahead
        self._discard = discard
        self._allocator = ExtentAllocator(DATA_OFFSET, members.capacity_bytes)
        self._end = DATA_OFFSET
        self._live: set[Extent] = set()
        self._process = os.getpid()
        self._closed = False
        self._is_submitting = False
        self._has_direct = all(backing.direct_fd is not None for backing in members.backings)
        self._pages = CachedPages(members, engine, has_direct=self._has_direct)
        self._paths = members.descriptors
        # Stripes of several members do not lie side by side; an engine that must see all reads
        # (dualblade.testing) is not passed by.
        self._maps = len(members.backings) == 1 and engine.reads_in_place
        self.counters = DoorCounters()
        # Not the buffered ones, which hold devices: before Linux 6.2 what was registered is closed
        # a second late.
        for direct_fd in filter(None, (backing.direct_fd for backing in members.backings)):
            engine.register_file(direct_fd)
        if not read_ahead:
            for backing in members.backings:
                os.posix_fadvise(backing.buffered_fd, 0, 0, os.POSIX_FADV_RANDOM)
        if members.was_unclean:
            log.warning("%s was not closed cleanly; its KV is discarded", members.path)
        _OPEN.add(self)

    @classmethod
    def open(
        cls,
        path: Place | Sequence[Place] | None,
        engine: Engine,
        *,
        direct: bool = True,
        capacity_bytes: int | str | None = None,
        keep_blocks: bool = False,
        discard: bool = False,
        read_ahead: bool = False,
    ) -> Store:
        """Open or make the store at `path` (None: a private file, gone at close); several paths
        are the members of one striped store.

        `keep_blocks`: nothing is discarded or cut off at close; what was stored stays readable.
        `discard`: a device is told of each extent that is freed, not only of all at close.
        `capacity_bytes`: most that extents may occupy, also in words (`16MiB`); None: all but a
            reserve.
        `direct`: the direct door will be used, so the file system must do O_DIRECT.
        `read_ahead`: the kernel may read more than it is asked for, and in larger folios; never
        with `direct`, for that runs into extents whose direct door is open.
        Raises: ConfigError, NotAStore, NoSpace, StorageError, Unsupported.
        """
        if direct and read_ahead:
            raise ConfigError(
                "read_ahead reads pages of extents that are written directly",
                hint="leave it out, or open the store with direct=False",
            )
        if capacity_bytes is not None:
            capacity_bytes = parse_size(capacity_bytes)
        members = open_members(path, engine, direct=direct, capacity_bytes=capacity_bytes)
        try:
            return cls(
                members, engine, keep_blocks=keep_blocks, discard=discard, read_ahead=read_ahead
            )
        except BaseException:  # Ctrl-C too
            for fd in members.descriptors:
                engine.unregister_file(fd)
            with contextlib.suppress(StorageError):  # what it is closed for is told
                members.close(keep_blocks=keep_blocks, end=DATA_OFFSET)
            raise

    def check_open(self) -> None:
        """Raises: Closed."""
        if self._closed:
            raise Closed(f"the store {self.path} is closed")
        if self.is_inherited:
            raise Closed(
                f"the store {self.path} is the parent process's", hint="open one after the fork"
            )

    @property
    def is_inherited(self) -> bool:
        """Whether this process is a fork of the one that opened it, whose it is."""
        return os.getpid() != self._process

    @property
    def path(self) -> str:
        """Its name, or its members', for people; a private file says so."""
        return self._members.path

    @property
    def member_count(self) -> int:
        """How many files or devices it is striped over."""
        return len(self._members.backings)

    @property
    def capacity_bytes(self) -> int:
        """Most bytes that extents may occupy."""
        return self._allocator.capacity_bytes

    @property
    def free_bytes(self) -> int:
        """Bytes that extents may occupy yet."""
        return self._allocator.free_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes that live extents occupy."""
        return self._allocator.used_bytes

    def allocate(self, size_bytes: int | str, door: Door | str) -> Extent:
        """An extent of at least `size_bytes` (2 MiB multiples), its blocks allocated, open
        through `door`; both also in words. Blocks come before the first write so that no write can
        meet a full disk.

        Raises: NoSpace, ConfigError, StorageError (nothing is taken), Closed.
        """
        self.check_open()
        door, size_bytes = self._door(door), parse_size(size_bytes)
        if size_bytes < 1:
            raise ConfigError("an extent of no bytes")
        taken = self._allocator.allocate(size_bytes)
        extent = Extent(range=taken)
        try:
            self._members.allocate(taken.offset, taken.size_bytes)
            self._end = max(self._end, taken.end)
            if self._pages.by_commands:
                self._pages.write_back_what_is_left(taken)
            if door is Door.PAGE_CACHE:
                self._pages.drop_stale(taken)
        except BaseException:  # Ctrl-C too
            self._allocator.free(taken)
            raise
        self._live.add(extent)
        extent.go(door)
        return extent

    def _door(self, door: Door | str) -> Door:
        """`door`, which can be opened. Raises: ConfigError."""
        door = as_door(door)
        if door is Door.DIRECT and not self._has_direct:
            raise ConfigError(
                f"the store {self.path} was opened without a direct door",
                hint="open it with direct=True, or use the page-cache door",
            )
        return door

    def _check(self, *extents: Extent) -> None:
        """Raises: Closed; ConfigError for what is not, or not any more, an extent of this store."""
        self.check_open()
        for extent in extents:
            if extent not in self._live:
                raise ConfigError(
                    f"not an extent of the store {self.path}, or not any more",
                    hint="use what its allocate gave, until it is freed or joined to another",
                )

    def free(self, extent: Extent) -> None:
        """Give `extent` back; waits for its transfers, whose outcome no longer matters. Twice is
        once, and what Ctrl-C left of it is done by the next call.

        Raises: Closed; ConfigError for another store's; StorageError when a device took no discard;
            the extent is free anyway.
        """
        self.check_open()
        if extent not in self._live and extent.door is Door.FREE:
            return
        self._check(extent)
        self._settle(extent)
        if extent.door is not Door.DIRECT:
            self._drop(extent)
        if extent.door is not Door.FREE:  # else Ctrl-C came behind this line
            extent.go(Door.FREE)
        self._live.discard(extent)
        self._allocator.free(extent.range)
        if self._discard:
            self._members.discard(extent.range.offset, extent.range.size_bytes)

    def read(self, extent: Extent, offset: int, address: int, size_bytes: int) -> Ticket:
        """Start reading [offset, offset + size_bytes) of `extent` into memory at `address`.

        Offset and size, and for the direct door the address, are multiples of 4096 bytes. The
        memory (of an Arena) belongs to the engine until the ticket has ended.
        Raises: Closed, ConfigError here; DeviceError from the ticket's wait().
        """
        self._check(extent)
        extent.check_transfer(offset, address, size_bytes)
        if extent.door is Door.DIRECT:
            self.counters.direct_read_bytes += size_bytes
        else:
            self.counters.page_cache_read_bytes += size_bytes
        return self._submit(extent, Op.READ, offset, address, size_bytes)

    def in_place(self, extent: Extent, offset: int, size_bytes: int) -> InPlace | None:
        """[offset, offset + size_bytes) of `extent` where the page cache has it, to be read
        without a copy; None where it is not all cached or cannot be mapped: `read` it.

        It is good until the extent moves or is freed, and to be held before use.
        Raises: Closed, ConfigError.
        """
        self._check(extent)
        extent.check_range(offset, size_bytes)
        if extent.door is not Door.PAGE_CACHE or not self._maps:
            return None
        if extent.memory is None:
            try:
                where = self._pages.places(extent.range)[0]
                extent.memory = FileMemory(*where, others_read=self._reads_ahead)
            except OSError as exc:
                log.info("%s is not read in place: %s", self.path, exc)
                self._maps = False
                return None
        if not extent.memory.is_cached(offset, size_bytes):
            return None
        return InPlace(extent.memory, offset, size_bytes, self.counters)

    @property
    def mapped_bytes(self) -> int:
        """At most so much of the store's page cache is mapped by it."""
        memories = (extent.memory for extent in self._live)
        return sum(memory.held_bytes for memory in memories if memory is not None)

    def read_again(self, extent: Extent, offset: int, address: int, size_bytes: int) -> Ticket:
        """`read`, for bytes that were read wrong: from the device, whatever the door. All clean
        pages of the extent are dropped for it, since large folios go whole or not at all.
        """
        self._check(extent)
        extent.check_transfer(offset, address, size_bytes)
        if extent.door is Door.PAGE_CACHE:
            self._drop(extent)
        return self.read(extent, offset, address, size_bytes)

    def locate(self, extent: Extent, offset: int) -> Location:
        """Where byte `offset` of `extent` is on its device."""
        return self._members.locate(extent.range.offset + offset)

    def write(self, extent: Extent, offset: int, address: int, size_bytes: int) -> Ticket:
        """Start writing memory at `address` to [offset, offset + size_bytes) of `extent`.

        Offset, size, address and memory: as for `read`. When the ticket has ended the bytes are
        stored: through the page-cache door it includes the writeback.
        Raises: Closed, ConfigError here; DeviceError from the ticket's wait().
        """
        self._check(extent)
        extent.check_transfer(offset, address, size_bytes)
        if extent.door is Door.DIRECT:
            self.counters.direct_write_bytes += size_bytes
        else:
            self.counters.page_cache_write_bytes += size_bytes
        return self._submit(extent, Op.WRITE, offset, address, size_bytes)

    def move(self, extent: Extent, door: Door | str) -> None:
        """Open `extent` through `door` instead; no data moves but dirty pages to the device.

        Blocks until its transfers have ended. Raises: DeviceError when one of its writes failed,
        even where the same was written again since, or the writeback did; move it again, or free
        it. A read that failed is reported to its caller. ConfigError, Closed.
        """
        self._check(extent)
        door = self._door(door)
        if extent.door is door:
            return
        if extent.door is Door.DEMOTING and door is Door.PAGE_CACHE:
            raise ConfigError(
                "the extent's move to the direct door did not end",
                hint="move it there again, or free it",
            )
        self._note_all()
        for ticket, op in list(extent.tickets.items()):
            try:
                ticket.wait()  # a transfer through the old door must not meet the new one
            except StorageError:
                del extent.tickets[ticket]  # told once
                if op is not Op.READ:
                    raise
        extent.tickets.clear()
        extent.unmap()
        if door is Door.DIRECT:
            if extent.door is not Door.DEMOTING:  # else the last try failed
                extent.go(Door.DEMOTING)
            self._pages.write_back_and_drop(extent.range)
            self.counters.demotions += 1
        else:
            self._pages.drop_stale(extent.range)
            self.counters.promotions += 1
        extent.go(door)

    def split(self, extent: Extent, at_bytes: int) -> Extent:
        """Make two of `extent`, side by side and with the same door: it keeps its first `at_bytes`
        (whole 2 MiB), the rest is returned. No data moves, and transfers go on."""
        self._check(extent)
        whole = extent.range
        if at_bytes % EXTENT_ALIGN_BYTES or not 0 < at_bytes < whole.size_bytes:
            raise ConfigError(
                f"an extent of {whole.size_bytes} bytes is not split at {at_bytes}",
                hint=f"split it at a multiple of {EXTENT_ALIGN_BYTES}, inside it",
            )
        extent.unmap()
        extent.range = Range(whole.offset, at_bytes)
        rest = Extent(
            range=Range(whole.offset + at_bytes, whole.size_bytes - at_bytes),
            door=extent.door,
            tickets=dict(extent.tickets),
        )
        self._live.add(rest)
        return rest

    def join(self, extent: Extent, rest: Extent) -> None:
        """Make one of `extent` and `rest`, which begins where it ends and has the same door; `rest`
        is no more. No data moves, and transfers go on."""
        self._check(extent, rest)
        if extent.range.end != rest.range.offset or extent.door is not rest.door:
            raise ConfigError(
                "extents that are not side by side, or have two doors, are not joined"
            )
        for one in (extent, rest):
            one.unmap()
        extent.tickets |= rest.tickets
        joined = Range(extent.range.offset, extent.size_bytes + rest.size_bytes)
        rest.go(Door.FREE)  # in this order Ctrl-C leaves no range that two would give back
        self._live.discard(rest)
        extent.range = joined

    def page_cache_bytes(self) -> int:
        """Bytes of this store in the page cache now, as the kernel counts them; 0 once closed."""
        if self._members.is_closed:
            return 0
        ends = self._members.ends(self._end)
        return sum(cached_bytes(at.buffered_fd, 0, end).cached_bytes for at, end in ends)

    def cached_bytes(self, extent: Extent) -> int:
        """Bytes of `extent` in the page cache now. Raises: Closed."""
        self.check_open()
        return self._pages.cached_bytes(extent.range)

    def file_fragments(self) -> int | None:
        """Contiguous ranges of the store on its device; None where the file system cannot tell."""
        return None if self._members.is_closed else self._members.fragments()

    def close(self) -> None:
        """Wait for transfers, discard the content, unlock. Idempotent; what Ctrl-C left is ended
        by the next call. A forked child lets go of it, if it has not when it began.

        Raises: StorageError when the superblock could not be written; all is released anyway.
        """
        self._closed = True
        if self._members.is_closed:
            return
        if self.is_inherited:
            self._members.let_go()
            return
        for extent in self._live:
            self._settle(extent)
            if extent.memory is not None:
                extent.memory.blank()
        self._engine.drain()  # what Ctrl-C kept from being noted at its extent
        for fd in self._paths:
            self._engine.unregister_file(fd)
        self._members.close(keep_blocks=self._keep_blocks, end=self._end)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _submit(self, extent: Extent, op: Op, offset: int, address: int, size_bytes: int) -> Ticket:
        at = extent.range.offset + offset
        fds = self._descriptors(extent)
        transfers = [
            Transfer(fds[part.member], op, address + part.at, part.size_bytes, part.offset)
            for part in self._members.stripes.parts(at, size_bytes)
        ]
        if op is Op.WRITE and extent.door is Door.PAGE_CACHE:
            transfers += self._pages.syncs(at, size_bytes)
        self._note_all()
        self._is_submitting = True
        try:
            ticket = self._engine.submit(transfers, path=self._paths)
        except Exception:  # nothing was started
            self._is_submitting = False
            raise
        extent.forget_ended()
        extent.tickets[ticket] = op
        self._is_submitting = False
        return ticket

    def _note_all(self) -> None:
        """A transfer that Ctrl-C kept from being noted at its extent ends first."""
        if self._is_submitting:
            self._engine.drain()
            self._is_submitting = False

    def _descriptors(self, extent: Extent) -> list[int]:
        """Of the open door, one for each member."""
        if extent.door is Door.DIRECT:
            direct = (backing.direct_fd for backing in self._members.backings)
            return [fd for fd in direct if fd is not None]  # none is: see `_door`
        assert extent.door is Door.PAGE_CACHE, f"transfer on an extent that is {extent.door.value}"
        return [backing.buffered_fd for backing in self._members.backings]

    def _drop(self, extent: Extent) -> None:
        extent.unmap()
        self._pages.drop(extent.range)

    def _settle(self, extent: Extent) -> None:
        """Wait until no transfer touches the extent or its memory; failures were told before."""
        self._note_all()
        for ticket in extent.tickets:
            try:
                ticket.wait()
            except StorageError:
                continue
        extent.tickets.clear()


def _let_go_in_child() -> None:
    """A child has the parent's stores neither to use nor to hold: not their locks, nor a device's
    exclusive open, nor the blocks of a private file."""
    with contextlib.ExitStack() as stack:  # all of them, whatever ends one
        for store in list(_OPEN):
            stack.callback(store._members.let_go)


os.register_at_fork(after_in_child=_let_go_in_child)
