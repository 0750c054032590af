"""Figures of result files, by matplotlib (extra `report`). Each takes a result and gives a Figure.

Colours stay apart for the colour-blind (modes: Okabe and Ito; stages of a step: Tol), and none
stands for two things; ours is always the bold blue one.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualblade.bench.workload import LeftForCache, parse_limit
from dualblade.errors import ConfigError, Unsupported
from dualblade.units import GIB, format_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS, BEST, OTHERS = "#0072B2", "#CC79A7", "#8A9199"
_NAME_POINTS, _LINE_POINTS = 8, 9  # of names beside lines

_TALL = 10
"""Times the median that a linear scale still shows."""

_STYLE: Any = {  # matplotlib types its 300 keys one by one
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#E3E6E8",
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text: small, and in the reader's font
    "svg.hashsalt": "dualblade",  # the same figure is the same file
}


def envelope_figure(result: Mapping[str, Any]) -> Figure:
    """Step time against the memory limit: every fixed split, the best of them, and `dual`.

    Raises: Unsupported without matplotlib.
    """
    entries = sorted(result["summary"], key=lambda entry: entry["memory_limit_bytes"])
    with _figure() as (figure, axes):
        by_kv = all(isinstance(parse_limit(e["memory_limit"]), float) for e in entries)
        places = [_limit_place(entry, by_kv=by_kv) for entry in entries]
        percents = sorted({s["percent"] for entry in entries for s in entry["splits"]})
        ends: list[tuple[float, float, str]] = []
        for percent in percents:
            points = [
                (place, 1000 * split["step_seconds_median"])
                for place, entry in zip(places, entries, strict=True)
                for split in entry["splits"]
                if split["percent"] == percent and split["step_seconds_median"] is not None
            ]
            if len(points) == len(entries):
                axes.plot(*zip(*points, strict=True), color=OTHERS, lw=0.8, marker=".", ms=4)
                ends.append((*points[-1], f"{percent} %"))
            elif points:  # tried near the best of some limits only
                axes.plot(*zip(*points, strict=True), color=OTHERS, ls="", marker=".", ms=4)
        _plot_with_spread(axes, places, entries, "best_static", "best fixed split", BEST, lw=1.4)
        _plot_with_spread(axes, places, entries, "dual", "dual (automatic)", OURS, lw=2.8)
        axes.plot([], [], color=OTHERS, lw=0.8, marker=".", ms=4, label="fixed splits")
        axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
        axes.set_xticks(places, [f"{place:g}" for place in places])
        axes.margins(x=0.09)
        _name_lines(axes, ends)
        axes.set_xlabel(
            "memory left for the cache, percent of the KV"
            if by_kv
            else "memory limit of the process, GiB"
        )
        axes.set_ylabel("ms per decode step")
        axes.set_title("The automatic split against every fixed one")
        axes.legend(loc="best")
    return figure


def _name_lines(
    axes: Axes,
    ends: Sequence[tuple[float, float, str]],
    color_of: Callable[[str], str] = lambda _: "#5B6268",
) -> None:
    """Names at the right ends (x, y, name) of lines, moved up where they would overlap."""
    axes.get_ylim()  # settles the limits, which the transform below goes by
    below = -math.inf
    for x, y, name in sorted(ends, key=lambda end: end[1]):
        own = axes.transData.transform((x, y))[1] * 72 / axes.figure.dpi
        at = max(own, below + _LINE_POINTS)
        axes.annotate(
            name,
            (x, y),
            xytext=(7, at - own),
            textcoords="offset points",
            color=color_of(name),
            fontsize=_NAME_POINTS,
            va="center",
        )
        below = at


def decode_figure(result: Mapping[str, Any]) -> Figure:
    """Step time of each mode: against the limits where there are three, else as bars."""
    summary = [entry for entry in result["summary"] if entry["step_seconds_median"] is not None]
    limits = list(dict.fromkeys(entry["memory_limit"] for entry in result["summary"]))
    modes = list(dict.fromkeys(entry["mode"] for entry in summary))
    if len([limit for limit in limits if limit is not None]) < 3:
        return _bars(
            [
                (
                    f"{entry['mode']}, {limit_word(entry['memory_limit'])}",
                    1000 * entry["step_seconds_median"],
                    [1000 * seconds for seconds in entry["step_seconds_spread"]],
                    mode_color(entry["mode"]),
                )
                for entry in summary
            ],
            "Time of a decode step",
            "ms",
        )
    with _figure() as (figure, axes):
        for mode in modes:
            points = [
                (limits.index(entry["memory_limit"]), 1000 * entry["step_seconds_median"])
                for entry in summary
                if entry["mode"] == mode
            ]
            alike = [other for other in modes if mode_color(other) == mode_color(mode)]
            axes.plot(
                *zip(*sorted(points), strict=True),
                color=mode_color(mode),
                ls=_DASHES[alike.index(mode) % len(_DASHES)],
                lw=2.8 if mode == "dual" else 1.4,
                marker="o",
                ms=5,
                label=mode,
                zorder=3 if mode == "dual" else 2,
            )
        took = [entry["step_seconds_median"] for entry in summary]
        # One that thrashes would flatten all others.
        if max(took) > _TALL * statistics.median(took):
            _logarithmic(axes)
        else:
            axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
        axes.set_xticks(range(len(limits)), [limit_word(limit) for limit in limits])
        axes.set_xlabel("memory limit: part of the KV left for its cache, or of the process")
        axes.set_ylabel("ms per decode step")
        axes.set_title("Time of a decode step under memory limits")
        axes.legend(loc="best")
    return figure


def prefill_figure(summary: Sequence[Mapping[str, Any]]) -> Figure:
    """Prefill time of each mode, store state and limit, as bars."""
    return _bars(
        [
            (
                ", ".join(filter(None, (entry["mode"], entry["store_state"], _where(entry)))),
                entry["prefill_seconds"],
                entry["prefill_seconds_spread"],
                mode_color(entry["mode"]),
            )
            for entry in summary
            if entry["prefill_seconds"] is not None
        ],
        "From the prompt to its first token",
        "seconds",
        digits=1,
    )


def _where(entry: Mapping[str, Any]) -> str | None:
    limit = entry["memory_limit"]
    return None if limit is None else limit_word(limit)


def utilisation_figure(entries: Sequence[tuple[str, str | None, float]]) -> Figure:
    """(mode, limit, percent of fio's bandwidth) as bars."""
    return _bars(
        [
            (f"{mode}, {limit_word(limit)}", percent, None, mode_color(mode))
            for mode, limit, percent in entries
        ],
        "How much of the drive's bandwidth was used",
        "percent of fio's",
    )


def stages_figure(bars: Sequence[tuple[str, Mapping[str, float]]]) -> Figure:
    """Where a step's time goes: (name, ms by stage) as stacked bars."""
    stages = list(dict.fromkeys(stage for _, parts in bars for stage in parts))
    with _figure(height=1.2 + 0.3 * len(bars)) as (figure, axes):
        names = [name for name, _ in bars]
        left = [0.0] * len(bars)
        for stage in stages:
            widths = [parts.get(stage, 0.0) for _, parts in bars]
            color = _STAGES.get(stage, OTHERS)
            axes.barh(range(len(bars)), widths, left=left, color=color, label=stage, height=0.66)
            left = [at + width for at, width in zip(left, widths, strict=True)]
        _name_bars(axes, names)
        axes.set_xlabel("ms of the model's thread per step")
        axes.set_title("Where a step's time goes")
        figure.legend(ncols=len(stages), loc="outside lower center", fontsize=8.5)
    return figure


def growth_figure(points: Sequence[tuple[float, float, str]]) -> Figure:
    """(KV in MiB, ms per step, name): whether the cost grows with the bytes alone."""
    largest, longest, _ = max(points)
    with _figure(height=3.4) as (figure, axes):
        axes.axline((0, 0), (largest, longest), color=OTHERS, lw=0.8, ls="--", zorder=1)
        for size, took, _ in points:
            axes.plot(size, took, color=OURS, marker="o", ms=6)
        for name, (size, took) in {name: (size, took) for size, took, name in points}.items():
            axes.annotate(
                name,
                (size, took),
                xytext=(7, -3),
                textcoords="offset points",
                color="#5B6268",
                fontsize=_NAME_POINTS,
                va="top",
            )
        axes.margins(x=0.12)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("KV, MiB")
        axes.set_ylabel("ms per decode step")
        axes.set_title("Step time against the size of the KV")
    return figure


def changing_memory_figure(result: Mapping[str, Any]) -> Figure:
    """Step time over time, each mode's first run, with the memory that there is below it.

    Raises: Unsupported without matplotlib.
    """
    with _figure() as (figure, axes):
        ends: list[tuple[float, float, str]] = []
        for entry in result["summary"]:
            mode = entry["mode"]
            run = next((r for r in result["runs"] if r["mode"] == mode and r.get("steps")), None)
            if run is None:
                continue
            begins = [0.0]
            for phase in run["phases"]:
                begins.append(begins[-1] + phase["seconds"])
            points = [
                (begins[step["phase"]] + step["at_seconds"], 1000 * step["seconds"])
                for step in run["steps"]
            ]
            color, width = mode_color(mode), 2.2 if mode == "dual" else 1.0
            axes.plot(*zip(*points, strict=True), color=color, lw=width)
            ends.append((*points[-1], mode.partition("+")[0]))
        at = 0.0
        for phase in result["phases"]:
            axes.axvline(at, color="#B8BEC3", lw=0.8, ls=":")
            where = (at, 1.01)
            text = f" {phase['fraction']:.0%} in memory"
            axes.annotate(text, where, xycoords=("data", "axes fraction"), fontsize=_NAME_POINTS)
            at += phase["seconds"]
        _logarithmic(axes)
        axes.set_xlabel("seconds")
        axes.set_ylabel("ms per decode step")
        axes.set_title("Memory that changes while it decodes", pad=18)
        axes.margins(x=0.02)
        _name_lines(axes, ends, mode_color)
    return figure


def _logarithmic(axes: Axes) -> None:
    """The y axis, with numbers, not powers."""
    axes.set_yscale("log", subs=[])
    axes.locator_params("y", subs=(1, 2, 5))
    axes.yaxis.set_major_formatter("{x:g}")


def mode_color(mode: str) -> str:
    """One colour to a mode, in all figures, whatever its settings."""
    return _MODES.get(mode.partition("+")[0], OTHERS)


_MODES = {
    "dual": OURS,
    "direct": "#009E73",
    "page-cache": "#E69F00",
    "mmap": "#D55E00",
    "memory": "#5B6268",
    "dynamic-cache": "#A7ADB2",
    "offloaded-cache": "#8C6D46",
}
_DASHES = ("-", "--", ":", "-.")
"""Of lines of one colour: a mode with several settings."""
_STAGES = {
    "waiting for reads": "#882255",
    "attention": "#44AA99",
    "gather": "#88CCEE",
    "taking rows in": "#DDCC77",
    "model": "#C9CED2",
}


def _bars(
    bars: Sequence[tuple[str, float, Sequence[float] | None, str]],
    title: str,
    unit: str,
    digits: int = 0,
) -> Figure:
    """(name, value, [least, most] or None, colour), the first on top, with the values written."""
    with _figure(height=0.9 + 0.3 * len(bars)) as (figure, axes):
        for place, (_, value, spread, color) in enumerate(bars):
            error = None if spread is None else [[value - spread[0]], [spread[1] - value]]
            axes.barh(
                place, value, color=color, height=0.66, xerr=error, error_kw={"lw": 1, "capsize": 2}
            )
            end = value if spread is None else spread[1]
            axes.annotate(
                f"{value:.{digits}f}",
                (end, place),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize=8.5,
            )
        _name_bars(axes, [name for name, *_ in bars])
        axes.set_xlabel(unit)
        axes.set_title(title)
        axes.margins(x=0.08)
    return figure


def _name_bars(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x")


def limit_word(limit: str | None) -> str:
    """A limit as it was asked for, for people."""
    wanted = None if limit is None else parse_limit(limit)
    if wanted is None:
        return "no limit"
    if isinstance(wanted, LeftForCache):
        return f"{format_size(wanted.size_bytes)} for the cache"
    return f"{100 * wanted:g} %" if isinstance(wanted, float) else str(limit)


def _plot_with_spread(
    axes: Axes,
    places: list[float],
    entries: list[Mapping[str, Any]],
    name: str,
    label: str,
    color: str,
    lw: float,
) -> None:
    """Medians as a line, least to most as bars; entries without a figure are left out."""
    known = [(p, e) for p, e in zip(places, entries, strict=True) if e[f"{name}_seconds"]]
    if not known:
        return
    medians = [1000 * entry[f"{name}_seconds"] for _, entry in known]
    spreads = [entry[f"{name}_seconds_spread"] for _, entry in known]
    below = [m - 1000 * low for m, (low, _) in zip(medians, spreads, strict=True)]
    above = [1000 * high - m for m, (_, high) in zip(medians, spreads, strict=True)]
    axes.errorbar(
        [place for place, _ in known],
        medians,
        yerr=[below, above],
        color=color,
        lw=lw,
        elinewidth=1,
        capsize=3,
        marker="o",
        ms=4 + lw / 2,
        label=label,
        zorder=3,
    )


def _limit_place(entry: Mapping[str, Any], *, by_kv: bool) -> float:
    """Where a limit stands on the axis: percent of the KV, or GiB where some were sizes."""
    wanted = parse_limit(entry["memory_limit"])
    if by_kv and isinstance(wanted, float):
        return 100 * wanted
    return int(entry["memory_limit_bytes"]) / GIB


@contextlib.contextmanager
def _figure(width: float = 7.2, height: float = 4.2) -> Iterator[tuple[Figure, Axes]]:
    """A figure of one plot, in inches, in our style. Raises: Unsupported without matplotlib."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as exc:
        raise Unsupported(
            "figures need matplotlib", hint="pip install 'dualblade[report]'"
        ) from exc
    with rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.subplots()


def require_figures(path: Path | None = None) -> None:
    """Before the work: can figures be drawn, and written to `path`? Raises: Unsupported,
    ConfigError for a name that ends otherwise than .svg or .png, or a place that takes no file."""
    if path is not None and path.suffix not in (".svg", ".png"):
        raise ConfigError(f"a figure is a .svg or .png file, not {path.name!r}")
    if path is not None:
        require_place(path)
    with _figure():
        pass


def require_place(path: Path) -> None:
    """Before the work: can a file be written at `path`? Raises: ConfigError."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise ConfigError(f"cannot write {path}: there is no folder {folder}")
    if path.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise ConfigError(f"cannot write {path}", hint="name a file in a folder of your own")


def save_figure(figure: Figure, path: Path) -> None:
    """Write SVG or PNG, by the name's ending. Raises: ConfigError when it cannot be written."""
    from matplotlib import rc_context

    metadata = {"Date": None} if path.suffix == ".svg" else None
    try:
        with rc_context(_STYLE):
            figure.savefig(path, dpi=160, metadata=metadata)
    except OSError as exc:
        raise ConfigError(f"cannot write {path}: {exc.strerror}") from exc


def svg_text(figure: Figure) -> str:
    """The figure as an `<svg>` element, to stand in a page."""
    from matplotlib import rc_context

    out = io.StringIO()
    with rc_context(_STYLE):
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]
