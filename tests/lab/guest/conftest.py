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
    stats = ask("query-blockstats", **{"query-nodes": False})
    named = [s for s in stats if s.get("node-name") == node]
    assert len(named) == 1, stats
    return int(named[0]["stats"]["rd_operations"])


def formatted(path: str) -> str:
    carry_out_format(plan_format(path))
    return path


@pytest.fixture
def engine() -> Iterator[Engine]:
    with open_engine(queue_depth=4) as opened:
        yield opened


@pytest.fixture
def arena() -> Iterator[Arena]:
    with Arena(4 * MIB) as arena:
        yield arena
