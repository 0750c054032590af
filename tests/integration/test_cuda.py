"""A model on a GPU: pinned staging, copies on a side stream, the same tokens and logits."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from dualblade import DualBladeCache, EngineConfig
from dualblade.bench.decode import DecodeBenchOptions, run_decode_bench
from tests.integration.tiny_models import prompt, tiny_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")


@pytest.mark.parametrize("path", ["memory", "page-cache", "direct", "dual"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_greedy_is_bit_equal_on_cuda(path: str, dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype).to("cuda")
    inputs = {name: tensor.to("cuda") for name, tensor in prompt(batch=3, pad=5).items()}
    settings = {
        "max_new_tokens": 150,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    want = model.generate(**inputs, cache=DynamicCache(config=model.config), **settings)
    with DualBladeCache.for_model(model, memory_budget="16MiB", path=path) as cache:
        got = model.generate(**inputs, cache=cache, **settings)
    assert torch.equal(got.sequences, want.sequences)
    for ours, theirs in zip(got.logits, want.logits, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("attention", ["exact", "tiles"])
def test_many_tiles_through_few_slots_on_cuda(attention: str) -> None:
    """Slots go round while copies out of them and into them are under way."""
    model = tiny_model("llama", torch.float32).to("cuda")
    inputs = {name: tensor.to("cuda") for name, tensor in prompt(batch=2, tokens=3000).items()}
    settings = {"max_new_tokens": 40, "do_sample": False, "prefill_chunk_size": 400}
    want = model.generate(**inputs, cache=DynamicCache(config=model.config), **settings)
    config = EngineConfig(staging_bytes=512 << 10, checksums="all")
    with DualBladeCache.for_model(
        model, memory_budget="32MiB", path="direct", attention=attention, config=config
    ) as cache:
        got = model.generate(**inputs, cache=cache, **settings)
        stats = cache.stats()
    assert torch.equal(got, want)
    assert stats.attention == attention
    assert stats.stages.copies_seconds < stats.stages.wall_seconds


def test_beams_and_crops_on_cuda() -> None:
    model = tiny_model().to("cuda")
    inputs = {name: tensor.to("cuda") for name, tensor in prompt(batch=2, pad=5).items()}
    for options in ({"num_beams": 3}, {"num_beams": 1, "prefill_chunk_size": 30}):
        settings = {"max_new_tokens": 100, "do_sample": False, **options}
        want = model.generate(**inputs, cache=DynamicCache(config=model.config), **settings)
        with DualBladeCache.for_model(model, memory_budget="16MiB") as cache:
            got = model.generate(**inputs, cache=cache, **settings)
        assert torch.equal(got, want)


def test_offloaded_cache_is_a_mode_of_the_benchmarks() -> None:
    options = DecodeBenchOptions(
        model="random:llama?layers=4,hidden=64,heads=4,kv_heads=2,vocab=100,positions=1024",
        context=512,
        steps=3,
        attention="exact",
        modes=("dynamic-cache", "offloaded-cache", "dual"),
    )
    result = run_decode_bench(options)
    assert [run["error"] for run in result["runs"]] == [None] * 3
    assert result["tokens_agree"] is True
