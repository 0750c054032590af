"""What of a store's ranges is in the page cache: written back, dropped, and believed or not."""

from __future__ import annotations

import contextlib
import logging
import time

from dualblade.errors import StorageError
from dualblade.host.page_cache import cached_bytes, drop
from dualblade.io import Engine, Transfer
from dualblade.store.extents import Range
from dualblade.store.members import Members
from dualblade.units import EXTENT_ALIGN_BYTES, round_up

log = logging.getLogger("dualblade.store")

_DROP_TRIES = 3

_PAUSES_SECONDS = (0.0, 0.001, 0.01, 0.1, 0.4)
"""Before each try to drop pages that somebody may be reading: they are locked meanwhile, and 8 MiB
of read-ahead take a drive of 200 MB/s 40 ms."""


class CachedPages:
    """The pages of `members`. Nothing of a range is mapped when it is dropped: the kernel drops no
    page that is. `has_direct`: there is a direct door; else all writes are the page cache's own."""

    def __init__(self, members: Members, engine: Engine, *, has_direct: bool) -> None:
        self._members = members
        self._engine = engine
        self._coherent = not has_direct or all(backing.coherent for backing in members.backings)
        self.by_commands = any(backing.by_commands for backing in members.backings)

    def places(self, of: Range) -> list[tuple[int, int, int]]:
        """(descriptor, offset, bytes) of a range on each member."""
        found = self._members.ranges(of.offset, of.size_bytes)
        return [(backing.buffered_fd, at, size) for backing, at, size in found]

    def cached_bytes(self, of: Range) -> int:
        """Bytes of a range that are cached now."""
        return sum(cached_bytes(*place).cached_bytes for place in self.places(of))

    def syncs(self, offset: int, size_bytes: int) -> list[Transfer]:
        """Writeback of a range, on each member's descriptor that wrote; they run side by side."""
        return [
            Transfer(backing.buffered_fd, backing.sync, 0, size, at)
            for backing, at, size in self._members.ranges(offset, size_bytes)
        ]

    def drop(self, of: Range, *, whole_folios: bool = False) -> None:
        """Drop clean pages. `whole_folios`: and what shares a folio with them, which goes whole or
        not at all: a range of a striped store begins at any MiB. Raises: DeviceError."""
        grain = EXTENT_ALIGN_BYTES if whole_folios else 1
        for fd, at, size in self.places(of):
            begin = at // grain * grain
            drop(fd, begin, round_up(at + size, grain) - begin)

    def write_back_and_drop(self, of: Range) -> None:
        """No page of the range may be cached when the direct door opens. Raises: DeviceError."""
        for _ in range(_DROP_TRIES):
            self._write_back(of)
            self.drop(of)
            left = self.cached_bytes(of)
            if left == 0:
                return
        # Clean pages that another reader holds: direct writes to a file drop them, and those to a
        # device are not believed before `drop_stale`.
        log.warning("%d bytes at %d of %s stay cached", left, of.offset, self._members.path)

    def write_back_what_is_left(self, of: Range) -> None:
        """Of who had these blocks before: a dirty page, whose write failed and whom nobody waited
        for, would be written over NVMe commands. Raises: StorageError."""
        for _ in range(_DROP_TRIES):
            with contextlib.suppress(StorageError):  # told to who wrote it, or of no use to anybody
                self._write_back(of)
            self.drop(of)
            if not any(cached_bytes(*place).unwritten_bytes for place in self.places(of)):
                return
        raise self._stuck(of, "sync", "stay dirty", "see the kernel's log for the drive")

    def drop_stale(self, of: Range) -> None:
        """No page from before may be cached when the page-cache door opens: a stray reader's, or
        another program's, would be stale after direct writes. Raises: StorageError."""
        for pause_seconds in _PAUSES_SECONDS:
            time.sleep(pause_seconds)
            self.drop(of, whole_folios=pause_seconds > 0)
            if self._coherent or self.cached_bytes(of) == 0:
                return
        raise self._stuck(
            of,
            "drop",
            "cannot be dropped: another program holds them",
            "close what maps or reads the block device, or use path direct",
        )

    def _write_back(self, of: Range) -> None:
        self._engine.submit(
            self.syncs(of.offset, of.size_bytes), path=self._members.descriptors
        ).wait()

    def _stuck(self, of: Range, operation: str, what: str, hint: str) -> StorageError:
        path = self._members.path
        return StorageError(
            f"pages of {path} {what}",
            operation=operation,
            path=path,
            offset=of.offset,
            size_bytes=of.size_bytes,
            hint=hint,
        )
