"""What transformers tests of its own cache classes, asked of ours.

The cases are those of tests/utils/test_cache_utils.py of transformers 4.5x to 5.x, as far as they
are about a Cache subclass in eager mode on one device, in our own words and on tiny random models.
Left out, because they are about other things: quantised caches, torch.export, torch.compile and
CUDA graphs, data parallelism, legacy tuples, and contrastive and group beam search, which
transformers 5 has taken out. A cache of ours cannot be copied; the case of a cached prefix that
several prompts share goes back to the prefix by `crop`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from dualblade import DualBladeCache, EngineConfig
from dualblade.hf.geometry import layer_shapes
from tests.integration.tiny_models import prompt, tiny_model

LAYERS, DIM = 3, 16
STATIC, DYNAMIC = 512, None
"""`max_tokens`: units of one extent, or growing ones."""


def llama(heads: int = 4, kv_heads: int = 2) -> PreTrainedModel:
    config = AutoConfig.for_model(
        "llama",
        vocab_size=128,
        hidden_size=heads * DIM,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=512,
    )
    torch.manual_seed(5)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model.eval()


@pytest.fixture(params=[STATIC, DYNAMIC], ids=["stated length", "growing"])
def length(request: pytest.FixtureRequest) -> int | None:
    value: int | None = request.param
    return value


@pytest.fixture(params=["direct", "dual", "memory"])
def pair(request: pytest.FixtureRequest, length: int | None) -> Iterator[Pair]:
    """Ours and theirs for one model, to be treated alike."""
    model = llama()
    with DualBladeCache.for_model(
        model,
        path=request.param,
        attention="exact",
        memory_budget="16MiB",
        max_tokens=length,
        config=EngineConfig(cache_percent=50) if request.param == "dual" else None,
    ) as ours:
        yield Pair(ours, DynamicCache(config=model.config))


class Pair:
    """Both caches. What is done to one is done to the other."""

    def __init__(self, ours: Cache, theirs: Cache) -> None:
        self.both = ours, theirs
        self._draw = torch.Generator().manual_seed(1)

    def update(self, tokens: int, batch: int = 4, kv_heads: int = 2) -> None:
        """New rows of every layer; both return the same keys and values, of all tokens so far."""
        for layer in range(LAYERS):
            shape = batch, kv_heads, tokens, DIM
            keys, values = (torch.randn(shape, generator=self._draw) for _ in range(2))
            ours, theirs = (cache.update(keys, values, layer) for cache in self.both)
            for mine, expected in zip(ours, theirs, strict=True):
                assert mine.shape == expected.shape
                assert torch.equal(mine, expected)

    def do(self, change: Callable[[Cache], object]) -> None:
        for cache in self.both:
            change(cache)

    def same(self, question: Callable[[Cache], object]) -> object:
        ours, theirs = (question(cache) for cache in self.both)
        assert ours == theirs
        return ours


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)], ids=["MHA", "GQA", "MQA"])
def test_update_gives_back_all_rows_of_any_number_of_heads(heads: int, kv_heads: int) -> None:
    model = llama(heads, kv_heads)
    with DualBladeCache.for_model(
        model, path="direct", attention="exact", memory_budget="16MiB"
    ) as cache:
        pair = Pair(cache, DynamicCache(config=model.config))
        for tokens in (1, 130, 1, 63, 1):
            pair.update(tokens, batch=2, kv_heads=kv_heads)
        assert cache.stats().io.written_bytes > 0


def test_lengths_are_those_of_a_dynamic_cache(pair: Pair) -> None:
    assert isinstance(pair.both[0], Cache)
    pair.same(lambda cache: cache.get_seq_length())
    for tokens in (70, 1, 64):
        pair.update(tokens)
        pair.same(lambda cache: [cache.get_seq_length(layer) for layer in range(LAYERS)])
        pair.same(lambda cache: [cache.get_mask_sizes(3, layer) for layer in range(LAYERS)])
    assert pair.same(len) == LAYERS
    assert pair.same(lambda cache: cache.get_seq_length()) == 135
    assert pair.same(lambda cache: cache.is_sliding) == [False] * LAYERS
    assert pair.same(lambda cache: cache.is_compileable) is False


def test_reorder(pair: Pair) -> None:
    """Beams: some are taken twice, some not at all; again and again, also inside a tile."""
    pair.update(130)
    for beams in ([3, 0, 0, 1], [0, 1, 2, 3], [2, 2, 2, 2]):
        pair.do(lambda cache, beams=beams: cache.reorder_cache(torch.tensor(beams)))  # type: ignore[misc]
        pair.update(1)


def test_repeat_and_select(pair: Pair) -> None:
    pair.update(70, batch=2)
    pair.do(lambda cache: cache.batch_repeat_interleave(3))
    pair.update(2, batch=6)
    pair.do(lambda cache: cache.batch_select_indices(torch.tensor([5, 0])))
    pair.update(64, batch=2)
    assert pair.same(lambda cache: cache.get_seq_length()) == 136


@pytest.mark.parametrize("count", [0, 1, 2, 5, 64, 70, 129])
def test_crop_takes_the_newest_tokens_away(pair: Pair, count: int) -> None:
    """Inside the tail, to a tile's edge, and into stored tiles; then it goes on."""
    pair.update(130)
    pair.do(lambda cache: cache.crop(-count))
    assert pair.same(lambda cache: cache.get_seq_length()) == 130 - count
    pair.update(3)
    pair.update(64)


def test_crop_to_a_length_is_refused(pair: Pair) -> None:
    """As transformers 5.2x does: a positive number once meant what stays."""
    pair.update(70)
    for cache in pair.both:
        with pytest.raises(ValueError, match="negative"):
            cache.crop(60)
    pair.update(1)


def test_reset_begins_anew(pair: Pair) -> None:
    pair.update(130)
    ours, _ = pair.both
    ours.reset()
    assert ours.get_seq_length() == 0
    again = Pair(ours, DynamicCache())
    again.update(66, batch=2)


# -- generation --------------------------------------------------------------------------------


def generated(model: PreTrainedModel, cache: Cache | None, **options: Any) -> Any:
    torch.manual_seed(0)
    settings = {"max_new_tokens": 20, "do_sample": False, **options}
    return model.generate(cache=cache, return_dict_in_generate=True, **settings)


def ours_and_theirs(model: PreTrainedModel, length: int | None, **options: Any) -> tuple[Any, Any]:
    """What both caches generate; ours on the direct path, and it is handed back."""
    expected = generated(model, DynamicCache(config=model.config), **options)
    with DualBladeCache.for_model(
        model, path="direct", attention="exact", memory_budget="16MiB", max_tokens=length
    ) as cache:
        actual = generated(model, cache, **options)
        assert actual.cache is cache
        assert cache.stats().io.written_bytes > 0
    assert torch.equal(actual.sequences, expected.sequences)
    return actual, expected


def test_a_batch_of_prompts_of_different_lengths(length: int | None) -> None:
    ours_and_theirs(tiny_model(), length, **prompt(batch=3, pad=9))


def test_beams_are_really_reordered(length: int | None) -> None:
    actual, expected = ours_and_theirs(
        tiny_model(), length, **prompt(), num_beams=3, num_return_sequences=2, output_scores=True
    )
    assert any(len(set(beams.tolist())) > 1 for beams in actual.beam_indices)
    assert torch.equal(actual.beam_indices, expected.beam_indices)
    assert torch.equal(actual.sequences_scores, expected.sequences_scores)


def test_beams_that_sample(length: int | None) -> None:
    ours_and_theirs(tiny_model(), length, **prompt(batch=2), num_beams=2, do_sample=True)


def test_sampling_has_the_same_scores(length: int | None) -> None:
    actual, expected = ours_and_theirs(
        tiny_model(), length, **prompt(batch=2), do_sample=True, output_scores=True
    )
    assert len(actual.scores) == 20
    for ours, theirs in zip(actual.scores, expected.scores, strict=True):
        assert torch.equal(ours, theirs)


def test_several_answers_to_one_prompt(length: int | None) -> None:
    actual, _ = ours_and_theirs(
        tiny_model(), length, **prompt(), do_sample=True, num_return_sequences=4
    )
    assert len({tuple(row) for row in actual.sequences.tolist()}) > 1


def test_assisted(length: int | None) -> None:
    # Two tiles stay in memory, of which candidates are taken back.
    inputs = prompt(tokens=170)
    ours_and_theirs(tiny_model(), length, **inputs, assistant_model=tiny_model("qwen2"))


def test_assisted_with_sampling(length: int | None) -> None:
    inputs = prompt(tokens=170)
    ours_and_theirs(
        tiny_model(), length, **inputs, assistant_model=tiny_model("qwen2"), do_sample=True
    )


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_more_padding_on_the_left_changes_no_text(attention: str) -> None:
    model, inputs = tiny_model(attention=attention), prompt(tokens=70)
    padded = {name: torch.nn.functional.pad(tensor, (32, 0)) for name, tensor in inputs.items()}
    plain, _ = ours_and_theirs(model, DYNAMIC, **inputs)
    wide, _ = ours_and_theirs(model, DYNAMIC, **padded)
    assert torch.equal(plain.sequences, wide.sequences[:, 32:])


def test_a_prefix_that_is_cached_once_serves_several_prompts(length: int | None) -> None:
    model, prefix = tiny_model(), prompt(tokens=90)["input_ids"]
    with DualBladeCache.for_model(
        model, path="direct", attention="exact", memory_budget="16MiB", max_tokens=length
    ) as cache:
        with torch.no_grad():
            model(input_ids=prefix, cache=cache)
        written = cache.stats().io.written_bytes
        for seed in range(3):
            draw = torch.Generator().manual_seed(seed)
            more = torch.randint(3, 128, (1, 12), generator=draw)
            whole = torch.cat([prefix, more], dim=1)
            inputs = {"input_ids": whole, "attention_mask": torch.ones_like(whole)}
            fresh = generated(model, DynamicCache(config=model.config), **inputs)
            assert torch.equal(generated(model, cache, **inputs).sequences, fresh.sequences)
            cache.crop(prefix.shape[1] - cache.get_seq_length())
            assert cache.get_seq_length() == prefix.shape[1]
        # 121 tokens fill one tile of 64, as the prefix did: nothing was stored again.
        assert cache.stats().io.written_bytes == written > 0


def test_a_pass_over_a_whole_conversation_is_one_step_at_a_time() -> None:
    """Logits of many tokens at once over a filled cache, as when a prompt continues a chat."""
    model, ids = tiny_model(), prompt(tokens=150)["input_ids"]
    with (
        torch.no_grad(),
        DualBladeCache.for_model(
            model, path="direct", attention="exact", memory_budget="16MiB"
        ) as cache,
    ):
        theirs = DynamicCache(config=model.config)
        for part in ids.split([64, 1, 40, 45], dim=1):
            ours = model(input_ids=part, cache=cache).logits
            assert torch.equal(ours, model(input_ids=part, cache=theirs).logits)


_SIZES = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_INNER = {"intermediate_size": 96, "max_position_embeddings": 256}
_LATENTS = {"kv_lora_rank": 32, "q_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32}
_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    # Latents are cached, and keys and values made of them after the cache (MLA).
    "deepseek_v3": {**_SIZES, **_INNER, **_LATENTS, **_EXPERTS, "v_head_dim": 24},
    "minicpm3": {**_SIZES, **_INNER, **_LATENTS, "v_head_dim": 24},
    "gptj": {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8},
    "gpt_neox": {**_SIZES, **_INNER},
    "falcon": {**_SIZES, "multi_query": True, "new_decoder_architecture": False},
    # Spreads its KV heads over all heads before it caches them.
    "falcon, newer": {
        **_SIZES,
        "model_type": "falcon",
        "num_kv_heads": 2,
        "new_decoder_architecture": True,
    },
    "stablelm": {**_SIZES, **_INNER, "num_key_value_heads": 4},
    "starcoder2": {**_SIZES, **_INNER, "num_key_value_heads": 2, "sliding_window": None},
    "olmo2": {**_SIZES, **_INNER, "num_key_value_heads": 2},
    # Computes with its values on their way to attention.
    "doge": {**_SIZES, **_INNER, "num_key_value_heads": 2},
    "granite": {**_SIZES, **_INNER, "num_key_value_heads": 2},
    "mixtral": {
        **_SIZES,
        **_INNER,
        "num_key_value_heads": 2,
        "num_local_experts": 2,
        "sliding_window": None,
    },
}


def made_of(name: str) -> PreTrainedModel:
    facts = {"model_type": name, **ARCHITECTURES[name]}
    config = AutoConfig.for_model(**facts, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_more_architectures(name: str) -> None:
    ours_and_theirs(made_of(name), DYNAMIC, **prompt(batch=2, tokens=80, pad=5))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_configuration_tells_what_is_cached(name: str) -> None:
    model, theirs = made_of(name), DynamicCache()
    with torch.inference_mode():
        model(**prompt(tokens=5), cache=theirs)
    for shape, layer in zip(layer_shapes(model.config), theirs.layers, strict=True):
        assert layer.keys.shape == (1, shape.kv_heads, 5, shape.key_dim)
        assert layer.values.shape == (1, shape.kv_heads, 5, shape.value_dim)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"prefill_chunk_size": 30}])
@pytest.mark.parametrize("attention", ["auto", "tiles"])
def test_models_that_multiply_what_they_cache(attention: str, options: dict[str, Any]) -> None:
    """The stand-ins for keys and values are made real there, and views are taken of them."""
    model, inputs = made_of("deepseek_v3"), prompt(batch=2, tokens=80, pad=5)
    expected = generated(model, DynamicCache(config=model.config), **inputs, **options)
    with DualBladeCache.for_model(
        model,
        path="direct",
        attention=attention,  # type: ignore[arg-type]
        memory_budget="16MiB",
    ) as cache:
        if attention == "auto":
            assert "MLA" in cache.stats().attention_reason
        actual = generated(model, cache, **inputs, **options)
        assert cache.stats().attention == "exact"
    assert torch.equal(actual.sequences, expected.sequences)
