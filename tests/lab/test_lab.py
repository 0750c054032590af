"""Device tests in a guest with emulated NVMe drives: `make lab`. Never a figure of speed."""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import os
import select
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.lab.machine import CACHE, DRIVE_BYTES, ROOT, boot, missing, prepare

_BAD_SECTOR = (16 << 20) // 512  # of LABBAD: 16 MiB from its start


def drive_arguments(folder: Path) -> list[str]:
    """Seven drives with eight namespaces; the guest knows them by serial and namespace id."""
    for name in ("small", "four", "three", "bad", "gone", "lost", "meta"):
        with (folder / name).open("wb") as image:
            image.truncate(DRIVE_BYTES)

    def file(name: str) -> list[str]:
        at = f"driver=file,filename={folder / name},cache.direct=off,discard=unmap"
        return ["-blockdev", f"{at},node-name={name}"]

    bad = (
        f"driver=blkdebug,node-name=bad,discard=unmap,image.driver=file,image.filename={folder}/bad,"
        "inject-error.0.event=none,inject-error.0.iotype=read,inject-error.0.errno=5,"
        f"inject-error.0.sector={_BAD_SECTOR}"
    )
    slow = f"driver=nbd,node-name=slow,server.type=unix,server.path={folder.parent}/slow.socket"
    return [
        # 512-byte blocks, commands of at most 128 KiB.
        *file("small"),
        *("-device", "nvme,serial=LABSMALL,drive=small,mdts=5"),
        # Two namespaces whose ids are not those of their names; no limit to a command.
        *("-device", "nvme,id=two,serial=LABTWO,mdts=0"),
        *file("four"),
        *("-device", "nvme-ns,drive=four,bus=two,nsid=7,logical_block_size=4096,"
          "physical_block_size=4096"),
        *file("three"),
        *("-device", "nvme-ns,drive=three,bus=two,nsid=3"),
        *("-blockdev", bad, "-device", "nvme,serial=LABBAD,drive=bad"),
        *("-blockdev", slow + ",export=slow", "-device", "nvme,serial=LABSLOW,drive=slow"),
        # Two that can be unplugged.
        *("-device", "pcie-root-port,id=root1,chassis=1"),
        *file("gone"),
        *("-device", "nvme,id=gone-drive,bus=root1,serial=LABGONE,drive=gone"),
        *("-device", "pcie-root-port,id=root2,chassis=2"),
        *file("lost"),
        *("-device", "nvme,id=lost-drive,bus=root2,serial=LABLOST,drive=lost"),
        # Blocks of 512 bytes that carry 8 bytes of metadata each.
        *("-device", "nvme,id=withmeta,serial=LABMETA"),
        *file("meta"),
        *("-device", "nvme-ns,drive=meta,bus=withmeta,nsid=1,ms=8"),
    ]  # fmt: skip


GUESTS = {
    ("newest", "devices"): [
        "test_probe.py",
        "test_engines.py",
        "test_store.py",
        "test_contract.py",
    ],
    ("newest", "models"): [
        "test_generation.py",
        "test_permissions.py",
        "test_squeeze.py",
        "test_striped.py",
    ],
    # Debian 12's own kernel is the oldest that is at hand.
    ("stable", "devices"): ["test_engines.py", "test_contract.py::TestSmallBlocks"],
}
"""By kernel. At once: each has one emulated processor, and imports torch in 50 s or not at all."""


@pytest.mark.timeout(1200)
def test_devices_in_guests(tmp_path: Path) -> None:
    absent = missing()
    if absent:
        assert not os.environ.get("CI"), f"the lab needs {absent}: scripts/system_packages tests"
        pytest.skip(f"the lab needs {', '.join(absent)}: run scripts/system_packages tests")
    faulthandler.cancel_dump_traceback_later()  # minutes here are no deadlock
    folder = Path("tests/lab/guest")
    here = {path.name for path in (ROOT / folder).glob("test_*.py")}
    named = {test.partition("::")[0] for test in itertools.chain(*GUESTS.values())}
    assert here == named, "a file runs in no guest"
    wanted = {guest: [str(folder / file) for file in files] for guest, files in GUESTS.items()}
    if chosen := os.environ.get("DUALBLADE_LAB_TESTS"):
        wanted = {(os.environ.get("DUALBLADE_LAB_KERNEL", "newest"), "chosen"): chosen.split()}
    prepare()
    with ThreadPoolExecutor(len(wanted)) as pool:
        ends = [
            pool.submit(ended_guest, tmp_path / "-".join(guest), CACHE / guest[0], wanted[guest])
            for guest in wanted
        ]
        problems = [problem for end in ends if (problem := end.result()) is not None]
    assert not problems, "\n\n".join(problems)


_BOOTS_AND_WAITS = """
import time
from concurrent.futures import ThreadPoolExecutor
from tests.lab.machine import start

def boot():
    print(start(["sleep", "600"]).pid, flush=True)
    time.sleep(600)

ThreadPoolExecutor(1).submit(boot).result()
"""


def test_a_guest_ends_with_whoever_booted_it() -> None:
    """Killed, so that nothing of its own could tidy up; `boot` is called by a pool's thread."""
    command = [sys.executable, "-c", _BOOTS_AND_WAITS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        handle = os.pidfd_open(child)  # readable when the process has ended, even unreaped
        parent.kill()
    try:
        assert select.select([handle], [], [], 20)[0]
    finally:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(handle, signal.SIGKILL)
        os.close(handle)


_EMULATORS_FAULT = "PANIC: double fault"
"""What a guest's kernel told once so far, with part of an address (RDI's) in the processor's flags:
by all that it shows a fault of QEMU's emulation. A guest that tells it again fails the test."""


def ended_guest(folder: Path, kernel: Path, tests: list[str]) -> str | None:
    """As `run_guest`; once more where the emulator and no test ended it."""
    problem = run_guest(folder, kernel, tests)
    console = (folder / "console").read_text(errors="replace")
    if problem is None or _EMULATORS_FAULT not in console:
        return problem
    sys.stdout.write(f"the emulator failed ({folder / 'console'}); once more\n")
    return run_guest(folder.with_name(f"{folder.name}-again"), kernel, tests)


def run_guest(folder: Path, kernel: Path, tests: list[str]) -> str | None:
    """Boot a guest of `kernel` that runs `tests`, with all that it leaves in `folder`; None when
    they pass."""
    share, drives = folder / "share", folder / "drives"
    drives.mkdir(parents=True)
    share.mkdir()
    command = f"""
export HOME=/run TMPDIR=/run XDG_CACHE_HOME=/run/cache PYTHONDONTWRITEBYTECODE=1
export DUALBLADE_LAB_MODULES={kernel}/modules
export OMP_NUM_THREADS=1 DUALBLADE_LAB_GUEST=/mnt HYPOTHESIS_STORAGE_DIRECTORY=/run/hypothesis
cd {ROOT}
{sys.executable} -m pytest -p no:cacheprovider -o timeout=400 -o faulthandler_timeout=300 \\
  -v --tb=short --durations=15 --basetemp=/run/pytest --junitxml=/mnt/results.xml \\
  {" ".join(tests)} >/mnt/told 2>&1
"""
    log = folder / "console"
    status = boot(command, kernel, drive_arguments(drives), share, log)
    told = share / "told"
    text = told.read_text() if told.exists() else log.read_text(errors="replace")
    sys.stdout.write(text)
    if status != 0:
        return f"in the guest:\n{text}\nconsole: {log}"
    suite = ElementTree.parse(share / "results.xml").getroot()[0]
    return None if int(suite.get("tests", 0)) > int(suite.get("skipped", 0)) else text
