"""A store: extents in one file or on one device, each reached through one of two doors."""

from __future__ import annotations

import errno
import logging
import os
from dataclasses import dataclass, field

from dualblade.errors import Closed, NoSpace, StorageError
from dualblade.host.page_cache import cached_bytes, drop
from dualblade.io import Engine, Op, Ticket, Transfer
from dualblade.store.backing import open_backing
from dualblade.store.doors import LEGAL_MOVES, Door
from dualblade.store.extents import ExtentAllocator, Range
from dualblade.store.format import DATA_OFFSET
from dualblade.store.place import Backing, Location
from dualblade.units import BLOCK_BYTES

log = logging.getLogger("dualblade.store")

_DROP_TRIES = 3


@dataclass(slots=True, eq=False)
class Extent:
    """A contiguous range of the store. `door` and `tickets` belong to the store."""

    range: Range
    door: Door = Door.FREE
    tickets: list[Ticket] = field(default_factory=list)

    @property
    def size_bytes(self) -> int:
        """Bytes it can hold."""
        return self.range.size_bytes


@dataclass(slots=True)
class DoorCounters:
    """What went through each door since the store was opened; bytes."""

    direct_read_bytes: int = 0
    direct_write_bytes: int = 0
    page_cache_read_bytes: int = 0
    page_cache_write_bytes: int = 0
    promotions: int = 0
    demotions: int = 0


class Store:
    """Extents in one place. Used by one thread; transfers end on the engine's.

    A write through the page-cache door counts as stored only when its ticket has ended: it
    carries a sync_file_range that waits for writeback on the descriptor that wrote, so that a
    failed writeback is an error of that ticket and never a page read back wrong later.
    """

    def __init__(
        self,
        backing: Backing,
        engine: Engine,
        *,
        keep_blocks: bool = False,
        discard: bool = False,
    ) -> None:
        self._backing = backing
        self._engine = engine
        self._keep_blocks = keep_blocks
        self._discard = discard
        self._allocator = ExtentAllocator(DATA_OFFSET, backing.capacity_bytes)
        self._end = DATA_OFFSET
        self._live: set[Extent] = set()
        self._closed = False
        self.counters = DoorCounters()
        for fd in (backing.direct_fd, backing.buffered_fd):
            if fd is not None:
                engine.register_file(fd)
        if backing.was_unclean:
            log.warning("%s was not closed cleanly; its KV is discarded", backing.path)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str] | None,
        engine: Engine,
        *,
        direct: bool = True,
        capacity_bytes: int | None = None,
        keep_blocks: bool = False,
        discard: bool = False,
    ) -> Store:
        """Open or make the store at `path` (None: a private file, gone at close).

        `discard`: a device is told of each extent that is freed, not only of all at close.
        `direct`: the direct door will be used, so the file system must do O_DIRECT.
        Raises: NotAStore, NoSpace, StorageError, Unsupported.
        """
        backing = open_backing(path, engine, direct=direct, capacity_bytes=capacity_bytes)
        return cls(backing, engine, keep_blocks=keep_blocks, discard=discard)

    @property
    def path(self) -> str:
        """The file's name, for people; a private one says so."""
        return self._backing.path

    @property
    def capacity_bytes(self) -> int:
        """Most bytes that extents may occupy."""
        return self._allocator.capacity_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes that live extents occupy."""
        return self._allocator.used_bytes

    def allocate(self, size_bytes: int, door: Door) -> Extent:
        """An extent of at least `size_bytes` (2 MiB multiples), its blocks allocated, open
        through `door`. Blocks come before the first write so that no write can meet a full disk.

        Raises: NoSpace (nothing is taken), Closed.
        """
        self._check_open()
        taken = self._allocator.allocate(size_bytes)
        try:
            self._backing.allocate(taken.offset, taken.size_bytes)
        except OSError as exc:
            self._allocator.free(taken)
            kind = NoSpace if exc.errno in (errno.ENOSPC, errno.EDQUOT) else StorageError
            raise kind(
                f"{self.path} cannot grow by {taken.size_bytes} bytes: {exc.strerror}",
                operation="allocate",
                path=self.path,
                offset=taken.offset,
                size_bytes=taken.size_bytes,
                hint="free some space there, or name a store on another drive",
            ) from exc
        self._end = max(self._end, taken.end)
        extent = Extent(range=taken)
        if door is Door.PAGE_CACHE:
            try:
                self._drop_stale(extent)
            except StorageError:
                self._allocator.free(taken)
                raise
        self._live.add(extent)
        self._move(extent, door)
        return extent

    def free(self, extent: Extent) -> None:
        """Give `extent` back; waits for its transfers, whose outcome no longer matters."""
        self._check_open()
        self._settle(extent)
        if extent.door is not Door.DIRECT:
            drop(self._backing.buffered_fd, extent.range.offset, extent.range.size_bytes)
        if self._discard:
            self._backing.discard(extent.range.offset, extent.range.size_bytes)
        self._move(extent, Door.FREE)
        self._live.discard(extent)
        self._allocator.free(extent.range)

    def read(self, extent: Extent, offset: int, address: int, size_bytes: int) -> Ticket:
        """Start reading [offset, offset + size_bytes) of `extent` into memory at `address`.

        The memory belongs to the engine until the ticket has ended.
        Raises: Closed here; DeviceError from the ticket's wait().
        """
        if extent.door is Door.DIRECT:
            self.counters.direct_read_bytes += size_bytes
        else:
            self.counters.page_cache_read_bytes += size_bytes
        return self._submit(extent, Op.READ, offset, address, size_bytes)

    def read_again(self, extent: Extent, offset: int, address: int, size_bytes: int) -> Ticket:
        """`read`, for bytes that were read wrong: from the device, whatever the door. All clean
        pages of the extent are dropped for it, since large folios go whole or not at all.
        """
        self._check_open()
        if extent.door is Door.PAGE_CACHE:
            drop(self._backing.buffered_fd, extent.range.offset, extent.range.size_bytes)
        return self.read(extent, offset, address, size_bytes)

    def locate(self, extent: Extent, offset: int) -> Location:
        """Where byte `offset` of `extent` is on its device."""
        return self._backing.locate(extent.range.offset + offset)

    def write(self, extent: Extent, offset: int, address: int, size_bytes: int) -> Ticket:
        """Start writing memory at `address` to [offset, offset + size_bytes) of `extent`.

        When the ticket has ended the bytes are stored: through the page-cache door it includes
        the writeback. Raises: Closed here; DeviceError from the ticket's wait().
        """
        if extent.door is Door.DIRECT:
            self.counters.direct_write_bytes += size_bytes
        else:
            self.counters.page_cache_write_bytes += size_bytes
        return self._submit(extent, Op.WRITE, offset, address, size_bytes)

    def move(self, extent: Extent, door: Door) -> None:
        """Open `extent` through `door` instead; no data moves but dirty pages to the device.

        Blocks until its transfers have ended. Raises: DeviceError when one of them, or the
        writeback, failed.
        """
        self._check_open()
        if extent.door is door:
            return
        for ticket in extent.tickets:
            ticket.wait()  # a transfer through the old door must not meet the new one
        extent.tickets.clear()
        if door is Door.DIRECT:
            self._move(extent, Door.DEMOTING)
            self._write_back_and_drop(extent)
            self.counters.demotions += 1
        else:
            self._drop_stale(extent)
            self.counters.promotions += 1
        self._move(extent, door)

    def page_cache_bytes(self) -> int:
        """Bytes of this store in the page cache now, as the kernel counts them."""
        return cached_bytes(self._backing.buffered_fd, 0, self._end).cached_bytes

    def cached_bytes(self, extent: Extent) -> int:
        """Bytes of `extent` in the page cache now."""
        found = cached_bytes(
            self._backing.buffered_fd, extent.range.offset, extent.range.size_bytes
        )
        return found.cached_bytes

    def file_pieces(self) -> int | None:
        """Contiguous pieces of the store on its device; None where the file system cannot tell."""
        return self._backing.pieces()

    def close(self) -> None:
        """Wait for transfers, discard the content, unlock. Twice is once.

        Raises: StorageError when the superblock could not be written; all is released anyway.
        """
        if self._closed:
            return
        self._closed = True
        for extent in self._live:
            self._settle(extent)
        for fd in (self._backing.direct_fd, self._backing.buffered_fd):
            if fd is not None:
                self._engine.unregister_file(fd)
        self._backing.close(keep_blocks=self._keep_blocks, end=self._end)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _submit(self, extent: Extent, op: Op, offset: int, address: int, size_bytes: int) -> Ticket:
        self._check_open()
        assert 0 <= offset <= extent.size_bytes - size_bytes, "outside its extent"
        assert offset % BLOCK_BYTES == size_bytes % BLOCK_BYTES == 0, "not whole blocks"
        fd = self._fd(extent)
        at = extent.range.offset + offset
        transfers = [Transfer(fd, op, address, size_bytes, at)]
        if op is Op.WRITE and extent.door is Door.PAGE_CACHE:
            transfers.append(Transfer(fd, Op.SYNC_RANGE, 0, size_bytes, at))
        ticket = self._engine.submit(transfers, path=self.path)
        extent.tickets = [old for old in extent.tickets if not old.done]
        extent.tickets.append(ticket)
        return ticket

    def _fd(self, extent: Extent) -> int:
        if extent.door is Door.DIRECT:
            assert self._backing.direct_fd is not None, "opened without a direct door"
            return self._backing.direct_fd
        assert extent.door is Door.PAGE_CACHE, f"transfer on an extent that is {extent.door.value}"
        return self._backing.buffered_fd

    def _write_back_and_drop(self, extent: Extent) -> None:
        """No page of the extent may be cached when the direct door opens."""
        fd, at, size = self._backing.buffered_fd, extent.range.offset, extent.range.size_bytes
        for _ in range(_DROP_TRIES):
            self._engine.submit([Transfer(fd, Op.SYNC_RANGE, 0, size, at)], path=self.path).wait()
            drop(fd, at, size)
            left = cached_bytes(fd, at, size).cached_bytes
            if left == 0:
                return
        # Clean pages that another reader holds: O_DIRECT on a file stays coherent with them.
        log.warning("%d bytes at %d of %s stay cached after demotion", left, at, self.path)

    def _drop_stale(self, extent: Extent) -> None:
        """No page from before may be cached when the page-cache door opens: a stray reader's, or
        another program's, would be stale after direct writes. Raises: StorageError.
        """
        fd, at, size = self._backing.buffered_fd, extent.range.offset, extent.range.size_bytes
        for _ in range(_DROP_TRIES):
            drop(fd, at, size)
            if self._backing.coherent or cached_bytes(fd, at, size).cached_bytes == 0:
                return
        raise StorageError(
            f"pages of {self.path} cannot be dropped: another program holds them",
            operation="drop",
            path=self.path,
            offset=at,
            size_bytes=size,
            hint="close what maps or reads the block device, or use path direct",
        )

    @staticmethod
    def _settle(extent: Extent) -> None:
        """Wait until no transfer touches the extent or its memory; failures were told before."""
        for ticket in extent.tickets:
            try:
                ticket.wait()
            except StorageError:
                continue
        extent.tickets.clear()

    @staticmethod
    def _move(extent: Extent, door: Door) -> None:
        assert door in LEGAL_MOVES[extent.door], f"{extent.door.value} to {door.value}"
        extent.door = door

    def _check_open(self) -> None:
        if self._closed:
            raise Closed(f"the store {self.path} is closed")
