"""What a small budget is divided into, where staging takes more than its share."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dualblade import BudgetError, DualBladeCache, EngineConfig
from dualblade.metrics import CacheStats
from dualblade.units import KIB, MIB

CONFIG = LlamaConfig(
    num_hidden_layers=16,
    hidden_size=64,
    num_attention_heads=16,
    num_key_value_heads=16,
    head_dim=64,
    intermediate_size=64,
    vocab_size=64,
    max_position_embeddings=512,
)
"""64 KiB of KV a token in bfloat16."""


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG).to(torch.bfloat16).eval()


def run(model: LlamaForCausalLM, cache: DualBladeCache, batch: int) -> CacheStats:
    with torch.inference_mode():
        model(torch.ones(batch, 40, dtype=torch.long), cache=cache)
        model(torch.ones(batch, 1, dtype=torch.long), cache=cache)
    return cache.stats()


def open_cache(model: LlamaForCausalLM, budget_bytes: int) -> DualBladeCache:
    return DualBladeCache.for_model(
        model, path="direct", attention="tiles", memory_budget=budget_bytes
    )


def test_staging_of_a_small_budget_is_more_than_an_eighth(model: LlamaForCausalLM) -> None:
    with open_cache(model, 128 * MIB) as cache:
        memory = run(model, cache, 1).memory
    assert memory.staging_bytes == 48 * MIB


def test_many_sequences_have_tiles_of_sixteen_tokens(model: LlamaForCausalLM) -> None:
    with open_cache(model, 128 * MIB) as cache:
        memory = run(model, cache, 64).memory
    assert memory.tail_bytes == 64 * MIB
    assert memory.staging_bytes == 16 * MIB
    assert memory.used_bytes <= 128 * MIB


@pytest.mark.parametrize("budget_bytes", [96 * MIB, 128 * MIB, 144 * MIB, 160 * MIB])
def test_after_one_sequence_there_is_room_for_many(
    model: LlamaForCausalLM, budget_bytes: int
) -> None:
    """Staging keeps what the first prompt gave it; tails of the second make do with the rest."""
    with open_cache(model, budget_bytes) as cache:
        first = run(model, cache, 1).memory
        cache.reset()
        then = run(model, cache, 64).memory
    assert then.staging_bytes == first.staging_bytes
    assert then.used_bytes <= budget_bytes


def test_taking_back_tokens_finds_room_for_tails_of_two_tiles(model: LlamaForCausalLM) -> None:
    with open_cache(model, 64 * MIB) as cache:
        before = run(model, cache, 8).memory
        cache.activate_past_recording()
        after = run(model, cache, 8).memory
        cache.end_recording()
        then = run(model, cache, 8).memory
    assert after.tail_bytes == 2 * before.tail_bytes
    assert after.used_bytes <= 64 * MIB
    assert then.tail_bytes == before.tail_bytes


def test_what_is_refused_while_recording_has_made_no_tail_longer(model: LlamaForCausalLM) -> None:
    def cache_of(budget_bytes: int) -> DualBladeCache:
        return DualBladeCache.for_model(
            model,
            path="direct",
            attention="exact",
            memory_budget=budget_bytes,
            max_tokens=200,
            config=EngineConfig(staging_bytes=8 * MIB, tile_tokens=64),
        )

    with cache_of(512 * MIB) as cache:
        used = run(model, cache, 8).memory
    assert used.tail_bytes == 8 * 64 * 64 * KIB
    with cache_of(used.used_bytes + used.tail_bytes // 2) as cache:
        run(model, cache, 8)
        cache.activate_past_recording()
        with pytest.raises(BudgetError, match="too small"):
            run(model, cache, 8)
        assert cache.stats().memory.tail_bytes == used.tail_bytes
        cache.end_recording()
        assert run(model, cache, 8).tokens == 82
        cache.reset()
        cache.activate_past_recording()  # as candidates do before the first pass
        with pytest.raises(BudgetError, match="too small"):
            run(model, cache, 8)
        cache.end_recording()
        assert run(model, cache, 8).tokens == 41


def test_staging_gives_way_where_all_kv_just_fits(model: LlamaForCausalLM) -> None:
    """512 tokens of two sequences have 64 MiB; margin, tails and a group of tiles 30."""
    staging = {}
    for path in ("dual", "direct"):
        with DualBladeCache.for_model(
            model, path=path, attention="tiles", memory_budget=128 * MIB, max_tokens=512
        ) as cache:
            stats = run(model, cache, 2)
        staging[path] = stats.memory.staging_bytes
    assert staging == {"dual": 32 * MIB, "direct": 48 * MIB}


def test_a_plan_counts_the_tiles_that_are_stored(model: LlamaForCausalLM) -> None:
    """Of 100 tokens 64 fill a tile; the others stay in the tail."""
    with DualBladeCache.for_model(
        model, attention="tiles", memory_budget=128 * MIB, max_tokens=100
    ) as cache:
        stats = run(model, cache, 1)
    assert sum(unit.bytes for unit in stats.plan) == 64 * 64 * KIB
