"""Options that the commands of `dualblade bench` have in the same words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from dualblade.cli import options
from dualblade.errors import ConfigError, DualBladeError
from dualblade.units import parse_size

Modes = Annotated[
    list[str],
    typer.Option(
        "--mode",
        metavar="PATH",
        help="dual, page-cache, direct, memory; mmap (memory-mapped files, the way of earlier "
        "offloaders); dynamic-cache (transformers' own); offloaded-cache (its layers in host "
        "memory, with a GPU); static-N: N percent through the page cache, whether they fit or "
        "not. Settings may follow: dual+pipeline=serial, mmap+read_ahead=1MiB (by what the drive's "
        "queue reads ahead meanwhile; root). May be repeated.",
    ),
]
Batch = Annotated[int, typer.Option("--batch", min=1, metavar="B", help="Sequences.")]
MemoryLimits = Annotated[
    list[str] | None,
    typer.Option(
        "--memory-limit",
        metavar="LIMIT",
        help="Memory cgroup of each run: a size for the whole process; or what is left in it for "
        "the KV cache, a size (+2GiB) or a part of the KV (25% or 0.25); or none. May be repeated.",
    ),
]
MemoryBudget = Annotated[
    str,
    typer.Option(
        "--memory-budget",
        metavar="SIZE",
        help="Host memory for the KV cache of runs without a limit, such as 512MiB; or auto. Under "
        "a --memory-limit it is what the limit leaves.",
    ),
]
Dtype = Annotated[str, typer.Option("--dtype", help="bfloat16, float32 or float16.")]
MaybeChunk = Annotated[
    str | None, typer.Option("--chunk", metavar="SIZE", help="Largest single request.")
]
Repeats = Annotated[int, typer.Option("--repeats", min=1, help="Of everything.")]
Seed = Annotated[int, typer.Option("--seed", help="Of the rows and weights.")]
MaybeOutput = Annotated[
    Path | None,
    typer.Option(
        "--output",
        metavar="FILE.json",
        callback=options.into_a_folder,
        help="Write the result there too. FILE.jsonl beside it keeps each finished run: after an "
        "interruption the same command goes on from there.",
    ),
]


def engine_settings(
    io_engine: str, queue_depth: int | None, chunk: str | None, settings: list[str] | None
) -> dict[str, Any]:
    """Engine settings that were given, by name."""
    return options.given_settings(
        settings,
        io_engine=io_engine,
        queue_depth=queue_depth,
        chunk_bytes=None if chunk is None else parse_size(chunk),
    )


def require_agreement(result: Mapping[str, Any]) -> None:
    """Raises: DualBladeError when the tokens differ, as `demo` does; the result is told before."""
    if result["tokens_agree"] is False:
        raise DualBladeError(
            "runs with the same attention gave different tokens", hint="please report this"
        )


def log_path(output: Path) -> Path:
    """Where finished runs are kept. Raises: ConfigError when that is the result's own place."""
    log = output.with_suffix(".jsonl")
    if log == output:
        raise ConfigError(
            f"the result cannot be {output}: finished runs are kept there",
            hint=f"name it {output.with_suffix('.json')}",
        )
    return log
