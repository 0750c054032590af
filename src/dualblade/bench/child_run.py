"""What the children of the benchmarks share: loading, the memory limit, a cache of the mode.

Order of a run: load the model, take its KV shapes, release what loading left over; *then* set the
memory limit and start the peak anew; open the cache, and do what is timed. So what is limited and
measured is generating, not the peak of loading.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from dualblade.bench.decode_rows import RandomRows, kv_bytes, probe_layers
from dualblade.bench.workload import MMAP
from dualblade.config import EngineConfig
from dualblade.errors import ConfigError
from dualblade.host.cgroup import MemoryLimit
from dualblade.host.machine import cpu_count, stolen_seconds
from dualblade.host.memory import process_memory
from dualblade.host.process import ProcessIO, process_io, release_memory, reset_peak_memory

_PASSTHROUGH = ("uring-cmd", "nvme-ioctl")
"""Engines whose direct transfers are NVMe commands."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildOptions:
    """What one child does: `task` is run, prefill, calibrate or warm (loads, so that files are
    cached). `step_tokens`: of each sequence in a forward pass of calibrate and prefill."""

    task: str
    model: str
    dtype: str
    batch: int
    context: int
    seed: int
    steps: int = 0
    warmup_steps: int = 0
    step_tokens: int = 1
    mode: str = "memory"
    attention: str = "auto"
    memory_budget: int | str = "auto"
    store: str | None = None
    engine: dict[str, Any] = field(default_factory=dict)
    cgroup_directory: str | None = None
    cgroup_version: int = 1
    limit_bytes: int | None = None
    trace: str | None = None

    @property
    def tokens_max(self) -> int:
        """Of each sequence, to the end of the run."""
        return self.context + self.warmup_steps + max(1, self.steps)

    def cgroup(self) -> MemoryLimit | None:
        """The memory cgroup that the parent put this process into."""
        if self.cgroup_directory is None:
            return None
        return MemoryLimit(Path(self.cgroup_directory), self.cgroup_version)


def calibrate(options: ChildOptions) -> dict[str, Any]:
    """What the process needs besides its KV cache, in bytes.

    After loading, plus the most that one forward pass of `step_tokens` adds at the full context
    and batch. The KV of one layer, which that pass uses in place of a cache, is not counted for a
    decode step; for a prefill it is: attention of many rows may copy what it is handed.
    """
    from dualblade.bench.decode_yardstick import shared_cache

    model, rows = load(options)
    if options.step_tokens > 1:
        warm_up(model, options)
    loaded = base_bytes(options.cgroup())
    before = process_memory().resident_bytes
    count = min(options.step_tokens, options.context)
    past = options.context if count == 1 else options.context - count
    cache = shared_cache(model, rows, past, count)
    prompt = torch.ones(options.batch, past + count, dtype=torch.long, device=model.device)
    release_memory()
    if count == 1:
        before = process_memory().resident_bytes
    reset_peak_memory()
    with positions_checked(), torch.inference_mode():
        for _ in range(2):
            if count == 1:
                model(input_ids=prompt[:, -1:], cache=cache, use_cache=True)
            else:  # with the masks that generate makes
                first_token(model, prompt, cache, count)
    step = max(0, process_memory().peak_resident_bytes - before)
    return {
        "loaded_bytes": loaded,
        "step_bytes": step,
        "kv_bytes": kv_bytes(rows.shapes, options.batch, options.context),
        "layers": [asdict(shape) for shape in rows.shapes],
    }


def load(options: ChildOptions) -> tuple[Any, RandomRows]:
    """The model after a warm-up with a tiny cache, and the rows to fill a cache with."""
    from dualblade.hf.boundary import use_long_rope
    from dualblade.hf.models import load_model

    dtype: torch.dtype = getattr(torch, options.dtype)
    model = load_model(options.model, dtype=dtype, seed=options.seed).model
    model.eval()
    use_long_rope(model)  # a text that passes the boundary would be computed anew, in memory
    shapes = probe_layers(model)
    return model, RandomRows(shapes, options.batch, dtype, options.seed)


def base_bytes(limit: MemoryLimit | None) -> int:
    """Memory needed now: of the cgroup if there is one, else what is resident."""
    release_memory()
    return limit.needed_bytes() if limit is not None else process_memory().resident_bytes


@dataclass(slots=True)
class Memory:
    """Of a run: what the process needed before its cache, and the most since then."""

    base_bytes: int
    since: str
    of: str
    peak_bytes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """As it stands in the result."""
        return {
            "base_memory_bytes": self.base_bytes,
            "peak_memory_bytes": self.peak_bytes,
            "peak_memory_of": self.of,
            "peak_memory_since": self.since,
        }


@dataclass(frozen=True, slots=True)
class Clock:
    """One moment: wall and CPU seconds of this process, and those stolen from the machine."""

    wall: float
    cpu: float
    stolen: float

    @staticmethod
    def now() -> Clock:
        return Clock(time.perf_counter(), time.process_time(), stolen_seconds())

    def stolen_fraction(self, since: Clock) -> float:
        """Of the machine's processors, what others had since then."""
        there = (self.wall - since.wall) * cpu_count()
        return (self.stolen - since.stolen) / there


@contextlib.contextmanager
def under_limit(options: ChildOptions) -> Iterator[Memory]:
    """The memory limit holds from here on, and the peak starts anew; it is known afterwards."""
    limit = options.cgroup()
    base = base_bytes(limit)
    if limit is not None and options.limit_bytes is not None:
        limit.set(options.limit_bytes)
    of_group = limit is not None and limit.reset_peak()
    memory = Memory(
        base_bytes=base,
        # A group's peak from the start would be that of loading (cgroup v2 before Linux 6.12).
        since="limit was set" if of_group or reset_peak_memory() else "start",
        of="cgroup" if of_group else "process",
    )
    yield memory
    if limit is not None and of_group:
        memory.peak_bytes = limit.peak_bytes()
    else:
        memory.peak_bytes = process_memory().peak_resident_bytes
    if limit is not None:
        limit.close()


def open_cache(options: ChildOptions, model: Any) -> Any:
    """An empty cache of the mode, but for TRANSFORMERS. Raises: DualBladeError."""
    return (_mmap_cache if options.mode == MMAP else _dualblade_cache)(options, model)


def _mmap_cache(options: ChildOptions, model: Any) -> Any:
    from dualblade.bench.mmap_kv import mmap_cache

    return mmap_cache(
        model,
        store=Path(options.store) if options.store is not None else None,
        attention=options.attention,
        max_tokens=options.tokens_max,
        settings=EngineConfig.from_mapping(options.engine),
    )


def _dualblade_cache(options: ChildOptions, model: Any) -> Any:
    from dualblade import DualBladeCache

    return DualBladeCache.for_model(
        model,
        store=options.store,
        memory_budget=options.memory_budget,
        path=options.mode,
        attention=options.attention,  # type: ignore[arg-type]  # for_model checks it
        max_tokens=options.tokens_max,
        config=EngineConfig.from_mapping(options.engine),
    )


@contextlib.contextmanager
def positions_checked() -> Iterator[None]:
    """Learned positions (GPT-2, OPT) end: looking one up beyond is an IndexError from torch."""
    try:
        yield
    except IndexError as exc:
        raise ConfigError(
            f"the model has no positions for this context: {exc}", hint="use a smaller --context"
        ) from exc


def warm_up(model: Any, options: ChildOptions) -> None:
    """A first chunk through transformers' own cache, as every prefill has before it: buffers that
    libraries keep are there afterwards."""
    from transformers import DynamicCache  # here: costs seconds to import

    count = min(options.step_tokens, options.context)
    prompt = torch.ones(options.batch, count, dtype=torch.long, device=model.device)
    with positions_checked(), torch.inference_mode():
        first_token(model, prompt, DynamicCache(config=model.config), count)


def first_token(model: Any, prompt: torch.Tensor, cache: Any, chunk: int) -> torch.Tensor:
    """Of `prompt` [batch, tokens] what the cache lacks, `chunk` tokens a forward pass, as generate
    does until the first token; that token of each sequence, [batch]."""
    output = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        cache=cache,
        max_new_tokens=1,
        prefill_chunk_size=min(chunk, prompt.shape[1]),
        do_sample=False,
    )
    return torch.as_tensor(output[:, -1].cpu())  # and so the device's work is done


def cache_stats(cache: Any) -> dict[str, Any]:
    """The cache's own counters; transformers' caches have none."""
    stats: dict[str, Any] = cache.stats().to_dict() if hasattr(cache, "stats") else {}
    return stats


def engine_name(stats: dict[str, Any]) -> str | None:
    engine = stats.get("engine")
    return engine.get("name") if isinstance(engine, dict) else engine


def device_io(stats: dict[str, Any]) -> ProcessIO:
    """What this process and its cache have made the devices read and write so far.

    NVMe commands go past the block layer, where the kernel counts; the cache counts those itself.
    """
    io = process_io()
    if engine_name(stats) not in _PASSTHROUGH:
        return io
    return ProcessIO(
        read_bytes=io.read_bytes + stats["io"]["direct_read_bytes"],
        write_bytes=io.write_bytes + stats["io"]["direct_write_bytes"],
    )


def budget_facts(used_bytes: Sequence[int], last: dict[str, Any]) -> dict[str, Any]:
    """Whether page cache of the store, staging, gather, tails and tables stayed within budget.

    `used_bytes`: what they were, each time that somebody looked; `last`: the cache's own account.
    None where nothing promises it: what the `page-cache` path keeps cached is the kernel's choice.
    """
    budget = last.get("memory", {}).get("budget_bytes")
    used = max(used_bytes, default=None)
    promised = used is not None and budget is not None and last["path"] != "page-cache"
    return {
        "budget_bytes": budget,
        "budget_used_bytes_max": used,
        "budget_held": used <= budget if promised else None,
    }
