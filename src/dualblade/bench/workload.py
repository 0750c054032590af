"""What a run of a benchmark is given: a model and its tokens, a mode, a memory limit.

A limit is a size for the whole process, or a fraction: that part of the KV's bytes is left for its
cache. A fraction is turned into bytes once, the same for all modes:

    base  = the process with its model, plus what a step adds at this context (calibrated)
            + ALLOWANCE_BYTES
    limit = base + fraction x kv_bytes, or base + what is to be left (`+2GiB`)

The limit holds from when the model is loaded (`limit_from: loaded`), so that the peak of loading,
which can be three times the model, neither kills nor leaves slack. A limit below the base holds
from the start.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dualblade import config
from dualblade.bench.child_process import ChildOutcome, run_child
from dualblade.config import EngineConfig, check_attention, check_word, parse_settings
from dualblade.errors import ConfigError, DualBladeError, Unsupported
from dualblade.host.cgroup import MemoryCgroup
from dualblade.host.drives import find_drive
from dualblade.host.machine import STOLEN_MAX
from dualblade.host.memory import available_memory
from dualblade.host.read_ahead import reading_ahead
from dualblade.store.formatting import empty_store
from dualblade.units import KIB, MIB, format_size, parse_size

YARDSTICK = "dynamic-cache"
"""A mode besides the path words: transformers' DynamicCache with the same rows."""

OFFLOADED = "offloaded-cache"
"""A mode: the same with its layers in host memory, but for the one that is attended to; the next
one is copied to the GPU meanwhile. Wants a GPU."""

TRANSFORMERS = (YARDSTICK, OFFLOADED)
"""Modes whose cache is transformers' own."""

MMAP = "mmap"
"""A mode: memory-mapped files, the way of earlier offloaders (mmap_kv)."""

MMAP_ENDING = ".mmap"
"""Of the folder beside a kept store that has the mapped files."""

MODES = (*(path.value for path in config.Path), MMAP, *TRANSFORMERS)
"""And `static-N`: the `dual` path with N percent of the KV through the page cache,
whether they fit or not. Each may go on with settings of its own: `dual+pipeline=serial`."""

DTYPES = ("bfloat16", "float32", "float16")
"""Of weights and KV."""

ALLOWANCE_BYTES = 16 * MIB
"""Of every limit, on top of what was calibrated: allocator arenas and kernel structures that
differ from run to run (8 MiB here between runs of one model)."""

_BARE_NUMBER = r"\d+(?:\.\d+)?"

Progress = Callable[[str], None]


def quiet(_line: str) -> None:
    """Progress that nobody waits for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mode:
    """A mode in parts: the path (or MMAP, one of TRANSFORMERS), settings of EngineConfig that are
    its own, its way into attention (None: that of the workload), and how far the drive's queue
    reads ahead meanwhile (None: as it does)."""

    path: str
    settings: Mapping[str, Any]
    attention: str | None
    read_ahead_bytes: int | None


def parse_mode(text: str) -> Mode:
    """`MODE[+NAME=VALUE...]`; NAME is `attention`, `read_ahead` (a size; what the drive's queue has
    while it runs, whoever reads) or a setting of EngineConfig.

    Raises: ConfigError for a word that is no mode, no setting or no value of it.
    """
    word, *extras = text.split("+")
    settings = parse_settings(extras)
    if (percent := static_percent(word)) is not None:
        settings["cache_percent"] = percent
    elif word not in MODES:
        raise ConfigError(
            f"unknown mode {word!r}", hint=f"use one of: {', '.join(MODES)}, static-0 to static-100"
        )
    attention, ahead = settings.pop("attention", None), settings.pop("read_ahead", None)
    if attention is not None:
        check_attention(attention)
    if ahead is not None:
        ahead = parse_size(str(ahead))
        at_least("read_ahead", ahead, 4 * KIB)
    EngineConfig.from_mapping(settings)
    path = config.Path.DUAL.value if percent is not None else word
    return Mode(path=path, settings=settings, attention=attention, read_ahead_bytes=ahead)


def static_percent(mode: str) -> int | None:
    """N of the mode `static-N`; None for other modes."""
    found = re.fullmatch(r"static-(\d{1,3})", mode)
    return int(found[1]) if found and int(found[1]) <= 100 else None


def check_modes(modes: Sequence[str], store: Path | None) -> None:
    """Raises: ConfigError for what is no mode, or has nothing to do with such a store."""
    if not modes:
        raise ConfigError("modes: name at least one")
    mapped = [mode for mode in modes if parse_mode(mode).path == MMAP]
    if mapped and is_device(store):
        raise ConfigError(
            f"mode {mapped[0]} maps files, and {store} is a device",
            hint="leave that mode out, or name a store in a file system",
        )


def check_memory(limits: Sequence[str], budget: str) -> None:
    """Raises: ConfigError for what is no limit, or no budget."""
    for limit in limits:
        check_limit(limit)
    if budget != "auto":
        parse_size(budget)


def is_stored(mode: str) -> bool:
    """Whether the mode reads from the drive, and is compared with fio."""
    return mode.partition("+")[0] not in (*TRANSFORMERS, config.Path.MEMORY.value)


def at_least(name: str, value: int, least: int) -> None:
    """Raises: ConfigError."""
    if value < least:
        raise ConfigError(f"{name} must be at least {least}, not {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What every run of a benchmark has in common.

    context         tokens of each sequence.
    engine          settings of EngineConfig by name.
    store           a store file, or a folder for one; None: a private one. What was not there is
                    gone afterwards.
    """

    model: str
    batch: int = 1
    context: int = 1024
    dtype: str = "bfloat16"
    attention: str = "auto"
    seed: int = 0
    store: Path | None = None
    engine: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        at_least("batch", self.batch, 1)
        at_least("context", self.context, 1)
        if self.store is not None and self.store.is_dir():
            # By name: the runs of one benchmark rewrite one file.
            object.__setattr__(self, "store", self.store / "dualblade-bench.store")
        check_word("dtype", self.dtype, DTYPES)
        check_attention(self.attention)
        EngineConfig.from_mapping(self.engine)

    def child_options(self, **values: Any) -> dict[str, Any]:
        """The options of a child as plain values."""
        return {
            "model": self.model,
            "dtype": self.dtype,
            "batch": self.batch,
            "context": self.context,
            "seed": self.seed,
            "attention": self.attention,
            "store": str(self.store) if self.store is not None else None,
            "engine": dict(self.engine),
            **values,
        }


@dataclass(frozen=True, slots=True)
class LeftForCache:
    """A limit that leaves so many bytes for the cache, whatever the model takes."""

    size_bytes: int


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


Wanted = float | int | LeftForCache
"""A limit as asked for: a fraction of the KV, bytes of the whole process, bytes for the cache."""


def parse_limit(text: str) -> Wanted | None:
    """A fraction of the KV as a float, a size in bytes as an int, `+SIZE` as what is left for the
    cache, None for `none`. A number without a unit is a fraction. Raises: ConfigError.
    """
    if text == "none":
        return None
    percent = re.fullmatch(r"(\d+(?:\.\d+)?)%", text)
    if percent:
        return float(percent[1]) / 100
    if re.fullmatch(_BARE_NUMBER, text):
        return float(text)
    try:
        size = parse_size(text.removeprefix("+"))
    except ConfigError as exc:
        raise ConfigError(
            f"not a memory limit: {text!r}",
            hint="write 2GiB, +2GiB for what is left for the cache, or 0.25 for a part of the KV",
        ) from exc
    return LeftForCache(size) if text.startswith("+") else size


def check_limit(text: str) -> Wanted | None:
    """`parse_limit` of what is asked for now. Results that were kept may have `1.1`; but 25 is a
    forgotten percent sign, or a forgotten unit. Raises: ConfigError."""
    wanted = parse_limit(text)
    if re.fullmatch(_BARE_NUMBER, text) and float(text) > 1:
        raise ConfigError(
            f"not a memory limit: {text!r} has no unit",
            hint=f"write {text}% for a part of the KV, or a size such as {text}GiB",
        )
    return wanted


def limit_bytes(wanted: Wanted, calibration: Mapping[str, Any]) -> int:
    """A limit as `parse_limit` gives it, in bytes for the whole process."""
    base: int = calibration["base_bytes"]
    if isinstance(wanted, LeftForCache):
        return base + wanted.size_bytes
    return base + int(wanted * calibration["kv_bytes"]) if isinstance(wanted, float) else wanted


def calibrated_limit(text: str, budget: int | str, calibration: Mapping[str, Any] | None) -> Limit:
    """`text` in bytes, and what it leaves for the cache: the limit less the base, at least 0.
    Without a limit the cache has `budget`."""
    wanted = parse_limit(text)
    if wanted is None or calibration is None:
        return Limit(asked=None, limit_bytes=None, budget=budget)
    size, base = limit_bytes(wanted, calibration), calibration["base_bytes"]
    return Limit(
        asked=text, limit_bytes=size, budget=max(0, size - base), holds_from_start=size < base
    )


def wants_limits(limits: Sequence[str]) -> bool:
    """Whether one of them is a limit, so that cgroups and a calibration are needed."""
    return any(parse_limit(limit) is not None for limit in limits)


def require_cgroup() -> None:
    """Raises: Unsupported when no run can be limited here."""
    if (reason := MemoryCgroup.available()) is not None:
        raise Unsupported(
            f"a memory limit needs a memory cgroup: {reason}", hint="run as root, or without limits"
        )


def is_device(store: Path | None) -> bool:
    """Whether the store is no file: nothing else can be put beside it."""
    if store is None:
        return False
    from dualblade.store import backing  # loads the engine: not for --help

    return backing.is_device(store)


def store_place(store: Path | None) -> Path:
    """What the store lies on: a folder (private ones: the cache directory), or its block device.

    Raises: StorageError when that cannot be examined; ConfigError where no store file can be made.
    """
    from dualblade.store.backing import cache_directory, check_place  # the engine: not for --help

    if store is None:
        return cache_directory()
    if is_device(store):
        return Path(find_drive(store).block_path)
    check_place(store)
    return store.absolute().parent


def require_memory(workload: Workload) -> None:
    """Before a child loads it: does the model fit the memory there is? Raises: BudgetError.

    With a GPU the weights are not in host memory; of quantised ones nobody knows before.
    """
    import torch  # here: costs seconds to import

    from dualblade.hf.footprint import footprint
    from dualblade.hf.models import config_of, is_packed

    config = config_of(workload.model)
    if torch.cuda.is_available() or getattr(config, "quantization_config", None) is not None:
        return
    dtype = getattr(torch, workload.dtype)
    needed = footprint(config, dtype, rows=1, staging_bytes=0, is_packed=is_packed(workload.model))
    needed.require(workload.model, available_memory())


def calibrate(workload: Workload, progress: Progress, *, step_tokens: int = 1) -> dict[str, Any]:
    """What the process needs besides its cache. Raises: DualBladeError when that fails, Unsupported
    where there are no cgroups.

    step_tokens: tokens of each sequence in a forward pass.

    A first child only loads, outside any cgroup: what it reads (libraries, weights) is then in the
    page cache and charged to no later run, so that all of them start alike.
    """
    require_cgroup()
    require_memory(workload)
    progress("calibrating: memory of the model and one step")
    for task in ("warm", "calibrate"):
        with contextlib.ExitStack() as stack:
            group = stack.enter_context(MemoryCgroup()) if task == "calibrate" else None
            outcome = run_child(workload.child_options(task=task, step_tokens=step_tokens), group)
        if outcome.error is not None:
            raise DualBladeError(f"the model could not be measured: {outcome.error}")
    measured = outcome.result
    base = measured["loaded_bytes"] + measured["step_bytes"] + ALLOWANCE_BYTES
    progress(f"base {format_size(base)}, KV {format_size(measured['kv_bytes'])}")
    return {**measured, "allowance_bytes": ALLOWANCE_BYTES, "base_bytes": base}


def limited_run(
    workload: Workload,
    mode: str,
    limit: Limit,
    *,
    task: str,
    settings: Mapping[str, Any] | None = None,
    **values: Any,
) -> tuple[dict[str, Any], ChildOutcome]:
    """One child that does `task` in `mode` under `limit`: what all results say of it, and how it
    ended. `settings` of EngineConfig come on top of the workload's, the mode's own on top of them;
    `values` are further options of the child."""
    parts = parse_mode(mode)
    engine = {**workload.engine, **(settings or {}), **parts.settings}
    if limit.reserve_bytes is not None:
        engine["memory_reserve_bytes"] = limit.reserve_bytes
    payload = workload.child_options(
        task=task,
        mode=parts.path,
        engine=engine,
        memory_budget=limit.budget,
        limit_bytes=None if limit.holds_from_start else limit.limit_bytes,
        **({} if parts.attention is None else {"attention": parts.attention}),
        **values,
    )
    with contextlib.ExitStack() as stack:
        group = None
        if limit.limit_bytes is not None:
            at_start = limit.limit_bytes if limit.holds_from_start else None
            group = stack.enter_context(MemoryCgroup(at_start))
        stack.enter_context(read_ahead_of(workload, mode))
        outcome = run_child(payload, group)
    asked = {
        "mode": mode,
        "dtype": workload.dtype,
        "batch": workload.batch,
        "context": workload.context,
        "memory_limit": limit.asked,
        "memory_limit_bytes": limit.limit_bytes,
        "memory_limit_from": _limit_from(limit),
        "attention": parts.attention or workload.attention,
    }
    return asked, outcome


def read_ahead_of(workload: Workload, mode: str) -> contextlib.AbstractContextManager[None]:
    """Within, the drive reads ahead as `mode` wants it. Raises: Unsupported where it cannot."""
    ahead = parse_mode(mode).read_ahead_bytes
    if ahead is None:
        return contextlib.nullcontext()
    return reading_ahead(store_place(workload.store), ahead)


def require_read_ahead(workload: Workload, modes: Sequence[str]) -> None:
    """Before the first run: can the drive read ahead as `modes` want it? Raises: Unsupported."""
    for mode in modes:
        with read_ahead_of(workload, mode):
            pass


def _limit_from(limit: Limit) -> str | None:
    if limit.limit_bytes is None:
        return None
    return "start" if limit.holds_from_start else "loaded"


@contextlib.contextmanager
def store_left_as_found(store: Path | None) -> Iterator[None]:
    """Remove the store file afterwards when it was not there before; so with the mapped files. One
    that was there, and has grown, is emptied."""
    if store is None:
        yield
        return
    files = store.with_name(store.name + MMAP_ENDING)
    existed, files_existed = os.path.lexists(store), os.path.lexists(files)
    before = store.stat().st_size if store.is_file() else 0
    try:
        yield
    finally:
        if not existed:
            store.unlink(missing_ok=True)
        elif store.is_file() and store.stat().st_size > before:  # some runs keep its blocks
            with contextlib.suppress(DualBladeError):
                empty_store(str(store))
        if not files_existed:
            shutil.rmtree(files, ignore_errors=True)


def tokens_agree(runs: list[dict[str, Any]]) -> bool | None:
    """Whether all runs that ended and had the same way into attention gave the same tokens; None
    when no two did. Between two ways rounding differs."""
    hashes: dict[str, list[str]] = {}
    for run in runs:
        if run["tokens_sha256"] is not None:
            hashes.setdefault(run["attention"], []).append(run["tokens_sha256"])
    compared = [some for some in hashes.values() if len(some) > 1]
    return all(len(set(some)) == 1 for some in compared) if compared else None


def stolen_text(run: Mapping[str, Any]) -> str:
    """What to add of a run from whose machine a hypervisor took processors; nothing of results that
    are older than the question."""
    fraction = run.get("stolen_fraction") or 0.0
    return f", {fraction:.0%} of the processors stolen" if fraction > STOLEN_MAX else ""
