"""A QEMU guest with NVMe drives: its root is this machine's root, read-only.

So this machine's Python, virtual environment and builds run in it unchanged. Two shares: the root,
and a folder that both write to. The guest asks for what only its machine can do (stop a drive,
unplug one, count a drive's requests) by a file in that folder, and is answered by another.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("DUALBLADE_LAB_CACHE", ROOT / "build/lab"))
VIRTIOFSD = "/usr/lib/qemu/virtiofsd"
NEEDED = ("setpriv", "qemu-system-x86_64", VIRTIOFSD, "qemu-storage-daemon", "busybox", "cpio")
DRIVE_BYTES = 256 << 20
_MEMORY_MIB = 1536
_POLL_SECONDS = 0.05
# A guest that hangs is ended: the whole lab takes about three minutes.
_GUEST_SECONDS_MAX = 900


def missing() -> list[str]:
    """What the lab needs and this machine lacks: its architecture, programs, and root to share its
    root."""
    machine = [] if os.geteuid() == 0 else ["root"]
    if platform.machine() != "x86_64":
        machine.append("an x86_64 processor")
    return machine + [name for name in NEEDED if shutil.which(name) is None]


def prepare() -> None:
    """Have kernel and modules at hand; guests that boot at once would make them twice."""
    subprocess.run(["bash", "tests/lab/setup.sh"], cwd=ROOT, check=True)


def boot(command: str, kernel: Path, drives: Sequence[str], share: Path, log: Path) -> int:
    """Run `command` in a guest with a `kernel` (its folder, as `prepare` makes it) and `drives`
    (QEMU arguments); its exit status, 99 for none.

    `share` is /mnt in the guest; sockets and the slow drive are made beside it. After `prepare`.
    Blocks until the guest is off.
    """
    share.joinpath("command.sh").write_text(command)
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(log.open("wb"))
        shares = [("host", "/", "always"), ("out", str(share), "none")]
        sockets = [stack.enter_context(_shared(share.parent, *each)) for each in shares]
        control = share.parent / "qmp"
        server = stack.enter_context(_served(share.parent / "slow"))
        command_line = [*_machine(kernel, sockets, control), *drives]
        guest = start(command_line, stdout=output, stderr=subprocess.STDOUT)
        try:
            _serve(guest, server, control, share)
        finally:
            guest.kill()
            guest.wait()
    status = share / "status"
    return int(status.read_text()) if status.exists() else 99


def start(command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    """A process that the kernel kills when the thread that calls this is gone, however it went.

    The thread, not the process: so it is the one that waits for the guest to end. A program that
    takes on other credentials would be forgotten; none here does.
    """
    # Asked after the kernel has been told: a parent that is gone by then sends no signal.
    check = ["sh", "-c", '[ $PPID = "$0" ] && exec "$@"', str(os.getpid())]
    bound = ["setpriv", "--pdeathsig", "KILL", *check, *command]
    return subprocess.Popen(bound, stdin=subprocess.DEVNULL, **options)


@contextlib.contextmanager
def _shared(folder: Path, tag: str, source: str, cache: str) -> Iterator[tuple[str, Path]]:
    path = folder / f"{tag}.socket"
    daemon = start(
        [VIRTIOFSD, f"--socket-path={path}", "-o", f"source={source}", "-o", f"cache={cache}",
         "-o", "sandbox=chroot", "-o", "announce_submounts"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        while not path.exists():
            if daemon.poll() is not None:
                raise RuntimeError(f"virtiofsd ended with {daemon.returncode}")
            time.sleep(_POLL_SECONDS)
        yield tag, path
    finally:
        daemon.kill()
        daemon.wait()


@contextlib.contextmanager
def _served(place: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A network block device over `place`.img, at `place`.socket: a drive that can be stopped."""
    with place.with_suffix(".img").open("wb") as image:
        image.truncate(DRIVE_BYTES)
    daemon = start(
        ["qemu-storage-daemon",
         "--blockdev", f"driver=file,node-name=image,filename={place}.img",
         "--nbd-server", f"addr.type=unix,addr.path={place}.socket",
         "--export", "type=nbd,id=export,node-name=image,name=slow,writable=on"]
    )  # fmt: skip
    try:
        while not place.with_suffix(".socket").exists():
            time.sleep(_POLL_SECONDS)
        yield daemon
    finally:
        daemon.kill()
        daemon.wait()


def _machine(kernel: Path, sockets: Sequence[tuple[str, Path]], control: Path) -> list[str]:
    arguments = [
        "qemu-system-x86_64",
        # One processor: with two, code that the kernel patches in itself (static keys) was seen
        # half-changed by the other one under emulation, and the kernel died of it while booting.
        *("-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "1", "-m", str(_MEMORY_MIB)),
        *("-machine", "q35,memory-backend=m"),
        *("-object", f"memory-backend-memfd,id=m,size={_MEMORY_MIB}M,share=on"),
        *("-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot"),
        *("-kernel", str(kernel / "vmlinux"), "-initrd", str(kernel / "initrd.gz")),
        *("-append", "console=ttyS0 loglevel=5 panic=-1 mitigations=off nvme.poll_queues=1"),
        *("-qmp", f"unix:{control},server=on,wait=off"),
    ]
    for tag, path in sockets:
        arguments += ["-chardev", f"socket,id={tag},path={path}"]
        arguments += ["-device", f"vhost-user-fs-pci,queue-size=1024,chardev={tag},tag={tag}"]
    return arguments


def _serve(
    guest: subprocess.Popen[bytes], server: subprocess.Popen[bytes], control: Path, share: Path
) -> None:
    """Answer what the guest asks until it is off."""
    deadline = time.monotonic() + _GUEST_SECONDS_MAX
    with socket.socket(socket.AF_UNIX) as connection:
        while guest.poll() is None:
            with contextlib.suppress(OSError):
                connection.connect(str(control))
                break
            time.sleep(_POLL_SECONDS)
        if guest.poll() is not None:
            return
        stream = connection.makefile("rw")
        _command(stream, {"execute": "qmp_capabilities"})
        while guest.poll() is None and time.monotonic() < deadline:
            asked = share / "ask"
            if asked.exists():
                wanted = json.loads(asked.read_text())
                asked.unlink()
                if wanted["execute"] == "pause":
                    answer = _pause(server, wanted["arguments"]["seconds"])
                else:
                    answer = _command(stream, wanted)
                share.joinpath("answer.new").write_text(json.dumps(answer))
                share.joinpath("answer.new").rename(share / "answer")
            time.sleep(_POLL_SECONDS)


def _pause(server: subprocess.Popen[bytes], seconds: float) -> dict[str, Any]:
    """Stop the slow drive's server now, and let it go on after `seconds`."""
    server.send_signal(signal.SIGSTOP)
    threading.Timer(seconds, server.send_signal, [signal.SIGCONT]).start()
    return {"return": {}}


def _command(stream: Any, command: dict[str, Any]) -> Any:
    """One QMP command and its answer; events in between are passed over."""
    with contextlib.suppress(ConnectionError):
        stream.write(json.dumps(command) + "\n")
        stream.flush()
        for line in stream:
            answer = json.loads(line)
            if "return" in answer or "error" in answer:
                return answer
    return {"error": "the guest is gone"}
