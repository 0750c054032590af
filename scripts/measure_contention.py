#!/usr/bin/env python3
"""What computing and reading take from each other, without dualblade's engine between them.

    python scripts/measure_contention.py [--model MODEL] [--context N] > results/contention.json

In turn, and in another order each time: decode steps with all KV in memory; fio on the drive
(O_DIRECT, 1 MiB, 8 in flight, huge pages); both at once, with steps that compute all the time, and
with steps that pause after each layer, as those of a model do that waits for its KV. What fio still
delivers beside steps that compute for as large a part of their time as a run's do is the roof of
that run's engine. On a drive that shares memory and processor with the model both are slower than
alone.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from dualblade.bench.child_run import ChildOptions, load, open_cache
from dualblade.bench.decode_child import Decoder
from dualblade.bench.decode_rows import fill, kv_bytes
from dualblade.bench.envelope import MODEL
from dualblade.bench.fio import FioYardstick
from dualblade.cli.command import ending_at_signals
from dualblade.cli.output import write_json
from dualblade.host.machine import command_line, machine_facts
from dualblade.host.threads import wait_briefly
from dualblade.store import cache_directory
from dualblade.units import GIB, MIB

SHARES = (1.0, 0.5)
"""Of a step's time in which it computes; the rest it sleeps, a part after each layer."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--repeats", type=int, default=12)
    asked = parser.parse_args()
    with warnings.catch_warnings(action="ignore"):
        is_news = wait_briefly()  # read when torch is imported; as `dualblade` has it
    if is_news:
        os.execv(sys.executable, [sys.executable, *sys.argv])
    options = ChildOptions(
        task="run", model=asked.model, dtype="bfloat16", batch=1, context=asked.context, seed=0,
        steps=1000, attention="tiles",
    )  # fmt: skip
    folder = cache_directory()
    model, rows = load(options)
    rounds: list[dict[str, float]] = []
    with (
        FioYardstick(folder, size_bytes=GIB, chunk_bytes=MIB, queue_depth=8) as fio,
        torch.inference_mode(),
    ):
        for turn in range(asked.repeats):
            with open_cache(options, model) as cache:
                fill(rows, options.context, cache, model.device)
                decoder = Decoder(model, cache, options.batch)
                rounds.append(one_round(model, decoder, fio, turn, asked.seconds))
    write_json(
        {
            "command": command_line(),
            "model": asked.model,
            "context": asked.context,
            "kv_bytes": kv_bytes(rows.shapes, 1, asked.context),
            "step_ratio_median": ratio(rounds, "step_seconds_1.0", "step_seconds_alone"),
            "beside": [
                {
                    "computing_share_asked": share,
                    "computing_share_median": statistics.median(
                        each[f"computing_share_{share}"] for each in rounds
                    ),
                    "fio_ratio_median": ratio(
                        rounds, f"fio_bytes_per_second_{share}", "fio_bytes_per_second_alone"
                    ),
                    "fio_ratios": [
                        each[f"fio_bytes_per_second_{share}"] / each["fio_bytes_per_second_alone"]
                        for each in rounds
                    ],
                }
                for share in SHARES
            ],
            "rounds": rounds,
            "machine": machine_facts(str(folder)),
        }
    )


def one_round(
    model: Any, decoder: Decoder, fio: FioYardstick, turn: int, seconds: float
) -> dict[str, float]:
    """Steps, fio and both, beginning with another one each turn."""
    found: dict[str, float] = {}
    layers = model.config.num_hidden_layers

    def steps() -> None:
        found["step_seconds_alone"] = steps_until(decoder, time.perf_counter() + seconds)

    def reads() -> None:
        found["fio_bytes_per_second_alone"] = fio.measure(seconds)["read_bytes_per_second"]

    def both(share: float) -> None:
        with pausing(model, alone * (1 / share - 1) / layers) as paused:
            step, speed = at_once(decoder, fio, seconds)
        found[f"step_seconds_{share}"] = step
        found[f"computing_share_{share}"] = 1 - statistics.median(paused) * layers / step
        found[f"fio_bytes_per_second_{share}"] = speed

    for _ in range(5):
        decoder.step()
    alone = steps_until(decoder, time.perf_counter() + seconds / 4)
    ways = (steps, reads, *(functools.partial(both, share) for share in SHARES))
    for way in ways[turn % len(ways) :] + ways[: turn % len(ways)]:
        way()
    return found


@contextlib.contextmanager
def pausing(model: Any, seconds: float) -> Iterator[list[float]]:
    """Sleep after each layer of `model`; what the pauses took, as they come to an end."""
    paused = [0.0]

    def pause(*_: object) -> None:
        began = time.perf_counter()
        time.sleep(seconds)
        paused.append(time.perf_counter() - began)

    layers = model.model.layers if seconds else ()
    hooks = [layer.register_forward_hook(pause) for layer in layers]
    try:
        yield paused
    finally:
        for hook in hooks:
            hook.remove()


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
    with ending_at_signals():
        main()
