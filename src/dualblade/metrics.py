"""What a cache tells of itself: where bytes and time went, and what is in force."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from dualblade.units import format_size


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """The I/O engine in force; `reason` says why it is not the first choice."""

    name: str
    reason: str | None
    queue_depth: int
    chunk_bytes: int
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """Host memory of the cache, in bytes.

    `budget_bytes` is the one in force: it follows the memory that there is, and may fall below what
    is reserved. Everything but `page_cache_bytes` is reserved by us; that is what the kernel holds
    of the store now, `page_cache_planned_bytes` what it may hold.
    """

    budget_bytes: int | None
    staging_bytes: int
    gather_bytes: int
    tail_bytes: int
    table_bytes: int
    page_cache_planned_bytes: int
    page_cache_bytes: int

    @property
    def used_bytes(self) -> int:
        """What counts against the budget now."""
        fixed = self.staging_bytes + self.gather_bytes + self.tail_bytes + self.table_bytes
        return fixed + self.page_cache_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferTotals:
    """Bytes asked of the store since it was opened. `in_place_read_bytes` are those of the reads
    through the page cache that were not copied."""

    direct_read_bytes: int = 0
    direct_write_bytes: int = 0
    page_cache_read_bytes: int = 0
    page_cache_write_bytes: int = 0
    in_place_read_bytes: int = 0
    dead_read_bytes: int = 0
    promotions: int = 0
    demotions: int = 0

    @property
    def written_bytes(self) -> int:
        """Through both doors."""
        return self.direct_write_bytes + self.page_cache_write_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ChecksumTotals:
    """Of stored tiles, in bytes. `mismatches` are slabs that did not match when first verified,
    `healed_reads` transfers with such slabs that were right when read again; where they are not,
    the cache fails. After a mismatch everything is verified, whatever the mode."""

    mode: str = "off"
    made_bytes: int = 0
    verified_bytes: int = 0
    mismatches: int = 0
    healed_reads: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSeconds:
    """Wall time of the model's thread: waiting for reads, attending to tiles, gathering them,
    taking in new rows (waits for a free write slot included), and of those the waits for writes
    alone, and the checksums alone."""

    read_wait: float = 0.0
    attention: float = 0.0
    gather: float = 0.0
    append: float = 0.0
    write_wait: float = 0.0
    checksums: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineStages:
    """How long each stage had something to do, from the first rows on, and what was waited for.

    compute   the model's thread attending, and all that the model does between two calls.
    control   plans, and taking in rows.
    stalled   the model's thread waited: for a read, for a copy to give its slot back, for a write.
    direct_bytes  through the direct door, both ways; what the page cache moves is the kernel's and
              not in it. `profile_bytes_per_second` is what `dualblade tune` measured that the
              drive reads, None without it.
    """

    wall_seconds: float = 0.0
    reads_seconds: float = 0.0
    copies_seconds: float = 0.0
    compute_seconds: float = 0.0
    writes_seconds: float = 0.0
    control_seconds: float = 0.0
    stalled_on_reads_seconds: float = 0.0
    stalled_on_copies_seconds: float = 0.0
    stalled_on_writes_seconds: float = 0.0
    direct_bytes: int = 0
    profile_bytes_per_second: float | None = None

    @property
    def overlap_efficiency(self) -> float | None:
        """The stages' times together over the wall time: 1 is one after another."""
        together = self.reads_seconds + self.copies_seconds + self.compute_seconds
        together += self.writes_seconds + self.control_seconds
        return together / self.wall_seconds if self.wall_seconds else None

    @property
    def direct_utilisation(self) -> float | None:
        """What the direct door took of the drive's measured bandwidth; None where that was not
        measured, or nothing went that way."""
        if not self.wall_seconds or not self.profile_bytes_per_second or not self.direct_bytes:
            return None
        return self.direct_bytes / self.wall_seconds / self.profile_bytes_per_second


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningEvent:
    """Reads may hold `to_slots` staging slots from now on; `time_seconds` since the first rows,
    which is later than `ResidencyEvent`'s by what came before them."""

    time_seconds: float
    from_slots: int
    to_slots: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineTuning:
    """How reads and compute share a step: `slots` of `slots_max` may be held by reads, `lookahead`
    layers ahead of compute; `events` are the newest changes."""

    mode: str
    slots: int
    slots_max: int
    slot_bytes: int
    lookahead: int
    events: tuple[TuningEvent, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitPlacement:
    """One unit in the plan. `layer` is the model's number of it. `cached_bytes` of the unit's
    beginning go through the page cache; where that is neither all nor nothing, the path is
    `dual`. `bytes` is None for a layer in memory whose size the configuration does not tell."""

    layer: int
    part: str
    path: str
    bytes: int | None
    cached_bytes: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidencyEvent:
    """Units moved from one path to the other, `time_seconds` after the cache was made.

    `from_bytes` and `to_bytes` are planned in the page cache before and after. `moved_bytes` are
    stored bytes whose path changed: a demotion writes only those still dirty, a promotion none.
    """

    time_seconds: float
    cause: str
    from_bytes: int
    to_bytes: int
    moved_bytes: int
    demoted_units: int
    promoted_units: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedFacts:
    """Speeds of the store's device as measured, in bytes per second, and who measured them when:
    `tune`, or a short measurement at `first use`. `in_place`: hits are not copied out of the page
    cache but attended to there, and the plan takes them to cost nothing beside the drive."""

    measured_by: str
    measured_at: str
    direct_bytes_per_s: float
    cache_hit_bytes_per_s: float
    cache_miss_bytes_per_s: float
    in_place: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheStats:
    """A snapshot of a cache; as text, the five lines that a person asks for first.

    `attention` is the way in force; `tokens` are those of each sequence; `kv_bytes` is all KV, in
    store and memory; `events` are the newest changes of the plan; `speeds` None: the device was not
    measured, and what fits is cached.
    """

    path: str
    attention: str
    attention_reason: str
    engine: EngineFacts | None
    store_path: str | None
    store_fragments: int | None
    tokens: int
    kv_bytes: int
    stored_bytes: int
    offloaded_layers: int
    memory_layers: int
    memory: MemoryUse
    io: TransferTotals
    checksums: ChecksumTotals
    seconds: StageSeconds
    plan: tuple[UnitPlacement, ...]
    stages: PipelineStages = PipelineStages()
    tuning: PipelineTuning | None = None
    events: tuple[ResidencyEvent, ...] = ()
    speeds: SpeedFacts | None = None

    def __str__(self) -> str:
        size, memory, io = format_size, self.memory, self.io
        held = f"{self.tokens} tokens in each sequence, {size(self.kv_bytes)} of KV"
        if self.engine is None:
            return f"path {self.path}, attention {self.attention}\n{held}, in memory"
        most = "no end" if memory.budget_bytes is None else size(memory.budget_bytes)
        return "\n".join(
            (
                f"path {self.path}, attention {self.attention}, {self.engine.name} to "
                f"{self.store_path}",
                f"{held}, {size(self.stored_bytes)} of it stored",
                f"memory: {size(memory.used_bytes)} of {most} used, of that "
                f"{size(memory.page_cache_bytes)} page cache",
                f"read: {size(io.direct_read_bytes)} direct, {size(io.page_cache_read_bytes)} "
                f"through the page cache; written: {size(io.written_bytes)}",
                f"waited: {self.seconds.read_wait:.2f} s for reads, "
                f"{self.seconds.write_wait:.2f} s for writes",
            )
        )

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON types."""
        fields = asdict(self)
        fields["io"]["written_bytes"] = self.io.written_bytes
        fields["memory"]["used_bytes"] = self.memory.used_bytes
        fields["stages"]["overlap_efficiency"] = self.stages.overlap_efficiency
        fields["stages"]["direct_utilisation"] = self.stages.direct_utilisation
        return fields
