"""Phi-3 and its like: rotations that change with the text's length, windows that never bind."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from transformers import DynamicCache, Phi3Config, PreTrainedModel

import dualblade
from dualblade import DualBladeCache, EngineConfig
from dualblade.bench.decode_rows import kv_bytes, probe_layers
from dualblade.config import Path as KVPath
from dualblade.errors import Unsupported
from dualblade.hf import tile_attention
from dualblade.hf.boundary import check_text
from dualblade.hf.plan import PlanRequest, plan_cache
from dualblade.units import MIB
from tests.integration.tiny_models import model_of, prompt

BOUNDARY = 96
POSITIONS = 512
HALF_DIM = 8
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": BOUNDARY,
    "short_factor": [1.0] * HALF_DIM,
    "long_factor": [float(4 + at) for at in range(HALF_DIM)],
}


def phi3(**more: Any) -> PreTrainedModel:
    config = Phi3Config(
        vocab_size=128,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        max_position_embeddings=POSITIONS,
        original_max_position_embeddings=BOUNDARY,
        pad_token_id=0,
        **{"rope_parameters": LONG_ROPE, **more},
    )
    return model_of(config)


def generated(model: Any, inputs: dict[str, torch.Tensor], cache: Any, **more: Any) -> list[int]:
    options = {"max_new_tokens": 20, "do_sample": False, **more}
    found: list[int] = model.generate(**inputs, cache=cache, **options)[0].tolist()
    return found


def cache_for(model: PreTrainedModel, **more: Any) -> DualBladeCache:
    return DualBladeCache.for_model(model, memory_budget="16MiB", path="direct", **more)


@pytest.mark.parametrize("tokens", [60, 90, 150])
def test_a_text_given_whole_gets_the_tokens_of_transformers_cache(tokens: int) -> None:
    """Below the boundary, over it while decoding, and beyond it from the first."""
    model = phi3()
    expected = generated(model, prompt(tokens=tokens), DynamicCache(config=model.config))
    with cache_for(model, attention="exact") as cache:
        assert generated(model, prompt(tokens=tokens), cache) == expected
        assert cache.get_seq_length() == (79 if tokens == 60 else BOUNDARY if tokens == 90 else 0)


def test_a_text_in_chunks_that_passes_the_boundary_is_refused_before_any() -> None:
    model = phi3()
    whole = generated(model, prompt(tokens=150), DynamicCache(config=model.config))
    chunks = generated(
        model, prompt(tokens=150), DynamicCache(config=model.config), prefill_chunk_size=50
    )
    assert whole != chunks, "what is refused would have been wrong"
    with cache_for(model) as cache:
        with pytest.raises(Unsupported, match=f"where a text passes {BOUNDARY} tokens") as caught:
            generated(model, prompt(tokens=150), cache, prefill_chunk_size=50)
        assert "use_long_rope" in str(caught.value.hint)
        assert cache.get_seq_length() == 0
        # A chunk of all of it is the text given whole, and so is one that passes the boundary.
        for chunk in (150, 120):
            given = {"prefill_chunk_size": chunk}
            assert generated(model, prompt(tokens=150), cache, **given) == whole
        below = generated(model, prompt(tokens=60), cache, prefill_chunk_size=16)
        assert len(below) == 80


def test_a_text_that_goes_on_over_the_boundary_is_refused_in_chunks_and_in_a_loop() -> None:
    model = phi3()
    with torch.no_grad(), cache_for(model) as cache:
        first = torch.tensor([generated(model, prompt(tokens=60), cache)])
        held = cache.get_seq_length()
        longer = torch.cat([first, prompt(tokens=60, seed=4)["input_ids"]], dim=1)
        text = {"input_ids": longer, "attention_mask": torch.ones_like(longer)}
        with pytest.raises(Unsupported, match=f"the cache holds {held} of 140"):
            generated(model, text, cache, prefill_chunk_size=200)
        with pytest.raises(Unsupported, match=f"the cache holds {held} of 140"):
            model(longer[:, held:], cache=cache)
        assert cache.get_seq_length() == held
        expected = generated(model, text, DynamicCache(config=model.config))
        assert generated(model, text, cache) == expected, "computed anew"


def test_a_loop_beyond_the_boundary_from_the_first_goes_on() -> None:
    model = phi3()
    ids = prompt(tokens=150)["input_ids"]
    with torch.no_grad(), cache_for(model, attention="exact") as cache:
        theirs = DynamicCache(config=model.config)
        for at in (slice(0, 120), slice(120, 150)):
            expected = model(ids[:, at], cache=theirs).logits
            assert torch.equal(model(ids[:, at], cache=cache).logits, expected)


@pytest.mark.parametrize("attention", ["exact", "tiles"])
def test_long_rotations_from_the_first_token_keep_a_long_text_in_the_store(attention: str) -> None:
    """What transformers computes of one that passes the boundary at once, in chunks."""
    expected = generated(phi3(), prompt(tokens=150), DynamicCache(config=phi3().config))
    model = phi3()
    assert dualblade.use_long_rope(model)
    assert not dualblade.use_long_rope(model), "nothing is left to change"
    with cache_for(model, attention=attention) as cache:
        assert generated(model, prompt(tokens=150), cache, prefill_chunk_size=40) == expected
        assert cache.get_seq_length() == 169
        cache.reset()
        generated(model, prompt(tokens=60), cache, max_new_tokens=80)
        assert cache.get_seq_length() == 139, "over the boundary while it decodes"


def test_one_without_long_rotations_goes_on_in_chunks() -> None:
    """As those of .gguf files are: transformers forgets their text all the same."""
    plain: Any = {"rope_type": "default", "rope_theta": 10000.0}
    model = phi3(rope_parameters=plain)
    whole = generated(model, prompt(tokens=150), DynamicCache(config=model.config))
    with cache_for(model) as cache:
        assert generated(model, prompt(tokens=150), cache, prefill_chunk_size=40) == whole
    assert dualblade.use_long_rope(model)
    with cache_for(model) as cache:
        assert generated(model, prompt(tokens=60), cache, max_new_tokens=110) is not None
        assert cache.get_seq_length() == 169, "not forgotten any more"


def test_the_boundary_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    model = phi3()
    with caplog.at_level(logging.WARNING, logger="dualblade.hf"):
        cache_for(model, max_tokens=BOUNDARY).close()
        assert not caplog.records
        cache_for(model).close()
    (record,) = caplog.records
    assert f"where it passes {BOUNDARY} tokens" in record.getMessage()
    assert "use_long_rope" in record.getMessage()


def test_phi4_multimodal_is_refused_to_pass_the_boundary_while_it_decodes() -> None:
    config: Any = phi3().config
    config.model_type = "phi4_multimodal"
    check_text(config, 0, 60, 90, None)
    check_text(config, 0, 150, 170, None)
    with pytest.raises(Unsupported, match="without what was before") as caught:
        check_text(config, 0, 90, 110, None)
    assert "7 new tokens" in str(caught.value.hint)
    with pytest.raises(Unsupported, match="without what was before") as caught:
        check_text(config, 60, 140, 160, None)
    assert "reset() the cache" in str(caught.value.hint)


@pytest.mark.parametrize("attention", ["exact", "tiles"])
def test_a_window_as_wide_as_all_positions_is_full_attention(
    attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = tile_attention.sdpa_mask

    def no_mask(batch: int, queries: int, tokens: int, *rest: Any, **more: Any) -> Any:
        """But for the first chunk, where nothing is stored and sdpa attends."""
        assert queries == tokens, "it grows with chunk times context"
        return dense(batch, queries, tokens, *rest, **more)

    model = phi3(sliding_window=POSITIONS)
    expected = generated(model, prompt(2, tokens=70, pad=5), DynamicCache(config=model.config))
    with cache_for(model, attention=attention) as cache:
        given = {"prefill_chunk_size": 32}
        if attention == "tiles":
            monkeypatch.setattr(tile_attention, "sdpa_mask", no_mask)
        assert generated(model, prompt(2, tokens=70, pad=5), cache, **given) == expected
        stats = cache.stats()
        assert (stats.offloaded_layers, stats.memory_layers) == (3, 0)
        assert stats.io.direct_read_bytes > 0
    request = PlanRequest.of(
        model, tokens=400, batch=1, budget_bytes=16 * MIB, path=KVPath.DIRECT, engine=EngineConfig()
    )
    planned = plan_cache(model.config, request).kv_bytes
    assert planned == 400 * 3 * 2 * 2 * 16 * 4
    assert kv_bytes(probe_layers(model), 1, 400) == planned, "what benchmarks fill"


def test_a_window_that_binds_stays_in_memory() -> None:
    with pytest.raises(Unsupported, match="no full-attention layers"):
        cache_for(phi3(sliding_window=POSITIONS - 1))
