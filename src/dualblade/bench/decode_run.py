"""One run of decoding in a child, and the result that every such run has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dualblade.bench.workload import Limit, Workload, at_least, limited_run, stolen_text
from dualblade.errors import DualBladeError
from dualblade.units import format_size


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeWorkload(Workload):
    """Steps of decoding behind a context of random rows.

    warmup_steps    decoded and dropped before the timed ones: they bring the page cache to rest.
    """

    steps: int = 16
    warmup_steps: int = 3

    def __post_init__(self) -> None:
        Workload.__post_init__(self)  # super() needs a cell that slots=True leaves behind
        at_least("steps", self.steps, 1)
        at_least("warmup_steps", self.warmup_steps, 0)

    def child_options(self, **values: Any) -> dict[str, Any]:
        """The options of a child as plain values."""
        steps = {"steps": self.steps, "warmup_steps": self.warmup_steps}
        return Workload.child_options(self, **steps, **values)


def one_run(
    workload: DecodeWorkload,
    mode: str,
    limit: Limit,
    *,
    settings: Mapping[str, Any] | None = None,
    trace: str | None = None,
) -> dict[str, Any]:
    """One child; its result under the keys that every run has, null where there is none.

    `settings` of EngineConfig come on top of the workload's; `trace`: the file of its trace.
    """
    asked, outcome = limited_run(workload, mode, limit, task="run", settings=settings, trace=trace)
    return {
        **asked,
        "warmup_steps": workload.warmup_steps,
        **dict.fromkeys(_MEASURED),
        **outcome.result,
        "oom_killed": outcome.oom_killed,
        "error": outcome.error,
    }


def write_store(workload: DecodeWorkload, mode: str) -> None:
    """Every block of the store written, by a run that is not counted. Raises: DualBladeError."""
    everywhere = Limit(asked=None, limit_bytes=None, budget="auto")
    run = one_run(replace(workload, steps=1, warmup_steps=0), mode, everywhere)
    if run["error"] is not None:
        raise DualBladeError(f"the store could not be written: {run['error']}")


_MEASURED = (
    "engine",
    "kv_bytes",
    "step_seconds_median",
    "step_seconds_p99",
    "step_seconds",
    "cpu_seconds_per_step",
    "stolen_fraction",
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


def told(run: Mapping[str, Any]) -> str:
    """One line about a run, for people who wait."""
    limit = run["memory_limit_bytes"]
    place = run["mode"] + (f" in {format_size(limit)}" if limit is not None else "")
    if run["oom_killed"]:
        return f"{place}: killed for want of memory"
    if run["error"] is not None:
        return f"{place}: {run['error']}"
    read = format_size(run["device_read_bytes_per_step"])
    return (
        f"{place}: {run['step_seconds_median'] * 1000:.1f} ms a step, {read} read{stolen_text(run)}"
    )
