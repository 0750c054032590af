"""What the attention kernel is given is checked before it is read, and each caller has his own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dualblade.attention import AttentionQuery, KernelAttention, Rows, kernel
from dualblade.errors import ConfigError

TOKENS, DIM = 40, 64


def asked(batch: int = 2, heads: int = 4, tokens: int = 1, **changed: Any) -> AttentionQuery:
    query = changed.pop("query", torch.randn(batch, heads, tokens, DIM))
    return AttentionQuery(query=query, past=TOKENS - tokens, scaling=0.125, **changed)


def rows(
    *shape: int, tokens: int = TOKENS, dtype: torch.dtype = torch.float32, table: Any = None
) -> Rows:
    return Rows(torch.randn(shape or (1, 2, 2, TOKENS, DIM)).to(dtype), 0, tokens, table=table)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"first_visible": torch.zeros(1, dtype=torch.int64)}, r"2 sequences are \[1\]"),
        ({"first_visible": torch.zeros(3, dtype=torch.int64)}, r"2 sequences are \[3\]"),
        ({"first_visible": torch.zeros(2, dtype=torch.int32)}, r"\[2\] torch.int32"),
        ({"first_visible": torch.zeros(4, dtype=torch.int64)[::2]}, "2 sequences"),
        ({"heads": 3}, "3 query heads do not share 2 KV heads"),
        ({"sinks": torch.zeros(2)}, r"sinks of 4 heads are \[2\]"),
        ({"query": torch.randn(2, 4, 1, DIM).half()}, "the kernel has no torch.float16"),
    ],
)
def test_a_query_that_does_not_fit_is_refused(wrong: dict[str, Any], words: str) -> None:
    """Without a look: what lies behind a short tensor is taken for it, or nothing is written."""
    with pytest.raises(ConfigError, match=words):
        KernelAttention(asked(**wrong), 2, DIM)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: rows(1, 2, 2, TOKENS, DIM // 2),
        lambda: rows(1, 2, 1, TOKENS, DIM),
        lambda: rows(dtype=torch.bfloat16),
        lambda: rows(tokens=TOKENS + 1),
        lambda: Rows(torch.randn(1, 2, 2, DIM, TOKENS).transpose(3, 4), 0, TOKENS),
        lambda: rows(table=np.zeros((1, 1), dtype=np.int32)),
        lambda: rows(table=np.zeros((1, 2), dtype=np.int64)),
        lambda: rows(2, 2, 2, TOKENS // 2, DIM, table=np.zeros((1, 2), dtype=np.int32)),
    ],
    ids=["dim", "heads", "dtype", "tokens", "strides", "batch", "table's dtype", "tiles"],
)
def test_tiles_that_do_not_fit_are_refused(wrong: Callable[[], Rows]) -> None:
    running = KernelAttention(asked(), 2, DIM)
    with pytest.raises(ConfigError):
        running.keys(wrong())
    with pytest.raises(ConfigError):
        running.both(rows(), wrong())
    running.both(rows(), rows())  # nothing was begun with them
    assert running.finish().shape == (2, 1, 4, DIM)


def test_values_belong_to_the_last_keys() -> None:
    """The kernel has weights for as many tokens as it had keys."""
    running = KernelAttention(asked(), 2, DIM)
    running.keys(rows(1, 2, 2, 16, DIM, tokens=16))
    with pytest.raises(ConfigError, match="other tokens"):
        running.values(rows())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_query_without_tokens_has_no_answer(dtype: torch.dtype) -> None:
    none = KernelAttention(asked(tokens=0, query=torch.randn(2, 4, 0, DIM).to(dtype)), 2, DIM)
    none.both(rows(dtype=dtype), rows(dtype=dtype))
    assert none.finish().shape == (2, 0, 4, DIM)


def helpers() -> int:
    names = (task.read_text() for task in Path("/proc/self/task").glob("*/comm"))
    return sum(name.startswith("db-attend") for name in names)


def test_a_thread_that_calls_has_one_kernel_as_long_as_it_lives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Six that generate side by side, layer after layer: six are made in all, and none is left."""
    made, real = [], kernel._attention.Attention
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # set, it would stay in the threads

    def counted(threads: int, name: str) -> Any:
        made.append(threads)
        return real(threads, name)

    monkeypatch.setattr(kernel._attention, "Attention", counted)
    before, together = helpers(), threading.Barrier(6)

    def generate(_: int) -> None:
        for _layer in range(4):
            together.wait()
            KernelAttention(asked(), 2, DIM)

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(generate, range(6)))
    assert made == [2] * 6
    assert helpers() == before


def test_another_number_of_threads_has_another_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_of_thread", threading.local())
    first = kernel._native()
    assert kernel._native() is first
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setenv("DUALBLADE_KERNEL", "sse")
    for _ in range(2):  # what could not be made is not taken for what was there
        with pytest.raises(ConfigError):
            kernel._native()
    monkeypatch.delenv("DUALBLADE_KERNEL")
    assert kernel._native() is not first
