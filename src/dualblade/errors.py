"""The error tree.

    DualBladeError                 message, what to do, retryable
    |- ConfigError (ValueError)    an option or argument is wrong
    |- Unsupported                 the model or machine lacks what is needed
    |- Closed                      used after close, or after a failure that spoiled it
    |- BudgetError                 does not fit the memory budget
    `- StorageError                operation, path, offset, bytes
       |- DeviceError              errno (or NVMe status) from the device
       |- NoSpace                  store or file system full
       |- CorruptExtent            stored bytes are not what was written
       `- NotAStore                not a dualblade store that may be opened

`assert` is for our own bugs only; everything that users or devices can cause is one of these.
"""

from __future__ import annotations

import errno as errno_module
import os
from typing import Any


class DualBladeError(Exception):
    """Base of all errors raised on purpose.

    `hint` says what to do about it; `retryable` whether the same call may succeed later.
    """

    retryable = False

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions are made anew from `args`, which ours are not made from.
        return _made_anew, (type(self), self.args), self.__dict__


def _made_anew(kind: type[DualBladeError], args: tuple[Any, ...]) -> DualBladeError:
    """What `__reduce__` says; its attributes come after."""
    return kind.__new__(kind, *args)


class ConfigError(DualBladeError, ValueError):
    """An option or argument is wrong."""


class Unsupported(DualBladeError):
    """The model or machine lacks what is needed."""


class Closed(DualBladeError):
    """Used after close, or after a failure that spoiled it."""


class BudgetError(DualBladeError):
    """Does not fit the memory budget; `needed_bytes` is the least that would do."""

    def __init__(self, message: str, *, needed_bytes: int, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.needed_bytes = needed_bytes


class StorageError(DualBladeError):
    """Storage failed: `operation` on `path`, at `offset`, for `size_bytes` bytes (where known)."""

    def __init__(
        self,
        message: str,
        *,
        operation: str | None = None,
        path: str | None = None,
        offset: int | None = None,
        size_bytes: int | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.operation = operation
        self.path = path
        self.offset = offset
        self.size_bytes = size_bytes


_NVME_DO_NOT_RETRY = 0x4000
# Status code type and code, from NVM Express base specification 2.0 (figures 93 to 96), in words.
_NVME_WORDS = {
    0x001: "invalid opcode",
    0x002: "invalid field in the command",
    0x004: "data transfer error",
    0x005: "aborted for a power loss",
    0x006: "internal error of the drive",
    0x007: "aborted on request",
    0x00B: "invalid namespace or format",
    0x020: "the namespace is write-protected",
    0x080: "block address out of range",
    0x081: "capacity exceeded",
    0x082: "the namespace is not ready",
    0x084: "format in progress",
    0x180: "conflicting attributes",
    0x182: "write to a read-only range",
    0x280: "write fault",
    0x281: "unrecovered read error",
    0x282: "guard check failed",
    0x286: "access denied",
    0x287: "read of a block that was deallocated or never written",
    0x370: "host path error",
    0x371: "command aborted by the host",
}


def nvme_status_words(status: int) -> str:
    """`unrecovered read error (NVMe status 0x281)`; the bits beside type and code are left out."""
    code = status & 0x7FF
    return f"{_NVME_WORDS.get(code, 'refused by the drive')} (NVMe status {code:#x})"


class DeviceError(StorageError):
    """The device or kernel refused a transfer.

    errno        positive, 0 for a short transfer; EIO where the drive itself said why:
    nvme_status  its status field, of a command that passed through; else None.
    """

    _RETRYABLE = frozenset(
        {
            errno_module.EINTR,
            errno_module.EAGAIN,
            errno_module.ENOMEM,
            errno_module.EBUSY,
            errno_module.ETIMEDOUT,
        }
    )

    def __init__(
        self,
        *,
        errno: int,
        operation: str,
        path: str | None = None,
        offset: int,
        size_bytes: int,
        nvme_status: int | None = None,
        hint: str | None = None,
    ) -> None:
        cause = os.strerror(errno) if errno else "end of file reached"
        if nvme_status is not None:
            cause = nvme_status_words(nvme_status)
        super().__init__(
            f"{operation} of {size_bytes} bytes at offset {offset} of {path or 'the store'} "
            f"failed: {cause}",
            operation=operation,
            path=path,
            offset=offset,
            size_bytes=size_bytes,
            hint=hint,
        )
        self.errno = errno
        self.nvme_status = nvme_status

    @property
    def retryable(self) -> bool:  # type: ignore[override]
        if self.nvme_status is not None:
            return not self.nvme_status & _NVME_DO_NOT_RETRY
        return self.errno in self._RETRYABLE


class NoSpace(StorageError):
    """The store's capacity or the file system's free space is used up."""


class CorruptExtent(StorageError):
    """Stored bytes are not what was written. `block` is the logical block address on the device
    where `path` is one; None in a file."""

    def __init__(self, message: str, *, block: int | None = None, **where: Any) -> None:
        super().__init__(message, **where)
        self.block = block


class NotAStore(StorageError):
    """Not a dualblade store that may be opened: foreign, truncated, another version, or locked."""
