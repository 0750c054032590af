"""One run of decoding: what is decoded, in which mode, under which memory limit.

A limit is a size for the whole process, or a fraction: that part of the KV's bytes is left for its
cache. A fraction is turned into bytes once, the same for all modes:

    base  = the process with its model, plus what a step adds at this context (calibrated)
            + ALLOWANCE_BYTES
    limit = base + fraction x kv_bytes

The limit holds from when the model is loaded (`limit_from: loaded`), so that the peak of loading,
which can be three times the model, neither kills nor leaves slack. A limit below the base holds
from the start.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dualblade import config
from dualblade.bench.decode_process import run_child
from dualblade.config import EngineConfig, check_attention
from dualblade.errors import ConfigError, DualBladeError, Unsupported
from dualblade.host.cgroup import MemoryCgroup
from dualblade.units import MIB, format_size, parse_size

YARDSTICK = "dynamic-cache"
"""A mode besides the path words: transformers' DynamicCache with the same rows."""

MMAP = "mmap"
"""A mode: memory-mapped files, the way of earlier offloaders (mmap_kv)."""

MMAP_ENDING = ".mmap"
"""Of the folder beside a kept store that has the mapped files."""

MODES = (*(path.value for path in config.Path), MMAP, YARDSTICK)
"""And `static-N`: the `dual` path with N percent of the KV through the page cache,
whether they fit or not."""

ALLOWANCE_BYTES = 16 * MIB
"""Of every limit, on top of what was calibrated: allocator arenas and kernel structures that
differ from run to run (8 MiB here between runs of one model)."""

FRACTION_MAX = 16.0

Progress = Callable[[str], None]


def quiet(_line: str) -> None:
    """Progress that nobody waits for."""


def static_percent(mode: str) -> int | None:
    """N of the mode `static-N`; None for other modes."""
    found = re.fullmatch(r"static-(\d{1,3})", mode)
    return int(found[1]) if found and int(found[1]) <= 100 else None


def check_mode(mode: str) -> None:
    """Raises: ConfigError for a word that is no mode."""
    if mode not in MODES and static_percent(mode) is None:
        raise ConfigError(
            f"unknown mode {mode!r}", hint=f"use one of: {', '.join(MODES)}, static-0 to static-100"
        )


def is_stored(mode: str) -> bool:
    """Whether the mode reads from the drive, and is compared with fio."""
    return mode not in (YARDSTICK, config.Path.MEMORY.value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What every run of a benchmark decodes.

    warmup_steps    decoded and dropped before the timed ones: they bring the page cache to rest.
    engine          settings of EngineConfig by name.
    store           a store file, or a folder for one; None: a private one. What was not there is
                    gone afterwards.
    """

    model: str
    batch: int = 1
    context: int = 1024
    steps: int = 16
    warmup_steps: int = 2
    dtype: str = "bfloat16"
    attention: str = "auto"
    seed: int = 0
    store: Path | None = None
    engine: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("batch", "context", "steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.warmup_steps < 0:
            raise ConfigError("warmup_steps cannot be negative")
        if self.store is not None and self.store.is_dir():
            # By name: the runs of one benchmark rewrite one file.
            object.__setattr__(self, "store", self.store / "dualblade-bench.store")
        check_attention(self.attention)
        EngineConfig.from_mapping(self.engine)

    def child_options(self, **values: Any) -> dict[str, Any]:
        """The options of a child as plain values."""
        return {
            "model": self.model,
            "dtype": self.dtype,
            "batch": self.batch,
            "context": self.context,
            "steps": self.steps,
            "warmup_steps": self.warmup_steps,
            "seed": self.seed,
            "attention": self.attention,
            "store": str(self.store) if self.store is not None else None,
            "engine": dict(self.engine),
            **values,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """A memory limit in bytes as it was asked for, and what the cache is told that it may use.

    reserve_bytes   with an `auto` budget: memory left alone; None: the default.
    """

    asked: str | None
    limit_bytes: int | None
    budget: int | str
    holds_from_start: bool = False
    reserve_bytes: int | None = None


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


def limit_bytes(wanted: float | int, calibration: Mapping[str, Any]) -> int:
    """A limit as `parse_limit` gives it, in bytes for the whole process."""
    if isinstance(wanted, float):
        return int(calibration["base_bytes"] + int(wanted * calibration["kv_bytes"]))
    return wanted


def require_cgroup() -> None:
    """Raises: Unsupported when no run can be limited here."""
    if (reason := MemoryCgroup.available()) is not None:
        raise Unsupported(
            f"a memory limit needs a memory cgroup: {reason}", hint="run as root, or without limits"
        )


def store_folder(store: Path | None) -> Path:
    """Where the store is: private ones lie in the cache directory."""
    from dualblade.store import cache_directory  # loads the engine: not for --help

    return cache_directory() if store is None else store.absolute().parent


def calibrate(workload: Workload, progress: Progress) -> dict[str, Any]:
    """What the process needs besides its cache. Raises: DualBladeError when that fails.

    A first child only loads, outside any cgroup: what it reads (libraries, weights) is then in the
    page cache and charged to no later run, so that all of them start alike.
    """
    progress("calibrating: memory of the model and one step")
    for task in ("warm", "calibrate"):
        with contextlib.ExitStack() as stack:
            group = stack.enter_context(MemoryCgroup()) if task == "calibrate" else None
            outcome = run_child(workload.child_options(task=task), group)
        if outcome.error is not None:
            raise DualBladeError(f"the model could not be measured: {outcome.error}")
    measured = outcome.result
    base = measured["loaded_bytes"] + measured["step_bytes"] + ALLOWANCE_BYTES
    progress(f"base {format_size(base)}, KV {format_size(measured['kv_bytes'])}")
    return {**measured, "allowance_bytes": ALLOWANCE_BYTES, "base_bytes": base}


def one_run(
    workload: Workload,
    mode: str,
    limit: Limit,
    *,
    settings: Mapping[str, Any] | None = None,
    trace: str | None = None,
) -> dict[str, Any]:
    """One child; its result under the keys that every run has, null where there is none.

    `settings` of EngineConfig come on top of the workload's; `trace`: the file of its trace.
    """
    engine = {**workload.engine, **(settings or {})}
    percent = static_percent(mode)
    if percent is not None:
        engine["cache_percent"] = percent
    if limit.reserve_bytes is not None:
        engine["memory_reserve_bytes"] = limit.reserve_bytes
    payload = workload.child_options(
        task="run",
        mode=mode if percent is None else config.Path.DUAL.value,
        engine=engine,
        memory_budget=limit.budget,
        limit_bytes=None if limit.holds_from_start else limit.limit_bytes,
        trace=trace,
    )
    with contextlib.ExitStack() as stack:
        group = None
        if limit.limit_bytes is not None:
            at_start = limit.limit_bytes if limit.holds_from_start else None
            group = stack.enter_context(MemoryCgroup(at_start))
        outcome = run_child(payload, group)
    return {
        "mode": mode,
        "dtype": workload.dtype,
        "batch": workload.batch,
        "context": workload.context,
        "warmup_steps": workload.warmup_steps,
        "memory_limit": limit.asked,
        "memory_limit_bytes": limit.limit_bytes,
        "memory_limit_from": _limit_from(limit),
        "attention": workload.attention,
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


@contextlib.contextmanager
def store_left_as_found(store: Path | None) -> Iterator[None]:
    """Remove the store file afterwards when it was not there before; so with the mapped files."""
    if store is None:
        yield
        return
    files = store.with_name(store.name + MMAP_ENDING)
    existed, files_existed = store.exists(), files.exists()
    try:
        yield
    finally:
        if not existed:
            store.unlink(missing_ok=True)
        if not files_existed:
            shutil.rmtree(files, ignore_errors=True)


def told(run: Mapping[str, Any]) -> str:
    """One line about a run, for people who wait."""
    limit = run["memory_limit_bytes"]
    place = run["mode"] + (f" in {format_size(limit)}" if limit is not None else "")
    if run["oom_killed"]:
        return f"{place}: killed for want of memory"
    if run["error"] is not None:
        return f"{place}: {run['error']}"
    read = format_size(run["device_read_bytes_per_step"])
    return f"{place}: {run['step_seconds_median'] * 1000:.1f} ms a step, {read} read"


def tokens_agree(runs: list[dict[str, Any]]) -> bool | None:
    """Whether all runs that ended and had the same way into attention gave the same tokens; None
    when no two did. Between two ways rounding differs."""
    hashes: dict[str, list[str]] = {}
    for run in runs:
        if run["tokens_sha256"] is not None:
            hashes.setdefault(run["attention"], []).append(run["tokens_sha256"])
    compared = [some for some in hashes.values() if len(some) > 1]
    return all(len(set(some)) == 1 for some in compared) if compared else None
