"""The superblock, as docs/format.md specifies it. Bytes in, bytes out; no I/O."""

from __future__ import annotations

import hashlib
import struct
import uuid as uuid_module
from dataclasses import dataclass

from dualblade.errors import NotAStore
from dualblade.units import BLOCK_BYTES, EXTENT_ALIGN_BYTES, MIB

MAGIC = b"DUALBLAD"
FILE_VERSION = 1
DEVICE_VERSION = 2
_MEMBER_VERSIONS = {FILE_VERSION: 3, DEVICE_VERSION: 4}
"""Of a member of a striped store: programs that know no others must not take it for a whole one."""
SUPERBLOCK_BYTES = 4096
DATA_OFFSET = EXTENT_ALIGN_BYTES
"""The first extent starts here; the superblock has the 2 MiB before it to itself."""
DEVICE_BYTES_MIN = 2 * EXTENT_ALIGN_BYTES + SUPERBLOCK_BYTES
"""A superblock, one extent, the second superblock."""

STRIPE_BYTES = MIB
"""As large as the engine's largest request, so striping makes no more of them; and no page-cache
folio reaches beyond it: they are no larger than the transfer that makes them, and aligned likewise.
"""
MEMBERS_MAX = 16
"""Members of one store: 16 x 8 requests in flight, and twice as many registered descriptors."""

_FIELDS = struct.Struct("<8sII16sQQQQI")
_DEVICE_OFFSET = 128
_DEVICE_FIELDS = struct.Struct("<QII128s128s64s")
_MEMBER_OFFSET = 512
_MEMBER_FIELDS = struct.Struct("<IIQ")
_CHECKSUM_BYTES = 16
_STATE_CLEAN = 0
_STATE_IN_USE = 1
_STATES = (_STATE_CLEAN, _STATE_IN_USE)

# What to do about a place that is refused, by what is wrong with it.
_FILE_HINTS = {
    "foreign": "name a file that does not exist yet, to make one",
    "empty": "delete it, if it is a store whose making was cut short; or name another file",
    "version": "delete it, or use the dualblade that made it",
    "damaged": "delete it; KV in it is of no use",
}
_DEVICE_HINTS = {
    "foreign": "if nothing on it is wanted: dualblade store format {path}",
    "version": "wipe it with the dualblade that made it; or, if nothing on it is wanted: "
    "blkdiscard --zeroout {path}",
    "file": "wipe that file; or, if nothing on it is wanted: blkdiscard --zeroout {path}",
    "damaged": "see dualblade store inspect {path}",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSection:
    """Which device a store was formatted on, so that no other is taken for it.

    copy  0 for the superblock at the start, 1 for the one at the end.
    """

    size_bytes: int
    block_bytes: int
    copy: int
    serial: str
    wwid: str
    part_uuid: str

    @property
    def capacity_bytes(self) -> int:
        """What extents may occupy of a device of this size."""
        return device_capacity(self.size_bytes)

    def offset(self) -> int:
        """Where this copy of the superblock lies."""
        return 0 if self.copy == 0 else second_copy_offset(self.size_bytes)

    def differences(self, other: DeviceSection) -> list[str]:
        """How the device of `other` differs from this one, in words; empty: it is the same."""
        names = ("serial", "wwid", "part_uuid", "size_bytes", "block_bytes")
        words = [
            f"{name} {getattr(self, name)!r} in the superblock, {getattr(other, name)!r} here"
            for name in names
            if getattr(self, name) != getattr(other, name)
        ]
        if self.part_uuid and not other.part_uuid:
            words.append("that is in the partition table: a container needs the whole drive's node")
        return words

    def encode(self) -> bytes:
        """The bytes at offset 128 of the superblock. Names that are too long are cut."""
        return _DEVICE_FIELDS.pack(
            self.size_bytes,
            self.block_bytes,
            self.copy,
            *(name.encode() for name in (self.serial, self.wwid, self.part_uuid)),
        )

    @classmethod
    def decode(cls, raw: bytes) -> DeviceSection:
        """The device section of a superblock whose checksum is right."""
        size, block, copy, *names = _DEVICE_FIELDS.unpack_from(raw, _DEVICE_OFFSET)
        serial, wwid, part_uuid = (name.rstrip(b"\0").decode("utf-8", "replace") for name in names)
        return cls(
            size_bytes=size,
            block_bytes=block,
            copy=copy,
            serial=serial,
            wwid=wwid,
            part_uuid=part_uuid,
        )


class OtherVersion(NotAStore):
    """What is there is a store, of a version that this one neither reads nor writes over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberSection:
    """Which part of a striped store this is: the `index`-th of `count`, from 0."""

    index: int
    count: int
    stripe_bytes: int = STRIPE_BYTES

    @property
    def words(self) -> str:
        """`member 1 of 2`, as people count."""
        return f"member {self.index + 1} of {self.count}"

    @property
    def valid(self) -> bool:
        """Whether the values are ones that a store can have."""
        return (
            1 < self.count <= MEMBERS_MAX
            and self.index < self.count
            and self.stripe_bytes >= BLOCK_BYTES
            and self.stripe_bytes % BLOCK_BYTES == EXTENT_ALIGN_BYTES % self.stripe_bytes == 0
        )


def second_copy_offset(size_bytes: int) -> int:
    """The last whole 4096 bytes of a device."""
    return size_bytes // SUPERBLOCK_BYTES * SUPERBLOCK_BYTES - SUPERBLOCK_BYTES


def device_capacity(size_bytes: int) -> int:
    """Bytes between the two superblocks of a device, in whole 2 MiB."""
    room = second_copy_offset(size_bytes) - DATA_OFFSET
    return max(0, room // EXTENT_ALIGN_BYTES * EXTENT_ALIGN_BYTES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Superblock:
    """What a store says of itself.

    capacity_bytes  most bytes that extents may occupy, from `DATA_OFFSET` on.
    generation      grows by one at every open.
    in_use          set while open; found set, the store was not closed cleanly.
    device          of a store on a device; None for one in a file.
    member          of a striped store, whose members have one uuid; None for a whole one.
    """

    uuid: uuid_module.UUID
    capacity_bytes: int
    generation: int
    created_unix_seconds: int
    in_use: bool
    device: DeviceSection | None = None
    member: MemberSection | None = None

    def encode(self) -> bytes:
        """The 4096 bytes at offset 0 of a store; on a device also those at its end."""
        version = FILE_VERSION if self.device is None else DEVICE_VERSION
        fields = _FIELDS.pack(
            MAGIC,
            version if self.member is None else _MEMBER_VERSIONS[version],
            SUPERBLOCK_BYTES,
            self.uuid.bytes,
            DATA_OFFSET,
            self.capacity_bytes,
            self.generation,
            self.created_unix_seconds,
            _STATE_IN_USE if self.in_use else _STATE_CLEAN,
        )
        if self.device is not None:
            fields = fields.ljust(_DEVICE_OFFSET, b"\0") + self.device.encode()
        if self.member is not None:
            numbers = (self.member.index, self.member.count, self.member.stripe_bytes)
            fields = fields.ljust(_MEMBER_OFFSET, b"\0") + _MEMBER_FIELDS.pack(*numbers)
        body = fields.ljust(SUPERBLOCK_BYTES - _CHECKSUM_BYTES, b"\0")
        return body + _checksum(body)

    @classmethod
    def decode(
        cls, raw: bytes, *, path: str, file_bytes: int, version: int = FILE_VERSION
    ) -> Superblock:
        """The superblock in `raw`, read from a file or device of `file_bytes` bytes.

        `version` is what the place is to hold: FILE_VERSION or DEVICE_VERSION, or a member of it.
        Raises: NotAStore saying which check failed: foreign, damaged, truncated; OtherVersion.
        """
        hints = _DEVICE_HINTS if version == DEVICE_VERSION else _FILE_HINTS

        def refuse(why: str, hint: str, kind: type[NotAStore] = NotAStore) -> NotAStore:
            return kind(
                f"{path} {why}", operation="open", path=path, hint=hints[hint].format(path=path)
            )

        if not any(raw) and version == FILE_VERSION and file_bytes in (0, DATA_OFFSET):
            raise refuse("is not a dualblade store: there is nothing at its beginning", "empty")
        if raw[: len(MAGIC)] != MAGIC:
            raise refuse("is not a dualblade store", "foreign")
        if len(raw) < SUPERBLOCK_BYTES or file_bytes < DATA_OFFSET:
            raise refuse(f"is truncated: {file_bytes} bytes", "damaged")
        _, found, header_bytes, uuid, data_offset, capacity, generation, created, state = (
            _FIELDS.unpack_from(raw)
        )
        if found not in (version, _MEMBER_VERSIONS[version]):
            if version == DEVICE_VERSION and found in (
                FILE_VERSION,
                _MEMBER_VERSIONS[FILE_VERSION],
            ):
                raise refuse("holds what a store file holds, or its copy", "file", OtherVersion)
            why = f"is a store of version {found}; this is dualblade's version {version}"
            raise refuse(why, "version", OtherVersion)
        if not _is_whole(raw):
            raise refuse("has a damaged superblock", "damaged")
        if header_bytes != SUPERBLOCK_BYTES or data_offset != DATA_OFFSET:
            raise refuse("has a superblock of another layout", "damaged")
        device = DeviceSection.decode(raw) if version == DEVICE_VERSION else None
        wrong_device = device is not None and (
            device.copy not in (0, 1) or capacity != device.capacity_bytes or not capacity
        )
        member = None
        if found != version:
            index, count, stripe_bytes = _MEMBER_FIELDS.unpack_from(raw, _MEMBER_OFFSET)
            member = MemberSection(index=index, count=count, stripe_bytes=stripe_bytes)
        # Opening writes the next generation: the last number of 64 bits has none.
        last = generation == (1 << 64) - 1
        wrong = wrong_device or last or (member is not None and not member.valid)
        if capacity % EXTENT_ALIGN_BYTES or state not in _STATES or wrong:
            raise refuse("has a superblock with values out of range", "damaged")
        return cls(
            uuid=uuid_module.UUID(bytes=uuid),
            capacity_bytes=capacity,
            generation=generation,
            created_unix_seconds=created,
            in_use=state == _STATE_IN_USE,
            device=device,
            member=member,
        )


def choose_superblock(first: bytes, second: bytes, *, path: str, here: DeviceSection) -> Superblock:
    """The newer of the two superblocks of the device that `here` describes.

    A copy that is damaged is passed over for the other; one that is not ours at all is not: then
    something else was put on the device; nor one of another version.
    Raises: NotAStore, of that OtherVersion.
    """
    decoded: dict[int, Superblock] = {}
    refusals: list[NotAStore] = []
    for copy, raw in enumerate((first, second)):
        try:
            decoded[copy] = Superblock.decode(
                raw, path=path, file_bytes=here.size_bytes, version=DEVICE_VERSION
            )
        except OtherVersion as refusal:
            if _is_whole(raw):
                raise
            refusals.insert(0, refusal)  # it may be whole by that version's rules
        except NotAStore as refusal:
            refusals.append(refusal)
    if not decoded:
        raise refusals[0]
    for copy, found in decoded.items():
        assert found.device is not None
        differences = found.device.differences(here)
        if differences:
            raise NotAStore(
                f"{path} is not the device that its store was made on: {'; '.join(differences)}",
                operation="open",
                path=path,
                hint="it is a copy, or was changed; dualblade store inspect shows what it holds",
            )
        if found.device.copy != copy:
            raise _misplaced(path)
    if not first.startswith(MAGIC) or not second.startswith(MAGIC):
        where = "end" if first.startswith(MAGIC) else "start"
        raise NotAStore(
            f"{path} was a dualblade store; its {where} was overwritten by something else",
            operation="open",
            path=path,
            hint=f"if nothing on it is wanted: dualblade store format {path}",
        )
    if len({(superblock.uuid, superblock.member) for superblock in decoded.values()}) > 1:
        raise _misplaced(path)
    return max(decoded.values(), key=lambda superblock: superblock.generation)


def _misplaced(path: str) -> NotAStore:
    return NotAStore(
        f"{path} has superblocks that do not belong together",
        operation="open",
        path=path,
        hint=f"if nothing on it is wanted: dualblade store format {path}",
    )


def _is_whole(raw: bytes) -> bool:
    """Whether its checksum is right."""
    body, end = raw[: SUPERBLOCK_BYTES - _CHECKSUM_BYTES], raw[:SUPERBLOCK_BYTES]
    return end[len(body) :] == _checksum(body)


def _checksum(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=_CHECKSUM_BYTES).digest()
