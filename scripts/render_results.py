#!/usr/bin/env python3
"""Write the tables and figures of the documents from the files of results.

    scripts/render_results.py            write them
    scripts/render_results.py --check    exit 1 when a document differs from its results

A table stands between <!-- NAME --> and <!-- /NAME -->, and is never typed. A figure ends with the
digest of what it was drawn from: another matplotlib draws the same figure by other bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import re
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from dualblade.bench.report_compute import (
    attention_section,
    contention_section,
    products_section,
    spinning_section,
)
from dualblade.bench.report_section import (
    Made,
    Named,
    of_runs,
    runs_of,
    seconds_spread,
    stolen_notes,
)
from dualblade.bench.report_tables import (
    changing_memory_section,
    control_section,
    deepspeed_section,
    demo_section,
    fits_section,
    flexllmgen_section,
    io_section,
    striping_section,
)
from dualblade.bench.series import median_of
from dualblade.host.machine import cpu_text

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
LMCACHE = ROOT / "examples" / "lmcache"
MLPERF = ROOT / "examples" / "mlperf"
DOCUMENTS = (
    *(ROOT / "README.md", ROOT / "docs" / "performance.md"),
    *(LMCACHE / "README.md", MLPERF / "README.md"),
)
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


def load(name: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return data


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def machine_line(machine: dict[str, Any]) -> str:
    return (
        f"{machine['cpu_count']} cores ({cpu_text(machine)}), "
        f"{machine['memory_bytes'] / GIB:.0f} GiB of memory, Linux {machine['kernel']}"
        f"{', a tree with uncommitted changes' if (machine.get('git') or {}).get('dirty') else ''}"
    )


def stolen_note(*results: dict[str, Any]) -> str:
    """As the report says it, of all runs of `results`."""
    notes = stolen_notes([run for data in results for run in data["runs"]])
    return "".join(f"{note} " for note in notes)


def percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.0f} %"


def ratio(value: float | None, base: float | None) -> str:
    return f"{value / base:.2f}" if value and base else ""


def of_section(make: Callable[[list[Named]], Made], *names: str) -> str:
    """As the report tells the results `names`, which are of one kind: one table of all."""
    named = [(f"results/{name}.json", load(name)) for name in names]
    section, *others = [make([one])[0] for one in named]
    rows = [list(row) for one in (section, *others) for row in one.rows]
    data = named[0][1]
    command = data["command"]
    machine = data.get("machine") or data["runs"][0]["machine"]
    files = ", ".join(f"`{file}`" for file, _ in named)
    return (
        f"{table(list(section.head), rows)}\n\n{' '.join([section.about, *section.notes])} "
        f"`{'scripts/' if command.startswith('measure_') else ''}{command}` on "
        f"{machine_line(machine)}; {'file' if len(named) == 1 else 'files'}: {files}."
    )


def demo() -> str:
    return of_section(demo_section, "demo")


DECODES = {
    "decode-opt-1.3b": "OPT-1.3B shape",
    "decode-llama-3.2-1b": "Llama-3.2-1B shape (grouped heads)",
}


def decode() -> str:
    blocks = []
    for name, title in DECODES.items():
        data = load(name)
        rows = [decode_row(data, item) for item in data["summary"]]
        head = [
            "mode",
            "limit",
            "ms/step",
            "spread",
            "step / memory",
            "step / roof",
            "MiB read/step",
            "page-cache hits",
        ]
        first = next(run for run in data["runs"] if run["kv_bytes"])
        blocks.append(
            f"**{title}**, batch {first['batch']}, context {first['context']}, {first['dtype']}, "
            f"attention {first['attention']}, KV {first['kv_bytes'] / GIB:.2f} GiB; "
            f"`{data['command']}` on {machine_line(data['machine'])}\n\n{table(head, rows)}"
        )
    note = (
        "Limit: the part of the KV's bytes that is left for its cache in a memory cgroup. Roof: "
        "max(the `memory` step, bytes read / fio's bandwidth in the same run). `dynamic-cache` has "
        "the model's own attention, not that over tiles. Files: "
        "`results/decode-*.json`."
    )
    return "\n\n".join([*blocks, note])


def decode_row(data: dict[str, Any], item: dict[str, Any]) -> list[str]:
    limit = item["memory_limit"] or "none"
    if item["step_seconds_median"] is None:
        return [item["mode"], limit, step_cell(data, item), "", "", "", "", ""]
    low, high = item["step_seconds_spread"]
    ratios = [item.get("step_to_memory"), item.get("step_to_roof")]
    runs = runs_of(data, item)
    return [
        item["mode"],
        limit,
        step_cell(data, item),
        f"{1000 * low:.0f}-{1000 * high:.0f}",
        *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
        f"{median_of(runs, 'device_read_bytes_per_step') / MIB:.0f}",
        percent(median_of(runs, "page_cache_hit_fraction")),
    ]


def step_cell(data: dict[str, Any], item: dict[str, Any]) -> str:
    """Milliseconds of a step: of how many runs where not of all, and how they ended if none did."""
    seconds = item["step_seconds_median"]
    text = "" if seconds is None else f"{1000 * seconds:.0f}"
    return of_runs(text, runs_of(data, item), "step_seconds_median")


def smollm2() -> str:
    rows = []
    for way in ("exact", "tiles"):
        for item in load(f"decode-smollm2-{way}")["summary"]:
            low, high = item["step_seconds_spread"]
            rows.append(
                [
                    f"{item['mode']}, {way}",
                    f"{1000 * item['step_seconds_median']:.0f}",
                    f"{1000 * low:.0f}-{1000 * high:.0f}",
                ]
            )
    run = load("decode-smollm2-tiles")["runs"][0]
    return (
        f"{table(['path, attention', 'ms/token', 'spread'], rows)}\n\nSmolLM2-135M, "
        f"{run['context']} tokens, {run['dtype']}, KV {run['kv_bytes'] / MIB:.0f} MiB; "
        f"`{load('decode-smollm2-tiles')['command']}` on "
        f"{machine_line(load('decode-smollm2-tiles')['machine'])}; "
        "files: `results/decode-smollm2-*.json`."
    )


def context() -> str:
    rows = []
    for tokens in (1000, 8000, 64000, 256000):
        run = load(f"context-{tokens}")["runs"][0]
        beyond = run["peak_memory_bytes"] - run["base_memory_bytes"]
        rows.append(
            [
                f"{tokens}",
                f"{run['kv_bytes'] / MIB:.0f}",
                f"{run['cache']['memory']['used_bytes'] / MIB:.0f}",
                f"{beyond / MIB:.0f}",
                f"{run['cache']['memory']['page_cache_bytes'] / MIB:.0f}",
                f"{1000 * run['step_seconds_median']:.0f}",
            ]
        )
    head = [
        "tokens",
        "KV MiB",
        "cache MiB in all",
        "peak MiB beyond the model",
        "page cache MiB",
        "ms/step",
    ]
    return (
        f"{table(head, rows)}\n\nDirect path, tiles, budget 64 MiB; "
        f"`{load('context-256000')['command']}` on "
        f"{machine_line(load('context-256000')['machine'])}; files: `results/context-*.json`."
    )


def lookup() -> str:
    rows = []
    for name in ("prompt-lookup-0", "prompt-lookup-10"):
        data = load(name)
        rows.append(
            [
                f"{data['prompt_lookup']}",
                f"{data['tokens_per_sweep']:.2f}",
                f"{data['read_bytes_per_token'] / MIB:.1f}",
                f"{1 / data['decode_seconds_per_token']:.1f}",
                data["tokens_sha256"][:12],
            ]
        )
    head = ["candidates", "tokens per sweep", "MiB per token", "tokens per s", "tokens (sha256)"]
    return (
        f"{table(head, rows)}\n\nSmolLM2-135M in float32 copies the beginning of a text of "
        f"{data['prompt_tokens']} tokens, {data['new_tokens']} of them, on the direct path; "
        "`dualblade generate --model demo --dtype float32 --prompt-file FILE --max-new-tokens 100 "
        "--path direct --prompt-lookup N --json`, by `scripts/measure_prompts.py`, on "
        f"{machine_line(data['machine'])}; files: `results/prompt-lookup-*.json`."
    )


def greedy() -> str:
    words = []
    for dtype in ("float32", "bfloat16"):
        exact, tiles = (load(f"greedy-{dtype}-{way}") for way in ("exact", "tiles"))
        count = exact["new_tokens"]
        if exact["tokens_sha256"] == tiles["tokens_sha256"]:
            words.append(f"in {dtype} all {count} equal those of `exact`")
        else:
            pairs = zip(exact["text"], tiles["text"], strict=False)
            alike = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
            words.append(f"in {dtype} the two texts part after {alike} characters")
    return (
        f"Greedy tokens of SmolLM2 over tiles, on a prompt of {exact['prompt_tokens']} tokens: "
        f"{'; '.join(words)}. `dualblade generate --model demo --dtype DTYPE --prompt-file FILE "
        "--max-new-tokens 100 --path memory --attention WAY --json`, by "
        f"`scripts/measure_prompts.py`, on {machine_line(exact['machine'])}; files: "
        "`results/greedy-*.json`."
    )


def prefill() -> str:
    rows = []
    for name in ("prefill-2048-tiles", "prefill-2048-exact", "prefill-16000-exact"):
        data = load(name)
        rows.append(
            [
                f"{data['prefill_chunk_tokens']}, {data['cache']['attention']}",
                f"{data['prefill_seconds']:.1f}",
                f"{data['peak_resident_bytes'] / MIB:.0f}",
            ]
        )
    return (
        f"{table(['chunk, attention', 'prefill s', 'peak resident MiB'], rows)}\n\n"
        f"{load('prefill-2048-tiles')['prompt_tokens']} tokens of prompt, {data['model']} in "
        f"{data['dtype']}, direct path; `dualblade generate --model MODEL --prompt-file FILE "
        "--max-new-tokens 2 --path direct --prefill-chunk-size N --attention WAY --json`, by "
        f"`scripts/measure_prompts.py`, on {machine_line(data['machine'])}; files: "
        "`results/prefill-*.json`."
    )


def envelope() -> str:
    if not (RESULTS / "envelope.json").exists():
        return "Not measured yet: `dualblade bench envelope --output results/envelope.json`."
    data = load("envelope")
    rows = []
    for entry in data["summary"]:
        row = [entry["memory_limit"].replace("%", " %")]
        if entry["dual_to_best"] is None:
            rows.append([*row, "", "", "", "", "", f"{entry['oom_killed']}"])
            continue
        low, high = entry["dual_to_best_spread"]
        row += [f"{entry['best_static_percent']} %"]
        row += [f"{1000 * entry[f'{name}_seconds']:.0f}" for name in ("best_static", "dual")]
        row += [f"{entry['dual_to_best']:.2f}", f"{low:.2f}-{high:.2f}", f"{entry['oom_killed']}"]
        rows.append(row)
    head = [
        "memory for the cache",
        "best fixed split",
        "its ms/step",
        "dual ms/step",
        "dual / best",
        "spread",
        "killed",
    ]
    asked = data["options"]
    return (
        f"{table(head, rows)}\n\nMemory: of the KV's "
        f"{data['calibration']['kv_bytes'] / GIB:.2f} GiB, in a memory cgroup. Split: the part of "
        f"the KV through the page cache. Medians of {asked['rounds']} pairs run in turn, dual / "
        f"best those of ratios within a pair, of {len(data['runs'])} runs in all. "
        f"{stolen_note(data)}`{data['command']}` on {machine_line(data['machine'])}; "
        "file: `results/envelope.json`."
    )


def checksums() -> str:
    data = load("checksums")
    off = {run["repeat"]: run for run in data["runs"] if run["mode"].endswith("=off")}
    rows = []
    for item in data["summary"]:
        runs = [run for run in data["runs"] if run["mode"] == item["mode"]]
        ratios = [
            run["step_seconds_median"] / off[run["repeat"]]["step_seconds_median"] for run in runs
        ]
        own = [run["seconds_per_step"]["checksums"] for run in runs]
        _, _, word = item["mode"].partition("=")
        rows.append(
            [
                word or "sample",
                f"{1000 * item['step_seconds_median']:.0f}",
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})",
                f"{1000 * statistics.median(own):.1f}",
            ]
        )
    head = ["checksums", "ms/step", "step / off (spread)", "of it ms in checksums"]
    first = data["runs"][0]
    return (
        f"{table(head, rows)}\n\nLlama-3.2-1B shape, KV {first['kv_bytes'] / GIB:.2f} GiB, direct "
        f"path, runs in turn, ratios within a round of {len(off)}; `{data['command']}` on "
        f"{machine_line(data['machine'])}; file: `results/checksums.json`."
    )


def lmcache() -> str:
    data = json.loads((LMCACHE / "results.json").read_text())
    rows = []
    for index, contender in enumerate(data["contenders"]):
        runs = [run for run in data["runs"] if run["contender"] == index]
        row = [contender["name"], contender["settings"]]
        for operation in ("load", "store"):
            rates = [run["bytes_per_second"][operation] / MIB for run in runs]
            row += [f"{statistics.median(rates):.0f}", f"{min(rates):.0f}-{max(rates):.0f}"]
        lookups = [run["operations"]["lookup"]["duration_p50_ms"] for run in runs]
        rows.append([*row, f"{statistics.median(lookups):.2f}"])
    load = data["workload"]
    fio = statistics.median(run["read_bytes_per_second"] for run in data["fio"]) / MIB
    versions = data["machine"]["versions"]
    return "\n\n".join(
        [
            table(
                [
                    "adapter",
                    "settings",
                    "load MiB/s",
                    "spread",
                    "store MiB/s",
                    "spread",
                    "lookup ms",
                ],
                rows,
            ),
            f"A round is {load['num_keys'] * load['in_flight']} objects of "
            f"{load['data_size_kb'] // 1024} MiB in {load['in_flight']} batches at once; of "
            f"{load['rounds']} rounds a run's figure is the median, and the table's that of "
            f"{len(data['fio'])} runs. fio read {fio:.0f} MiB/s beside them. lmcache "
            f"{versions['lmcache']}, lmcache-rust-raw-block-io "
            f"{versions['lmcache-rust-raw-block-io']}; `{data['command']}` on "
            f"{machine_line(data['machine'])}; file: `results.json`.",
        ]
    )


def mlperf() -> str:
    data = json.loads((MLPERF / "results.json").read_text())
    rows = []
    for workload, tier in itertools.product(data["workloads"], ("dualblade", "theirs")):
        runs = [r for r in data["runs"] if (r["workload"], r["tier"]) == (workload, tier)]
        cpu = statistics.median(run["cpu_seconds_per_gib"] for run in runs)
        ways = itertools.chain(*(mlperf_way(runs, way) for way in ("read", "write")))
        rows.append([f"{workload}: {tier}", *ways, f"{cpu:.2f}"])
    each = ("{} GiB/s", "MiB each", "p50 ms", "p95 ms")
    head = ["workload: tier", *(text.format(way) for way in ("read", "write") for text in each)]
    fio = [run["fio"]["read_bytes_per_second"] / GIB for run in data["runs"]]
    repeats = 1 + max(run["repeat"] for run in data["runs"])
    commit = data["benchmark_commit"] or "?"
    return (
        f"{table([*head, 'CPU s/GiB'], rows)}\n\nOf whole objects, which differ in size: MiB each "
        f"is their mean. Medians of {repeats} runs in turn; fio reads {statistics.median(fio):.2f} "
        f"GiB/s beside them ({min(fio):.2f}-{max(fio):.2f}). Their writes are flushed (fsync), "
        f"ours are not. Benchmark {commit:.7}, `{' '.join(data['arguments'])}`; "
        f"`{data['command']}` on {machine_line(data['machine'])}; file: `results.json`."
    )


def mlperf_way(runs: list[dict[str, Any]], way: str) -> list[str]:
    """Of runs of one kind: bandwidth, mean size of an object, and latencies of reads or writes."""
    if not any(run[f"{way}s"] for run in runs):
        return ["-"] * 4
    rates = [run[f"{way}_bytes"] / run["seconds"] / GIB for run in runs]
    sizes = [run[f"{way}_bytes"] / run[f"{way}s"] / MIB for run in runs]
    return [
        f"{statistics.median(rates):.2f} ({min(rates):.2f}-{max(rates):.2f})",
        f"{statistics.median(sizes):.0f}",
        *(
            f"{1000 * statistics.median(run[f'{way}_p{part}_seconds'] for run in runs):.0f}"
            for part in (50, 95)
        ),
    ]


def flexllmgen() -> str:
    shapes = ("narrow", "tenth", "opt-2.7b")
    names = [f"flexllmgen-{shape}-{ahead}" for shape in shapes for ahead in ("128KiB", "1MiB")]
    return "\n\n".join(of_section(flexllmgen_section, name) for name in names)


def spinning() -> str:
    names = ("spinning", "spinning-busy")
    return "\n\n".join(of_section(spinning_section, name) for name in names)


def drive_word(data: dict[str, Any]) -> str:
    speed = data["scenario"]["device_bytes_per_second"]
    return "as it is" if speed is None else f"{speed / 1e6:.0f} MB/s"


def of_mode(data: dict[str, Any], mode: str) -> list[dict[str, Any]]:
    """The runs of `mode` that got through."""
    return [
        run
        for run in data["runs"]
        if run["mode"] == mode and run["step_seconds_median"] is not None
    ]


def drive_speed(data: dict[str, Any], mode: str, limit: str) -> str:
    """Median GiB that the runs of `mode` under `limit` read of the drive in a second, and where fio
    ran beside them what part of its speed that is: the median of all modes' under this limit, for
    a drive has moods and one reading of two would decide."""
    limited = [run for run in data["runs"] if run["memory_limit"] == limit]
    runs = [run for run in limited if run["mode"] == mode and run["step_seconds_median"]]
    if not runs:
        return ""
    speed = statistics.median(
        run["device_read_bytes_per_step"] / GIB / run["step_seconds_median"] for run in runs
    )
    if not data["options"]["compare_fio"]:
        return f"{speed:.2f}"
    return f"{speed:.2f} ({speed * GIB / median_of(limited, 'fio_read_bytes_per_second'):.2f})"


def against_limits(data: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a decode result under several limits, dual among its modes; beside each kind
    of mapped files that is among them, too."""
    modes, mapped = data["options"]["modes"], mapped_modes(data)
    beside = [*mapped, "dual"]
    by_limit: dict[str, dict[str, Any]] = {}
    for item in data["summary"]:
        by_limit.setdefault(item["memory_limit"], {})[item["mode"]] = item
    rows = []
    for limit, items in by_limit.items():
        took = {mode: items[mode]["step_seconds_median"] for mode in modes}
        others = {mode: seconds for mode, seconds in took.items() if seconds and mode != "dual"}
        rows.append(
            [
                limit.removeprefix("+")
                .replace("%", " %")
                .replace("GiB", " GiB")
                .replace("MiB", " MiB"),
                *(step_cell(data, items[mode]) for mode in modes),
                *(paired_cell(data, limit, mode) for mode in mapped),
                paired_cell(data, limit, min(others, key=others.__getitem__, default=None)),
                *(drive_speed(data, mode, limit) for mode in beside),
            ]
        )
    unit = "GiB/s (of fio's)" if data["options"]["compare_fio"] else "GiB/s"
    head = [
        "memory",
        *(f"{ahead_words(mode)} ms" for mode in modes),
        *(f"dual / {ahead_words(mode)}" for mode in mapped),
        "dual / best of the others",
        *(f"{ahead_words(mode)} reads {unit}" for mode in beside),
    ]
    return head, rows


def mapped_modes(data: dict[str, Any]) -> list[str]:
    """Those of mapped files, which may differ by how far the kernel reads ahead."""
    return [mode for mode in data["options"]["modes"] if mode.partition("+")[0] == "mmap"]


def ahead_words(mode: str) -> str:
    """A mode as a table's head has it; mapped files by how far the kernel reads ahead."""
    word, _, ahead = mode.partition("+read_ahead=")
    return f"{word} ({ahead} ahead)" if ahead else word


def kv_bytes(data: dict[str, Any]) -> int:
    return next(run["kv_bytes"] for run in data["runs"] if run["kv_bytes"])


def paired_ratios(
    runs: list[dict[str, Any]], mode: str, other: str, key: str = "step_seconds_median"
) -> list[float]:
    """Of the times of two modes that took turns: the machine changes speed between pairs."""
    took = {(run["mode"], run["repeat"]): run[key] for run in runs if run[key]}
    return [
        seconds / took[other, turn]
        for (name, turn), seconds in took.items()
        if name == mode and (other, turn) in took
    ]


OF_PAIRS = (
    "Ratios are medians of those within a round, with their spread; the best of the others is the "
    "mode with the least median."
)


def paired_cell(data: dict[str, Any], limit: str | None, other: str | None) -> str:
    """dual's time by another mode's under one limit: the median of the pairs, and their spread."""
    runs = [run for run in data["runs"] if run["memory_limit"] == limit]
    return spread_text(paired_ratios(runs, "dual", other) if other else [])


def spread_text(ratios: list[float]) -> str:
    """The median, and the spread of more than one."""
    if len(ratios) < 2:
        return "".join(f"{one:.2f}" for one in ratios)
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


def budgets() -> str:
    data, above, fits = (load(f"budgets/budgets{part}") for part in ("", "-150", "-fits"))
    head, rows = against_limits(data)
    apart = (
        f"{ahead_words(item['mode'])} {1000 * item['step_seconds_median']:.0f}"
        for item in above["summary"]
    )
    memory, dual = (item["step_seconds_median"] for item in fits["summary"])
    pairs = sorted(paired_ratios(fits["runs"], "dual", "memory"))
    return (
        f"{table(head, rows)}\n\nMilliseconds a step; medians of {data['options']['repeats']} "
        f"runs. {OF_PAIRS} Memory: of the KV's {kv_bytes(data) / GIB:.2f} GiB. Reads: of the "
        "drive, over the "
        f"whole step. Without a limit: memory {1000 * memory:.0f} ms, dual {1000 * dual:.0f} "
        f"(in {len(pairs)} pairs {statistics.median(pairs):.2f} times, {pairs[0]:.2f}-"
        f"{pairs[-1]:.2f}). At 150 % after 18 steps, medians of "
        f"{above['options']['repeats']} runs: {', '.join(apart)}. {stolen_note(data, above, fits)}"
        "`dualblade bench paper budgets --output results/budgets` on "
        f"{machine_line(data['machine'])}; files: `results/budgets/`."
    )


def read_ahead() -> str:
    shapes = {"narrow layers": "", "OPT-2.7B": "opt-2.7b-"}
    rows, of = [], []
    for shape, part in shapes.items():
        for kib in (128, 1024, 8192):
            data = load(f"read-ahead-{part}{kib}")
            ahead = data["machine"]["device"]["queue"]["read_ahead_bytes"]
            head, its = against_limits(data)
            rows += [[shape, f"{ahead // KIB} KiB", *row] for row in its]
        command = data["command"].replace("8192.json", "KIB.json")
        of.append(f"{shape}: {kv_bytes(data) / GIB:.2f} GiB of KV; `{command}`.")
    return (
        f"{table(['shape', 'read ahead', *head], rows)}\n\nMilliseconds a step, one run each. Read "
        "ahead: the queue's `read_ahead_kb`, set by hand before each. "
        f"{' '.join(of)} On {machine_line(data['machine'])}; files: `results/read-ahead-*.json`."
    )


def paper() -> str:
    shapes = {
        "OPT-6.7B": "paper-opt-6.7b",
        "OPT-2.7B": "paper-opt-2.7b",
        "Llama-3.2-1B": "paper-llama-3.2-1b",
    }
    rows, of, machines = [], [], set()
    for name, file in shapes.items():
        data = load(f"paper-24gib/{file}")
        head, its = against_limits(data)
        rows += [[name, *row] for row in its]
        options = data["options"]
        machines.add(machine_line(data["machine"]))
        of.append(
            f"{name}: {options['batch']} x {options['context']} tokens, "
            f"{kv_bytes(data) / GIB:.1f} GiB of KV, {options['repeats']} runs"
        )
    return (
        f"{table(['shape', *head], rows)}\n\nMilliseconds a step; medians of runs in turn, "
        f"bfloat16, attention tiles. {OF_PAIRS} Memory: left for the cache beside weights and "
        "activations. "
        f"{'. '.join(of)}. `dualblade bench paper paper-24gib --output results/paper-24gib` on "
        f"{' and '.join(sorted(machines))}; files: `results/paper-24gib/`."
    )


HEADLINE = {
    "memory-mapped files, 128 KiB read ahead (Linux' default)": ("mmap+read_ahead=128KiB", True),
    "memory-mapped files, 1 MiB read ahead": ("mmap+read_ahead=1MiB", True),
    "page cache alone": ("page-cache", True),
    "direct reads alone": ("direct", True),
    "**dual**, the default": ("dual", True),
    'all KV in memory (`path="memory"`)': ("memory", False),
    "transformers' `DynamicCache`, all in memory": ("dynamic-cache", False),
}
"""Of a mode under a limit or, False, without one."""


def headline() -> str:
    """Two decodes, of many sequences and of one, for who reads no other table."""
    large, one = load("paper-24gib/paper-opt-6.7b"), load("decode-llama-3.2-1b")
    rows = []
    for words, (mode, is_limited) in HEADLINE.items():
        cells = []
        for data, limit in ((large, "+4GiB"), (one, "0.5")):
            found = (
                item["step_seconds_median"]
                for item in data["summary"]
                if (item["mode"], item["memory_limit"]) == (mode, limit if is_limited else None)
            )
            seconds = next(found, None)
            cells.append("" if seconds is None else f"{seconds:.2f}")
        rows.append([words, *cells])
    heads = [
        f"{name}, {data['options']['batch']} x {data['options']['context']} tokens: {memory} of "
        f"{kv_bytes(data) / GIB:.1f} GiB of KV in memory"
        for name, data, memory in (("OPT-6.7B", large, "4"), ("Llama-3.2-1B", one, "half"))
    ]
    machines = {machine_line(data["machine"]) for data in (large, one)}
    fio = (
        statistics.median(
            run["fio_read_bytes_per_second"]
            for run in data["runs"]
            if run.get("fio_read_bytes_per_second")
        )
        for data in (large, one)
    )
    speeds = " and ".join(f"{speed / GIB:.1f}" for speed in fio)
    return (
        f"{table(['seconds a step', *heads], rows)}\n\nDecode steps of models of these shapes, "
        f"random weights; medians of {large['options']['repeats']} and {one['options']['repeats']} "
        f"runs in turn; fio reads {speeds} GiB/s beside them. Memory-mapped files are what earlier "
        "offloaders use, page cache and direct reads what `dual` chooses from. On "
        f"{' and '.join(sorted(machines))}; "
        "files: `results/paper-24gib/paper-opt-6.7b.json`, `results/decode-llama-3.2-1b.json`."
    )


def paper_large() -> str:
    shapes = {
        "OPT-6.7B": "decode-opt-6.7b",
        "OPT-6.7B, `exact`": "exact-opt-6.7b",
        "Llama-3-8B": "decode-llama-3-8b",
    }
    rows, of, machines = [], [], set()
    for name, file in shapes.items():
        data = load(f"paper/{file}")
        head, its = against_limits(data)
        rows += [[name, *row] for row in its]
        options = data["options"]
        machines.add(machine_line(data["machine"]))
        of.append(
            f"{name}: {options['batch']} x {options['context']} tokens, "
            f"{kv_bytes(data) / GIB:.1f} GiB of KV"
        )
    return (
        f"{table(['shape', *head], rows)}\n\nMilliseconds a step, bfloat16, attention tiles where "
        f"nothing else is said, all layers sharing the weights of one; medians of "
        f"{options['repeats']} runs of {options['steps']} steps after {options['warmup_steps']}, "
        f"in turn. {OF_PAIRS} Memory: left for the cache beside weights and activations. "
        f"{'. '.join(of)}. `{data['command']}` on {' and '.join(sorted(machines))}; files: "
        "`results/paper/`."
    )


SMALL = {
    "a laptop of 8 GB": "laptop-8gb",
    "a drive of 1 GB/s": "jetson",
}
"""Scenarios of machines smaller than this one, by what the tables call them."""


def small_machines() -> str:
    rows, of, results, machines = [], [], [], set()
    for name, scenario in SMALL.items():
        data = load(f"{scenario}/decode")
        head, its = against_limits(data)
        rows += [[name, *row] for row in its]
        options, results = data["options"], [*results, data]
        machines.add(machine_line(data["machine"]))
        of.append(
            f"{name[0].upper()}{name[1:]}: `{options['model']}`, {options['dtype']}, "
            f"{options['batch']} x {options['context']} tokens, "
            f"{kv_bytes(data) / GIB:.2f} GiB of KV, {options['repeats']} runs"
        )
    return (
        f"{table(['', *head], rows)}\n\nMilliseconds a step, attention tiles; medians of runs in "
        f"turn. {OF_PAIRS} Memory: of the whole process on the laptop; left for the cache beside "
        "weights and activations with the slow drive. "
        f"{'. '.join(of)}. {stolen_note(*results)}"
        "`dualblade bench paper SCENARIO --output results/SCENARIO` on "
        f"{' and '.join(sorted(machines))}; files: `results/laptop-8gb/`, `results/jetson/`."
    )


def growth() -> str:
    rows = []
    for name in ("1x4k", "1x16k", "1x64k", "1x128k", "4x16k", "64x1k", "64x1k-1gib"):
        data = load(f"growth/growth-{name}")
        memory, direct = (of_mode(data, mode) for mode in ("memory", "direct"))
        in_memory, seconds = (median_of(runs, "step_seconds_median") for runs in (memory, direct))
        read = median_of(direct, "device_read_bytes_per_step") / GIB
        beyond = max(run["peak_memory_bytes"] - run["base_memory_bytes"] for run in direct)
        cached = max(run["cache"]["memory"]["page_cache_bytes"] for run in direct)
        rows.append(
            [
                f"{direct[0]['batch']} x {direct[0]['context']}",
                f"{direct[0]['kv_bytes'] / GIB:.2f}",
                data["options"]["memory_budget"],
                f"{1000 * in_memory:.0f}",
                f"{1000 * seconds:.0f}",
                f"{read / seconds:.2f}",
                f"{median_of(direct, 'ssd_utilisation'):.2f}",
                *(
                    f"{median_of(runs, 'cpu_seconds_per_step') / read:.2f}"
                    for runs in (memory, direct)
                ),
                f"{beyond / MIB:.0f}",
                f"{cached / MIB:.0f}",
            ]
        )
    head = [
        "sequences x tokens",
        "KV GiB",
        "budget",
        "memory ms",
        "direct ms",
        "GiB read a second",
        "of fio's speed",
        "memory: CPU s per GiB",
        "direct: CPU s per GiB",
        "peak MiB beyond the model",
        "page cache MiB",
    ]
    return (
        f"{table(head, rows)}\n\nMedians of {data['options']['repeats']} runs in turn; "
        "the last two columns are of the direct path; `dualblade bench paper growth --output "
        f"results/growth` on {machine_line(data['machine'])}; files: `results/growth/`."
    )


def setting_words(mode: str) -> str:
    """A fixed setting of the pipeline's table; `layers` is what the others are variations of."""
    return mode.removeprefix("direct+pipeline=").removeprefix("layers+")


def pipeline() -> str:
    rows = []
    for drive in ("200", "1000", "as-is", "as-is-llama"):
        data = load(f"pipeline/settings-{drive}")
        found = sorted(data["summary"], key=lambda item: item["step_seconds_median"])
        default = next(item for item in found if item["mode"] == "direct")
        fixed = [item for item in found if item is not default]
        best, worst = fixed[0], fixed[-1]
        used = [run["ssd_utilisation"] for run in of_mode(data, "direct")]
        rows.append(
            [
                drive_word(data),
                "Llama-3.2-1B" if drive.endswith("llama") else "narrow",
                f"{1000 * default['step_seconds_median']:.0f}",
                *(
                    f"{setting_words(item['mode'])}: {1000 * item['step_seconds_median']:.0f}"
                    for item in (best, worst)
                ),
                spread_text(paired_ratios(data["runs"], "direct", best["mode"])),
                f"{statistics.median(used):.2f}",
            ]
        )
    head = [
        "drive",
        "layers",
        "default ms",
        "best fixed setting",
        "worst",
        "default / best",
        "of fio's speed",
    ]
    roofs = []
    for name in ("half", "half-slow", "equal", "double"):
        data = load(f"pipeline/compute-{name}")
        took = {item["mode"]: item["step_seconds_median"] for item in data["summary"]}
        direct = of_mode(data, "direct")
        reading = statistics.median(
            run["device_read_bytes_per_step"] / run["fio"]["read_bytes_per_second"]
            for run in direct
        )
        first, options = direct[0], data["options"]
        roofs.append(
            [
                f"{options['model'].removeprefix('random:')}, {options['dtype']}, "
                f"{first['batch']} x {first['context']}, {first['kv_bytes'] / GIB:.2f} GiB",
                drive_word(data),
                f"{1000 * took['memory']:.0f}",
                f"{1000 * reading:.0f}",
                f"{1000 * took['direct']:.0f}",
                f"{took['direct'] / max(took['memory'], reading):.2f}",
            ]
        )
    roof_head = ["model, KV", "drive", "compute alone ms", "reading alone ms", "step ms"]
    return (
        f"{table(head, rows)}\n\n{table([*roof_head, 'step / longer of the two'], roofs)}\n\n"
        "Ten fixed settings, five for Llama-3.2-1B; the default tunes itself, in 14 steps before "
        "those that are timed. Direct decoding, drives held by blkio; medians, fio under the same "
        "throttle beside each run; default / best is the median of the ratios within a round, with "
        "their spread. `dualblade bench paper pipeline --output results/pipeline` on "
        f"{machine_line(data['machine'])}; the drive as it is on "
        f"{machine_line(load('pipeline/settings-as-is')['machine'])}; files: `results/pipeline/`."
    )


def prefill_paths() -> str:
    rows = []
    names = ("writes", "chunks", "chunks-fresh", "chunks-64")
    results = [load(f"prefill/prefill-{name}") for name in names]
    mapped = mapped_modes(results[0])
    for name, data in zip(names, results, strict=True):
        for item in data["summary"]:
            state = [run for run in data["runs"] if run["store_state"] == item["store_state"]]
            text = seconds_spread(item["prefill_seconds"], item["prefill_seconds_spread"])
            rows.append(
                [
                    f"{name.removesuffix('-fresh')}, {item['store_state']}: "
                    f"{ahead_words(item['mode'])}",
                    of_runs(text, runs_of(data, item), "prefill_seconds"),
                    *(
                        spread_text(paired_ratios(state, item["mode"], mode, "prefill_seconds"))
                        for mode in mapped
                    ),
                    percent(item["stall_fraction"]),
                    *(
                        "" if item[key] is None else f"{item[key] / GIB:.2f}"
                        for key in ("device_written_bytes", "device_read_bytes")
                    ),
                ]
            )
    ratios = (f"/ {ahead_words(mode)}" for mode in mapped)
    head = ["prompt, store: mode", "seconds", *ratios, "stalled", "GiB written", "GiB read"]
    return (
        f"{table(head, rows)}\n\nWrites: 12 prompts of 512 tokens in one pass, 1.1 GiB of KV, a "
        "budget of half of it, no memory limit. Chunks: 2048 tokens in chunks of 32, or 64, half "
        "of the KV in memory, the drive held to 1 GB/s. Fresh: a new store, "
        "as a first prompt finds it; chunks into one: two runs, by themselves. Ratios are medians "
        "of those within a round, with their spread. Stalled: the "
        "model's thread waited for reads or writes; of mapped files page faults of what it writes "
        f"are not in it. {stolen_note(*results)}"
        "`dualblade bench paper prefill --output results/prefill` on "
        f"{machine_line(data['machine'])}; files: `results/prefill/`."
    )


def ablation() -> str:
    columns = {"tiles, half": "tiles-50", "exact, half": "exact-50", "tiles, quarter": "tiles-25"}
    cells: dict[str, dict[str, str]] = {}
    results = [load(f"ablation/ablation-{name}") for name in columns.values()]
    for column, data in zip(columns, results, strict=True):
        took = {item["mode"]: step_cell(data, item) for item in data["summary"]}
        options = data["options"]
        for mode, step in zip(options["modes"], options["ablation"], strict=True):
            part = step.partition(" (")[0]
            cells.setdefault(part, {})[column] = took[mode]
    rows = [[part, *(row.get(column, "") for column in columns)] for part, row in cells.items()]
    return (
        f"{table(['part', *(f'{column}: ms' for column in columns)], rows)}\n\n"
        f"Milliseconds a step; medians of {data['options']['repeats']} runs, with half or a "
        f"quarter of the KV's {kv_bytes(data) / GIB:.2f} GiB in memory. Fixed residency: 40, "
        "30 or 15 % of the KV. All before `+ pipeline` read one tile after another, but for mapped "
        f"files (`{data['options']['modes'][0]}`), which are copied a layer ahead. "
        f"{stolen_note(*results)}"
        "`dualblade bench paper ablation --output results/ablation` on "
        f"{machine_line(data['machine'])}; files: `results/ablation/`."
    )


TABLES: dict[str, Callable[[], str]] = {
    "demo": demo,
    "headline": headline,
    "io": partial(of_section, io_section, "io-128KiB", "io-1MiB"),
    "deepspeed": partial(of_section, deepspeed_section, "deepspeed"),
    "striping": partial(of_section, striping_section, "striping"),
    "decode": decode,
    "attention": partial(of_section, attention_section, "attention"),
    "attention-amx": partial(of_section, attention_section, "attention-amx"),
    "contention": partial(of_section, contention_section, "contention"),
    "fits": partial(of_section, fits_section, "fits"),
    "changing-memory": partial(of_section, changing_memory_section, "changing-memory"),
    "smollm2": smollm2,
    "context": context,
    "lookup": lookup,
    "greedy": greedy,
    "prefill": prefill,
    "envelope": envelope,
    "checksums": checksums,
    "control": partial(of_section, control_section, "control"),
    "products": partial(of_section, products_section, "products"),
    "spinning": spinning,
    "flexllmgen": flexllmgen,
    "lmcache": lmcache,
    "mlperf": mlperf,
    "budgets": budgets,
    "read-ahead": read_ahead,
    "paper": paper,
    "paper-large": paper_large,
    "small-machines": small_machines,
    "growth": growth,
    "pipeline": pipeline,
    "prefill-paths": prefill_paths,
    "ablation": ablation,
}


FIGURES = {
    "docs/budgets.svg": ("budgets/budgets", "decode_figure"),
    "docs/envelope.svg": ("envelope", "envelope_figure"),
    "docs/changing-memory.svg": ("changing-memory", "changing_memory_figure"),
}


def is_drawn(path: Path, source: str) -> bool:
    """Whether the figure at `path` is of the result as it is."""
    return path.exists() and path.read_text().endswith(mark(source))


def mark(source: str) -> str:
    """The last line of a figure: what it was drawn from."""
    digest = hashlib.sha256((RESULTS / f"{source}.json").read_bytes()).hexdigest()
    return f"<!-- results/{source}.json, sha256 {digest} -->\n"


def draw(path: Path, source: str, figure: str) -> None:
    """Write the figure of a result, by the function of that name in `dualblade.bench.figures`."""
    from dualblade.bench import figures  # matplotlib is not needed to compare

    drawn = figures.svg_text(getattr(figures, figure)(load(source)))
    path.write_text(f"{drawn.rstrip()}\n{mark(source)}")


def render(text: str) -> str:
    for name, make in TABLES.items():
        pattern = re.compile(f"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if pattern.search(text):
            body = make()
            text = pattern.sub(lambda found, body=body: f"{found[1]}{body}\n{found[2]}", text)
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare")
    check = parser.parse_args().check
    stale = []
    for path in DOCUMENTS:
        text = path.read_text()
        rendered = render(text)
        if rendered != text:
            stale.append(str(path.relative_to(ROOT)))
            if not check:
                path.write_text(rendered)
    for name, (source, figure) in FIGURES.items():
        path = ROOT / name
        if not is_drawn(path, source):
            stale.append(str(path.relative_to(ROOT)))
            if not check:
                draw(path, source, figure)
    if check and stale:
        sys.stderr.write(
            f"not as results/ says: {', '.join(stale)}; run scripts/render_results.py\n"
        )
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
