"""Staging memory: huge pages, touched before use."""

from __future__ import annotations

import ctypes
import errno
import mmap
from functools import cached_property
from types import TracebackType

from dualblade.errors import BudgetError, Closed, ConfigError
from dualblade.units import HUGE_PAGE_BYTES, MIB, format_size, round_up

# Not in Python 3.11's mmap module; numbers from asm-generic/mman-common.h.
_MADV_WIPEONFORK = 18
_MADV_POPULATE_WRITE = 23

# Populated in steps, so that Ctrl-C is served in between: memory that the host has to give back
# first comes at 0.5 GiB/s, so 64 MiB may take 0.13 s.
_POPULATE_STEP_BYTES = 64 * MIB


class Arena:
    """Anonymous memory, 2 MiB aligned, in huge pages where the kernel gives them.

    A device pays for each 4 KiB page of a transfer: huge pages read 2-3 times as fast
    (docs/performance.md, "The engine against fio"). All of it is touched here, so that no transfer
    waits for a page fault.

    Ownership: `buffer` views keep the memory alive, also beyond close(); it is unmapped when the
    last view is gone. A forked child sees zeros: it neither shares nor inherits what is staged,
    and the parent's huge pages are not split by the fork. A core dump leaves it out.

    Raises: ConfigError for a size below 1, BudgetError when the memory cannot be had.
    """

    def __init__(self, size_bytes: int, *, huge: bool = True) -> None:
        if size_bytes < 1:
            raise ConfigError(f"an arena of {size_bytes} bytes")
        self.size_bytes = size_bytes
        span_bytes = round_up(size_bytes, HUGE_PAGE_BYTES)
        # A free huge page on both sides: room to align, and what is never advised keeps the
        # kernel from merging arenas into one mapping, whose huge pages could not be told apart.
        try:
            memory = mmap.mmap(
                -1,
                span_bytes + 2 * HUGE_PAGE_BYTES,
                flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS,
            )
            base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
            lead = round_up(base + mmap.PAGESIZE, HUGE_PAGE_BYTES) - base
            memory.madvise(_MADV_WIPEONFORK, lead, span_bytes)
            memory.madvise(mmap.MADV_DONTDUMP, lead, span_bytes)
            _advise_pages(memory, lead, span_bytes, huge=huge)
            _populate(memory, lead, span_bytes)
        except OSError as error:
            raise BudgetError(
                f"cannot map {format_size(size_bytes)} of staging memory: {error.strerror}",
                needed_bytes=span_bytes,
            ) from error
        self._address = base + lead
        self._view: memoryview | None = memoryview(memory)[lead : lead + size_bytes]

    @cached_property
    def huge_bytes(self) -> int:
        """Bytes of it in huge pages, when first asked: the kernel lists all mappings for an answer,
        milliseconds in a process of many. Raises: Closed."""
        span_bytes = round_up(self.size_bytes, HUGE_PAGE_BYTES)
        return min(_huge_bytes(self.address, span_bytes), self.size_bytes)

    @property
    def huge(self) -> bool:
        """Whether all of it is in huge pages."""
        return self.huge_bytes == self.size_bytes

    @property
    def address(self) -> int:
        """Where it begins. Raises: Closed."""
        self._open_view()
        return self._address

    @property
    def buffer(self) -> memoryview:
        """All of it, writable bytes; keeps the memory alive. Raises: Closed."""
        return self._open_view()[:]

    def close(self) -> None:
        """Let go of the memory; it is unmapped when no view is left. Idempotent."""
        self._view = None

    def _open_view(self) -> memoryview:
        if self._view is None:
            raise Closed("the arena is closed")
        return self._view

    def __enter__(self) -> Arena:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _advise_pages(memory: mmap.mmap, start: int, size_bytes: int, *, huge: bool) -> None:
    advice = mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE
    try:
        memory.madvise(advice, start, size_bytes)
    except OSError as error:
        # A kernel without transparent huge pages: `huge_bytes` will say 0.
        if error.errno != errno.EINVAL:
            raise


def _populate(memory: mmap.mmap, start: int, size_bytes: int) -> None:
    for at in range(start, start + size_bytes, _POPULATE_STEP_BYTES):
        step_bytes = min(_POPULATE_STEP_BYTES, start + size_bytes - at)
        try:
            memory.madvise(_MADV_POPULATE_WRITE, at, step_bytes)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            # Before Linux 5.14: touch one byte of each page.
            pages = memoryview(memory)[at : at + step_bytes : mmap.PAGESIZE]
            pages[:] = bytes(len(pages))


def _huge_bytes(address: int, size_bytes: int) -> int:
    """Bytes of the mapping that starts at `address` that are in transparent huge pages.

    Source: proc(5), /proc/pid/smaps.
    """
    inside = False
    total = 0
    with open("/proc/self/smaps", encoding="ascii", errors="replace") as lines:
        for line in lines:
            head = line.split(maxsplit=1)[0]
            if not head.endswith(":"):
                begin, end = (int(part, 16) for part in head.split("-"))
                inside = begin >= address and end <= address + size_bytes
            elif inside and head == "AnonHugePages:":
                total += int(line.split()[1]) << 10
    return total
