#!/usr/bin/env python3
"""Read one file by dualblade's engine and by DeepSpeed's async_io in turn; write
results/deepspeed.json.

    .venv/bin/python scripts/measure_deepspeed.py FILE [--size SIZE] [--repeats N]

FILE is made by `dualblade bench io` if missing, and kept; it should lie on the drive to measure.
DeepSpeed is not a dependency. It is had by `apt-get install libaio-dev` and
`pip install --no-build-isolation deepspeed` (it compiles async_io at its first use, some minutes).

Both read with O_DIRECT, requests of 1 MiB. DeepSpeed is given its best: a pinned buffer of 256 MiB
that is read into again and again, as DeepSpeed allocates it (pages of 4 KiB) and collapsed to huge
pages, as ours are (Linux 6.1 or newer), and whichever of its settings (threads, requests of a
thread in flight) is fastest in a first pass over all of them.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from dualblade.bench.io import HEADER_BYTES
from dualblade.host.machine import machine_facts
from dualblade.units import GIB, MIB, parse_size

RESULT = Path(__file__).resolve().parent.parent / "results" / "deepspeed.json"
BUFFER_BYTES = 256 * MIB
THREADS = (1, 2, 4, 8)
QUEUE_DEPTHS = (8, 32)
PAGES = ("4KiB", "huge")
MADV_COLLAPSE = 25
OURS_QUEUE_DEPTH = 8


class DeepSpeed:
    """Its handle with one setting, and a pinned buffer in pages of that size."""

    def __init__(self, pages: str, threads: int, queue_depth: int) -> None:
        import torch
        from deepspeed.ops.op_builder import AsyncIOBuilder

        self.setting = {"pages": pages, "threads": threads, "queue_depth": queue_depth}
        # block size, queue depth, one submission for each request, overlap of waiting, threads
        self._handle = AsyncIOBuilder().load().aio_handle(MIB, queue_depth, False, True, threads)
        self._buffer = self._handle.new_cpu_locked_tensor(
            BUFFER_BYTES, torch.empty(0, dtype=torch.uint8)
        )
        if pages == "huge":
            collapse(self._buffer.data_ptr(), BUFFER_BYTES)

    def read(self, file: Path, size_bytes: int) -> dict[str, float]:
        """One pass over the file."""
        cpu, began = cpu_seconds(), time.perf_counter()
        for at in range(0, size_bytes, BUFFER_BYTES):
            read = self._handle.sync_pread(self._buffer, str(file), HEADER_BYTES + at)
            if read < 0:
                raise SystemExit(f"DeepSpeed's read at {at} failed: {read}")
        seconds, cpu = time.perf_counter() - began, cpu_seconds() - cpu
        return {
            "bytes_per_second": size_bytes / seconds,
            "cpu_seconds_per_gib": cpu * GIB / size_bytes,
        }

    def close(self) -> None:
        self._handle.free_cpu_locked_tensor(self._buffer)


def collapse(address: int, size_bytes: int) -> None:
    """Put memory that is there into huge pages."""
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = ctypes.c_void_p(address), ctypes.c_size_t(size_bytes), MADV_COLLAPSE
    if libc.madvise(*arguments) != 0:
        raise SystemExit(f"no huge pages for DeepSpeed: {os.strerror(ctypes.get_errno())}")


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def ours(file: Path, size_bytes: int) -> dict[str, float]:
    """One pass of `dualblade bench io`, which writes the file first."""
    done = subprocess.run(
        [
            sys.executable, "-m", "dualblade", "bench", "io", "--store", str(file),
            "--size", str(size_bytes), "--chunk", "1MiB",
            "--queue-depth", str(OURS_QUEUE_DEPTH), "--repeats", "1", "--json",
        ],
        check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    (read,) = json.loads(done.stdout)["reads"]
    return {name: read[name] for name in ("bytes_per_second", "cpu_seconds_per_gib")}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--size", type=parse_size, default=2 * GIB)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    if options.size % BUFFER_BYTES:
        parser.error("--size must be a multiple of 256MiB")
    try:
        import deepspeed
    except ImportError:
        parser.error("DeepSpeed is not installed: see --help")
    ours(options.file, options.size)  # makes the file
    tried: list[dict[str, Any]] = []
    for setting in itertools.product(PAGES, THREADS, QUEUE_DEPTHS):
        peer = DeepSpeed(*setting)
        tried.append({**peer.setting, **peer.read(options.file, options.size)})
        peer.close()
    best = max(tried, key=lambda one: one["bytes_per_second"])
    peer = DeepSpeed(best["pages"], best["threads"], best["queue_depth"])
    pairs = []
    for _ in range(options.repeats):
        # Ours has read the file once before it is timed; so has the peer, after our writes.
        measured = ours(options.file, options.size)
        peer.read(options.file, options.size)
        pair = {
            "dualblade": measured,
            "deepspeed": peer.read(options.file, options.size),
        }
        pairs.append(pair)
        print({name: f"{one['bytes_per_second'] / GIB:.2f} GiB/s" for name, one in pair.items()})
    peer.close()
    result = {
        "command": f"scripts/measure_deepspeed.py FILE --repeats {options.repeats}",
        "deepspeed": deepspeed.__version__,
        "deepspeed_setting": peer.setting,
        "deepspeed_tried": tried,
        "size_bytes": options.size,
        "throughput_ratio_median": statistics.median(
            pair["dualblade"]["bytes_per_second"] / pair["deepspeed"]["bytes_per_second"]
            for pair in pairs
        ),
        "cpu_ratio_median": statistics.median(
            pair["dualblade"]["cpu_seconds_per_gib"] / pair["deepspeed"]["cpu_seconds_per_gib"]
            for pair in pairs
        ),
        "pairs": pairs,
        "machine": machine_facts(str(options.file)),
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{result['throughput_ratio_median']:.2f} times its speed; written to {RESULT}")


if __name__ == "__main__":
    main()
