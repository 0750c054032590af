"""Block devices and NVMe namespaces: which drive one belongs to, and what is on it already.

What is on it is asked of libblkid's tools (blkid, wipefs, lsblk): they know the signatures of all
file systems, partition tables, RAID and volume managers, and are the verdict that others use too.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualblade.errors import NotAStore, StorageError, Unsupported
from dualblade.host.devices import whole_of
from dualblade.host.nvme import namespace_id

PERMISSION_WORDS = "read and write permission on it: docs/raw-devices.md"

_SYS = Path("/sys")
_TOOL_PATH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
_BLKID_NOTHING, _BLKID_AMBIVALENT = 2, 8
_BOOT_MOUNTS = frozenset({"/", "/boot", "/boot/efi", "/efi"})

# Partition types that promise nothing to anybody: Linux data, in GPT and in MBR. Others (EFI, BIOS
# boot, recovery ...) are somebody's even where libblkid finds them empty.
_FREE_PARTITION_TYPES = frozenset({"0fc63daf-8483-4772-8e79-3d69d8477de4", "0x83"})

# struct loop_info64 of linux/loop.h: lo_device, lo_inode, lo_rdevice, ...
_LOOP_GET_STATUS64, _LOOP_INFO_BYTES = 0x4C05, 232

_NAMESPACE = re.compile(r"/dev/nvme\d+n(\d+)")

_USAGE_WORDS = {
    "filesystem": "a {} file system",
    "raid": "a {} signature (RAID or volume manager)",
    "crypto": "a {} encrypted volume",
}
_HOLDER_COMMANDS = {
    "crypt": "cryptsetup close {name}",
    "lvm": "lvchange -an {path}",
    "mpath": "multipath -f {name}",
}
_HOLDER_COMMANDS_BY_DRIVER = {"dm": "dmsetup remove {name}", "md": "mdadm --stop {path}"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Drive:
    """A block device, or an NVMe namespace's character device with its block device.

    path         as given.
    block_path   the block device's node, which the page-cache door and O_EXCL are on.
    is_ng        `path` is /dev/ngXnY.
    whole_path   the whole drive: `block_path` itself, or what it is a partition of.
    wwid         what the kernel calls the whole drive world-wide, where it does.
    sequence     a number that no other drive had since the start of the machine (Linux 5.15; or 0).
    part_uuid    of a partition, where its table has them.
    """

    path: str
    block_path: str
    is_ng: bool
    whole_path: str
    partition: int | None
    size_bytes: int
    block_bytes: int
    read_only: bool
    serial: str
    model: str
    wwid: str
    sequence: int
    part_uuid: str
    metadata_bytes: int
    command_bytes_max: int
    segments_max: int
    discard_bytes_max: int

    @property
    def name(self) -> str:
        """What people type to say that they mean this one: the serial, which all that is on a drive
        has in common, else the world-wide name, and after it the number of a namespace beyond the
        first, and of a partition as udev's links have it. Of a drive with neither, the path."""
        known = self.serial or "_".join(self.wwid.split())
        if not known:
            return self.path
        space = _NAMESPACE.fullmatch(self.whole_path)
        beyond = "" if space is None or space[1] == "1" else f"-n{space[1]}"
        return known + beyond + ("" if self.partition is None else f"-part{self.partition}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something that makes a device not free, and the command that frees it."""

    what: str
    free_with: str | None


def find_drive(path: str | os.PathLike[str]) -> Drive:
    """The drive behind a device node. Only looks.

    Raises: NotAStore for what is no block device or NVMe namespace, StorageError, Unsupported.
    """
    given = os.fspath(path)
    try:
        mode = os.stat(given).st_mode
        is_ng = stat.S_ISCHR(mode)
        block_path = _block_twin(given) if is_ng else os.path.realpath(given)
        node = _sys_node(block_path)
        whole = whole_of(node)
        partition = _number(node / "partition")
        limits = {
            name: _number(whole / "queue" / name) or 0
            for name in (
                "logical_block_size",
                "max_hw_sectors_kb",
                "max_segments",
                "discard_max_bytes",
            )
        }
        return Drive(
            path=given,
            block_path=block_path,
            is_ng=is_ng,
            whole_path=f"/dev/{whole.name}",
            partition=partition,
            size_bytes=512 * (_number(node / "size") or 0),
            block_bytes=limits["logical_block_size"] or 512,
            read_only=bool(_number(node / "ro")),
            serial=_text(whole / "device/serial") or _text(whole / "serial"),
            model=_text(whole / "device/model"),
            wwid=_text(whole / "wwid") or _text(whole / "device/wwid"),
            sequence=_number(whole / "diskseq") or 0,
            part_uuid="" if partition is None else _blkid(block_path).get("PART_ENTRY_UUID", ""),
            metadata_bytes=_number(whole / "metadata_bytes") or 0,
            command_bytes_max=1024 * limits["max_hw_sectors_kb"],
            segments_max=limits["max_segments"],
            discard_bytes_max=limits["discard_max_bytes"],
        )
    except OSError as exc:
        give = f"give your user or group {PERMISSION_WORDS}"
        hints = {errno.EACCES: give, errno.EPERM: give, errno.ENOENT: "lsblk shows what is there"}
        raise StorageError(
            f"cannot examine {given}: {exc.strerror or exc}",
            operation="probe",
            path=given,
            hint=hints.get(exc.errno or 0),
        ) from exc


def findings(drive: Drive, *, has_store: bool = False) -> list[Finding]:
    """All that makes `drive` not plainly free; empty: it is.

    Reads the device, and opens it O_EXCL for a moment. `has_store`: one of ours is on it; what its
    partition is said to be had to be known when that was made, no more now.
    Raises: StorageError, Unsupported.
    """
    found = list(_tree_findings(drive))
    try:
        found += _signature_findings(drive, is_new=not has_store)
    except StorageError as exc:
        if not found:
            raise
        found.append(Finding(what=exc.message, free_with=None))
    if drive.read_only:
        found.append(
            Finding(what="it is read-only", free_with=f"blockdev --setrw {drive.block_path}")
        )
    if _text(_SYS / "block" / Path(drive.whole_path).name / "queue/zoned") == "host-managed":
        found.append(
            Finding(
                what="it is zoned (host-managed): it takes writes in order only", free_with=None
            )
        )
    if drive.metadata_bytes:
        found.append(
            Finding(
                what=f"its blocks carry {drive.metadata_bytes} bytes of metadata each",
                free_with=f"nvme format {drive.block_path} --lbaf=N, N a format without metadata",
            )
        )
    if not found and is_held(drive):
        found.append(
            Finding(
                what="another program has it open for itself (O_EXCL)",
                free_with=f"fuser -v {drive.block_path}",
            )
        )
    return found


def signatures(drive: Drive) -> list[Finding]:
    """What libblkid recognises in the bytes of `drive`. Raises: StorageError, Unsupported."""
    return list(_signature_findings(drive))


def _tree_findings(drive: Drive) -> Iterator[Finding]:
    """Mounts, swap, partitions and holders, from lsblk's tree and sysfs."""
    columns = "NAME,KNAME,PATH,TYPE,MOUNTPOINTS"
    tree = _json_of("lsblk", "--json", "-o", columns, drive.block_path)["blockdevices"][0]
    if drive.partition is None and _boots(tree):
        yield Finding(what="this machine boots from it", free_with=None)
    yield from _mount_findings(tree, drive.block_path)
    children = tree.get("children", [])
    partitions = [child["path"] for child in children if child["type"] == "part"]
    if partitions:
        yield Finding(
            what=f"it is partitioned: {', '.join(partitions)}",
            free_with=f"name one of them, or erase the table: wipefs --all {drive.block_path}",
        )
    yield from _holder_findings(_sys_node(drive.block_path), tree)
    yield from loop_devices(drive)


def _holder_findings(node: Path, tree: dict[str, Any]) -> Iterator[Finding]:
    """What is built on the device at sysfs's `node`, or on a partition of it.

    By sysfs: lsblk leaves out what has no node in /dev, as mapped devices have none without udev.
    In lsblk's words where it has them; what it calls a partition (kpartx) was told as one.
    """
    shown = {entry["kname"]: entry for entry in _below(tree)}
    partitions = sorted(path.parent for path in node.glob("*/partition"))
    for place in (node, *partitions):
        where = "it" if place == node else f"/dev/{place.name}"
        for link in sorted(place.glob("holders/*")):
            holder = shown.get(link.name) or _holder_of(link)
            if holder["type"] == "part":
                continue
            by_driver = _HOLDER_COMMANDS_BY_DRIVER.get(link.name[:2])
            command = _HOLDER_COMMANDS.get(holder["type"], by_driver)
            yield Finding(
                what=f"{holder['path']} ({holder['type']}) is built on {where}",
                free_with=command and command.format(**holder),
            )


def loop_devices(drive: Drive) -> list[Finding]:
    """Loop devices over `drive`, over a partition of it or over the whole of it: the kernel does
    not count them as holders, and O_EXCL is not refused."""
    node = _sys_node(drive.block_path)
    partitions = [path.parent for path in node.glob("*/partition")]
    numbers = {_text(place / "dev"): place.name for place in (*partitions, whole_of(node), node)}
    loops = sorted((_SYS / "block").glob("loop*"))
    below = {loop.name: numbers.get(_below_loop(loop) or "") for loop in loops}
    return [
        Finding(
            what=f"/dev/{loop} (loop) is built on /dev/{name}",
            free_with=f"losetup -d /dev/{loop}",
        )
        for loop, name in below.items()
        if name is not None
    ]


def _below_loop(loop: Path) -> str | None:
    """major:minor of the device that a loop device stands on; None: on none. By the kernel's own
    words where it may be opened: the name that it was given may be another's by now."""
    given = _text(loop / "loop/backing_file")
    if not given:
        return None
    with contextlib.suppress(OSError):
        fd = os.open(f"/dev/{loop.name}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            told = fcntl.ioctl(fd, _LOOP_GET_STATUS64, bytes(_LOOP_INFO_BYTES))
        finally:
            os.close(fd)
        device = int.from_bytes(told[16:24], sys.byteorder)
        return f"{os.major(device)}:{os.minor(device)}" if device else None
    with contextlib.suppress(OSError):
        device = os.stat(given).st_rdev
        return f"{os.major(device)}:{os.minor(device)}" if device else None
    return None


def _holder_of(link: Path) -> dict[str, str]:
    """What lsblk would say of a device in sysfs, if it had a node."""
    kind, dash, _ = _text(link / "dm/uuid").partition("-")
    return {
        "name": _text(link / "dm/name") or link.name,
        "path": f"/dev/{link.name}",
        "type": kind.lower()
        if dash
        else _text(link / "md/level") or link.name.rstrip("-0123456789"),
    }


def _below(tree: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for child in tree.get("children", []):
        yield child
        yield from _below(child)


def _mount_findings(tree: dict[str, Any], path: str) -> Iterator[Finding]:
    for place in filter(None, tree.get("mountpoints", [])):
        if place == "[SWAP]":
            yield Finding(what="it is swap in use", free_with=f"swapoff {path}")
        else:
            yield Finding(what=f"it is mounted at {place}", free_with=f"umount {place}")
    for child in tree.get("children", []):
        for below in _mount_findings(child, child["path"]):
            yield Finding(what=f"{child['path']}: {below.what}", free_with=below.free_with)


def _boots(tree: dict[str, Any]) -> bool:
    return bool(_BOOT_MOUNTS.intersection(tree.get("mountpoints", []))) or any(
        _boots(child) for child in tree.get("children", [])
    )


def _signature_findings(drive: Drive, *, is_new: bool = False) -> Iterator[Finding]:
    """By libblkid; of one that is to be formatted its partition's type must be known, too."""
    path = drive.block_path
    erase = f"wipefs --all {path}"
    told = _blkid(path)
    kind = told.get("PART_ENTRY_TYPE")
    if kind is not None and kind not in _FREE_PARTITION_TYPES:
        yield Finding(
            what=f"its partition type is {kind}, not Linux data",
            free_with=f"sfdisk --part-type {drive.whole_path} {drive.partition} linux",
        )
    if is_new and kind is None and drive.partition is not None and "AMBIVALENT" not in told:
        yield Finding(
            what=f"its partition type cannot be told without reading {drive.whole_path}",
            free_with=None,
        )
    if "AMBIVALENT" in told:
        yield Finding(what="several signatures, of which none is certain", free_with=erase)
    if "TYPE" in told:
        words = _USAGE_WORDS.get(told.get("USAGE", ""), "a {} signature")
        yield Finding(what=words.format(told["TYPE"]), free_with=erase)
    if "PTTYPE" in told:
        yield Finding(what=f"a partition table ({told['PTTYPE']})", free_with=erase)
    known = {told.get("TYPE"), told.get("PTTYPE")}
    for entry in _json_of("wipefs", "--no-act", "--json", path)["signatures"]:
        if entry["type"] not in known:
            what = f"a {entry['type']} signature at offset {entry['offset']}"
            yield Finding(what=what, free_with=erase)


def _blkid(path: str) -> dict[str, str]:
    """blkid's low-level probe: what it names, empty for nothing."""
    done = _run("blkid", "-p", "-o", "export", path)
    if done.returncode == _BLKID_AMBIVALENT:
        return {"AMBIVALENT": "1"}
    # It ends with 2 for "nothing" and for "could not look" alike; only the text differs.
    if done.returncode not in (0, _BLKID_NOTHING) or done.stderr.strip():
        raise StorageError(
            f"blkid cannot examine {path}: {done.stderr.strip() or done.returncode}",
            operation="probe",
            path=path,
            hint=None
            if os.access(path, os.R_OK | os.W_OK)
            else f"give your user or group {PERMISSION_WORDS}",
        )
    pairs = (line.partition("=") for line in done.stdout.splitlines())
    return {key: value for key, _, value in pairs if key != "DEVNAME"}


def _json_of(tool: str, *arguments: str) -> dict[str, Any]:
    done = _run(tool, *arguments)
    if done.returncode:
        raise StorageError(
            f"{tool} cannot examine {arguments[-1]}: {done.stderr.strip() or 'it shows nothing'}",
            operation="probe",
            path=arguments[-1],
        )
    # wipefs says nothing at all where there is nothing to say.
    answer: dict[str, Any] = json.loads(done.stdout or '{"signatures": []}')
    return answer


def _run(tool: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    found = shutil.which(tool, path=_TOOL_PATH)
    if found is None:
        raise Unsupported(
            f"{tool} is not installed, so a device cannot be shown to be free",
            hint="install util-linux",
        )
    environment = {**os.environ, "LC_ALL": "C"}
    command = [found, *arguments]
    return subprocess.run(
        command,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
        env=environment,
    )


def is_held(drive: Drive) -> bool:
    """Whether somebody has the block device for itself (O_EXCL). Raises: StorageError."""
    try:
        os.close(os.open(drive.block_path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as exc:
        if exc.errno == errno.EBUSY:
            return True
        raise StorageError(
            f"cannot open {drive.block_path}: {exc.strerror}",
            operation="open",
            path=drive.block_path,
        ) from exc
    return False


def _block_twin(path: str) -> str:
    """The block device of an NVMe namespace's character device, by id, not by name alone."""
    status = os.stat(path)
    node = _SYS / "dev/char" / f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    name = node.resolve().name
    if not (_SYS / "class/nvme-generic" / name).exists():
        raise NotAStore(
            f"{path} is a character device, but no NVMe namespace",
            path=path,
            hint="name /dev/ngXnY, a block device, or a file",
        )
    twin = f"/dev/nvme{name.removeprefix('ng')}"
    if not os.path.exists(twin):
        raise Unsupported(f"{path} has no block device {twin} to hold it by")
    held = _sys_node(twin).name
    if held != Path(twin).name:  # nodes in a container may have been given other names
        raise Unsupported(f"{path} is {name}, but {twin} is the node of {held}")
    ids = []
    for place in (path, twin):
        fd = os.open(place, os.O_RDONLY | os.O_CLOEXEC)
        try:
            ids.append(namespace_id(fd))
        finally:
            os.close(fd)
    if ids[0] != ids[1]:
        raise Unsupported(f"{path} is namespace {ids[0]}, but {twin} is namespace {ids[1]}")
    return twin


def _sys_node(block_path: str) -> Path:
    status = os.stat(block_path)
    if not stat.S_ISBLK(status.st_mode):
        raise NotAStore(f"{block_path} is not a block device", path=block_path)
    number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    return (_SYS / "dev/block" / number).resolve(strict=True)


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.isdigit() else None


def _text(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(errors="replace").strip()
    return ""
