"""What an NVMe namespace says of itself: its id by ioctl, its format and limits by Identify.

The name lies: /dev/ng0n2 may be namespace 7. Only the ioctl tells.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from dataclasses import dataclass

from dualblade.errors import StorageError

# Numbers from linux/nvme_ioctl.h.
_IOCTL_ID = 0x4E40
_IOCTL_ADMIN_COMMAND = 0xC0484E41
_COMMAND = struct.Struct("=BBHIIIQQII6III")  # struct nvme_passthru_cmd
_OPCODE_IDENTIFY = 0x06
_CNS_NAMESPACE, _CNS_CONTROLLER = 0, 1
_IDENTIFY_BYTES = 4096

# Offsets in the Identify structures: NVM Express base specification 2.0 (figure 275), NVM command
# set specification 1.0 (figure 97).
_NS_FLBAS, _NS_LBA_FORMATS = 26, 128
_NS_NGUID, _NS_EUI64 = slice(104, 120), slice(120, 128)
_CTRL_SERIAL, _CTRL_MODEL, _CTRL_MDTS, _CTRL_VWC = slice(4, 24), slice(24, 64), 77, 525
_MDTS_UNIT_BYTES = 4096  # CAP.MPSMIN of every drive known; the kernel's own limit is kept beside


@dataclass(frozen=True, slots=True, kw_only=True)
class NvmeFacts:
    """One namespace and its controller. `mdts_bytes` None: the drive names no limit."""

    namespace_id: int
    block_count: int
    block_bytes: int
    metadata_bytes: int
    mdts_bytes: int | None
    volatile_write_cache: bool
    serial: str
    model: str
    nguid: str | None
    eui64: str | None


def namespace_id(fd: int) -> int:
    """The namespace id of an open /dev/ngXnY or /dev/nvmeXnY; other devices refuse (ENOTTY).

    Raises:  OSError.
    Source:  linux/nvme_ioctl.h, NVME_IOCTL_ID.
    """
    return fcntl.ioctl(fd, _IOCTL_ID)


def nvme_facts(fd: int, path: str) -> NvmeFacts:
    """Ask the drive behind an open namespace device. Two admin commands; nothing is changed.

    Raises: StorageError, naming the capability where it is missing.
    """
    try:
        number = namespace_id(fd)
        namespace = _identify(fd, number, _CNS_NAMESPACE)
        controller = _identify(fd, 0, _CNS_CONTROLLER)
    except OSError as exc:
        denied = exc.errno in (errno.EACCES, errno.EPERM)
        raise StorageError(
            f"the drive behind {path} cannot be asked: {exc.strerror}",
            operation="identify",
            path=path,
            hint="Identify needs CAP_SYS_ADMIN before Linux 6.2" if denied else None,
        ) from exc
    return decode_identify(number, namespace, controller)


def decode_identify(number: int, namespace: bytes, controller: bytes) -> NvmeFacts:
    """The facts in the two Identify structures, 4096 bytes each."""
    flbas = namespace[_NS_FLBAS]
    format_index = (flbas & 0xF) | (flbas >> 5 & 0x3) << 4
    metadata_bytes, block_shift = struct.unpack_from(
        "<HB", namespace, _NS_LBA_FORMATS + 4 * format_index
    )
    mdts = controller[_CTRL_MDTS]
    return NvmeFacts(
        namespace_id=number,
        block_count=struct.unpack_from("<Q", namespace)[0],
        block_bytes=1 << block_shift,
        metadata_bytes=metadata_bytes,
        mdts_bytes=_MDTS_UNIT_BYTES << mdts if mdts else None,
        volatile_write_cache=bool(controller[_CTRL_VWC] & 1),
        serial=_words(controller[_CTRL_SERIAL]),
        model=_words(controller[_CTRL_MODEL]),
        nguid=_identifier(namespace[_NS_NGUID]),
        eui64=_identifier(namespace[_NS_EUI64]),
    )


def _words(raw: bytes) -> str:
    """As the kernel tells them in sysfs: to the first zero, without padding."""
    return raw.partition(b"\0")[0].decode("ascii", "replace").strip()


def _identifier(raw: bytes) -> str | None:
    return raw.hex() if any(raw) else None


def _identify(fd: int, number: int, structure: int) -> bytes:
    """One 4096-byte Identify structure. Raises: OSError; EIO with an NVMe status in its text."""
    memory = ctypes.create_string_buffer(_IDENTIFY_BYTES)
    command = bytearray(
        _COMMAND.pack(
            *(_OPCODE_IDENTIFY, 0, 0, number, 0, 0),
            *(0, ctypes.addressof(memory), 0, _IDENTIFY_BYTES),
            *(structure, 0, 0, 0, 0, 0, 0, 0),
        )
    )
    status = fcntl.ioctl(fd, _IOCTL_ADMIN_COMMAND, command)
    if status:
        raise OSError(errno.EIO, f"Identify ended with NVMe status {status:#x}", os.devnull)
    return memory.raw
