"""A text is continued or refused: never attended to behind another text's tokens."""

from __future__ import annotations

import copy
import types
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BloomConfig,
    DynamicCache,
    GenerationMixin,
    Qwen2_5_VLConfig,
)

from dualblade import DualBladeCache
from dualblade.errors import Closed, ConfigError, Unsupported
from dualblade.hf.choice import generating, texts_come_to
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


# OPT's head passes by its base model. Where the KV is, and how it is attended to, comes later.
NOT_LONGER = [
    *(
        (tokens, family, *WAYS[2])
        for tokens in (1, 40, 83, 84)
        for family in ("llama", "gpt2", "opt")
    ),
    *((40, "llama", *way) for way in WAYS if way != WAYS[2]),
]


@pytest.mark.parametrize("chunk", [None, 16])
@pytest.mark.parametrize(("tokens", "family", "path", "attention"), NOT_LONGER)
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


@pytest.mark.parametrize(("path", "attention"), WAYS)
def test_a_text_of_which_one_token_would_be_left_is_refused(path: str, attention: str) -> None:
    """Of 9 cached tokens and a text of 5 transformers leaves the last one, at position 4."""
    model = tiny_model()
    with cache_for(model, path, attention) as cache:
        model.generate(**prompt(tokens=6), cache=cache, max_new_tokens=4, do_sample=False)
        assert cache.get_seq_length() == 9
        with pytest.raises(ConfigError, match="5 tokens are given to a cache that holds 9"):
            generate(model, cache, text(prompt(tokens=5, seed=5)["input_ids"]))
        assert cache.get_seq_length() == 9


@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 16}])
@pytest.mark.parametrize("family", ["llama", "opt", "gemma3"])
def test_a_longer_text_that_differs_is_refused(family: str, options: dict[str, Any]) -> None:
    """As a pipeline with two prompts gives it: the second would go on from the first one's KV."""
    model = tiny_model(family)
    with cache_for(model) as cache:
        first = generate(model, cache, prompt(tokens=80))
        other = prompt(tokens=120, seed=5)
        with pytest.raises(ConfigError, match=r"differs from the 84 tokens .* from token 0 on"):
            generate(model, cache, other, **options)
        changed = longer(first, 9)
        changed["input_ids"][0, 81] += 1  # one that was generated
        with pytest.raises(ConfigError, match="from token 81 on") as refused:
            generate(model, cache, changed, **options)
        assert "crop(-3)" in str(refused.value.hint)
        assert cache.get_seq_length() == 84
        theirs = DynamicCache(config=model.config)
        generate(model, theirs, prompt(tokens=80))
        ours = generate(model, cache, longer(first, 9), **options)
        assert torch.equal(ours, generate(model, theirs, longer(first, 9))), "nothing changed"
        cache.reset()
        generate(model, cache, other, **options)


def test_after_a_crop_another_text_may_go_on_from_there() -> None:
    """With candidates too, of which rejected ones were taken back."""
    model = tiny_model()
    for options in ({}, {"prompt_lookup_num_tokens": 4}):
        with cache_for(model) as cache:
            first = generate(model, cache, prompt(tokens=80), **options)
            generate(model, cache, longer(first, 9))
            cache.crop(80 - cache.get_seq_length())
            ours = generate(model, cache, longer(first[:, :80], 30))
            plain = generate(model, DynamicCache(config=model.config), longer(first[:, :80], 30))
            assert torch.equal(ours, plain)
            with pytest.raises(ConfigError, match="from token 80 on"):
                generate(model, cache, text(torch.cat([first, first], dim=1)))


def test_several_sequences_with_padding_go_on_and_others_are_refused() -> None:
    """What no row sees may be any token."""
    model = tiny_model()
    inputs = prompt(batch=2, tokens=60, pad=7)
    with cache_for(model) as cache:
        ids = generate(model, cache, inputs, num_return_sequences=1)
        ids = torch.cat([ids, torch.full((2, 9), 5)], dim=1)
        mask = torch.ones_like(ids)
        mask[:, :60] = inputs["attention_mask"]
        ids[1, :7] = 9
        with pytest.raises(ConfigError, match="from token 0 on"):
            generate(model, cache, {"input_ids": ids.flip(0), "attention_mask": mask})
        generate(model, cache, {"input_ids": ids, "attention_mask": mask})


def test_what_is_not_known_is_not_refused() -> None:
    """Embeddings, rows that were appended, sequences that were chosen."""
    model, ids = tiny_model(), prompt(tokens=80)["input_ids"]
    other = text(prompt(tokens=130, seed=5)["input_ids"])
    rows = torch.ones(1, 2, 4, 16)
    with cache_for(model) as cache, torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
        model(inputs_embeds=embeds, cache=cache)
        generate(model, cache, other)
        cache.reset()
        for change in (
            lambda: [cache.append(rows, rows, layer) for layer in range(3)],
            lambda: cache.batch_select_indices(torch.tensor([0])),
            lambda: cache.batch_repeat_interleave(1),
            lambda: cache.reorder_cache(torch.tensor([0])),
        ):
            model(input_ids=ids, cache=cache)
            change()
            generate(model, cache, other)
            cache.reset()
        model(input_ids=ids, cache=cache)
        with pytest.raises(ConfigError, match="differs from the 80 tokens"):
            generate(model, cache, other)


def test_a_change_that_was_refused_leaves_the_text_known() -> None:
    model, ids = tiny_model(), prompt(tokens=80)["input_ids"]
    other = text(prompt(tokens=130, seed=5)["input_ids"])
    rows = torch.ones(1, 3, 4, 16)  # one head too many
    with cache_for(model) as cache, torch.no_grad():
        model(input_ids=ids, cache=cache)
        for change in (
            lambda: cache.append(rows, rows, 0),
            lambda: cache.batch_select_indices(torch.tensor([7])),
            lambda: cache.batch_select_indices(torch.tensor([True, True])),
            lambda: cache.batch_repeat_interleave(0),
            lambda: cache.reorder_cache(torch.tensor([1])),
        ):
            with pytest.raises(ConfigError):
                change()
            with pytest.raises(ConfigError, match="differs from the 80 tokens"):
                generate(model, cache, other)


def test_a_pass_that_did_not_come_to_pass_is_not_held() -> None:
    model, ids = tiny_model(), prompt(tokens=80)["input_ids"]
    with cache_for(model) as cache, torch.no_grad():
        model(input_ids=ids, cache=cache)
        with pytest.raises(IndexError):
            model(input_ids=torch.tensor([[1 << 20]]), cache=cache)
        generate(model, cache, longer(ids, 9))
        assert cache.held_text._tokens is not None


def test_a_model_without_positions_is_checked() -> None:
    """Neither mask nor positions come to Bloom's passes."""
    torch.manual_seed(0)
    config = BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=128)
    model = AutoModelForCausalLM.from_config(config).eval()
    with cache_for(model) as cache:
        first = generate(model, cache, prompt(tokens=80))
        for options in ({}, {"prompt_lookup_num_tokens": 4}):
            with pytest.raises(ConfigError, match="a cache that holds 84"):
                generate(model, cache, text(prompt(tokens=60, seed=5)["input_ids"]), **options)
        with pytest.raises(ConfigError, match="a cache that holds 84"):
            generate(model, cache, longer(first, 9), prompt_lookup_num_tokens=4)
        rows = model.get_input_embeddings()(longer(first, 9)["input_ids"]).detach()
        with pytest.raises(ConfigError, match="a cache that holds 84"):
            generate(model, cache, {"inputs_embeds": rows}, prompt_lookup_num_tokens=4)
        theirs = DynamicCache(config=model.config)
        generate(model, theirs, prompt(tokens=80))
        ours = generate(model, cache, longer(first, 9))
        assert torch.equal(ours, generate(model, theirs, longer(first, 9)))


def test_a_model_whose_positions_have_three_dimensions_is_checked() -> None:
    """As those of Qwen-VL."""
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 200,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
        },
        vision_config={"hidden_size": 32, "depth": 1, "num_heads": 2, "out_hidden_size": 32},
        image_token_id=190,
        video_token_id=191,
        vision_start_token_id=192,
        vision_end_token_id=193,
    )
    model = AutoModelForImageTextToText.from_config(config).eval()
    with cache_for(model) as cache:
        first = generate(model, cache, prompt(tokens=80))
        held = cache.get_seq_length()
        for other in (60, held):
            with pytest.raises(ConfigError, match=f"a cache that holds {held}"):
                generate(model, cache, text(prompt(tokens=other, seed=5)["input_ids"]))
        with pytest.raises(ConfigError, match=f"a cache that holds {held}"):
            generate(model, cache, longer(first, 9), prompt_lookup_num_tokens=4)
        generate(model, cache, longer(first, 9))


def test_a_model_in_the_model_that_generates_is_checked() -> None:
    """BLIP-2 has its language model generate, from embeddings."""

    class Wrapper(type(tiny_model())):  # type: ignore[misc]
        def generate(self, inputs_embeds: torch.Tensor, **options: Any) -> Any:
            return self.language_model.generate(inputs_embeds=inputs_embeds, **options)

    inner = tiny_model()
    model = Wrapper(inner.config).eval()
    model.language_model = inner
    rows = inner.get_input_embeddings()(prompt(tokens=90)["input_ids"]).detach()
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    with cache_for(model) as cache:
        model.generate(rows[:, :80], cache=cache, **options)
        held = cache.get_seq_length()
        for other in (1, 50, held):
            with pytest.raises(ConfigError, match=f"a cache that holds {held}"):
                model.generate(rows[:, :other], cache=cache, **options)
        assert cache.get_seq_length() == held
        assert vars(inner).keys() >= {"_prefill"}
    assert "_prefill" not in vars(inner)


def test_new_tokens_alone_may_have_candidates() -> None:
    model = tiny_model()
    new = torch.cat([torch.full((1, 6), 9), torch.full((1, 6), 8)], dim=1)
    given = {"input_ids": new, "attention_mask": torch.ones((1, 96), dtype=torch.int64)}
    with cache_for(model) as cache:
        theirs = DynamicCache(config=model.config)
        for one in (cache, theirs):
            generate(model, one, prompt(tokens=80))
        ours = generate(model, cache, given, prompt_lookup_num_tokens=4)
        assert torch.equal(ours, generate(model, theirs, given))


def test_a_model_that_was_saved_while_it_was_watched_is_watched_again() -> None:
    model = tiny_model()
    with cache_for(model):
        assert "_prefill" in vars(model)
        saved = tiny_model()
        # As unpickling makes it of a bound method: by its name.
        vars(saved)["_prefill"] = types.MethodType(type(saved)._prefill, saved)
    with cache_for(saved) as cache:
        generate(saved, cache, prompt(tokens=80))
        with pytest.raises(ConfigError, match="a cache that holds 84"):
            generate(saved, cache, text(prompt(tokens=43, seed=5)["input_ids"]))


@pytest.mark.parametrize("is_filled", [False, True])
def test_a_cache_that_is_not_to_be_used_is_refused(*, is_filled: bool) -> None:
    model = tiny_model()
    with cache_for(model) as cache:
        ids = prompt(tokens=80)["input_ids"]
        if is_filled:
            ids = generate(model, cache, text(ids))
        held = cache.get_seq_length()
        with pytest.raises(ConfigError, match="use_cache=False"):
            generate(model, cache, longer(ids, 9), use_cache=False)
        assert cache.get_seq_length() == held


def test_a_copy_of_a_watched_model_generates_by_itself() -> None:
    model = tiny_model()
    with cache_for(model):
        other = copy.deepcopy(model)
    with torch.no_grad():
        for weights in other.parameters():
            weights.mul_(1.5)
    inputs = prompt(tokens=30)
    plain = tiny_model()
    plain.load_state_dict(other.state_dict())
    ours = generate(other, DynamicCache(config=other.config), inputs)
    assert torch.equal(ours, generate(plain, DynamicCache(config=plain.config), inputs))


def test_models_are_watched_while_any_of_their_caches_lives() -> None:
    model = tiny_model()
    one, other = cache_for(model), cache_for(model)
    one.close()
    generate(model, other, prompt(tokens=80))
    with pytest.raises(ConfigError, match="a cache that holds 84"):
        generate(model, other, text(prompt(tokens=43, seed=5)["input_ids"]))
    other.close()
    assert not {"_prefill", "_get_candidate_generator"} & vars(model).keys()


@pytest.mark.parametrize("is_first", [True, False])
def test_half_a_step_in_memory_is_noticed(*, is_first: bool) -> None:
    """A pass that ended between two layers, in a loop of one's own. Of the first one the later
    layers hold nothing: one token more would be attended to alone."""
    model, ids = tiny_model(), prompt(tokens=40)["input_ids"]
    with cache_for(model, "memory") as cache, torch.no_grad():
        if not is_first:
            model(input_ids=ids, cache=cache)
        layer = model.model.layers[1]
        hook = layer.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(MemoryError()))
        with pytest.raises(MemoryError):
            model(input_ids=ids if is_first else ids[:, :1], cache=cache)
        hook.remove()
        for _ in range(2):
            with pytest.raises(Closed, match="between two layers"):
                model(input_ids=ids[:, :1], cache=cache)
        cache.reset()
        model(input_ids=ids, cache=cache)


@pytest.mark.parametrize("chunk", [None, 16])
@pytest.mark.parametrize(("path", "attention"), WAYS)
def test_half_a_step_that_was_noticed_is_reset(
    path: str, attention: str, chunk: int | None
) -> None:
    """As in a notebook: interrupted, run again, then reset. What was read ahead and written behind
    for the old text is not taken for the new one's."""
    model = tiny_model()
    fresh = prompt(tokens=200, seed=3)
    plain = generate(model, DynamicCache(config=model.config), fresh)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with cache_for(model, path, attention) as cache:
        first = generate(model, cache, prompt(tokens=330))
        for layer in (0, 1):
            hook = model.model.layers[layer].mlp.register_forward_hook(stop)
            with pytest.raises(KeyboardInterrupt):
                generate(model, cache, longer(first, 70))
            hook.remove()
            for _ in range(2):
                with pytest.raises(Closed, match="content is lost") as refused:
                    generate(model, cache, longer(first, 90))
                assert "reset" in str(refused.value.hint)
            cache.reset()
            ours = generate(model, cache, fresh, prefill_chunk_size=chunk)
            assert torch.equal(ours, plain)
            first = ours


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
            first = generate(model, one, inputs)
        assert cache.get_seq_length() == theirs.get_seq_length() == 64
        ids = torch.cat([first, torch.full((2, 8), 5)], dim=1)
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


@pytest.mark.parametrize(("path", "attention"), WAYS)
def test_a_text_that_is_too_long_is_refused_before_its_first_chunk(
    path: str, attention: str
) -> None:
    model = tiny_model()
    made = {"path": path, "attention": attention, "memory_budget": "16MiB", "max_tokens": 60}
    with DualBladeCache.for_model(model, **made) as cache:
        with pytest.raises(ConfigError, match="to 80 tokens, past max_tokens=60"):
            generate(model, cache, prompt(tokens=80), prefill_chunk_size=16)
        assert cache.get_seq_length() == 0
        first = generate(model, cache, prompt(tokens=40), prefill_chunk_size=16)
        with pytest.raises(ConfigError, match="to 61 tokens, past max_tokens=60"):
            generate(model, cache, longer(first, 16), prefill_chunk_size=8)
        assert cache.get_seq_length() == 44
    with DualBladeCache.for_model(model, **made) as cache:  # padding is stored too
        padded = text(prompt(tokens=61)["input_ids"])
        padded["attention_mask"][:, :5] = 0
        with pytest.raises(ConfigError, match="past max_tokens=60"):
            generate(model, cache, padded)


def test_a_text_that_may_grow_too_long_is_told_of_at_once(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model()
    for most, is_told in ((44, False), (43, True)):
        caplog.clear()
        with DualBladeCache.for_model(model, memory_budget="16MiB", max_tokens=most) as cache:
            if is_told:
                with pytest.raises(ConfigError, match="past max_tokens=43"):
                    generate(model, cache, prompt(tokens=40))
            else:
                generate(model, cache, prompt(tokens=40))
        assert ("takes 43 tokens, and generate may come to 44" in caplog.text) == is_told


@pytest.mark.parametrize("name", ["_prefill", "_get_candidate_generator"])
def test_a_transformers_that_slices_elsewhere_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts could not be checked: a wrong one would be attended to without an error."""
    model = tiny_model()
    cache_for(model).close()
    monkeypatch.delattr(GenerationMixin, name)
    with pytest.raises(Unsupported, match=f"has no {name}"):
        cache_for(model)


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
    assert generating(model) == []


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
