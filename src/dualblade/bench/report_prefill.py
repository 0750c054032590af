"""The section of bench report about prefill."""

from __future__ import annotations

from collections.abc import Sequence
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
    number_text,
    of_runs,
    percent_text,
    run_notes,
    runs_of,
    saved_cards,
    seconds_spread,
    title_text,
    workload_text,
)
from dualblade.units import GIB


def prefill_section(group: list[Named]) -> Made:
    """What `bench prefill` wrote: one file."""
    ((name, result),) = group
    summary, options = result["summary"], result["options"]
    done = [run for run in result["runs"] if run["prefill_seconds"] is not None]
    if not done:
        raise ValueError("no run of it got through")
    rows = [
        [
            entry["mode"],
            entry["store_state"] or "-",
            limit_text(entry["memory_limit"]),
            of_runs(
                seconds_spread(entry["prefill_seconds"], entry["prefill_seconds_spread"]),
                runs_of(result, entry),
                "prefill_seconds",
            ),
            number_text(entry["prefill_to_memory"], "{:.2f}"),
            percent_text(entry["stall_fraction"]),
            number_text(mib(entry["device_written_bytes"]), "{:.0f}"),
            number_text(mib(entry["device_read_bytes"]), "{:.0f}"),
            number_text(entry["cpu_seconds"], "{:.1f}"),
            number_text(mib(entry["peak_memory_bytes"]), "{:.0f}"),
        ]
        for entry in summary
    ]
    section = Section(
        title=title_text("Prefill of", result),
        file=name,
        about=(
            f"{workload_text(options)} in chunks of {options['prefill_chunk']}, attention "
            f"{done[0]['attention']}, KV {done[0]['kv_bytes'] / GIB:.2f} GiB"
            f"{drive_text(result)}. Until the first token; of mapped files the stall leaves out "
            f"what the kernel waits inside copies. Medians of {options['repeats']} runs, "
            f"least to most beside."
        ),
        command=result["command"],
        machine=machine_text(result["machine"]),
        notes=beaten_notes(_times(summary)) + run_notes(result["runs"]),
        figures=[figures.svg_text(figures.prefill_figure(summary))],
        head=[
            "mode",
            "store",
            "limit",
            "seconds",
            "/ memory",
            "stalled",
            "MiB written",
            "MiB read",
            "CPU s",
            "peak MiB",
        ],
        rows=rows,
    )
    return section, _cards(summary)


def _times(summary: Sequence[dict[str, Any]]) -> dict[tuple[str, str], float]:
    """By limit and state, in words, and mode."""
    return {
        (
            f"{limit_text(entry['memory_limit'])} and a {entry['store_state']} store",
            entry["mode"],
        ): entry["prefill_seconds"]
        for entry in summary
        if entry["prefill_seconds"] is not None
    }


def _cards(summary: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """dual against mapped files, and what it waits for."""
    cards = saved_cards(_times(summary), "less prefill time than memory-mapped files")
    waits = [e["stall_fraction"] for e in summary if e["mode"] == "dual" and e["stall_fraction"]]
    if waits:
        cards.append((percent_text(max(waits)), "of prefill that dual waits for storage, at most"))
    return cards
