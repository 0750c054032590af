"""The timed prefill of bench prefill, in a child: from an empty cache to the first token."""

from __future__ import annotations

import contextlib
import hashlib
from typing import Any

import torch

from dualblade.bench.child_run import (
    ChildOptions,
    Clock,
    budget_facts,
    cache_stats,
    device_io,
    engine_name,
    first_token,
    load,
    open_cache,
    positions_checked,
    under_limit,
    warm_up,
)
from dualblade.bench.decode_rows import kv_bytes
from dualblade.bench.workload import TRANSFORMERS


def prefill(options: ChildOptions) -> dict[str, Any]:
    """Load, warm up with a short prompt, limit, prefill. Raises: DualBladeError.

    The prompt is seeded random tokens, [batch, context].
    """
    model, rows = load(options)
    vocab = model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(options.seed)
    prompt = torch.randint(vocab, (options.batch, options.context), generator=generator)
    prompt = prompt.to(model.device)
    warm_up(model, options)
    with under_limit(options) as memory, contextlib.ExitStack() as stack:
        stack.enter_context(positions_checked())
        stack.enter_context(torch.inference_mode())
        if options.mode in TRANSFORMERS:
            # here: costs seconds to import
            from dualblade.bench.decode_yardstick import transformers_cache

            cache: Any = transformers_cache(model, options.mode)
        else:
            cache = stack.enter_context(open_cache(options, model))
        io_before = device_io(cache_stats(cache))
        before = Clock.now()
        first = first_token(model, prompt, cache, options.step_tokens)
        after = Clock.now()
        stats = cache_stats(cache)
        io = device_io(stats)
    return {
        "attention": stats.get("attention", "exact"),
        "engine": engine_name(stats),
        "kv_bytes": kv_bytes(rows.shapes, options.batch, options.context),
        **memory.to_dict(),
        "prefill_seconds": after.wall - before.wall,
        "cpu_seconds": after.cpu - before.cpu,
        "stolen_fraction": after.stolen_fraction(before),
        **_stalls(stats, after.wall - before.wall),
        "device_read_bytes": io.read_bytes - io_before.read_bytes,
        "device_written_bytes": io.write_bytes - io_before.write_bytes,
        "store_written_bytes": stats.get("io", {}).get("written_bytes"),
        "tokens_sha256": hashlib.sha256(first.numpy().astype("<i8").tobytes()).hexdigest(),
        "threads": torch.get_num_threads(),
        "device": str(model.device),
        "cache": stats or None,
        **budget_facts([stats["memory"]["used_bytes"]] if stats else [], stats),
    }


def _stalls(stats: dict[str, Any], wall_seconds: float) -> dict[str, Any]:
    """What the model's thread waited for storage, by the cache's own account.

    Of mapped files the copies into them, in which the kernel may wait too, are no part of it: they
    are in `seconds.append`. None for transformers' cache, which tells nothing.
    """
    if not stats:
        return {"stall_seconds": None, "stall_fraction": None, "seconds": None}
    seconds = stats["seconds"]
    stalled = seconds["read_wait"] + seconds["write_wait"]
    stalled += stats["stages"]["stalled_on_copies_seconds"]
    return {
        "stall_seconds": stalled,
        "stall_fraction": stalled / wall_seconds,
        "seconds": seconds,
    }
