"""Sections of bench report that are a table each: the engine, striping, attention, generations."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from dualblade.bench import figures
from dualblade.bench.report_section import (
    Made,
    Named,
    Section,
    machine_text,
    mib,
    ms,
    number_text,
    of_runs,
    ratio_spread,
    stolen_notes,
)
from dualblade.units import GIB, MIB, format_size


def io_section(group: list[Named]) -> Made:
    """`bench io`."""
    ((name, result),) = group
    fio, options = result.get("fio"), result["options"]
    size = format_size(options["chunk_bytes"])
    beside = ["-", "-"]
    if fio is not None:
        pairs = fio["throughput_ratios"]
        ratio, spread = fio["throughput_ratio_median"], (min(pairs), max(pairs))
        beside = [ratio_spread(ratio, spread), number_text(fio["cpu_ratio_median"], "{:.2f}")]
    section = Section(
        title="The I/O engine",
        file=name,
        about=f"Engine {result['engine']}, {options['queue_depth']} requests in flight, O_DIRECT; "
        f"{'medians, ' if options['repeats'] > 1 else ''}of {options['repeats']} passes"
        + (
            "."
            if fio is None
            else ", each beside one of fio: the same file, requests and depth, huge pages, the "
            f"file {'and its buffers ' if fio.get('buffers_registered', True) else ''}registered."
        ),
        command=result["command"],
        machine=machine_text(result["machine"]),
        head=[
            "request",
            "read GiB/s",
            "write GiB/s",
            "read / fio",
            "CPU / fio",
            "CPU s per GiB",
            "queue depth",
        ],
        rows=[
            [
                size,
                f"{result['read_bytes_per_second'] / GIB:.2f}",
                f"{result['write_bytes_per_second'] / GIB:.2f}",
                *beside,
                f"{result['cpu_seconds_per_gib_read']:.3f}",
                f"{result['effective_queue_depth']:.2f}",
            ]
        ],
    )
    if fio is None:
        return section, []
    return section, [(f"{ratio:.2f} x", f"fio's bandwidth at {size}")]


def control_section(group: list[Named]) -> Made:
    """`scripts/measure_control.py`: what following the memory costs a step."""
    ((name, result),) = group
    spent = result["control_seconds_per_step"]
    section = Section(
        title="Following the memory",
        file=name,
        about=f"What the probe, the hits and the controller take of a decode step with "
        f"{result['units']} units, all in the page cache; {result['steps']} steps. The memory "
        "is asked for twice a second.",
        command=result["command"],
        machine=machine_text(result["machine"]),
        head=["mean ms", "median ms", "p99 ms, the memory is asked for", "of a 10 ms step"],
        rows=[
            [
                *(f"{1000 * spent[key]:.3f}" for key in ("mean", "median", "p99")),
                f"{100 * result['share_of_a_10_ms_step']:.1f} %",
            ]
        ],
    )
    return section, []


def deepspeed_section(group: list[Named]) -> Made:
    """`scripts/measure_deepspeed.py`: the engine beside DeepSpeed's async_io."""
    ((name, result),) = group
    setting, ratio = result["deepspeed_setting"], result["throughput_ratio_median"]
    rows = []
    for who in ("dualblade", "deepspeed"):
        speeds = [pair[who]["bytes_per_second"] / GIB for pair in result["pairs"]]
        cpu = statistics.median(pair[who]["cpu_seconds_per_gib"] for pair in result["pairs"])
        spread = f"{min(speeds):.2f}-{max(speeds):.2f}"
        rows.append([who, f"{statistics.median(speeds):.2f}", spread, f"{cpu:.3f}"])
    cpu_ratio = result["cpu_ratio_median"]
    section = Section(
        title="The I/O engine beside DeepSpeed's",
        file=name,
        about=f"One file, requests of 1 MiB, O_DIRECT, both in turn; DeepSpeed "
        f"{result['deepspeed']} with its best setting of {len(result['deepspeed_tried'])}: "
        f"{setting['threads']} thread{'' if setting['threads'] == 1 else 's'}, "
        f"{setting['queue_depth']} requests in flight{_deepspeed_pages(result)}. dualblade is "
        f"{ratio:.2f} times as fast, with {cpu_ratio:.2f} of the processor time; medians of "
        f"{len(result['pairs'])} pairs.",
        command=result["command"],
        machine=machine_text(result["machine"]),
        head=["engine", "read GiB/s", "spread", "CPU s per GiB"],
        rows=rows,
    )
    return section, [(f"{ratio:.1f} x", "the bandwidth of DeepSpeed's async_io")]


def _deepspeed_pages(result: dict[str, Any]) -> str:
    """Which pages its buffer had, and its best pass in the others."""
    chosen = result["deepspeed_setting"].get("pages")  # older results: all were of 4 KiB
    best: dict[str, float] = {}
    for one in result["deepspeed_tried"]:
        pages = one.get("pages")
        best[pages] = max(best.get(pages, 0), one["bytes_per_second"] / GIB)
    others = (
        f"{speed:.2f} GiB/s at best in {pages} pages"
        for pages, speed in best.items()
        if pages != chosen
    )
    return f", {chosen} pages ({', '.join(others)})" if chosen else ""


def flexllmgen_section(group: list[Named]) -> Made:
    """`scripts/measure_flexllmgen.py`: decoding beside FlexLLMGen."""
    ((name, result),) = group
    rounds, limit = result["rounds"], result["memory_limit_bytes"]
    rows = []
    for who in rounds[0]:
        runs = [one[who] for one in rounds]  # without a time: killed
        each = (run["step_seconds"] for run in runs)
        steps = [1000 * seconds for seconds in each if seconds is not None]
        ratio = number_text(result["step_ratio_median"].get(who), "{:.2f}")
        if steps:
            spread = f"{min(steps):.0f}-{max(steps):.0f}"
            middle = of_runs(f"{statistics.median(steps):.0f}", runs, "step_seconds")
            rows.append([who, middle, spread, ratio, *_speed_beside_fio(who, result)])
        else:
            rows.append([who, "killed", "-", "-", "-", "-"])
    storage_only = result.get("storage_only", False)
    computing = (
        "FlexLLMGen's computing left out, so that it is the time of storing and fetching alone; "
        "ours computes, in bfloat16"
        if storage_only
        else "float16 on a GPU"
    )
    left = result.get("memory_limit") or ""
    memory = (
        "no memory limit"
        if limit is None
        else f"{left[1:]} of memory beside each process's own"
        if left.startswith("+")
        else f"{limit / GIB:.1f} GiB of memory for each"
    )
    section = Section(
        title="Decoding beside FlexLLMGen",
        file=name,
        about=f"{result['model']}, {result['batch']} x {result['context']} tokens, {computing}; "
        f"all KV on the drive; {memory}; in turn."
        + ("" if storage_only else " FlexLLMGen's step is a mean, ours a median.")
        + f" {'One round' if len(rounds) == 1 else f'Medians of {len(rounds)} rounds'}; "
        f"{_fio_text(result)}FlexLLMGen {result.get('flexllmgen_commit') or '?':.7}.",
        command=result["command"],
        machine=machine_text(result["machine"]),
        head=["who", "ms/step", "spread", "/ FlexLLMGen", "reads GiB/s", "of fio's"],
        rows=rows,
    )
    ratio = result["step_ratio_median"]["dual"]
    return section, [] if ratio is None else [(f"{ratio:.2f} x", "FlexLLMGen's step time")]


def _fio_text(result: dict[str, Any]) -> str:
    speeds = result.get("fio_read_bytes_per_second")
    return f"fio reads {statistics.median(speeds) / GIB:.2f} GiB/s beside it; " if speeds else ""


def _speed_beside_fio(who: str, result: dict[str, Any]) -> list[str]:
    """What `who` reads of the drive over its whole steps, GiB a second, and that over fio's."""
    speeds, ratios = [], []
    for one, fio in zip(
        result["rounds"], result.get("fio_read_bytes_per_second") or (), strict=False
    ):
        run = one[who]
        if run["step_seconds"] is not None and run.get("read_bytes_per_step") is not None:
            speeds.append(run["read_bytes_per_step"] / run["step_seconds"])
            ratios.append(speeds[-1] / fio)
    if not speeds:
        return ["-", "-"]
    return [f"{statistics.median(speeds) / GIB:.2f}", f"{100 * statistics.median(ratios):.0f} %"]


def fits_section(group: list[Named]) -> Made:
    """`scripts/measure_fits.py`: `dual` and `memory` where all KV fits."""
    ((name, result),) = group
    rows = []
    processes = [process for case in result["cases"] for process in case["processes"]]
    for case in result["cases"]:
        each = [process["step_ratio_median"] for process in case["processes"]]
        rows.append(
            [
                f"{case['name']}, {case['batch']} x {case['context']}",
                f"{case['kv_bytes'] / GIB:.2f}",
                f"{1000 * case['memory_step_seconds_median']:.0f}",
                f"{1000 * case['dual_step_seconds_median']:.0f}",
                f"{case['step_ratio_median']:.2f}",
                f"{min(each):.2f}-{max(each):.2f}",
            ]
        )
    section = Section(
        title="Where all KV fits",
        file=name,
        about="Steps of dual and of memory turn by turn in one process; medians of "
        f"{len(processes) // len(result['cases'])} processes.",
        command=result["command"],
        machine=machine_text(result["machine"]),
        notes=stolen_notes(processes),
        head=["model", "KV GiB", "memory ms", "dual ms", "dual / memory", "spread"],
        rows=rows,
    )
    most = max(case["step_ratio_median"] for case in result["cases"])
    return section, [(f"{most:.2f} x", "at most, the step of memory where all KV fits")]


def changing_memory_table(
    result: Mapping[str, Any],
) -> tuple[list[str], list[list[str]], str]:
    """Head, rows and what they are of, of `scripts/measure_changing_memory.py`."""
    parts = [f"{phase['fraction']:.0%}" for phase in result["phases"]]
    rows = []
    for entry in result["summary"]:
        if not entry["runs"]:
            rows.append([entry["mode"], "killed", *("" for _ in range(2 * len(parts)))])
            continue
        rows.append(
            [
                entry["mode"],
                f"{entry['tokens_per_second']:.1f}",
                *(f"{phase['tokens_per_second']:.1f}" for phase in entry["phases"]),
                *(f"{1000 * phase['step_seconds_max']:.0f}" for phase in entry["phases"]),
            ]
        )
    words = [f"{when} {part}" for when, part in zip(("first", "then", "again"), parts, strict=True)]
    head = ["mode", "tokens/s", *words, *(f"longest step, ms, {word}" for word in words)]
    seconds = ", ".join(f"{phase['seconds']:.0f}" for phase in result["phases"])
    about = (
        f"The part of the KV's {result['kv_bytes'] / GIB:.2f} GiB that a memory cgroup leaves the "
        f"cache is {', then '.join(parts)}, for {seconds} seconds; the limit changes between two "
        f"steps. Medians of {result['repeats']} runs in turn; the longest step is of all runs."
    )
    return head, rows, about


def changing_memory_section(group: list[Named]) -> Made:
    """`scripts/measure_changing_memory.py`: a limit that falls and rises again."""
    ((name, result),) = group
    head, rows, about = changing_memory_table(result)
    section = Section(
        title="Memory that changes while it decodes",
        file=name,
        about=about,
        command=result["command"],
        machine=machine_text(result["machine"]),
        notes=stolen_notes([run for run in result["runs"] if not run["oom_killed"]]),
        head=head,
        rows=rows,
        figures=[figures.svg_text(figures.changing_memory_figure(result))],
    )
    took = {e["mode"]: e["tokens_per_second"] for e in result["summary"] if e["runs"]}
    others = [speed for mode, speed in took.items() if mode != "dual"]
    if "dual" not in took or not others:
        return section, []
    gained = took["dual"] / max(others)
    return section, [(f"{gained:.2f} x", "the tokens of the best other where memory changes")]


def striping_section(group: list[Named]) -> Made:
    """`scripts/measure_striping.py`: devices throttled to a speed that is known."""
    ((name, result),) = group
    throttle = result["throttle_bytes_per_second"]
    rows = []
    for run in result["runs"]:
        roof = throttle * run["devices"]
        rows.append(
            [
                str(run["devices"]),
                str(run["queue_depth_of_each"]),
                f"{run['read_bytes_per_second'] / 1e6:.0f}",
                f"{run['times_one_device']:.2f}",
                f"{100 * run['read_bytes_per_second'] / roof:.0f} %",
                f"{run['write_bytes_per_second'] / 1e6:.0f}",
                f"{100 * run['write_bytes_per_second'] / roof:.0f} %",
                f"{run['cpu_seconds_per_gib_read']:.3f}",
            ]
        )
    most = max(result["runs"], key=lambda run: int(run["devices"]))
    part = 100 * most["read_bytes_per_second"] / (throttle * most["devices"])
    section = Section(
        title="Striping over several devices",
        file=name,
        about=f"One file striped over devices that are throttled to {throttle / 1e6:.0f} MB/s "
        "each; percent of what all of them together may give.",
        command=result["command"],
        machine=machine_text(most["machine"]),
        head=[
            "devices",
            "in flight on each",
            "read MB/s",
            "times one device",
            "of the throttles",
            "write MB/s",
            "of the throttles",
            "CPU s per GiB read",
        ],
        rows=rows,
    )
    return section, [(f"{part:.0f} %", f"of the bandwidth of {most['devices']} striped devices")]


def demo_section(group: list[Named]) -> Made:
    """`demo`."""
    ((name, result),) = group
    rows = [
        [
            run["path"],
            number_text(run["prefill_seconds"], "{:.1f}"),
            number_text(ms(run["decode_seconds_per_token"]), "{:.0f}"),
            f"{run['device_read_bytes_per_token'] / MIB:.1f}",
            number_text(run["page_cache_hit_fraction"], "{:.0%}"),
            number_text(mib(run["peak_memory_bytes"]), "{:.0f}"),
            "none"
            if run["memory_limit_bytes"] is None
            else f"{run['memory_limit_bytes'] / MIB:.0f}",
        ]
        for run in result["runs"]
    ]
    agree = "all paths gave" if result["tokens_agree"] else "the paths did not all give"
    section = Section(
        title="The demo",
        file=name,
        about=f"{result['prompt_tokens']} tokens of prompt, KV {result['kv_bytes'] / MIB:.0f} MiB, "
        f"memory budget {result['budget_bytes'] / MIB:.0f} MiB ({result['kv_to_budget']:.1f} times "
        f"as much KV); {agree} the same {result['new_tokens']} tokens: “{result['answer']}”",
        command=result["command"],
        machine=machine_text(result["machine"]),
        head=[
            "path",
            "prefill s",
            "decode ms/token",
            "MiB read/token",
            "page-cache hits",
            "peak MiB",
            "limit MiB",
        ],
        notes=stolen_notes(result["runs"]),
        rows=rows,
    )
    return section, []


def generate_section(group: list[Named]) -> Made:
    """Any number of `generate --json`. A single token has no time of decoding."""
    rows = [
        [
            name,
            f"{run['cache']['path']}, {run['cache']['attention']}, {run['dtype']}",
            f"{run['prompt_tokens']} + {run['new_tokens']}",
            number_text(run["prefill_seconds"], "{:.1f}"),
            number_text(ms(run["decode_seconds_per_token"]), "{:.0f}"),
            number_text(run["tokens_per_sweep"], "{:.2f}"),
            number_text(mib(run["read_bytes_per_token"]), "{:.1f}"),
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
