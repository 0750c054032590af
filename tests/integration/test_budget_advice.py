"""What a budget that is too small is told does, when it is obeyed."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import PreTrainedModel

from dualblade import BudgetError, DualBladeCache, EngineConfig
from dualblade.hf.models import load_model
from dualblade.units import KIB, MIB, parse_size

WIDE = "random:llama?layers=4,hidden=1024,heads=16,intermediate=64,vocab=300,positions=4096"
"""16 KiB of KV a token and layer in float32."""


@pytest.fixture(scope="module")
def wide() -> PreTrainedModel:
    return load_model(WIDE, dtype=torch.float32, device="cpu").model


def refusal(model: PreTrainedModel, **arguments: object) -> BudgetError:
    with pytest.raises(BudgetError) as caught:
        DualBladeCache.for_model(model, **arguments)  # type: ignore[arg-type]
    return caught.value


@pytest.mark.parametrize("attention", ["tiles", "exact"])
@pytest.mark.parametrize("path", ["dual", "direct", "page-cache"])
@pytest.mark.parametrize("tokens", [None, 3000])
def test_it_is_enough(wide: PreTrainedModel, attention: str, path: str, tokens: int | None) -> None:
    """Words and number alike, for the tokens that were stated, or for a chunk of a prompt."""
    asked = {"path": path, "attention": attention, "max_tokens": tokens}
    refused = refusal(wide, memory_budget=1 * MIB, **asked)
    assert refused.hint is not None
    words = re.search(r"at least (\d+ MiB)", refused.hint)
    assert words is not None
    assert parse_size(words[1]) == refused.needed_bytes
    count = 20
    prompt = torch.randint(0, 300, (1, (tokens or 2048) - count))
    with DualBladeCache.for_model(wide, memory_budget=words[1], **asked) as cache:  # type: ignore[arg-type]
        wide.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            cache=cache,
            max_new_tokens=count,
            min_new_tokens=count,
            prefill_chunk_size=512,
            do_sample=False,
        )
        memory = cache.stats().memory
    if path != "page-cache":  # the kernel caches there as much as it likes
        assert memory.used_bytes <= refused.needed_bytes


def test_it_is_enough_for_a_context_that_outgrew_its_budget(wide: PreTrainedModel) -> None:
    """A new cache gives more of a larger budget to staging and tails than the refused one had."""
    ids, chunk = torch.randint(0, 300, (1, 4096)), 64
    asked = {"path": "direct", "attention": "exact"}

    def fill(cache: DualBladeCache, tokens: int) -> None:
        with torch.inference_mode():
            for first in range(0, tokens, chunk):
                wide(ids[:, first : first + chunk], cache=cache)

    least = refusal(wide, memory_budget=MIB, max_tokens=chunk, **asked).needed_bytes
    with DualBladeCache.for_model(wide, memory_budget=least, **asked) as cache:  # type: ignore[arg-type]
        with pytest.raises(BudgetError, match="is too small") as caught:
            fill(cache, 4096)
        held = cache.get_seq_length()
    assert held > chunk, "the first chunks had room"
    assert caught.value.hint is not None
    words = re.search(r"at least (\d+ MiB), which do for (\d+) tokens", caught.value.hint)
    assert words is not None
    assert parse_size(words[1]) == caught.value.needed_bytes > least
    tokens = int(words[2])
    assert tokens == held + chunk
    with DualBladeCache.for_model(wide, memory_budget=words[1], **asked) as cache:  # type: ignore[arg-type]
        fill(cache, tokens)
        assert cache.get_seq_length() == tokens


def test_staging_that_is_asked_for_is_counted(wide: PreTrainedModel) -> None:
    config = EngineConfig(staging_bytes=40 * MIB)
    assert (refusal(wide, memory_budget="24MiB", config=config).needed_bytes or 0) > 40 * MIB


def test_it_is_little_more_than_the_least(wide: PreTrainedModel) -> None:
    """A larger budget gives more to staging and tails; what is told converges."""
    needed = refusal(wide, memory_budget=64 * KIB).needed_bytes
    assert needed is not None
    assert needed < 32 * MIB
