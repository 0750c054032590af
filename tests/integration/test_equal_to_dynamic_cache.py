"""Tokens and logits equal those of transformers' DynamicCache, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

import dualblade
from dualblade import EngineConfig
from tests.integration.tiny_models import EAGER_ONLY, FAMILIES, prompt, tiny_model

PATHS = ("memory", "page-cache", "direct", "dual")
STORED_PATHS = PATHS[1:]
NEW_TOKENS = 70  # crosses a tile's edge at least once


def generate(model: PreTrainedModel, cache: Any, inputs: dict[str, Any], **options: Any) -> Any:
    torch.manual_seed(3)  # for sampling
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **options}
    return model.generate(
        **inputs,
        cache=cache,
        return_dict_in_generate=True,
        output_logits=True,
        **settings,
    )


def assert_equal(model: PreTrainedModel, path: str, inputs: dict[str, Any], **options: Any) -> None:
    expected = generate(model, DynamicCache(config=model.config), inputs, **options)
    # Half of it each way: so little KV would all fit the page cache.
    config = EngineConfig(cache_percent=50) if path == "dual" else None
    with dualblade.DualBladeCache.for_model(
        model, memory_budget="16MiB", path=path, attention="exact", config=config
    ) as cache:
        actual = generate(model, cache, inputs, **options)
        stats = cache.stats()
    assert torch.equal(actual.sequences, expected.sequences)
    for step, (ours, theirs) in enumerate(zip(actual.logits, expected.logits, strict=True)):
        assert torch.equal(ours, theirs), f"logits differ at step {step}"
    assert (stats.io.direct_write_bytes > 0) == (path in ("direct", "dual"))
    assert (stats.io.page_cache_write_bytes > 0) == (path in ("page-cache", "dual"))


GREEDY_CASES = [
    pytest.param(family, dtype, attention, id=f"{family}-{attention}-{name}")
    for family in FAMILIES
    for attention in ("sdpa", "eager")
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    if attention == "eager" or family not in EAGER_ONLY
]


@pytest.mark.parametrize(("family", "dtype", "attention"), GREEDY_CASES)
def test_greedy_is_bit_equal(family: str, dtype: torch.dtype, attention: str) -> None:
    assert_equal(tiny_model(family, dtype, attention), "direct", prompt())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_path_is_bit_equal(family: str, path: str) -> None:
    assert_equal(tiny_model(family), path, prompt(batch=3, pad=7))


@pytest.mark.parametrize("path", PATHS)
def test_beams(path: str) -> None:
    assert_equal(tiny_model(), path, prompt(batch=2, pad=5), num_beams=3, num_return_sequences=2)


@pytest.mark.parametrize("path", PATHS)
def test_sampling_with_a_seed(path: str) -> None:
    assert_equal(tiny_model(), path, prompt(batch=2), do_sample=True, temperature=0.8)


@pytest.mark.parametrize("path", PATHS)
def test_prompt_lookup(path: str) -> None:
    model, inputs = tiny_model(), prompt(tokens=60)
    inputs = {name: torch.cat([tensor, tensor], dim=1) for name, tensor in inputs.items()}
    assert_equal(model, path, inputs, prompt_lookup_num_tokens=6)


@pytest.mark.parametrize("path", PATHS)
def test_assisted_by_a_smaller_model(path: str) -> None:
    model, assistant = tiny_model(), tiny_model("qwen2")
    assert_equal(model, path, prompt(), assistant_model=assistant)


@pytest.mark.parametrize("path", PATHS)
def test_prefill_in_chunks(path: str) -> None:
    model, inputs = tiny_model(), prompt(tokens=300)
    assert_equal(model, path, inputs, prefill_chunk_size=90)


@pytest.mark.parametrize("path", PATHS)
def test_calls_that_continue_one_cache_and_reset(path: str) -> None:
    model, inputs = tiny_model(), prompt()
    with dualblade.DualBladeCache.for_model(
        model, memory_budget="16MiB", path=path, attention="exact"
    ) as cache:
        theirs = DynamicCache(config=model.config)
        for _ in range(3):
            expected = generate(model, theirs, inputs).sequences
            actual = generate(model, cache, inputs).sequences
            assert torch.equal(actual, expected)
            more = torch.cat([expected, inputs["input_ids"][:, :9]], dim=1)
            inputs = {"input_ids": more, "attention_mask": torch.ones_like(more)}
        cache.reset()
        assert cache.get_seq_length() == 0
        fresh = generate(model, DynamicCache(config=model.config), prompt(batch=2)).sequences
        assert torch.equal(generate(model, cache, prompt(batch=2)).sequences, fresh)


def test_sliding_layers_stay_in_memory() -> None:
    model = tiny_model("gemma3")
    with dualblade.DualBladeCache.for_model(model, memory_budget="16MiB") as cache:
        generate(model, cache, prompt())
        stats = cache.stats()
    kinds = [type(layer).__name__ for layer in cache.layers]
    assert kinds == ["DynamicSlidingWindowLayer", "StoredLayer", "DynamicSlidingWindowLayer"]
    assert (stats.offloaded_layers, stats.memory_layers) == (1, 2)
