"""Attention piece by piece against fp64: no further from it than torch's sdpa is.

`max |ours - fp64| <= 1.5 x max |sdpa - fp64|`, over random shapes; where sdpa is exact to the last
bits, 16 roundings of the result's type are allowed instead.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from dualblade.attention import (
    AttentionQuery,
    GroupedAttention,
    KernelAttention,
    Rows,
    Running,
    grouped,
    kernel,
)
from dualblade.errors import ConfigError

GROUP_TOKENS = 512


@st.composite
def problems(draw: st.DrawFn) -> dict[str, object]:
    """Shapes; stored tiles of `rows` tokens, then a tail, then the query's own tokens."""
    rows = draw(st.sampled_from([4, 16, 32, 64, 128]))
    return {
        "dtype": draw(st.sampled_from([torch.float32, torch.bfloat16])),
        "batch": draw(st.integers(1, 3)),
        "kv_heads": draw(st.integers(1, 3)),
        "group": draw(st.sampled_from([1, 2, 3, 4, 7])),
        "dims": draw(
            st.sampled_from([(64, 64), (80, 80), (96, 64), (128, 128), (192, 128), (256, 256)])
        ),
        "rows": rows,
        "stored": rows * draw(st.integers(0, 1536 // rows)),
        "tail": draw(st.integers(0, rows - 1)),
        "tokens": draw(st.sampled_from([1, 1, 2, 5, 16, 17, 64, 257])),
        "piece_tiles": draw(st.integers(1, 5)),
        "padding": draw(st.one_of(st.none(), st.lists(st.integers(0, 90), min_size=3, max_size=3))),
        "seed": draw(st.integers(0, 1000)),
    }


class Case:
    """Random keys, values and a query of a problem, and what the answer should be."""

    def __init__(self, problem: dict[str, object]) -> None:
        self.__dict__.update(problem)
        generator = torch.Generator().manual_seed(self.seed)
        past = self.stored + self.tail
        heads, (key_dim, value_dim) = self.kv_heads * self.group, self.dims

        def made(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(self.dtype)

        self.keys = made(self.batch, self.kv_heads, past + self.tokens, key_dim)
        self.values = made(self.batch, self.kv_heads, past + self.tokens, value_dim)
        starts = None
        if self.padding is not None:
            starts = torch.tensor(self.padding[: self.batch]).clamp(max=past)
        self.query = AttentionQuery(
            query=made(self.batch, heads, self.tokens, key_dim),
            past=past,
            scaling=key_dim**-0.5,
            first_visible=starts,
        )

    def reference(self, dtype: torch.dtype) -> torch.Tensor:
        """By sdpa in `dtype`: [batch, tokens, heads, value_dim]."""
        query, keys, values = (x.to(dtype) for x in (self.query.query, self.keys, self.values))
        keys, values = (x.repeat_interleave(self.group, 1) for x in (keys, values))
        seen = self.query.visible(0, keys.shape[2])
        out = scaled_dot_product_attention(query, keys, values, attn_mask=seen)
        return out.transpose(1, 2)

    def kernel(self) -> KernelAttention:
        return KernelAttention(self.query, self.kv_heads, self.dims[1])

    def grouped(self, *, widened: bool = False) -> GroupedAttention:
        is_one = self.keys.shape[2] <= GROUP_TOKENS and not widened
        group = (
            torch.empty(
                (self.batch, self.kv_heads, GROUP_TOKENS, dim),
                dtype=self.dtype if is_one else torch.float32,
            )
            for dim in self.dims
        )
        return GroupedAttention(self.query, *group)

    def run(self, running: Running, piece_tiles: int, *, both: bool = False) -> torch.Tensor:
        at = 0
        while at < self.keys.shape[2]:
            edge = (at // GROUP_TOKENS + 1) * GROUP_TOKENS
            if at < self.stored:
                last = min(at + piece_tiles * self.rows, self.stored, edge)
            else:
                last = min(self.keys.shape[2], edge)
            tile = self.rows if at < self.stored else last - at
            keys, values = (
                Rows(
                    some.unflatten(2, (-1, tile)).permute(2, 0, 1, 3, 4).contiguous(), at, last - at
                )
                for some in (self.keys[:, :, at:last], self.values[:, :, at:last])
            )
            if both:
                running.both(keys, values)
            else:
                running.keys(keys)
                running.values(values)
            at = last
        return running.finish()


def assert_close(case: Case, out: torch.Tensor) -> None:
    true = case.reference(torch.float64)
    theirs = (case.reference(case.dtype) - true).abs().max()
    rounding = torch.finfo(case.dtype).eps * true.abs().max()
    assert (out - true).abs().max() <= max(
        1.5 * theirs, 16 * rounding if case.dtype == torch.float32 else 0
    )


@given(problems())
@settings(max_examples=120, deadline=None)
def test_the_kernel_is_as_close_as_sdpa(problem: dict[str, object]) -> None:
    case = Case(problem)
    out = case.run(case.kernel(), case.piece_tiles)
    assert_close(case, out)
    # Not one bit depends on the cuts, nor on how many threads there are.
    assert torch.equal(case.run(case.kernel(), 100), out)
    assert torch.equal(case.run(case.kernel(), case.piece_tiles, both=True), out)


@given(problems())
@settings(max_examples=60, deadline=None)
def test_groups_are_as_close_as_sdpa(problem: dict[str, object]) -> None:
    case = Case(problem)
    out = case.run(case.grouped(), case.piece_tiles)
    assert_close(case, out)
    assert torch.equal(case.run(case.grouped(), 100, both=True), out)
    assert_close(case, case.run(case.grouped(widened=True), case.piece_tiles))


@contextlib.contextmanager
def a_kernel(name: str) -> Iterator[None]:
    """Attention is by the kernel of this name; skips where the machine has none."""
    with mock.patch.dict(os.environ, {"DUALBLADE_KERNEL": name}):
        vars(kernel._of_thread).clear()
        try:
            try:
                kernel._native()
            except ConfigError:
                assert name != "plain"
                pytest.skip(f"this machine has no {name}")
            yield
        finally:
            vars(kernel._of_thread).clear()


@pytest.mark.parametrize("name", ["amx", "avx512", "avx2", "plain"])
@given(problem=problems())
@settings(max_examples=20, deadline=None)
def test_every_instruction_set_is_as_close(name: str, problem: dict[str, object]) -> None:
    with a_kernel(name):
        case = Case(problem)
        assert_close(case, case.run(case.kernel(), case.piece_tiles))


@pytest.mark.parametrize("threads", [2, 3])
def test_bits_do_not_depend_on_threads(threads: int) -> None:
    problem = {
        "dtype": torch.bfloat16, "batch": 1, "kv_heads": 3, "group": 3, "dims": (64, 64),
        "rows": 64, "stored": 1280, "tail": 20, "tokens": 2, "piece_tiles": 4,
        "padding": None, "seed": 1,
    }  # fmt: skip
    case = Case(problem)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = case.run(case.kernel(), 4)
        torch.set_num_threads(threads)
        assert torch.equal(case.run(case.kernel(), 4), first)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["amx", "avx512", "avx2", "plain"])
@pytest.mark.parametrize("bits", [-1, 0x7FC00000, 0x7F800001, -0x400000])
def test_what_is_no_number_is_never_made_one(name: str, bits: int) -> None:
    """As erased flash reads: all ones. A sum over it must not look like one that can be used."""
    keys = torch.randn(1, 1, 1, 40, 64, generator=torch.Generator().manual_seed(2))
    keys.view(torch.int32)[0, 0, 0, 7] = bits
    query = torch.randn(1, 2, 1, 64, generator=torch.Generator().manual_seed(1))
    with a_kernel(name):
        running = KernelAttention(AttentionQuery(query=query, past=39, scaling=0.125), 1, 64)
        running.keys(Rows(keys, 0, 40))
        running.values(Rows(torch.ones_like(keys), 0, 40))
        assert bool(running.finish().isnan().all())


@pytest.mark.parametrize("way", ["kernel", "grouped"])
def test_sinks_take_part_in_the_softmax(way: str) -> None:
    query = torch.randn(1, 2, 1, 64, generator=torch.Generator().manual_seed(1))
    rows = torch.randn(2, 1, 1, 40, 64, generator=torch.Generator().manual_seed(2))
    sinks = torch.tensor([1.5, -2.0])
    asked = AttentionQuery(query=query, past=39, scaling=0.125, sinks=sinks)
    group = (torch.empty(1, 1, 64, 64), torch.empty(1, 1, 64, 64))
    running = KernelAttention(asked, 1, 64) if way == "kernel" else GroupedAttention(asked, *group)
    running.keys(Rows(rows[0][None], 0, 40))
    running.values(Rows(rows[1][None], 0, 40))
    scores = query[0] @ rows[0, 0, 0].T * 0.125
    weights = torch.softmax(torch.cat([scores, sinks[:, None, None]], dim=2), dim=2)[..., :-1]
    torch.testing.assert_close(running.finish()[0, 0], (weights @ rows[1, 0, 0])[:, 0])


def test_masks_biases_and_caps_are_heeded() -> None:
    generator = torch.Generator().manual_seed(5)
    query = torch.randn(2, 4, 3, 64, generator=generator)
    keys, values = torch.randn(2, 2, 2, 90, 64, generator=generator)
    mask = torch.rand(2, 1, 3, 90, generator=generator) > 0.3
    bias = torch.randn(1, 4, 3, 90, generator=generator)
    asked = AttentionQuery(query=query, past=87, scaling=0.2, mask=mask, bias=bias, softcap=3.0)
    assert not KernelAttention.serves(asked, 2)
    running = GroupedAttention(asked, torch.empty(2, 2, 64, 64), torch.empty(2, 2, 64, 64))
    for low, high in ((0, 64), (64, 90)):
        running.keys(Rows(keys[None, :, :, low:high], low, high - low))
        running.values(Rows(values[None, :, :, low:high], low, high - low))
    keys, values = (x.repeat_interleave(2, 1) for x in (keys, values))
    scores = torch.tanh(query @ keys.transpose(2, 3) * 0.2 / 3.0) * 3.0 + bias
    want = torch.softmax(scores.masked_fill(~mask, -torch.inf), dim=-1) @ values
    torch.testing.assert_close(running.finish(), want.transpose(1, 2))


@pytest.mark.parametrize(
    ("past", "tokens", "calls"),
    [
        # Groups of 64 tokens. What is before the query, and its own rows: (query rows, keys).
        (0, 60, [(60, 60)]),
        (50, 10, [(20, 50), (10, 10)]),
        (100, 60, [(120, 64), (120, 36), (60, 28), (32, 32)]),
    ],
    ids=["first", "one group", "three groups"],
)
def test_what_no_row_sees_is_not_multiplied(
    past: int, tokens: int, calls: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two heads share a KV head: rows that see all keys are folded, a causal call is of one head's
    rows and of keys that begin with them."""
    seen: list[tuple[int, int]] = []
    real = grouped._flash

    def counted(rows: torch.Tensor, keys: torch.Tensor, *rest: object, **more: object) -> object:
        seen.append((rows.shape[2], keys.shape[2]))
        return real(rows, keys, *rest, **more)

    monkeypatch.setattr(grouped, "_flash", counted)
    monkeypatch.setattr(AttentionQuery, "visible", lambda *_: pytest.fail("a mask was made"))
    query = torch.randn(1, 2, tokens, 64)
    running = GroupedAttention(
        AttentionQuery(query=query, past=past, scaling=0.1),
        torch.empty(1, 1, 64, 64),
        torch.empty(1, 1, 64, 64),
    )
    for first in range(0, past + tokens, 64):
        count = min(64, past + tokens - first)
        some = torch.randn(1, 1, 1, count, 64)
        running.both(Rows(some, first, count), Rows(some, first, count))
    running.finish()
    assert sorted(seen) == sorted(calls)


def test_two_threads_attend_at_a_time() -> None:
    problem = {
        "dtype": torch.float32, "batch": 2, "kv_heads": 2, "group": 2, "dims": (64, 64),
        "rows": 64, "stored": 1280, "tail": 20, "tokens": 2, "piece_tiles": 1,
        "padding": None,
    }  # fmt: skip
    cases = [Case({**problem, "seed": seed}) for seed in range(2)]
    alone = [case.run(case.kernel(), 1) for case in cases]
    before = torch.get_num_threads()
    torch.set_num_threads(3)  # each caller's pool has helpers
    try:
        with ThreadPoolExecutor(2) as threads:
            for _ in range(30):
                together = threads.map(lambda case: case.run(case.kernel(), 1), cases)
                for out, expected in zip(together, alone, strict=True):
                    assert torch.equal(out, expected)
    finally:
        torch.set_num_threads(before)
