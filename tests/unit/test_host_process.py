"""What the kernel counts for this process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dualblade.errors import Unsupported
from dualblade.host import page_cache
from dualblade.host.devices import MEMORY_FILE_SYSTEMS, device_facts
from dualblade.host.memory import process_memory
from dualblade.host.process import may_lock_memory, process_io, release_memory, reset_peak_memory
from dualblade.units import MIB


def test_reads_from_the_device_are_counted_and_cached_ones_are_not(tmp_path: Path) -> None:
    kind = device_facts(tmp_path).file_system
    if kind in MEMORY_FILE_SYSTEMS:
        pytest.skip(f"temporary files are on {kind}: they are page cache; use --basetemp")
    with (tmp_path / "data").open("w+b") as file:
        file.write(os.urandom(4 * MIB))
        file.flush()
        fd = file.fileno()
        os.fsync(fd)
        page_cache.drop(fd, 0, 4 * MIB)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        before = process_io()
        os.pread(fd, 4 * MIB, 0)
        cold = process_io()
        os.pread(fd, 4 * MIB, 0)
        warm = process_io()
    assert cold.read_bytes - before.read_bytes == 4 * MIB
    assert warm.read_bytes == cold.read_bytes


def test_without_accounting_it_is_unsupported(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="TASK_IO_ACCOUNTING"):
        process_io(tmp_path)
    assert not reset_peak_memory(tmp_path)


def test_the_peak_can_be_reset() -> None:
    block = bytearray(os.urandom(MIB)) * 64
    assert len(block) == 64 * MIB
    high = process_memory().peak_resident_bytes
    del block
    release_memory()
    if not reset_peak_memory():
        pytest.skip("/proc/self/clear_refs is not writable here")
    assert process_memory().peak_resident_bytes <= high - 32 * MIB


def test_a_child_dies_with_its_parent(tmp_path: Path) -> None:
    child = (
        "from dualblade.host.process import die_with_parent; import time, sys; die_with_parent();"
        "print('ready', flush=True); time.sleep(60)"
    )
    parent = (
        "import subprocess, sys, os, signal;"
        f"p = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE);"
        "p.stdout.readline(); print(p.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run(
        [sys.executable, "-c", parent], capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    pid = int(done.stdout)
    state = Path(f"/proc/{pid}/stat")
    for _ in range(1000):  # up to 10 s; a dead one may wait to be reaped
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] in "ZX":
            return
        time.sleep(0.01)
    pytest.fail(f"process {pid} still runs")


@pytest.mark.parametrize(("mask", "may"), [("0000000000004000", True), ("00000000a80405fb", False)])
def test_who_may_lock_memory_is_told_by_a_capability(
    tmp_path: Path, mask: str, *, may: bool
) -> None:
    """Root in a container need not have it."""
    (tmp_path / "proc/self").mkdir(parents=True)
    assert not may_lock_memory(tmp_path)
    (tmp_path / "proc/self/status").write_text(f"Name:\tx\nCapEff:\t{mask}\n")
    assert may_lock_memory(tmp_path) is may
