"""What a program does around a cache: modes of torch, wrappers, refused steps, the end."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from dualblade import DualBladeCache
from dualblade.errors import Closed, ConfigError
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

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with torch.no_grad(), cache_for(model, attention="exact") as cache:
        model(**prompt(tokens=100), cache=cache)
        hook = model.model.layers[2].register_forward_pre_hook(stop)  # after the stored layer
        with pytest.raises(KeyboardInterrupt):
            model(input_ids=step, cache=cache)
        hook.remove()
        with pytest.raises(Closed, match="between two layers"):
            model(input_ids=step, cache=cache)


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
