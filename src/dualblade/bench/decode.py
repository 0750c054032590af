"""bench decode: the time of a decode step with the KV cache on each path, under memory limits.

Every run is a process of its own (child), in a memory cgroup of its own when there is a limit.
What a limit is, and what it leaves for the cache, says workload; the budget of a run
under a limit is what the limit leaves: limit - base.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dualblade.bench.decode_run import DecodeWorkload, one_run, told
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
    YARDSTICK,
    at_least,
    calibrate,
    calibrated_limit,
    check_memory,
    check_modes,
    is_stored,
    parse_limit,
    parse_mode,
    require_cgroup,
    require_memory,
    require_read_ahead,
    store_left_as_found,
    store_place,
    tokens_agree,
    wants_limits,
)
from dualblade.config import TRACE_EVENTS
from dualblade.errors import ConfigError, DualBladeError
from dualblade.host.machine import command_line, machine_facts


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeBenchOptions(DecodeWorkload):
    """One benchmark: all modes under all limits, `repeats` times, interleaved.

    memory_limits   sizes (`2GiB`), fractions of the KV (`0.25`, `25%`), `none`; empty: none.
    memory_budget   for the caches of runs without a limit.
    trace           FILE.json: stored runs are traced to FILE-MODE-LIMIT-REPEAT.json; without a
                    limit there is no LIMIT.
    ablation        a name for each mode: they are steps from a baseline to the whole.
    """

    modes: Sequence[str] = ("dual",)
    memory_limits: Sequence[str] = ()
    memory_budget: str = "auto"
    repeats: int = 1
    compare_fio: bool = False
    trace: Path | None = None
    ablation: Sequence[str] = ()

    def __post_init__(self) -> None:
        DecodeWorkload.__post_init__(self)  # super() needs a cell that slots=True leaves behind
        at_least("repeats", self.repeats, 1)
        check_modes(self.modes, self.store)
        check_memory(self.memory_limits, self.memory_budget)
        if self.ablation and len(self.ablation) != len(self.modes):
            raise ConfigError(
                f"ablation names {len(self.ablation)} steps, but there are {len(self.modes)} modes"
            )


class Planned(NamedTuple):
    """One run. A limit is as it was asked for."""

    repeat: int
    limit: str | None
    mode: str


def plan_decode(options: DecodeBenchOptions) -> list[Planned]:
    """All runs in their order: repeats are interleaved, and modes take turns at going first."""
    limits = [
        None if parse_limit(limit) is None else limit
        for limit in options.memory_limits or ("none",)
    ]
    repeats = range(options.repeats)
    return [
        Planned(repeat, limit, mode)
        for repeat, limit in itertools.product(repeats, limits)
        for mode in in_turn(options.modes, repeat)
    ]


def _planned(run: Run) -> Planned:
    return Planned(run["repeat"], run["memory_limit"], run["mode"])


def run_decode_bench(options: DecodeBenchOptions, watch: Watch | None = None) -> dict[str, Any]:
    """Run what the log lacks and return the result of all, ready for JSON.

    A run that its limit kills has `oom_killed` true and null times, one that ends with an error
    has `error`; neither stops the others, unless no run got through for errors. On an exception
    (Ctrl-C too) no child, no cgroup and no store file that was not there before is left.

    Raises: Unsupported when a limit is asked for and no cgroup can be made, or fio is asked for
            and missing; DualBladeError when calibrating failed, or every run did; ConfigError when
            the log is of other options, or has runs of other code or another machine.
    """
    watch = watch or Watch()
    plan, limited = Plan(plan_decode(options), _planned), wants_limits(options.memory_limits)

    def find_facts() -> dict[str, Any]:
        return {
            "machine": machine_facts(store_place(options.store)),
            "calibration": calibrate(options, watch.progress) if limited else None,
        }

    with (
        store_left_as_found(options.store),
        opened_log(watch, asdict(options), find_facts) as log,
    ):
        if plan.next_run(log.runs) is not None:
            _run_rest(options, plan, log, watch)
        return {**_result(options, log.facts, plan.in_order(log.runs)), **log.retaken()}


def _run_rest(options: DecodeBenchOptions, plan: Plan[Planned], log: RunLog, watch: Watch) -> None:
    """Run what the log lacks."""
    log.require_same_machine(machine_facts(store_place(options.store)))
    require_memory(options)
    require_read_ahead(options, options.modes)
    calibration = log.facts["calibration"]
    if calibration is not None:
        require_cgroup()
    with fio_beside(options, calibration, asked=options.compare_fio) as fio:

        def run(planned: Planned) -> Run:
            beside = fio.measure(planned.mode)
            limit = calibrated_limit(planned.limit or "none", options.memory_budget, calibration)
            done = one_run(options, planned.mode, limit, **_traced(options, planned))
            used = _utilisation(done, beside["fio_read_bytes_per_second"])
            return {**done, "repeat": planned.repeat, **beside, "ssd_utilisation": used}

        run_all(
            log,
            watch,
            next_run=plan.next_run,
            run=run,
            total=lambda _: len(plan.all),
            told=told,
        )


def _result(options: DecodeBenchOptions, facts: dict[str, Any], runs: list[Run]) -> dict[str, Any]:
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
        **facts,
        "fio": next((run["fio"] for run in runs if run["fio"] is not None), None),
        "tokens_agree": tokens_agree(runs),
        "summary": _summaries(runs),
        "runs": runs,
    }


def _traced(options: DecodeBenchOptions, planned: Planned) -> dict[str, Any]:
    """What a traced run is given besides."""
    mapped = parse_mode(planned.mode).path == MMAP  # has no stages
    if options.trace is None or mapped or not is_stored(planned.mode):
        return {}
    limit = [] if planned.limit is None else [planned.limit]
    words = [options.trace.stem, planned.mode, *limit, str(planned.repeat)]
    file = options.trace.with_stem("-".join(words))
    return {"trace": str(file), "settings": {"trace_events": TRACE_EVENTS}}


def _summaries(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per mode and limit over the repeats, in the order of the first run of each."""
    groups: dict[tuple[str, str | None], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["mode"], run["memory_limit"]), []).append(run)
    medians = {key: median_of(group, "step_seconds_median") for key, group in groups.items()}
    summaries = []
    for (mode, limit), group in groups.items():
        step = medians[mode, limit]
        memory = medians.get(("memory", None)) or medians.get(("memory", limit))
        summaries.append(
            {
                "mode": mode,
                "memory_limit": limit,
                "runs": len(group),
                "oom_killed": sum(run["oom_killed"] for run in group),
                "step_seconds_median": step,
                "step_seconds_spread": spread_of(group, "step_seconds_median"),
                "step_to_memory": _ratio(step, memory),
                "step_to_dynamic_cache": _ratio(step, medians.get((YARDSTICK, None))),
                "cpu_seconds_per_step": median_of(group, "cpu_seconds_per_step"),
                "device_read_bytes_per_step": median_of(group, "device_read_bytes_per_step"),
                "peak_memory_bytes": median_of(group, "peak_memory_bytes"),
                "ssd_utilisation": median_of(group, "ssd_utilisation"),
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
