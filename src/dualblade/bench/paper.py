"""bench paper: a whole experiment from a scenario file, into a folder of results.

Every run of the file goes through the same function as its command and leaves one result, in the
form that `bench report` reads. Finished runs are kept beside it at once (NAME.jsonl), so an
interrupted experiment goes on where it stopped. What the machine cannot do is refused before the
first run, with the numbers.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dualblade.bench.decode import DecodeBenchOptions, run_decode_bench
from dualblade.bench.prefill import PrefillBenchOptions, run_prefill_bench
from dualblade.bench.run_log import finished_count
from dualblade.bench.scenario import Entry, Scenario
from dualblade.bench.series import Watch, require_fio
from dualblade.bench.workload import (
    LeftForCache,
    Progress,
    is_device,
    is_stored,
    parse_limit,
    quiet,
    require_cgroup,
    store_place,
    wants_limits,
)
from dualblade.errors import BudgetError, ConfigError, DualBladeError, NoSpace, Unsupported
from dualblade.host.memory import available_memory
from dualblade.host.throttle import throttled
from dualblade.units import GIB, MIB, format_size

PROCESS_BYTES = 768 * MIB
"""Of a run besides weights and KV: Python, torch and transformers have 500 MiB resident, staging
and activations of a small model the rest."""

Keep = Callable[[Path, dict[str, Any]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """The most that one run of an entry takes, in bytes; `why` in words."""

    memory_bytes: int
    store_bytes: int
    why: str


def run_paper(
    scenario: Scenario, output: Path, keep: Keep, progress: Progress = quiet
) -> dict[str, Any]:
    """Run what `output` does not hold yet; what was done, ready for JSON. `keep` writes a result.

    An entry that fails is told and stops no other. On an exception (Ctrl-C too) no child, no
    cgroup and no store file that was not there before is left, and the throttle is lifted.

    Raises: BudgetError or NoSpace when the machine is too small; Unsupported when limits or a
            throttle are asked for and impossible here; ConfigError for a folder of another
            scenario; DualBladeError when every entry failed.
    """
    scenario = _without_fio(scenario, progress)
    place = store_place(scenario.entries[0].options.store)
    left = _unfinished(scenario, output)
    _require(left, place)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise ConfigError(f"cannot make {output}: {exc.strerror}") from exc
    told = []
    for number, entry in enumerate(scenario.entries):
        following = sum(later.run_count for later in scenario.entries[number + 1 :])
        watch = Watch(
            progress=_prefixed(f"[{number + 1}/{len(scenario.entries)} {entry.name}]", progress),
            log_path=_log_of(entry, output),
            following=following,
            device_bytes_per_second=entry.device_bytes_per_second,
        )
        with _held_to(entry.device_bytes_per_second if entry in left.entries else None, place):
            told.append(_one(scenario, entry, output / f"{entry.name}.json", keep, watch))
    if all(each["error"] is not None for each in told):
        raise DualBladeError(f"no run of {scenario.name} got through: {told[0]['error']}")
    return {
        "benchmark": "paper",
        "scenario": scenario.name,
        "title": scenario.title,
        "output": str(output),
        "entries": told,
    }


def _require_throttle(scenario: Scenario, place: Path) -> None:
    """Refused now, not after the runs before the first that is held. Raises: Unsupported."""
    held = [entry.device_bytes_per_second for entry in scenario.entries]
    fastest = max(filter(None, held), default=None)
    if fastest is None:
        return
    store = scenario.entries[0].options.store
    if store is not None and store.is_char_device():
        raise Unsupported(
            f"the drive cannot be throttled: commands to {store} go past the block layer",
            hint=f"name {place} as the store",
        )
    with throttled(place, fastest):
        pass


@contextlib.contextmanager
def _held_to(speed: int | None, place: Path) -> Iterator[None]:
    """The drive below `place` held to `speed`; None: as it is.

    Held, it is another drive, and what was measured of its own speed would mislead every plan:
    children find no profile, and save theirs where it goes with the throttle.
    """
    if speed is None:
        yield
        return
    before = os.environ.get("XDG_CONFIG_HOME")
    with throttled(place, speed), tempfile.TemporaryDirectory(prefix="dualblade-") as profiles:
        os.environ["XDG_CONFIG_HOME"] = profiles
        try:
            yield
        finally:
            if before is None:
                del os.environ["XDG_CONFIG_HOME"]
            else:
                os.environ["XDG_CONFIG_HOME"] = before


def _prefixed(head: str, progress: Progress) -> Progress:
    return lambda line: progress(f"{head} {line}")


def _one(scenario: Scenario, entry: Entry, file: Path, keep: Keep, watch: Watch) -> dict[str, Any]:
    about = {"name": entry.name, "benchmark": entry.benchmark}
    try:
        if isinstance(entry.options, DecodeBenchOptions):
            result = run_decode_bench(entry.options, watch)
        else:
            result = run_prefill_bench(entry.options, watch)
    except ConfigError:  # the folder's, or the file's: nobody waits for hours to learn of it
        raise
    except DualBladeError as exc:
        line = " ".join(str(exc).split())
        watch.progress(line)
        return {**about, "file": None, "error": line, "tokens_agree": None, "summary": []}
    keep(
        file,
        {
            **result,
            "scenario": {
                "name": scenario.name,
                "run": entry.name,
                "device_bytes_per_second": entry.device_bytes_per_second,
            },
        },
    )
    facts = {name: result[name] for name in ("tokens_agree", "summary")}
    return {**about, "file": str(file), "error": None, **facts}


def _without_fio(scenario: Scenario, progress: Progress) -> Scenario:
    """Where fio cannot be had the drive's own speed stays unknown, and nothing else changes."""
    if not any(entry.options.compare_fio for entry in scenario.entries):
        return scenario
    try:
        require_fio(scenario.entries[0].options.store)
    except Unsupported as exc:
        progress(f"{exc.message}: how much of the drive was used is left out ({exc.hint})")
        entries = (
            replace(entry, options=replace(entry.options, compare_fio=False))
            for entry in scenario.entries
        )
        return replace(scenario, entries=tuple(entries))
    return scenario


def needs_of(entry: Entry) -> Needs:
    """Before anything is loaded: from the configuration of the model alone. The `memory` modes
    count where they have no limit, which would kill them. Raises: ConfigError."""
    import torch  # here: costs seconds to import

    from dualblade.hf.footprint import footprint
    from dualblade.hf.geometry import layer_shapes
    from dualblade.hf.models import config_of

    options = entry.options
    config = config_of(options.model)
    dtype = getattr(torch, options.dtype, torch.bfloat16)
    weights = footprint(config, dtype, rows=1, staging_bytes=0).weights_bytes
    heads = sum(s.kv_heads * (s.key_dim + s.value_dim) for s in layer_shapes(config))
    kv = heads * dtype.itemsize * options.batch * options.context
    cache = 0
    for text in options.memory_limits or ("none",):
        limit = parse_limit(text)
        if limit is None and not all(map(is_stored, options.modes)):
            cache = max(cache, kv)
        elif isinstance(limit, LeftForCache):
            cache = max(cache, min(kv, limit.size_bytes))
        elif isinstance(limit, float):
            cache = max(cache, min(kv, int(limit * kv)))
        elif limit is not None:
            cache = max(cache, min(kv, limit - weights - PROCESS_BYTES))
    stores = 1
    if isinstance(options, PrefillBenchOptions) and options.store_state != "fresh":
        stores = 3  # the kept one, mapped files and a fresh one
    scratch = GIB if options.compare_fio else 0
    return Needs(
        memory_bytes=PROCESS_BYTES + weights + cache,
        store_bytes=stores * kv + scratch if entry.is_stored else 0,
        why=f"weights {format_size(weights)}, up to {format_size(cache)} of KV in memory",
    )


def _log_of(entry: Entry, output: Path) -> Path:
    return output / f"{entry.name}.jsonl"


def _unfinished(scenario: Scenario, output: Path) -> Scenario:
    """The entries that have something to run: what is finished is only written again."""
    left = (e for e in scenario.entries if finished_count(_log_of(e, output)) < e.run_count)
    return replace(scenario, entries=tuple(left))


def _require(scenario: Scenario, place: Path) -> None:
    """That this machine can do it all. Raises: BudgetError, NoSpace, Unsupported."""
    if not scenario.entries:
        return
    _require_room(scenario)
    if any(wants_limits(entry.options.memory_limits) for entry in scenario.entries):
        require_cgroup()
    _require_throttle(scenario, place)


def _require_room(scenario: Scenario) -> None:
    """By the entries that need the most. Raises: BudgetError, NoSpace."""
    needs = [(entry, needs_of(entry)) for entry in scenario.entries]
    smaller = "take a smaller scenario (dualblade bench paper --list), or another machine"
    entry, most = max(needs, key=lambda each: each[1].memory_bytes)
    there = available_memory()
    if most.memory_bytes > there.available_bytes:
        raise BudgetError(
            f"scenario {scenario.name} needs {format_size(most.memory_bytes)} of memory for its "
            f"run {entry.name} ({most.why}); there are {format_size(there.available_bytes)} "
            f"({there.source})",
            needed_bytes=most.memory_bytes,
            hint=smaller,
        )
    entry, most = max(needs, key=lambda each: each[1].store_bytes)
    if is_device(entry.options.store):
        return  # as large as it was formatted: the store tells
    folder = store_place(entry.options.store)
    free = shutil.disk_usage(folder).free
    if most.store_bytes > free:
        raise NoSpace(
            f"scenario {scenario.name} needs {format_size(most.store_bytes)} on the drive for its "
            f"run {entry.name}; {format_size(free)} are free in {folder}",
            operation="plan",
            path=str(folder),
        )
