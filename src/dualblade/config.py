"""Settings of one cache, resolved once at the edge. No I/O here."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any, Literal

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
        try:
            return cls(word)
        except ValueError:
            words = ", ".join(path.value for path in cls)
            raise ConfigError(f"unknown path {word!r}", hint=f"use one of: {words}") from None


ATTENTIONS = ("auto", "exact", "tiles")
"""Ways into attention, in the words that users see."""


def check_attention(word: str) -> None:
    """Raises: ConfigError for a word that names no way into attention."""
    if word not in ATTENTIONS:
        raise ConfigError(
            f"unknown attention {word!r}", hint=f"use one of: {', '.join(ATTENTIONS)}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How bytes are moved. Every default is the one that the benchmarks chose.

    io_engine            `auto`, `io_uring` or `posix`; `auto` falls to posix, openly.
    queue_depth          requests in flight on the device.
    chunk_bytes          largest single request; longer transfers are split.
    tile_tokens          rows in a tile; None: 64, unless whole blocks ask for more.
    staging_bytes        memory that reads land in; None: an eighth of the budget, within limits.
    lookahead            layers read ahead of compute, at most.
    disk_capacity_bytes  most that the store may occupy; None: free space less a reserve.
    memory_reserve_bytes  memory left to everything else. None: with an `auto` budget 256 MiB, at
                         most a quarter of what there is; a stated budget leaves nothing.
    cache_percent        `dual` path only: this part of the KV goes through the page cache for good,
                         whether it fits memory or not. None: the plan follows the memory there is.
    keep_store_blocks    keep a named store's blocks allocated at close (the KV stays on the drive
                         until the next open); the default gives them back.
    """

    io_engine: Literal["auto", "io_uring", "posix"] = "auto"
    queue_depth: int = 8
    chunk_bytes: int = MIB
    tile_tokens: int | None = None
    staging_bytes: int | None = None
    lookahead: int = 4
    disk_capacity_bytes: int | None = None
    memory_reserve_bytes: int | None = None
    cache_percent: int | None = None
    keep_store_blocks: bool = False

    def __post_init__(self) -> None:
        if self.io_engine not in ("auto", "io_uring", "posix"):
            raise ConfigError(
                f"unknown io_engine {self.io_engine!r}", hint="use auto, io_uring or posix"
            )
        _check("queue_depth", self.queue_depth, 1, 1024)
        _check("chunk_bytes", self.chunk_bytes, BLOCK_BYTES, GIB)
        if self.chunk_bytes % BLOCK_BYTES:
            raise ConfigError(f"chunk_bytes must be a multiple of {BLOCK_BYTES}")
        _check("lookahead", self.lookahead, 1, 1024)
        if self.tile_tokens is not None:
            _check("tile_tokens", self.tile_tokens, 1, 4096)
        if self.staging_bytes is not None:
            _check("staging_bytes", self.staging_bytes, 64 * KIB, 64 * GIB)
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


def _check(name: str, value: int, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ConfigError(f"{name} must be a whole number from {least} to {most}, not {value!r}")
