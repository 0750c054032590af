"""KeyboardInterrupt at a random line of the pipeline as most people run it: attention over tiles,
cached pages attended to where they lie, units cut and moved while the memory changes."""

from __future__ import annotations

import random
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from dualblade.attention import AttentionQuery
from dualblade.config import EngineConfig
from dualblade.config import Path as KVPath
from dualblade.errors import Closed
from dualblade.host.memory import MemoryReading, OwnMemory
from dualblade.io import open_engine
from dualblade.pipeline import KVPipeline, KVSettings
from dualblade.pipeline.memory_watch import MemorySource
from dualblade.store import Store
from dualblade.units import MIB
from tests.fault.test_pipeline_stress import interrupted_at

LAYERS, HEADS, DIM = 3, 8, 64
FILL = 2400  # tokens: 4.7 MiB a unit, of which 2 MiB at a time may be cached
SCHEDULES = 120


def rows(tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(1, HEADS, tokens, DIM, generator=generator) for _ in range(2))
    return keys, values


class Schedule:
    """One pipeline, a memory that changes at each look, and what all of it should be."""

    def __init__(self, seed: int, store: Path) -> None:
        self.random = random.Random(seed)
        self.seconds = 0.0
        self.engine = open_engine(self.random.choice(["auto", "posix"]), queue_depth=2)
        self.store = Store.open(store, self.engine, capacity_bytes=64 * MIB)
        settings = KVSettings(
            path=KVPath.DUAL,
            budget_bytes=48 * MIB,
            layer_count=LAYERS,
            tokens_max=FILL + 64,
            device=torch.device("cpu"),
            config=EngineConfig(staging_bytes=2 * MIB, tile_tokens=16),
            over_tiles=True,
            memory=MemorySource(asked_bytes=None, read=self.read_memory, clock=self.clock),
        )
        self.kv = KVPipeline(self.store, self.engine, settings)
        self.model = {layer: rows(FILL, layer) for layer in range(LAYERS)}
        for layer, new in self.model.items():
            self.kv.append(layer, *new)

    def read_memory(self, own: OwnMemory) -> MemoryReading:
        there = self.random.choice([0, 16, 20, 26, 48]) * MIB
        return MemoryReading(
            available_bytes=max(0, there - own.fixed_bytes),
            source="test",
            machine_available_bytes=there,
            limits=(),
            own=own,
        )

    def clock(self) -> float:
        self.seconds += 1.0
        return self.seconds

    def step(self, tokens: int, seed: int) -> None:
        for layer in range(LAYERS):
            new = rows(tokens, 100 * seed + layer)
            past = self.model[layer][0].shape[2]
            pairs = zip(self.model[layer], new, strict=True)
            keys, values = (torch.cat(pair, dim=2) for pair in pairs)
            query = rows(tokens, 7)[0]
            offer = self.kv.offer(layer, *new)
            got = offer.attend(AttentionQuery(query=query, past=past, scaling=DIM**-0.5))
            self.model[layer] = keys, values
            seen = torch.ones(tokens, past + tokens).tril(past).bool()
            expected = scaled_dot_product_attention(query, keys, values, attn_mask=seen)
            torch.testing.assert_close(got.transpose(1, 2), expected, rtol=1e-4, atol=1e-4)

    def run(self) -> None:
        with interrupted_at(self.random.randrange(9000)):
            for step in range(8):
                self.step(self.random.choice([1, 1, 1, 3]), step)

    def check_after(self) -> None:
        """Unusable from then on, unless the interrupt came between two steps."""
        with suppress(Closed):
            tokens = {self.kv.tokens(layer) for layer in range(LAYERS)}
            tokens |= {keys.shape[2] for keys, _ in self.model.values()}
            if len(tokens) == 1:  # else it came on the way back: what there should be is not known
                self.step(1, 90)
            self.kv.reset()
            self.model = {layer: rows(0, 0) for layer in range(LAYERS)}
            for step, tokens in enumerate((40, 1, 1)):
                self.step(tokens, 91 + step)

    def close(self) -> None:
        self.kv.close()
        self.engine.close()


def test_tiles_are_right_or_refused_after_an_interrupt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Asking the kernel for huge pages would take longer than the schedules.
    monkeypatch.setattr("dualblade.io.arena._huge_bytes", lambda _address, size_bytes: size_bytes)
    threads = threading.active_count()
    seen: dict[str, int] = dict.fromkeys(("interrupted", "in place", "up", "down", "cut"), 0)
    for seed in range(SCHEDULES):
        schedule = Schedule(seed, tmp_path / "kv.store")
        try:
            schedule.run()
        except KeyboardInterrupt:
            seen["interrupted"] += 1
        finally:
            counted: Any = schedule.store.counters
            seen["in place"] += counted.in_place_read_bytes > 0
            seen["up"] += counted.promotions > 0
            seen["down"] += counted.demotions > 0
            seen["cut"] += any(unit.path == "dual" for unit in schedule.kv.placements())
        try:
            schedule.check_after()
        finally:
            schedule.close()
    assert min(seen.values()) > SCHEDULES // 10, seen
    assert threading.active_count() == threads, "a thread is stuck"
