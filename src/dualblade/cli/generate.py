"""`dualblade generate`: a text, streamed as it is produced, with its KV cache in a store."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dualblade.cli import options
from dualblade.config import TRACE_EVENTS
from dualblade.errors import ConfigError
from dualblade.units import parse_size

if TYPE_CHECKING:
    from dualblade.cli.before_loading import Prepared
    from dualblade.cli.generation import Generation
    from dualblade.config import EngineConfig
    from dualblade.hf.cache import DualBladeCache
    from dualblade.hf.models import LoadedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The command line, checked as far as it can be without a model."""

    model: str
    prompt: str
    system: str | None
    chat: bool
    max_new_tokens: int | None
    temperature: float
    seed: int
    prefill_chunk_tokens: int
    prompt_lookup: int
    dtype: str
    device: str | None
    store: list[Path] | None
    memory_budget: str | int
    path: str
    attention: str
    engine: EngineConfig
    json: bool
    stats: bool
    trace: Path | None

    def __post_init__(self) -> None:
        from dualblade import config

        config.check_attention(self.attention)
        self.engine.check_path(config.Path.parse(self.path))


Prompt = Annotated[
    str | None,
    typer.Option(
        "--prompt",
        "-p",
        metavar="TEXT",
        help="The prompt; with --prompt-file what is asked about that text, and put after it.",
    ),
]
PromptFile = Annotated[
    str | None,
    typer.Option("--prompt-file", metavar="FILE", help="Read the prompt; - is stdin."),
]
System = Annotated[
    str | None,
    typer.Option("--system", metavar="TEXT", help="System text, for models that chat."),
]
Chat = Annotated[
    bool,
    typer.Option("--chat/--no-chat", help="Use the model's chat template if it has one."),
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(
        "--max-new-tokens",
        min=1,
        metavar="N",
        help="At most; by default 256, and a note says where an answer would have gone on.",
    ),
]
Temperature = Annotated[
    float,
    typer.Option(
        "--temperature",
        min=0.0,
        help="0 takes the likeliest token. The model's own top_p, top_k and penalties are unused.",
    ),
]
Seed = Annotated[
    int,
    typer.Option("--seed", min=0, max=2**63 - 1, help="Of sampling, and of `random:` weights."),
]
PrefillChunk = Annotated[
    int,
    typer.Option("--prefill-chunk-size", min=1, help="Tokens of the prompt computed at once."),
]
PromptLookup = Annotated[
    int,
    typer.Option(
        "--prompt-lookup",
        min=0,
        metavar="N",
        help="Guess up to N tokens from earlier text and verify them in one sweep of the KV: "
        "quotes come several at a time. At temperature 0 the text stays the same but for near-ties "
        "in bfloat16.",
    ),
]
Stats = Annotated[
    bool, typer.Option("--stats", help="Afterwards, where time and bytes went (on stderr).")
]


def generate(
    model: options.Model,
    prompt: Prompt = None,
    prompt_file: PromptFile = None,
    system: System = None,
    chat: Chat = True,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    prefill_chunk_size: PrefillChunk = options.PREFILL_CHUNK_TOKENS,
    prompt_lookup: PromptLookup = 0,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    store: options.Store = None,
    memory_budget: options.MemoryBudget = "auto",
    path: options.KVPath = "dual",
    cache_percent: options.CachePercent = None,
    attention: options.Attention = "auto",
    disk_capacity_bytes: options.DiskCapacity = None,
    io_engine: options.IOEngine = "auto",
    io_poll: options.IOPoll = False,
    discard: options.Discard = False,
    queue_depth: options.QueueDepth = None,
    checksums: options.Checksums = "sample",
    engine: options.EngineSettings = None,
    stats: Stats = False,
    trace: options.Trace = None,
    json: options.Json = False,
    debug: options.Debug = False,  # noqa: ARG001 - read by Command
) -> None:
    """Generate a text, its KV cache on the drive. It is streamed to stdout, all else to stderr.

    \b
    Examples:
      dualblade generate --model demo -p "What is the capital of France?"
      dualblade generate --model ./llama --prompt-file book.txt -p "Who did it?" --stats
      dualblade generate --model random:llama-3.2-1b -p hello --max-new-tokens 8 --path direct
    """
    request = Request(
        model=model,
        prompt=_prompt_text(prompt, prompt_file),
        system=None if system is None else _utf8("system text", system),
        chat=chat,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        prefill_chunk_tokens=prefill_chunk_size,
        prompt_lookup=prompt_lookup,
        dtype=dtype,
        device=device,
        store=store,
        memory_budget=memory_budget if memory_budget == "auto" else parse_size(memory_budget),
        path=path,
        attention=attention,
        engine=options.engine_config(
            io_engine=io_engine,
            queue_depth=queue_depth,
            disk_capacity_bytes=disk_capacity_bytes,
            checksums=checksums,
            trace_events=TRACE_EVENTS if trace else None,
            cache_percent=cache_percent,
            io_poll=io_poll,
            discard=discard,
            settings=engine,
        ),
        json=json,
        stats=stats,
        trace=trace,
    )
    _run(request)


def _prompt_text(prompt: str | None, prompt_file: str | None) -> str:
    """The file's text, then a blank line and the prompt. Raises: ConfigError for neither, for
    blanks alone, and for an unreadable file."""
    parts = [] if prompt_file is None else [_file_text(prompt_file)]
    if prompt is not None:
        parts = [*(text.rstrip() for text in parts), _utf8("prompt", prompt)]
    if not parts:
        raise ConfigError(
            "no prompt is given",
            hint="give --prompt, --prompt-file (- reads stdin), or both: a text and a question",
        )
    if not all(text.strip() for text in parts):  # a chat template makes a question of nothing
        what = "prompt" if prompt is not None and not prompt.strip() else f"text of {prompt_file}"
        raise ConfigError(f"the {what} is empty", hint="give --prompt or --prompt-file some text")
    return "\n\n".join(parts)


def _file_text(prompt_file: str) -> str:
    if prompt_file == "-" and sys.stdin is None:
        raise ConfigError("stdin is closed", hint="give a file, or --prompt")
    try:
        raw = sys.stdin.buffer.read() if prompt_file == "-" else Path(prompt_file).read_bytes()
        return raw.decode("utf-8-sig")  # some editors begin a file with U+FEFF
    except OSError as exc:
        raise ConfigError(f"cannot read the prompt {prompt_file}: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(f"the prompt {prompt_file} is not UTF-8 text (byte {exc.start})") from exc


def _utf8(what: str, text: str) -> str:
    """`text`, an argument. Raises: ConfigError where the shell gave bytes that are no text."""
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        raise ConfigError(f"the {what} is not UTF-8 text (character {exc.start})") from exc
    return text


def _run(request: Request) -> None:
    from dualblade.cli.output import Reporter, write_json

    given = (request.path, request.store, request.memory_budget, request.engine)
    for name in options.without_effect(*given):
        typer.echo(f"{name} has no effect on path {request.path}", err=True)
    with Reporter() as reporter:
        began = time.perf_counter()
        reporter.tell(f"loading {request.model}")
        from dualblade.cli.before_loading import prepare
        from dualblade.hf.models import load_model, parse_dtype

        prepared = prepare(request, reporter.tell)
        loaded = load_model(
            request.model,
            dtype=parse_dtype(request.dtype),
            device=request.device,
            seed=request.seed,
            text=prepared.text,
            tell=reporter.tell,
        )
        load_seconds = time.perf_counter() - began
        generation, at_first, cache_stats = _generate(request, loaded, prepared, reporter)
    result = _result(request, loaded, prepared, load_seconds, generation, cache_stats)
    result["read_bytes_per_token"] = _read_per_token(generation, at_first, cache_stats)
    if request.json:
        write_json(result)
    if request.stats:
        from dualblade.cli.generate_stats import show_stats

        show_stats(result)


def _generate(
    request: Request, loaded: LoadedModel, prepared: Prepared, reporter: Any
) -> tuple[Generation, dict[str, Any], dict[str, Any]]:
    """The text, and what the cache says at its first token and at its end."""
    from dualblade.cli.generation import LIMIT, Sampling, check_candidates, generate_text
    from dualblade.hf.boundary import forgetting_boundary, use_long_rope
    from dualblade.hf.cache import DualBladeCache

    if request.prompt_lookup:
        check_candidates(loaded.name, loaded.model)
    prompt, new_tokens = prepared.prompt, prepared.new_tokens
    # Candidates are stored before they are refused.
    most = len(prompt) + new_tokens + request.prompt_lookup
    boundary = forgetting_boundary(loaded.model.config)
    # Else all of it would be computed in memory, or refused.
    if boundary is not None and most > boundary and use_long_rope(loaded.model):
        reporter.note(f"prompt and answer may pass {boundary} tokens: rotated as a longer text")
    with DualBladeCache.for_model(
        loaded.model,
        store=request.store,
        memory_budget=request.memory_budget,
        path=request.path,
        attention=request.attention,  # type: ignore[arg-type]  # a wrong word is told there
        max_tokens=most,
        config=request.engine,
    ) as cache:
        if request.trace is not None:
            cache.write_trace(request.trace)  # says now what it would say at the end
        reporter.tell(f"prefill of {len(prompt)} tokens")
        write = _no_text if request.json else _write_text
        at_first: dict[str, Any] = {}

        def first() -> None:
            reporter.finish()
            at_first.update(cache.stats().to_dict())

        try:
            generation = generate_text(
                loaded,
                prompt,
                cache,
                Sampling(
                    max_new_tokens=new_tokens,
                    temperature=request.temperature,
                    seed=request.seed,
                    prefill_chunk_tokens=request.prefill_chunk_tokens,
                    prompt_lookup=request.prompt_lookup,
                ),
                write,
                reporter.fraction,
                first,
            )
        finally:
            reporter.finish()
            write("\n")
            if request.trace is not None:  # after Ctrl-C too: what was done until then
                reporter.note(_write_trace(cache, request.trace))
        if request.max_new_tokens is None and generation.ended == LIMIT:
            reporter.note(_stopped(new_tokens))
        return generation, at_first, cache.stats().to_dict()


def _stopped(count: int) -> str:
    """That an answer may go on, where nobody said how long it is to be."""
    from dualblade.cli.generation import NEW_TOKENS_DEFAULT

    if count < NEW_TOKENS_DEFAULT:
        return f"stopped at {count} tokens, where the model's positions end"
    return f"stopped at {count} tokens: --max-new-tokens takes more"


def _write_trace(cache: DualBladeCache, path: Path) -> str:
    """What to say of it. An error here would take the text, or the error that ended it, away."""
    try:
        return f"{cache.write_trace(path)} spans in {path}"
    except OSError as exc:
        return f"no trace in {path}: {exc.strerror}"


def _read_per_token(
    generation: Generation, at_first: dict[str, Any], at_end: dict[str, Any]
) -> float | None:
    """Bytes asked of the store for each token after the first."""
    count = len(generation.tokens) - 1
    if count < 1 or not at_first:
        return None
    doors = ("direct_read_bytes", "page_cache_read_bytes")
    return sum(float(at_end["io"][door] - at_first["io"][door]) for door in doors) / count


def _write_text(text: str) -> None:
    from dualblade.cli.output import without_controls

    sys.stdout.write(without_controls(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def _no_text(_text: str) -> None:
    """With --json the text is in the object."""


def _result(
    request: Request,
    loaded: LoadedModel,
    prepared: Prepared,
    load_seconds: float,
    generation: Generation,
    cache_stats: dict[str, Any],
) -> dict[str, Any]:
    from dualblade.host.memory import process_memory

    return {
        "command": "generate",
        "model": loaded.name,
        "source": loaded.source,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": str(loaded.model.device),
        "prompt_tokens": len(prepared.prompt),
        "new_tokens": len(generation.tokens),
        "ended": generation.ended,
        "text": loaded.decode(generation.tokens),
        "tokens_sha256": generation.sha256(),
        "load_seconds": load_seconds,
        "prefill_seconds": generation.prefill_seconds,
        "decode_seconds_per_token": generation.decode_seconds_per_token,
        "sweeps": generation.sweeps,
        "tokens_per_sweep": generation.tokens_per_sweep,
        "prompt_lookup": request.prompt_lookup,
        "prefill_chunk_tokens": request.prefill_chunk_tokens,
        "peak_resident_bytes": process_memory().peak_resident_bytes,
        "seed": request.seed,
        "temperature": request.temperature,
        "cache": cache_stats,
    }
