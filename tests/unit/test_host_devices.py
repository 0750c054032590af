"""Devices: the real ones of this machine, and recorded sysfs trees of others."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from dualblade.errors import StorageError
from dualblade.host import devices
from dualblade.host.devices import block_queue, device_facts, whole_drive
from dualblade.host.machine import (
    cpu_features,
    cpu_model,
    cpu_text,
    git_state,
    machine_facts,
    package_version,
)
from dualblade.host.profile import device_identity


def test_a_folder_a_file_and_a_missing_file_say_the_same(tmp_path: Path) -> None:
    file = tmp_path / "store"
    missing = device_facts(file)
    file.write_bytes(bytes(8192))
    for place in (tmp_path, file):
        facts = device_facts(place)
        assert facts.file_system == missing.file_system
        assert facts.direct_io().possible == missing.direct_io().possible
        assert facts.queue == missing.queue
        assert 0 < facts.free_bytes <= facts.size_bytes
    assert [path.name for path in tmp_path.iterdir()] == ["store"]  # the probe leaves nothing


def test_statx_and_the_direct_read_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = device_facts(tmp_path).direct_io()
    monkeypatch.setattr(devices, "_statx_alignment", lambda _fd: None)
    assert device_facts(tmp_path).direct_io().possible == told.possible


def test_who_asks_what_a_folder_stands_on_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: object, **_options: object) -> None:
        raise AssertionError("a file was made")

    monkeypatch.setattr(devices.tempfile, "TemporaryFile", refuse)
    assert device_identity(tmp_path)
    whole_drive(tmp_path)
    if device_facts(tmp_path).file_system in devices.MEMORY_FILE_SYSTEMS:
        return
    with pytest.raises(AssertionError, match="a file was made"):
        device_facts(tmp_path).direct_io()


def test_tmpfs_is_not_direct() -> None:
    shm = Path("/dev/shm")
    if not shm.is_dir() or not os.access(shm, os.W_OK):
        pytest.skip("no writable /dev/shm")
    facts = device_facts(shm)
    assert facts.file_system == "tmpfs"
    assert not facts.direct_io().possible
    assert facts.direct_io().reason == "tmpfs keeps its files in memory"
    assert facts.queue is None


def test_a_file_system_that_says_it_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_statx_alignment", lambda _fd: (0, 0))
    direct = devices.direct_io(tmp_path, "oldfs")
    assert not direct.possible
    assert direct.reason == "oldfs says it cannot"


def test_zfs_takes_o_direct_and_does_not_heed_it(tmp_path: Path) -> None:
    direct = devices.direct_io(tmp_path, "zfs")
    assert not direct.possible
    assert direct.reason == "zfs caches in memory of its own"


def test_a_folder_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No such file") as caught:
        device_facts(tmp_path / "no" / "such")
    assert caught.value.path == str(tmp_path / "no" / "such")


def recorded_nvme(root: Path) -> int:
    """Sysfs of an NVMe drive with one partition; returns the partition's device number."""
    whole = root / "sys/devices/pci0/nvme/nvme0/nvme0n1"
    for name, text in {
        "queue/rotational": "0",
        "queue/logical_block_size": "512",
        "queue/physical_block_size": "4096",
        "queue/max_sectors_kb": "1280",
        "queue/max_segments": "127",
        "queue/read_ahead_kb": "128",
        "queue/write_cache": "write back",
        "queue/scheduler": "[none] mq-deadline",
        "device/model": "FASTDRIVE 1TB    ",
        "nvme0n1p2/partition": "2",
    }.items():
        (whole / name).parent.mkdir(parents=True, exist_ok=True)
        (whole / name).write_text(text + "\n")
    (root / "sys/dev/block").mkdir(parents=True)
    (root / "sys/dev/block/259:2").symlink_to(whole / "nvme0n1p2")
    return os.makedev(259, 2)


def test_a_partition_has_the_limits_of_its_drive(tmp_path: Path) -> None:
    queue = block_queue(recorded_nvme(tmp_path), tmp_path)
    assert queue is not None
    assert (queue.name, queue.model) == ("nvme0n1p2", "FASTDRIVE 1TB")
    assert (queue.logical_block_bytes, queue.physical_block_bytes) == (512, 4096)
    assert queue.rotational is False
    assert (queue.max_sectors_kb, queue.max_segments) == (1280, 127)
    assert queue.read_ahead_bytes == 128 * 1024
    assert (queue.write_cache, queue.scheduler) == ("write back", "none")


def test_the_drive_of_a_partition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    partition = recorded_nvme(tmp_path)
    drive = tmp_path / "sys/devices/pci0/nvme/nvme0/nvme0n1"
    (tmp_path / "sys/class/block").mkdir(parents=True)
    (tmp_path / "sys/class/block/nvme0n1p2").symlink_to(drive / "nvme0n1p2")
    found = replace(device_facts(tmp_path), queue=block_queue(partition, tmp_path))
    monkeypatch.setattr(devices, "device_facts", lambda *_: found)
    assert whole_drive(tmp_path, root=tmp_path) == drive
    found = replace(found, queue=None)
    assert whole_drive(tmp_path, root=tmp_path) is None


def test_what_is_built_on_a_drive_is_told_by_it(tmp_path: Path) -> None:
    """LUKS and LVM have no model of their own; their profile is that of the drive below."""
    recorded_nvme(tmp_path)
    partition = tmp_path / "sys/devices/pci0/nvme/nvme0/nvme0n1/nvme0n1p2"
    crypt, volume = (tmp_path / f"sys/devices/virtual/block/dm-{n}" for n in range(2))
    for device, below in ((crypt, partition), (volume, crypt)):
        (device / "slaves").mkdir(parents=True)
        (device / "slaves" / below.name).symlink_to(below)
    (tmp_path / "sys/dev/block/253:1").symlink_to(volume)
    queue = block_queue(os.makedev(253, 1), tmp_path)
    assert queue is not None
    assert (queue.name, queue.model) == ("dm-1", "FASTDRIVE 1TB")


def test_a_card_is_told_by_its_name_and_number(tmp_path: Path) -> None:
    card = tmp_path / "sys/devices/mmc0/block/mmcblk0"
    (card / "device").mkdir(parents=True)
    (card / "device/name").write_text("SN128\n")
    (card / "device/cid").write_text("0353445350\n")
    (tmp_path / "sys/dev/block").mkdir(parents=True)
    (tmp_path / "sys/dev/block/179:0").symlink_to(card)
    queue = block_queue(os.makedev(179, 0), tmp_path)
    assert queue is not None
    assert queue.model == "SN128 0353445350"


def test_what_is_not_a_block_device_has_no_queue(tmp_path: Path) -> None:
    assert block_queue(os.makedev(0, 24), tmp_path) is None
    assert block_queue(os.makedev(259, 7), tmp_path) is None


def test_an_absent_sysfs_file_is_unknown(tmp_path: Path) -> None:
    number = recorded_nvme(tmp_path)
    (tmp_path / "sys/devices/pci0/nvme/nvme0/nvme0n1/queue/max_segments").unlink()
    queue = block_queue(number, tmp_path)
    assert queue is not None
    assert queue.max_segments is None


def test_the_mount_is_the_innermost_and_the_last(tmp_path: Path) -> None:
    place = tmp_path / "data" / "x y"
    place.mkdir(parents=True)
    point = str(place).replace(" ", r"\040")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/mountinfo").write_text(
        "27 1 1:1 / / rw - ext4 /dev/a rw\n"
        f"28 27 1:2 / {point} rw - tmpfs t rw\n"
        f"29 27 1:3 / {point} rw,noatime shared:1 - xfs /dev/b rw,quota\n"
        f"30 27 1:3 / {place.parent}/x rw - nfs c rw\n"
    )
    found = devices._mount_of(place, os.makedev(9, 9), tmp_path)
    assert found == ("xfs", str(place), "rw,noatime,rw,quota", "/dev/b")
    other = tmp_path / "proc/self/mountinfo"  # somebody's old disk
    other.write_bytes(other.read_bytes() + b"31 27 1:4 / /mnt/Donn\xe9es rw - vfat d rw\n")
    assert devices._mount_of(place, os.makedev(9, 9), tmp_path) == found


def test_machine_facts_are_ready_for_json(tmp_path: Path) -> None:
    facts = json.loads(json.dumps(machine_facts(tmp_path)))
    assert facts["kernel"]
    assert facts["cpu_usable_count"] >= 1
    assert facts["memory_bytes"] > facts["memory_available_bytes"] > 0
    assert facts["versions"]["torch"] == package_version("torch")
    assert facts["device"]["path"] == str(tmp_path)
    assert "device" not in machine_facts()


def test_git_state_only_of_our_own_checkout(tmp_path: Path) -> None:
    assert git_state(tmp_path) is None
    state = git_state(Path(__file__).parent)
    if state is not None:  # None in an unpacked sdist
        assert len(state["commit"]) == 40
        assert isinstance(state["dirty"], bool)


def test_cpu_model_of_other_machines(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    cpuinfo = tmp_path / "proc/cpuinfo"
    cpuinfo.write_text("processor\t: 0\nBogoMIPS\t: 108\n\nModel\t\t: Raspberry Pi 5 Model B\n")
    assert cpu_model(tmp_path) == "Raspberry Pi 5 Model B"
    cpuinfo.write_text("processor\t: 0\nmodel\t\t: 85\nmodel name\t: Xeon\n")
    assert cpu_model(tmp_path) == "Xeon"
    cpuinfo.unlink()
    assert cpu_model(tmp_path) is None


def test_what_a_processor_can_is_in_the_words_of_its_kernel(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    cpuinfo = tmp_path / "proc/cpuinfo"
    cpuinfo.write_text("flags\t\t: fpu avx512_bf16 avx2 avx512f avx512_vnni\n\nflags\t: fpu\n")
    assert cpu_features(tmp_path) == ["avx2", "avx512f", "avx512_bf16"]
    cpuinfo.write_text("Features\t: fp asimd bf16\n")
    assert cpu_features(tmp_path) == ["asimd", "bf16"]
    cpuinfo.write_text("processor\t: 0\n")
    assert cpu_features(tmp_path) == []
    cpuinfo.unlink()
    assert cpu_features(tmp_path) == []


def test_a_processor_is_told_by_what_it_can() -> None:
    facts = {"cpu_model": "EPYC", "cpu_features": ["avx2", "avx512f"]}
    assert cpu_text(facts) == "EPYC with avx512f"
    assert cpu_text({"cpu_model": "EPYC", "cpu_features": []}) == "EPYC"
    assert cpu_text({"cpu_model": None, "architecture": "aarch64"}) == "aarch64"
    assert cpu_text({"cpu_model": None}) == "an unnamed processor", "a file of before"
