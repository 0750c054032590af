"""Settings of one cache, resolved once at the edge. No I/O here."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any, Literal, get_args

from dualblade.errors import ConfigError
from dualblade.units import BLOCK_BYTES, GIB, KIB, MIB, parse_size


class Path(StrEnum):
    """The way of a unit between memory and drive, in the words that users see."""

    DUAL = "dual"
    PAGE_CACHE = "page-cache"
    DIRECT = "direct"
    MEMORY = "memory"

    @classmethod
    def parse(cls, word: str | Path) -> Path:
        """The path that `word` names. Raises: ConfigError listing the words."""
        check_word("path", word, [path.value for path in cls])
        return cls(word)


AttentionWord = Literal["auto", "exact", "tiles"]
"""Ways into attention."""

EngineChoice = Literal["auto", "uring-cmd", "io_uring", "posix"]
"""I/O engines that one may ask for."""

ChecksumMode = Literal["off", "sample", "all"]
"""What of stored KV is verified as it is read."""

PipelineMode = Literal["auto", "serial", "key-value", "tiled", "layers"]
"""How reads and compute share a step."""


TRACE_EVENTS = 100_000
"""Spans that commands keep for `--trace`: 20 MB of memory and of JSON. A step of 1 GiB in pieces of
4 MiB is about 800."""


def check_word(name: str, word: str, words: Iterable[str]) -> None:
    """Raises: ConfigError for a word that is none of `words`, which are told."""
    if word not in (known := tuple(words)):
        raise ConfigError(f"unknown {name} {word!r}", hint=f"use one of: {', '.join(known)}")


def check_attention(word: str) -> None:
    """Raises: ConfigError for a word that names no way into attention."""
    check_word("attention", word, get_args(AttentionWord))


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How bytes are moved. Every default is the one that the benchmarks chose.

    io_engine            `auto`: the best that store and machine allow, openly. `uring-cmd`: NVMe
                         commands or nothing. `io_uring`: O_DIRECT, on a namespace's block device
                         too. `posix`: threads; to a namespace, commands by ioctl.
    io_poll              poll for completions of direct I/O (IOPOLL) instead of sleeping until the
                         drive interrupts. Off: it keeps a core busy that the model could use. With
                         cores to spare and a fast drive with poll queues it saves the interrupt.
                         Refused where the drive has none.
    queue_depth          requests in flight on each device of the store.
    chunk_bytes          largest single request; longer transfers are split.
    tile_tokens          rows in a tile; None: 64, more where whole blocks ask for it, fewer
                         where memory does.
    staging_bytes        memory that reads land in; None: an eighth of the budget, more of a small
                         one, within limits.
    lookahead            layers read ahead of compute, at most.
    disk_capacity_bytes  most that the store may occupy; None: free space less a reserve.
    memory_reserve_bytes  memory left to everything else. None: with an `auto` budget 256 MiB, at
                         most a quarter of what there is; a stated budget leaves nothing.
    cache_percent        `dual` path only: this part of the KV goes through the page cache for good,
                         whether it fits memory or not. None: the plan follows the memory there is.
    checksums            verify what is read: `sample`, a sixteenth at each step and so all of it in
                         16 steps (a 64th of what stays in memory); `all`, before it is used; or
                         `off`.
    pipeline             how reads and compute share a step. `auto`: reads go on across layers and
                         steps, with as much read ahead as makes steps shorter, found while running;
                         `layers`: with as much as there is room for; `tiled`: within a layer;
                         `key-value`: the values of some tiles while their keys are attended to;
                         `serial`: a piece is read, then attended to. Results are the same.
    in_place             attend on the CPU to what is in the page cache where it lies there, without
                         copying it to staging. Needs Linux 5.14 and a store of one member; else,
                         and off, it is read.
    trace_events         spans that are kept for `DualBladeCache.write_trace`, the newest; about
                         170 bytes each, outside the budget. 0: none.
    discard              tell a device (TRIM) of each extent when it is freed. Off: all are told of
                         at close, and a discard stops the step in which it happens. For caches
                         that live long on drives that want to know. Files do not need it.
    keep_store_blocks    keep a named store's blocks allocated at close: the KV stays on the drive,
                         of a file until it is closed without this, of a device until it is
                         overwritten or wiped. The default gives them back.
    """

    io_engine: EngineChoice = "auto"
    io_poll: bool = False
    queue_depth: int = 8
    chunk_bytes: int = MIB
    tile_tokens: int | None = None
    staging_bytes: int | None = None
    lookahead: int = 4
    disk_capacity_bytes: int | None = None
    memory_reserve_bytes: int | None = None
    cache_percent: int | None = None
    checksums: ChecksumMode = "sample"
    discard: bool = False
    keep_store_blocks: bool = False
    pipeline: PipelineMode = "auto"
    in_place: bool = True
    trace_events: int = 0

    def __post_init__(self) -> None:
        check_word("io_engine", self.io_engine, get_args(EngineChoice))
        check_word("checksums", self.checksums, get_args(ChecksumMode))
        check_word("pipeline", self.pipeline, get_args(PipelineMode))
        for name in ("io_poll", "discard", "in_place", "keep_store_blocks"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, not {getattr(self, name)!r}")
        _check("queue_depth", self.queue_depth, 1, 1024)
        _check("chunk_bytes", self.chunk_bytes, BLOCK_BYTES, GIB)
        if self.chunk_bytes % BLOCK_BYTES:
            raise ConfigError(f"chunk_bytes must be a multiple of {BLOCK_BYTES}")
        _check("lookahead", self.lookahead, 1, 1024)
        _check("trace_events", self.trace_events, 0, 10_000_000)
        if self.tile_tokens is not None:
            _check("tile_tokens", self.tile_tokens, 1, 4096)
        if self.staging_bytes is not None:
            _check("staging_bytes", self.staging_bytes, 64 * KIB, 64 * GIB)
        if self.disk_capacity_bytes is not None:
            _check("disk_capacity_bytes", self.disk_capacity_bytes, 1, 1 << 60)
        if self.memory_reserve_bytes is not None:
            _check("memory_reserve_bytes", self.memory_reserve_bytes, 0, 1 << 50)
        if self.cache_percent is not None:
            _check("cache_percent", self.cache_percent, 0, 100)

    def check_path(self, path: Path) -> None:
        """Raises: ConfigError for a setting that means nothing on `path`."""
        if self.cache_percent is not None and path is not Path.DUAL:
            raise ConfigError(
                f"cache_percent splits the dual path; {path.value} is one way for all KV",
                hint="leave one of them out",
            )

    def has_choice(self, path: Path) -> bool:
        """Whether nobody but the plan says which KV goes through the page cache."""
        return path is Path.DUAL and self.cache_percent is None

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any]) -> EngineConfig:
        """Settings by name; sizes may be words. Raises: ConfigError with the nearest key."""
        known = {field.name for field in fields(cls)}
        values: dict[str, Any] = {}
        for name, value in settings.items():
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = (
                    f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
                )
                raise ConfigError(f"unknown setting {name!r}", hint=hint)
            is_size = name.endswith("_bytes") and value is not None
            values[name] = parse_size(value) if is_size else value
        return cls(**values)


def parse_settings(words: Iterable[str]) -> dict[str, Any]:
    """Settings written NAME=VALUE, for `EngineConfig.from_mapping`. Raises: ConfigError."""
    known = {"true": True, "false": False}
    settings: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not (name and equals and value):
            raise ConfigError(f"not a setting: {word!r}", hint="write it like checksums=all")
        settings[name] = int(value) if value.isdecimal() else known.get(value, value)
    return settings


def _check(name: str, value: int, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ConfigError(f"{name} must be a whole number from {least} to {most}, not {value!r}")
