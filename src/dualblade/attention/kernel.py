"""Few query rows: our own kernel, on tiles where they lie (native/attention).

It exists because torch leaves more than a third of the memory bandwidth unused on one query row
(figures in docs/performance.md), and because tiles would have to be copied together for it.
"""

from __future__ import annotations

import os
import threading

import torch

from dualblade.attention import _attention
from dualblade.attention.query import AttentionQuery, Rows
from dualblade.errors import ConfigError

ROWS_MAX = 32
"""Query rows of one KV head, at most. The kernel's time grows with the rows; from about here on
torch's products of large matrices are faster although tiles are copied together for them."""

BLOCK_TOKENS = _attention.BLOCK_TOKENS
"""What the kernel takes at a time: a block must not be cut, or rounding would depend on the cut."""

_SCRATCH_BYTES = 7
"""For each query row and token that it is given: a weight, and of corrections 48 floats to a tile
of 64 tokens (native/attention/attention.hpp, Run)."""

_DTYPES = (torch.float32, torch.bfloat16)


def kernel_name() -> str:
    """The instruction set of the kernel in force: amx, avx512, avx2 or plain. Raises: ConfigError
    where DUALBLADE_KERNEL names another."""
    return _make_native(1).kernel


class KernelAttention:
    """One attention call. Not for two at a time in one thread: they would share scratch memory.

    Raises: ConfigError for what does not fit together; the kernel would read beyond it.
    """

    def __init__(self, query: AttentionQuery, kv_heads: int, value_dim: int) -> None:
        rows = query.query
        _check_query(query, kv_heads)
        sequence_stride, head_stride, token_stride, element_stride = rows.stride()
        if element_stride != 1:
            rows = rows.contiguous()
            sequence_stride, head_stride, token_stride, _ = rows.stride()
        batch, heads, tokens, key_dim = rows.shape
        self._keep = (rows, query.first_visible)  # the kernel has their addresses
        self._sinks = None if query.sinks is None else query.sinks.float().contiguous()
        self._out = rows.new_empty(batch, tokens, heads, value_dim)
        self._batch = batch
        self._key_row = (kv_heads, key_dim, rows.dtype)
        self._value_row = (kv_heads, value_dim, rows.dtype)
        self._tokens = (0, 0, 0)  # first, count and rows of a tile: of the last keys
        self._native = _native()
        starts = query.first_visible
        self._native.begin(
            data=rows.data_ptr(),
            sequence_stride=sequence_stride,
            head_stride=head_stride,
            token_stride=token_stride,
            batch=batch,
            kv_heads=kv_heads,
            group=heads // kv_heads,
            tokens=tokens,
            key_dim=key_dim,
            value_dim=value_dim,
            past=query.past,
            first_visible=0 if starts is None else starts.data_ptr(),
            scale=query.scaling,
            bfloat16=rows.dtype == torch.bfloat16,
        )

    @staticmethod
    def serves(query: AttentionQuery, kv_heads: int) -> bool:
        """Whether the kernel can do it, and is the faster way."""
        tensor = query.query
        plain = query.mask is None and query.bias is None and query.softcap is None
        fits = tensor.is_cpu and tensor.dtype in _DTYPES
        return plain and fits and query.rows(kv_heads) <= ROWS_MAX

    @staticmethod
    def needs_little(query: AttentionQuery, kv_heads: int) -> bool:
        """Whether its scratch memory is little, however many tokens it is given at a time: at most
        half of what their keys take."""
        key_bytes = query.query.shape[3] * query.query.element_size()
        return 2 * _SCRATCH_BYTES * query.rows(kv_heads) <= key_bytes

    def keys(self, rows: Rows) -> None:
        """See `Running`."""
        self._native.keys(self._run(rows, self._key_row))

    def values(self, rows: Rows) -> None:
        """See `Running`."""
        self._native.values(self._run(rows, self._value_row))

    def both(self, keys: Rows, values: Rows) -> None:
        """See `Running`."""
        run = self._run(keys, self._key_row)
        self._native.both(run, self._run(values, self._value_row))

    def finish(self) -> torch.Tensor:
        """See `Running`."""
        sinks = 0 if self._sinks is None else self._sinks.data_ptr()
        self._native.finish(sinks, self._out.data_ptr())
        return self._out

    def _run(self, rows: Rows, wanted: tuple[int, int, torch.dtype]) -> _attention.Run:
        tiles, table = rows.tiles, rows.table
        tile_stride, sequence_stride, head_stride, row_stride, element_stride = tiles.stride()
        count, sequences, kv_heads, tile_rows, dim = tiles.shape
        is_wanted = element_stride == 1 and (kv_heads, dim, tiles.dtype) == wanted
        if not is_wanted or rows.tokens > count * tile_rows:
            raise ConfigError(
                f"tiles {list(tiles.shape)} {tiles.dtype} are no {rows.tokens} rows of "
                f"(KV heads, dim, dtype) {wanted}, elements side by side"
            )
        tokens = (rows.first_token, rows.tokens, tile_rows)
        if wanted is self._key_row:
            self._tokens = tokens
        elif tokens != self._tokens:  # there are weights for those alone
            raise ConfigError("values of other tokens than the last keys'")
        if table is not None and not (
            table.shape == (count, self._batch)
            and table.dtype == "int32"
            and table.flags.c_contiguous
        ):
            raise ConfigError(
                f"the table of {count} tiles of {self._batch} sequences is "
                f"{list(table.shape)} {table.dtype}"
            )
        return _attention.Run(
            data=tiles.data_ptr(),
            tile_stride=tile_stride,
            sequence_stride=sequence_stride,
            head_stride=head_stride,
            row_stride=row_stride,
            first_token=rows.first_token,
            tokens=rows.tokens,
            tile_rows=tile_rows,
            first_sequence=rows.first_sequence,
            sequences=sequences,
            table=0 if table is None else table.ctypes.data,
        )


def _check_query(query: AttentionQuery, kv_heads: int) -> None:
    rows, starts, sinks = query.query, query.first_visible, query.sinks
    batch, heads = rows.shape[:2]
    if rows.dtype not in _DTYPES:
        raise ConfigError(f"the kernel has no {rows.dtype}")
    if heads % kv_heads:
        raise ConfigError(f"{heads} query heads do not share {kv_heads} KV heads evenly")
    if starts is not None and not (
        starts.shape == (batch,)
        and starts.dtype == torch.int64
        and starts.is_cpu
        and starts.is_contiguous()
    ):
        raise ConfigError(
            f"the first visible tokens of {batch} sequences are {list(starts.shape)} {starts.dtype}"
        )
    if sinks is not None and sinks.shape != (heads,):
        raise ConfigError(f"the sinks of {heads} heads are {list(sinks.shape)}")


_of_thread = threading.local()


def _native() -> _attention.Attention:
    """The kernel, its scratch memory and its threads: one for each calling thread, for two models
    may generate at a time, freed as it ends; and another after a fork, which takes no threads
    along, or for another number of threads."""
    process, threads = os.getpid(), torch.get_num_threads()
    held: tuple[int, int, _attention.Attention] | None = getattr(_of_thread, "held", None)
    if held is None or held[:2] != (process, threads):
        held = _of_thread.held = None  # its threads end before others begin
        held = _of_thread.held = (process, threads, _make_native(threads))
    return held[2]


def _make_native(threads: int) -> _attention.Attention:
    name = os.environ.get("DUALBLADE_KERNEL", "")
    try:
        return _attention.Attention(threads, name)
    except ValueError as exc:
        raise ConfigError(
            f"DUALBLADE_KERNEL names no kernel of this machine: {name}",
            hint="plain, avx2, avx512, amx, as far as the processor has them; unset: the best",
        ) from exc
