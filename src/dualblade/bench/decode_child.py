"""The timed steps of bench decode, in a child: open a cache, fill it with random rows, warm up,
time the steps."""

from __future__ import annotations

import contextlib
import hashlib
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from dualblade.bench.child_run import (
    ChildOptions,
    Clock,
    budget_facts,
    cache_stats,
    device_io,
    engine_name,
    load,
    open_cache,
    positions_checked,
    under_limit,
)
from dualblade.bench.decode_rows import RandomRows, fill, kv_bytes
from dualblade.bench.workload import TRANSFORMERS


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
        output = self._model(input_ids=self._next, cache=self._cache, use_cache=True)
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
    model, rows = load(options)
    with under_limit(options) as memory:
        started = time.perf_counter()
        with _filled_cache(options, model, rows) as (cache, decoder):
            fill_seconds = time.perf_counter() - started
            for _ in range(options.warmup_steps):
                decoder.timed()
            first, began = cache_stats(cache), Clock.now()
            steps = _timed_steps(options.steps, decoder, cache)
            last, stolen = cache_stats(cache), Clock.now().stolen_fraction(began)
            tokens_sha256 = decoder.sha256()
            if options.trace is not None and hasattr(cache, "write_trace"):
                cache.write_trace(options.trace)
    return {
        "attention": last.get("attention", "exact"),
        "engine": engine_name(last),
        "kv_bytes": kv_bytes(rows.shapes, options.batch, options.context),
        **memory.to_dict(),
        "fill_seconds": fill_seconds,
        "tokens_sha256": tokens_sha256,
        "stolen_fraction": stolen,
        "threads": torch.get_num_threads(),
        "device": str(model.device),
        "cache": last or None,
        **_summary(steps, first, last),
        **budget_facts(steps.budget_used_bytes, last),
    }


@contextlib.contextmanager
def _filled_cache(
    options: ChildOptions, model: Any, rows: RandomRows
) -> Iterator[tuple[Any, Decoder]]:
    """A cache of the mode, holding `context` random tokens; closed afterwards."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        stack.enter_context(positions_checked())
        if options.mode in TRANSFORMERS:
            from dualblade.bench.decode_yardstick import filled, transformers_cache

            empty = transformers_cache(model, options.mode)
            cache: Any = filled(empty, model, rows, options.context)
        else:
            cache = stack.enter_context(open_cache(options, model))
            fill(rows, options.context, cache, model.device)
        yield cache, Decoder(model, cache, options.batch)


def _timed_steps(count: int, decoder: Decoder, cache: Any) -> Steps:
    """Decode `count` tokens. Only the step itself is timed; all counters are read outside."""
    steps = Steps()
    old = cache_stats(cache)
    old_io = device_io(old).read_bytes
    for _ in range(count):
        wall, cpu = decoder.timed()
        new = cache_stats(cache)
        io = device_io(new).read_bytes
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


def _io_delta(name: str, old: dict[str, Any], new: dict[str, Any]) -> int:
    return int(new.get("io", {}).get(name, 0)) - int(old.get("io", {}).get(name, 0))
