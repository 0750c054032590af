"""Faults of the device under a generating cache: an error at the right layer, or the right bytes.

Which faults: `dualblade.testing.faulty` says it in prose. Never a wrong row, never a stuck call.
"""

from __future__ import annotations

import errno
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from dualblade import Closed, DeviceError, DualBladeCache, EngineConfig
from dualblade.io import Op, open_engine
from dualblade.pipeline.write_behind import WriteBehind
from dualblade.testing import Fault, FaultyEngine
from dualblade.units import KIB
from tests.integration.tiny_models import tiny_model
from tests.stepping import take_turn

LAYERS, HEADS, DIM = 3, 2, 16
SETTINGS: dict[str, Any] = {
    "memory_budget": "16MiB",
    "config": EngineConfig(staging_bytes=512 * KIB),
}


def rows(tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(1, HEADS, tokens, DIM, generator=generator) for _ in range(2)]
    return made[0], made[1]


@pytest.fixture(params=["exact", "tiles"], autouse=True)
def attention(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Either way into attention, for all caches of a test."""
    monkeypatch.setitem(SETTINGS, "attention", request.param)


def cache_on(path: str) -> DualBladeCache:
    return DualBladeCache.for_model(tiny_model(), path=path, **SETTINGS)


def fill(cache: DualBladeCache, tokens: int = 1000) -> None:
    for layer in range(LAYERS):
        cache.append(*rows(tokens, layer), layer)


def assert_spoiled(cache: DualBladeCache) -> None:
    with pytest.raises(Closed, match="failed earlier"):
        cache.update(*rows(1, 0), 0)
    with pytest.raises(Closed):
        cache.crop(-1)
    cache.close()
    with pytest.raises(Closed, match="is closed"):
        cache.update(*rows(1, 0), 0)


@pytest.mark.parametrize("number", [errno.EIO, 0], ids=["EIO", "short"])
@pytest.mark.parametrize("path", ["direct", "page-cache"])
@pytest.mark.parametrize("layer_of_fault", [0, 1, 2])
def test_a_read_that_fails_ahead_is_raised_at_its_layer(
    faulty: list[FaultyEngine], path: str, number: int, layer_of_fault: int
) -> None:
    cache = cache_on(path)
    fill(cache)
    layer = cache._pipeline._layers[layer_of_fault]
    at = layer.values.unit.segments[0].extent.range
    offsets = range(at.offset, at.end)
    faulty[0].inject(Fault(op=Op.READ, offsets=offsets, errno=number))
    for index in range(layer_of_fault):
        take_turn(cache, *rows(1, index), index)
    with pytest.raises(DeviceError) as caught:
        take_turn(cache, *rows(1, 0), layer_of_fault)
    assert caught.value.errno == number
    assert caught.value.operation == "read"
    assert caught.value.offset in offsets
    assert_spoiled(cache)


@pytest.mark.parametrize(
    ("path", "op"), [("direct", Op.WRITE), ("page-cache", Op.WRITE), ("page-cache", Op.SYNC_RANGE)]
)
def test_a_write_that_fails_behind_is_raised_before_its_bytes_are_needed(
    faulty: list[FaultyEngine], path: str, op: Op
) -> None:
    cache = cache_on(path)
    fill(cache, 64)
    faulty[0].inject(Fault(op=op, errno=errno.EIO))
    with pytest.raises(DeviceError) as caught:
        for step in range(200):
            for layer in range(LAYERS):
                take_turn(cache, *rows(1, step), layer)
    assert caught.value.errno == errno.EIO
    assert step <= 65, "the tile that failed was asked for and not missed"
    assert_spoiled(cache)


def test_a_fault_nobody_waits_for_does_not_hinder_reset_and_close(
    faulty: list[FaultyEngine],
) -> None:
    cache = cache_on("direct")
    fill(cache)
    for layer in range(LAYERS):
        take_turn(cache, *rows(1, layer), layer)  # reads ahead into the next step
    take_turn(cache, *rows(1, 0), 0)
    at = cache._pipeline._layers[0].values.unit.segments[0].extent.range
    offsets = range(at.offset, at.end)
    faulty[0].inject(Fault(op=Op.READ, errno=errno.EIO, offsets=offsets, times=None))
    # Layer 0 has had its turn; its next one is read ahead in those of the others.
    for layer in range(1, LAYERS):
        take_turn(cache, *rows(1, layer), layer)
    assert faulty[0].struck, "nothing was read ahead"
    cache.reset()
    fill(cache, 40)
    cache.close()


@pytest.mark.parametrize("path", ["direct", "page-cache"])
def test_a_write_that_failed_does_not_hinder_another_prompt(
    faulty: list[FaultyEngine], path: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing waits for the last writes but a later step, and there is none: the log is told."""
    cache = cache_on(path)
    fill(cache, 10)
    faulty[0].inject(Fault(op=Op.WRITE, errno=errno.EIO))
    fill(cache, 54)  # a tile of each half
    assert faulty[0].struck
    cache.reset()
    assert "Input/output error; what it was to store was about to be forgotten" in caplog.text
    fill(cache)
    for layer in range(LAYERS):
        take_turn(cache, *rows(1, layer), layer)
    cache.close()


def test_a_reset_that_is_interrupted_keeps_a_failed_write_in_mind(
    faulty: list[FaultyEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was told to the log and forgotten, and its bytes are not there."""
    cache = cache_on("direct")
    fill(cache, 10)
    faulty[0].inject(Fault(op=Op.WRITE, errno=errno.EIO))
    fill(cache, 54)
    pipeline = cache._pipeline
    forget = WriteBehind.forget

    def interrupted(writes: WriteBehind) -> None:
        forget(writes)
        raise KeyboardInterrupt

    monkeypatch.setattr(WriteBehind, "forget", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pipeline.reset()
    monkeypatch.undo()
    with pytest.raises(Closed, match="did not come to an end"):
        pipeline.update(0, *rows(1, 0))
    pipeline.reset()
    assert pipeline.tokens(0) == 0
    cache.close()


def test_random_faults_give_an_error_or_the_right_output() -> None:
    """Under attention to what there is, with both doors on the path `dual`."""
    struck = 0

    @settings(max_examples=40, deadline=None)
    @given(
        seed=st.integers(0, 2**16),
        rate=st.sampled_from([0.002, 0.02]),
        path=st.sampled_from(["direct", "page-cache", "dual"]),
    )
    def check(seed: int, rate: float, path: str) -> None:
        nonlocal struck
        engines: list[FaultyEngine] = []

        def open_faulty(*arguments: Any, **options: Any) -> FaultyEngine:
            engines.append(FaultyEngine(open_engine(*arguments, **options), seed=seed, rate=rate))
            return engines[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("dualblade.hf.opening.open_engine", open_faulty)
            if path == "dual":
                halves = EngineConfig(staging_bytes=512 * KIB, cache_percent=50)
                patch.setitem(SETTINGS, "config", halves)
            cache = cache_on(path)
        held = {layer: rows(0, 0) for layer in range(LAYERS)}
        try:
            for step, tokens in enumerate([300, 1, 64, 1, 200, 1, 1, 1]):
                for layer in range(LAYERS):
                    new = rows(tokens, 10 * step + layer)
                    pairs = zip(held[layer], new, strict=True)
                    keys, values = held[layer] = tuple(torch.cat(pair, dim=2) for pair in pairs)
                    if SETTINGS["attention"] == "exact":
                        got = cache.update(*new, layer)
                        assert torch.equal(got[0], keys)
                        assert torch.equal(got[1], values)
                        continue
                    seen = torch.ones(tokens, keys.shape[2]).tril(keys.shape[2] - tokens).bool()
                    expected = scaled_dot_product_attention(new[0], keys, values, attn_mask=seen)
                    out = take_turn(cache, *new, layer)
                    torch.testing.assert_close(out.transpose(1, 2), expected, rtol=1e-4, atol=1e-4)
            assert cache.stats().attention == SETTINGS["attention"]
        except DeviceError:
            with pytest.raises(Closed):
                take_turn(cache, *rows(1, 0), 0)
        finally:
            cache.close()
        struck += sum(len(engine.struck) for engine in engines)

    check()
    assert struck > 10
