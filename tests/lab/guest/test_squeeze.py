"""Under cgroup v2 and on /dev/ngXnY the plan follows the memory that a neighbour takes and gives
back, and nobody is killed. Only correctness and events: nothing here says how fast."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from dualblade import DualBladeCache, EngineConfig
from dualblade.host.cgroup import MemoryCgroup
from dualblade.metrics import ResidencyEvent
from dualblade.store.formatting import carry_out_wipe, plan_wipe
from dualblade.units import MIB
from tests.lab.guest.conftest import find_namespace, formatted

LAYERS, HEADS, DIM, CONTEXT = 8, 4, 64, 1024
KV_BYTES = 2 * LAYERS * HEADS * DIM * CONTEXT * 4  # 16 MiB in 16 units
ROOM_BYTES = 40 * MIB  # for KV, 2 MiB of staging, the reserve, and what steps allocate
STEPS_MAX = 100

# Touches its memory in small steps, as processes do that grow, when it is told how much.
HOG = """
import sys
print("ready", flush=True)
held = [bytearray(b"x") * (1 << 20) for _ in range(int(sys.stdin.readline()))]
print("held", flush=True)
sys.stdin.readline()
"""


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

    def step(self) -> None:
        with torch.inference_mode():
            out = self.model(torch.tensor([self.tokens[-1:]]), cache=self.cache)
        self.tokens.append(int(out.logits[0, -1].argmax()))

    def until(self, wanted: Callable[[ResidencyEvent], bool]) -> ResidencyEvent:
        """Steps until something that is `wanted` happens to the plan; what happened before does
        not count."""
        seen = len(self.cache.stats().events)
        for _ in range(STEPS_MAX):
            self.step()
            events = self.cache.stats().events
            for event in events[seen:]:
                if wanted(event):
                    return event
        raise AssertionError(f"not within {STEPS_MAX} steps: {events[seen:]}")


def test_the_plan_follows_a_neighbour_and_the_tokens_do_not_change() -> None:
    model = small_llama()
    device = formatted(find_namespace("LABTWO", 3))
    config = EngineConfig(staging_bytes=2 * MIB, memory_reserve_bytes=4 * MIB)
    with (
        own_group() as group,
        group.popen(
            [sys.executable, "-S", "-E", "-c", HOG],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        ) as hog,
    ):  # fmt: skip
        assert hog.stdout.readline() == "ready\n"
        group.limit.set(group.limit.needed_bytes() + ROOM_BYTES)
        with DualBladeCache.for_model(model, store=device, config=config) as cache:
            decode = Decode(model, cache)
            for _ in range(3):
                decode.step()
            memory = cache.stats().memory
            before = memory.page_cache_planned_bytes
            assert before > KV_BYTES // 4
            room = memory.budget_bytes - (memory.used_bytes - memory.page_cache_bytes)
            hog.stdin.write(f"{(room - before // 2) // MIB}\n")
            hog.stdin.flush()
            fell = decode.until(lambda e: e.cause == "budget fell" and e.demoted_units > 0)
            assert hog.stdout.readline() == "held\n"
            for _ in range(2):
                decode.step()
            squeezed = cache.stats().memory.page_cache_planned_bytes
            hog.communicate("\n")
            rose = decode.until(lambda e: e.cause == "room rose" and e.promoted_units > 0)
            decode.step()
            stats = cache.stats()
        assert hog.returncode == 0, "the neighbour was killed"
        assert group.limit.oom_kills() == 0
    assert fell.to_bytes < fell.from_bytes
    assert squeezed < before
    assert rose.to_bytes > rose.from_bytes
    assert stats.engine is not None
    assert stats.engine.name == "uring-cmd"
    assert stats.io.demotions > 0
    assert stats.io.written_bytes == stats.stored_bytes
    with DualBladeCache.for_model(model, path="memory") as in_memory:
        undisturbed = Decode(model, in_memory)
        while len(undisturbed.tokens) < len(decode.tokens):
            undisturbed.step()
        assert undisturbed.tokens == decode.tokens
    carry_out_wipe(plan_wipe(device), tell=lambda _: None)
