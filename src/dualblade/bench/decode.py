"""bench decode: the time of a decode step with the KV cache on each path, under memory limits.

Every run is a process of its own (decode_child), in a memory cgroup of its own when there is a
limit. A limit is a size for the whole process, or a fraction: that part of the KV's bytes is left
for its cache. A fraction is turned into bytes once, the same for all modes:

    base  = the process with its model, plus what a step adds at this context (calibrated)
            + ALLOWANCE_BYTES
    limit = base + fraction x kv_bytes          memory_budget = limit - base

The limit holds from when the model is loaded (`limit_from: loaded`), so that the peak of loading,
which can be three times the model, neither kills nor leaves slack. A limit below the base holds
from the start.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dualblade import config
from dualblade.bench.decode_fio import FioYardstick
from dualblade.bench.decode_process import run_child
from dualblade.config import EngineConfig, check_attention
from dualblade.errors import ConfigError, DualBladeError, Unsupported
from dualblade.host.cgroup import MemoryCgroup
from dualblade.host.machine import command_line, machine_facts
from dualblade.units import MIB, format_size, parse_size

YARDSTICK = "dynamic-cache"
"""A mode besides the path words: transformers' DynamicCache with the same rows."""

MODES = (*(path.value for path in config.Path), YARDSTICK)

STORED = tuple(path.value for path in config.Path if path is not config.Path.MEMORY)
"""The modes that read from the drive, and are compared with fio."""

ALLOWANCE_BYTES = 16 * MIB
"""Of every limit, on top of what was calibrated: allocator arenas and kernel structures that
differ from run to run (8 MiB here between runs of one model)."""

FRACTION_MAX = 16.0

TRACE_EVENTS = 100_000
"""Of the newest steps; 20 MB of memory."""

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeBenchOptions:
    """One benchmark: all modes under all limits, `repeats` times, interleaved.

    memory_limits   sizes (`2GiB`), fractions of the KV (`0.25`, `25%`), `none`; empty: none.
    memory_budget   for the caches of runs without a limit.
    warmup_steps    decoded and dropped before the timed ones: they bring the page cache to rest.
    engine          settings of EngineConfig by name.
    trace           FILE.json: stored runs are traced to FILE-MODE-REPEAT.json (the last limit's).
    store           a store file; None: a private one, which is gone afterwards.
    """

    model: str
    batch: int = 1
    context: int = 1024
    steps: int = 16
    modes: Sequence[str] = ("dual",)
    memory_limits: Sequence[str] = ()
    memory_budget: str = "auto"
    dtype: str = "bfloat16"
    attention: str = "auto"
    store: Path | None = None
    repeats: int = 1
    warmup_steps: int = 2
    seed: int = 0
    compare_fio: bool = False
    engine: Mapping[str, Any] = field(default_factory=dict)
    trace: Path | None = None

    def __post_init__(self) -> None:
        for name in ("batch", "context", "steps", "repeats"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.warmup_steps < 0:
            raise ConfigError("warmup_steps cannot be negative")
        check_attention(self.attention)
        for mode in self.modes:
            if mode not in MODES:
                raise ConfigError(f"unknown mode {mode!r}", hint=f"use one of: {', '.join(MODES)}")
        for limit in self.memory_limits:
            parse_limit(limit)
        EngineConfig.from_mapping(self.engine)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """A memory limit in bytes as it was asked for, and what it leaves for the cache."""

    asked: str | None
    limit_bytes: int | None
    budget: int | str
    holds_from_start: bool = False


def parse_limit(text: str) -> float | int | None:
    """A fraction of the KV as a float, a size in bytes as an int, None for `none`.

    A number without a unit is a fraction up to 16, bytes above. Raises: ConfigError.
    """
    if text == "none":
        return None
    percent = re.fullmatch(r"(\d+(?:\.\d+)?)%", text)
    if percent:
        return float(percent[1]) / 100
    number = re.fullmatch(r"\d+(?:\.\d+)?", text)
    if number and float(text) <= FRACTION_MAX:
        return float(text)
    try:
        return parse_size(text)
    except ConfigError as exc:
        raise ConfigError(
            f"not a memory limit: {text!r}", hint="write 2GiB, or 0.25 for a part of the KV"
        ) from exc


def _quiet(_line: str) -> None:
    """Progress that nobody waits for."""


def run_decode_bench(options: DecodeBenchOptions, progress: Progress = _quiet) -> dict[str, Any]:
    """Run all modes under all limits and return the result, ready for JSON.

    A run that its limit kills has `oom_killed` true and null times, one that ends with an error
    has `error`; neither stops the others, unless no run got through for errors. On an exception
    (Ctrl-C too) no child, no cgroup and no store file that was not there before is left.

    Raises: Unsupported when a limit is asked for and no cgroup can be made, or fio is asked for
            and missing; DualBladeError when calibrating failed, or every run did.
    """
    wants_limit = any(parse_limit(limit) is not None for limit in options.memory_limits)
    if wants_limit and (reason := MemoryCgroup.available()) is not None:
        raise Unsupported(
            f"--memory-limit needs a memory cgroup: {reason}", hint="run as root, or without limits"
        )
    folder = _store_folder(options.store)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_store_left_as_found(options.store))
        calibration = _calibrate(options, progress) if wants_limit else None
        limits = [_limit(text, options, calibration) for text in options.memory_limits or ("none",)]
        fio = stack.enter_context(_yardstick(options, folder, calibration))
        runs, speeds = [], []
        for repeat, limit, mode in itertools.product(range(options.repeats), limits, options.modes):
            speeds.append(fio.measure() if fio is not None and mode in STORED else None)
            runs.append(_one_run(options, mode, limit, repeat, speeds[-1]))
            progress(_told(runs[-1]))
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
        "tokens_agree": _tokens_agree(runs),
        "summary": _summaries(runs),
        "runs": runs,
    }


def _store_folder(store: Path | None) -> Path:
    """Where the store is: private ones lie in the cache directory."""
    from dualblade.store import cache_directory  # loads the engine: not for --help

    return cache_directory() if store is None else store.absolute().parent


def _calibrate(options: DecodeBenchOptions, progress: Progress) -> dict[str, Any]:
    """What the process needs besides its cache. Raises: DualBladeError when that fails.

    A first child only loads, outside any cgroup: what it reads (libraries, weights) is then in the
    page cache and charged to no later run, so that all of them start alike.
    """
    progress("calibrating: memory of the model and one step")
    for task in ("warm", "calibrate"):
        with contextlib.ExitStack() as stack:
            group = stack.enter_context(MemoryCgroup()) if task == "calibrate" else None
            outcome = run_child(_child_options(options, task=task), group)
        if outcome.error is not None:
            raise DualBladeError(f"the model could not be measured: {outcome.error}")
    measured = outcome.result
    base = measured["loaded_bytes"] + measured["step_bytes"] + ALLOWANCE_BYTES
    progress(f"base {format_size(base)}, KV {format_size(measured['kv_bytes'])}")
    return {**measured, "allowance_bytes": ALLOWANCE_BYTES, "base_bytes": base}


def _limit(text: str, options: DecodeBenchOptions, calibration: dict[str, Any] | None) -> Limit:
    """`text` in bytes. What is left for the cache is the limit less the base, at least 0."""
    wanted = parse_limit(text)
    if wanted is None or calibration is None:
        return Limit(asked=None, limit_bytes=None, budget=options.memory_budget)
    base = calibration["base_bytes"]
    if isinstance(wanted, float):
        wanted = base + int(wanted * calibration["kv_bytes"])
    below = wanted < base
    return Limit(
        asked=text, limit_bytes=wanted, budget=max(0, wanted - base), holds_from_start=below
    )


def _one_run(
    options: DecodeBenchOptions,
    mode: str,
    limit: Limit,
    repeat: int,
    fio: dict[str, Any] | None,
) -> dict[str, Any]:
    """One child; its result under the keys that every run has, null where there is none."""
    payload = _child_options(options, task="run", mode=mode)
    if options.trace is not None and mode in STORED:
        payload["trace"] = str(options.trace.with_stem(f"{options.trace.stem}-{mode}-{repeat}"))
        payload["engine"]["trace_events"] = TRACE_EVENTS
    payload["memory_budget"] = limit.budget
    payload["limit_bytes"] = None if limit.holds_from_start else limit.limit_bytes
    with contextlib.ExitStack() as stack:
        group = None
        if limit.limit_bytes is not None:
            at_start = limit.limit_bytes if limit.holds_from_start else None
            group = stack.enter_context(MemoryCgroup(at_start))
        outcome = run_child(payload, group)
    return {
        "mode": mode,
        "repeat": repeat,
        "dtype": options.dtype,
        "batch": options.batch,
        "context": options.context,
        "warmup_steps": options.warmup_steps,
        "memory_limit": limit.asked,
        "memory_limit_bytes": limit.limit_bytes,
        "memory_limit_from": _limit_from(limit),
        "fio_read_bytes_per_second": fio and fio["read_bytes_per_second"],
        "attention": options.attention,
        **dict.fromkeys(_MEASURED),
        **outcome.result,
        "oom_killed": outcome.oom_killed,
        "error": outcome.error,
    }


_MEASURED = (
    "engine",
    "kv_bytes",
    "step_seconds_median",
    "step_seconds_p99",
    "step_seconds",
    "cpu_seconds_per_step",
    "device_read_bytes_per_step",
    "direct_read_bytes_per_step",
    "page_cache_read_bytes_per_step",
    "page_cache_hit_fraction",
    "peak_memory_bytes",
    "base_memory_bytes",
    "budget_bytes",
    "budget_used_bytes_max",
    "budget_held",
    "tokens_sha256",
    "seconds_per_step",
    "cache",
)


def _limit_from(limit: Limit) -> str | None:
    if limit.limit_bytes is None:
        return None
    return "start" if limit.holds_from_start else "loaded"


def _child_options(options: DecodeBenchOptions, **values: Any) -> dict[str, Any]:
    """The options of a child as plain values."""
    return {
        "model": options.model,
        "dtype": options.dtype,
        "batch": options.batch,
        "context": options.context,
        "steps": options.steps,
        "warmup_steps": options.warmup_steps,
        "seed": options.seed,
        "attention": options.attention,
        "store": str(options.store) if options.store is not None else None,
        "engine": dict(options.engine),
        **values,
    }


@contextlib.contextmanager
def _store_left_as_found(store: Path | None) -> Iterator[None]:
    """Remove the store file afterwards when it was not there before."""
    existed = store is None or store.exists()
    try:
        yield
    finally:
        if not existed and store is not None:
            store.unlink(missing_ok=True)


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


def _tokens_agree(runs: list[dict[str, Any]]) -> bool | None:
    """Whether all runs that ended and had the same way into attention gave the same tokens; None
    when no two did. Between two ways rounding differs."""
    hashes: dict[str, list[str]] = {}
    for run in runs:
        if run["tokens_sha256"] is not None:
            hashes.setdefault(run["attention"], []).append(run["tokens_sha256"])
    compared = [some for some in hashes.values() if len(some) > 1]
    return all(len(set(some)) == 1 for some in compared) if compared else None


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
                **_against_roof(group, memory),
            }
        )
    return summaries


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


def _told(run: dict[str, Any]) -> str:
    """One line about a run, for people who wait."""
    limit = run["memory_limit_bytes"]
    place = run["mode"] + (f" in {format_size(limit)}" if limit is not None else "")
    if run["oom_killed"]:
        return f"{place}: killed for want of memory"
    if run["error"] is not None:
        return f"{place}: {run['error']}"
    read = format_size(run["device_read_bytes_per_step"])
    return f"{place}: {run['step_seconds_median'] * 1000:.1f} ms a step, {read} read"
