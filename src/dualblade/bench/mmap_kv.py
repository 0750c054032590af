"""The `mmap` mode: offloading by memory-mapped files, as FlexLLMGen's description has it.

One file per tensor (the keys or the values of a layer), mapped whole. Before a layer's turn threads
copy what the mappings hold into ordinary memory, one layer ahead of compute; what stays in memory
is the kernel's choice alone. Written by us from that description, and given our best: the same
tiles and the same attention as every other mode, copies into huge pages, and with `exact` the copy
out of the mapping is the gather, so that no byte is copied twice. Keys and values are copied side
by side or one after the other, whichever took less when it was last tried: with little memory, what
is read ahead for one is lost to the other.

What was read leaves the page tables after its copy, as it does in FlexLLMGen, which maps a file
anew for each: pages that stay mapped cost the kernel most of the step when it needs them back
(docs/performance.md, "What mmap is"). Where nothing had to be read they stay.
"""

from __future__ import annotations

import mmap
import os
import resource
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dualblade import DualBladeCache, config
from dualblade.bench.workload import MMAP_ENDING
from dualblade.errors import NoSpace, Unsupported
from dualblade.hf.choice import choose
from dualblade.hf.geometry import memory_layers, offloadable
from dualblade.hf.layer import StoredLayer
from dualblade.io import Arena
from dualblade.metrics import CacheStats, StageSeconds, TransferTotals
from dualblade.pipeline import MemoryKV
from dualblade.pipeline.attend import Arrived, NewRows
from dualblade.pipeline.copies import HostCopies
from dualblade.pipeline.gather import scatter
from dualblade.pipeline.layer import HalfLayer, Layer
from dualblade.pipeline.memory import TileMemory
from dualblade.pipeline.unit import paired_pieces, tile_view
from dualblade.store import Door, Extent
from dualblade.store.extents import Range
from dualblade.units import HUGE_PAGE_BYTES, round_up

_TRY_OTHER_SWEEPS = 16
"""What took longer may take less by now: so often it is tried again."""

_WHOLE = 1 << 62
"""Pieces are as large as they come: a mapping has no slots."""

_ALONE = 32_000
"""Elements that torch copies without help: just below what it shares among its threads."""

_HOST = HostCopies()


class MappedFiles(TileMemory):
    """Extents that are mapped files in `folder`. Kept ones have names and are found again, so that
    the next run rewrites their blocks; others have none and are gone whatever happens."""

    def __init__(self, folder: Path, *, keep: bool) -> None:
        super().__init__(torch.device("cpu"))
        self._folder = folder
        self._keep = keep
        self._mapped: dict[Extent, mmap.mmap] = {}

    def allocate(self, size_bytes: int, door: Door) -> Extent:
        """See `Space`."""
        size = round_up(size_bytes, HUGE_PAGE_BYTES)
        flags = os.O_RDWR | os.O_CLOEXEC
        try:
            if self._keep:
                self._folder.mkdir(exist_ok=True, mode=0o700)
                name = self._folder / f"{len(self._held):04d}.kv"
                fd = os.open(name, flags | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            else:
                fd = os.open(self._folder, flags | os.O_TMPFILE, 0o600)
            try:
                os.posix_fallocate(fd, 0, size)
                mapped = mmap.mmap(fd, size)
            finally:
                os.close(fd)
        except OSError as exc:
            raise NoSpace(
                f"cannot map a file of {size} bytes: {exc.strerror}",
                operation="allocate",
                path=str(self._folder),
            ) from exc
        extent = Extent(range=Range(0, size), door=door)
        self._mapped[extent] = mapped
        self._held[extent] = torch.frombuffer(mapped, dtype=torch.uint8)
        return extent

    def let_go(self, extent: Extent) -> None:
        """Take its pages out of the page tables; nothing is lost, the file has them."""
        self._mapped[extent].madvise(mmap.MADV_DONTNEED)

    def free(self, extent: Extent) -> None:
        """See `Space`."""
        super().free(extent)
        del self._mapped[extent]

    def clear(self) -> None:
        """Give all extents back."""
        super().clear()
        self._mapped.clear()


@dataclass(slots=True)
class _Ahead:
    """A layer on its way from the files into `slot`."""

    index: int
    stored_tiles: int
    whole: bool
    slot: int
    copied: list[Future[int]]


class _Threads:
    """How many copy: what took less when last tried, seconds between two beginnings. The other is
    tried again now and then; a sweep in which pages are read for the first time is none to judge
    by."""

    def __init__(self) -> None:
        self.count = 2
        self._took: dict[int, float] = {}
        self._began: float | None = None
        self._sweeps = 0

    def begin(self) -> None:
        """A sweep of all layers begins."""
        now = time.perf_counter()
        if self._began is not None:
            self._sweeps += 1
            if self._sweeps > 1:
                self._took[self.count] = now - self._began
                self.count = self._next()
        self._began = now

    def _next(self) -> int:
        other = 3 - self.count
        if other not in self._took or self._sweeps % _TRY_OTHER_SWEEPS == 0:
            return other
        return min(self._took, key=self._took.__getitem__)

    def forget(self) -> None:
        """The sweep in hand is none to judge by."""
        self._began = None


class MmapKV(MemoryKV):
    """The KV of `layer_count` layers in mapped files; see the module. One segment to a unit."""

    def __init__(
        self, files: MappedFiles, layer_count: int, tile_tokens: int | None, tokens_max: int
    ) -> None:
        super().__init__(torch.device("cpu"), tile_tokens, tokens_max, memory=files)
        self._layer_count = layer_count
        self._tokens_max = tokens_max
        self._files = files
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="mmap copy")
        self._beside = _Threads()
        self._slots: dict[tuple[int, int], torch.Tensor] = {}
        self._ahead: _Ahead | None = None
        self._turn = 0
        self._wait_seconds = 0.0
        self.read_bytes = 0

    # -- one layer's turn --------------------------------------------------------------------

    def _arriving(self, layer: Layer, *, any_size: bool) -> Iterator[Arrived]:
        slot = self._take(layer, whole=False)
        units = (layer.keys.unit, layer.values.unit)
        edge_tiles = layer.stored_tiles if any_size else layer.group_tiles
        for pair in paired_pieces(*units, range(layer.stored_tiles), _WHOLE, edge_tiles):
            tiles = []
            for part, (half, piece) in enumerate(zip(layer.halves, pair, strict=True)):
                geometry = half.unit.geometry
                at, size = piece.offset(geometry), piece.size_bytes(geometry)
                memory = self._slot(slot, part, half, layer)[at : at + size]
                tiles.append(tile_view(memory, geometry, layer.dtype, piece.tiles, piece.sequences))
            yield Arrived(layer.keys, tiles[0], pair[0].tile, pair[0].sequence, tiles[1])

    def _gathered(self, layer: Layer, new: NewRows) -> tuple[torch.Tensor, torch.Tensor]:
        slot = self._take(layer, whole=True)
        stored, past = layer.stored_tiles * layer.rows, layer.tokens
        together = []
        for part, (half, rows) in enumerate(zip(layer.halves, (new.keys, new.values), strict=True)):
            out = self._whole(slot, part, half, layer)
            out[:, :, stored:past] = half.tail[:, :, : layer.tail_rows]
            out[:, :, past : past + new.count] = rows
            together.append(out[:, :, : past + new.count])
        return together[0], together[1]

    def _append(self, layer: Layer, new: NewRows, *, is_sweeping: bool) -> None:
        if not is_sweeping:
            self._drop_ahead()
        super()._append(layer, new, is_sweeping=is_sweeping)

    def _take(self, layer: Layer, *, whole: bool) -> int:
        """The slot that holds the layer's stored tiles; the next layer is then on its way.

        The other slot was the layer's before, whose attention has ended.
        """
        started = time.perf_counter()
        ahead = self._ahead
        wanted = (layer.index, layer.stored_tiles, whole)
        if ahead is None or (ahead.index, ahead.stored_tiles, ahead.whole) != wanted:
            self._drop_ahead()
            ahead = self._begin(layer, whole=whole)
        self._end(ahead)
        self._wait_seconds += time.perf_counter() - started
        following = self._layers.get((layer.index + 1) % self._layer_count)
        self._ahead = None if following is None else self._begin(following, whole=whole)
        return ahead.slot

    def _begin(self, layer: Layer, *, whole: bool) -> _Ahead:
        self._turn ^= 1
        if layer.index == 0:
            self._beside.begin()
        parts = range(len(layer.halves))
        shares = [[part] for part in parts] if self._beside.count > 1 else [parts]
        copied = [
            self._threads.submit(self._copy, layer, share, self._turn, whole) for share in shares
        ]
        return _Ahead(layer.index, layer.stored_tiles, whole, self._turn, copied)

    def _copy(self, layer: Layer, parts: Iterable[int], slot: int, whole: bool) -> int:
        """In a thread: this is where the kernel reads. Returns: bytes copied."""
        return sum(self._copy_half(layer, part, slot, whole) for part in parts)

    def _copy_half(self, layer: Layer, part: int, slot: int, whole: bool) -> int:
        half, size_bytes = layer.halves[part], 0
        geometry = half.unit.geometry
        for piece in half.unit.pieces(0, layer.stored_tiles, _WHOLE):
            faults = _major_faults()
            tiles = self._memory.view(half.unit, piece, layer.dtype)
            at, size = piece.offset(geometry), piece.size_bytes(geometry)
            if whole:
                out = self._whole(slot, part, half, layer)
                scatter(piece, tiles, layer.table, geometry, out, _copy)
            else:
                memory = self._slot(slot, part, half, layer)[at : at + size]
                view = tile_view(memory, geometry, layer.dtype, piece.tiles, piece.sequences)
                _copy(view, tiles)
            if _major_faults() > faults:
                self._files.let_go(piece.segment.extent)
            size_bytes += size
        return size_bytes

    def _whole(self, slot: int, part: int, half: HalfLayer, layer: Layer) -> torch.Tensor:
        """The slot as [batch, kv_heads, tokens_max, dim]."""
        geometry = half.unit.geometry
        shape = (layer.batch, geometry.kv_heads, self._tokens_max, geometry.dim)
        elements = shape[0] * shape[1] * shape[2] * shape[3]
        return self._slot(slot, part, half, layer).view(layer.dtype)[:elements].view(shape)

    def _slot(self, slot: int, part: int, half: HalfLayer, layer: Layer) -> torch.Tensor:
        """Memory for the unit at its longest, made at first use; as huge pages, like staging."""
        assert len(half.unit.segments) <= 1, "a unit of a stated maximum has one segment"
        memory = self._slots.get((slot, part))
        if memory is None:
            tiles = -(-self._tokens_max // layer.rows)
            size = tiles * half.unit.geometry.tile_bytes(layer.batch)
            memory = torch.frombuffer(Arena(size).buffer, dtype=torch.uint8)
            self._slots[slot, part] = memory
        return memory

    # -- the rest ----------------------------------------------------------------------------

    def crop(self, index: int, count: int) -> None:
        """Forget the newest `count` tokens of layer `index`."""
        self._drop_ahead()
        super().crop(index, count)

    def select(self, index: int, indices: torch.Tensor) -> None:
        """In layer `index`, sequence i becomes what `indices[i]` was."""
        self._drop_ahead()
        super().select(index, indices)

    def reset(self) -> None:
        """Forget all tokens."""
        self._drop_ahead()
        super().reset()

    def close(self) -> None:
        """End the copy on its way, unmap. Idempotent."""
        self._drop_ahead()
        self._threads.shutdown()
        super().close()

    def seconds(self) -> StageSeconds:
        """Where the model's thread spent time; waiting for the copy is apart from attention."""
        told = super().seconds()
        attention = max(0.0, told.attention - self._wait_seconds)
        return replace(told, attention=attention, read_wait=self._wait_seconds)

    def _drop_ahead(self) -> None:
        """Nothing may write into a slot any more."""
        self._beside.forget()
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            self._end(ahead)

    def _end(self, ahead: _Ahead) -> None:
        """All of its copies have ended, also where one of them failed."""
        wait(ahead.copied)
        self.read_bytes += sum(share.result() for share in ahead.copied)


def _copy(place: torch.Tensor, rows: torch.Tensor) -> None:
    """In this thread alone, in the order of the pages.

    FlexLLMGen copies by torch, which shares a large copy among a team of threads: beside a model
    that computes on the same cores those wait for each other. A large memmove, as numpy's, goes
    through four pages at once, so that the kernel reads ahead for none: ten times the faults.
    """
    if not (place.is_contiguous() and rows.is_contiguous()):
        _HOST.copy(place, rows)  # by numpy: runs of a tile's rows, which are short
        return
    pieces = (tensor.flatten().view(torch.int64).split(_ALONE) for tensor in (place, rows))
    for to, some in zip(*pieces, strict=True):
        to.copy_(some)


def _major_faults() -> int:
    """Of this process so far: pages that had to be read."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


class MmapCache(DualBladeCache):
    """A cache over mapped files; what it read is told as page-cache reads."""

    def stats(self) -> CacheStats:
        """See `DualBladeCache.stats`."""
        kv = self._pipeline
        assert isinstance(kv, MmapKV)
        io = TransferTotals(page_cache_read_bytes=kv.read_bytes)
        return replace(super().stats(), path="mmap", io=io)


def mmap_cache(
    model: Any,
    *,
    store: Path | None,
    attention: str,
    max_tokens: int,
    settings: config.EngineConfig,
) -> MmapCache:
    """A cache of the `mmap` mode. With a store kept, its files are in the folder `STORE.mmap`.

    Raises: Unsupported on a GPU; ConfigError.
    """
    from dualblade.store import cache_directory

    if model.device.type != "cpu":
        raise Unsupported("the mmap mode is for models on the CPU", hint="leave --mode mmap out")
    keep = store is not None and settings.keep_store_blocks
    folder = cache_directory() if store is None else store.absolute().parent
    if keep and store is not None:
        folder /= store.name + MMAP_ENDING
    files = MappedFiles(folder, keep=keep)
    layers = memory_layers(model.config)
    stored = [index for index, ours in enumerate(offloadable(model.config, layers)) if ours]
    choice = choose(model, attention)
    kv = MmapKV(files, len(stored), settings.tile_tokens, max_tokens)
    for number, index in enumerate(stored):
        layers[index] = StoredLayer(kv, number, max_tokens, choice)
    return MmapCache(
        layers,
        path=config.Path.MEMORY,
        attention=choice,
        model=model if choice.over_tiles else None,
        pipeline=kv,
    )
