"""A model generates with its KV on /dev/ngXnY: the same tokens, and an honest end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from dualblade import DualBladeCache, StorageError
from dualblade.store.formatting import carry_out_wipe, plan_wipe
from tests.integration.tiny_models import tiny_model
from tests.lab.guest.conftest import ask, find_namespace, formatted


def generate(model: PreTrainedModel, cache: Any, **options: Any) -> torch.Tensor:
    prompt = torch.randint(3, 128, (2, 200), generator=torch.Generator().manual_seed(1))
    return model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        cache=cache,
        **{"max_new_tokens": 8, **options},
    )


@pytest.mark.parametrize("path", ["direct", "dual"])
def test_the_same_tokens_as_in_memory(path: str) -> None:
    model = tiny_model()
    expected = generate(model, DynamicCache())
    device = formatted(find_namespace("LABSMALL"))
    with DualBladeCache.for_model(model, store=device, path=path, memory_budget="16MiB") as cache:
        assert torch.equal(generate(model, cache), expected)
        stats = cache.stats()
        assert stats.engine.name == "uring-cmd"
        assert stats.stored_bytes > 0
        if path == "direct":
            assert stats.io.direct_read_bytes > 0
            assert stats.memory.page_cache_bytes == 0
    carry_out_wipe(plan_wipe(device), tell=lambda _: None)


def test_a_drive_unplugged_in_mid_generation() -> None:
    """The step that misses its KV raises; no token is made up, and everything is let go of."""

    class Unplugger:
        """Asked by generate() after each token whether to stop."""

        tokens = 0

        def __call__(self, ids: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
            self.tokens = ids.shape[1]
            if self.tokens == 203:
                ask("device_del", id="lost-drive")
            return torch.zeros(ids.shape[0], dtype=torch.bool)

    model = tiny_model()
    device = formatted(find_namespace("LABLOST"))
    cache = DualBladeCache.for_model(model, store=device, path="direct", memory_budget="16MiB")
    seen = Unplugger()
    with pytest.raises(StorageError) as caught:
        generate(model, cache, stopping_criteria=[seen], max_new_tokens=300, min_new_tokens=300)
    assert device in str(caught.value)
    assert seen.tokens >= 203
    with pytest.raises(StorageError):
        cache.close()
    cache.close()
