"""One run of bench decode, in a process of its own: options as JSON on stdin, result on stdout.

    python -m dualblade.bench.decode_child < options.json

Order of a run: load the model, take its KV shapes, release what loading left over; *then* set the
memory limit and start the peak anew; open the cache, fill it, warm up, time the steps. So what is
limited and measured is generating, not the peak of loading.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from dualblade.bench.decode_rows import RandomRows, fill, kv_bytes, probe_layers
from dualblade.bench.decode_run import MMAP, YARDSTICK
from dualblade.config import EngineConfig
from dualblade.errors import BudgetError, ConfigError, DualBladeError
from dualblade.host.cgroup import MemoryLimit
from dualblade.host.memory import process_memory
from dualblade.host.process import (
    die_with_parent,
    process_io,
    release_memory,
    reset_peak_memory,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildOptions:
    """What one child does: `task` is run, calibrate or warm (loads, so that files are cached)."""

    task: str
    model: str
    dtype: str
    batch: int
    context: int
    steps: int
    warmup_steps: int
    seed: int
    mode: str = "memory"
    attention: str = "auto"
    memory_budget: int | str = "auto"
    store: str | None = None
    engine: dict[str, Any] = field(default_factory=dict)
    cgroup_directory: str | None = None
    cgroup_version: int = 1
    limit_bytes: int | None = None
    trace: str | None = None

    def cgroup(self) -> MemoryLimit | None:
        """The memory cgroup that the parent put this process into."""
        if self.cgroup_directory is None:
            return None
        return MemoryLimit(Path(self.cgroup_directory), self.cgroup_version)


@dataclass(slots=True)
class Steps:
    """What the timed steps measured, one entry each. Bytes are of that step alone."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    device_read_bytes: list[int] = field(default_factory=list)
    direct_read_bytes: list[int] = field(default_factory=list)
    page_cache_read_bytes: list[int] = field(default_factory=list)
    budget_used_bytes: list[int] = field(default_factory=list)


class Decoder:
    """The model, its cache and the token that comes next."""

    def __init__(self, model: Any, cache: Any, batch: int) -> None:
        self._model = model
        self._cache = cache
        self._next = torch.ones(batch, 1, dtype=torch.long, device=model.device)
        self.tokens: list[torch.Tensor] = []

    def step(self) -> None:
        """One greedy token for each sequence."""
        output = self._model(input_ids=self._next, past_key_values=self._cache, use_cache=True)
        self._next = output.logits[:, -1:].argmax(dim=-1)
        if self._next.is_cuda:  # else the clock stops before the work is done
            torch.cuda.synchronize()

    def timed(self) -> tuple[float, float]:
        """(wall, CPU) seconds of a step; the token is kept outside the timed part."""
        cpu, wall = time.process_time(), time.perf_counter()
        self.step()
        seconds = time.perf_counter() - wall, time.process_time() - cpu
        self.tokens.append(self._next.flatten().cpu())
        return seconds

    def sha256(self) -> str:
        """Over all tokens so far, little-endian int64, step by step."""
        digest = hashlib.sha256()
        for token in self.tokens:
            digest.update(token.to(torch.int64).numpy().astype("<i8").tobytes())
        return digest.hexdigest()


def run(options: ChildOptions) -> dict[str, Any]:
    """Load, limit, fill, decode. Raises: DualBladeError."""
    model, rows = _load(options)
    limit = options.cgroup()
    base = _base_bytes(limit)
    if limit is not None and options.limit_bytes is not None:
        limit.set(options.limit_bytes)
    peak_is_new = limit.reset_peak() if limit is not None else reset_peak_memory()
    started = time.perf_counter()
    with _filled_cache(options, model, rows) as (cache, decoder):
        fill_seconds = time.perf_counter() - started
        for _ in range(options.warmup_steps):
            decoder.timed()
        first = _stats(cache)
        steps = _timed_steps(options.steps, decoder, cache)
        last = _stats(cache)
        tokens_sha256 = decoder.sha256()
        if options.trace is not None and hasattr(cache, "write_trace"):
            cache.write_trace(options.trace)
    peak = limit.peak_bytes() if limit is not None else process_memory().peak_resident_bytes
    if limit is not None:
        limit.close()
    return {
        "attention": last.get("attention", "exact"),
        "engine": _engine_name(last),
        "kv_bytes": kv_bytes(rows.shapes, options.batch, options.context),
        "base_memory_bytes": base,
        "peak_memory_bytes": peak,
        "peak_memory_of": "cgroup" if limit is not None else "process",
        "peak_memory_since": "limit was set" if peak_is_new else "start",
        "fill_seconds": fill_seconds,
        "tokens_sha256": tokens_sha256,
        "threads": torch.get_num_threads(),
        "device": str(model.device),
        "cache": last or None,
        **_summary(steps, first, last),
        **_budget(steps, last),
    }


def calibrate(options: ChildOptions) -> dict[str, Any]:
    """What the process needs besides its KV cache, in bytes.

    After loading, plus the most that one decode step adds at the full context and batch; the KV
    of one layer, which that step uses in place of a cache, is not counted.
    """
    from dualblade.bench.decode_yardstick import shared_cache

    model, rows = _load(options)
    loaded = _base_bytes(options.cgroup())
    cache = shared_cache(model, rows, options.context)
    decoder = Decoder(model, cache, options.batch)
    release_memory()
    before = process_memory().resident_bytes
    reset_peak_memory()
    with _positions_checked(), torch.inference_mode():
        decoder.timed()
        decoder.timed()
    step = max(0, process_memory().peak_resident_bytes - before)
    return {
        "loaded_bytes": loaded,
        "step_bytes": step,
        "kv_bytes": kv_bytes(rows.shapes, options.batch, options.context),
        "layers": [asdict(shape) for shape in rows.shapes],
    }


def _load(options: ChildOptions) -> tuple[Any, RandomRows]:
    """The model after a warm-up with a tiny cache, and the rows to fill a cache with."""
    from dualblade.hf.models import load_model

    dtype = getattr(torch, options.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"unknown dtype {options.dtype!r}", hint="use bfloat16 or float32")
    model = load_model(options.model, dtype=dtype, seed=options.seed).model
    model.eval()
    shapes = probe_layers(model)
    return model, RandomRows(shapes, options.batch, dtype, options.seed)


def _base_bytes(limit: MemoryLimit | None) -> int:
    """Memory needed now: of the cgroup if there is one, else what is resident."""
    release_memory()
    return limit.needed_bytes() if limit is not None else process_memory().resident_bytes


@contextlib.contextmanager
def _filled_cache(
    options: ChildOptions, model: Any, rows: RandomRows
) -> Iterator[tuple[Any, Decoder]]:
    """A cache of the mode, holding `context` random tokens; closed afterwards."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        stack.enter_context(_positions_checked())
        if options.mode == YARDSTICK:
            from dualblade.bench.decode_yardstick import filled_dynamic_cache

            cache: Any = filled_dynamic_cache(model, rows, options.context)
        else:
            made = _mmap_cache if options.mode == MMAP else _dualblade_cache
            cache = stack.enter_context(made(options, model))
            fill(rows, options.context, cache, model.device)
        yield cache, Decoder(model, cache, options.batch)


def _mmap_cache(options: ChildOptions, model: Any) -> Any:
    from dualblade.bench.mmap_kv import mmap_cache

    return mmap_cache(
        model,
        store=Path(options.store) if options.store is not None else None,
        attention=options.attention,
        max_tokens=_tokens_max(options),
        settings=EngineConfig.from_mapping(options.engine),
    )


def _tokens_max(options: ChildOptions) -> int:
    return options.context + options.warmup_steps + options.steps


def _dualblade_cache(options: ChildOptions, model: Any) -> Any:
    from dualblade import DualBladeCache

    return DualBladeCache.for_model(
        model,
        store=options.store,
        memory_budget=options.memory_budget,
        path=options.mode,
        attention=options.attention,  # type: ignore[arg-type]  # for_model checks it
        max_tokens=_tokens_max(options),
        config=EngineConfig.from_mapping(options.engine),
    )


@contextlib.contextmanager
def _positions_checked() -> Iterator[None]:
    """Learned positions (GPT-2, OPT) end: looking one up beyond is an IndexError from torch."""
    try:
        yield
    except IndexError as exc:
        raise ConfigError(
            f"the model has no positions for this context: {exc}", hint="use a smaller --context"
        ) from exc


def _timed_steps(count: int, decoder: Decoder, cache: Any) -> Steps:
    """Decode `count` tokens. Only the step itself is timed; all counters are read outside."""
    steps = Steps()
    old_io, old = process_io().read_bytes, _stats(cache)
    for _ in range(count):
        wall, cpu = decoder.timed()
        io, new = process_io().read_bytes, _stats(cache)
        steps.seconds.append(wall)
        steps.cpu_seconds.append(cpu)
        steps.device_read_bytes.append(io - old_io)
        steps.direct_read_bytes.append(_io_delta("direct_read_bytes", old, new))
        steps.page_cache_read_bytes.append(_io_delta("page_cache_read_bytes", old, new))
        if new:
            steps.budget_used_bytes.append(new["memory"]["used_bytes"])
        old_io, old = io, new
    return steps


def _summary(steps: Steps, first: dict[str, Any], last: dict[str, Any]) -> dict[str, Any]:
    """Figures of the timed steps, as they stand in the result."""
    return {
        "step_seconds_median": statistics.median(steps.seconds),
        "step_seconds_p99": _p99(steps.seconds),
        "step_seconds": steps.seconds,
        "cpu_seconds_per_step": statistics.median(steps.cpu_seconds),
        "device_read_bytes_per_step": int(statistics.median(steps.device_read_bytes)),
        "device_read_bytes": steps.device_read_bytes,
        "direct_read_bytes_per_step": int(statistics.median(steps.direct_read_bytes)),
        "page_cache_read_bytes_per_step": int(statistics.median(steps.page_cache_read_bytes)),
        "page_cache_hit_fraction": _hit_fraction(steps),
        "seconds_per_step": _seconds_per_step(first, last, len(steps.seconds)),
    }


def _budget(steps: Steps, last: dict[str, Any]) -> dict[str, Any]:
    """Whether page cache of the store, staging, gather, tails and tables stayed within budget.

    None where nothing promises it: what the `page-cache` path keeps cached is the kernel's choice.
    """
    budget = last.get("memory", {}).get("budget_bytes")
    used = max(steps.budget_used_bytes, default=None)
    promised = used is not None and budget is not None and last["path"] != "page-cache"
    return {
        "budget_bytes": budget,
        "budget_used_bytes_max": used,
        "budget_held": used <= budget if promised else None,
    }


def _hit_fraction(steps: Steps) -> float | None:
    """Of what was read through the page cache, the part that no device was asked for.

    None where nothing was read that way.
    """
    asked = sum(steps.page_cache_read_bytes)
    if asked == 0:
        return None
    missed = sum(steps.device_read_bytes) - sum(steps.direct_read_bytes)
    return min(1.0, max(0.0, 1 - missed / asked))


def _p99(values: list[float]) -> float:
    """The value that 99 % of all do not exceed: of fewer than a hundred, the largest."""
    ordered = sorted(values)
    return ordered[-(len(ordered) // 100) - 1]


def _seconds_per_step(
    first: dict[str, Any], last: dict[str, Any], count: int
) -> dict[str, float] | None:
    """Where the cache says the time of the timed steps went."""
    if not last.get("seconds"):
        return None
    old = first.get("seconds", {})
    return {
        name: (value - old.get(name, 0.0)) / count
        for name, value in last["seconds"].items()
        if isinstance(value, int | float)
    }


def _stats(cache: Any) -> dict[str, Any]:
    """The cache's own counters; transformers' caches have none."""
    stats: dict[str, Any] = cache.stats().to_dict() if hasattr(cache, "stats") else {}
    return stats


def _io_delta(name: str, old: dict[str, Any], new: dict[str, Any]) -> int:
    return int(new.get("io", {}).get(name, 0)) - int(old.get("io", {}).get(name, 0))


def _engine_name(stats: dict[str, Any]) -> str | None:
    engine = stats.get("engine")
    return engine.get("name") if isinstance(engine, dict) else engine


def _failure(exc: DualBladeError) -> dict[str, Any]:
    failure = {"error": str(exc).replace("\n", ": "), "error_kind": type(exc).__name__}
    if isinstance(exc, BudgetError):
        return {**failure, "needed_bytes": exc.needed_bytes}
    return failure


def main() -> int:
    """Exit status 0: a result on stdout; 1: an error there; 130: interrupted."""
    die_with_parent()
    options = ChildOptions(**json.loads(sys.stdin.read()))
    out, sys.stdout = sys.stdout, sys.stderr  # whatever libraries print is not the result
    status = 0
    try:
        if options.task == "run":
            result = run(options)
        elif options.task == "calibrate":
            result = calibrate(options)
        else:
            _load(options)
            result = {}
    except DualBladeError as exc:
        result, status = _failure(exc), 1
    except KeyboardInterrupt:
        return 130
    out.write(json.dumps(result) + "\n")
    out.flush()
    return status


if __name__ == "__main__":
    sys.exit(main())
