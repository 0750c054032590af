#!/usr/bin/env python3
"""What computing and reading take from each other, without dualblade's engine between them.

    python scripts/measure_contention.py [--model MODEL] [--context N] > results/contention.json

In turn, and in another order each time: decode steps with all KV in memory; fio on the drive
(O_DIRECT, 1 MiB, 8 in flight, huge pages); both at once. What fio still delivers beside the steps
is the roof of any engine that reads while this model computes, and what a step then takes is the
floor of such a step. On a drive that shares memory and processor with the model both are slower
than alone.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from dualblade.bench.child_run import ChildOptions, load, open_cache
from dualblade.bench.decode_child import Decoder
from dualblade.bench.decode_rows import fill, kv_bytes
from dualblade.bench.envelope import MODEL
from dualblade.bench.fio import FioYardstick
from dualblade.cli.output import write_json
from dualblade.host.machine import command_line, machine_facts
from dualblade.host.threads import wait_briefly
from dualblade.store import cache_directory
from dualblade.units import GIB, MIB


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--repeats", type=int, default=12)
    asked = parser.parse_args()
    if wait_briefly():  # read when torch is imported; as `dualblade` has it
        os.execv(sys.executable, [sys.executable, *sys.argv])
    options = ChildOptions(
        task="run", model=asked.model, dtype="bfloat16", batch=1, context=asked.context, seed=0,
        steps=1000, attention="tiles",
    )  # fmt: skip
    folder = cache_directory()
    yardstick = FioYardstick(folder, size_bytes=GIB, chunk_bytes=MIB, queue_depth=8)
    model, rows = load(options)
    rounds: list[dict[str, float]] = []
    with yardstick as fio, torch.inference_mode():
        for turn in range(asked.repeats):
            with open_cache(options, model) as cache:
                fill(rows, options.context, cache, model.device)
                rounds.append(one_round(Decoder(model, cache, options.batch), fio, turn, asked))
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


def one_round(
    decoder: Decoder, fio: FioYardstick, turn: int, asked: argparse.Namespace
) -> dict[str, float]:
    """Steps, fio and both, beginning with another one each turn."""
    found: dict[str, float] = {}

    def steps() -> None:
        found["step_seconds_alone"] = steps_until(decoder, time.perf_counter() + asked.seconds)

    def reads() -> None:
        found["fio_bytes_per_second_alone"] = fio.measure(asked.seconds)["read_bytes_per_second"]

    def both() -> None:
        step, speed = at_once(decoder, fio, asked.seconds)
        found["step_seconds_beside_fio"] = step
        found["fio_bytes_per_second_beside_steps"] = speed

    for _ in range(5):
        decoder.step()
    ways = (steps, reads, both)
    for way in ways[turn % 3 :] + ways[: turn % 3]:
        way()
    return found


def ratio(rounds: list[dict[str, float]], one: str, other: str) -> float:
    return statistics.median(each[one] / each[other] for each in rounds)


def steps_until(decoder: Decoder, end: float) -> float:
    """Median seconds of the steps that begin before `end`, one at least."""
    seconds = [decoder.timed()[0]]
    while time.perf_counter() < end:
        seconds.append(decoder.timed()[0])
    return statistics.median(seconds)


def at_once(decoder: Decoder, fio: FioYardstick, seconds: float) -> tuple[float, float]:
    """Median seconds of a step while fio reads, and what fio read a second meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(fio.measure, seconds)
        took = [decoder.timed()[0]]
        while not reading.done():
            took.append(decoder.timed()[0])
        inner = took[len(took) // 4 :]  # fio takes a while to begin
        return statistics.median(inner), reading.result()["read_bytes_per_second"]


if __name__ == "__main__":
    main()
