"""bench report: one self-contained HTML page from any mixture of our result files.

A file's kind is told by what is in it, not by its name. Each becomes a section: what was asked,
figures, a table of medians with their spread, the command to repeat it, and what it was measured
on. Where another mode beats `dual`, the section says so.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dualblade.bench import figures
from dualblade.bench.decode_run import is_stored
from dualblade.errors import ConfigError, Unsupported
from dualblade.units import GIB, MIB

BEATEN = 1.05
"""Another mode is called faster than `dual` from here on: medians of few runs differ by less."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One part of the page. `figures` are SVG; `rows` are cells as text, the first to the left."""

    title: str
    file: str
    about: str
    command: str = ""
    machine: Mapping[str, Any] | None = None
    notes: Sequence[str] = ()
    figures: Sequence[str] = ()
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()


@dataclass(slots=True)
class Page:
    """What was found: sections, key figures (value, what it is), and files left out with why."""

    sections: list[Section] = field(default_factory=list)
    cards: list[tuple[str, str]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def write_report(folder: Path, output: Path) -> Page:
    """The page of all results below `folder`, written to `output`.

    Raises: Unsupported without jinja2 and matplotlib (extra `report`); ConfigError when there is
            no folder, no result in it, or the page cannot be written.
    """
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError as exc:
        raise Unsupported("a report needs jinja2", hint="pip install 'dualblade[report]'") from exc
    figures.require_figures()
    page = collect(folder)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template("report.html").render(page=page, folder=str(folder))
    try:
        output.write_text(text)
    except OSError as exc:
        raise ConfigError(f"cannot write {output}: {exc.strerror}") from exc
    return page


def collect(folder: Path) -> Page:
    """Sections of all results below `folder`, in the order of SECTIONS. Raises: ConfigError."""
    if not folder.is_dir():
        raise ConfigError(f"no folder {folder}")
    page = Page()
    found: dict[str, list[Named]] = {kind: [] for kind in SECTIONS}
    for path in sorted(folder.rglob("*.json")):
        name = str(path.relative_to(folder))
        try:
            result = json.loads(path.read_text())
        except (OSError, ValueError) as exc:
            page.skipped.append(f"{name}: {exc}")
            continue
        kind = kind_of(result)
        if kind is None:
            page.skipped.append(f"{name}: not a result of ours")
        else:
            found[kind].append((name, result))
    for kind, results in found.items():
        for group in _grouped(kind, results):
            names = ", ".join(name for name, _ in group)
            try:
                section, cards = SECTIONS[kind](group)
            except (LookupError, TypeError, ValueError) as exc:  # of an older or newer version
                page.skipped.append(f"{names}: {type(exc).__name__} {exc}")
                continue
            page.sections.append(section)
            page.cards += cards
    if not page.sections:
        raise ConfigError(f"no results in {folder}", hint="make some: dualblade bench --help")
    return page


def kind_of(result: Any) -> str | None:
    """Which of SECTIONS a parsed file is, if any."""
    if not isinstance(result, dict):
        return None
    marks = {
        "envelope": {"benchmark", "calibration", "target"},
        "io": {"read_bytes_per_second", "effective_queue_depth", "machine"},
        "attention": {"bench", "kernel", "threads", "machine"},
        "demo": {"kv_to_budget", "answer", "machine"},
        "generate": {"prefill_seconds", "decode_seconds_per_token", "tokens_per_sweep", "cache"},
    }
    kind = next((kind for kind, mark in marks.items() if mark <= set(result)), None)
    if result.get("benchmark") == "decode":
        kind = "growth" if len(result["summary"]) == 1 else "decode"
    return kind


def _grouped(kind: str, results: list[Named]) -> list[list[Named]]:
    """Files that make one section: runs of one mode at several contexts; generations."""
    if kind == "generate":
        return [results] if results else []
    if kind != "growth":
        return [[one] for one in results]
    series: dict[tuple[Any, ...], list[Named]] = {}
    for name, result in results:
        options = result["options"]
        same = (options[key] for key in ("model", "batch", "dtype", "memory_budget"))
        key = (*same, result["summary"][0]["mode"], result["summary"][0]["memory_limit"])
        series.setdefault(key, []).append((name, result))
    return list(series.values())


Named = tuple[str, dict[str, Any]]
Made = tuple[Section, list[tuple[str, str]]]


def _envelope(group: list[Named]) -> Made:
    ((name, result),) = group
    rows = []
    for entry in result["summary"]:
        rows.append(
            [
                _limit(entry["memory_limit"]),
                "-"
                if entry["best_static_percent"] is None
                else f"{entry['best_static_percent']} %",
                _ms_spread(entry["best_static_seconds"], entry["best_static_seconds_spread"]),
                _ms_spread(entry["dual_seconds"], entry["dual_seconds_spread"]),
                _ratio_spread(entry["dual_to_best"], entry["dual_to_best_spread"]),
                str(entry["oom_killed"]),
            ]
        )
    ratios = [e["dual_to_best"] for e in result["summary"] if e["dual_to_best"] is not None]
    above = [
        f"At {_limit(e['memory_limit'])} the best fixed split is faster: "
        f"dual takes {e['dual_to_best']:.2f} times as long."
        for e in result["summary"]
        if e["dual_to_best"] is not None and e["dual_to_best"] > result["target"]
    ]
    options, kv = result["options"], result["calibration"]["kv_bytes"]
    section = Section(
        title="The automatic split against fixed ones",
        file=name,
        about=(
            f"{_workload(options)}, KV {kv / GIB:.2f} GiB. Under each memory limit dual finds its "
            f"split itself; fixed splits put that part of the KV through the page cache. Medians "
            f"of {options['rounds']} rounds, ratios within a round, {len(result['runs'])} runs."
        ),
        command=result["command"],
        machine=result["machine"],
        notes=above or [f"dual is within {result['target']} of the best split at every limit."],
        figures=[figures.svg_text(figures.envelope_figure(result))],
        head=["memory", "best split", "its ms/step", "dual ms/step", "dual / best", "killed"],
        rows=rows,
    )
    worst = f"{max(ratios):.2f} x" if ratios else "-"
    return section, [(worst, "step of dual to the best fixed split, at the worst limit")]


def _decode(group: list[Named]) -> Made:
    ((name, result),) = group
    runs, summary, options = result["runs"], result["summary"], result["options"]
    done = [run for run in runs if run["step_seconds_median"] is not None]
    if not done:
        raise ValueError("no run of it got through")
    rows = []
    for entry in summary:
        same = [
            run
            for run in done
            if (run["mode"], run["memory_limit"]) == (entry["mode"], entry["memory_limit"])
        ]
        used = _median([part for run in same if (part := _utilisation(run)) is not None])
        rows.append(
            [
                entry["mode"],
                _limit(entry["memory_limit"]),
                _ms_spread(entry["step_seconds_median"], entry["step_seconds_spread"], "killed"),
                _number(entry.get("step_to_memory"), "{:.2f}"),
                _number(_median([r["device_read_bytes_per_step"] / MIB for r in same]), "{:.0f}"),
                _number(None if used is None else 100 * used, "{:.0f} %"),
                _number(_median([r["cpu_seconds_per_step"] for r in same]), "{:.2f}"),
                _number(_median([r["peak_memory_bytes"] / MIB for r in same]), "{:.0f}"),
            ]
        )
    first = done[0]
    engines = sorted({run["engine"] for run in done if run["engine"]})
    section = Section(
        title=f"Decoding {options['model']}",
        file=name,
        about=(
            f"{_workload(options)}, attention {first['attention']}, KV "
            f"{first['kv_bytes'] / GIB:.2f} GiB, engine {', '.join(engines) or 'none'}. Medians "
            f"of {options['repeats']} runs of {options['steps']} steps, least to most beside."
        ),
        command=result["command"],
        machine=result["machine"],
        notes=_beaten(summary),
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
    return section, _decode_cards(summary)


def _decode_figures(result: dict[str, Any], done: Sequence[dict[str, Any]]) -> list[str]:
    drawn = [figures.decode_figure(result)]
    used: dict[tuple[str, str | None], list[float]] = {}
    stages: dict[str, list[dict[str, float]]] = {}
    for run in done:
        part = _utilisation(run)
        if part is not None and is_stored(run["mode"]):
            used.setdefault((run["mode"], run["memory_limit"]), []).append(part)
        parts = _stages(run)
        if parts is not None:
            stages.setdefault(f"{run['mode']}, {_limit(run['memory_limit'])}", []).append(parts)
    if used:
        bars = [(mode, limit, statistics.median(some)) for (mode, limit), some in used.items()]
        drawn.append(figures.utilisation_figure(bars))
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


def _utilisation(run: dict[str, Any]) -> float | None:
    """Bytes per second that the drive gave over fio's; older files have it not ready."""
    speed = run["fio_read_bytes_per_second"]
    if not speed:
        return None
    return float(run["device_read_bytes_per_step"] / run["step_seconds_median"] / speed)


def _beaten(summary: Sequence[dict[str, Any]]) -> list[str]:
    """Where another mode that stores the KV is faster than `dual`, in words."""
    times = {(e["mode"], e["memory_limit"]): e["step_seconds_median"] for e in summary}
    notes = []
    for (mode, limit), seconds in times.items():
        ours = times.get(("dual", limit))
        if seconds and ours and is_stored(mode) and ours > BEATEN * seconds:
            notes.append(
                f"With {_limit(limit)}, {mode} is faster: dual takes {ours / seconds:.2f} times "
                "as long."
            )
    return notes


def _decode_cards(summary: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """dual against mapped files, where both ran under a limit."""
    times = {(e["mode"], e["memory_limit"]): e["step_seconds_median"] for e in summary}
    saved = [
        1 - times["dual", limit] / seconds
        for (mode, limit), seconds in times.items()
        if mode == "mmap" and limit is not None and seconds and times.get(("dual", limit))
    ]
    if not saved:
        return []
    least, most = 100 * min(saved), 100 * max(saved)
    value = f"{least:.0f} %" if len(saved) == 1 else f"{least:.0f}-{most:.0f} %"
    return [(value, "less time per step than memory-mapped files, under memory limits")]


def _io(group: list[Named]) -> Made:
    ((name, result),) = group
    fio = result.get("fio")
    ratio = None if fio is None else fio["throughput_ratio_median"]
    options = result["options"]
    section = Section(
        title="The I/O engine",
        file=name,
        about=f"Engine {result['engine']}, requests of {options['chunk_bytes'] / MIB:g} MiB, "
        f"{options['queue_depth']} in flight, O_DIRECT.",
        command=result["command"],
        machine=result["machine"],
        head=["read GiB/s", "write GiB/s", "read / fio", "CPU s per GiB", "queue depth"],
        rows=[
            [
                f"{result['read_bytes_per_second'] / GIB:.2f}",
                f"{result['write_bytes_per_second'] / GIB:.2f}",
                _number(ratio, "{:.2f}"),
                f"{result['cpu_seconds_per_gib_read']:.3f}",
                f"{result['effective_queue_depth']:.2f}",
            ]
        ],
    )
    if ratio is None:
        return section, []
    return section, [(f"{ratio:.2f} x", f"fio's bandwidth at {options['chunk_bytes'] >> 10} KiB")]


def _attention(group: list[Named]) -> Made:
    ((name, result),) = group
    ways = ("tiles", "exact", "sdpa_contiguous", "memory_read")
    rows = [
        [
            ", ".join(str(run[k]) for k in ("batch", "query_heads", "kv_heads", "tokens", "dim"))
            + f"; {run['dtype']}",
            *(f"{run[f'{way}_gib_per_second']:.1f}" for way in ways),
            f"{run['tiles_to_exact']:.1f}",
        ]
        for run in result["runs"]
    ]
    section = Section(
        title="Attention",
        file=name,
        about=f"GiB of KV per second; {result['kernel']} kernel, {result['threads']} threads.",
        command=result["command"],
        machine=result["machine"],
        head=["B, H, G, T, D", "tiles", "exact", "contiguous", "memory read", "tiles / exact"],
        rows=rows,
    )
    middle = statistics.median(run["tiles_to_exact"] for run in result["runs"])
    return section, [(f"{middle:.1f} x", "attention over tiles to gathering first")]


def _demo(group: list[Named]) -> Made:
    ((name, result),) = group
    rows = [
        [
            run["path"],
            f"{run['prefill_seconds']:.1f}",
            f"{1000 * run['decode_seconds_per_token']:.0f}",
            f"{run['device_read_bytes_per_token'] / MIB:.1f}",
            f"{run['peak_memory_bytes'] / MIB:.0f}",
        ]
        for run in result["runs"]
    ]
    same = "All paths gave the same text." if result["tokens_agree"] else "The texts differ."
    section = Section(
        title="The demo",
        file=name,
        about=f"{result['prompt_tokens']} tokens of prompt, KV {result['kv_bytes'] / MIB:.0f} MiB, "
        f"{result['kv_to_budget']:.1f} times the budget. {same}",
        command=result["command"],
        machine=result["machine"],
        head=["path", "prefill s", "ms/token", "MiB read/token", "peak MiB"],
        rows=rows,
    )
    return section, []


def _growth(group: list[Named]) -> Made:
    if len(group) < 2:
        return _decode(group)
    runs = [(name, run) for name, result in group for run in result["runs"]]
    done = [(n, r) for n, r in runs if r["step_seconds_median"] is not None]
    done.sort(key=lambda one: one[1]["kv_bytes"])
    _, result = max(group, key=lambda one: one[1]["options"]["context"])
    options = result["options"]
    points = [(run["kv_bytes"] / MIB, 1000 * run["step_seconds_median"]) for _, run in done]
    section = Section(
        title=f"Growing contexts, {done[0][1]['mode']}",
        file=", ".join(name for name, _ in group),
        about=f"{options['model']}: batch {options['batch']}, {options['dtype']}, budget "
        f"{options['memory_budget']}. Time should follow the bytes, and memory stay flat.",
        command=result["command"],
        machine=result["machine"],
        figures=[figures.svg_text(figures.growth_figure(points))],
        head=["tokens", "KV MiB", "ms/step", "ms per GiB", "CPU s per GiB", "beyond model MiB"],
        rows=[
            [
                str(run["context"]),
                f"{run['kv_bytes'] / MIB:.0f}",
                f"{1000 * run['step_seconds_median']:.0f}",
                f"{1000 * run['step_seconds_median'] * GIB / run['kv_bytes']:.0f}",
                f"{run['cpu_seconds_per_step'] * GIB / run['kv_bytes']:.2f}",
                f"{(run['peak_memory_bytes'] - run['base_memory_bytes']) / MIB:.0f}",
            ]
            for _, run in done
        ],
    )
    return section, []


def _generate(group: list[Named]) -> Made:
    rows = [
        [
            name,
            f"{run['cache']['path']}, {run['cache']['attention']}, {run['dtype']}",
            f"{run['prompt_tokens']} + {run['new_tokens']}",
            f"{run['prefill_seconds']:.1f}",
            f"{1000 * run['decode_seconds_per_token']:.0f}",
            f"{run['tokens_per_sweep']:.2f}",
            f"{run['read_bytes_per_token'] / MIB:.1f}",
        ]
        for name, run in group
    ]
    section = Section(
        title="Generations",
        file=f"{len(group)} files",
        about="Single runs of dualblade generate --json.",
        head=["file", "path", "tokens", "prefill s", "ms/token", "per sweep", "MiB read/token"],
        rows=rows,
    )
    return section, []


SECTIONS: dict[str, Callable[[list[Named]], Made]] = {
    "envelope": _envelope,
    "decode": _decode,
    "growth": _growth,
    "demo": _demo,
    "io": _io,
    "attention": _attention,
    "generate": _generate,
}


def _workload(options: Mapping[str, Any]) -> str:
    return (
        f"{options['model']}: batch {options['batch']}, context {options['context']}, "
        f"{options['dtype']}"
    )


def _limit(text: str | None) -> str:
    return figures.limit_word(text)


def _ms_spread(seconds: float | None, spread: Sequence[float] | None, none: str = "-") -> str:
    if seconds is None or spread is None:
        return none
    return f"{1000 * seconds:.0f} ({1000 * spread[0]:.0f}-{1000 * spread[1]:.0f})"


def _ratio_spread(ratio: float | None, spread: Sequence[float] | None) -> str:
    if ratio is None or spread is None:
        return "-"
    return f"{ratio:.2f} ({spread[0]:.2f}-{spread[1]:.2f})"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None
