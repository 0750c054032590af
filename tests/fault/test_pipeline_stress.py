"""Random schedules against a drive and a copy engine that fail, stall or are interrupted: the right
rows or an error, and afterwards no thread, slot or transfer that is stuck.

What goes wrong is drawn with the schedule from one seed: EIO at a random read or write, a copy
that fails, KeyboardInterrupt at a random line of the pipeline, a slow drive, or nothing.
"""

from __future__ import annotations

import errno
import random
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from dualblade import pipeline
from dualblade.config import EngineConfig
from dualblade.config import Path as KVPath
from dualblade.errors import Closed, DeviceError
from dualblade.io import Op, open_engine
from dualblade.pipeline import KVPipeline, KVSettings
from dualblade.pipeline.copies import copies_for
from dualblade.store import Store
from dualblade.testing import Fault, FaultyEngine, SimulatedDma
from dualblade.units import KIB, MIB

BATCHES, SCHEDULES_A_BATCH = 8, 250
LAYERS, HEADS, DIM = 3, 2, 16
PIPELINE = str(Path(pipeline.__file__).parent)
TROUBLES = ("none", "read", "write", "copy", "interrupt", "slow")


def rows(tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(1, HEADS, tokens, DIM, generator=generator) for _ in range(2))
    return keys, values


@contextmanager
def interrupted_at(line: int | None) -> Iterator[None]:
    """KeyboardInterrupt at the `line`-th line of the pipeline that runs inside, in this thread."""
    left = line

    def each_line(_frame: FrameType, event: str, _arg: Any) -> Any:
        nonlocal left
        if event == "line" and left is not None:
            left -= 1
            if left < 0:
                left = None
                sys.settrace(None)
                raise KeyboardInterrupt
        return each_line

    def each_call(frame: FrameType, _event: str, _arg: Any) -> Any:
        return each_line if frame.f_code.co_filename.startswith(PIPELINE) else None

    if line is not None:
        sys.settrace(each_call)
    try:
        yield
    finally:
        sys.settrace(None)


class Schedule:
    """One pipeline and what happens to it."""

    def __init__(self, seed: int, trouble: str | None = None) -> None:
        self.random = random.Random(seed)
        self.trouble = trouble or self.random.choice(TROUBLES)
        self.engine = FaultyEngine(
            open_engine("posix", queue_depth=2, chunk_bytes=64 * KIB), self._faults()
        )
        with_dma = self.trouble == "copy" or self.random.random() < 0.5
        self.dma = (
            SimulatedDma(
                latency_seconds=self.random.choice([0, 0, 0.0003]),
                fail_nth=self.random.randrange(40) if self.trouble == "copy" else None,
            )
            if with_dma
            else None
        )
        settings = KVSettings(
            path=self.random.choice([KVPath.DIRECT, KVPath.PAGE_CACHE, KVPath.DUAL]),
            budget_bytes=16 * MIB,
            layer_count=LAYERS,
            tokens_max=None,
            device=torch.device("cpu"),
            config=EngineConfig(
                staging_bytes=512 * KIB, lookahead=self.random.choice([1, 4]), tile_tokens=16
            ),
            over_tiles=False,
            copies=self.dma or copies_for,
        )
        store = Store.open(None, self.engine, capacity_bytes=64 * MIB)
        self.kv = KVPipeline(store, self.engine, settings)
        self.model = {layer: rows(0, 0) for layer in range(LAYERS)}
        self.under_way = 0, self.model[0]

    def _faults(self) -> list[Fault]:
        nth = self.random.randrange(60)
        if self.trouble == "read":
            return [
                Fault(op=Op.READ, nth=nth, errno=errno.EIO, times=self.random.choice([1, None]))
            ]
        if self.trouble == "write":
            return [Fault(op=Op.WRITE, nth=nth, errno=errno.EIO)]
        if self.trouble == "slow":
            late = {"errno": None, "latency_seconds": 0.001, "times": None}
            return [Fault(op=op, **late) for op in (Op.READ, Op.WRITE)]
        return []

    def run(self) -> None:
        """Some steps, compared with plain tensors. Raises: what went wrong."""
        line = self.random.randrange(6000) if self.trouble == "interrupt" else None
        with interrupted_at(line):
            for step in range(self.random.randrange(2, 7)):
                if self.random.random() < 0.15:
                    self.crop(self.random.randrange(1, 40))
                self.step(self.random.choice([1, 1, 3, 16, 40, 120]), step)

    def step(self, tokens: int, seed: int) -> None:
        for layer in range(LAYERS):
            new = rows(tokens, 10 * seed + layer)
            pairs = zip(self.model[layer], new, strict=True)
            together = [torch.cat(pair, dim=2) for pair in pairs]
            self.under_way = layer, (together[0], together[1])
            got = self.kv.update(layer, *new)
            self.model[layer] = together[0], together[1]
            assert torch.equal(got[0], together[0])
            assert torch.equal(got[1], together[1])

    def crop(self, tokens: int) -> None:
        if tokens > self.model[0][0].shape[2]:
            return
        for layer, (keys, values) in self.model.items():
            left = keys.shape[2] - tokens
            self.under_way = layer, (keys[:, :, :left], values[:, :, :left])
            self.kv.crop(layer, tokens)
            self.model[layer] = self.under_way[1]

    def check_after(self, error: BaseException) -> None:
        """Unusable from then on, unless the interrupt came between two steps."""
        layer, changed = self.under_way
        if self.kv.tokens(layer) == changed[0].shape[2]:  # interrupted on the way back
            self.model[layer] = changed
        tokens = {pair[0].shape[2] for pair in self.model.values()}
        try:
            self.step(1, 99)
        except Closed:
            return
        assert isinstance(error, KeyboardInterrupt), "the error is forgotten"
        assert len(tokens) == 1, "half a step was taken for a whole one"

    def close(self) -> None:
        machinery = self.kv._machinery
        if self.trouble == "interrupt":  # the end, too
            with interrupted_at(self.random.randrange(60)), suppress(KeyboardInterrupt):
                self.kv.close()
        self.kv.close()
        assert self.kv._machinery is None
        if machinery is not None:
            assert not machinery.writes._writes
        self.engine.drain(timeout_seconds=0)
        assert self.engine.held == 0
        assert self.dma is None or machinery is None or not self.dma.is_running
        if self.dma is not None and machinery is None:
            self.dma.close()


@pytest.mark.parametrize("batch", range(BATCHES))
def test_nothing_is_stuck_after_any_schedule(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Asking the kernel for huge pages would take longer than the schedules.
    monkeypatch.setattr("dualblade.io.arena._huge_bytes", lambda _address, size_bytes: size_bytes)
    threads = threading.active_count()
    seen = dict.fromkeys(TROUBLES, 0)
    for seed in range(batch * SCHEDULES_A_BATCH, (batch + 1) * SCHEDULES_A_BATCH):
        schedule = Schedule(seed)
        try:
            schedule.run()
        except (DeviceError, RuntimeError, KeyboardInterrupt) as error:
            assert schedule.trouble not in ("none", "slow"), f"seed {seed}"
            seen[schedule.trouble] += 1
            schedule.check_after(error)
        finally:
            schedule.close()
    assert min(seen[trouble] for trouble in ("read", "write", "copy", "interrupt")) > 0, seen
    assert threading.active_count() == threads, "a thread is stuck"


@pytest.mark.parametrize("batch", range(2))
def test_a_reset_that_is_interrupted_is_done_by_the_next(
    batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any line: what goes on without one is right or refused, and the next prompt is right."""
    monkeypatch.setattr("dualblade.io.arena._huge_bytes", lambda _address, size_bytes: size_bytes)
    interrupted = refused = 0
    for seed in range(batch * 200, (batch + 1) * 200):
        schedule = Schedule(seed, trouble="slow" if seed % 3 == 0 else "none")
        try:
            for step, tokens in enumerate((200, 1, 1)):
                schedule.step(tokens, step)
            try:
                with interrupted_at(schedule.random.randrange(150)):
                    schedule.kv.reset()
            except KeyboardInterrupt:
                interrupted += 1
                if schedule.random.random() < 0.5:
                    if not schedule.kv.tokens(0):  # all was forgotten already
                        schedule.model = {layer: rows(0, 0) for layer in range(LAYERS)}
                    with suppress(Closed):
                        schedule.step(1, 9)
                        refused -= 1
                    refused += 1
                elif schedule.random.random() < 0.5:  # once more
                    with (
                        interrupted_at(schedule.random.randrange(150)),
                        suppress(KeyboardInterrupt),
                    ):
                        schedule.kv.reset()
                    if not schedule.kv.tokens(0):
                        schedule.model = {layer: rows(0, 0) for layer in range(LAYERS)}
                    with suppress(Closed):
                        schedule.step(1, 9)
                schedule.kv.reset()
            schedule.model = {layer: rows(0, 0) for layer in range(LAYERS)}
            for step, tokens in enumerate((300, 1, 17, 1)):
                schedule.step(tokens, 20 + step)
        finally:
            schedule.close()
    assert min(interrupted, refused) > 5, (interrupted, refused)
