"""Only in the guest: the drives by serial, and what only the guest's machine can do."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dualblade.host.nvme import namespace_id
from dualblade.io import Arena, Engine, open_engine
from dualblade.store.formatting import carry_out_format, plan_format
from dualblade.units import MIB

SHARE = os.environ.get("DUALBLADE_LAB_GUEST")
collect_ignore_glob = [] if SHARE else ["test_*.py"]


def find_namespace(serial: str, number: int = 1) -> str:
    """/dev/ngXnY of the drive with this serial and this namespace id."""
    for node in sorted(Path("/sys/class/nvme-generic").iterdir()):
        if (node / "device/serial").read_text().strip() != serial:
            continue
        path = f"/dev/{node.name}"
        fd = os.open(path, os.O_RDONLY)
        try:
            if namespace_id(fd) == number:
                return path
        finally:
            os.close(fd)
    raise LookupError(f"no namespace {number} on a drive {serial}")


def block_of(namespace: str) -> str:
    return namespace.replace("/ng", "/nvme")


def ask(command: str, **arguments: Any) -> Any:
    """What the machine around the guest answers to a QMP command."""
    assert SHARE is not None
    share = Path(SHARE)
    share.joinpath("ask.new").write_text(json.dumps({"execute": command, "arguments": arguments}))
    share.joinpath("ask.new").rename(share / "ask")
    while not (share / "answer").exists():
        time.sleep(0.02)
    answer = json.loads((share / "answer").read_text())
    (share / "answer").unlink()
    assert "return" in answer, answer
    return answer["return"]


def reads_of(node: str) -> int:
    """Read requests that reached the image behind a drive."""
    return _count(node, "rd_operations")


def writes_of(node: str) -> int:
    """Write requests that reached the image behind a drive."""
    return _count(node, "wr_operations")


def _count(node: str, name: str) -> int:
    stats = ask("query-blockstats", **{"query-nodes": False})
    named = [s for s in stats if s.get("node-name") == node]
    assert len(named) == 1, stats
    return int(named[0]["stats"][name])


def formatted(path: str) -> str:
    carry_out_format(plan_format(path))
    return path


@pytest.fixture(autouse=True, scope="session")
def _emulated_drives_are_reset_early() -> None:
    """Ten seconds, not thirty, until the kernel asks what became of a command.

    Now and then the emulated drive loses all commands in flight (seen in the kernel's log: all of
    the queue's tags time out at once). They end in a reset then and are tried again well before
    the contract's patience does; a wake-up that our engine lost would not, and fails the test.
    """
    for limit in Path("/sys/block").glob("nvme*/queue/io_timeout"):
        limit.write_text("10000")


@pytest.fixture
def engine() -> Iterator[Engine]:
    with open_engine(queue_depth=4) as opened:
        yield opened


@pytest.fixture
def arena() -> Iterator[Arena]:
    with Arena(4 * MIB) as arena:
        yield arena
