"""Sections of bench report about decoding: modes under limits, the envelope, growing contexts."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from dualblade.bench import figures
from dualblade.bench.report_section import (
    Made,
    Named,
    Section,
    beaten_notes,
    drive_text,
    limit_text,
    machine_text,
    mib,
    model_text,
    ms_spread,
    number_text,
    of_runs,
    percent_range,
    percent_text,
    ratio_spread,
    run_notes,
    runs_of,
    saved_cards,
    stolen_notes,
    title_text,
    workload_text,
)
from dualblade.bench.workload import is_stored
from dualblade.host.machine import cpu_text
from dualblade.units import GIB, MIB


def envelope_section(group: list[Named]) -> Made:
    """What `bench envelope` wrote: one file."""
    ((name, result),) = group
    options, kv = result["options"], result["calibration"]["kv_bytes"]
    section = Section(
        title="The automatic split against fixed ones",
        file=name,
        about=(
            f"{workload_text(options)}, KV {kv / GIB:.2f} GiB. Under each memory limit dual finds "
            f"its split itself; fixed splits put that part of the KV through the page cache. "
            f"Medians of {options['rounds']} rounds, ratios within a round, "
            f"{len(result['runs'])} runs."
        ),
        command=result["command"],
        machine=machine_text(result["machine"]),
        notes=_envelope_notes(result) + stolen_notes(result["runs"]),
        figures=[figures.svg_text(figures.envelope_figure(result))],
        head=["memory", "best split", "its ms/step", "dual ms/step", "dual / best", "killed"],
        rows=[_envelope_row(entry, options["rounds"]) for entry in result["summary"]],
    )
    ratios = [entry["dual_to_best"] for entry in result["summary"]]
    if None in ratios:  # the worst is not known
        return section, []
    return section, [
        (f"{max(ratios):.2f} x", "step of dual to the best fixed split, at the worst limit")
    ]


def _envelope_row(entry: dict[str, Any], rounds: int) -> list[str]:
    percent, pairs = entry["best_static_percent"], entry["pairs"]
    some = f", {pairs} of {rounds} rounds" if 0 < pairs < rounds else ""
    return [
        limit_text(entry["memory_limit"]),
        number_text(percent, "{} %"),
        ms_spread(entry["best_static_seconds"], entry["best_static_seconds_spread"]),
        ms_spread(entry["dual_seconds"], entry["dual_seconds_spread"]),
        ratio_spread(entry["dual_to_best"], entry["dual_to_best_spread"]) + some,
        str(entry["oom_killed"]),
    ]


def _envelope_notes(result: dict[str, Any]) -> list[str]:
    """That the target is reached everywhere, or where it is not and why; and errors."""
    target, notes = result["target"], []
    if result["reached"]:
        notes.append(f"dual is within {target} of the best split at every limit.")
    for entry in result["summary"]:
        at, ratio = f"At {limit_text(entry['memory_limit'])}", entry["dual_to_best"]
        if entry["dual_oom_killed"]:
            notes.append(f"{at} dual was killed for want of memory: {entry['dual_oom_killed']} x.")
        if ratio is None:
            notes.append(f"{at} dual has no time beside one of the best split.")
        elif ratio > target:
            notes.append(
                f"{at} the best fixed split is faster: dual takes {ratio:.2f} times as long."
            )
        notes += [f"{at} runs failed: {error}" for error in entry["errors"]]
    return notes


def decode_section(group: list[Named]) -> Made:
    """What `bench decode` wrote: one file."""
    ((name, result),) = group
    runs, summary, options = result["runs"], result["summary"], result["options"]
    done = [run for run in runs if run["step_seconds_median"] is not None]
    if not done:
        raise ValueError("no run of it got through")
    rows = [
        [
            entry["mode"],
            limit_text(entry["memory_limit"]),
            _step_text(result, entry),
            number_text(entry.get("step_to_memory"), "{:.2f}"),
            number_text(mib(entry["device_read_bytes_per_step"]), "{:.0f}"),
            number_text(_drive_used(entry), "{:.0f} %"),
            number_text(entry["cpu_seconds_per_step"], "{:.2f}"),
            number_text(mib(entry["peak_memory_bytes"]), "{:.0f}"),
        ]
        for entry in summary
    ]
    first = done[0]
    engines = sorted({run["engine"] for run in done if run["engine"]})
    section = Section(
        title=title_text("Decoding", result),
        file=name,
        about=(
            f"{workload_text(options)}, attention {first['attention']}, KV "
            f"{first['kv_bytes'] / GIB:.2f} GiB, engine {', '.join(engines) or 'none'}"
            f"{drive_text(result)}. Medians of {options['repeats']} runs of "
            f"{options['steps']} steps, least to most beside."
        ),
        command=result["command"],
        machine=machine_text(result["machine"]),
        notes=beaten_notes(_times(summary)) + run_notes(runs),
        figures=_decode_figures(result, done),
        head=[
            "mode",
            "limit",
            "ms/step",
            "/ memory",
            "MiB read/step",
            "drive used",
            "CPU s/step",
            "peak MiB",
        ],
        rows=rows,
    )
    limited = [entry for entry in summary if entry["memory_limit"] is not None]
    what = "less time per step than memory-mapped files, under memory limits"
    return section, saved_cards(_times(limited), what)


def _decode_figures(result: dict[str, Any], done: Sequence[dict[str, Any]]) -> list[str]:
    drawn = [figures.decode_figure(result)]
    used = [
        (entry["mode"], entry["memory_limit"], percent)
        for entry in result["summary"]
        if (percent := _drive_used(entry)) is not None and is_stored(entry["mode"])
    ]
    if used:
        drawn.append(figures.utilisation_figure(used))
    stages: dict[str, list[dict[str, float]]] = {}
    for run in done:
        parts = _stages(run)
        if parts is not None:
            stages.setdefault(f"{run['mode']}, {limit_text(run['memory_limit'])}", []).append(parts)
    if stages:
        drawn.append(
            figures.stages_figure(
                [
                    (name, {key: statistics.median(p[key] for p in some) for key in some[0]})
                    for name, some in stages.items()
                ]
            )
        )
    return [figures.svg_text(figure) for figure in drawn]


def _stages(run: dict[str, Any]) -> dict[str, float] | None:
    """ms of a step by what the model's thread did; the model's own part is the rest."""
    told = run.get("seconds_per_step")
    if not told:
        return None
    parts = {
        "waiting for reads": told["read_wait"],
        "attention": told["attention"],
        "gather": told["gather"],
        "taking rows in": told["append"],
    }
    whole = statistics.mean(run["step_seconds"])
    parts["model"] = max(0.0, whole - sum(parts.values()))
    return {name: 1000 * seconds for name, seconds in parts.items()}


def _step_text(result: dict[str, Any], entry: dict[str, Any]) -> str:
    """The time of a step, or how its runs ended."""
    text = ms_spread(entry["step_seconds_median"], entry["step_seconds_spread"])
    return of_runs(text, runs_of(result, entry), "step_seconds_median")


def _drive_used(entry: dict[str, Any]) -> float | None:
    """Percent of the bytes per second that fio had; None where it was not beside, and of files
    that are too old to tell."""
    part = entry.get("ssd_utilisation")
    return None if part is None else 100 * part


def _times(summary: Sequence[dict[str, Any]]) -> dict[tuple[str, str], float]:
    """By limit, in words, and mode."""
    return {
        (limit_text(entry["memory_limit"]), entry["mode"]): entry["step_seconds_median"]
        for entry in summary
        if entry["step_seconds_median"] is not None
    }


def ablation_section(group: list[Named]) -> Made:
    """What `bench decode` wrote whose modes are steps from a baseline to the whole: one file."""
    ((name, result),) = group
    options = result["options"]
    names = dict(zip(options["modes"], options["ablation"], strict=True))
    done = [run for run in result["runs"] if run["step_seconds_median"] is not None]
    if not done:
        raise ValueError("no run of it got through")
    gains = list(_gains(result["summary"]))
    wholes = {entry["memory_limit"]: whole for entry, _, whole in gains if whole is not None}
    section = Section(
        title=f"What each part gains: {model_text(options['model'])}",
        file=name,
        about=(
            f"{workload_text(options)}, attention {options['attention']} where a mode does not say "
            f"otherwise, KV {done[0]['kv_bytes'] / GIB:.2f} GiB. From the baseline to the whole; "
            f"the gain of a step is to the row above. Medians of {options['repeats']} runs."
        ),
        command=result["command"],
        machine=machine_text(result["machine"]),
        notes=[
            f"With {limit_text(entry['memory_limit'])}, {names[entry['mode']]} makes a step "
            f"{-100 * gain:.0f} % longer."
            for entry, gain, _ in gains
            if gain is not None and gain < 0
        ]
        + run_notes(result["runs"]),
        figures=[figures.svg_text(figures.decode_figure(result))],
        head=["step", "mode", "limit", "ms/step", "gain", "in all", "MiB read/step", "CPU s/step"],
        rows=[
            [
                names[entry["mode"]],
                entry["mode"],
                limit_text(entry["memory_limit"]),
                _step_text(result, entry),
                percent_text(gain),
                percent_text(whole),
                number_text(mib(entry["device_read_bytes_per_step"]), "{:.0f}"),
                number_text(entry["cpu_seconds_per_step"], "{:.2f}"),
            ]
            for entry, gain, whole in gains
        ],
    )
    if not wholes:
        return section, []
    value = percent_range(list(wholes.values()))
    return section, [(value, "less time per step than the baseline, by all parts together")]


def _gains(
    summary: Sequence[dict[str, Any]],
) -> Iterator[tuple[dict[str, Any], float | None, float | None]]:
    """Per limit the steps in their order; of each what it gains to the last one before it that has
    a time, and to the first: parts of the step time. None: nothing to compare."""
    for limit in dict.fromkeys(entry["memory_limit"] for entry in summary):
        first: float | None = None
        before: float | None = None
        for entry in summary:
            if entry["memory_limit"] != limit:
                continue
            seconds = entry["step_seconds_median"]
            if seconds is None or first is None or before is None:
                yield entry, None, None
            else:
                yield entry, 1 - seconds / before, 1 - seconds / first
            before = seconds or before
            first = first or seconds


def stored_mode(result: dict[str, Any]) -> str | None:
    """The one mode of a `bench decode` that stores the KV; None of several. `memory` may be beside
    it, as what computing alone takes."""
    modes: list[str] = result.get("options", {}).get("modes", [])
    stored = [mode for mode in modes if is_stored(mode)] or modes
    return stored[0] if len(stored) == 1 else None


def is_growth(result: dict[str, Any]) -> bool:
    """One mode, or `direct` beside `memory`, without limits: a part of a series of contexts."""
    summary = result["summary"]
    if len(summary) != 1 and (len(summary) != 2 or stored_mode(result) != "direct"):
        return False
    return all(entry["memory_limit"] is None for entry in summary)


def series_key(result: dict[str, Any]) -> tuple[Any, ...]:
    """Equal for results that differ in the size of their KV alone: not in what was measured, nor
    in the drive and the machine that measured it. Only a scenario varies the sequences, too."""
    options, machine, scenario = result["options"], result["machine"], result.get("scenario") or {}
    device, git = machine.get("device") or {}, machine.get("git") or {}
    return (
        stored_mode(result),
        *(options[name] for name in ("model", "dtype", "attention", "memory_budget", "store")),
        json.dumps(options["engine"], sort_keys=True),
        scenario.get("name") or options["batch"],
        scenario.get("device_bytes_per_second"),
        cpu_text(machine),
        *(machine[name] for name in ("cpu_count", "memory_bytes", "kernel")),
        device.get("mount_point"),
        git.get("commit"),
    )


def grows(group: list[Named]) -> bool:
    """Whether the files of a series have at least two sizes of KV between them."""
    sizes = {run["kv_bytes"] for _, result in group for run in result["runs"]}
    return len(sizes - {None}) > 1


def growth_section(group: list[Named]) -> Made:
    """One mode at several contexts, each a file."""
    mode = stored_mode(group[0][1])
    runs = [(name, run) for name, result in group for run in result["runs"]]
    done = [(n, r) for n, r in runs if r["mode"] == mode and r["step_seconds_median"] is not None]
    done.sort(key=lambda one: one[1]["kv_bytes"])
    _, result = max(group, key=lambda one: one[1]["options"]["context"])
    options = result["options"]
    points = [
        (run["kv_bytes"] / MIB, 1000 * run["step_seconds_median"], _sequences(run))
        for _, run in done
    ]
    section = Section(
        title=f"Growing contexts, {mode}: {model_text(options['model'])}",
        file=", ".join(name for name, _ in group),
        about=f"{options['model']}, {options['dtype']}, attention {options['attention']}, budget "
        f"{options['memory_budget']}{drive_text(result)}. Time should follow the bytes, and memory "
        "stay flat.",
        command=result["command"],
        machine=machine_text(result["machine"]),
        notes=run_notes([run for _, run in runs]),
        figures=[figures.svg_text(figures.growth_figure(points))],
        head=[
            "sequences x tokens",
            "KV MiB",
            "ms/step",
            "ms per GiB",
            "CPU s per GiB",
            "beyond model MiB",
        ],
        rows=[
            [
                _sequences(run),
                f"{run['kv_bytes'] / MIB:.0f}",
                f"{1000 * run['step_seconds_median']:.0f}",
                f"{1000 * run['step_seconds_median'] * GIB / run['kv_bytes']:.0f}",
                f"{run['cpu_seconds_per_step'] * GIB / run['kv_bytes']:.2f}",
                number_text(mib(_beyond_model(run)), "{:.0f}"),
            ]
            for _, run in done
        ],
    )
    return section, []


def _beyond_model(run: dict[str, Any]) -> int | None:
    """Bytes; None where the kernel keeps no peak (of a cgroup, before 5.19)."""
    peak, base = run["peak_memory_bytes"], run["base_memory_bytes"]
    return None if peak is None or base is None else peak - base


def _sequences(run: dict[str, Any]) -> str:
    return f"{run['batch']} x {run['context']}"
