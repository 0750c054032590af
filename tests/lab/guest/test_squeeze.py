"""Under cgroup v2 and on /dev/ngXnY the plan follows memory.max, and nobody is killed for it.

Only correctness and events: nothing here says how fast.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from dualblade import DualBladeCache, EngineConfig
from dualblade.host.cgroup import MemoryCgroup
from dualblade.store.formatting import carry_out_wipe, plan_wipe
from dualblade.units import MIB
from tests.lab.guest.conftest import find_namespace, formatted

LAYERS, HEADS, DIM, CONTEXT = 6, 4, 64, 2048
KV_BYTES = 2 * LAYERS * HEADS * DIM * CONTEXT * 4  # 24 MiB in 12 units
STEPS_MAX = 60


@contextlib.contextmanager
def own_group() -> Iterator[MemoryCgroup]:
    """This process in a memory group of its own; what it has already stays charged elsewhere."""
    with MemoryCgroup() as group:
        assert group.limit.version == 2
        home = group.directory.parent / "cgroup.procs"
        (group.directory / "cgroup.procs").write_text(str(os.getpid()))
        try:
            yield group
        finally:
            group.limit.set(None)
            home.write_text(str(os.getpid()))


def small_llama() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=HEADS * DIM,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=2 * CONTEXT,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval()


class Decode:
    """Greedy steps over CONTEXT random tokens."""

    def __init__(self, model: PreTrainedModel, cache: DualBladeCache) -> None:
        self.model, self.cache, self.tokens = model, cache, [1]
        generator = torch.Generator().manual_seed(1)
        for layer in range(LAYERS):
            rows = [torch.randn(1, HEADS, CONTEXT, DIM, generator=generator) for _ in range(2)]
            cache.append(rows[0], rows[1], layer)

    def step(self) -> int:
        """Bytes planned in the page cache after one more token."""
        with torch.inference_mode():
            out = self.model(torch.tensor([self.tokens[-1:]]), past_key_values=self.cache)
        self.tokens.append(int(out.logits[0, -1].argmax()))
        return self.cache.stats().memory.page_cache_planned_bytes


def test_the_plan_follows_memory_max_and_the_tokens_do_not_change() -> None:
    model = small_llama()
    device = formatted(find_namespace("LABSMALL"))
    config = EngineConfig(staging_bytes=2 * MIB, memory_reserve_bytes=4 * MIB)
    with own_group() as group:
        limit = group.limit.needed_bytes() + 40 * MIB
        group.limit.set(limit)
        with DualBladeCache.for_model(model, store=device, config=config) as cache:
            decode = Decode(model, cache)
            before = [decode.step() for _ in range(4)][-1]
            assert before > KV_BYTES // 4
            squeezed = group.limit.needed_bytes() + 8 * MIB
            group.limit.set(squeezed)
            while len(decode.tokens) < STEPS_MAX and decode.step() >= before // 2:
                pass
            down = cache.stats()
            assert down.memory.page_cache_planned_bytes < before // 2
            assert group.limit.used_bytes() <= squeezed
            group.limit.set(limit)
            while len(decode.tokens) < 3 * STEPS_MAX and decode.step() < before * 3 // 4:
                pass
            stats = cache.stats()
        assert group.limit.oom_kills() == 0
        events = Path(group.directory, "memory.events").read_text()
    assert "oom_kill 0" in events
    assert stats.engine is not None
    assert stats.engine.name == "uring-cmd"
    assert stats.memory.page_cache_planned_bytes >= before * 3 // 4
    assert {"budget fell", "room rose"} <= {event.cause for event in stats.events}
    assert stats.io.demotions > 0
    assert stats.io.written_bytes == stats.stored_bytes
    with DualBladeCache.for_model(
        model, store=device, path="direct", memory_budget="16MiB", config=config
    ) as cache:
        undisturbed = Decode(model, cache)
        while len(undisturbed.tokens) < len(decode.tokens):
            undisturbed.step()
        assert undisturbed.tokens == decode.tokens
    carry_out_wipe(plan_wipe(device), lambda _: None)
