"""What the probe says of drives that are known."""

from __future__ import annotations

import json
import os

import pytest
from typer.testing import CliRunner

from dualblade.cli.app import app
from dualblade.errors import Unsupported
from dualblade.host.drives import find_drive, findings
from dualblade.host.nvme import namespace_id, nvme_facts
from dualblade.units import KIB, MIB
from tests.lab.guest.conftest import block_of, find_namespace


def test_ids_are_not_those_of_the_names() -> None:
    """Namespaces 3 and 7 of one drive are /dev/ngXn1 and /dev/ngXn2."""
    for number, block_bytes in ((3, 512), (7, 4096)):
        path = find_namespace("LABTWO", number)
        assert not path.endswith(f"n{number}")
        drive = find_drive(path)
        assert (drive.is_ng, drive.block_path) == (True, block_of(path))
        assert (drive.block_bytes, drive.serial, drive.size_bytes) == (
            block_bytes,
            "LABTWO",
            256 * MIB,
        )
        fd = os.open(path, os.O_RDONLY)
        facts = nvme_facts(fd, path)
        os.close(fd)
        assert (facts.namespace_id, facts.block_bytes, facts.metadata_bytes) == (
            number,
            block_bytes,
            0,
        )
        assert facts.block_count * facts.block_bytes == 256 * MIB
        assert facts.mdts_bytes is None
        assert facts.serial == "LABTWO"
        assert findings(drive) == []


def test_a_block_device_that_took_another_drives_name_is_refused() -> None:
    """As in a container that was given nodes under other names: what is compared on one drive would
    be written to another."""
    paths = [find_namespace("LABSMALL"), find_namespace("LABBAD")]
    one, other = map(block_of, paths)
    assert [namespace_of(path) for path in paths] == [1, 1]

    def swap() -> None:
        for old, new in ((one, "/dev/kept"), (other, one), ("/dev/kept", other)):
            os.rename(old, new)

    swap()
    try:
        for path in paths:
            with pytest.raises(Unsupported, match="is the node of"):
                find_drive(path)
    finally:
        swap()
    assert find_drive(paths[0]).serial == "LABSMALL"


def namespace_of(path: str) -> int:
    fd = os.open(path, os.O_RDONLY)
    try:
        return namespace_id(fd)
    finally:
        os.close(fd)


def test_limits() -> None:
    path = find_namespace("LABSMALL")
    fd = os.open(path, os.O_RDONLY)
    facts = nvme_facts(fd, path)
    os.close(fd)
    drive = find_drive(path)
    assert facts.mdts_bytes == drive.command_bytes_max == 128 * KIB
    assert drive.segments_max == 33  # 32 pages, and one for a buffer that starts inside a page
    assert drive.discard_bytes_max > 0


def test_doctor_shows_them() -> None:
    for path in (find_namespace("LABTWO", 7), block_of(find_namespace("LABSMALL"))):
        done = CliRunner().invoke(app, ["doctor", path, "--json"])
        assert done.exit_code == 0, done.output
        told = json.loads(done.stdout)["store"]
        assert told["drive"]["nvme"]["namespace_id"] in (1, 7)
        assert told["drive"]["findings"] == []
        assert told["write_cache"] == "write back"
        assert told["drive"]["passthrough"] == (
            "possible: engine uring-cmd" if "/ng" in path else None
        )
        shown = CliRunner().invoke(app, ["doctor", path])
        assert "namespace id" in shown.stdout


def test_blocks_with_metadata_are_refused_with_the_reason() -> None:
    drive = find_drive(find_namespace("LABMETA"))
    assert drive.metadata_bytes == 8
    assert any("8 bytes of metadata" in finding.what for finding in findings(drive))
