"""A section of bench report's page, and how its cells are written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dualblade.bench import figures
from dualblade.bench.workload import MMAP, is_stored
from dualblade.host.machine import STOLEN_MAX, cpu_text
from dualblade.units import GIB, KIB, MIB

BEATEN = 1.05
"""Another mode is called faster than `dual` from here on: medians of few runs differ by less."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One part of the page. `figures` are SVG; `rows` are cells as text, the first to the left."""

    title: str
    file: str
    about: str
    command: str = ""
    machine: str = ""
    notes: Sequence[str] = ()
    figures: Sequence[str] = ()
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()


Named = tuple[str, dict[str, Any]]
"""A result and the file it is from."""

Made = tuple[Section, list[tuple[str, str]]]
"""A section, and key figures: value, what it is."""


def workload_text(options: Mapping[str, Any]) -> str:
    """What was decoded."""
    return (
        f"{options['model']}: batch {options['batch']}, context {options['context']}, "
        f"{options['dtype']}"
    )


def model_text(model: str) -> str:
    """A model for a heading: of a shape with settings, the kind and its size."""
    name, _, words = model.removeprefix("random:").partition("?")
    settings = dict(word.split("=", 1) for word in words.split(",") if "=" in word)
    size = [f"{settings[key]} {what}" for key, what in _SIZES.items() if key in settings]
    return f"{name} ({', '.join(size)})" if size else name


_SIZES = {"layers": "layers", "hidden": "wide"}


def title_text(what: str, result: Mapping[str, Any]) -> str:
    """`what` of which model; first of all which run of a scenario, since they share models."""
    title = f"{what} {model_text(result['options']['model'])}"
    run = result.get("scenario", {}).get("run")
    return title if run is None else f"{run}: {title[0].lower()}{title[1:]}"


def drive_text(result: Mapping[str, Any]) -> str:
    """The speed that a scenario held the drive to, if it did."""
    speed = result.get("scenario", {}).get("device_bytes_per_second")
    return "" if speed is None else f", drive held to {speed / 1e6:.0f} MB/s"


def machine_text(machine: Mapping[str, Any]) -> str:
    """What it was measured on and with, in a line; what the file does not know is left out."""
    device, git = machine.get("device"), machine.get("git")
    words = [
        machine["date"],
        f"{machine['cpu_count']} x {cpu_text(machine)}",
        f"{machine['memory_bytes'] / GIB:.0f} GiB",
        f"Linux {machine['kernel']}",
    ]
    if device:
        queue = device["queue"]  # null where no single drive is below: tmpfs, overlay, a network
        words.append(device["file_system"] + (f" on {queue['name']}" if queue else ""))
        ahead = (queue or {}).get("read_ahead_bytes")  # what a mode sets for itself is in its name
        if ahead is not None:
            words.append(f"{ahead // KIB} KiB read ahead")
    words += [f"{name} {machine['versions'][name]}" for name in _PACKAGES]
    if git and git["commit"]:
        words[-1] += f" at {git['commit'][:12]}{' and changes' if git['dirty'] else ''}"
    return ", ".join(words)


_PACKAGES = ("torch", "transformers", "dualblade")


def limit_text(text: str | None) -> str:
    """A limit as it was asked for; None: no limit."""
    return figures.limit_word(text)


def runs_of(result: Mapping[str, Any], entry: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The runs that an entry of the summary is of."""
    same = [name for name in ("mode", "store_state", "memory_limit") if name in entry]
    return [run for run in result["runs"] if all(run[name] == entry[name] for name in same)]


def of_runs(text: str, runs: Sequence[Mapping[str, Any]], name: str) -> str:
    """`text`, of the runs that have `name`; said is how many these are where others were killed or
    failed, and how they ended where none has it."""
    done = sum(run[name] is not None for run in runs)
    if done == 0:
        return "killed" if any(run["oom_killed"] for run in runs) else "failed"
    return text if done == len(runs) else f"{text}, {done} of {len(runs)} runs"


def run_notes(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Each error that ended runs, and of which modes; and `stolen_notes`."""
    failed: dict[str, list[str]] = {}
    for run in runs:
        if run["error"] is not None:
            failed.setdefault(run["error"], []).append(run["mode"])
    return [
        f"Failed ({', '.join(f'{count} x {mode}' for mode, count in Counter(modes).items())}): "
        f"{error}"
        for error, modes in failed.items()
    ] + stolen_notes(runs)


def stolen_notes(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Whether others had the processors while runs were timed; older results do not know."""
    fractions = [run.get("stolen_fraction") or 0.0 for run in runs]
    stolen = [fraction for fraction in fractions if fraction > STOLEN_MAX]
    if not stolen:
        return []
    return [
        f"While {len(stolen)} of {len(runs)} runs were timed, the hypervisor gave more than "
        f"{STOLEN_MAX:.0%} of the processors to others, {max(stolen):.0%} at most."
    ]


def beaten_notes(times: Mapping[tuple[str, str], float]) -> list[str]:
    """Where another mode that stores the KV is faster than `dual`, in words. `times`: by place, in
    words, and mode."""
    return [
        f"With {place}, {mode} is faster: dual takes {ours / seconds:.2f} times as long."
        for (place, mode), seconds in times.items()
        if is_stored(mode) and (ours := times.get((place, "dual"), 0.0)) > BEATEN * seconds
    ]


def saved_cards(times: Mapping[tuple[str, str], float], what: str) -> list[tuple[str, str]]:
    """How much less than memory-mapped files `dual` takes, of `times` as above: of the fastest,
    where there are several that differ in settings."""
    mapped: dict[str, float] = {}
    for (place, mode), seconds in times.items():
        if mode.partition("+")[0] == MMAP:
            mapped[place] = min(seconds, mapped.get(place, seconds))
    saved = [
        1 - times[place, "dual"] / seconds
        for place, seconds in mapped.items()
        if (place, "dual") in times
    ]
    return [(percent_range(saved), what)] if saved else []


def percent_range(parts: Sequence[float]) -> str:
    """The least and the most of some parts of one, as percent."""
    least, most = (f"{100 * part:.0f}" for part in (min(parts), max(parts)))
    return f"{least} %" if least == most else f"{least} to {most} %"


def ms_spread(seconds: float | None, spread: Sequence[float] | None) -> str:
    """ms (least-most)."""
    if seconds is None or spread is None:
        return "-"
    return f"{1000 * seconds:.0f} ({1000 * spread[0]:.0f}-{1000 * spread[1]:.0f})"


def seconds_spread(seconds: float | None, spread: Sequence[float] | None) -> str:
    """Seconds (least-most)."""
    if seconds is None or spread is None:
        return "-"
    return f"{seconds:.2f} ({spread[0]:.2f}-{spread[1]:.2f})"


def percent_text(part: float | None) -> str:
    """A part of one as percent."""
    return "-" if part is None else f"{100 * part:.1f} %"


def ratio_spread(ratio: float | None, spread: Sequence[float] | None) -> str:
    """Ratio (least-most)."""
    if ratio is None or spread is None:
        return "-"
    return f"{ratio:.2f} ({spread[0]:.2f}-{spread[1]:.2f})"


def number_text(value: float | None, form: str) -> str:
    """A number in this form; - for None."""
    return "-" if value is None else form.format(value)


def ms(seconds: float | None) -> float | None:
    """In milliseconds; None stays."""
    return None if seconds is None else 1000 * seconds


def mib(size_bytes: float | None) -> float | None:
    """In MiB; None stays."""
    return None if size_bytes is None else size_bytes / MIB
