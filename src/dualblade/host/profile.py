"""Speeds measured on this machine, kept in the user's configuration directory by device.

One JSON file holds all devices. A profile belongs to the device that it was measured on: it is
found by what the kernel tells of the device below a path, so a store moved to another drive has
none until that one is measured.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from dualblade.errors import StorageError
from dualblade.host.devices import device_facts
from dualblade.host.drives import find_drive

log = logging.getLogger("dualblade.host")


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeSpeeds:
    """Of this processor, in one dtype: bytes of weights that one token goes through in a second,
    and bytes of KV that it attends to, over tiles and the exact way. `layer_seconds`: of a layer,
    however small it is, for what the model's own code does (0 in profiles of older versions)."""

    weights_bytes_per_s: float
    tiles_bytes_per_s: float
    exact_bytes_per_s: float
    layer_seconds: float = 0.0

    def __post_init__(self) -> None:
        _check_rates(self.weights_bytes_per_s, self.tiles_bytes_per_s, self.exact_bytes_per_s)

    def seconds(self, weights_bytes: int, kv_bytes: int, *, layers: int, over_tiles: bool) -> float:
        """Of computing a token with so many bytes of weights and KV in so many layers."""
        rate = self.tiles_bytes_per_s if over_tiles else self.exact_bytes_per_s
        moved = weights_bytes / self.weights_bytes_per_s + kv_bytes / rate
        return moved + layers * self.layer_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceProfile:
    """Bytes per second through each door, of a copy in memory, and of computing by dtype (None and
    empty: not measured).

    `device` is its identity. `quick`: measured briefly at first use, not by `tune`.
    """

    device: str
    engine: str
    measured_at: str
    direct_bytes_per_s: float
    cache_hit_bytes_per_s: float
    cache_miss_bytes_per_s: float
    memory_copy_bytes_per_s: float | None = None
    compute: Mapping[str, ComputeSpeeds] = field(default_factory=dict)
    quick: bool = False

    def __post_init__(self) -> None:
        _check_rates(
            self.direct_bytes_per_s,
            self.cache_hit_bytes_per_s,
            self.cache_miss_bytes_per_s,
            1 if self.memory_copy_bytes_per_s is None else self.memory_copy_bytes_per_s,
        )


def _check_rates(*rates: float) -> None:
    if not all(isinstance(rate, int | float) and rate > 0 for rate in rates):
        raise ValueError("a speed is a positive number")


def profiles_file() -> Path:
    """Where profiles are: $XDG_CONFIG_HOME/dualblade/profiles.json."""
    base = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return Path(base) / "dualblade" / "profiles.json"


def device_identity(*paths: str | os.PathLike[str]) -> str:
    """What `paths`, the members of one store, stand on, in words that stay the same from one start
    to the next, and whatever their order.

    Raises: StorageError when neither a path nor its folder exists.
    """
    return " + ".join(sorted(_identity(path) for path in paths))


def _identity(path: str | os.PathLike[str]) -> str:
    """Of a device node, the drive's serial; its character device, which is read by other commands,
    is a device of its own."""
    if _is_device(path):
        drive = find_drive(path)
        way = "NVMe commands" if drive.is_ng else "block device"
        part = "" if drive.partition is None else f" partition {drive.partition}"
        # A loop device has neither: its name is all there is.
        known = f"{drive.model} {drive.serial}".strip() or Path(drive.whole_path).name
        return f"{known}{part}, {drive.block_bytes}-byte blocks, {way}"
    facts = device_facts(path)
    queue = facts.queue
    device = "no block device" if queue is None else f"{queue.name} {queue.model or 'no model'}"
    blocks = None if queue is None else queue.logical_block_bytes
    return f"{device}, {blocks}-byte blocks, {facts.file_system} at {facts.mount_point}"


def save_profile(profile: DeviceProfile) -> Path:
    """Keep `profile` in place of an older one of its device; returns the file.

    Raises: StorageError.
    """
    file = profiles_file()
    try:
        if str(file).startswith("~/"):  # '~' is not expanded, and would be a folder of that name
            raise FileNotFoundError(errno.ENOENT, "there is no home directory; set XDG_CONFIG_HOME")
        file.parent.mkdir(parents=True, exist_ok=True)
        known = {**_read_all(file), profile.device: asdict(profile)}
        fresh = file.with_suffix(f".{os.getpid()}")
        fresh.write_text(json.dumps(known, indent=1) + "\n")
        fresh.replace(file)  # whole or not at all
    except OSError as exc:
        raise StorageError(
            f"cannot save the profile in {file}: {exc.strerror}", operation="write", path=str(file)
        ) from exc
    return file


def load_profile(*paths: str | os.PathLike[str]) -> DeviceProfile | None:
    """The profile of the devices below `paths` together; None when they were not measured so."""
    file = profiles_file()
    try:
        found = _read_all(file).get(device_identity(*paths))
    except (OSError, StorageError):
        return None
    if found is None:
        return None
    try:
        names = {each.name for each in fields(DeviceProfile)}
        known = {name: found[name] for name in names if name in found}
        compute = {name: ComputeSpeeds(**one) for name, one in known.pop("compute", {}).items()}
        return DeviceProfile(**known, compute=compute)
    except (AttributeError, KeyError, TypeError, ValueError) as exc:
        log.warning("the profile in %s is not usable (%s); measure again with tune", file, exc)
        return None


def _is_device(path: str | os.PathLike[str]) -> bool:
    with contextlib.suppress(OSError):
        mode = os.stat(path).st_mode
        return stat.S_ISBLK(mode) or stat.S_ISCHR(mode)
    return False


def _read_all(file: Path) -> dict[str, Any]:
    """All profiles; none where the file is missing or not ours. Raises: OSError."""
    try:
        found = json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except ValueError:
        log.warning("%s is not JSON; it is left out", file)
        return {}
    return found if isinstance(found, dict) else {}
