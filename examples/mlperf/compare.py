"""MLPerf Storage's KV-cache benchmark with its own NVMe tier and with dualblade's, in turn.

    python compare.py CHECKOUT FOLDER --output results.json

CHECKOUT is a clone of MLCommons' `storage` repository, FOLDER is on the drive. Each run is a
process of its own with all objects on the drive, no tier in memory before it and no time for
computing; repeats are interleaved because drives change speed, and fio reads a file beside each.
"""

# ruff: noqa: T201 - an example prints

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from dualblade.bench.fio import FioYardstick
from dualblade.host.machine import command_line, machine_facts
from dualblade.units import GIB, MIB

TIER = Path(__file__).resolve().parent / "dualblade_tier.py"
TIERS = ("dualblade", "theirs")
# The benchmark's words for its ways: a node that only reads what others wrote (ten objects of
# 2048 tokens a user, written before), one that only writes, and both.
WORKLOADS = {"read": ["--decode-only"], "write": ["--prefill-only"], "both": []}
MEASURES = tuple(
    f"storage_{way}_{part}p{percent}_ms"
    for way in ("read", "write")
    for part in ("", "device_", "host_")
    for percent in (50, 95)
)


def arguments(options: argparse.Namespace) -> list[str]:
    """Of kv-cache.py, the same for all, but for paths."""
    return [
        *("--model", options.model, "--num-users", str(options.users)),
        *("--duration", str(options.seconds), "--seed", "1"),
        *("--gpu-mem-gb", "0", "--cpu-mem-gb", "0", "--generation-mode", "none"),
        *("--storage-capacity-gb", str(options.capacity_gib), "--max-concurrent-allocs", "4"),
        *("--performance-profile", "throughput", "--log-level", "WARNING"),
    ]


def benchmark_of(checkout: Path) -> Path:
    return checkout / "kv_cache_benchmark"


def run(tier: str, workload: str, options: argparse.Namespace) -> dict[str, Any]:
    """One run: what the benchmark says of its storage tier. Raises: SystemExit when it failed."""
    with tempfile.TemporaryDirectory(prefix=".mlperf-", dir=options.folder) as place:
        output = Path(place) / "output.json"
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [
                *(sys.executable, str(TIER), tier, *arguments(options), *WORKLOADS[workload]),
                *("--config", str(benchmark_of(options.checkout) / "config.yaml")),
                *("--cache-dir", str(Path(place) / "objects"), "--output", str(output)),
            ],
            capture_output=True, text=True, check=False,
            env={**os.environ, "PYTHONPATH": str(benchmark_of(options.checkout))},
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"{tier}, {workload} failed:\n{done.stdout}{done.stderr}")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        summary = json.loads(output.read_text())["summary"]
    stats = summary["cache_stats"]
    return {
        "tier": tier,
        "workload": workload,
        "seconds": summary["elapsed_time"],
        "requests": summary["total_requests"],
        "read_bytes": stats["tier_storage_kv_bytes_read_gb"] * GIB,
        "written_bytes": stats["tier_storage_kv_bytes_written_gb"] * GIB,
        # Of the whole process: what is made to be written, and written before, too.
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        **{name: stats[name] for name in MEASURES if name in stats},
    }


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """All runs, interleaved."""
    runs: list[dict[str, Any]] = []
    with FioYardstick(options.folder, size_bytes=GIB, chunk_bytes=MIB, queue_depth=8) as fio:
        for repeat in range(options.repeats):
            for workload in WORKLOADS:
                for tier in TIERS[:: 1 if repeat % 2 == 0 else -1]:
                    beside = fio.measure()
                    runs.append({"repeat": repeat, "fio": beside, **run(tier, workload, options)})
                    moved = runs[-1]["read_bytes"] + runs[-1]["written_bytes"]
                    print(
                        f"{repeat + 1}/{options.repeats} {workload}, {tier}: "
                        f"{moved / runs[-1]['seconds'] / MIB:.0f} MiB/s",
                        file=sys.stderr,
                    )
    commit = subprocess.run(
        ["git", "-C", str(options.checkout), "rev-parse", "HEAD"],
        stdout=subprocess.PIPE, text=True, check=False,
    ).stdout.strip()  # fmt: skip
    return {
        "command": command_line(),
        "machine": machine_facts(options.folder),
        "benchmark_commit": commit or None,
        "arguments": arguments(options),
        "workloads": WORKLOADS,
        "runs": runs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", type=Path, help="of MLCommons' storage repository")
    parser.add_argument("folder", type=Path, help="on the drive; 20 GiB free")
    parser.add_argument("--model", default="tiny-1b", help="of the benchmark's config.yaml")
    parser.add_argument("--users", type=int, default=16)
    parser.add_argument("--seconds", type=int, default=30, help="of each run")
    parser.add_argument("--capacity-gib", type=int, default=12, help="of the tier")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON; default: standard output")
    options = parser.parse_args()
    options.checkout = options.checkout.resolve()
    if not (benchmark_of(options.checkout) / "kv_cache" / "backends.py").exists():
        parser.error(f"{options.checkout} has no kv_cache_benchmark: is it MLCommons' storage?")
    text = json.dumps(compare(options), indent=1) + "\n"
    if options.output is None:
        print(text, end="")
    else:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
