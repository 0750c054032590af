"""drive -> simulated DMA -> compute, with each stage as the bottleneck in turn: the right rows, in
order, never more slots than there are, and stages that go on at the same time.

The simulated engine keeps time; what is asserted is what came before what.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from dualblade import config
from dualblade.attention import AttentionQuery, KernelAttention
from dualblade.config import EngineConfig
from dualblade.errors import Closed
from dualblade.io import Op, open_engine
from dualblade.pipeline import KVPipeline, KVSettings
from dualblade.pipeline.timeline import Lane
from dualblade.store import Store
from dualblade.testing import Fault, FaultyEngine, SimulatedDma
from dualblade.units import MIB

LAYERS, HEADS, DIM, CONTEXT = 4, 2, 32, 1500
STAGING = 1 * MIB
SLOW_SECONDS = 0.004
BOTTLENECKS = ("reads", "copies", "compute")


def rows(tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(1, HEADS, tokens, DIM, generator=generator) for _ in range(2))
    return keys, values


class Bench:
    """A pipeline over a drive and a DMA engine, one of the stages slow."""

    def __init__(self, bottleneck: str, *, over_tiles: bool) -> None:
        slow_read = Fault(op=Op.READ, errno=None, latency_seconds=SLOW_SECONDS, times=None)
        engine = FaultyEngine(open_engine(), [slow_read] if bottleneck == "reads" else [])
        slow_copy = SLOW_SECONDS if bottleneck == "copies" else 0.0
        self.dma = SimulatedDma(latency_seconds=slow_copy)
        settings = KVSettings(
            path=config.Path.DIRECT,
            budget_bytes=64 * MIB,
            layer_count=LAYERS,
            tokens_max=CONTEXT + 10,
            device=torch.device("cpu"),
            config=EngineConfig(staging_bytes=STAGING, trace_events=100_000),
            over_tiles=over_tiles,
            copies=self.dma,
        )
        self.kv = KVPipeline(Store.open(None, engine, capacity_bytes=256 * MIB), engine, settings)
        self.model = [rows(CONTEXT, layer) for layer in range(LAYERS)]
        for layer, pair in enumerate(self.model):
            self.kv.append(layer, *pair)

    def step(self, seed: int, *, over_tiles: bool) -> None:
        """One token through all layers; results compared with plain attention."""
        for layer in range(LAYERS):
            new = rows(1, seed + layer)
            pairs = zip(self.model[layer], new, strict=True)
            keys, values = (torch.cat(pair, dim=2) for pair in pairs)
            self.model[layer] = keys, values
            if not over_tiles:
                got = self.kv.update(layer, *new)
                assert torch.equal(got[0], keys)
                assert torch.equal(got[1], values)
                continue
            query = AttentionQuery(query=new[0], past=keys.shape[2] - 1, scaling=DIM**-0.5)
            out = self.kv.offer(layer, *new).attend(query)
            want = scaled_dot_product_attention(new[0], keys, values)
            torch.testing.assert_close(out, want.transpose(1, 2), rtol=1e-4, atol=1e-5)


@pytest.fixture(params=BOTTLENECKS)
def bottleneck(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "compute":
        attend = KernelAttention.keys

        def slowly(self: KernelAttention, some: Any) -> None:
            time.sleep(SLOW_SECONDS)
            attend(self, some)

        monkeypatch.setattr(KernelAttention, "keys", slowly)
    return request.param


def lane(path: Path, name: str) -> list[tuple[float, float]]:
    """(start, end) of the lane's spans in order of their starts; of compute the stored tiles'."""
    found = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("cat") == name]
    if name == "compute":
        tiles = [e for e in found if e["args"]["what"] in ("keys", "values")]
        return [(e["ts"], e["ts"] + e["dur"]) for e in tiles]
    ends = {e["id"]: e["ts"] for e in found if e["ph"] == "e"}
    return [(e["ts"], ends[e["id"]]) for e in found if e["ph"] == "b"]


def overlapping(some: list[tuple[float, float]], others: list[tuple[float, float]]) -> int:
    """Spans of `some` during which one of `others` goes on."""
    return sum(any(a < d and c < b for c, d in others) for a, b in some)


def test_copies_that_go_on_by_themselves_are_not_taken_off_control() -> None:
    """Rows on their way out are copied by the device: the host's time is its own."""
    bench = Bench("copies", over_tiles=False)
    try:
        stages = bench.kv._timeline.stages()
        controlled = sum(
            end - start
            for lane, _, start, end, *_ in bench.kv._timeline._events or ()
            if lane is Lane.CONTROL
        )
        assert 0 < stages.control_seconds <= controlled / 1e9
    finally:
        bench.kv.close()


def test_tiles_flow_through_all_stages_at_once(bottleneck: str, tmp_path: Path) -> None:
    bench = Bench(bottleneck, over_tiles=True)
    try:
        for seed in (100, 200, 300):
            bench.step(seed, over_tiles=True)
        slots = bench.kv._require_machinery().read_slots
        slot_count = slots.free_count + sum(len(v.coming) for v in bench.kv._sweep()._visits)
        bench.kv._drop_sweep()
        while slots.free_count:  # notes the copies of the last pieces
            slots.acquire()
        bench.kv.write_trace(tmp_path / "trace.json")
    finally:
        bench.kv.close()
    reads, computed = (lane(tmp_path / "trace.json", name) for name in ("reads", "compute"))
    copies = lane(tmp_path / "trace.json", "copies")[-len(reads) :]  # before: rows on their way out
    assert len(reads) == len(copies) == len(computed)
    # Of each piece: read, then copied, then attended to; and one after another in each stage.
    for (_, landed), (copying, copied), (computing, _) in zip(reads, copies, computed, strict=True):
        assert landed <= copying
        assert copied <= computing
    assert copies == sorted(copies, key=lambda span: span[1])
    # A slot is held from the read's submission to the copy's end.
    holds = [(a, d) for (a, _), (_, d) in zip(reads, copies, strict=True)]
    held = max(sum(a <= at < d for a, d in holds) for at, _ in holds)
    assert held <= slot_count == STAGING // slots.slot_bytes * 3 // 4
    slow, others = {
        "reads": (reads, (copies, computed)),
        "copies": (copies, (reads, computed)),
        "compute": (computed, (reads, copies)),
    }[bottleneck]
    for fast in others:  # the bottleneck goes on while the others work
        assert overlapping(fast, slow) >= LAYERS, "at least one in each layer"


def test_whole_layers_are_gathered_through_the_copy_stage(bottleneck: str) -> None:
    bench = Bench(bottleneck, over_tiles=False)
    try:
        for seed in (100, 200):
            bench.step(seed, over_tiles=False)
        assert bench.dma.count > 2 * LAYERS
    finally:
        bench.kv.close()
    assert not bench.dma.is_running


def test_a_copy_that_fails_spoils_the_cache_and_nothing_is_stuck() -> None:
    bench = Bench("none", over_tiles=True)
    bench.dma._fail_nth = bench.dma.count + 10
    try:
        with pytest.raises(RuntimeError, match="simulated DMA"):
            for seed in (100, 200):
                bench.step(seed, over_tiles=True)
        with pytest.raises(Closed, match="failed earlier"):
            bench.kv.append(0, *rows(1, 1))
    finally:
        bench.kv.close()
    assert not bench.dma.is_running
