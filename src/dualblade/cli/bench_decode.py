"""`dualblade bench decode` and `envelope`: thin layers over `dualblade.bench`."""

from __future__ import annotations

from pathlib import Path
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

Steps = Annotated[int, typer.Option("--steps", min=1, metavar="S", help="Timed steps.")]
WarmupSteps = Annotated[
    int, typer.Option("--warmup-steps", min=0, help="Steps before, not counted.")
]


def bench_decode(
    model: options.Model,
    mode: Modes,
    batch: Batch = 1,
    context: options.Context = "1024",
    steps: Steps = 16,
    warmup_steps: WarmupSteps = 3,
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
    trace: options.Trace = None,
    seed: Seed = 0,
    output: MaybeOutput = None,
    json: options.Json = False,
    debug: options.Debug = False,  # noqa: ARG001 - read by Command
) -> None:
    """Time decode steps with the KV on each path.

    Each run is a process of its own. The KV is filled with seeded random rows instead of a long
    prefill. With a limit (as root) each run is in a memory cgroup; a run that is killed there is
    reported, not an error. With --trace each run has a file of its own, FILE-MODE-LIMIT-REPEAT.

    \b
    Examples:
      dualblade bench decode --model random:opt-1.3b --context 2000 --mode memory --mode direct
      dualblade bench decode --model demo --context 8000 --mode dual --memory-limit 0.25 --json
    """
    from dualblade.bench.decode import DecodeBenchOptions, run_decode_bench
    from dualblade.bench.series import Watch
    from dualblade.cli.output import Reporter, write_json, write_json_file

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
        store=options.one_store(store),
        repeats=repeats,
        warmup_steps=warmup_steps,
        seed=seed,
        compare_fio=compare_fio,
        trace=trace,
        engine=engine_settings(io_engine, queue_depth, chunk, engine),
    )
    log = None if output is None else log_path(output)
    with Reporter() as reporter:
        watch = Watch(progress=reporter.tell, log_path=log)
        result = run_decode_bench(wanted, watch)
    if output is not None:
        write_json_file(output, result)
    if json:
        write_json(result)
    else:
        show_decode(result)
    require_agreement(result)


Output = Annotated[
    Path,
    typer.Option(
        "--output",
        metavar="FILE.json",
        callback=options.into_a_folder,
        help="The result. FILE.jsonl beside it keeps each finished run, to go on from.",
    ),
]
MaybeModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        help="As elsewhere; by default a small model with the KV of OPT-1.3B.",
    ),
]
Splits = Annotated[
    list[int] | None,
    typer.Option(
        "--split",
        min=0,
        max=100,
        metavar="PERCENT",
        help="A fixed split to try; may be repeated. By default 0, 20, ... 100.",
    ),
]
Refine = Annotated[
    int, typer.Option("--refine", min=1, metavar="PERCENT", help="Tried beside the best split.")
]
CoarseRounds = Annotated[
    int, typer.Option("--coarse-rounds", min=1, help="Of all splits; they choose the best.")
]
Rounds = Annotated[
    int, typer.Option("--rounds", min=1, help="Of dual and the best splits; they judge.")
]
Figure = Annotated[
    Path | None,
    typer.Option("--figure", metavar="FILE", help="Draw it as .svg or .png (extra: report)."),
]


def bench_envelope(
    output: Output,
    model: MaybeModel = None,
    batch: Batch = 1,
    context: options.Context = "6000",
    steps: Steps = 8,
    warmup_steps: WarmupSteps = 3,
    memory_limit: MemoryLimits = None,
    split: Splits = None,
    refine: Refine = 10,
    coarse_rounds: CoarseRounds = 2,
    rounds: Rounds = 5,
    dtype: Dtype = "bfloat16",
    attention: options.Attention = "auto",
    store: options.OneStore = None,
    io_engine: options.IOEngine = "auto",
    queue_depth: options.QueueDepth = None,
    chunk: MaybeChunk = None,
    engine: options.EngineSettings = None,
    seed: Seed = 0,
    figure: Figure = None,
    json: options.Json = False,
    debug: options.Debug = False,  # noqa: ARG001 - read by Command
) -> None:
    """Compare the automatic split with every fixed one, under several memory limits.

    Needs root (memory cgroups). As it stands about 40 minutes on a 3 GiB/s drive. After an
    interruption the same command goes on where it stopped; when all is done it only writes the
    result again.

    \b
    Examples:
      dualblade bench envelope --output results/envelope.json --figure envelope.svg
      dualblade bench envelope --output quick.json --memory-limit 50% --rounds 3 --context 2000
    """
    from dualblade.bench.envelope import MODEL, EnvelopeOptions, run_envelope
    from dualblade.bench.figures import envelope_figure, require_figures, save_figure
    from dualblade.cli.output import Reporter, write_json, write_json_file

    wanted: dict[str, Any] = {"limits": memory_limit, "splits": split}
    chosen = EnvelopeOptions(
        model=model or MODEL,
        batch=batch,
        context=options.parse_tokens(context),
        steps=steps,
        warmup_steps=warmup_steps,
        refine=refine,
        coarse_rounds=coarse_rounds,
        rounds=rounds,
        dtype=dtype,
        attention=attention,
        store=options.one_store(store),
        seed=seed,
        engine=engine_settings(io_engine, queue_depth, chunk, engine),
        **{name: value for name, value in wanted.items() if value},
    )
    if figure is not None:
        require_figures(figure)
    log = log_path(output)
    with Reporter() as reporter:
        result = run_envelope(chosen, log, reporter.tell)
    write_json_file(output, result)
    if figure is not None:
        save_figure(envelope_figure(result), figure)
    if json:
        write_json(result)
    else:
        _show_envelope(result)
    require_agreement(result)


def _show_envelope(result: dict[str, Any]) -> None:
    from rich.table import Table

    from dualblade.cli.output import colored, result_console

    table = Table(box=None, pad_edge=False)
    for name in ("limit", "best split", "its ms", "dual ms", "dual / best", "spread", "killed"):
        table.add_column(name, justify="right")
    for entry in result["summary"]:
        if entry["dual_to_best"] is None:
            table.add_row(entry["memory_limit"], *["-"] * 5, str(entry["oom_killed"]))
            continue
        low, high = entry["dual_to_best_spread"]
        table.add_row(
            entry["memory_limit"],
            f"{entry['best_static_percent']} %",
            f"{1000 * entry['best_static_seconds']:.0f}",
            f"{1000 * entry['dual_seconds']:.0f}",
            f"{entry['dual_to_best']:.2f}",
            f"{low:.2f}-{high:.2f}",
            str(entry["oom_killed"]),
        )
    console = result_console()
    console.print(table)
    for entry in result["summary"]:
        for error in entry["errors"]:
            console.print(f"{entry['memory_limit']}: {error}")
    reached = "holds" if result["reached"] else colored("does not hold", "red")
    console.print(f"dual at most {result['target']} x the best fixed split, never killed:", reached)


def show_decode(result: dict[str, Any]) -> None:
    """A row for each run."""
    from rich.table import Table

    from dualblade.cli.output import colored, result_console

    columns = ("mode", "limit", "ms per step", "p99", "read per step", "hits", "peak", "engine")
    table = Table(box=None, pad_edge=False)
    for name in columns:
        table.add_column(name, justify="left" if name in ("mode", "engine") else "right")
    for run in result["runs"]:
        table.add_row(*_decode_row(run))
    console = result_console()
    console.print(table)
    if result["tokens_agree"] is True:
        console.print("runs with the same attention gave the same tokens")
    elif result["tokens_agree"] is False:
        console.print(colored("the tokens differ", "red"))


def _decode_row(run: dict[str, Any]) -> list[str]:
    limit = run["memory_limit_bytes"]
    shown = "-" if limit is None else format_size(limit)
    if run["oom_killed"] or run["error"] is not None:
        why = "killed for want of memory" if run["oom_killed"] else run["error"]
        return [run["mode"], shown, "-", "-", "-", "-", "-", why]
    hits, peak = run["page_cache_hit_fraction"], run["peak_memory_bytes"]
    return [
        run["mode"],
        shown,
        f"{run['step_seconds_median'] * 1000:.1f}",
        f"{run['step_seconds_p99'] * 1000:.1f}",
        format_size(run["device_read_bytes_per_step"]),
        "-" if hits is None else f"{hits:.0%}",
        "-" if peak is None else format_size(peak),
        run["engine"] or "-",
    ]
