"""`dualblade bench`: measurements, each a thin layer over `dualblade.bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dualblade.cli import options
from dualblade.cli.command import Command
from dualblade.units import format_size, parse_size

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Measure the I/O engine, and decoding under a limit.",
)

CompareFio = Annotated[
    bool, typer.Option("--compare-fio", help="Run fio in turn on the same file, block and depth.")
]
Chunk = Annotated[str, typer.Option("--chunk", metavar="SIZE", help="Largest single request.")]


@app.command("io", cls=Command)
def bench_io(
    store: Annotated[
        Path,
        typer.Option("--store", metavar="FILE", help="Scratch file; made if missing, and kept."),
    ],
    size: Annotated[str, typer.Option("--size", metavar="SIZE", help="Of the file.")] = "2GiB",
    chunk: Chunk = "1MiB",
    queue_depth: Annotated[
        int, typer.Option("--queue-depth", min=1, help="Requests in flight.")
    ] = 8,
    io_engine: options.IOEngine = "auto",
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Passes counted.")] = 5,
    compare_fio: CompareFio = False,
    seed: Annotated[int, typer.Option("--seed", help="Of the file's random bytes.")] = 0,
    json: options.Json = False,
    debug: options.Debug = False,  # noqa: ARG001 - read by Command
) -> None:
    """Measure reading and writing one file directly.

    Throughput, CPU time per GiB and the queue depth that was reached, with O_DIRECT; beside fio if
    asked for.

    \b
    Examples:
      dualblade bench io --store /mnt/nvme/scratch --size 2GiB --chunk 1MiB --queue-depth 8 --json
      dualblade bench io --store scratch --size 512MiB --chunk 128KiB --compare-fio
    """
    from dualblade.bench.io import IoBenchOptions, run_io_bench
    from dualblade.cli.output import Reporter, write_json

    engine = options.engine_config(io_engine=io_engine, queue_depth=queue_depth, chunk_bytes=chunk)
    wanted = IoBenchOptions(
        store=str(store),
        size_bytes=parse_size(size),
        chunk_bytes=engine.chunk_bytes,
        queue_depth=engine.queue_depth,
        io_engine=engine.io_engine,
        repeats=repeats,
        compare_fio=compare_fio,
        seed=seed,
    )
    with Reporter() as reporter:
        result = run_io_bench(wanted, reporter.tell)
    if json:
        write_json(result)
    else:
        _show_io(result)


@app.command("attention", cls=Command)
def bench_attention(
    shape: Annotated[
        list[str] | None,
        typer.Option(
            "--shape",
            metavar="B,H,G,T,D",
            help="Batch, query heads, KV heads, tokens, dim; may be repeated. By default four.",
        ),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option("--dtype", help="bfloat16 or float32; may be repeated. By default both."),
    ] = None,
    query_tokens: Annotated[
        int, typer.Option("--query-tokens", min=1, help="Candidates verified together.")
    ] = 1,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Samples of each way.")] = 7,
    seed: Annotated[int, typer.Option("--seed", help="Of the random rows.")] = 0,
    json: options.Json = False,
    debug: options.Debug = False,  # noqa: ARG001 - read by Command
) -> None:
    """Measure attention: GiB of KV per second over tiles, gathered, and contiguous.

    Beside each the memory's read bandwidth, which none can pass for long.

    \b
    Examples:
      dualblade bench attention --json
      dualblade bench attention --shape 1,32,8,32768,128 --dtype bfloat16 --query-tokens 8
    """
    from dualblade.bench.attention import (
        SHAPES,
        AttentionBenchOptions,
        AttentionShape,
        run_attention_bench,
    )
    from dualblade.cli.output import Reporter, write_json

    wanted = AttentionBenchOptions(
        shapes=[AttentionShape.parse(text) for text in shape] if shape else SHAPES,
        dtypes=dtype or ("bfloat16", "float32"),
        query_tokens=query_tokens,
        repeats=repeats,
        seed=seed,
    )
    with Reporter() as reporter:
        result = run_attention_bench(wanted, reporter.tell)
    if json:
        write_json(result)
    else:
        _show_attention(result)


Modes = Annotated[
    list[str],
    typer.Option(
        "--mode",
        metavar="PATH",
        help="dual, page-cache, direct, memory; or dynamic-cache (transformers' own). "
        "May be repeated.",
    ),
]
Batch = Annotated[int, typer.Option("--batch", min=1, metavar="B", help="Sequences.")]
Steps = Annotated[int, typer.Option("--steps", min=1, metavar="S", help="Timed steps.")]
WarmupSteps = Annotated[
    int, typer.Option("--warmup-steps", min=0, help="Steps before, not counted.")
]
MemoryLimits = Annotated[
    list[str] | None,
    typer.Option(
        "--memory-limit",
        metavar="LIMIT",
        help="Memory cgroup of each run: a size for the whole process, or a fraction of the "
        "KV that is left for its cache (0.25). May be repeated.",
    ),
]
Dtype = Annotated[str, typer.Option("--dtype", help="bfloat16 or float32.")]
MaybeChunk = Annotated[
    str | None, typer.Option("--chunk", metavar="SIZE", help="Largest single request.")
]
Repeats = Annotated[int, typer.Option("--repeats", min=1, help="Of everything.")]
Seed = Annotated[int, typer.Option("--seed", help="Of the rows and weights.")]


@app.command("decode", cls=Command)
def bench_decode(
    model: options.Model,
    mode: Modes,
    batch: Batch = 1,
    context: options.Context = "1024",
    steps: Steps = 16,
    warmup_steps: WarmupSteps = 2,
    memory_limit: MemoryLimits = None,
    memory_budget: options.MemoryBudget = "auto",
    dtype: Dtype = "bfloat16",
    attention: options.Attention = "auto",
    store: options.Store = None,
    io_engine: options.IOEngine = "auto",
    queue_depth: options.QueueDepth = None,
    chunk: MaybeChunk = None,
    engine: options.EngineSettings = None,
    repeats: Repeats = 1,
    compare_fio: CompareFio = False,
    trace: options.Trace = None,
    seed: Seed = 0,
    json: options.Json = False,
    debug: options.Debug = False,  # noqa: ARG001 - read by Command
) -> None:
    """Time decode steps with the KV on each path.

    Each run is a process of its own. The KV is filled with seeded random rows instead of a long
    prefill. With a limit (as root) each run is in a memory cgroup; a run that is killed there is
    reported, not an error.

    \b
    Examples:
      dualblade bench decode --model random:opt-1.3b --context 2000 --mode memory --mode direct
      dualblade bench decode --model demo --context 8000 --mode dual --memory-limit 0.25 --json
    """
    from dualblade.bench.decode import DecodeBenchOptions, run_decode_bench
    from dualblade.cli.output import Reporter, write_json

    settings: dict[str, Any] = {"io_engine": io_engine, "queue_depth": queue_depth}
    settings["chunk_bytes"] = None if chunk is None else parse_size(chunk)
    settings.update(options.parse_settings(engine))
    wanted = DecodeBenchOptions(
        model=model,
        batch=batch,
        context=options.parse_tokens(context),
        steps=steps,
        modes=mode,
        memory_limits=memory_limit or (),
        memory_budget=memory_budget,
        dtype=dtype,
        attention=attention,
        store=store,
        repeats=repeats,
        warmup_steps=warmup_steps,
        seed=seed,
        compare_fio=compare_fio,
        trace=trace,
        engine={name: value for name, value in settings.items() if value is not None},
    )
    with Reporter() as reporter:
        result = run_decode_bench(wanted, reporter.tell)
    if json:
        write_json(result)
    else:
        _show_decode(result)


def _show_io(result: dict[str, Any]) -> None:
    from dualblade.cli.output import result_console

    console = result_console()
    because = f" ({result['engine_reason']})" if result["engine_reason"] else ""
    console.print(f"engine    {result['engine']}{because}")
    for note in result["engine_notes"]:
        console.print(f"          {note}")
    console.print(f"read      {format_size(result['read_bytes_per_second'])}/s")
    console.print(f"write     {format_size(result['write_bytes_per_second'])}/s")
    console.print(f"CPU       {result['cpu_seconds_per_gib_read']:.3f} s per GiB read")
    console.print(f"in flight {result['effective_queue_depth']:.2f} while work was waiting")
    console.print(f"memory    {'huge' if result['huge_pages'] else 'ordinary'} pages")
    if "fio" in result:
        fio = result["fio"]
        console.print(
            f"fio       {fio['throughput_ratio_median']:.3f} of its throughput, "
            f"{fio['cpu_ratio_median']:.3f} of its CPU (medians of pairs)"
        )


def _show_attention(result: dict[str, Any]) -> None:
    from rich.table import Table

    from dualblade.cli.output import result_console

    table = Table(box=None, pad_edge=False)
    table.add_column("B,H,G,T,D")
    table.add_column("dtype")
    for name in ("tiles", "exact", "contiguous", "memory read", "tiles / exact"):
        table.add_column(name, justify="right")
    ways = ("tiles", "exact", "sdpa_contiguous", "memory_read")
    for run in result["runs"]:
        dims = (run[name] for name in ("batch", "query_heads", "kv_heads", "tokens", "dim"))
        table.add_row(
            ",".join(map(str, dims)),
            run["dtype"],
            *(f"{run[f'{way}_gib_per_second']:.1f}" for way in ways),
            f"{run['tiles_to_exact']:.1f}",
        )
    console = result_console()
    console.print(table)
    console.print(f"GiB of KV per second; {result['kernel']} kernel, {result['threads']} threads")


def _show_decode(result: dict[str, Any]) -> None:
    from rich.table import Table

    from dualblade.cli.output import result_console

    columns = ("mode", "limit", "ms per step", "p99", "read per step", "hits", "peak", "engine")
    table = Table(box=None, pad_edge=False)
    for name in columns:
        table.add_column(name, justify="left" if name in ("mode", "engine") else "right")
    for run in result["runs"]:
        table.add_row(*_decode_row(run))
    console = result_console()
    console.print(table)
    agree = {
        True: "runs with the same attention gave the same tokens",
        False: "[red]the tokens differ[/red]",
    }
    if result["tokens_agree"] is not None:
        console.print(agree[result["tokens_agree"]])


def _decode_row(run: dict[str, Any]) -> list[str]:
    limit = run["memory_limit_bytes"]
    shown = "-" if limit is None else format_size(limit)
    if run["oom_killed"] or run["error"] is not None:
        why = "killed for want of memory" if run["oom_killed"] else run["error"]
        return [run["mode"], shown, "-", "-", "-", "-", "-", why]
    hits = run["page_cache_hit_fraction"]
    return [
        run["mode"],
        shown,
        f"{run['step_seconds_median'] * 1000:.1f}",
        f"{run['step_seconds_p99'] * 1000:.1f}",
        format_size(run["device_read_bytes_per_step"]),
        "-" if hits is None else f"{hits:.0%}",
        format_size(run["peak_memory_bytes"]),
        run["engine"] or "-",
    ]
