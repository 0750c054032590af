"""The same tokens with the KV on a raw block device as with transformers' own cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from dualblade import DualBladeCache
from dualblade.store.formatting import carry_out_format, plan_format
from dualblade.units import MIB
from tests.devices import loop_device, needs_root
from tests.integration.tiny_models import tiny_model


@needs_root
@pytest.mark.parametrize("path", ["dual", "page-cache", "direct"])
@pytest.mark.parametrize("block_bytes", [512, 4096])
def test_a_block_device_holds_the_kv(tmp_path: Path, path: str, block_bytes: int) -> None:
    model = tiny_model()
    prompt = torch.randint(3, 128, (2, 200), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    options = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(**inputs, **options, past_key_values=DynamicCache())
    with loop_device(tmp_path / "image", 64 * MIB, block_bytes) as device:
        carry_out_format(plan_format(device))
        with DualBladeCache.for_model(
            model, store=device, path=path, memory_budget="16MiB"
        ) as cache:
            assert torch.equal(model.generate(**inputs, **options, past_key_values=cache), expected)
            stats = cache.stats()
            assert stats.stored_bytes > 0
            direct = stats.io.direct_write_bytes
            assert (direct > 0) == (path == "direct")
