"""A text is continued or refused: never attended to behind another text's tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from dualblade import DualBladeCache
from dualblade.errors import Closed, ConfigError
from dualblade.hf.choice import texts_come_to
from tests.integration.tiny_models import prompt, tiny_model

WAYS = [("memory", "exact"), ("memory", "tiles"), ("direct", "exact"), ("direct", "tiles")]


def cache_for(model: Any, path: str = "direct", attention: str = "exact") -> DualBladeCache:
    return DualBladeCache.for_model(model, path=path, attention=attention, memory_budget="16MiB")


def generate(model: Any, cache: Any, inputs: dict[str, torch.Tensor], **options: Any) -> Any:
    return model.generate(**inputs, cache=cache, max_new_tokens=5, do_sample=False, **options)


def text(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def longer(ids: torch.Tensor, by: int) -> dict[str, torch.Tensor]:
    return text(torch.cat([ids, prompt(tokens=by, seed=4)["input_ids"]], dim=1))


CANDIDATES: list[dict[str, Any]] = [{"prompt_lookup_num_tokens": 4}, {"assistant_model": None}]


@pytest.mark.parametrize("options", CANDIDATES, ids=["lookup", "assistant"])
@pytest.mark.parametrize(("path", "attention"), WAYS)
def test_candidates_on_a_cache_that_has_text_are_refused(
    path: str, attention: str, options: dict[str, Any]
) -> None:
    """transformers 5.24 passes all of the text on, and what is cached would be there twice."""
    model = tiny_model()
    if "assistant_model" in options:
        options = {"assistant_model": tiny_model("qwen2")}
    with cache_for(model, path, attention) as cache:
        first = generate(model, cache, prompt(tokens=80))
        held = cache.get_seq_length()
        with pytest.raises(ConfigError, match=f"a cache that holds {held}, and do not go on"):
            generate(model, cache, longer(first, 9), **options)
        assert cache.get_seq_length() == held
        theirs = DynamicCache(config=model.config)
        generate(model, theirs, prompt(tokens=80))
        ours = generate(model, cache, longer(first, 9))
        assert torch.equal(ours, generate(model, theirs, longer(first, 9))), "nothing changed"
        cache.reset()
        with_candidates = generate(model, cache, longer(first, 9), **options)
        assert torch.equal(with_candidates, ours)


@pytest.mark.parametrize("tokens", [1, 40, 83, 84])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])  # OPT's head passes by its base model
@pytest.mark.parametrize("chunk", [None, 16])
@pytest.mark.parametrize(("path", "attention"), WAYS)
def test_a_text_that_is_not_longer_than_what_is_cached_is_refused(
    path: str, attention: str, family: str, tokens: int, chunk: int | None
) -> None:
    """transformers slices by the difference of the counts, from the wrong end."""
    model = tiny_model(family)
    options = {} if chunk is None else {"prefill_chunk_size": chunk}
    with cache_for(model, path, attention) as cache:
        generate(model, cache, prompt(tokens=80))
        assert cache.get_seq_length() == 84
        other = text(prompt(tokens=tokens, seed=5)["input_ids"])
        with pytest.raises(ConfigError, match="a cache that holds 84"):
            generate(model, cache, other, **options)
        assert cache.get_seq_length() == 84
        cache.reset()
        theirs = DynamicCache(config=model.config)
        expected = generate(model, theirs, other, **options)
        assert torch.equal(generate(model, cache, other, **options), expected)


def test_a_mask_of_the_new_tokens_alone_is_refused() -> None:
    """transformers would take the columns that are missing for padding."""
    model = tiny_model()
    with cache_for(model) as cache, torch.no_grad():
        model(**prompt(tokens=80), cache=cache)
        with pytest.raises(ConfigError, match="4 tokens are given to a cache that holds 80"):
            model(**text(torch.full((1, 4), 7)), cache=cache)
        mask = torch.ones((1, 84), dtype=torch.int64)
        model(input_ids=torch.full((1, 4), 7), attention_mask=mask, cache=cache)
        assert cache.get_seq_length() == 84


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma3"])
@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 7}, {"num_beams": 2}])
def test_what_goes_on_is_let_through(family: str, options: dict[str, Any]) -> None:
    """The whole conversation, the new tokens alone, and batches with padding."""
    model = tiny_model(family)
    inputs = prompt(batch=2, tokens=60, pad=7)
    with cache_for(model) as cache:
        theirs = DynamicCache(config=model.config)
        for one in (cache, theirs):
            generate(model, one, inputs)
        held = cache.get_seq_length()
        assert held == theirs.get_seq_length()
        ids = torch.cat([inputs["input_ids"], torch.full((2, held - 60 + 9), 5)], dim=1)
        mask = torch.ones_like(ids)
        mask[:, :60] = inputs["attention_mask"]
        whole = {"input_ids": ids, "attention_mask": mask}
        if "num_beams" in options:  # its cache has the beams of each
            cache.reset()
            theirs = DynamicCache(config=model.config)
        ours = generate(model, cache, whole, **options)
        assert torch.equal(ours, generate(model, theirs, whole, **options))


def test_new_tokens_alone_with_a_mask_of_all() -> None:
    model = tiny_model()
    with cache_for(model) as cache:
        generate(model, cache, prompt(tokens=80))
        new = torch.full((1, 6), 9)
        given = {"input_ids": new, "attention_mask": torch.ones((1, 90), dtype=torch.int64)}
        generate(model, cache, given)
        assert cache.get_seq_length() == 84 + 6 + 4


def test_a_mask_of_the_whole_text_from_the_beginning() -> None:
    """A loop of one's own, with columns for tokens that are yet to come."""
    model, ids = tiny_model(), prompt(tokens=90)["input_ids"]
    with torch.no_grad():
        whole = model(input_ids=ids).logits[:, -1]
    mask = torch.ones((1, 120), dtype=torch.int64)
    with cache_for(model, attention="tiles") as cache, torch.no_grad():
        for part in ids.split([40, 30, 20], dim=1):
            logits = model(input_ids=part, attention_mask=mask, cache=cache).logits
    assert torch.allclose(logits[:, -1], whole, atol=1e-4)


def test_positions_of_ones_own_are_let_through() -> None:
    """Compacted ones; those that begin the text anew, or end within what is cached, are not."""
    model, ids = tiny_model(), prompt(tokens=90)["input_ids"]
    with cache_for(model) as cache, torch.no_grad():
        model(input_ids=ids, cache=cache)
        model(input_ids=ids[:, :4], position_ids=torch.tensor([[88, 89, 90, 91]]), cache=cache)
        model(input_ids=ids[:, :1], position_ids=torch.tensor([[3]]), cache=cache)
        for positions in ([0, 1, 2, 95], [5, 6, 7, 8]):
            with pytest.raises(ConfigError, match="do not go on from there"):
                model(input_ids=ids[:, :4], position_ids=torch.tensor([positions]), cache=cache)
        assert cache.get_seq_length() == 95


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_cache_that_lost_its_content_says_that_first(family: str) -> None:
    """Else the hint would be a reset, which does not help it."""
    model = tiny_model(family)
    with cache_for(model) as cache:
        text_so_far = generate(model, cache, prompt(tokens=80))
        assert cache._pipeline is not None
        layer = cache._pipeline._layers[0]
        layer.tail_rows += 1  # as a step leaves it that ended in the second layer
        for given in (text(text_so_far), longer(text_so_far, 1)):
            with pytest.raises(Closed, match="ended between two layers"):
                generate(model, cache, given)
        cache._pipeline.fail(OSError("the drive is gone"))
        with pytest.raises(Closed, match="the drive is gone"):
            generate(model, cache, text(text_so_far))


def test_images_of_git_are_beside_its_masks() -> None:
    model = tiny_model()
    model.config.model_type = "git"
    assert texts_come_to(model) == set()


@pytest.mark.parametrize("is_dropped", [False, True])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_model_is_watched_no_longer_than_its_cache_lives(
    family: str, *, is_dropped: bool
) -> None:
    model = tiny_model(family)
    cache = cache_for(model, "memory")
    modules = texts_come_to(model)
    assert model in modules
    assert {len(module._forward_pre_hooks) for module in modules} == {1}
    if is_dropped:
        del cache
    else:
        cache.close()
    assert not any(module._forward_pre_hooks for module in modules)


@pytest.mark.parametrize(("path", "attention"), WAYS)
def test_after_a_reset_it_is_as_new_as_transformers_own(path: str, attention: str) -> None:
    """Models ask: PaliGemma lets a prefix see itself whole in the first pass alone."""
    model = tiny_model()
    with cache_for(model, path, attention) as cache:
        for one in (cache, DynamicCache(config=model.config)):
            assert not one.is_initialized
            generate(model, one, prompt())
            assert one.is_initialized
            one.reset()
            assert not one.is_initialized
