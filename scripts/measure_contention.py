#!/usr/bin/env python3
"""What computing and reading take from each other, without dualblade's engine between them.

    python scripts/measure_contention.py [--model MODEL] [--context N] > results/contention.json

In turn: decode steps with all KV in memory; fio on the drive (O_DIRECT, 1 MiB, 8 in flight, huge
pages); both at once. What fio still delivers beside the steps is the roof of any engine that reads
while this model computes, and what a step then takes is the floor of such a step. On a drive that
shares memory and processor with the model both are slower than alone.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from typing import Any

import torch

from dualblade.bench.child_run import ChildOptions, load, open_cache
from dualblade.bench.decode_child import Decoder
from dualblade.bench.decode_rows import fill, kv_bytes
from dualblade.bench.fio import FioYardstick
from dualblade.cli.output import write_json
from dualblade.host.machine import command_line, machine_facts
from dualblade.store import cache_directory
from dualblade.units import GIB, MIB

NARROW = (
    "random:llama?layers=24,hidden=256,heads=32,kv_heads=32,head_dim=64,intermediate=256,"
    "vocab=1000,positions=8192"
)
"""The model of the scenarios quick and budgets, but for its positions."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=NARROW)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    options = ChildOptions(
        task="run", model=asked.model, dtype="bfloat16", batch=1, context=asked.context, seed=0,
        steps=2000, attention="tiles",
    )  # fmt: skip
    folder = cache_directory()
    yardstick = FioYardstick(folder, size_bytes=GIB, chunk_bytes=MIB, queue_depth=8)
    model, rows = load(options)
    rounds: list[dict[str, float]] = []
    with yardstick as fio, torch.inference_mode(), open_cache(options, model) as cache:
        fill(rows, options.context, cache, model.device)
        decoder = Decoder(model, cache, options.batch)
        for _ in range(10):
            decoder.step()
        for _ in range(asked.repeats):
            alone = steps_until(decoder, time.perf_counter() + asked.seconds)
            fio_alone = fio.measure(asked.seconds)["read_bytes_per_second"]
            beside, fio_beside = both(decoder, fio, asked.seconds)
            rounds.append(
                {
                    "step_seconds_alone": alone,
                    "step_seconds_beside_fio": beside,
                    "fio_bytes_per_second_alone": fio_alone,
                    "fio_bytes_per_second_beside_steps": fio_beside,
                }
            )
    write_json(
        {
            "command": command_line(),
            "model": asked.model,
            "context": asked.context,
            "kv_bytes": kv_bytes(rows.shapes, 1, asked.context),
            "step_ratio_median": ratio(rounds, "step_seconds_beside_fio", "step_seconds_alone"),
            "fio_ratio_median": ratio(
                rounds, "fio_bytes_per_second_beside_steps", "fio_bytes_per_second_alone"
            ),
            "rounds": rounds,
            "machine": machine_facts(str(folder)),
        }
    )


def ratio(rounds: list[dict[str, float]], one: str, other: str) -> float:
    return statistics.median(each[one] / each[other] for each in rounds)


def steps_until(decoder: Decoder, end: float) -> float:
    """Median seconds of the steps that begin before `end`."""
    seconds = []
    while time.perf_counter() < end:
        seconds.append(decoder.timed()[0])
    return statistics.median(seconds)


def both(decoder: Decoder, fio: FioYardstick, seconds: float) -> tuple[float, float]:
    """Median seconds of a step while fio reads, and what fio read a second meanwhile."""
    told: list[dict[str, Any]] = []
    reader = threading.Thread(target=lambda: told.append(fio.measure(seconds)))
    reader.start()
    took = []
    while reader.is_alive():
        took.append(decoder.timed()[0])
    reader.join()
    inner = took[len(took) // 4 : -max(1, len(took) // 8)]  # without its beginning and its end
    return statistics.median(inner), told[0]["read_bytes_per_second"]


if __name__ == "__main__":
    main()
