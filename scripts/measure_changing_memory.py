#!/usr/bin/env python3
"""Decoding while the memory changes: a limit that falls and rises again under a running text.

    sudo python scripts/measure_changing_memory.py [--repeats N] > results/changing-memory.json

Each run is a process in a memory cgroup of its own that leaves the cache 75 % of its KV at first,
then 25 %, then 75 % again, for some seconds each; the limit changes between two steps, and the time
that the kernel takes for it is not a step's. What counts is how many tokens come in the same time.
Beside `dual` run what does not adapt: the fixed splits that fit 75 % and 25 % beside staging and
tails, all direct, all through the page cache, and mapped files, by the read-ahead that was best of
those tried (docs/performance.md).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings
from contextlib import ExitStack
from typing import Any

import torch

from dualblade.bench.child_run import ChildOptions, Clock, cache_stats, device_io, load, open_cache
from dualblade.bench.decode import DecodeBenchOptions
from dualblade.bench.decode_child import Decoder
from dualblade.bench.decode_rows import fill, kv_bytes
from dualblade.bench.envelope import MODEL
from dualblade.bench.series import in_turn
from dualblade.bench.workload import calibrate, parse_mode, read_ahead_of
from dualblade.cli.command import ending_at_signals
from dualblade.cli.output import write_json
from dualblade.errors import BudgetError
from dualblade.host.cgroup import MemoryCgroup, MemoryLimit
from dualblade.host.machine import command_line, machine_facts
from dualblade.host.threads import wait_briefly
from dualblade.store import cache_directory

MODES = ("mmap+read_ahead=1MiB", "page-cache", "direct", "static-60", "static-12", "dual")
PHASES = ((0.75, 10.0), (0.25, 15.0), (0.75, 15.0))
"""Of the KV in memory, and for how many seconds."""

CONTEXT = 4096
WARM_STEPS = 3
STEPS_MAX = 600
"""Room is made for so many: more than come in that time here, not many times more, for mapped files
pay for it in buffers."""
FIRST_TOKENS = 40
"""All modes are to give the same ones; how many there are in all differs."""

_TRIES = 200


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3, help="of each mode (3)")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        given = json.loads(sys.stdin.read())
        out, sys.stdout = sys.stdout, sys.stderr  # whatever libraries print is not the result
        out.write(json.dumps(decode(ChildOptions(**given["options"]), given["limits"])))
        return
    with warnings.catch_warnings(action="ignore"):  # torch is imported; the processes heed it
        wait_briefly()
    workload = DecodeBenchOptions(
        model=MODEL, context=CONTEXT, attention="tiles", steps=STEPS_MAX, warmup_steps=WARM_STEPS
    )
    calibration = calibrate(workload, lambda line: print(line, file=sys.stderr))
    runs = []
    for repeat in range(asked.repeats):
        for mode in in_turn(MODES, repeat):
            runs.append({"mode": mode, "repeat": repeat, **one_run(workload, mode, calibration)})
            told = "killed" if runs[-1]["oom_killed"] else f"{runs[-1]['tokens']} tokens"
            print(f"{repeat + 1}/{asked.repeats} {mode}: {told}", file=sys.stderr)
    first = {run["first_tokens_sha256"] for run in runs if (run["tokens"] or 0) >= FIRST_TOKENS}
    write_json(
        {
            "benchmark": "changing-memory",
            "command": command_line(),
            "model": MODEL,
            "context": CONTEXT,
            "repeats": asked.repeats,
            "phases": [{"fraction": part, "seconds": seconds} for part, seconds in PHASES],
            "kv_bytes": calibration["kv_bytes"],
            "tokens_agree": len(first) == 1,
            "summary": summary(runs),
            "machine": machine_facts(str(cache_directory())),
            "runs": runs,
        }
    )


def one_run(workload: DecodeBenchOptions, mode: str, calibration: dict[str, Any]) -> dict[str, Any]:
    """In a process and cgroup of its own; a reserve leaves the cache what was asked for."""
    parts = parse_mode(mode)
    base = calibration["base_bytes"]
    options = workload.child_options(
        task="run",
        mode=parts.path,
        memory_budget="auto",
        engine={**parts.settings, "memory_reserve_bytes": base - calibration["loaded_bytes"]},
    )
    limits = [base + int(fraction * calibration["kv_bytes"]) for fraction, _ in PHASES]
    with MemoryCgroup() as group, read_ahead_of(workload, mode):
        options["cgroup_directory"] = str(group.directory)
        options["cgroup_version"] = group.limit.version
        child = group.popen(
            [sys.executable, __file__, "--child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        out, _ = child.communicate(json.dumps({"options": options, "limits": limits}))
        if group.was_oom_killed(child.returncode):
            return {"oom_killed": True, "tokens": None, "first_tokens_sha256": None}
    if child.returncode:
        raise SystemExit(f"{mode} ended with {child.returncode}")
    return {"oom_killed": False, **json.loads(out)}


def decode(options: ChildOptions, limits: list[int]) -> dict[str, Any]:
    """The child: a filled cache, and steps while its limit changes."""
    limit = options.cgroup()
    assert limit is not None
    with torch.inference_mode(), ExitStack() as stack:
        model, rows = load(options)
        change(limit, limits[0])
        cache = stack.enter_context(open_cache(options, model))
        fill(rows, options.context, cache, model.device)
        decoder = Decoder(model, cache, options.batch)
        for _ in range(WARM_STEPS):
            decoder.timed()
        began, phases, steps = Clock.now(), [], []
        for number, (_, seconds) in enumerate(PHASES):
            changing = time.perf_counter()
            if number:
                change(limit, limits[number])
            started, read = time.perf_counter(), device_io(cache_stats(cache)).read_bytes
            while (at := time.perf_counter() - started) < seconds:
                steps.append({"phase": number, "at_seconds": at, "seconds": decoder.timed()[0]})
            phases.append(
                {
                    "change_seconds": started - changing,
                    "seconds": time.perf_counter() - started,
                    "device_read_bytes": device_io(cache_stats(cache)).read_bytes - read,
                }
            )
        stolen = Clock.now().stolen_fraction(began)
        events = cache_stats(cache).get("events", [])
        made = len(decoder.tokens) - WARM_STEPS
        del decoder.tokens[FIRST_TOKENS:]
        return {
            "kv_bytes": kv_bytes(rows.shapes, options.batch, options.context),
            "tokens": made,
            "first_tokens_sha256": decoder.sha256(),
            "phases": phases,
            "steps": steps,
            "events": events,
            "stolen_fraction": stolen,
        }


def change(limit: MemoryLimit, size_bytes: int) -> None:
    """The kernel frees page cache until the new limit holds, and may need several tries."""
    for _ in range(_TRIES):
        try:
            limit.set(size_bytes)
        except BudgetError:
            time.sleep(0.02)
        else:
            return
    limit.set(size_bytes)


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each mode, medians over its runs: tokens a second in each phase and in all, the median
    and the longest step of a phase."""
    found = []
    for mode in MODES:
        its = [run for run in runs if run["mode"] == mode and not run["oom_killed"]]
        entry: dict[str, Any] = {"mode": mode, "runs": len(its)}
        if its:
            entry["tokens_per_second"] = statistics.median(
                run["tokens"] / sum(phase["seconds"] for phase in run["phases"]) for run in its
            )
            entry["phases"] = [phase_summary(its, number) for number in range(len(PHASES))]
        found.append(entry)
    return found


def phase_summary(runs: list[dict[str, Any]], number: int) -> dict[str, float]:
    steps = [[s["seconds"] for s in run["steps"] if s["phase"] == number] for run in runs]
    return {
        "tokens_per_second": statistics.median(
            len(some) / run["phases"][number]["seconds"]
            for some, run in zip(steps, runs, strict=True)
        ),
        "step_seconds_median": statistics.median(statistics.median(some) for some in steps),
        "step_seconds_max": max(max(some) for some in steps),
        "change_seconds": statistics.median(
            run["phases"][number]["change_seconds"] for run in runs
        ),
    }


if __name__ == "__main__":
    with ending_at_signals():
        main()
