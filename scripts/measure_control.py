#!/usr/bin/env python3
"""What following the memory costs a decode step: the probe, the hits and the controller.

    python scripts/measure_control.py [--steps N] > results/control.json

A cache of 24 layers (48 units) in a store, on path dual with its budget from the probe, takes steps
of one row that begin 10 ms apart, so that the probe and the hits are asked for as seldom as they
are in a model of that speed. Timed are the calls of `Placements` alone, by the wall, so the machine
has to be quiet: a call that waited for a processor counts as if it had worked. All KV is planned in
the page cache, so that hits are counted of all units: the dearest case. What timing a call takes is
measured by calls of nothing, one in each layer of the same steps, and taken off.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dualblade.config import EngineConfig
from dualblade.config import Path as KVPath
from dualblade.host.machine import command_line, machine_facts
from dualblade.host.memory import MemoryProbe
from dualblade.io import open_engine
from dualblade.pipeline import KVPipeline, KVSettings
from dualblade.pipeline.memory_watch import MemorySource
from dualblade.pipeline.residence import Placements
from dualblade.residency import DoorSpeeds
from dualblade.store import Store, cache_directory
from dualblade.units import GIB, MIB

STEP_SECONDS = 0.01
LAYERS, HEADS, DIM = 24, 4, 64
TOKENS = 512  # 1 MiB for a unit in fp32, 24 MiB in all: the step itself takes about 10 ms

_TIMED = ("look", "follow", "visit")


class Clock:
    """Adds up what calls take."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.calls = 0

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            self.calls += 1
            began = time.perf_counter()
            try:
                return call(*args, **options)
            finally:
                self.seconds += time.perf_counter() - began

        return timed


def settings() -> KVSettings:
    probe = MemoryProbe()
    return KVSettings(
        path=KVPath.DUAL,
        budget_bytes=probe.read().budget_bytes,
        layer_count=LAYERS,
        tokens_max=None,
        device=torch.device("cpu"),
        config=EngineConfig(staging_bytes=8 * MIB),
        memory=MemorySource(asked_bytes=None, read=probe.read),
        # Known speeds are weighed at each step; with these, all KV is worth caching.
        speeds=DoorSpeeds(
            direct_bytes_per_s=0.1 * GIB,
            cache_hit_bytes_per_s=9 * GIB,
            cache_miss_bytes_per_s=0.1 * GIB,
        ),
    )


def measure(steps: int) -> dict[str, Any]:
    """Decode `steps` steps; the control's seconds of each."""
    clock, idle, spent = Clock(), Clock(), []
    nothing = idle.around(lambda: None)
    plain = {name: getattr(Placements, name) for name in _TIMED}
    with tempfile.TemporaryDirectory(dir=cache_directory()) as folder:
        engine = open_engine("auto")
        store = Store.open(Path(folder) / "kv.store", engine, capacity_bytes=GIB)
        pipeline = KVPipeline(store, engine, settings())
        for name, call in plain.items():
            setattr(Placements, name, clock.around(call))
        try:
            sweep(pipeline, TOKENS, nothing)
            begun = time.perf_counter()
            for step in range(steps):
                time.sleep(max(0.0, begun + step * STEP_SECONDS - time.perf_counter()))
                clock.seconds, clock.calls = 0.0, 0
                sweep(pipeline, 1, nothing)
                spent.append(clock.seconds - clock.calls * idle.seconds / idle.calls)
            step_seconds = (time.perf_counter() - begun) / steps
            units = pipeline.placements()
        finally:
            for name, call in plain.items():
                setattr(Placements, name, call)
            pipeline.close()
    return {
        "command": command_line(),
        "steps": steps,
        "units": len(units),
        "units_cached": sum(unit.path == KVPath.PAGE_CACHE for unit in units),
        "step_seconds_mean": step_seconds,
        "timing_seconds_per_call": idle.seconds / idle.calls,
        "control_seconds_per_step": summary(spent),
        "share_of_a_10_ms_step": statistics.fmean(spent) / STEP_SECONDS,
        "machine": machine_facts(),
    }


def sweep(pipeline: KVPipeline, rows: int, between: Callable[[], None]) -> None:
    """One step over all layers."""
    new = torch.zeros(1, HEADS, rows, DIM)
    for layer in range(LAYERS):
        pipeline.update(layer, new, new)
        between()


def summary(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {
        "mean": statistics.fmean(seconds),
        "median": statistics.median(seconds),
        "p99": ordered[int(0.99 * (len(ordered) - 1))],
        "max": ordered[-1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    sys.stdout.write(json.dumps(measure(parser.parse_args().steps), indent=1) + "\n")


if __name__ == "__main__":
    main()
