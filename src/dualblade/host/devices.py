"""What a path stands on: file system, free space, direct I/O, and the block device below.

Works for a file, a folder, a file that does not exist yet (its folder answers), and a block device.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import stat
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dualblade.errors import StorageError
from dualblade.host.groups import ROOT, unescape
from dualblade.units import BLOCK_BYTES, KIB

MEMORY_FILE_SYSTEMS = frozenset({"tmpfs", "ramfs", "devtmpfs", "hugetlbfs"})
"""Files in memory: the kernel accepts O_DIRECT on tmpfs (6.6 on), but there is no device."""

_STATX_DIOALIGN = 0x2000
_AT_EMPTY_PATH = 0x1000
_STATX_BYTES = 256
_DIO_OFFSET = 152  # stx_dio_mem_align, stx_dio_offset_align: two u32 of struct statx

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectIO:
    """Whether O_DIRECT works, with what alignment (bytes), and why not."""

    possible: bool
    reason: str | None = None
    memory_align_bytes: int | None = None
    offset_align_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockQueue:
    """A block device as the kernel describes it in sysfs. None: not said."""

    name: str
    model: str | None
    logical_block_bytes: int | None
    physical_block_bytes: int | None
    rotational: bool | None
    max_sectors_kb: int | None
    max_segments: int | None
    read_ahead_bytes: int | None
    write_cache: str | None
    scheduler: str | None
    io_poll: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceFacts:
    """What `path`, which may not exist yet, stands on. `queue` is None where no single block
    device is below."""

    path: str
    file_system: str
    mount_point: str | None
    mount_options: str | None
    size_bytes: int
    free_bytes: int
    queue: BlockQueue | None

    def direct_io(self) -> DirectIO:
        """Whether direct I/O works there. A folder that is writable gets a small unnamed file for a
        moment, to try it on."""
        place = _existing(self.path)
        return direct_io(place, "the block device" if place.is_block_device() else self.file_system)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def device_facts(path: str | os.PathLike[str], root: Path = ROOT) -> DeviceFacts:
    """What is known about what `path` stands on; it only looks. `root` replaces `/` for /proc and
    /sys.

    Raises:  StorageError when neither the path nor its folder exists, or it may not be examined.
    Source:  statvfs(3), statx(2) STATX_DIOALIGN, Documentation/ABI/stable/sysfs-block.
    """
    try:
        place = _existing(path)
        status = place.stat()
        if stat.S_ISBLK(status.st_mode):
            return _block_device(place, status.st_rdev, root)
        space = os.statvfs(place)
        kind, mount_point, options, source = _mount_of(place, status.st_dev, root)
        return DeviceFacts(
            path=str(path),
            file_system=kind,
            mount_point=mount_point,
            mount_options=options,
            size_bytes=space.f_blocks * space.f_frsize,
            free_bytes=space.f_bavail * space.f_frsize,
            queue=block_queue(status.st_dev, root) or _queue_of_source(source, root),
        )
    except OSError as exc:
        raise StorageError(
            f"cannot examine {path}: {exc.strerror}", operation="stat", path=str(path)
        ) from exc


def _existing(path: str | os.PathLike[str]) -> Path:
    """`path`, or the folder where it would be."""
    place = Path(path)
    return place if place.exists() else place.absolute().parent


def direct_io(place: Path, file_system: str) -> DirectIO:
    """Whether direct I/O works on an existing file, folder or block device.

    statx tells the alignment where the kernel (6.1) and file system do; else a direct read of one
    block decides.
    """
    if file_system in MEMORY_FILE_SYSTEMS:
        return DirectIO(possible=False, reason=f"{file_system} keeps its files in memory")
    if file_system == "zfs":  # it takes O_DIRECT, and until 2.3 does not heed it
        return DirectIO(possible=False, reason="zfs caches in memory of its own")
    try:
        with _probe_file(place) as fd:
            told = _statx_alignment(fd)
            if told is not None:
                memory_align, offset_align = told
                if memory_align == 0:
                    return DirectIO(possible=False, reason=f"{file_system} says it cannot")
                return DirectIO(
                    possible=True,
                    memory_align_bytes=memory_align,
                    offset_align_bytes=offset_align,
                )
            return _try_direct_read(fd)
    except OSError as exc:
        reason = exc.strerror or str(exc)
        if exc.errno == errno.EINVAL:
            reason = f"{file_system} refuses O_DIRECT"
        return DirectIO(possible=False, reason=reason)


def block_queue(device: int, root: Path = ROOT) -> BlockQueue | None:
    """The block device with this number (st_dev, st_rdev); None where it is none.

    A partition has the limits of its whole device.
    """
    node = root / "sys/dev/block" / f"{os.major(device)}:{os.minor(device)}"
    if os.major(device) == 0 or not node.exists():
        return None
    node = node.resolve()
    whole = whole_of(node)
    queue = whole / "queue"
    rotational = _number(queue / "rotational")
    read_ahead_kb = _number(queue / "read_ahead_kb")
    polls = _number(queue / "io_poll")
    return BlockQueue(
        name=node.name,
        model=_model_of(whole),
        logical_block_bytes=_number(queue / "logical_block_size"),
        physical_block_bytes=_number(queue / "physical_block_size"),
        rotational=None if rotational is None else bool(rotational),
        max_sectors_kb=_number(queue / "max_sectors_kb"),
        max_segments=_number(queue / "max_segments"),
        read_ahead_bytes=None if read_ahead_kb is None else read_ahead_kb * KIB,
        write_cache=_text(queue / "write_cache"),
        scheduler=_scheduler(_text(queue / "scheduler")),
        # 1 where the driver has queues that are polled (nvme: poll_queues).
        io_poll=None if polls is None else bool(polls),
    )


def whole_drive(folder: Path, *, root: Path = ROOT) -> Path | None:
    """Where sysfs describes the drive below `folder`, not a partition of it; None where there is no
    single one. Raises: StorageError."""
    queue = device_facts(folder, root).queue
    node = None if queue is None else (root / "sys/class/block" / queue.name).resolve()
    return None if node is None or not node.exists() else whole_of(node)


def whole_of(node: Path) -> Path:
    """The drive that a block device in sysfs is a partition of, or is."""
    return node.parent if (node / "partition").exists() else node


def _block_device(place: Path, device: int, root: Path) -> DeviceFacts:
    with place.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
    return DeviceFacts(
        path=str(place),
        file_system="none (block device)",
        mount_point=None,
        mount_options=None,
        size_bytes=size,
        free_bytes=size,
        queue=block_queue(device, root),
    )


def _mount_of(place: Path, device: int, root: Path) -> tuple[str, str | None, str | None, str]:
    """(file system, mount point, options, source) of the mount that holds `place`.

    The longest mount point above it; of several at one point the last, which hides the others.
    """
    number = f"{os.major(device)}:{os.minor(device)}"
    resolved = str(place.resolve())
    best: tuple[str, str | None, str | None, str] = ("unknown", None, None, "")
    best_rank = (False, -1)
    for line in (_text(root / "proc/self/mountinfo") or "").splitlines():
        left, _, right = line.partition(" - ")
        fields, kind = left.split(), right.split()
        if len(fields) < 6 or len(kind) < 3:
            continue
        point = unescape(fields[4])
        if resolved != point and not resolved.startswith(point.rstrip("/") + "/"):
            continue
        # btrfs files have other device numbers than their mount: a match is better, not needed.
        rank = (fields[2] == number, len(point))
        if rank >= best_rank:
            best_rank = rank
            best = (kind[0], point, fields[5] + "," + kind[2], unescape(kind[1]))
    return best


def _queue_of_source(source: str, root: Path) -> BlockQueue | None:
    """For file systems with device numbers of their own, such as btrfs on /dev/sda1."""
    with contextlib.suppress(OSError):
        status = os.stat(source)
        if source.startswith("/") and stat.S_ISBLK(status.st_mode):
            return block_queue(status.st_rdev, root)
    return None


@contextlib.contextmanager
def _probe_file(place: Path) -> Iterator[int]:
    """A descriptor to try direct I/O on: the file itself, or an unnamed one in the folder."""
    if not place.is_dir():
        fd = os.open(place, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            os.close(fd)
        return
    # O_TMPFILE is not everywhere (NFS, FUSE); TemporaryFile then makes a named one and unlinks it.
    with tempfile.TemporaryFile(dir=place, buffering=0) as file:
        file.write(bytes(BLOCK_BYTES))
        os.fdatasync(file.fileno())
        fd = os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            os.close(fd)


def _statx_alignment(fd: int) -> tuple[int, int] | None:
    """(memory, offset) alignment for direct I/O in bytes, 0 for impossible; None: not told."""
    if not hasattr(_libc, "statx"):
        return None
    buffer = ctypes.create_string_buffer(_STATX_BYTES)
    if _libc.statx(fd, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, buffer):
        return None
    (mask,) = struct.unpack_from("=I", buffer, 0)
    if not mask & _STATX_DIOALIGN:
        return None
    memory_align, offset_align = struct.unpack_from("=II", buffer, _DIO_OFFSET)
    return memory_align, offset_align


def _try_direct_read(fd: int) -> DirectIO:
    # An empty file gives 0 bytes without reaching the device; nothing better can be asked then.
    with mmap.mmap(-1, BLOCK_BYTES) as buffer:
        os.preadv(fd, [buffer], 0)
    return DirectIO(possible=True)


def _scheduler(text: str | None) -> str | None:
    """`none [mq-deadline] kyber` -> `mq-deadline`."""
    if text is None or "[" not in text:
        return text
    return text[text.index("[") + 1 : text.index("]")]


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text is not None and text.isdigit() else None


def _model_of(whole: Path) -> str | None:
    """What tells one whole device from another: its model; of what is built on others (LUKS, LVM)
    theirs; of cards and virtual disks, which have none, name and number."""
    if model := _text(whole / "device/model"):
        return model
    below = [link.resolve() for link in sorted((whole / "slaves").glob("*"))]
    if below:
        drives = map(whole_of, below)
        return " + ".join(_model_of(drive) or drive.name for drive in drives)
    number = _text(whole / "device/cid") or _text(whole / "serial") or _text(whole / "wwid")
    return " ".join(filter(None, (_text(whole / "device/name"), number))) or None


def _text(path: Path) -> str | None:
    with contextlib.suppress(OSError):
        # Mount points may be in any encoding; they are compared with paths as Python has them.
        return path.read_text(encoding="utf-8", errors="surrogateescape").strip()
    return None
