#!/usr/bin/env python3
"""What `dual` costs where all KV fits: its steps and those of `memory`, turn by turn.

    python scripts/measure_fits.py [--processes N] [--rounds N] > results/fits.json

Both caches hold the same rows beside one model and take turns of two steps, beginning with another
one each time. Steps of two processes differ by a quarter and more though they do the same
(budgets-fits.json), for each has its memory elsewhere and its own minute of a shared machine; a few
milliseconds are seen only side by side. Each case is measured in several processes after the pages
were verified as often as a text of some length does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import warnings
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dualblade.bench.child_run import ChildOptions, Clock, load, open_cache
from dualblade.bench.decode_child import Decoder
from dualblade.bench.decode_rows import fill, kv_bytes
from dualblade.bench.envelope import MODEL
from dualblade.cli.output import write_json
from dualblade.host.machine import command_line, machine_facts
from dualblade.host.threads import wait_briefly
from dualblade.store import cache_directory

MODES = ("memory", "dual")
WARM_STEPS = 18
STEPS_A_TURN = 2


@dataclass(frozen=True)
class Case:
    name: str
    model: str
    batch: int
    context: int


CASES = (
    Case("narrow layers", MODEL, 1, 4096),
    Case("narrow layers, short", MODEL, 1, 1000),
    Case("OPT-1.3B", "random:opt-1.3b", 8, 1000),
    Case("Llama-3.2-1B", "random:llama-3.2-1b", 1, 32_000),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=5, help="of each case (5)")
    parser.add_argument("--rounds", type=int, default=30, help="in each process (30)")
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)  # a process of this case
    asked = parser.parse_args()
    if asked.only is not None:
        sys.stdout.write(json.dumps(one_process(CASES[asked.only], asked.rounds)) + "\n")
        return
    with warnings.catch_warnings(action="ignore"):  # torch is imported; the processes heed it
        wait_briefly()
    runs: list[list[dict[str, Any]]] = [[] for _ in CASES]
    for turn in range(asked.processes):
        for index, case in enumerate(CASES):
            runs[index].append(in_a_process(index, asked.rounds))
            ratio = runs[index][-1]["step_ratio_median"]
            sys.stderr.write(f"{turn + 1}/{asked.processes} {case.name}: {ratio:.2f}\n")
    write_json(
        {
            "command": command_line(),
            "cases": [
                {**asdict(case), **summary(some)} for case, some in zip(CASES, runs, strict=True)
            ],
            "machine": machine_facts(str(cache_directory())),
        }
    )


def in_a_process(index: int, rounds: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--only", str(index), "--rounds", str(rounds)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the processes, and these."""
    return {
        "kv_bytes": runs[0]["kv_bytes"],
        "step_ratio_median": statistics.median(run["step_ratio_median"] for run in runs),
        **{
            f"{mode}_step_seconds_median": statistics.median(
                run[f"{mode}_step_seconds_median"] for run in runs
            )
            for mode in MODES
        },
        "processes": runs,
    }


def one_process(case: Case, rounds: int) -> dict[str, Any]:
    turns = rounds * STEPS_A_TURN
    with torch.inference_mode(), ExitStack() as stack:
        made = options(case, MODES[0], turns)
        model, rows = load(made)
        decoders = {}
        for mode in MODES:
            cache = stack.enter_context(open_cache(options(case, mode, turns), model))
            fill(rows, case.context, cache, model.device)
            decoders[mode] = Decoder(model, cache, case.batch)
        for _ in range(WARM_STEPS):
            for decoder in decoders.values():
                decoder.step()
        began = Clock.now()
        seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
        for turn in range(rounds):
            for mode in MODES if turn % 2 else reversed(MODES):
                took = [decoders[mode].timed()[0] for _ in range(STEPS_A_TURN)]
                seconds[mode].append(sum(took) / STEPS_A_TURN)
        stolen = Clock.now().stolen_fraction(began)
        assert decoders["dual"].sha256() == decoders["memory"].sha256(), "other tokens"
    return {
        "kv_bytes": kv_bytes(rows.shapes, case.batch, case.context),
        "step_ratio_median": statistics.median(
            dual / memory for dual, memory in zip(seconds["dual"], seconds["memory"], strict=True)
        ),
        **{f"{mode}_step_seconds_median": statistics.median(seconds[mode]) for mode in MODES},
        "stolen_fraction": stolen,
    }


def options(case: Case, mode: str, steps: int) -> ChildOptions:
    return ChildOptions(
        task="run", model=case.model, dtype="bfloat16", batch=case.batch, context=case.context,
        seed=0, attention="tiles", mode=mode, warmup_steps=WARM_STEPS, steps=steps,
    )  # fmt: skip


if __name__ == "__main__":
    main()
