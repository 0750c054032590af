"""Attention over tiles inside real models: close to the model's own, the same on every path."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, Gemma4TextConfig, PreTrainedModel

import dualblade
from dualblade import DualBladeCache, EngineConfig
from dualblade.attention import AttentionQuery, GroupedAttention, attend_whole
from dualblade.errors import ConfigError, DualBladeError, Unsupported
from dualblade.hf import choice
from dualblade.hf.lazy import CausalMask, made_real
from dualblade.hf.tile_attention import tile_attention, tile_mask
from tests.integration.tiny_models import EAGER_ONLY, FAMILIES, prompt, tiny_model
from tests.stepping import take_turn

PATHS = ("memory", "page-cache", "direct", "dual")
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


def tiles(model: PreTrainedModel, path: str = "direct", **settings: Any) -> DualBladeCache:
    # Half of it each way: so little KV would all fit the page cache.
    config = EngineConfig(cache_percent=50) if path == "dual" else None
    usual = {"memory_budget": "16MiB", "path": path, "attention": "tiles", "config": config}
    return DualBladeCache.for_model(model, **{**usual, **settings})


def run(model: PreTrainedModel, path: str, inputs: dict[str, Any], **options: Any) -> Any:
    with tiles(model, path) as cache:
        out = generate(model, cache, inputs, **options)
        stats = cache.stats()
    assert stats.attention == "tiles", stats.attention_reason
    assert stats.seconds.attention > 0, "attention never saw a tile"
    return out


CASES = [
    pytest.param(family, "eager" if family in EAGER_ONLY else "sdpa", id=family)
    for family in FAMILIES
]


@pytest.mark.parametrize(("family", "attention"), CASES)
def test_greedy_tokens_are_those_of_the_models_own_attention(family: str, attention: str) -> None:
    """In fp32 nothing is near enough to a tie for the rounding to show."""
    model, inputs = tiny_model(family, attention=attention), prompt(batch=3, pad=7)
    expected = generate(model, DynamicCache(config=model.config), inputs)
    actual = run(model, "direct", inputs)
    assert torch.equal(actual.sequences, expected.sequences)
    for ours, theirs in zip(actual.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize(("family", "attention"), CASES)
def test_bfloat16_is_as_close_as_sdpa(family: str, attention: str) -> None:
    """A step after each of some prompts, against the same weights in fp32: root mean square errors
    of all logits. The largest error of one step would be chance: it is up to 1.7 times sdpa's on
    one processor and 0.9 times on the next."""
    model = tiny_model(family, torch.bfloat16, attention)
    wide = tiny_model(family, torch.bfloat16, attention).float()

    def step(one: PreTrainedModel, cache: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            one(**inputs, cache=cache)
            ones = torch.ones((2, 1), dtype=torch.int64)
            mask = torch.cat([inputs["attention_mask"], ones], dim=1)
            out = one(input_ids=5 * ones, attention_mask=mask, cache=cache)
        return out.logits[:, -1].double()

    ours = theirs = 0.0
    for seed in range(4):
        inputs = prompt(batch=2, pad=9, seed=seed)
        true = step(wide, DynamicCache(config=wide.config), inputs)
        theirs += float(
            (step(model, DynamicCache(config=model.config), inputs) - true).square().mean()
        )
        with tiles(model) as cache:
            ours += float((step(model, cache, inputs) - true).square().mean())
    assert ours**0.5 <= 1.5 * theirs**0.5


OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "temperature": 0.8},
    "prompt lookup": {"prompt_lookup_num_tokens": 6},
    "chunks": {"prefill_chunk_size": 90},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_path_has_the_same_bits(options: dict[str, Any], dtype: torch.dtype) -> None:
    model = tiny_model(dtype=dtype)
    inputs = prompt(batch=1 if "prompt_lookup_num_tokens" in options else 2, tokens=300)
    first = run(model, "memory", inputs, **options)
    for path in PATHS[1:]:
        other = run(model, path, inputs, **options)
        assert torch.equal(other.sequences, first.sequences), path
        for ours, theirs in zip(other.logits, first.logits, strict=True):
            assert torch.equal(ours, theirs), path


@pytest.mark.parametrize(("pays", "held"), [(False, torch.bfloat16), (True, torch.float32)])
def test_a_group_is_widened_where_16_bits_multiply_slowly(
    pays: bool, held: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()

    def noted(query: Any, keys: torch.Tensor, values: torch.Tensor) -> GroupedAttention:
        seen.update((keys.dtype, values.dtype))
        return GroupedAttention(query, keys, values)

    monkeypatch.setattr("dualblade.pipeline.attend.widening_pays", lambda _: pays)
    monkeypatch.setattr("dualblade.pipeline.attend.GroupedAttention", noted)
    model = tiny_model(dtype=torch.bfloat16)
    run(model, "direct", prompt(batch=2, tokens=300), prefill_chunk_size=90, max_new_tokens=2)
    assert seen == {held}


@pytest.mark.parametrize(
    "settings",
    [
        {"config": EngineConfig(io_engine="posix")},
        {"config": EngineConfig(pipeline="serial")},
        {"config": EngineConfig(pipeline="key-value")},
        {"config": EngineConfig(pipeline="tiled")},
        {"config": EngineConfig(pipeline="layers", lookahead=1)},
        {"config": EngineConfig(staging_bytes=2 << 20, chunk_bytes=4096)},
        {"config": EngineConfig(tile_tokens=16)},
        {"config": EngineConfig(tile_tokens=128)},
        {"memory_budget": "64MiB"},
        {"max_tokens": 400},
    ],
    ids=[
        "posix",
        "serial",
        "key-value",
        "tiled",
        "layers",
        "small-io",
        "16-row-tiles",
        "128-row-tiles",
        "budget",
        "one-extent",
    ],
)
def test_bits_do_not_depend_on_how_tiles_come(settings: dict[str, Any]) -> None:
    model, inputs = tiny_model(), prompt(batch=2, tokens=300, pad=20)
    first = run(model, "direct", inputs, prefill_chunk_size=128)
    with tiles(model, **settings) as cache:
        other = generate(model, cache, inputs, prefill_chunk_size=128)
        if "max_tokens" in settings:
            layers = cache._pipeline._layers.values()
            assert {len(half.unit.segments) for la in layers for half in la.halves} == {1}
    for ours, theirs in zip(other.logits, first.logits, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 1)])
def test_a_batch_that_changes_has_groups_of_its_own(before: int, after: int) -> None:
    """What was read ahead came in pieces that end where groups of the old batch did, and that a
    group of more sequences has no room for."""

    def step(cache: DualBladeCache, batch: int, tokens: int) -> torch.Tensor:
        seen = []
        for layer in range(3):
            generator = torch.Generator().manual_seed(layer)
            shape = (batch, 32, tokens, 64)
            keys, values = (torch.randn(shape, generator=generator).bfloat16() for _ in range(2))
            seen.append(take_turn(cache, keys, values, layer))
        return torch.stack(seen)

    seen = []
    for path in ("memory", "direct"):
        settings = EngineConfig(staging_bytes=32 << 20)
        with tiles(tiny_model(), path, memory_budget="256MiB", config=settings) as cache:
            step(cache, before, tokens=2200)
            step(cache, before, tokens=1)
            cache.batch_select_indices(torch.zeros(after, dtype=torch.int64))
            seen.append(step(cache, after, tokens=40))
    assert torch.equal(*seen)


@pytest.mark.parametrize("path", PATHS)
def test_assisted_by_a_smaller_model(path: str) -> None:
    model, assistant, inputs = tiny_model(), tiny_model("qwen2"), prompt()
    expected = generate(model, DynamicCache(config=model.config), inputs)
    actual = run(model, path, inputs, assistant_model=assistant)
    assert torch.equal(actual.sequences, expected.sequences)


def test_a_model_that_touches_its_keys_falls_to_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its attention scales the keys that the cache gave it, as some models do."""
    model, inputs = tiny_model(), prompt(batch=2, pad=4)
    update = DualBladeCache.update

    def touched(self: Any, *args: Any, **kwargs: Any) -> Any:
        keys, values = update(self, *args, **kwargs)
        return keys * 0.5, values

    class Halving(DynamicCache):
        update = lambda self, *a, **k: (lambda kv: (kv[0] * 0.5, kv[1]))(  # noqa: E731
            DynamicCache.update(self, *a, **k)
        )

    expected = generate(model, Halving(config=model.config), inputs)
    monkeypatch.setattr(DualBladeCache, "update", touched)
    with tiles(model) as cache:
        actual = generate(model, cache, inputs)
        stats = cache.stats()
    assert (stats.attention, stats.attention_reason) == (
        "exact",
        "the model's code touches keys or values before attention",
    )
    assert torch.equal(actual.sequences, expected.sequences)
    for ours, theirs in zip(actual.logits, expected.logits, strict=True):
        assert torch.equal(ours, theirs)


def test_two_caches_on_one_model_and_its_attention_given_back() -> None:
    model, inputs = tiny_model(), prompt()
    plain = generate(model, DynamicCache(config=model.config), inputs)
    with tiles(model) as first:
        with tiles(model, "memory") as second:
            one = generate(model, first, inputs)
            two = generate(model, second, inputs)
            # Plain tensors: as sdpa.
            third = generate(model, DynamicCache(config=model.config), inputs)
        assert model.config._attn_implementation == "dualblade"
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(one.sequences, two.sequences)
    for ours, theirs in zip(third.logits, plain.logits, strict=True):
        assert torch.equal(ours, theirs)


def test_a_cache_that_is_dropped_gives_the_model_its_attention_back() -> None:
    model = tiny_model()
    cache = tiles(model)
    assert model.config._attn_implementation == "dualblade"
    del cache
    gc.collect()
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("family", "attention", "dtype", "word", "reason"),
    [
        ("llama", "sdpa", torch.float32, "tiles", "faster on a CPU"),
        ("llama", "eager", torch.float32, "exact", "loaded with eager attention"),
        ("llama", "sdpa", torch.float16, "exact", "the kernel does not do torch.float16"),
        ("gemma2", "eager", torch.float32, "exact", "eager"),
    ],
)
def test_auto_says_what_it_took_and_why(
    family: str, attention: str, dtype: torch.dtype, word: str, reason: str
) -> None:
    model = tiny_model(family, dtype, attention)
    with DualBladeCache.for_model(model, memory_budget="16MiB") as cache:
        stats = cache.stats()
    assert stats.attention == word
    assert reason in stats.attention_reason


def gemma4(shared: int) -> PreTrainedModel:
    torch.manual_seed(7)
    config = Gemma4TextConfig(
        vocab_size=128,
        vocab_size_per_layer_input=128,
        hidden_size=64,
        hidden_size_per_layer_input=8,
        intermediate_size=96,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        global_head_dim=16,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"] * 3,
        num_kv_shared_layers=shared,
        eos_token_id=None,
        pad_token_id=0,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def test_a_model_that_asks_whether_its_attention_is_sdpa_keeps_its_own() -> None:
    """Gemma 4 cuts the rows of layers that share KV where its attention is not called sdpa, and
    they would attend to the wrong tokens. Without such layers it asks nothing."""
    with tiles(gemma4(shared=0)) as cache:
        assert cache.stats().attention == "tiles"
    model, inputs = gemma4(shared=2), prompt(tokens=70)
    inputs["input_ids"][:, 35:] = inputs["input_ids"][:, :35]  # there are candidates
    options = {"max_new_tokens": 12, "do_sample": False, "prompt_lookup_num_tokens": 4}
    plain = model.generate(**inputs, cache=DynamicCache(config=model.config), **options)
    with pytest.raises(dualblade.Unsupported, match="attention is not called sdpa"):
        tiles(model)
    with DualBladeCache.for_model(model, path="direct", memory_budget="16MiB") as cache:
        assert cache.stats().attention == "exact"
        assert torch.equal(model.generate(**inputs, cache=cache, **options), plain)


@pytest.mark.parametrize(
    "code", ['== "sdpa"', "!= 'sdpa'", 'in ("eager", "sdpa")', 'not in ["sdpa"]']
)
def test_the_ways_to_ask_for_sdpa(code: str) -> None:
    line = f"if self.config._attn_implementation {code} and mask is None:"
    assert choice._COMPARED_WITH_SDPA.search(line)
    assert not choice._COMPARED_WITH_SDPA.search(line.replace("sdpa", "eager"))


@pytest.mark.parametrize("selection", ["indices", "block_indices"])
def test_attention_to_selected_tokens_is_refused(selection: str) -> None:
    rows = torch.ones(1, 2, 4, 16)
    module = torch.nn.Module()
    tile_attention(module, rows, rows, rows, None, **{selection: None})
    with pytest.raises(dualblade.Unsupported, match=f"has no {selection}"):
        tile_attention(module, rows, rows, rows, None, **{selection: torch.ones(1)})


def test_rows_that_nobody_attends_to_are_taken_in_all_the_same() -> None:
    model = tiny_model()
    with tiles(model) as cache, torch.no_grad():
        model(**prompt(tokens=80), cache=cache)
        for index in range(3):
            cache.update(torch.ones(1, 2, 1, 16), torch.ones(1, 2, 1, 16), index)
        assert cache.get_seq_length() == 81
        cache.crop(-1)
        assert cache.get_seq_length() == 80


def test_unknown_attention_is_refused() -> None:
    with pytest.raises(dualblade.ConfigError, match="auto, exact, tiles"):
        DualBladeCache.for_model(tiny_model(), attention="tile")


def test_a_model_that_writes_to_its_keys_computes_with_what_it_wrote(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A stand-in that was made real is not attended to any more; each time it is one tensor."""
    model, inputs = tiny_model(), prompt(batch=2, tokens=300)

    def step(cache: Any) -> torch.Tensor:
        with torch.inference_mode():
            model(**inputs, cache=cache)
        kind = type(cache.layers[0])
        real = kind.update

        def update(layer: Any, *args: Any, **kwargs: Any) -> Any:
            keys, values = real(layer, *args, **kwargs)
            keys.mul_(0.5)
            assert torch.equal(made_real(keys), made_real(keys))
            assert made_real(keys).data_ptr() == made_real(keys).data_ptr()
            return keys, values

        with monkeypatch.context() as patch, torch.inference_mode():
            patch.setattr(kind, "update", update)
            logits: torch.Tensor = model(input_ids=inputs["input_ids"][:, :1], cache=cache).logits
        return logits

    with tiles(model) as cache:
        ours = step(cache)
        assert cache.stats().attention == "exact"
        assert "touches keys or values" in cache.stats().attention_reason
    assert torch.allclose(ours, step(DynamicCache(config=model.config)), atol=1e-5)


@pytest.mark.parametrize("path", ["direct", "memory"])
@pytest.mark.parametrize("touched_before", [False, True])
def test_keys_that_are_kept_beyond_their_layers_turn_are_refused(
    path: str, *, touched_before: bool
) -> None:
    """The next layer's are gathered to the same place."""
    model = tiny_model()
    with tiles(model, path=path) as cache, torch.no_grad():
        model(**prompt(tokens=200), cache=cache)
        kept, _ = cache.update(torch.ones(1, 2, 1, 16), torch.ones(1, 2, 1, 16), 0)
        if touched_before:
            assert made_real(kept).shape == (1, 2, 201, 16)
        made_real(cache.update(torch.ones(1, 2, 1, 16), torch.ones(1, 2, 1, 16), 1)[0])
        with pytest.raises(DualBladeError, match="of layer 0 were used too late") as caught:
            made_real(kept)
        assert "attention='exact'" in str(caught.value)


def test_rows_that_see_ahead_do_so_with_capped_scores_too() -> None:
    """An encoder beside the decoder, which has our attention as well."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 5, 16)
    out, _ = tile_attention(
        torch.nn.Module(), query, key, value, None, scaling=1.0, is_causal=False, softcap=3.0
    )
    scores = 3.0 * torch.tanh(query @ key.transpose(-1, -2) / 3.0)
    expected = scores.softmax(dim=-1) @ value
    assert torch.allclose(out.transpose(1, 2), expected, atol=1e-5)


def test_a_mask_that_covers_what_is_to_come_is_none() -> None:
    """As loops that were written for transformers' StaticCache have."""
    model, ids = tiny_model(), prompt(tokens=90)["input_ids"]
    with tiles(model) as cache, torch.no_grad():
        theirs = DynamicCache(config=model.config)
        for first, last in ((0, 80), (80, 81), (81, 90)):
            mask = torch.zeros((1, 128), dtype=torch.int64)
            mask[:, :last] = 1
            part = {"input_ids": ids[:, first:last], "attention_mask": mask}
            ours = model(**part, cache=cache).logits
            expected = model(input_ids=ids[:, first:last], cache=theirs).logits
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_a_mask_of_another_batch_is_what_transformers_makes_of_it() -> None:
    """Fewer rows it refuses; of more it takes the first."""
    mask = torch.ones(1, 10, dtype=torch.int64)
    mask[0, :3] = 0
    with pytest.raises(IndexError):
        tile_mask(2, 1, 10, 9, attention_mask=mask)
    more = tile_mask(2, 1, 10, 9, attention_mask=mask.expand(3, -1))
    assert not isinstance(more, CausalMask)
    assert torch.equal(more, made_real(tile_mask(2, 1, 10, 9, attention_mask=mask.expand(2, -1))))


@torch.no_grad()
def test_what_a_model_writes_to_a_mask_is_attended_to() -> None:
    model, ids = tiny_model(), prompt(tokens=90)["input_ids"]
    seen = []
    for cache in (DynamicCache(config=model.config), tiles(model)):
        model(input_ids=ids[:, :80], cache=cache)
        with _hide_first_token(model.model.layers[0].self_attn):
            seen.append(model(input_ids=ids[:, 80:], cache=cache).logits)
    torch.testing.assert_close(*seen, rtol=1e-4, atol=1e-4)


@contextlib.contextmanager
def _hide_first_token(attention: torch.nn.Module) -> Iterator[None]:
    """As the mask comes to this layer, for it and all after it."""

    def hide(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
        kwargs["attention_mask"][..., 0] = False

    hook = attention.register_forward_pre_hook(hide, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def test_elements_need_not_lie_side_by_side() -> None:
    """torch's own attention copies them then; its kernel, called by name, gives NaN."""
    generator = torch.Generator().manual_seed(3)
    query, keys, values = (torch.randn(1, 2, 16, 48, generator=generator) for _ in range(3))
    apart = [x.transpose(2, 3) for x in (query, keys, values)]
    asked = AttentionQuery(query=apart[0], past=0, scaling=0.25)
    expected = torch.nn.functional.scaled_dot_product_attention(*apart, is_causal=True, scale=0.25)
    torch.testing.assert_close(attend_whole(asked, *apart[1:]), expected.transpose(1, 2))


def test_a_mask_of_integers_is_refused() -> None:
    """Ones and zeros would be added to the scores."""
    model, ids = tiny_model(), prompt(tokens=90)["input_ids"]
    with tiles(model) as cache, torch.no_grad():
        model(input_ids=ids, cache=cache)
        mask = torch.ones((1, 1, 2, 92), dtype=torch.int64).tril(90)
        with pytest.raises(ConfigError, match="tells neither what is seen nor what to add"):
            model(input_ids=ids[:, :2], attention_mask=mask, cache=cache)


def test_tiles_of_git_are_refused() -> None:
    """Its text's attention is its own, and adds the mask to the scores."""
    model = tiny_model()
    model.config.model_type = "git"
    with pytest.raises(Unsupported, match="attention code of its own"):
        tiles(model)
