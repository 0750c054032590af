"""bench envelope: is the automatic split as good as the best fixed one, at every memory limit?

Under each limit the `dual` path with an automatic budget runs against fixed splits (`static-N`: N
percent of the KV through the page cache). A round is one run of each mode, one after the other, so
that runs of a round saw the same drive. Coarse rounds try all splits; they only choose. Fine rounds
then have `dual`, the two best coarse splits and those `refine` percent beside the best; they alone
judge, because the best of many noisy figures flatters itself. `dual` / best is the median over the
fine rounds of the ratios within one.

All runs of a limit have the same memory: they ask for an `auto` budget with what calibration has
put on top for a step as the reserve, not the quarter (256 MiB at most) that `auto` leaves to other
programs by default: nobody else is in the cgroup, and a fixed split has no such modesty. They share
one store file that keeps its blocks and is written once before, so that all rewrite; first writes
into unwritten extents are slower.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from dualblade.bench.decode_run import DecodeWorkload, one_run, told, write_store
from dualblade.bench.run_log import RunLog
from dualblade.bench.series import Run, Watch, median, run_all, spread
from dualblade.bench.workload import (
    Limit,
    Progress,
    at_least,
    calibrate,
    check_limit,
    limit_bytes,
    parse_limit,
    quiet,
    require_cgroup,
    require_memory,
    static_percent,
    store_left_as_found,
    store_place,
    tokens_agree,
)
from dualblade.errors import ConfigError
from dualblade.host.machine import command_line, machine_facts

MODEL = (
    "random:llama?layers=24,hidden=256,heads=32,kv_heads=32,head_dim=64,intermediate=256,"
    "vocab=1000,positions=8192"
)
"""The KV of OPT-1.3B (24 layers of 32 heads of 64: 192 KiB a token) with a twentieth of its
weights: starting a run and computing a step cost little, so that the drive decides. 48 units make
splits as fine as 2 %."""

CONTEXT = 6000
"""1.1 GiB of KV. One sequence: tails of eight would fill the smallest budgets."""

TARGET = 1.05
"""`dual` over the best fixed split, at most."""


class Planned(NamedTuple):
    """One run: which limit and mode, and in which round; fine rounds follow the coarse ones."""

    limit: str
    round: int
    mode: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvelopeOptions(DecodeWorkload):
    """The limits, the fixed splits in percent, how far to refine, and how often.

    coarse_rounds   of `dual` and all `splits`; two: the second tells a slip of the first.
    rounds          of `dual` and the splits that were found best; these judge.
    steps           8 after 3: `dual` and the page cache are at rest after two sweeps, and the
                    median of eight forgives a slow one.
    """

    model: str = MODEL
    context: int = CONTEXT
    steps: int = 8
    warmup_steps: int = 3
    limits: Sequence[str] = ("10%", "25%", "50%", "90%", "110%")
    splits: Sequence[int] = (0, 20, 40, 60, 80, 100)
    refine: int = 10
    coarse_rounds: int = 2
    rounds: int = 5

    def __post_init__(self) -> None:
        DecodeWorkload.__post_init__(self)  # super() needs a cell that slots=True leaves behind
        for name in ("coarse_rounds", "rounds", "refine"):
            at_least(name, getattr(self, name), 1)
        if not self.splits or not all(0 <= split <= 100 for split in self.splits):
            raise ConfigError("splits are percentages from 0 to 100, and there is at least one")
        if len(set(self.limits)) < len(self.limits) or len(set(self.splits)) < len(self.splits):
            raise ConfigError("a limit or split is given twice")
        for limit in self.limits:
            if check_limit(limit) is None:
                raise ConfigError("an envelope is measured under limits, not without one")


def run_envelope(
    options: EnvelopeOptions, log_path: Path, progress: Progress = quiet
) -> dict[str, Any]:
    """Measure what `log_path` does not hold yet; the result of all, ready for JSON.

    Each finished run is in `log_path` at once: after an interruption the same call goes on. No
    child, no cgroup and no store file that was not there before is left.

    Raises: ConfigError when the log is of other options, or has runs of other code or another
            machine; Unsupported when no cgroup can be made;
            DualBladeError when calibrating or writing the store failed.
    """
    place = store_place(options.store)
    store = options.store or place / "bench-envelope.store"

    def find_facts() -> dict[str, Any]:
        return {"machine": machine_facts(place), "calibration": calibrate(options, progress)}

    asked = {name: value for name, value in asdict(options).items() if name != "store"}
    asked["store"] = str(store)
    with RunLog(log_path, asked, find_facts, may_grow="rounds") as log:
        if next_run(options, log.runs) is not None:
            with store_left_as_found(store):
                _measure(
                    replace(options, store=store, engine=_engine(options)),
                    log,
                    Watch(progress=progress, log_path=log_path),
                )
        return {**_result(options, log), **log.retaken()}


def next_run(options: EnvelopeOptions, runs: Sequence[dict[str, Any]]) -> Planned | None:
    """What is to be run when `runs` have been; None: nothing more."""
    done = {Planned(run["memory_limit"], run["round"], run["mode"]) for run in runs}
    return next((planned for planned in _schedule(options, runs) if planned not in done), None)


def _schedule(options: EnvelopeOptions, runs: Sequence[dict[str, Any]]) -> Iterator[Planned]:
    """All runs in their order; for the fine ones the coarse ones must have been.

    Each round begins with another mode, so that none always follows the same one.
    """
    for turn in range(options.coarse_rounds):
        modes = ["dual", *(f"static-{split}" for split in options.splits)]
        for limit in options.limits:
            yield from (Planned(limit, turn, mode) for mode in _rotated(modes, turn))
    if len(runs) < options.coarse_rounds * len(options.limits) * (1 + len(options.splits)):
        return  # whoever asks for the next run has found one above
    finalists = {limit: _finalists(options, limit, runs) for limit in options.limits}
    for turn in range(options.coarse_rounds, options.coarse_rounds + options.rounds):
        for limit in options.limits:
            modes = ["dual", *(f"static-{split}" for split in finalists[limit])]
            yield from (Planned(limit, turn, mode) for mode in _rotated(modes, turn))


def _rotated(modes: list[str], turn: int) -> list[str]:
    first = turn % len(modes)
    return modes[first:] + modes[:first]


def _finalists(
    options: EnvelopeOptions, limit: str, runs: Sequence[dict[str, Any]]
) -> tuple[int, ...]:
    """The two best splits of the coarse rounds, and those beside the best; none if all failed."""
    coarse = [r for r in runs if r["memory_limit"] == limit and r["round"] < options.coarse_rounds]
    found = {split: median(_seconds(coarse, f"static-{split}")) for split in options.splits}
    ranked = sorted((seconds, split) for split, seconds in found.items() if seconds is not None)
    best = [split for _, split in ranked[:2]]
    beside = [best[0] - options.refine, best[0] + options.refine] if best else []
    return tuple(sorted({*best, *(split for split in beside if 0 <= split <= 100)}))


def _engine(options: EnvelopeOptions) -> dict[str, Any]:
    return {**options.engine, "keep_store_blocks": True}


def _measure(options: EnvelopeOptions, log: RunLog, watch: Watch) -> None:
    log.require_same_machine(machine_facts(store_place(options.store)))
    require_memory(options)
    require_cgroup()
    calibration = log.facts["calibration"]
    is_written = False

    def run(planned: Planned) -> Run:
        nonlocal is_written
        if not is_written:
            watch.progress("writing the store once")
            write_store(options, "direct")
        done = one_run(options, planned.mode, _limit(planned.limit, calibration))
        # A run that was killed may leave the store to be discarded at the next open.
        is_written = done["error"] is None and not done["oom_killed"]
        return _kept(done, planned.round)

    run_all(
        log,
        watch,
        next_run=lambda runs: next_run(options, runs),
        run=run,
        total=lambda runs: _count(options, runs),
        told=lambda done: f"{done['memory_limit']} {told(done)}",
    )


def _limit(text: str, calibration: dict[str, Any]) -> Limit:
    """The limit, and with it a reserve of what it has on top for a step; so the automatic budget
    is the part of the KV that was asked for."""
    wanted = parse_limit(text)
    assert wanted is not None
    size = limit_bytes(wanted, calibration)
    return Limit(
        asked=text,
        limit_bytes=size,
        budget="auto",
        holds_from_start=size < calibration["base_bytes"],
        reserve_bytes=calibration["base_bytes"] - calibration["loaded_bytes"],
    )


_KEPT = (
    "mode",
    "memory_limit",
    "memory_limit_bytes",
    "attention",
    "engine",
    "kv_bytes",
    "step_seconds",
    "step_seconds_median",
    "cpu_seconds_per_step",
    "stolen_fraction",
    "device_read_bytes_per_step",
    "direct_read_bytes_per_step",
    "page_cache_read_bytes_per_step",
    "page_cache_hit_fraction",
    "peak_memory_bytes",
    "budget_bytes",
    "budget_held",
    "tokens_sha256",
    "oom_killed",
    "error",
)


def _kept(run: dict[str, Any], turn: int) -> dict[str, Any]:
    """What a log keeps of a run: of the cache's own account only the events, not each unit."""
    events = (run["cache"] or {}).get("events", ())
    kept = {name: run[name] for name in _KEPT}
    return {**kept, "round": turn, "events": events}


def _count(options: EnvelopeOptions, runs: Sequence[dict[str, Any]]) -> int:
    """Runs in all; before the coarse rounds are over, fine ones with four splits are expected."""
    known = len(list(_schedule(options, runs)))
    coarse = options.coarse_rounds * len(options.limits) * (1 + len(options.splits))
    return known if len(runs) >= coarse else known + options.rounds * len(options.limits) * 5


def _result(options: EnvelopeOptions, log: RunLog) -> dict[str, Any]:
    summary = [summarize(options, limit, log.runs) for limit in options.limits]
    ratios = [entry["dual_to_best"] for entry in summary]
    kills = sum(entry["dual_oom_killed"] for entry in summary)
    return {
        "benchmark": "envelope",
        "command": command_line(),
        "options": {**asdict(options), "store": str(options.store) if options.store else None},
        **log.facts,
        "tokens_agree": tokens_agree(log.runs),
        "target": TARGET,
        "reached": kills == 0 and all(ratio is not None and ratio <= TARGET for ratio in ratios),
        "summary": summary,
        "runs": log.runs,
    }


def summarize(
    options: EnvelopeOptions, limit: str, runs: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """`dual` against the fixed splits under one limit; null where every run failed."""
    here = [run for run in runs if run["memory_limit"] == limit]
    fine = [run for run in here if run["round"] >= options.coarse_rounds]
    splits = sorted({p for run in here if (p := static_percent(run["mode"])) is not None})
    judged = {split: median(_seconds(fine, f"static-{split}")) for split in splits}
    ranked = sorted((seconds, split) for split, seconds in judged.items() if seconds is not None)
    best = ranked[0][1] if ranked else None
    ratios = _paired(fine, "dual", f"static-{best}")
    return {
        "memory_limit": limit,
        "memory_limit_bytes": here[0]["memory_limit_bytes"] if here else None,
        "best_static_percent": best,
        "best_static_seconds": ranked[0][0] if ranked else None,
        "best_static_seconds_spread": spread(_seconds(fine, f"static-{best}")),
        "dual_seconds": median(_seconds(fine, "dual")),
        "dual_seconds_spread": spread(_seconds(fine, "dual")),
        "dual_to_best": median(ratios),
        "dual_to_best_spread": spread(ratios),
        "pairs": len(ratios),
        "dual_oom_killed": sum(run["oom_killed"] for run in here if run["mode"] == "dual"),
        "oom_killed": sum(run["oom_killed"] for run in here),
        "errors": sorted({run["error"] for run in here if run["error"] is not None}),
        "splits": [_split(here, fine, split) for split in splits],
    }


def _split(
    runs: Sequence[dict[str, Any]], fine: Sequence[dict[str, Any]], split: int
) -> dict[str, Any]:
    """All runs of one fixed split under one limit; `judged`: it was in the fine rounds."""
    mode = f"static-{split}"
    return {
        "percent": split,
        "step_seconds_median": median(_seconds(runs, mode)),
        "step_seconds_spread": spread(_seconds(runs, mode)),
        "dual_to_this": median(_paired(runs, "dual", mode)),
        "runs": sum(run["mode"] == mode for run in runs),
        "judged": any(run["mode"] == mode for run in fine),
    }


def _seconds(runs: Sequence[dict[str, Any]], mode: str) -> list[float]:
    times = (run["step_seconds_median"] for run in runs if run["mode"] == mode)
    return [seconds for seconds in times if seconds is not None]


def _paired(runs: Sequence[dict[str, Any]], mode: str, other: str) -> list[float]:
    """Ratios of the step times of two modes, each within one round."""
    times = {(run["round"], run["mode"]): run["step_seconds_median"] for run in runs}
    pairs = ((times.get((turn, mode)), times.get((turn, other))) for turn in {t for t, _ in times})
    return [ours / theirs for ours, theirs in pairs if ours is not None and theirs]
