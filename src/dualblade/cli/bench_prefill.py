"""`dualblade bench prefill`: a thin layer over `dualblade.bench.prefill`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from dualblade.cli import options
from dualblade.cli.bench_options import (
    Batch,
    Dtype,
    MaybeChunk,
    MaybeOutput,
    MemoryBudget,
    MemoryLimits,
    Modes,
    Repeats,
    Seed,
    engine_settings,
    log_path,
    require_agreement,
)
from dualblade.units import format_size

PrefillChunk = Annotated[
    int,
    typer.Option("--prefill-chunk-size", min=1, metavar="N", help="Tokens of a forward pass."),
]
StoreState = Annotated[
    str,
    typer.Option(
        "--store-state",
        metavar="STATE",
        help="fresh (a new store, as a first prompt finds it), written (one store that all runs "
        "rewrite; first writes into blocks that were never written are slower), or both.",
    ),
]


def bench_prefill(
    model: options.Model,
    mode: Modes,
    batch: Batch = 1,
    context: options.Context = "4096",
    prefill_chunk_size: PrefillChunk = 2048,
    store_state: StoreState = "fresh",
    memory_limit: MemoryLimits = None,
    memory_budget: MemoryBudget = "auto",
    dtype: Dtype = "bfloat16",
    attention: options.Attention = "auto",
    store: options.OneStore = None,
    io_engine: options.IOEngine = "auto",
    queue_depth: options.QueueDepth = None,
    chunk: MaybeChunk = None,
    engine: options.EngineSettings = None,
    repeats: Repeats = 1,
    compare_fio: options.CompareFio = False,
    seed: Seed = 0,
    output: MaybeOutput = None,
    json: options.Json = False,
    debug: options.Debug = False,  # noqa: ARG001 - read by Command
) -> None:
    """Time a prompt of random tokens until its first token, with the KV on each path.

    Each run is a process of its own, under a limit (as root) in a memory cgroup; a run that is
    killed there is reported, not an error. Counted is all until the first token: reads and writes
    of the KV too, and what the model waited for them (stall). Writes still on their way to the
    drive by then go on into the first decode steps; their bytes are counted, the rest of their
    time is not.

    \b
    Examples:
      dualblade bench prefill --model random:opt-1.3b --context 2000 --mode memory --mode dual
      dualblade bench prefill --model demo --context 8000 --mode dual --mode mmap \\
        --memory-limit 0.25 --store-state both --repeats 5 --output prefill.json
    """
    from dualblade.bench.prefill import PrefillBenchOptions, run_prefill_bench
    from dualblade.bench.series import Watch
    from dualblade.cli.output import Reporter, write_json, write_json_file

    wanted = PrefillBenchOptions(
        model=model,
        batch=batch,
        context=options.parse_tokens(context),
        prefill_chunk=prefill_chunk_size,
        store_state=store_state,
        modes=mode,
        memory_limits=memory_limit or (),
        memory_budget=memory_budget,
        dtype=dtype,
        attention=attention,
        store=options.one_store(store),
        repeats=repeats,
        seed=seed,
        compare_fio=compare_fio,
        engine=engine_settings(io_engine, queue_depth, chunk, engine),
    )
    log = None if output is None else log_path(output)
    with Reporter() as reporter:
        watch = Watch(progress=reporter.tell, log_path=log)
        result = run_prefill_bench(wanted, watch)
    if output is not None:
        write_json_file(output, result)
    if json:
        write_json(result)
    else:
        show_prefill(result)
    require_agreement(result)


def show_prefill(result: dict[str, Any]) -> None:
    """A row for each mode, state and limit: medians of the runs."""
    from rich.table import Table

    from dualblade.cli.output import colored, result_console

    table = Table(box=None, pad_edge=False)
    columns = ("mode", "store", "limit", "seconds", "stalled", "written", "read", "peak", "runs")
    for name in columns:
        table.add_column(name, justify="left" if name in ("mode", "store") else "right")
    for entry in result["summary"]:
        table.add_row(*_row(entry))
    console = result_console()
    console.print(table)
    for error in sorted({run["error"] for run in result["runs"] if run["error"] is not None}):
        console.print(colored("failed", "red"), error)
    if result["tokens_agree"] is False:
        console.print(colored("the first tokens differ", "red"))


def _row(entry: dict[str, Any]) -> list[str]:
    place = [entry["mode"], entry["store_state"] or "-", entry["memory_limit"] or "-"]
    if entry["prefill_seconds"] is None:
        why = "killed" if entry["oom_killed"] else "failed"
        return [*place, why, "-", "-", "-", "-", str(entry["runs"])]
    stalled, peak = entry["stall_fraction"], entry["peak_memory_bytes"]
    return [
        *place,
        f"{entry['prefill_seconds']:.2f}",
        "-" if stalled is None else f"{stalled:.1%}",
        format_size(entry["device_written_bytes"]),
        format_size(entry["device_read_bytes"]),
        "-" if peak is None else format_size(peak),
        str(entry["runs"]),
    ]
