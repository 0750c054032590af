#!/usr/bin/env python3
"""Decoding with threads that sleep at once while they wait, and that spin for a while before.

    python scripts/measure_spinning.py [--busy] [--repeats N] > results/spinning.json

GOMP_SPINCOUNT is the number of turns; 0 is OMP_WAIT_POLICY=passive alone. All counts in turn, on
the machine as it is or, with --busy, beside a program that takes a core's time without end. A run
is `dualblade bench decode` of SmolLM2's shape in memory and through the store.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from dualblade.host.machine import command_line, machine_facts

SPINS = (0, 1000, 3000, 10000)
MODES = ("memory", "direct", "dual")
MODEL = "random:smollm2-135m"
CONTEXT, STEPS, BUDGET = 4096, 12, "48MiB"


@contextlib.contextmanager
def busy_program() -> Iterator[None]:
    """A process that never waits."""
    child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        child.kill()
        child.wait()


def run(spins: int) -> dict[str, dict[str, float]]:
    """Seconds and CPU seconds of a step by mode."""
    command = [
        *(sys.executable, "-m", "dualblade", "bench", "decode", "--model", MODEL, "--json"),
        *("--context", str(CONTEXT), "--steps", str(STEPS), "--memory-budget", BUDGET),
    ]
    for mode in MODES:
        command += ["--mode", mode]
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": str(spins)}
    done = subprocess.run(command, env=environment, capture_output=True, check=True)
    runs: list[dict[str, Any]] = json.loads(done.stdout)["runs"]
    return {
        one["mode"]: {
            "step_seconds": one["step_seconds_median"],
            "cpu_seconds_per_step": one["cpu_seconds_per_step"],
        }
        for one in runs
    }


def main() -> int:
    """The command line; a status for the shell."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="of each count (3)")
    parser.add_argument("--busy", action="store_true", help="beside a program that never waits")
    options = parser.parse_args()
    runs = []
    for _ in range(options.repeats):
        for spins in SPINS:
            with busy_program() if options.busy else contextlib.nullcontext():
                runs.append({"spins": spins, "modes": run(spins)})
            print(runs[-1], file=sys.stderr)
    medians = [
        {
            "spins": spins,
            "step_seconds": {
                mode: statistics.median(
                    one["modes"][mode]["step_seconds"] for one in runs if one["spins"] == spins
                )
                for mode in MODES
            },
        }
        for spins in SPINS
    ]
    result = {
        "benchmark": "spinning",
        "command": command_line(),
        "machine": machine_facts(),
        "options": {"model": MODEL, "context": CONTEXT, "steps": STEPS, "memory_budget": BUDGET},
        "beside": "a busy program" if options.busy else "nothing",
        "repeats": options.repeats,
        "medians": medians,
        "runs": runs,
    }
    print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
