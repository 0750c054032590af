"""The superblock, as docs/format.md specifies it. Bytes in, bytes out; no I/O."""

from __future__ import annotations

import hashlib
import struct
import uuid as uuid_module
from dataclasses import dataclass

from dualblade.errors import NotAStore
from dualblade.units import EXTENT_ALIGN_BYTES

MAGIC = b"DUALBLAD"
VERSION = 1
SUPERBLOCK_BYTES = 4096
DATA_OFFSET = EXTENT_ALIGN_BYTES
"""The first extent starts here; the superblock has the 2 MiB before it to itself."""

_FIELDS = struct.Struct("<8sII16sQQQQI")
_CHECKSUM_BYTES = 16
_STATE_CLEAN = 0
_STATE_IN_USE = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Superblock:
    """What a store says of itself.

    capacity_bytes  most bytes that extents may occupy, from `DATA_OFFSET` on.
    generation      grows by one at every open.
    in_use          set while open; found set, the store was not closed cleanly.
    """

    uuid: uuid_module.UUID
    capacity_bytes: int
    generation: int
    created_unix_seconds: int
    in_use: bool

    def encode(self) -> bytes:
        """The 4096 bytes at offset 0 of a store."""
        fields = _FIELDS.pack(
            MAGIC,
            VERSION,
            SUPERBLOCK_BYTES,
            self.uuid.bytes,
            DATA_OFFSET,
            self.capacity_bytes,
            self.generation,
            self.created_unix_seconds,
            _STATE_IN_USE if self.in_use else _STATE_CLEAN,
        )
        body = fields.ljust(SUPERBLOCK_BYTES - _CHECKSUM_BYTES, b"\0")
        return body + _checksum(body)

    @classmethod
    def decode(cls, raw: bytes, *, path: str, file_bytes: int) -> Superblock:
        """The superblock in `raw`, the first bytes of a file of `file_bytes` bytes.

        Raises: NotAStore saying which check failed: foreign, another version, damaged, truncated.
        """

        def refuse(why: str, hint: str | None = None) -> NotAStore:
            return NotAStore(f"{path} {why}", operation="open", path=path, hint=hint)

        if raw[: len(MAGIC)] != MAGIC:
            raise refuse(
                "is not a dualblade store", "name a file that does not exist yet, to make one"
            )
        if len(raw) < SUPERBLOCK_BYTES or file_bytes < DATA_OFFSET:
            raise refuse(f"is truncated: {file_bytes} bytes", "delete it; KV in it is of no use")
        _, version, header_bytes, uuid, data_offset, capacity, generation, created, state = (
            _FIELDS.unpack_from(raw)
        )
        if version != VERSION:
            raise refuse(
                f"is a store of version {version}; this is dualblade's version {VERSION}",
                "delete it, or use the dualblade that made it",
            )
        body = raw[: SUPERBLOCK_BYTES - _CHECKSUM_BYTES]
        if raw[SUPERBLOCK_BYTES - _CHECKSUM_BYTES : SUPERBLOCK_BYTES] != _checksum(body):
            raise refuse("has a damaged superblock", "delete it; KV in it is of no use")
        if header_bytes != SUPERBLOCK_BYTES or data_offset != DATA_OFFSET:
            raise refuse("has a superblock of another layout", "delete it")
        if capacity % EXTENT_ALIGN_BYTES or state not in (_STATE_CLEAN, _STATE_IN_USE):
            raise refuse("has a superblock with values out of range", "delete it")
        return cls(
            uuid=uuid_module.UUID(bytes=uuid),
            capacity_bytes=capacity,
            generation=generation,
            created_unix_seconds=created,
            in_use=state == _STATE_IN_USE,
        )


def _checksum(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=_CHECKSUM_BYTES).digest()
