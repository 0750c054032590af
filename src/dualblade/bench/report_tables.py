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
    stolen_notes,
)
from dualblade.units import GIB, MIB


def io_section(group: list[Named]) -> Made:
    """`bench io`."""
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
        machine=machine_text(result["machine"]),
        head=["read GiB/s", "write GiB/s", "read / fio", "CPU s per GiB", "queue depth"],
        rows=[
            [
                f"{result['read_bytes_per_second'] / GIB:.2f}",
                f"{result['write_bytes_per_second'] / GIB:.2f}",
                number_text(ratio, "{:.2f}"),
                f"{result['cpu_seconds_per_gib_read']:.3f}",
                f"{result['effective_queue_depth']:.2f}",
            ]
        ],
    )
    if ratio is None:
        return section, []
    return section, [(f"{ratio:.2f} x", f"fio's bandwidth at {options['chunk_bytes'] >> 10} KiB")]


def control_section(group: list[Named]) -> Made:
    """`scripts/measure_control.py`: what following the memory costs a step."""
    ((name, result),) = group
    spent = result["control_seconds_per_step"]
    section = Section(
        title="Following the memory",
        file=name,
        about=f"What the probe, the hits and the controller take of a decode step with "
        f"{result['units']} units, all in the page cache; {result['steps']} steps.",
        command=result["command"],
        machine=machine_text(result["machine"]),
        head=["mean ms", "median ms", "p99 ms", "of a 10 ms step"],
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
    section = Section(
        title="The I/O engine beside DeepSpeed's",
        file=name,
        about=f"One file, requests of 1 MiB, O_DIRECT, both in turn; DeepSpeed "
        f"{result['deepspeed']} with its best setting of {len(result['deepspeed_tried'])}: "
        f"{setting['threads']} threads, {setting['queue_depth']} requests in flight.",
        command=result["command"],
        machine=machine_text(result["machine"]),
        head=["engine", "read GiB/s", "spread", "CPU s per GiB"],
        rows=rows,
    )
    return section, [(f"{ratio:.1f} x", "the bandwidth of DeepSpeed's async_io")]


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
        + ("" if storage_only else " FlexLLMGen's step is a mean, ours a median."),
        command=result["command"],
        machine=machine_text(result["machine"]),
        head=["who", "ms/step", "spread", "/ FlexLLMGen", "reads GiB/s", "of fio's"],
        rows=rows,
    )
    ratio = result["step_ratio_median"]["dual"]
    return section, [] if ratio is None else [(f"{ratio:.2f} x", "FlexLLMGen's step time")]


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


def contention_section(group: list[Named]) -> Made:
    """`scripts/measure_contention.py`: fio beside steps that read nothing."""
    ((name, result),) = group
    rounds = result["rounds"]

    def median_of_rounds(key: str) -> float:
        return float(statistics.median(one[key] for one in rounds))

    rows = [["nothing", f"{median_of_rounds('fio_bytes_per_second_alone') / GIB:.2f}", "1.00", ""]]
    for beside in result["beside"]:
        asked, ratios = beside["computing_share_asked"], beside["fio_ratios"]
        rows.append(
            [
                f"steps that compute {beside['computing_share_median']:.0%} of their time",
                f"{median_of_rounds(f'fio_bytes_per_second_{asked}') / GIB:.2f}",
                f"{beside['fio_ratio_median']:.2f}",
                f"{min(ratios):.2f}-{max(ratios):.2f}",
            ]
        )
    alone, both = (1000 * median_of_rounds(f"step_seconds_{key}") for key in ("alone", "1.0"))
    section = Section(
        title="Computing and reading at once",
        file=name,
        about=f"fio beside decode steps that have all {result['kv_bytes'] / GIB:.2f} GiB of KV in "
        "memory and compute all the time, or pause after each layer. One that computes all the "
        f"time takes {alone:.0f} ms alone and {both:.0f} beside fio, "
        f"{result['step_ratio_median']:.2f} times as long. Medians of {len(rounds)} rounds, each "
        "in another order; ratios within a round.",
        command=result["command"],
        machine=machine_text(result["machine"]),
        head=["beside fio", "fio GiB/s", "of alone", "spread"],
        rows=rows,
    )
    return section, []


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


def products_section(group: list[Named]) -> Made:
    """`scripts/measure_products.py`: 16-bit products as float32."""
    ((name, result),) = group
    prompt = result["prompt"]
    timed = [
        (f"{one['rows']} x {one['in_features']} to {one['out_features']}", one["seconds"])
        for one in result["products"]
    ]
    timed.append((f"{prompt['model']}, {prompt['tokens']} tokens", prompt["seconds"]))
    section = Section(
        title="Products without 16-bit arithmetic",
        file=name,
        about=f"{result['dtype']} weights times some rows, {result['cpu_capability']}, "
        f"{result['threads']} threads: by torch, and widened to float32 a block at a time from "
        f"12 rows on. Last a prompt without its KV. Medians of {result['repeats']}.",
        command=result["command"],
        machine=machine_text(result["machine"]),
        head=["rows, features", "torch ms", "ours ms", "torch / ours"],
        rows=[
            [
                what,
                f"{1000 * seconds['torch']:.2f}",
                f"{1000 * seconds['widened']:.2f}",
                f"{seconds['torch'] / seconds['widened']:.1f}",
            ]
            for what, seconds in timed
        ],
    )
    return section, []


def spinning_section(group: list[Named]) -> Made:
    """`scripts/measure_spinning.py`: how long threads spin before they sleep."""
    ((name, result),) = group
    options, medians = result["options"], result["medians"]
    modes = list(medians[0]["step_seconds"])
    section = Section(
        title="How threads wait",
        file=name,
        about=f"Turns that torch's threads spin before they sleep; {options['model']}, "
        f"{options['context']} tokens, budget {options['memory_budget']}, beside "
        f"{result['beside']}. Milliseconds a step, "
        f"medians of {result['repeats']} runs in turns.",
        command=result["command"],
        machine=machine_text(result["machine"]),
        head=["spins", *(f"{mode} ms" for mode in modes)],
        rows=[
            [
                str(one["spins"]),
                *(f"{1000 * one['step_seconds'][mode]:.0f}" for mode in modes),
            ]
            for one in medians
        ],
    )
    return section, []


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
            "of the throttles",
            "write MB/s",
            "of the throttles",
            "CPU s per GiB read",
        ],
        rows=rows,
    )
    return section, [(f"{part:.0f} %", f"of the bandwidth of {most['devices']} striped devices")]


def attention_section(group: list[Named]) -> Made:
    """`bench attention`."""
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
        machine=machine_text(result["machine"]),
        head=["B, H, G, T, D", "tiles", "exact", "contiguous", "memory read", "tiles / exact"],
        rows=rows,
    )
    middle = statistics.median(run["tiles_to_exact"] for run in result["runs"])
    return section, [(f"{middle:.1f} x", "attention over tiles to gathering first")]


def demo_section(group: list[Named]) -> Made:
    """`demo`."""
    ((name, result),) = group
    rows = [
        [
            run["path"],
            number_text(run["prefill_seconds"], "{:.1f}"),
            number_text(ms(run["decode_seconds_per_token"]), "{:.0f}"),
            f"{run['device_read_bytes_per_token'] / MIB:.1f}",
            number_text(mib(run["peak_memory_bytes"]), "{:.0f}"),
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
        machine=machine_text(result["machine"]),
        head=["path", "prefill s", "ms/token", "MiB read/token", "peak MiB"],
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
