"""`dualblade bench attention`: GiB of KV attended to per second, each way into attention.

Workload: one layer's keys and values of seeded random numbers, one decode step at a time (or
`query_tokens` rows). Three ways in turn, `repeats` times: `tiles`, what `attention="tiles"` does to
tiles in memory; `exact`, what the other way costs: tiles gathered into one buffer, then sdpa as
transformers calls it; `sdpa_contiguous`, the same on keys and values that were contiguous from the
start. Beside them the memory's read bandwidth, from summing a large array: what no way can pass for
long. All in huge pages, as in use; two layers take turns, so that caches help as little as in a
decode step.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from dualblade.attention import (
    AttentionQuery,
    GroupedAttention,
    KernelAttention,
    Rows,
    Running,
    group_tokens,
    kernel_name,
)
from dualblade.config import check_word
from dualblade.errors import ConfigError
from dualblade.geometry import TILE_ROWS_DEFAULT
from dualblade.host.machine import command_line, machine_facts
from dualblade.io import Arena
from dualblade.pipeline.copies import HostCopies
from dualblade.units import GIB, HUGE_PAGE_BYTES, MIB, round_up

Progress = Callable[[str], None]

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_PIECE_BYTES = 4 * MIB  # a staging slot
_BANDWIDTH_BYTES = 512 * MIB
_SAMPLE_SECONDS = 0.2  # calls are repeated until a sample is this long


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
    """Of one layer; `dim` is that of keys and of values."""

    batch: int
    query_heads: int
    kv_heads: int
    tokens: int
    dim: int

    @property
    def words(self) -> str:
        """As `parse` takes it."""
        return ",".join(str(value) for value in asdict(self).values())

    @classmethod
    def parse(cls, text: str) -> AttentionShape:
        """From `batch,query_heads,kv_heads,tokens,dim`. Raises: ConfigError."""
        try:
            batch, query_heads, kv_heads, tokens, dim = (int(part) for part in text.split(","))
        except ValueError:
            raise ConfigError(
                f"{text!r} is no shape", hint="give batch,query heads,KV heads,tokens,dim"
            ) from None
        if min(batch, query_heads, kv_heads, tokens, dim) < 1 or query_heads % kv_heads:
            raise ConfigError(f"{text!r}: numbers from 1, query heads a multiple of KV heads")
        return cls(batch=batch, query_heads=query_heads, kv_heads=kv_heads, tokens=tokens, dim=dim)


SHAPES = tuple(
    AttentionShape.parse(text)
    for text in ("24,12,12,1024,64", "8,32,8,4096,128", "1,32,8,32768,128", "1,9,3,8192,64")
)
"""OPT's and Llama's heads in a batch, one long context, and SmolLM2's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionBenchOptions:
    """`query_tokens`: rows of one head; more than one is verification of candidates."""

    shapes: Sequence[AttentionShape] = SHAPES
    dtypes: Sequence[str] = ("bfloat16", "float32")
    query_tokens: int = 1
    repeats: int = 7
    seed: int = 0

    def __post_init__(self) -> None:
        for dtype in self.dtypes:
            check_word("dtype", dtype, DTYPES)
        if self.query_tokens < 1 or self.repeats < 1:
            raise ConfigError("query_tokens and repeats must be at least 1")


def run_attention_bench(options: AttentionBenchOptions, tell: Progress) -> dict[str, Any]:
    """All shapes in all dtypes; the result as plain JSON types."""
    runs = []
    with torch.inference_mode():
        for shape in options.shapes:
            for dtype in options.dtypes:
                tell(f"{shape.words} {dtype}")
                runs.append(_run(shape, dtype, options))
    return {
        "benchmark": "attention",
        "command": command_line(),
        "machine": machine_facts(),
        "kernel": kernel_name(),
        "threads": torch.get_num_threads(),
        "runs": runs,
    }


def _run(shape: AttentionShape, dtype: str, options: AttentionBenchOptions) -> dict[str, Any]:
    torch.manual_seed(options.seed)
    layers = [AttentionLayer(shape, DTYPES[dtype], options.query_tokens) for _ in range(2)]
    ways: dict[str, Callable[[int], object]] = {
        "exact": lambda turn: layers[turn % 2].exact(),
        "tiles": lambda turn: layers[turn % 2].tiles(),
        "sdpa_contiguous": lambda turn: layers[turn % 2].sdpa(),
    }
    swept = _in_huge_pages(torch.ones(_BANDWIDTH_BYTES // 4))
    samples: dict[str, list[float]] = {name: [] for name in (*ways, "memory_read")}
    for _ in range(options.repeats):
        for name, way in ways.items():
            samples[name].append(layers[0].kv_bytes / GIB / seconds_of_call(way))
        seconds = seconds_of_call(lambda _: swept.sum())
        samples["memory_read"].append(_BANDWIDTH_BYTES / GIB / seconds)
    medians = {name: statistics.median(values) for name, values in samples.items()}
    query = AttentionQuery(query=layers[0].query, past=shape.tokens, scaling=1.0)
    return {
        **asdict(shape),
        "query_tokens": options.query_tokens,
        "dtype": dtype,
        "kv_bytes": layers[0].kv_bytes,
        "by_kernel": KernelAttention.serves(query, shape.kv_heads),
        **{f"{name}_gib_per_second": value for name, value in medians.items()},
        "tiles_to_exact": medians["tiles"] / medians["exact"],
        "tiles_to_memory_read": medians["tiles"] / medians["memory_read"],
        "samples_gib_per_second": samples,
    }


def seconds_of_call(call: Callable[[int], object]) -> float:
    """Of one call, from as many as make a sample; the first two are not counted. The call is told
    how many went before it."""
    call(0)
    call(1)
    count, started = 0, time.perf_counter()
    while (passed := time.perf_counter() - started) < _SAMPLE_SECONDS or count < 2:
        call(count)
        count += 1
    return passed / count


def _in_huge_pages(rows: torch.Tensor) -> torch.Tensor:
    """A contiguous copy, in memory as staging, gather buffers and the memory path have it."""
    size = rows.numel() * rows.element_size()
    arena = Arena(round_up(size, HUGE_PAGE_BYTES))
    memory = torch.frombuffer(arena.buffer, dtype=torch.uint8)[:size]
    return memory.view(rows.dtype).view(rows.shape).copy_(rows)


class AttentionLayer:
    """One layer's KV, the same as tiles and as contiguous tensors: `kv_bytes` of it."""

    def __init__(self, shape: AttentionShape, dtype: torch.dtype, query_tokens: int) -> None:
        if shape.tokens % TILE_ROWS_DEFAULT:
            raise ConfigError(f"tokens must be a multiple of {TILE_ROWS_DEFAULT}")
        keys, values = (
            _in_huge_pages(
                torch.randn(shape.batch, shape.kv_heads, shape.tokens, shape.dim).to(dtype)
            )
            for _ in range(2)
        )
        self.query = torch.randn(
            shape.batch, shape.query_heads, query_tokens, shape.dim, dtype=dtype
        )
        self.kv_bytes = keys.nbytes + values.nbytes
        self._together = (keys, values)
        self._gathered = (_in_huge_pages(keys), _in_huge_pages(values))
        self._tiles = tuple(
            _in_huge_pages(rows.unflatten(2, (-1, TILE_ROWS_DEFAULT)).permute(2, 0, 1, 3, 4))
            for rows in self._together
        )
        elements = 2 * shape.batch * shape.kv_heads * shape.dim
        tokens = min(group_tokens(elements, TILE_ROWS_DEFAULT), shape.tokens)
        group = (shape.batch, shape.kv_heads, tokens, shape.dim)
        self._group = (torch.empty(group), torch.empty(group))
        piece = max(1, _PIECE_BYTES // self._tiles[0][0].nbytes)
        self._pieces = self._cut(piece)
        self._places = [
            (
                place.unflatten(2, (-1, TILE_ROWS_DEFAULT))[:, :, some],
                tiles[some].permute(1, 2, 0, 3, 4),
            )
            for place, tiles in zip(self._gathered, self._tiles, strict=True)
            for some in (slice(first, first + piece) for first in range(0, len(tiles), piece))
        ]
        self._copies = HostCopies()
        self._module = torch.nn.Module()
        groups: Any = shape.query_heads // shape.kv_heads
        self._module.num_key_value_groups = groups

    def _cut(self, piece_tiles: int) -> list[tuple[Rows, Rows]]:
        """Keys and values of pieces as large as they come from a store, at most so many tiles of
        each; none reaches over the edge of a group."""
        edge = self._group[0].shape[2] // TILE_ROWS_DEFAULT
        pieces, tile = [], 0
        while tile < len(self._tiles[0]):
            last = min(tile + piece_tiles, (tile // edge + 1) * edge, len(self._tiles[0]))
            first_token, tokens = tile * TILE_ROWS_DEFAULT, (last - tile) * TILE_ROWS_DEFAULT
            keys, values = (Rows(tiles[tile:last], first_token, tokens) for tiles in self._tiles)
            pieces.append((keys, values))
            tile = last
        return pieces

    def tiles(self) -> torch.Tensor:
        """Attention over tiles, in pieces that are at hand, keys and values."""
        keys, values = self._tiles
        past = keys.shape[0] * TILE_ROWS_DEFAULT  # the query sees all
        query = AttentionQuery(query=self.query, past=past, scaling=self.query.shape[-1] ** -0.5)
        running: Running
        if KernelAttention.serves(query, keys.shape[2]):
            running = KernelAttention(query, keys.shape[2], values.shape[4])
        else:
            running = GroupedAttention(query, *self._group)
        for keys_piece, values_piece in self._pieces:
            running.both(keys_piece, values_piece)
        return running.finish()

    def exact(self) -> torch.Tensor:
        """Gather, then the model's own attention."""
        for place, source in self._places:
            self._copies.copy(place, source)
        return self._sdpa(*self._gathered)

    def sdpa(self) -> torch.Tensor:
        """The model's own attention on what is contiguous already."""
        return self._sdpa(*self._together)

    def _sdpa(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return sdpa_attention_forward(
            self._module, self.query, keys, values, None, is_causal=False
        )[0]
