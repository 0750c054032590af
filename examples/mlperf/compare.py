"""MLPerf Storage's KV-cache benchmark with its own NVMe tier and with dualblade's, in turn.

    python compare.py CHECKOUT FOLDER --output results.json

CHECKOUT is a clone of MLCommons' `storage` repository, FOLDER is on the drive. Each run is a
process of its own with all objects on the drive, no tier in memory before it and no time for
computing; repeats are interleaved because drives change speed, and fio reads a file beside each.
What counts is every read and write that ends within the run's seconds after the first one began:
the benchmark's own rates count what ends when its clock has stopped. Each finished run is kept.
"""

# ruff: noqa: T201 - an example prints

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dualblade.bench.fio import SECONDS, FioYardstick
from dualblade.host.machine import command_line, machine_facts
from dualblade.units import GIB, MIB

TIER = Path(__file__).resolve().parent / "dualblade_tier.py"
TIERS = ("dualblade", "theirs")
# The benchmark's words for its ways: a node that only reads what others wrote (ten objects of 2048
# tokens a user, written before the clock starts), one that only writes, and both.
WORKLOADS = {
    "read": ["--decode-only"],
    "write": ["--prefill-only", "--disable-multi-turn"],  # which reads what was said before
    "both": [],
}


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
    """One run. Raises: SystemExit when it failed."""
    with tempfile.TemporaryDirectory(prefix=".mlperf-", dir=options.folder) as place:
        log = Path(place) / "log"
        done = subprocess.run(
            [
                *(sys.executable, str(TIER), tier, *arguments(options), *WORKLOADS[workload]),
                *("--config", str(benchmark_of(options.checkout) / "config.yaml")),
                *("--cache-dir", str(Path(place) / "objects")),
                *("--output", str(Path(place) / "output.json")),
            ],
            capture_output=True, text=True, check=False,
            env={
                **os.environ,
                "PYTHONPATH": str(benchmark_of(options.checkout)),
                "DUALBLADE_TIER_LOG": str(log),
            },
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"{tier}, {workload} failed:\n{done.stdout}{done.stderr}")
        calls = [json.loads(line) for line in log.read_text().splitlines()]
    return {"tier": tier, "workload": workload, **figures(calls, workload, options.seconds)}


def figures(calls: list[list[Any]], workload: str, seconds: float) -> dict[str, Any]:
    """Of the reads and writes that ended within `seconds` after the first began; what was written
    before the reads of a node that only reads does not count."""
    counted = [call for call in calls if workload != "read" or call[0] == "read"]
    first = min(counted, key=lambda call: call[1])
    counted = [call for call in counted if call[1] + call[2] <= first[1] + seconds]
    found: dict[str, Any] = {"seconds": seconds}
    for way in ("read", "write"):
        mine = [call for call in counted if call[0] == way]
        found[f"{way}s"] = len(mine)
        found[f"{way}_bytes"] = sum(call[4] for call in mine)
        if len(mine) > 1:
            cuts = statistics.quantiles((call[2] for call in mine), n=20, method="inclusive")
            found |= {f"{way}_p50_seconds": cuts[9], f"{way}_p95_seconds": cuts[18]}
    # From the end of the first to the end of the last: what it takes to begin is left out.
    cpu = [call[3] for call in counted]
    moved = sum(call[4] for call in counted) - min(counted, key=lambda call: call[3])[4]
    found["cpu_seconds_per_gib"] = (max(cpu) - min(cpu)) / (moved / GIB) if moved else None
    return found


def compare(
    options: argparse.Namespace, keep: Callable[[list[dict[str, Any]]], None]
) -> list[dict[str, Any]]:
    """All runs, interleaved; `keep` gets those that are finished after each."""
    runs: list[dict[str, Any]] = []
    with FioYardstick(options.folder, size_bytes=GIB, chunk_bytes=MIB, queue_depth=8) as fio:
        for repeat in range(options.repeats):
            for workload in WORKLOADS:
                for tier in TIERS[:: 1 if repeat % 2 == 0 else -1]:
                    beside = fio.measure(options.fio_seconds)
                    runs.append({"repeat": repeat, "fio": beside, **run(tier, workload, options)})
                    moved = runs[-1]["read_bytes"] + runs[-1]["write_bytes"]
                    print(
                        f"{repeat + 1}/{options.repeats} {workload}, {tier}: "
                        f"{moved / runs[-1]['seconds'] / MIB:.0f} MiB/s",
                        file=sys.stderr,
                    )
                    keep(runs)
    return runs


def result_of(options: argparse.Namespace, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What is written."""
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
    parser.add_argument("--fio-seconds", type=float, default=SECONDS, help="beside each run")
    parser.add_argument("--output", type=Path, help="JSON; default: standard output")
    options = parser.parse_args()
    options.checkout = options.checkout.resolve()
    if not (benchmark_of(options.checkout) / "kv_cache" / "backends.py").exists():
        parser.error(f"{options.checkout} has no kv_cache_benchmark: is it MLCommons' storage?")

    def text(runs: list[dict[str, Any]]) -> str:
        return json.dumps(result_of(options, runs), indent=1) + "\n"

    def keep(runs: list[dict[str, Any]]) -> None:
        if options.output is not None:
            options.output.write_text(text(runs))

    runs = compare(options, keep)
    if options.output is None:
        print(text(runs), end="")


if __name__ == "__main__":
    main()
