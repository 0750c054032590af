"""bench prefill: the time from a prompt to its first token, with the KV cache on each path.

Children, memory cgroups, calibration and fio are those of bench decode; what is calibrated is a
forward pass of a chunk at the full context. First writes into blocks that the file system has
allocated and nobody has written are slower than rewrites, so a run says which it had:

    fresh    a new store, as a first prompt finds it; gone after the run
    written  one store that all runs rewrite, written whole before the first (and anew after a run
             that failed)

What earlier runs left dirty is written back, and what of the store is cached is dropped, before a
run begins. All writes that a prefill starts are counted, but at the end of it they need not be on
the drive: write-behind goes on into the first decode steps.
"""

from __future__ import annotations

import glob
import itertools
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from dualblade.bench.decode_run import DecodeWorkload, write_store
from dualblade.bench.run_log import RunLog
from dualblade.bench.series import (
    Plan,
    Run,
    Watch,
    fio_beside,
    in_turn,
    median_of,
    opened_log,
    run_all,
    spread_of,
)
from dualblade.bench.workload import (
    MMAP,
    MMAP_ENDING,
    Limit,
    Workload,
    at_least,
    calibrate,
    calibrated_limit,
    check_memory,
    check_modes,
    is_device,
    is_stored,
    limited_run,
    parse_limit,
    parse_mode,
    require_cgroup,
    require_memory,
    require_read_ahead,
    stolen_text,
    store_left_as_found,
    store_place,
    tokens_agree,
    wants_limits,
)
from dualblade.errors import ConfigError, DualBladeError
from dualblade.host.machine import command_line, machine_facts
from dualblade.host.page_cache import drop
from dualblade.store.inspect import inspect_store
from dualblade.units import format_size

FRESH, WRITTEN = "fresh", "written"

STORE_STATES = (FRESH, WRITTEN, "both")


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillBenchOptions(Workload):
    """One benchmark: all modes, store states and limits, `repeats` times, interleaved.

    context        tokens of the prompt, of each sequence.
    prefill_chunk  tokens of a forward pass, as `prefill_chunk_size` of generate.
    store_state    fresh, written or both; see the module.
    memory_limits  as of DecodeBenchOptions, and memory_budget too.
    """

    modes: Sequence[str] = ("dual",)
    prefill_chunk: int = 2048
    store_state: str = FRESH
    memory_limits: Sequence[str] = ()
    memory_budget: str = "auto"
    repeats: int = 1
    compare_fio: bool = False

    def __post_init__(self) -> None:
        Workload.__post_init__(self)  # super() needs a cell that slots=True leaves behind
        at_least("repeats", self.repeats, 1)
        at_least("prefill_chunk", self.prefill_chunk, 1)
        check_modes(self.modes, self.store)
        check_memory(self.memory_limits, self.memory_budget)
        if self.store_state not in STORE_STATES:
            raise ConfigError(
                f"unknown store_state {self.store_state!r}",
                hint=f"use one of: {', '.join(STORE_STATES)}",
            )
        if is_device(self.store) and self.store_state != WRITTEN:
            raise ConfigError(
                f"{self.store} is a device: its blocks are never fresh",
                hint="use store_state written (--store-state written)",
            )


class Planned(NamedTuple):
    """One run. A limit is as it was asked for; `state` None: of a mode that stores nothing."""

    repeat: int
    limit: str | None
    state: str | None
    mode: str


def plan_prefill(options: PrefillBenchOptions) -> list[Planned]:
    """All runs in their order: repeats are interleaved, and modes take turns at going first; what
    stores nothing has no state."""
    states = (FRESH, WRITTEN) if options.store_state == "both" else (options.store_state,)
    limits = [
        None if parse_limit(text) is None else text for text in options.memory_limits or ("none",)
    ]
    every = itertools.product(range(options.repeats), limits, states)
    planned = (
        Planned(repeat, limit, state if is_stored(mode) else None, mode)
        for repeat, limit, state in every
        for mode in in_turn(options.modes, repeat)
    )
    return list(dict.fromkeys(planned))


def _planned(run: Run) -> Planned:
    return Planned(run["repeat"], run["memory_limit"], run["store_state"], run["mode"])


def run_prefill_bench(options: PrefillBenchOptions, watch: Watch | None = None) -> dict[str, Any]:
    """Run what the log lacks and return the result of all, ready for JSON.

    A run that its limit kills has `oom_killed` true and null times, one that ends with an error
    has `error`; neither stops the others, unless no run got through for errors. On an exception
    (Ctrl-C too) no child, no cgroup and no store file that was not there before is left.

    Raises: Unsupported when a limit is asked for and no cgroup can be made, or fio is asked for
            and missing; DualBladeError when calibrating or writing the store failed, or every run
            did; ConfigError when the log is of other options, or has runs of other code or another
            machine.
    """
    watch = watch or Watch()
    plan, limited = Plan(plan_prefill(options), _planned), wants_limits(options.memory_limits)
    place = store_place(options.store)
    stores = _Stores(options, place, watch)

    def find_facts() -> dict[str, Any]:
        step = min(options.prefill_chunk, options.context)
        measured = calibrate(options, watch.progress, step_tokens=step) if limited else None
        return {"machine": machine_facts(place), "calibration": measured}

    with (
        store_left_as_found(stores.written),
        store_left_as_found(stores.fresh),
        opened_log(watch, asdict(options), find_facts) as log,
    ):
        if plan.next_run(log.runs) is not None:
            _run_rest(options, plan, log, stores, watch)
        return {**_result(options, log.facts, plan.in_order(log.runs)), **log.retaken()}


def _run_rest(
    options: PrefillBenchOptions, plan: Plan[Planned], log: RunLog, stores: _Stores, watch: Watch
) -> None:
    """Run what the log lacks."""
    log.require_same_machine(machine_facts(store_place(options.store)))
    require_memory(options)
    require_read_ahead(options, options.modes)
    calibration = log.facts["calibration"]
    if calibration is not None:
        require_cgroup()
    with fio_beside(options, calibration, asked=options.compare_fio) as fio:

        def run(planned: Planned) -> Run:
            prepared = stores.ready(planned)
            beside = fio.measure(planned.mode)
            limit = calibrated_limit(planned.limit or "none", options.memory_budget, calibration)
            done = one_prefill(prepared, planned.mode, limit)
            stores.ran(planned, done)
            return {**done, "repeat": planned.repeat, "store_state": planned.state, **beside}

        run_all(
            log,
            watch,
            next_run=plan.next_run,
            run=run,
            total=lambda _: len(plan.all),
            told=told,
        )


class _Stores:
    """The two stores of a benchmark, beside each other: one is new for each run, one kept."""

    def __init__(self, options: PrefillBenchOptions, place: Path, watch: Watch) -> None:
        self._options = options
        self._watch = watch
        self._is_written: dict[bool, bool] = {}  # by whether it is that of mapped files
        self.written = options.store or place / f"bench-prefill-{os.getpid()}.store"
        self.fresh = self.written.with_name(f"{self.written.name}.fresh-{os.getpid()}")
        _remove_stale(self.written)
        if options.store is None:
            _remove_left(place)

    def ready(self, planned: Planned) -> PrefillBenchOptions:
        """The options of the run with its store, which is as it should be when this returns."""
        os.sync()
        if planned.state is None:
            return self._options
        if planned.state == FRESH:
            # A run that was killed leaves its blocks, and the next would rewrite them.
            self.fresh.unlink(missing_ok=True)
            engine = {**self._options.engine, "keep_store_blocks": False}
            return replace(self._options, store=self.fresh, engine=engine)
        engine = {**self._options.engine, "keep_store_blocks": True}
        options = replace(self._options, store=self.written, engine=engine)
        mode = MMAP if _is_mapped(planned) else "direct"
        if not self._is_written.get(_is_mapped(planned)):
            self._watch.progress(f"writing the store of {mode} once")
            write_store(_decoding(options), mode)
            os.sync()
        _drop_cached(self.written)
        return options

    def ran(self, planned: Planned, run: Run) -> None:
        """A run that was killed may leave the store to be discarded at the next open."""
        if planned.state == WRITTEN:
            fine = run["error"] is None and not run["oom_killed"]
            self._is_written[_is_mapped(planned)] = fine


def _remove_stale(store: Path) -> None:
    """Fresh stores beside a named one, of benchmarks that were killed."""
    for left in store.parent.glob(f"{glob.escape(store.name)}.fresh-*"):
        if _is_gone(left.name.rpartition("-")[2]) and _is_store(left):
            left.unlink(missing_ok=True)


def _is_store(file: Path) -> bool:
    try:
        return inspect_store(str(file)).superblock is not None
    except DualBladeError:
        return False


def _remove_left(folder: Path) -> None:
    """Stores that nobody named, of benchmarks that were killed; with mapped files beside them."""
    for left in folder.glob("bench-prefill-*.store*"):
        if not _is_gone(left.name.removeprefix("bench-prefill-").partition(".")[0]):
            continue
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def _is_gone(process: str) -> bool:
    """Whether `process` is the number of one that is no more."""
    return process.isdigit() and not Path(f"/proc/{process}").exists()


def _is_mapped(planned: Planned) -> bool:
    return parse_mode(planned.mode).path == MMAP


def _decoding(options: PrefillBenchOptions) -> DecodeWorkload:
    """A decode run that stores as much KV as the prefill."""
    return DecodeWorkload(
        model=options.model,
        batch=options.batch,
        context=options.context,
        dtype=options.dtype,
        attention=options.attention,
        seed=options.seed,
        store=options.store,
        engine=options.engine,
    )


def _drop_cached(store: Path) -> None:
    """No run finds what an earlier one left in the page cache."""
    files = store.with_name(store.name + MMAP_ENDING)
    for path in (store, *(files.iterdir() if files.is_dir() else ())):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                drop(fd, 0, os.fstat(fd).st_size)
            finally:
                os.close(fd)


_MEASURED = (
    "engine",
    "kv_bytes",
    "prefill_seconds",
    "stall_seconds",
    "stall_fraction",
    "seconds",
    "cpu_seconds",
    "stolen_fraction",
    "device_read_bytes",
    "device_written_bytes",
    "store_written_bytes",
    "peak_memory_bytes",
    "base_memory_bytes",
    "budget_bytes",
    "budget_used_bytes_max",
    "budget_held",
    "tokens_sha256",
    "cache",
)


def one_prefill(options: PrefillBenchOptions, mode: str, limit: Limit) -> Run:
    """One child; its result under the keys that every run has, null where there is none."""
    asked, outcome = limited_run(
        options,
        mode,
        limit,
        task="prefill",
        step_tokens=min(options.prefill_chunk, options.context),
    )
    return {
        **asked,
        **dict.fromkeys(_MEASURED),
        **outcome.result,
        "oom_killed": outcome.oom_killed,
        "error": outcome.error,
    }


def told(run: Run) -> str:
    """One line about a run, for people who wait."""
    limit = run["memory_limit_bytes"]
    place = " ".join(filter(None, (run["store_state"], run["mode"])))
    place += f" in {format_size(limit)}" if limit is not None else ""
    if run["oom_killed"]:
        return f"{place}: killed for want of memory"
    if run["error"] is not None:
        return f"{place}: {run['error']}"
    return (
        f"{place}: {run['prefill_seconds']:.1f} s, "
        f"{format_size(run['device_written_bytes'])} written{stolen_text(run)}"
    )


def _result(options: PrefillBenchOptions, facts: dict[str, Any], runs: list[Run]) -> Run:
    if all(run["error"] is not None for run in runs):
        raise DualBladeError(f"no run got through: {runs[0]['error']}")
    return {
        "benchmark": "prefill",
        "command": command_line(),
        "options": {**asdict(options), "store": str(options.store) if options.store else None},
        **facts,
        "fio": next((run["fio"] for run in runs if run["fio"] is not None), None),
        "tokens_agree": tokens_agree(runs),
        "summary": summarize(runs),
        "runs": runs,
    }


def summarize(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Per mode, store state and limit over the repeats, in the order of the first run of each."""
    groups: dict[tuple[str, str | None, str | None], list[Run]] = {}
    for run in runs:
        key = (run["mode"], run["store_state"], run["memory_limit"])
        groups.setdefault(key, []).append(run)
    medians = {key: median_of(group, "prefill_seconds") for key, group in groups.items()}
    summary = []
    for (mode, state, limit), group in groups.items():
        seconds = medians[mode, state, limit]
        memory = medians.get(("memory", None, None)) or medians.get(("memory", None, limit))
        summary.append(
            {
                "mode": mode,
                "store_state": state,
                "memory_limit": limit,
                "runs": len(group),
                "oom_killed": sum(run["oom_killed"] for run in group),
                "prefill_seconds": seconds,
                "prefill_seconds_spread": spread_of(group, "prefill_seconds"),
                "prefill_to_memory": seconds / memory if seconds and memory else None,
                "stall_seconds": median_of(group, "stall_seconds"),
                "stall_fraction": median_of(group, "stall_fraction"),
                "cpu_seconds": median_of(group, "cpu_seconds"),
                "device_read_bytes": median_of(group, "device_read_bytes"),
                "device_written_bytes": median_of(group, "device_written_bytes"),
                "peak_memory_bytes": median_of(group, "peak_memory_bytes"),
            }
        )
    return summary
