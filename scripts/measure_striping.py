#!/usr/bin/env python3
"""Measure that the bandwidth of striped devices adds up; write results/striping.json.

    sudo .venv/bin/python scripts/measure_striping.py FOLDER [--size SIZE]

Three loop devices over files in FOLDER, each with ext4, each throttled to 100 MB/s of reads and
writes by the blkio cgroup (v1): a speed that is known. `dualblade bench io` reads one, two and
three of them, and one and two with one request in flight on each. What was made is removed again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RATE = 100_000_000
DEVICES = 3
GROUP = Path("/sys/fs/cgroup/blkio/dualblade-striping")
RESULT = Path(__file__).resolve().parent.parent / "results" / "striping.json"


def run(*command: object) -> str:
    words = [str(word) for word in command]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()


@contextlib.contextmanager
def throttled_disk(folder: Path, number: int, size_bytes: int) -> Iterator[Path]:
    """A mounted file system on a loop device that our cgroup may use at RATE."""
    image, place = folder / f"image{number}", folder / f"disk{number}"
    image.touch()
    os.truncate(image, size_bytes)
    place.mkdir()
    with contextlib.ExitStack() as stack:
        device = run("losetup", "-f", "--show", "--direct-io=on", image)
        stack.callback(run, "losetup", "-d", device)
        run("mkfs.ext4", "-q", "-O", "^has_journal", "-E", "lazy_itable_init=0", device)
        run("mount", device, place)
        stack.callback(run, "umount", place)
        number_of = os.stat(device).st_rdev
        rule = f"{os.major(number_of)}:{os.minor(number_of)} {RATE}"
        for what in ("read", "write"):
            (GROUP / f"blkio.throttle.{what}_bps_device").write_text(rule)
        yield place


@contextlib.contextmanager
def throttle_group() -> Iterator[None]:
    GROUP.mkdir()
    try:
        yield
    finally:
        GROUP.rmdir()


def bench(places: list[Path], size: str, depth: int, repeats: int) -> dict[str, Any]:
    """One `bench io` in the throttled group; only the command is inside, not this process."""
    stores = [word for place in places for word in ("--store", str(place / "scratch"))]
    command = ["-m", "dualblade", "bench", "io", *stores, "--size", size, "--queue-depth"]
    command += [str(depth), "--repeats", str(repeats), "--json"]
    entered = f'echo $$ > {GROUP}/cgroup.procs && exec "$@"'
    words = ["sh", "-c", entered, "sh", sys.executable, *command]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", default="384MiB")
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    runs = []
    with (
        throttle_group(),
        tempfile.TemporaryDirectory(dir=asked.folder) as folder,
        contextlib.ExitStack() as disks,
    ):
        size_bytes = 640 << 20
        places = [
            disks.enter_context(throttled_disk(Path(folder), number, size_bytes))
            for number in range(DEVICES)
        ]
        for count, depth in ((1, 8), (2, 8), (3, 8), (1, 1), (2, 1)):
            result = bench(places[:count], asked.size, depth, asked.repeats)
            runs.append({"devices": count, "queue_depth_of_each": depth, **result})
    alone = runs[0]["read_bytes_per_second"]
    for each in runs:
        each["times_one_device"] = each["read_bytes_per_second"] / alone
        print(
            f"{each['devices']} devices, {each['queue_depth_of_each']} in flight on each: "
            f"{each['read_bytes_per_second'] / 1e6:.1f} MB/s read, "
            f"{each['write_bytes_per_second'] / 1e6:.1f} MB/s written"
        )
    told = {
        "benchmark": "striping",
        "command": "scripts/measure_striping.py FOLDER "
        f"--size {asked.size} --repeats {asked.repeats}",
        "throttle_bytes_per_second": RATE,
        "runs": runs,
    }
    RESULT.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
