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


class DeviceError(StorageError):
    """The device or kernel refused a transfer; `errno` is positive, 0 for a short transfer."""

    _RETRYABLE = frozenset({errno_module.EINTR, errno_module.EAGAIN, errno_module.EBUSY})

    def __init__(
        self,
        *,
        errno: int,
        operation: str,
        path: str | None = None,
        offset: int,
        size_bytes: int,
        hint: str | None = None,
    ) -> None:
        cause = os.strerror(errno) if errno else "end of file reached"
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

    @property
    def retryable(self) -> bool:  # type: ignore[override]
        return self.errno in self._RETRYABLE


class NoSpace(StorageError):
    """The store's capacity or the file system's free space is used up."""


class CorruptExtent(StorageError):
    """Stored bytes are not what was written."""


class NotAStore(StorageError):
    """Not a dualblade store that may be opened: foreign, truncated, another version, or locked."""
