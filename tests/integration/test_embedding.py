"""What a program does around a cache: modes of torch, wrappers, refused steps, the end."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    DynamicCache,
    Lfm2Config,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PretrainedConfig,
    Qwen2_5OmniConfig,
    Qwen3NextConfig,
)
from transformers.cache_utils import DummyLayer

from dualblade import DualBladeCache
from dualblade.errors import Closed, ConfigError, Unsupported
from dualblade.hf.beside import batch_of
from dualblade.hf.choice import _attentions_of
from dualblade.hf.held_text import HeldText
from dualblade.hf.layer import StoredLayer
from dualblade.pipeline.layer import Layer
from dualblade.pipeline.memory import TileMemory
from dualblade.pipeline.order import SequenceTable
from tests.integration.tiny_models import prompt, tiny_model


def cache_for(model: Any, path: str = "direct", **options: Any) -> DualBladeCache:
    return DualBladeCache.for_model(model, path=path, memory_budget="16MiB", **options)


def generate(model: Any, cache: Any, inputs: dict[str, torch.Tensor], **options: Any) -> Any:
    return model.generate(**inputs, cache=cache, max_new_tokens=8, do_sample=False, **options)


@pytest.mark.parametrize("path", ["direct", "memory"])
@pytest.mark.parametrize("attention", ["exact", "tiles"])
def test_beams_in_inference_mode(path: str, attention: str) -> None:
    """Tails are selected there, and written outside of it."""
    model, inputs = tiny_model(), prompt(tokens=150)
    expected = generate(model, DynamicCache(config=model.config), inputs, num_beams=3)
    with torch.inference_mode(), cache_for(model, path, attention=attention) as cache:
        assert torch.equal(generate(model, cache, inputs, num_beams=3), expected)


@pytest.mark.parametrize("path", ["direct", "memory"])
@pytest.mark.parametrize("attention", ["exact", "tiles"])
def test_sequences_are_chosen_in_inference_mode(path: str, attention: str) -> None:
    model, inputs = tiny_model(), prompt(batch=3, tokens=100)
    with torch.inference_mode(), cache_for(model, path, attention=attention) as cache:
        model(**inputs, cache=cache)
        cache.batch_select_indices(torch.tensor([2, 0]))
        cache.batch_repeat_interleave(2)
        cache.crop(-3)
    with torch.no_grad(), cache_for(model, path, attention=attention) as cache:
        with torch.inference_mode():
            model(**inputs, cache=cache)
            cache.batch_select_indices(torch.tensor([1]))
        model(input_ids=torch.tensor([[5]]), cache=cache)
        assert cache.get_seq_length() == 101


@pytest.mark.parametrize("attention", ["exact", "tiles"])
def test_a_refused_step_is_not_continued_beside_windows(attention: str) -> None:
    """Layers with a window took the rows in before the first stored layer refused them: going on
    would attend to them at positions that the others do not have."""
    model = tiny_model("gemma3")
    assert model.config.layer_types[0] == "sliding_attention"
    step = torch.tensor([[5, 6, 7]])
    with torch.no_grad(), cache_for(model, attention=attention, max_tokens=102) as cache:
        model(**prompt(tokens=100), cache=cache)
        with pytest.raises(ConfigError, match="past max_tokens=102"):
            model(input_ids=step, cache=cache)
        with pytest.raises(Closed, match="a step was refused") as refused:
            model(input_ids=step[:, :1], cache=cache)
        assert "reset" in str(refused.value.hint)
        cache.reset()
        again = generate(model, cache, prompt(tokens=90))
    plain = generate(model, DynamicCache(config=model.config), prompt(tokens=90))
    assert torch.equal(again, plain)


def test_an_interrupted_step_is_not_continued_beside_windows() -> None:
    model = tiny_model("gemma3")
    step = torch.tensor([[5]])
    with torch.no_grad(), cache_for(model, attention="exact") as cache:
        model(**prompt(tokens=100), cache=cache)
        hook = model.model.layers[2].register_forward_pre_hook(stop)  # after the stored layer
        with pytest.raises(KeyboardInterrupt):
            model(input_ids=step, cache=cache)
        hook.remove()
        with pytest.raises(Closed, match="between two layers"):
            model(input_ids=step, cache=cache)


@pytest.mark.parametrize("path", ["direct", "memory"])
def test_taking_back_from_a_first_pass_that_was_interrupted_before_a_window(path: str) -> None:
    model = tiny_model("gemma3")
    with torch.no_grad(), cache_for(model, path, attention="exact") as cache:
        hook = model.model.layers[2].register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            model(**prompt(tokens=9), cache=cache)
        hook.remove()
        cache.crop(-4)
        with pytest.raises(Closed, match="between two layers"):
            model(input_ids=torch.tensor([[5]]), cache=cache)
        cache.reset()
        model(**prompt(tokens=9), cache=cache)


def test_a_layer_that_holds_nothing_by_its_kind_has_no_sequences() -> None:
    """Of layers that share another's KV, or attend to nothing (transformers 5.24)."""
    assert batch_of(DummyLayer()) == 0


def hybrid_model(family: str = "lfm2") -> Any:
    """Convolutions or linear attention, whose states do not tell how many tokens they have seen,
    around full attention."""
    torch.manual_seed(7)
    other = "conv" if family == "lfm2" else "linear_attention"
    shape = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "layer_types": [other, "full_attention", other, "full_attention", other],
        "num_hidden_layers": 5,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    config: PretrainedConfig = Lfm2Config(**shape)
    if family == "qwen3-next":
        config = Qwen3NextConfig(
            **shape,
            head_dim=16,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
            num_experts=0,
            mlp_only_layers=list(range(5)),
        )
    return AutoModelForCausalLM.from_config(config).eval()


def stop(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("family", ["lfm2", "qwen3-next"])
@pytest.mark.parametrize("path", ["direct", "memory"])
@pytest.mark.parametrize("attention", ["exact", "tiles"])
def test_a_refused_step_is_not_continued_beside_states(
    family: str, path: str, attention: str
) -> None:
    model, inputs = hybrid_model(family), prompt(tokens=90)
    plain = generate(model, DynamicCache(config=model.config), inputs)
    step = torch.tensor([[5, 6, 7]])
    with torch.no_grad(), cache_for(model, path, attention=attention, max_tokens=102) as cache:
        assert torch.equal(generate(model, cache, inputs), plain)
        model(input_ids=step[:, :1], cache=cache)  # another pass, whole
        with pytest.raises(ConfigError, match="past max_tokens=102"):
            model(input_ids=step.repeat(1, 4), cache=cache)
        for _ in range(2):
            with pytest.raises(Closed, match="a step was refused") as refused:
                model(input_ids=step[:, :1], cache=cache)
            assert "reset" in str(refused.value.hint)
        cache.reset()
        assert torch.equal(generate(model, cache, inputs), plain)


@pytest.mark.parametrize("path", ["direct", "memory"])
@pytest.mark.parametrize("layer", [0, 2, 4])
def test_an_interrupted_step_is_not_continued_beside_states(path: str, layer: int) -> None:
    model = hybrid_model()
    with torch.no_grad(), cache_for(model, path, attention="exact") as cache:
        model(**prompt(tokens=100), cache=cache)
        hook = model.model.layers[layer].register_forward_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            model(input_ids=torch.tensor([[5]]), cache=cache)
        hook.remove()
        model(input_ids=torch.tensor([[5]]))  # without the cache: another's business
        with pytest.raises(Closed, match="a step was refused or ended"):
            model(input_ids=torch.tensor([[5]]), cache=cache)


@pytest.mark.parametrize("path", ["direct", "memory"])
def test_what_was_not_begun_or_was_whole_is_continued_beside_states(path: str) -> None:
    """However a pass is begun, and whatever was wrong before the first layer."""
    model, ids = hybrid_model(), prompt(tokens=100)["input_ids"]
    wrapper = torch.nn.Sequential(model)  # as PEFT's, which calls forward itself
    with torch.no_grad(), cache_for(model, path, attention="exact") as cache:
        with pytest.raises(ValueError, match="inputs_embeds"):
            model(input_ids=ids, inputs_embeds=torch.ones(1, 1, 64), cache=cache)
        model.model(input_ids=ids, cache=cache)  # without the head
        with pytest.raises(IndexError):
            model(input_ids=torch.tensor([[1 << 20]]), cache=cache)
        wrapper[0].forward(input_ids=ids[:, :1], cache=cache)
        hook = model.lm_head.register_forward_hook(stop)  # after all layers
        with pytest.raises(KeyboardInterrupt):
            model(input_ids=ids[:, :2], cache=cache)
        hook.remove()
        logits = model(input_ids=ids[:, :1], cache=cache).logits
        whole = torch.cat([ids, ids[:, :1], ids[:, :2], ids[:, :1]], dim=1)
        torch.testing.assert_close(logits[:, -1], model(input_ids=whole).logits[:, -1])


@pytest.mark.parametrize("path", ["direct", "memory"])
@pytest.mark.parametrize("attention", ["exact", "tiles"])
@pytest.mark.parametrize("family", ["gemma3", "llama"])
def test_a_change_of_all_layers_that_ends_half_way_is_not_continued(
    path: str, attention: str, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C between two layers of reorder_cache: lengths are alike, sequences are not."""
    model, inputs = tiny_model(family), prompt(batch=2, tokens=70)
    with torch.no_grad(), cache_for(model, path, attention=attention) as cache:
        model(**inputs, cache=cache)
        monkeypatch.setattr(cache.layers[2], "reorder_cache", stop)
        with pytest.raises(KeyboardInterrupt):
            cache.reorder_cache(torch.tensor([1, 0]))
        with pytest.raises(Closed, match="content is lost"):
            model(input_ids=torch.tensor([[5], [6]]), cache=cache)
        cache.reset()
        model(**inputs, cache=cache)


@pytest.mark.parametrize("path", ["direct", "memory"])
@pytest.mark.parametrize("attention", ["exact", "tiles"])
@pytest.mark.parametrize("family", ["gemma3", "llama"])
def test_wrong_arguments_change_nothing(path: str, attention: str, family: str) -> None:
    model, inputs = tiny_model(family), prompt(batch=2, tokens=70)
    with torch.no_grad(), cache_for(model, path, attention=attention) as cache:
        model(**inputs, cache=cache)
        with pytest.raises((ValueError, RuntimeError)):  # windows take nothing back
            cache.crop(60)
        for wrong in ([7], [True], [False, False]):
            with pytest.raises(ConfigError, match="no sequences of a batch of 2"):
                cache.batch_select_indices(torch.tensor(wrong))
        with pytest.raises(ConfigError, match="cannot be repeated 0 times"):
            cache.batch_repeat_interleave(0)
        model(input_ids=torch.tensor([[5], [6]]), cache=cache)


def test_a_model_is_watched_no_longer_than_its_cache_lives() -> None:
    model = hybrid_model()
    hooks = (model.model._forward_pre_hooks, model.model._forward_hooks)
    cache = cache_for(model)
    assert all(hooks)
    cache.close()
    assert not any(hooks)
    cache = cache_for(model)
    assert all(hooks)
    del cache
    gc.collect()
    assert not any(hooks)


def test_a_cache_that_ends_while_a_model_runs_its_hooks_disturbs_nobody() -> None:
    """Another thread closes it, or the collector frees it: torch goes on with a copy of the list of
    hooks, and gives those that were removed less."""
    model = hybrid_model()
    with cache_for(model) as cache:
        closing: list[DualBladeCache] = []

        def close(*_: Any) -> None:
            if closing:
                closing.pop().close()

        for module in (model, model.model):
            for kind in ("register_forward_pre_hook", "register_forward_hook"):
                handle = getattr(module, kind)(close)
                closing.append(cache_for(model))
                cache.reset()
                generate(model, cache, prompt(tokens=20))
                assert not closing
                handle.remove()


@pytest.mark.parametrize("is_reset", [True, False])
@pytest.mark.parametrize("family", ["gemma3", "lfm2"])
def test_layers_beside_ours_do_not_grow_after_candidates(family: str, *, is_reset: bool) -> None:
    """transformers leaves them recording what candidates may have to be taken back from."""
    model = hybrid_model() if family == "lfm2" else tiny_model(family)

    def held() -> list[int]:
        states = (getattr(la, "conv_states", {0: getattr(la, "keys", None)}) for la in beside)
        return [state[0].shape[-1 if family == "lfm2" else -2] for state in states]

    with cache_for(model, attention="exact") as cache:
        beside = [la for la in cache.layers if not isinstance(la, StoredLayer)]
        ids = generate(model, cache, prompt(tokens=90))
        least = held()
        cache.reset()
        ids = generate(model, cache, prompt(tokens=90), prompt_lookup_num_tokens=4)
        if is_reset:
            cache.reset()
        new = torch.cat([ids, prompt(tokens=20, seed=4)["input_ids"]], dim=1)
        inputs = {"input_ids": new, "attention_mask": torch.ones_like(new)}
        plain = generate(model, DynamicCache(config=model.config), inputs)
        assert torch.equal(generate(model, cache, inputs), plain)
        assert held() == least


@pytest.mark.parametrize("family", ["lfm2", "qwen3-next"])
@pytest.mark.parametrize("path", ["direct", "memory"])
def test_another_batch_after_reset_beside_states(family: str, path: str) -> None:
    """transformers zeroes states, of the batch that there was."""
    model = hybrid_model(family)
    with torch.no_grad(), cache_for(model, path, attention="exact") as cache:
        for batch in (2, 1, 3):
            inputs = prompt(batch=batch, tokens=70)
            plain = generate(model, DynamicCache(config=model.config), inputs)
            assert torch.equal(generate(model, cache, inputs), plain)
            cache.reset()


@pytest.mark.parametrize("family", ["gemma3", "lfm2"])
def test_candidates_that_were_refused_leave_no_layer_recording(family: str) -> None:
    """transformers lets them record, and only then refuses several sequences."""
    model = hybrid_model() if family == "lfm2" else tiny_model(family)
    inputs = prompt(batch=2, tokens=90)
    with cache_for(model, attention="exact") as cache:
        with pytest.raises(ValueError, match="batch_size = 1"):
            generate(model, cache, inputs, prompt_lookup_num_tokens=4)
        plain = generate(model, DynamicCache(config=model.config), inputs)
        assert torch.equal(generate(model, cache, inputs), plain)
        assert not any(layer.record_past for layer in cache.layers)


def test_what_is_to_be_recorded_is_in_a_first_text_too() -> None:
    model = hybrid_model()
    with cache_for(model, attention="exact") as cache:
        cache.activate_past_recording()
        ids = generate(model, cache, prompt(tokens=90))
        cache.crop(-2)
        plain = generate(model, DynamicCache(config=model.config), {"input_ids": ids})
        assert torch.equal(generate(model, cache, {"input_ids": ids}), plain)


@pytest.mark.parametrize("family", ["lfm2", "qwen3-next"])
@pytest.mark.parametrize("path", ["direct", "memory"])
def test_states_of_inference_mode_are_forgotten_outside_it(path: str, family: str) -> None:
    model, inputs = hybrid_model(family), prompt(tokens=70)
    cache = cache_for(model, path, attention="exact")
    for end in (cache.reset, cache.close):
        with torch.inference_mode():
            model(**inputs, cache=cache)
        end()
    with pytest.raises(Closed, match="this cache is closed"), torch.no_grad():
        model(**inputs, cache=cache)


@pytest.mark.parametrize("family", ["lfm2", "qwen3-next"])
@pytest.mark.parametrize("path", ["direct", "memory"])
def test_states_of_inference_mode_are_written_outside_it(path: str, family: str) -> None:
    model, inputs = hybrid_model(family), prompt(tokens=70)
    plain = generate(model, DynamicCache(config=model.config), inputs)
    with cache_for(model, path, attention="exact") as cache:
        with torch.inference_mode():
            model(input_ids=inputs["input_ids"][:, :40], cache=cache)
            cache.reorder_cache(torch.tensor([0]))
        assert torch.equal(generate(model, cache, inputs), plain)
        with torch.inference_mode():
            model(input_ids=torch.tensor([[5]]), cache=cache)


@pytest.mark.parametrize("family", ["lfm2", "qwen3-next"])
@pytest.mark.parametrize("path", ["direct", "memory"])
def test_sequences_with_states_are_chosen_and_repeated(path: str, family: str) -> None:
    model, ids = hybrid_model(family), prompt(batch=3, tokens=70)["input_ids"]
    new = torch.tensor([[5], [6], [5], [6]])
    with torch.no_grad(), cache_for(model, path, attention="exact") as cache:
        model(input_ids=ids, cache=cache)
        cache.batch_select_indices(torch.tensor([-1, 0, 1]))
        cache.batch_select_indices(torch.tensor([True, True, False]))
        cache.batch_repeat_interleave(2)
        seen = model(input_ids=new, cache=cache).logits
        cache.reset()
        model(input_ids=ids[[2, 2, 0, 0]], cache=cache)
        assert torch.allclose(model(input_ids=new, cache=cache).logits, seen, atol=1e-5)


class Nothing(torch.nn.Module):
    """In place of a layer's attention."""

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        return torch.zeros_like(hidden_states), None


@pytest.mark.parametrize("left_out", [0, 1, 2])
def test_a_layer_without_rows_is_refused(left_out: int) -> None:
    """As models that were pruned have, or that were given an attention of their own."""
    model, inputs = tiny_model(), prompt(tokens=70)
    model.model.layers[left_out].self_attn = Nothing()
    plain = generate(model, DynamicCache(config=model.config), inputs)
    with cache_for(model, "memory", attention="exact") as cache:
        assert torch.equal(generate(model, cache, inputs), plain)
    with torch.no_grad(), cache_for(model, attention="exact") as cache:
        model(**inputs, cache=cache)
        if left_out == 2:  # the last: all that there is is in a row
            cache.reset()
            assert torch.equal(generate(model, cache, inputs), plain)
            return
        with pytest.raises(Unsupported, match="gives one of its cached layers no keys"):
            model(input_ids=torch.tensor([[5]]), cache=cache)
        with pytest.raises(Closed):
            model(input_ids=torch.tensor([[5]]), cache=cache)


@pytest.mark.parametrize("attention", ["exact", "tiles"])
def test_half_a_first_pass_is_noticed_where_the_first_layer_is_not_used(attention: str) -> None:
    model, inputs = tiny_model(), prompt(tokens=70)
    model.model.layers[0].self_attn = Nothing()
    with torch.no_grad(), cache_for(model, "memory", attention=attention) as cache:
        last = model.model.layers[2]
        hook = last.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(**inputs, cache=cache)
        hook.remove()
        with pytest.raises(Closed):
            model(input_ids=torch.tensor([[5]]), cache=cache)


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_two_loans_end_one_by_one_though_the_configuration_was_replaced() -> None:
    model = tiny_model()
    config = model.config
    with cache_for(model, attention="tiles"):
        model.config = copy.deepcopy(config)
        second = cache_for(model, attention="tiles")
    assert config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == "dualblade"
    second.close()
    assert model.config._attn_implementation == "sdpa"


def test_a_model_whose_configuration_was_replaced_has_its_attention_again() -> None:
    model = tiny_model()
    config = model.config
    with cache_for(model, attention="tiles"):
        model.config = copy.deepcopy(config)
        assert config._attn_implementation == "dualblade"
    assert config._attn_implementation == "sdpa"


def test_a_model_with_a_cache_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    monkeypatch.setattr(type(model), "_supports_default_dynamic_cache", lambda *_: False)
    with pytest.raises(Unsupported, match="has a cache of its own"):
        cache_for(model)


def test_ids_are_held_on_the_processor_whatever_is_the_default() -> None:
    text = HeldText()
    ids = torch.arange(12).reshape(1, 12)
    with torch.device("meta"):
        text.bring(0, ids[:, :8])
        assert text.shared_with(8, ids, None) == 8
        other = ids.clone()
        other[0, 3] = 99
        assert text.shared_with(8, other, None) == 3


@pytest.mark.parametrize("path", ["direct", "memory"])
def test_a_text_begun_in_inference_mode_goes_on_outside_it(path: str) -> None:
    model, inputs = tiny_model(), prompt(tokens=70)
    with cache_for(model, path) as cache:
        with torch.inference_mode():
            ids = generate(model, cache, inputs)
        more = torch.cat([ids, prompt(tokens=20, seed=4)["input_ids"]], dim=1)
        plain = generate(model, DynamicCache(config=model.config), {"input_ids": more})
        assert torch.equal(generate(model, cache, {"input_ids": more}), plain)
        with pytest.raises(ConfigError, match="differs from"):
            generate(model, cache, {"input_ids": torch.cat([more, more], dim=1)})


@pytest.mark.parametrize("path", ["direct", "memory"])
def test_recurrent_states_do_not_go_back_whatever_was_recorded(path: str) -> None:
    """They are sums over all tokens; transformers' crop leaves them as they are."""
    model = hybrid_model("qwen3-next")
    with torch.no_grad(), cache_for(model, path, attention="exact") as cache:
        cache.activate_past_recording()
        model(**prompt(tokens=70), cache=cache)
        with pytest.raises(Unsupported, match="nothing of tokens to go back to"):
            cache.crop(-1)
        model(input_ids=torch.tensor([[5]]), cache=cache)


@pytest.mark.parametrize("is_window_first", [True, False])
@pytest.mark.parametrize("path", ["direct", "memory"])
def test_taking_back_more_than_there_is_changes_nothing_beside_windows(
    path: str, *, is_window_first: bool
) -> None:
    model = tiny_model("gemma3")
    if not is_window_first:
        model.config.layer_types = ["full_attention", "sliding_attention", "sliding_attention"]
        model = type(model)(model.config).eval()
    with torch.no_grad(), cache_for(model, path, attention="exact") as cache:
        cache.crop(-3)  # of nothing
        model(**prompt(tokens=8), cache=cache)
        with pytest.raises(ConfigError, match="cannot take back 9 tokens of 8"):
            cache.crop(-9)
        assert {layer.get_seq_length() for layer in cache.layers} == {8}
        model(input_ids=torch.tensor([[5]]), cache=cache)


@pytest.mark.parametrize("path", ["direct", "memory"])
def test_what_the_first_layer_refuses_has_changed_nothing_beside_states(path: str) -> None:
    model = hybrid_model()
    with torch.no_grad(), cache_for(model, path, attention="exact") as cache:
        model(**prompt(batch=2, tokens=70), cache=cache)
        with pytest.raises(Unsupported, match="nothing of tokens to go back to"):
            cache.crop(-1)
        for wrong in ([7], [True, False, True], [True]):
            with pytest.raises(ConfigError, match="no sequences of a batch of 2"):
                cache.batch_select_indices(torch.tensor(wrong))
        with pytest.raises(ConfigError, match="no sequences of a batch of 2"):
            cache.batch_select_indices(torch.empty(0, dtype=torch.int64))
        for numbers in (torch.tensor([0.0]), torch.tensor([[0]]), torch.tensor([0]).byte()):
            with pytest.raises(ConfigError, match="a list of numbers or bools"):
                cache.batch_select_indices(numbers)
        model(input_ids=torch.tensor([[5], [6]]), cache=cache)


@pytest.mark.parametrize("path", ["direct", "memory"])
def test_windows_behind_full_attention_that_cannot_go_back_refuse_before_it_does(path: str) -> None:
    model = tiny_model("gemma3")
    model.config.layer_types = ["full_attention", "sliding_attention", "sliding_attention"]
    model = type(model)(model.config).eval()
    with torch.no_grad(), cache_for(model, path, attention="exact") as cache:
        first = generate(model, cache, prompt(tokens=8))
        cache.crop(-1)  # within the window
        assert {layer.get_seq_length() for layer in cache.layers} == {14}
        generate(model, cache, {"input_ids": torch.cat([first, first], dim=1)})
        with pytest.raises(Unsupported, match="nothing of tokens to go back to"):
            cache.crop(-5)
        model(input_ids=torch.tensor([[5]]), cache=cache)


@pytest.mark.parametrize("path", ["direct", "memory"])
def test_windows_go_back_as_far_as_they_recorded(path: str) -> None:
    """After candidates, whose record is as long as their last pass; and crop(0) changes nothing."""
    model = tiny_model("gemma3")
    model.config.layer_types = ["full_attention", "sliding_attention", "sliding_attention"]
    model = type(model)(model.config).eval()
    window = model.config.sliding_window
    with torch.no_grad(), cache_for(model, path, attention="exact") as cache:
        generate(model, cache, {**prompt(tokens=3 * window)})
        with pytest.raises(ConfigError, match="as a negative number"):
            cache.crop(3)
        cache.crop(0)
        for layer in cache.layers:
            if hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()
        tokens = cache.get_seq_length()
        model(input_ids=torch.tensor([[5, 6, 7]]), cache=cache)
        with pytest.raises(Unsupported, match="nothing of tokens to go back to"):
            cache.crop(-4)
        assert {layer.get_seq_length() for layer in cache.layers} == {tokens + 3}
        cache.crop(-3)
        assert {layer.get_seq_length() for layer in cache.layers} == {tokens}
        model(input_ids=torch.tensor([[5]]), cache=cache)


@pytest.mark.parametrize("path", ["direct", "memory"])
def test_taking_back_too_much_is_refused_and_all_leaves_room_for_another_batch(path: str) -> None:
    model = tiny_model()
    with torch.no_grad(), cache_for(model, path, attention="exact") as cache:
        model(**prompt(tokens=70), cache=cache)
        with pytest.raises(ConfigError, match="cannot take back 71 tokens of 70"):
            cache.crop(-71)
        model(input_ids=torch.tensor([[5]]), cache=cache)
        cache.crop(-71)
        if path == "memory":
            inputs = prompt(batch=3, tokens=20)
            out = model(**inputs, cache=cache).logits
            assert torch.equal(out, model(**inputs, cache=DynamicCache(config=model.config)).logits)


@pytest.mark.parametrize("path", ["direct", "memory"])
def test_sequences_selected_in_some_layers_alone_are_not_continued(path: str) -> None:
    """Ctrl-C among the layers of reorder_cache: all have as many tokens, of different beams."""
    model, inputs = tiny_model(), prompt(batch=2, tokens=70)
    with torch.no_grad(), cache_for(model, path, attention="tiles") as cache:
        model(**inputs, cache=cache)
        cache.layers[0].reorder_cache(torch.tensor([1, 0]))
        with pytest.raises(Closed, match="between two layers"):
            model(input_ids=torch.tensor([[5], [6]]), cache=cache)


@pytest.mark.parametrize("path", ["direct", "memory"])
def test_an_interrupted_selection_loses_the_content(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = tiny_model(), prompt(batch=2, tokens=70)
    with torch.no_grad(), cache_for(model, path, attention="tiles") as cache:
        model(**inputs, cache=cache)
        monkeypatch.setattr(SequenceTable, "select", stop)
        with pytest.raises(KeyboardInterrupt):
            cache.reorder_cache(torch.tensor([1, 0]))
        with pytest.raises(Closed, match=r"failed earlier \(KeyboardInterrupt: \)"):
            model(input_ids=torch.tensor([[5], [6]]), cache=cache)


def test_a_query_that_wants_a_gradient_is_refused() -> None:
    """As of adapters on the query alone: keys and values say nothing of it."""
    model = tiny_model().requires_grad_(False)
    with cache_for(model, attention="tiles") as cache:
        model(**prompt(tokens=70), cache=cache)
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.requires_grad_(True)
        with pytest.raises(Unsupported, match="no gradients"):
            model(input_ids=torch.tensor([[5]]), cache=cache)


def test_rows_of_another_type_are_refused_in_memory_too() -> None:
    with cache_for(tiny_model(), "memory", attention="exact") as cache:
        rows = torch.ones(1, 2, 4, 16)
        cache.update(rows, rows, 0)
        with pytest.raises(ConfigError, match=r"torch\.float32, now 1 of torch\.bfloat16"):
            cache.update(rows.bfloat16(), rows.bfloat16(), 0)


@pytest.mark.parametrize("attention", ["exact", "tiles"])
def test_the_stated_maximum_holds_in_memory_too(attention: str) -> None:
    model = tiny_model()
    with torch.no_grad(), cache_for(model, "memory", attention=attention, max_tokens=102) as cache:
        with pytest.raises(ConfigError, match="past max_tokens=102"):
            model(**prompt(tokens=103), cache=cache)
        cache.reset()
        model(**prompt(batch=2, tokens=100), cache=cache)
        with pytest.raises(ConfigError, match="changed"):
            model(input_ids=torch.tensor([[5]]), cache=cache)


@pytest.mark.parametrize(("path", "attention"), [("memory", "exact"), ("memory", "tiles")])
def test_a_closed_cache_in_memory_holds_nothing_and_says_so(path: str, attention: str) -> None:
    model = tiny_model()
    with torch.no_grad(), cache_for(model, path, attention=attention) as cache:
        model(**prompt(tokens=100), cache=cache)
        if attention == "tiles":
            (in_memory, *_) = cache._pipeline._memory._held.values()
        else:
            in_memory = cache.layers[0].keys.untyped_storage()
        held = weakref.ref(in_memory)
        del in_memory
        assert held() is not None
    assert held() is None
    with torch.no_grad(), pytest.raises(Closed, match="closed"):
        model(**prompt(tokens=100), cache=cache)


def test_tiles_in_memory_that_another_thread_frees_in_a_step_are_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model()
    with torch.no_grad(), cache_for(model, "memory", attention="tiles") as cache:
        model(**prompt(tokens=200), cache=cache)
        view = TileMemory.view

        def freed(self: Any, *args: Any) -> torch.Tensor:
            cache.close()
            return view(self, *args)

        monkeypatch.setattr(TileMemory, "view", freed)
        with pytest.raises(Closed, match="this cache is closed"):
            model(input_ids=torch.tensor([[5]]), cache=cache)


@pytest.mark.parametrize("path", ["direct", "memory"])
@pytest.mark.parametrize("asked", ["token_bytes", "tail_bytes"])
def test_stats_are_told_while_another_thread_adds_layers(
    path: str, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    with torch.no_grad(), cache_for(model, path, attention="tiles") as cache:
        model(**prompt(tokens=70), cache=cache)
        told, layers = cache.stats().kv_bytes, cache._pipeline._layers

        def adding(_: Any) -> int:
            layers[len(layers)] = layers[0]
            return 8

        kind = adding if asked == "token_bytes" else property(adding)
        monkeypatch.setattr(Layer, asked, kind)
        assert cache.stats().kv_bytes in (told, 70 * 8 * 3)
        while len(layers) > 3:
            layers.popitem()


def test_a_wrapper_shares_the_attention_of_what_it_wraps() -> None:
    class Wrapper(torch.nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.inner = model

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.inner, name)

    model = tiny_model()
    wrapper: Any = Wrapper(model)
    first = cache_for(model, attention="tiles")
    with cache_for(wrapper, attention="auto") as second:
        assert second.stats().attention == "tiles"
        first.close()
        assert model.config._attn_implementation == "dualblade"
    assert model.config._attn_implementation == "sdpa"


def test_models_of_one_configuration_share_their_attention() -> None:
    one = tiny_model()
    other = type(one)(one.config).eval()
    assert other.config is one.config
    first = cache_for(one)
    with cache_for(other) as second:
        assert second.stats().attention == "tiles"
        first.close()
        assert one.config._attn_implementation == "dualblade"
        generate(other, second, prompt(tokens=90))
        assert second.stats().attention == "tiles"
    assert one.config._attn_implementation == "sdpa"


def test_a_model_copied_while_attention_is_lent_to_it_has_its_own_in_the_end() -> None:
    model = tiny_model()
    with cache_for(model):
        other = copy.deepcopy(model)
    assert other.config._attn_implementation == "dualblade"
    with cache_for(other) as cache:
        assert cache.stats().attention == "tiles"
    assert other.config._attn_implementation == "sdpa"


def test_attention_of_configurations_within_others_is_kept_to_any_depth() -> None:
    config = Qwen2_5OmniConfig()
    within = config.thinker_config
    within._attn_implementation_internal = "sdpa"
    within.vision_config._attn_implementation_internal = "eager"
    kept = _attentions_of(config)["thinker_config"]
    assert (kept[""], kept["vision_config"][""]) == ("sdpa", "eager")


def test_lending_while_another_thread_gives_back() -> None:
    model = tiny_model()
    plain, entered, going = model.set_attn_implementation, threading.Event(), threading.Event()

    def slow(name: Any) -> None:
        entered.set()
        going.wait(1)
        plain(name)

    first = cache_for(model, attention="tiles")
    model.set_attn_implementation = slow
    closing = threading.Thread(target=first.close)
    closing.start()
    entered.wait()
    model.set_attn_implementation = plain
    with cache_for(model) as second:
        closing.join()
        assert second.stats().attention == "tiles"
        assert model.config._attn_implementation == "dualblade"
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(("text", "word"), [("eager", "exact"), ("sdpa", "tiles")])
def test_auto_asks_the_attention_of_the_text_model(text: str, word: str) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            **shape, num_hidden_layers=1, image_size=28, patch_size=14, projection_dim=32
        ),
        text_config=tiny_model().config,
        image_token_index=3,
    )
    other = "sdpa" if text == "eager" else "eager"
    names = {"": other, "text_config": text, "vision_config": other}
    config._attn_implementation = names
    model = LlavaForConditionalGeneration(config).eval()
    for _ in range(2):
        with cache_for(model) as cache, cache_for(model) as again:
            assert cache.stats().attention == again.stats().attention == word
        assert model.config.text_config._attn_implementation == text
        assert model.config.vision_config._attn_implementation == other


@pytest.mark.parametrize("family", ["llama", "lfm2"])
def test_a_model_is_saved_while_a_cache_of_it_is_open_and_the_cache_is_not(family: str) -> None:
    model = hybrid_model() if family == "lfm2" else tiny_model()
    inputs = prompt(tokens=60)
    with cache_for(model) as cache:
        for saved in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
            with cache_for(saved, attention="exact") as other:
                ours = generate(saved, other, inputs)
            plain = generate(saved, DynamicCache(config=saved.config), inputs)
            assert torch.equal(ours, plain)
        generate(model, cache, inputs)
        with pytest.raises(Unsupported, match="cannot be saved"):
            pickle.dumps(cache)
        with pytest.raises(Unsupported, match="cannot be saved"):
            torch.save(cache, io.BytesIO())
        with torch.no_grad():
            model(input_ids=torch.tensor([[5]]), cache=cache)


@pytest.mark.parametrize("path", ["direct", "memory"])
def test_a_compiled_model_gives_the_same(path: str) -> None:
    """The cache and attention over tiles are left out of its graphs."""
    model, ids = tiny_model(), prompt(tokens=90)["input_ids"]
    del model.model.layers[1:]
    model.config.num_hidden_layers = 1
    logits = []
    for runs in (model, torch.compile(model, backend="eager")):
        torch.compiler.reset()
        with torch.inference_mode(), cache_for(model, path, attention="tiles") as cache:
            parts = ids.split([80, 5, 5], dim=1)
            logits.append([runs(part, cache=cache).logits for part in parts])
            assert cache.stats().attention == "tiles", "nothing was touched on the way"
    for plain, compiled in zip(*logits, strict=True):
        torch.testing.assert_close(plain, compiled)
