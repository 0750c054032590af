"""What engine and store tell of themselves, as stats have it."""

from __future__ import annotations

from dualblade.io import Engine
from dualblade.metrics import EngineFacts, TransferTotals
from dualblade.store import Store


def engine_facts(engine: Engine) -> EngineFacts:
    """The engine in force."""
    return EngineFacts(
        name=engine.name,
        reason=engine.reason,
        queue_depth=engine.queue_depth,
        chunk_bytes=engine.chunk_bytes,
        notes=tuple(engine.notes),
    )


def transfer_totals(store: Store, dead_read_bytes: int) -> TransferTotals:
    """Bytes asked of the store so far; `dead_read_bytes` of them nobody needed."""
    counters = store.counters
    return TransferTotals(
        direct_read_bytes=counters.direct_read_bytes,
        direct_write_bytes=counters.direct_write_bytes,
        page_cache_read_bytes=counters.page_cache_read_bytes,
        page_cache_write_bytes=counters.page_cache_write_bytes,
        in_place_read_bytes=counters.in_place_read_bytes,
        dead_read_bytes=dead_read_bytes,
        promotions=counters.promotions,
        demotions=counters.demotions,
    )
