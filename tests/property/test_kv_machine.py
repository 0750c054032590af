"""The pipeline against plain tensors: random appends, crops, reorders and resets, on every path,
with late writes and late copies; rows are gathered and compared, or attended to where they lie.

Two layers with different heads and dims; slots so small that tiles are moved in several pieces.
On the dual path the memory that is there changes at random, so units move between steps. Checksums
find nothing wrong.
"""

from __future__ import annotations

from typing import get_args

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from torch.nn.functional import scaled_dot_product_attention

from dualblade.attention import AttentionQuery
from dualblade.config import ChecksumMode, EngineConfig, Path, PipelineMode
from dualblade.host.memory import MemoryReading, OwnMemory
from dualblade.io import Op, open_engine
from dualblade.pipeline import KVPipeline, KVSettings, MemoryKV
from dualblade.pipeline.copies import copies_for
from dualblade.pipeline.memory_watch import MemorySource
from dualblade.store import Store
from dualblade.testing import Fault, FaultyEngine, SimulatedDma
from dualblade.units import KIB, MIB

# (kv_heads, key_dim, value_dim): keys and values differ, layers differ, one needs padded slabs.
LAYERS = ((2, 16, 24), (3, 20, 20))


class KVMachine(RuleBasedStateMachine):
    """`self.model[layer]` is the pair of plain tensors that the pipeline must give back."""

    def __init__(self) -> None:
        super().__init__()
        self.pipeline: KVPipeline | MemoryKV | None = None
        self.model: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.generator = torch.Generator().manual_seed(1)
        self.there_bytes = self.roomy_bytes = 0
        self.seconds = 0.0

    def memory(self, own: OwnMemory) -> MemoryReading:
        """What the probe would say, the clock a second further at each reading."""
        return MemoryReading(
            available_bytes=max(0, self.there_bytes - own.fixed_bytes),
            source="test",
            machine_available_bytes=self.there_bytes,
            limits=(),
            own=own,
        )

    def clock(self) -> float:
        self.seconds += 0.4  # promotions dwell a second and three steps
        return self.seconds

    @initialize(
        path=st.sampled_from(list(Path)),
        over_tiles=st.booleans(),
        engine=st.sampled_from(["posix", "auto"]),
        late_writes=st.booleans(),
        tile_tokens=st.sampled_from([None, 4, 16]),
        tokens_max=st.sampled_from([None, 5000]),
        budget=st.sampled_from([14 * MIB, 64 * MIB]),
        lookahead=st.sampled_from([1, 4]),
        batch=st.sampled_from([1, 2, 5]),
        checksums=st.sampled_from(["all", "sample", "off"]),
        dma=st.booleans(),
        mode=st.sampled_from(get_args(PipelineMode)),
    )
    def open(
        self,
        path: Path,
        over_tiles: bool,
        engine: str,
        late_writes: bool,
        tile_tokens: int | None,
        tokens_max: int | None,
        budget: int,
        lookahead: int,
        batch: int,
        checksums: ChecksumMode,
        dma: bool,
        mode: PipelineMode,
    ) -> None:
        self.batch = batch
        self.over_tiles = over_tiles
        if path is Path.MEMORY:
            self.pipeline = MemoryKV(torch.device("cpu"), tile_tokens, tokens_max)
            return
        config = EngineConfig(
            tile_tokens=tile_tokens,
            staging_bytes=512 * KIB,
            lookahead=lookahead,
            checksums=checksums,
            pipeline=mode,
        )
        opened = open_engine(engine, queue_depth=4, chunk_bytes=64 * KIB)
        if late_writes:  # reads that do not wait for them would overtake
            late = Fault(op=Op.WRITE, errno=None, latency_seconds=0.002, times=None)
            opened = FaultyEngine(opened, [late])
        store = Store.open(None, opened, capacity_bytes=1024 * MIB)
        self.there_bytes = self.roomy_bytes = budget
        self.pipeline = KVPipeline(
            store,
            opened,
            KVSettings(
                path=path,
                budget_bytes=budget,
                layer_count=len(LAYERS),
                tokens_max=tokens_max,
                device=torch.device("cpu"),
                config=config,
                over_tiles=over_tiles,
                memory=MemorySource(asked_bytes=None, read=self.memory, clock=self.clock),
                copies=SimulatedDma(latency_seconds=0.0002) if dma else copies_for,
            ),
        )

    @property
    def tokens(self) -> int:
        return self.model[0][0].shape[2] if self.model else 0

    def rows(self, layer: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        heads, *dims = LAYERS[layer]
        made = [
            torch.randn(self.batch, heads, count, dim, generator=self.generator) for dim in dims
        ]
        return made[0], made[1]

    def grown(
        self, layer: int, new: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's keys and values with `new`, in the model too."""
        old = self.model.get(layer, tuple(rows[:, :, :0] for rows in new))
        keys, values = (torch.cat(pair, dim=2) for pair in zip(old, new, strict=True))
        self.model[layer] = (keys, values)
        return keys, values

    @rule(count=st.one_of(st.integers(1, 5), st.integers(1, 300)))
    def update(self, count: int) -> None:
        if self.tokens + count > 1500 or self.over_tiles:
            return
        for layer in range(len(LAYERS)):
            new = self.rows(layer, count)
            got = self.pipeline.update(layer, *new)
            want = self.grown(layer, new)
            assert torch.equal(got[0], want[0]), "keys differ"
            assert torch.equal(got[1], want[1]), "values differ"
            assert self.pipeline.tokens(layer) == want[0].shape[2]

    @rule(
        count=st.one_of(st.integers(1, 5), st.integers(1, 300)),
        group=st.integers(1, 3),
        padding=st.lists(st.integers(0, 100), min_size=6, max_size=6),
    )
    def attend(self, count: int, group: int, padding: list[int]) -> None:
        if self.tokens + count > 1500:
            return
        starts = torch.tensor(padding[: self.batch]).clamp(max=self.tokens)
        for layer, (heads, dim, _) in enumerate(LAYERS):
            new = self.rows(layer, count)
            shape = (self.batch, heads * group, count, dim)
            query = AttentionQuery(
                query=torch.randn(shape, generator=self.generator),
                past=self.tokens if layer == 0 else self.tokens - count,
                scaling=dim**-0.5,
                first_visible=starts if padding[0] % 2 else None,
            )
            got = self.pipeline.offer(layer, *new).attend(query)
            keys, values = (x.repeat_interleave(group, 1) for x in self.grown(layer, new))
            seen = query.visible(0, keys.shape[2])
            want = scaled_dot_product_attention(query.query, keys, values, attn_mask=seen)
            torch.testing.assert_close(got, want.transpose(1, 2), rtol=1e-4, atol=1e-5)

    @rule(count=st.integers(1, 200))
    def append(self, count: int) -> None:
        if self.tokens + count > 1500:
            return
        for layer in range(len(LAYERS)):
            new = self.rows(layer, count)
            self.pipeline.append(layer, *new)
            self.grown(layer, new)

    @precondition(lambda self: self.tokens > 0)
    @rule(data=st.data())
    def crop(self, data: st.DataObject) -> None:
        some = st.one_of(st.integers(0, min(5, self.tokens)), st.integers(0, self.tokens))
        count = data.draw(some)
        for layer, (keys, values) in list(self.model.items()):
            self.pipeline.crop(layer, count)
            left = keys.shape[2] - count
            self.model[layer] = (keys[:, :, :left], values[:, :, :left])
            assert self.pipeline.tokens(layer) == left

    @precondition(lambda self: self.tokens > 0)
    @rule(data=st.data())
    def select(self, data: st.DataObject) -> None:
        indices = data.draw(st.lists(st.integers(0, self.batch - 1), min_size=1, max_size=6))
        chosen = torch.tensor(indices)
        for layer, (keys, values) in list(self.model.items()):
            self.pipeline.select(layer, chosen)
            self.model[layer] = (keys[chosen], values[chosen])
        self.batch = len(indices)

    @rule(percent=st.sampled_from([0, 40, 60, 80, 90, 100, 100, 200]))
    def change_the_memory_there_is(self, percent: int) -> None:
        self.there_bytes = self.roomy_bytes * percent // 100

    @rule(recall=st.booleans())
    def record(self, recall: bool) -> None:
        for layer in range(len(LAYERS)):
            self.pipeline.set_recall(layer, recall)

    @rule(batch=st.sampled_from([1, 3]))
    def reset(self, batch: int) -> None:
        self.pipeline.reset()
        self.model.clear()
        self.batch = batch

    def teardown(self) -> None:
        if isinstance(self.pipeline, KVPipeline):
            use = self.pipeline.memory_use()
            planned = use.page_cache_planned_bytes
            fixed = use.staging_bytes + use.gather_bytes + use.tail_bytes + use.table_bytes
            assert fixed <= 2 * self.roomy_bytes
            assert planned == 0 or fixed + planned <= use.budget_bytes
            totals = self.pipeline.checksums.totals()
            assert totals.mismatches == 0, "a false alarm"
            if totals.mode == "all":
                written = self.pipeline.transfers().written_bytes
                assert totals.made_bytes == written, "a tile was stored without a checksum"
            for event in self.pipeline.events():
                assert (event.from_bytes > event.to_bytes) == (event.demoted_units > 0)
        if self.pipeline is not None:
            self.pipeline.close()


TestKVMachine = KVMachine.TestCase
TestKVMachine.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)
