"""Sections of bench report about computing: attention, products, threads, and fio beside it."""

from __future__ import annotations

import statistics
from typing import Any

from dualblade.bench.report_section import Made, Named, Section, machine_text, ms_spread
from dualblade.units import GIB


def attention_section(group: list[Named]) -> Made:
    """`bench attention`."""
    ((name, result),) = group
    ways = ("tiles", "exact", "sdpa_contiguous", "memory_read")
    samples = result["runs"][0]["samples_gib_per_second"]["tiles"]
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
        about=f"GiB of KV per second, {_rows_text(result)}; medians of "
        f"{len(samples)}; {result['kernel']} kernel, {result['threads']} threads.",
        command=result["command"],
        machine=machine_text(result["machine"]),
        head=[
            "sequences, query heads, KV heads, tokens, dim",
            "tiles",
            "exact (gather + sdpa)",
            "sdpa, contiguous",
            "reading memory",
            "tiles / exact",
        ],
        rows=rows,
    )
    middle = statistics.median(run["tiles_to_exact"] for run in result["runs"])
    return section, [(f"{middle:.1f} x", "attention over tiles to gathering first")]


def _rows_text(result: dict[str, Any]) -> str:
    rows = result["runs"][0]["query_tokens"]
    return "one query row" if rows == 1 else f"{rows} query rows"


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
        f"12 rows on. Last a prompt without its KV. Medians of {result['repeats']}, in turns.",
        command=result["command"],
        machine=machine_text(result["machine"]),
        head=["rows, features", "torch ms", "widened ms", "torch / widened"],
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
            [str(one["spins"]), *(_spun_cell(result, one, mode) for mode in modes)]
            for one in medians
        ],
    )
    return section, []


def _spun_cell(result: dict[str, Any], middle: dict[str, Any], mode: str) -> str:
    alike = [run["modes"][mode] for run in result["runs"] if run["spins"] == middle["spins"]]
    each = [run["step_seconds"] for run in alike]
    return ms_spread(middle["step_seconds"][mode], (min(each), max(each)))


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
