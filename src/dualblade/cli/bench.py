"""`dualblade bench`: measurements, each a thin layer over `dualblade.bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dualblade.cli import options
from dualblade.cli.bench_decode import bench_decode, bench_envelope
from dualblade.cli.bench_paper import bench_paper
from dualblade.cli.bench_prefill import bench_prefill
from dualblade.cli.bench_report import bench_report
from dualblade.cli.command import Command
from dualblade.units import format_size, parse_size

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Measure the I/O engine, attention, prefill and decoding under a limit; report it.",
)

app.command("decode", cls=Command)(bench_decode)
app.command("prefill", cls=Command)(bench_prefill)
app.command("envelope", cls=Command)(bench_envelope)
app.command("paper", cls=Command)(bench_paper)
app.command("report", cls=Command)(bench_report)

Chunk = Annotated[str, typer.Option("--chunk", metavar="SIZE", help="Largest single request.")]


@app.command("io", cls=Command)
def bench_io(
    store: Annotated[
        list[Path],
        typer.Option(
            "--store",
            metavar="FILE",
            help="Scratch file; made if missing, and kept. Repeated: striped over all of them.",
        ),
    ],
    size: Annotated[str, typer.Option("--size", metavar="SIZE", help="Of the data.")] = "2GiB",
    chunk: Chunk = "1MiB",
    queue_depth: Annotated[
        int, typer.Option("--queue-depth", min=1, help="Requests in flight on each file.")
    ] = 8,
    io_engine: options.IOEngine = "auto",
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Passes counted.")] = 5,
    compare_fio: options.CompareFio = False,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the file's random bytes.")] = 0,
    json: options.Json = False,
    debug: options.Debug = False,  # noqa: ARG001 - read by Command
) -> None:
    """Measure reading and writing files directly.

    Throughput, CPU time per GiB and the queue depth that was reached, with O_DIRECT; beside fio if
    asked for.

    \b
    Examples:
      dualblade bench io --store /mnt/nvme/scratch --size 2GiB --chunk 1MiB --queue-depth 8 --json
      dualblade bench io --store scratch --size 512MiB --chunk 128KiB --compare-fio
      dualblade bench io --store /mnt/a/scratch --store /mnt/b/scratch
    """
    from dualblade.bench.io import IoBenchOptions, run_io_bench
    from dualblade.cli.output import Reporter, write_json

    engine = options.engine_config(io_engine=io_engine, queue_depth=queue_depth, chunk_bytes=chunk)
    wanted = IoBenchOptions(
        store=[str(path) for path in store],
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
        cpu = fio["cpu_ratio_median"]
        console.print(
            f"fio       {fio['throughput_ratio_median']:.3f} of its throughput, "
            f"{'too little to see' if cpu is None else f'{cpu:.3f}'} of its CPU (medians of pairs)"
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
