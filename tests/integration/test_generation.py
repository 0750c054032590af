"""What `generate` does with a model: chunks of the prompt, candidates, the model's own settings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import DynamicCache, PreTrainedTokenizerFast

import dualblade
from dualblade.cli.generation import Generation, Sampling, check_candidates, generate_text
from dualblade.errors import Unsupported
from dualblade.hf.models import LoadedModel
from dualblade.hf.random_models import ByteTokenizer
from tests.integration.tiny_models import prompt, tiny_model

CHUNK = 32


def loaded() -> LoadedModel:
    model = tiny_model()
    return LoadedModel(
        model=model,
        config=model.config,
        tokenizer=ByteTokenizer(128),
        name="tiny",
        source="a test",
        chat=False,
        positions_max=512,
    )


def tokens_of(repeats: int = 4) -> list[int]:
    """Text that repeats itself, so that candidates are found."""
    return prompt(tokens=41)["input_ids"][0].tolist() * repeats


def generated(
    on: LoadedModel, *, lookup: int = 0, count: int = 24, path: str = "direct", text: Any = None
) -> tuple[Generation, list[int], list[float]]:
    """What was generated, the rows of each forward pass, and the progress that was told."""
    rows: list[int] = []
    layer = on.model.model.layers[0]
    hook = layer.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[1]))
    told: list[float] = []
    try:
        with dualblade.DualBladeCache.for_model(
            on.model, memory_budget="16MiB", path=path, attention="exact"
        ) as cache:
            made = generate_text(
                on,
                tokens_of() if text is None else text,
                cache,
                Sampling(
                    max_new_tokens=count,
                    temperature=0,
                    seed=0,
                    prefill_chunk_tokens=CHUNK,
                    prompt_lookup=lookup,
                ),
                lambda _text: None,
                told.append,
                lambda: None,
            )
    finally:
        hook.remove()
    return made, rows, told


@pytest.mark.parametrize("path", ["memory", "direct", "dual"])
def test_candidates_change_no_token_and_the_prompt_comes_in_chunks(path: str) -> None:
    on = loaded()
    plain, _, _ = generated(on, path=path)
    made, rows, told = generated(on, lookup=6, path=path)
    assert made.tokens == plain.tokens
    chunks = -(-len(tokens_of()) // CHUNK)
    assert max(rows) <= CHUNK
    assert sum(rows[:chunks]) == len(tokens_of())
    assert 1 < max(rows[chunks:]) <= 1 + 6  # only what is new: the newest token and candidates
    assert told[-1] == 1.0
    assert len(told) == chunks * on.model.config.num_hidden_layers


def test_sweeps_are_the_passes_after_the_prompts() -> None:
    made, rows, _ = generated(loaded(), lookup=6)
    chunks = -(-len(tokens_of()) // CHUNK)
    assert made.sweeps == len(rows) - chunks
    assert made.tokens_per_sweep == (len(made.tokens) - 1) / made.sweeps
    assert len(set(made.seconds)) == 1 + made.sweeps  # tokens of a sweep come together
    assert made.seconds[0] < made.seconds[1]  # the first token is the prompt's alone


def test_one_token_takes_no_sweep() -> None:
    made, rows, _ = generated(loaded(), lookup=6, count=1)
    assert (len(made.tokens), made.sweeps) == (1, 0)
    assert sum(rows) == len(tokens_of())


def test_a_text_that_ends_with_its_first_token_ends() -> None:
    on = loaded()
    first = generated(on, count=1)[0].tokens[0]
    for ends in (first, [first, 5]):
        on.model.generation_config.eos_token_id = ends
        assert generated(on, lookup=6)[0].tokens == [first]


def test_the_model_is_left_as_it_was() -> None:
    on = loaded()
    generated(on, lookup=6)
    assert "prepare_inputs_for_generation" not in vars(on.model)


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 5.0},
        {"no_repeat_ngram_size": 1},
        {"num_beams": 3},
        {"do_sample": True, "top_p": 0.5, "temperature": 2.0},
        {"return_dict_in_generate": True},
        {"cache_implementation": "static"},
    ],
)
@pytest.mark.parametrize("lookup", [0, 6])
def test_settings_of_the_model_choose_no_token(settings: dict[str, Any], lookup: int) -> None:
    on = loaded()
    plain = generated(on, lookup=lookup)[0].tokens
    for name, value in settings.items():
        setattr(on.model.generation_config, name, value)
    assert generated(on, lookup=lookup)[0].tokens == plain


@pytest.mark.parametrize("lookup", [0, 6])
def test_how_an_answer_ended_is_told(lookup: int) -> None:
    on = loaded()
    on.model.generation_config.eos_token_id = None
    made = generated(on, lookup=lookup)[0]
    assert (len(made.tokens), made.ended) == (24, "limit")
    # One that comes: the text is over there, also where that is the last that was asked for.
    on.model.generation_config.eos_token_id = made.tokens[0]
    assert generated(on, lookup=lookup)[0].ended == "end of text"
    assert generated(on, lookup=lookup, count=1)[0].ended == "end of text"


def test_prompt_lookup_of_a_model_with_a_state_is_refused_before_its_prompt() -> None:
    on = loaded()
    on.model._is_stateful = True
    with pytest.raises(Unsupported, match="cannot take tokens back"):
        check_candidates(on.name, on.model)
    on.model._is_stateful = False
    check_candidates(on.name, on.model)


@pytest.mark.parametrize("attention", ["exact", "tiles"])
@pytest.mark.parametrize("path", ["memory", "direct"])
def test_a_float32_model_under_autocast(attention: str, path: str) -> None:
    """Its rotary positions leave keys in float32 and values in bfloat16."""
    model, inputs = tiny_model(), prompt(tokens=150)
    options: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model.generate(**inputs, cache=DynamicCache(config=model.config), **options)
        with dualblade.DualBladeCache.for_model(
            model,
            memory_budget="16MiB",
            path=path,
            attention=attention,  # type: ignore[arg-type]
        ) as cache:
            got = model.generate(**inputs, cache=cache, **options)
    assert got.shape == expected.shape
    if attention == "exact":
        assert torch.equal(got, expected)


@pytest.mark.parametrize("path", ["memory", "direct"])
def test_logits_over_tiles_under_autocast(path: str) -> None:
    """As near as bfloat16 is; tokens may differ where two are as likely."""
    model, inputs = tiny_model(), prompt(tokens=150)
    last = inputs["input_ids"][:, -1:]

    def logits(cache: Any) -> torch.Tensor:
        model(**inputs, cache=cache)
        out: torch.Tensor = model(input_ids=last, cache=cache).logits
        return out.float()

    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = logits(DynamicCache(config=model.config))
        with dualblade.DualBladeCache.for_model(
            model, memory_budget="16MiB", path=path, attention="tiles"
        ) as cache:
            got = logits(cache)
            assert cache.stats().attention == "tiles"
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0.02 * float(expected.abs().max()))


def test_words_that_a_model_comes_with_end_its_text() -> None:
    """transformers looks them up in the tokenizer."""
    words = {f"w{token} ": token for token in range(127)} | {"abcdef": 127}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0 "))
    )
    on = replace(loaded(), tokenizer=tokenizer)
    plain = generated(on)[0].tokens
    end = plain.index(plain[2])
    on.model.generation_config.stop_strings = [f"w{plain[2]} "]
    assert generated(on)[0].tokens == plain[: end + 1]
