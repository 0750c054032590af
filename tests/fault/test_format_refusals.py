"""`store format` and `wipe` refuse what is not plainly free, say what it is, and write nothing."""

from __future__ import annotations

import json
import os
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dualblade import DualBladeCache
from dualblade.cli.app import app
from dualblade.errors import NotAStore, StorageError, Unsupported
from dualblade.host import drives
from dualblade.host.drives import find_drive, findings
from dualblade.io import open_engine
from dualblade.store import Store
from dualblade.store.formatting import carry_out_format, plan_format, plan_wipe
from dualblade.units import MIB
from tests.devices import contents, loop_device, needs_root
from tests.integration.tiny_models import tiny_model

SIZE_BYTES = 64 * MIB
_FIRST_SECTOR = 4096  # 2 MiB


@pytest.fixture
def blank(tmp_path: Path) -> Iterator[str]:
    with loop_device(tmp_path / "image", SIZE_BYTES, 512) as device:
        yield device


def run(*arguments: str, typed: str = "") -> tuple[int, str, str]:
    done = CliRunner().invoke(app, list(arguments), input=typed)
    return done.exit_code, done.stdout, done.stderr


def partition(device: str, kind: int) -> str:
    """An MBR with one partition of type `kind`; the node of the partition."""
    sectors = SIZE_BYTES // 512 - _FIRST_SECTOR
    entry = struct.pack("<B3sB3sII", 0, b"\0" * 3, kind, b"\0" * 3, _FIRST_SECTOR, sectors)
    with open(device, "r+b") as disk:
        disk.write(bytes(440) + b"\x78\x56\x34\x12" + bytes(2) + entry + bytes(48) + b"\x55\xaa")
    # Not --rereadpt: not every kernel reads partition tables itself.
    subprocess.run(["partx", "--update", device], check=True)
    return f"{device}p1"


def assert_refused(device: str, what: str, command: str | None) -> None:
    before = contents(device)
    for plan in (plan_format, plan_wipe):
        with pytest.raises(NotAStore, match="is not free to") as caught:
            plan(device)
        assert what in caught.value.message
        assert command is None or command in caught.value.message
    status, _, told = run("store", "format", device, "--yes")
    assert status == 1
    assert what in told
    assert contents(device) == before


@needs_root
@pytest.mark.parametrize(
    ("make", "what"),
    [
        (["mkfs.ext4", "-q"], "a ext4 file system"),
        (["mkswap", "-q"], "a swap signature"),
    ],
)
def test_what_carries_a_signature(blank: str, make: list[str], what: str) -> None:
    subprocess.run([*make, blank], check=True)
    assert_refused(blank, what, f"wipefs --all {blank}")
    subprocess.run(["wipefs", "-qa", blank], check=True)
    assert findings(find_drive(blank)) == []


@needs_root
def test_what_is_mounted(blank: str, tmp_path: Path) -> None:
    subprocess.run(["mkfs.ext4", "-q", blank], check=True)
    place = tmp_path / "mounted"
    place.mkdir()
    # Read-only: the file system itself writes to its superblock a while after it was mounted.
    subprocess.run(["mount", "-o", "ro", blank, place], check=True)
    try:
        assert_refused(blank, f"it is mounted at {place}", f"umount {place}")
    finally:
        subprocess.run(["umount", place], check=True)


@needs_root
def test_what_is_partitioned_and_its_partition(blank: str, tmp_path: Path) -> None:
    """The whole is refused; a partition of type Linux data is a store of its own."""
    part = partition(blank, 0x83)
    assert_refused(blank, "a partition table (dos)", f"wipefs --all {blank}")
    assert_refused(blank, f"it is partitioned: {part}", None)
    carry_out_format(plan_format(part))
    facts = find_drive(part)
    assert (facts.partition, facts.whole_path, facts.size_bytes) == (1, blank, 62 * MIB)
    assert facts.part_uuid == "12345678-01"
    named = replace(facts, serial="S123")
    assert named.name == "S123-part1", "all partitions of a drive have its serial"
    assert replace(named, partition=None).name == "S123"
    assert replace(named, serial="", wwid="t10.ATA  DISK").name == "t10.ATA_DISK-part1"
    assert replace(named, serial="", wwid="").name == part
    second = replace(named, whole_path="/dev/nvme0n2")
    assert second.name == "S123-n2-part1", "namespaces of one drive share its serial"
    with pytest.raises(NotAStore, match="already"):
        plan_format(part)
    subprocess.run(["mkfs.ext4", "-q", "-F", part], check=True)
    place = tmp_path / "mounted"
    place.mkdir()
    subprocess.run(["mount", part, place], check=True)
    try:
        assert_refused(blank, f"{part}: it is mounted at {place}", f"umount {place}")
    finally:
        subprocess.run(["umount", place], check=True)


@needs_root
@pytest.mark.parametrize("below", ["whole", "partition"])
def test_what_a_loop_device_stands_on(blank: str, below: str) -> None:
    """The kernel counts it as no holder, and lets another program have the device for itself."""
    base = partition(blank, 0x83) if below == "partition" else blank
    made = subprocess.run(
        ["losetup", "--show", "-f", "-o", str(12 * MIB), base],
        check=True,
        capture_output=True,
        text=True,
    )
    above = made.stdout.strip()
    try:
        what = f"{above} (loop) is built on {base}"
        for device in {blank, base}:
            assert_refused(device, what, f"losetup -d {above}")
    finally:
        subprocess.run(["losetup", "-d", above], check=True)
    assert not [found for found in findings(find_drive(base)) if "loop" in found.what]


@needs_root
def test_a_partition_that_is_somebodys_by_type(blank: str) -> None:
    """EFI: empty to libblkid, and yet not ours to take."""
    assert_refused(partition(blank, 0xEF), "its partition type is 0xef", "sfdisk --part-type")


@needs_root
def test_a_partition_whose_type_cannot_be_told(blank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who may open the partition alone, as in a container, hears nothing of it from libblkid."""
    part, real = partition(blank, 0xEF), drives._blkid

    def without_entry(path: str) -> dict[str, str]:
        return {key: word for key, word in real(path).items() if not key.startswith("PART_ENTRY")}

    monkeypatch.setattr(drives, "_blkid", without_entry)
    with pytest.raises(NotAStore, match=f"type cannot be told without reading {blank}"):
        plan_format(part)
    assert findings(find_drive(part), has_store=True) == [], "a store that is there is in use"


@needs_root
def test_doctor_without_the_tools_says_so(blank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container without util-linux."""
    carry_out_format(plan_format(blank))
    monkeypatch.setattr(drives, "_TOOL_PATH", "/nowhere")
    for words in ((), ("--json",)):
        _, told, complaint = run("doctor", blank, *words)
        assert "not installed, so a device cannot be shown to be free" in " ".join(told.split())
        assert "unexpected" not in complaint


@needs_root
def test_another_drive_under_the_same_name_is_another_drive(tmp_path: Path) -> None:
    """Loop devices and USB sticks have no serial to tell them apart by."""
    with loop_device(tmp_path / "one", SIZE_BYTES, 512) as device:
        before = find_drive(device)
        if not Path(f"/sys/block/{Path(device).name}/diskseq").exists():
            pytest.skip("Linux before 5.15 does not number drives")
        assert find_drive(device) == before
        subprocess.run(["losetup", "-d", device], check=True)
        (tmp_path / "other").write_bytes(bytes(SIZE_BYTES))
        subprocess.run(["losetup", "--partscan", device, tmp_path / "other"], check=True)
        assert find_drive(device) != before
        assert replace(find_drive(device), sequence=before.sequence) == before


@needs_root
def test_what_is_read_only_or_too_small(blank: str, tmp_path: Path) -> None:
    subprocess.run(["blockdev", "--setro", blank], check=True)
    try:
        assert_refused(blank, "it is read-only", f"blockdev --setrw {blank}")
    finally:  # the loop device keeps it beyond its image
        subprocess.run(["blockdev", "--setrw", blank], check=True)
    with (
        loop_device(tmp_path / "small", 3 * MIB) as small,
        pytest.raises(Unsupported, match="too small"),
    ):
        plan_format(small)


@needs_root
def test_what_a_drive_cannot_do_for_a_store(blank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zones that are written in order only, and blocks larger than a superblock."""
    drive = find_drive(blank)
    real = drives._text
    with monkeypatch.context() as patch:
        patch.setattr(
            drives, "_text", lambda path: "host-managed" if path.name == "zoned" else real(path)
        )
        assert_refused(blank, "it is zoned", None)
    large = replace(drive, block_bytes=16384)
    monkeypatch.setattr("dualblade.store.formatting.find_drive", lambda _: large)
    with pytest.raises(Unsupported, match="blocks of 16384 bytes"):
        plan_format(blank)


@needs_root
@pytest.mark.parametrize("use", ["open", "format", "generate"])
def test_a_name_in_dev_where_nothing_is_never_becomes_a_file(use: str) -> None:
    """A drive that is unplugged, or a slip of the hand: KV would go to memory, out of sight."""
    path = "/dev/ng99n1"
    with pytest.raises(StorageError, match=f"cannot examine {path}: No such file"):
        if use == "open":
            with open_engine() as engine:
                Store.open(path, engine)
        elif use == "format":
            plan_format(path)
        else:
            DualBladeCache.for_model(tiny_model(), store=path, memory_budget="16MiB")
    assert not os.path.lexists(path)


def test_the_drive_that_the_machine_boots_from() -> None:
    tree = {"mountpoints": [None], "children": [{"mountpoints": ["/boot"]}]}
    assert drives._boots(tree)
    tree["children"][0]["mountpoints"] = ["/mnt"]  # type: ignore[index]
    assert not drives._boots(tree)


def test_what_is_built_on_it_is_named_once_with_and_without_lsblk(tmp_path: Path) -> None:
    """A volume and an array that lsblk lists, and on a partition another two that it does not:
    without udev mapped devices have no node. What it calls a partition was told as one."""
    node = tmp_path / "nvme0n1"
    for name, text in {
        "holders/dm-0/dm/uuid": "LVM-x",
        "holders/dm-1/dm/uuid": "part1-x",
        "holders/md9/md/level": "raid1",
        "holders/bcache0/size": "8",
        "nvme0n1p1/partition": "1",
        "nvme0n1p1/holders/dm-2/dm/uuid": "CRYPT-x",
        "nvme0n1p1/holders/dm-2/dm/name": "safe",
        "nvme0n1p1/holders/dm-3/dm/uuid": "",
        "nvme0n1p1/holders/dm-3/dm/name": "part",
    }.items():
        (node / name).parent.mkdir(parents=True, exist_ok=True)
        (node / name).write_text(text + "\n")
    above = {"name": "v", "kname": "dm-9", "path": "/dev/mapper/v", "type": "crypt"}
    shown = {"name": "g-v", "kname": "dm-0", "path": "/dev/mapper/g-v", "type": "lvm"}
    kpartx = {"name": "p1", "kname": "dm-1", "path": "/dev/mapper/p1", "type": "part"}
    tree = {"children": [{**shown, "children": [above]}, kpartx]}
    assert {(f.what, f.free_with) for f in drives._holder_findings(node, tree)} == {
        ("/dev/mapper/g-v (lvm) is built on it", "lvchange -an /dev/mapper/g-v"),
        ("/dev/md9 (raid1) is built on it", "mdadm --stop /dev/md9"),
        ("/dev/bcache0 (bcache) is built on it", None),
        ("/dev/dm-2 (crypt) is built on /dev/nvme0n1p1", "cryptsetup close safe"),
        ("/dev/dm-3 (dm) is built on /dev/nvme0n1p1", "dmsetup remove part"),
    }
    assert len(list(drives._holder_findings(node, tree))) == 5


@needs_root
def test_without_the_tools_nothing_is_called_free(
    blank: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drives, "_TOOL_PATH", "/nowhere")
    with pytest.raises(Unsupported, match="install util-linux"):
        plan_format(blank)


@needs_root
def test_a_probe_that_cannot_look_is_an_error_not_a_verdict(
    blank: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """blkid ends with 2 for 'nothing there' and for 'permission denied' alike."""
    fake = tmp_path / "bin"
    fake.mkdir()
    (fake / "blkid").write_text("#!/bin/sh\necho denied >&2\nexit 2\n")
    (fake / "blkid").chmod(0o755)
    monkeypatch.setattr(drives, "_TOOL_PATH", f"{fake}:{drives._TOOL_PATH}")
    with pytest.raises(StorageError, match="denied"):
        plan_format(blank)


@needs_root
def test_the_commands(blank: str) -> None:
    """Dry run, a wrong confirmation, the right one, what is shown, and wiping."""
    status, told, _ = run("store", "format", blank, "--dry-run", "--json")
    assert status == 0
    assert json.loads(told)["done"] is False
    status, _, told = run("store", "format", blank, typed="yes\n")
    assert status == 2
    assert f"{blank} was left alone" in told
    assert not any(contents(blank))
    status, told, _ = run("store", "format", blank, typed=f"{blank}\n")
    assert status == 0
    assert "60.0 MiB for KV" in told
    status, told, _ = run("store", "inspect", blank, "--json")
    shown = json.loads(told)
    assert shown["is_store"]
    assert [copy["problem"] for copy in shown["superblocks"]] == [None, None]
    for options in ([], ["--json"], ["--superblocks-only"]):
        status, told, _ = run("store", "verify", blank, *options)
        assert status == 0
        assert told
    status, told, _ = run("doctor", blank, "--json")
    assert status == 0
    shown = json.loads(told)["store"]
    assert shown["kind"] == "device"
    assert shown["store"]["capacity_bytes"] == 60 * MIB
    assert run("doctor", blank)[0] == 0
    assert run("store", "wipe", blank, typed="no\n")[0] == 2
    status, told, _ = run("store", "wipe", blank, "--yes", "--json")
    assert (status, json.loads(told)["how"]) == (0, "discarded")
    status, _, told = run("store", "verify", blank)
    assert status == 1
    assert "is not a dualblade store" in told


def test_the_commands_on_a_file(tmp_path: Path) -> None:
    path = str(tmp_path / "kv.store")
    assert run("store", "format", path)[0] == 0
    assert run("store", "format", path)[0] == 1
    status, told, _ = run("store", "inspect", path)
    assert status == 0
    assert "closed cleanly" in told
    assert run("store", "verify", path)[0] == 0
    before = Path(path).read_bytes()
    assert run("store", "wipe", path, "--dry-run")[0] == 0
    assert Path(path).read_bytes() == before
    assert run("store", "wipe", path, typed=f"{path}\n")[0] == 0
    assert not Path(path).exists()
    foreign = tmp_path / "thesis.txt"
    foreign.write_text("chapter 1" * 1000)
    for command in ("format", "wipe", "verify"):
        assert run("store", command, str(foreign), *["--yes"][: command != "verify"])[0] == 1
    assert foreign.read_text() == "chapter 1" * 1000
    assert run("store", "inspect", str(tmp_path / "missing"))[0] == 1
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)  # nothing waits for a writer
    for command in ("inspect", "verify", "wipe"):
        assert "is not a regular file" in run("store", command, str(pipe))[2]
    told = json.loads(run("doctor", str(pipe), "--json")[1])["store"]["error"]
    assert "neither a file, a folder nor a device" in told
