"""Figures of result files, by matplotlib (extra `report`). Each takes a result and gives a Figure.

Colours stay apart for the colour-blind (Okabe and Ito); ours is always the bold blue one.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualblade.bench.decode_run import parse_limit
from dualblade.errors import ConfigError, Unsupported
from dualblade.units import GIB

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS, BEST, OTHERS = "#0072B2", "#D55E00", "#8A9199"

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
        places = [_limit_place(entry) for entry in entries]
        percents = sorted({s["percent"] for entry in entries for s in entry["splits"]})
        for percent in percents:
            points = [
                (place, 1000 * split["step_seconds_median"])
                for place, entry in zip(places, entries, strict=True)
                for split in entry["splits"]
                if split["percent"] == percent and split["step_seconds_median"] is not None
            ]
            if len(points) == len(entries):
                axes.plot(*zip(*points, strict=True), color=OTHERS, lw=0.8, marker=".", ms=4)
                axes.annotate(
                    f"{percent} %",
                    points[-1],
                    xytext=(7, 0),
                    textcoords="offset points",
                    color="#5B6268",
                    fontsize=8,
                    va="center",
                )
            elif points:  # tried near the best of some limits only
                axes.plot(*zip(*points, strict=True), color=OTHERS, ls="", marker=".", ms=4)
        _plot_with_spread(axes, places, entries, "best_static", "best fixed split", BEST, lw=1.4)
        _plot_with_spread(axes, places, entries, "dual", "dual (automatic)", OURS, lw=2.8)
        axes.plot([], [], color=OTHERS, lw=0.8, marker=".", ms=4, label="fixed splits")
        axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
        axes.set_xticks(places, [f"{place:g}" for place in places])
        axes.margins(x=0.09)
        axes.set_xlabel(_limit_label(entries))
        axes.set_ylabel("ms per decode step")
        axes.set_title("The automatic split against every fixed one")
        axes.legend(loc="best")
    return figure


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


def _limit_place(entry: Mapping[str, Any]) -> float:
    """Where a limit stands on the axis: percent of the KV, or GiB when it was a size."""
    wanted = parse_limit(entry["memory_limit"])
    return 100 * wanted if isinstance(wanted, float) else entry["memory_limit_bytes"] / GIB


def _limit_label(entries: list[Mapping[str, Any]]) -> str:
    fractions = all(isinstance(parse_limit(entry["memory_limit"]), float) for entry in entries)
    return (
        "memory left for the cache, percent of the KV"
        if fractions
        else "memory limit of the process, GiB"
    )


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
    ConfigError for a name that ends otherwise than .svg or .png."""
    if path is not None and path.suffix not in (".svg", ".png"):
        raise ConfigError(f"a figure is a .svg or .png file, not {path.name!r}")
    with _figure():
        pass


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
