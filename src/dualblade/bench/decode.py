"""bench decode: the time of a decode step with the KV cache on each path, under memory limits.

Every run is a process of its own (decode_child), in a memory cgroup of its own when there is a
limit. What a limit is, and what it leaves for the cache, says decode_run; the budget of a run
under a limit is what the limit leaves: limit - base.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dualblade.bench.decode_run import (
    YARDSTICK,
    Limit,
    Progress,
    Workload,
    calibrate,
    check_mode,
    is_stored,
    limit_bytes,
    one_run,
    parse_limit,
    quiet,
    require_cgroup,
    store_folder,
    store_left_as_found,
    tokens_agree,
    told,
)
from dualblade.bench.fio import FioYardstick
from dualblade.config import EngineConfig
from dualblade.errors import ConfigError, DualBladeError
from dualblade.host.machine import command_line, machine_facts
from dualblade.units import MIB

TRACE_EVENTS = 100_000
"""Of the newest steps; 20 MB of memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeBenchOptions(Workload):
    """One benchmark: all modes under all limits, `repeats` times, interleaved.

    memory_limits   sizes (`2GiB`), fractions of the KV (`0.25`, `25%`), `none`; empty: none.
    memory_budget   for the caches of runs without a limit.
    trace           FILE.json: stored runs are traced to FILE-MODE-REPEAT.json (the last limit's).
    """

    modes: Sequence[str] = ("dual",)
    memory_limits: Sequence[str] = ()
    memory_budget: str = "auto"
    repeats: int = 1
    compare_fio: bool = False
    trace: Path | None = None

    def __post_init__(self) -> None:
        Workload.__post_init__(self)  # super() needs a cell that slots=True leaves behind
        if self.repeats < 1:
            raise ConfigError(f"repeats must be at least 1, not {self.repeats}")
        for mode in self.modes:
            check_mode(mode)
        for limit in self.memory_limits:
            parse_limit(limit)


def run_decode_bench(options: DecodeBenchOptions, progress: Progress = quiet) -> dict[str, Any]:
    """Run all modes under all limits and return the result, ready for JSON.

    A run that its limit kills has `oom_killed` true and null times, one that ends with an error
    has `error`; neither stops the others, unless no run got through for errors. On an exception
    (Ctrl-C too) no child, no cgroup and no store file that was not there before is left.

    Raises: Unsupported when a limit is asked for and no cgroup can be made, or fio is asked for
            and missing; DualBladeError when calibrating failed, or every run did.
    """
    wants_limit = any(parse_limit(limit) is not None for limit in options.memory_limits)
    if wants_limit:
        require_cgroup()
    folder = store_folder(options.store)
    with contextlib.ExitStack() as stack:
        stack.enter_context(store_left_as_found(options.store))
        calibration = calibrate(options, progress) if wants_limit else None
        limits = [_limit(text, options, calibration) for text in options.memory_limits or ("none",)]
        fio = stack.enter_context(_yardstick(options, folder, calibration))
        runs, speeds = [], []
        for repeat, limit, mode in itertools.product(range(options.repeats), limits, options.modes):
            speeds.append(fio.measure() if fio is not None and is_stored(mode) else None)
            speed = speeds[-1]["read_bytes_per_second"] if speeds[-1] is not None else None
            run = one_run(options, mode, limit, **_traced(options, mode, repeat))
            runs.append(
                {
                    **run,
                    "repeat": repeat,
                    "fio_read_bytes_per_second": speed,
                    "ssd_utilisation": _utilisation(run, speed),
                }
            )
            progress(told(run))
    if all(run["error"] is not None for run in runs):
        raise DualBladeError(f"no run got through: {runs[0]['error']}")
    return {
        "benchmark": "decode",
        "command": command_line(),
        "options": {
            **asdict(options),
            "store": str(options.store) if options.store else None,
            "trace": str(options.trace) if options.trace else None,
        },
        "machine": machine_facts(folder),
        "calibration": calibration,
        "fio": next((speed for speed in speeds if speed is not None), None),
        "tokens_agree": tokens_agree(runs),
        "summary": _summaries(runs),
        "runs": runs,
    }


def _limit(text: str, options: DecodeBenchOptions, calibration: dict[str, Any] | None) -> Limit:
    """`text` in bytes. What is left for the cache is the limit less the base, at least 0."""
    wanted = parse_limit(text)
    if wanted is None or calibration is None:
        return Limit(asked=None, limit_bytes=None, budget=options.memory_budget)
    size, base = limit_bytes(wanted, calibration), calibration["base_bytes"]
    return Limit(
        asked=text, limit_bytes=size, budget=max(0, size - base), holds_from_start=size < base
    )


def _traced(options: DecodeBenchOptions, mode: str, repeat: int) -> dict[str, Any]:
    """What a traced run is given besides."""
    if options.trace is None or not is_stored(mode):
        return {}
    file = options.trace.with_stem(f"{options.trace.stem}-{mode}-{repeat}")
    return {"trace": str(file), "settings": {"trace_events": TRACE_EVENTS}}


@contextlib.contextmanager
def _yardstick(
    options: DecodeBenchOptions, folder: Path, calibration: dict[str, Any] | None
) -> Iterator[FioYardstick | None]:
    """fio with our chunk and depth on a file as large as the KV; None when not asked for."""
    if not options.compare_fio:
        yield None
        return
    engine = EngineConfig.from_mapping(options.engine)
    with FioYardstick(
        folder,
        size_bytes=calibration["kv_bytes"] if calibration is not None else 512 * MIB,
        chunk_bytes=engine.chunk_bytes,
        queue_depth=engine.queue_depth,
    ) as fio:
        yield fio


def _summaries(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per mode and limit over the repeats, in the order of the first run of each."""
    groups: dict[tuple[str, str | None], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["mode"], run["memory_limit"]), []).append(run)
    medians = {key: _median(group, "step_seconds_median") for key, group in groups.items()}
    summaries = []
    for (mode, limit), group in groups.items():
        step = medians[mode, limit]
        memory = medians.get(("memory", None)) or medians.get(("memory", limit))
        times = [r["step_seconds_median"] for r in group if r["step_seconds_median"] is not None]
        summaries.append(
            {
                "mode": mode,
                "memory_limit": limit,
                "runs": len(group),
                "oom_killed": sum(run["oom_killed"] for run in group),
                "step_seconds_median": step,
                "step_seconds_spread": [min(times), max(times)] if times else None,
                "step_to_memory": _ratio(step, memory),
                "step_to_dynamic_cache": _ratio(step, medians.get((YARDSTICK, None))),
                "cpu_seconds_per_step": _median(group, "cpu_seconds_per_step"),
                "device_read_bytes_per_step": _median(group, "device_read_bytes_per_step"),
                "peak_memory_bytes": _median(group, "peak_memory_bytes"),
                "ssd_utilisation": _median(group, "ssd_utilisation"),
                **_against_roof(group, memory),
            }
        )
    return summaries


def _utilisation(run: dict[str, Any], fio_speed: int | None) -> float | None:
    """Bytes per second that the drive gave during the steps, over fio's just before."""
    step = run["step_seconds_median"]
    if step is None or fio_speed is None:
        return None
    return float(run["device_read_bytes_per_step"] / step / fio_speed)


def _against_roof(runs: list[dict[str, Any]], memory: float | None) -> dict[str, Any]:
    """How far above the roof the steps are; medians of the runs, each with its own fio.

    The roof is the larger of the `memory` path's step (without a limit, or else under the same
    one) and the time that fio, run just before, would take for the bytes that were read.
    """
    roofs, ratios = [], []
    for run in runs:
        step, speed = run["step_seconds_median"], run["fio_read_bytes_per_second"]
        if step is not None and speed is not None and memory is not None:
            roofs.append(max(memory, run["device_read_bytes_per_step"] / speed))
            ratios.append(step / roofs[-1])
    return {
        "roof_seconds": statistics.median(roofs) if roofs else None,
        "step_to_roof": statistics.median(ratios) if ratios else None,
        "step_to_roof_spread": [min(ratios), max(ratios)] if ratios else None,
    }


def _ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None


def _median(runs: list[dict[str, Any]], name: str) -> float | None:
    values = [run[name] for run in runs if run[name] is not None]
    return statistics.median(values) if values else None
