"""A decode in a process of its own, for the squeeze test: its parent limits and fills its memory.

Reads one JSON object from stdin, then lines: each lets it go on to what comes next. Writes one JSON
line at each point, the last with its tokens and its events.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from dualblade import DualBladeCache, EngineConfig
from dualblade.units import MIB

LAYERS, HEADS, DIM, CONTEXT = 16, 4, 64, 8192
KV_BYTES = 2 * LAYERS * HEADS * DIM * CONTEXT * 4  # 256 MiB
_CHUNK = 512
_WAIT_SECONDS = 60.0


def tell(**said: Any) -> None:
    sys.stdout.write(json.dumps(said) + "\n")
    sys.stdout.flush()


def tiny_llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=HEADS * DIM,
        intermediate_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=2 * CONTEXT,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def fill(cache: DualBladeCache) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(CONTEXT // _CHUNK):
        for layer in range(LAYERS):
            rows = [torch.randn(1, HEADS, _CHUNK, DIM, generator=generator) for _ in range(2)]
            cache.append(rows[0], rows[1], layer)


class Decode:
    """Greedy steps, and what they gave."""

    def __init__(self, model: Any, cache: DualBladeCache) -> None:
        self.model, self.cache = model, cache
        self.tokens = [1]

    def step(self) -> None:
        with torch.inference_mode():
            out = self.model(torch.tensor([self.tokens[-1:]]), cache=self.cache)
        self.tokens.append(int(out.logits[0, -1].argmax()))
        memory = self.cache.stats().memory
        planned = memory.used_bytes - memory.page_cache_bytes + memory.page_cache_planned_bytes
        assert planned <= memory.budget_bytes or memory.page_cache_planned_bytes == 0

    def until(self, reached: Any) -> bool:
        deadline = time.monotonic() + _WAIT_SECONDS
        while not reached(self.cache.stats().memory.page_cache_planned_bytes):
            if time.monotonic() > deadline:
                return False
            self.step()
        return True


def main() -> None:
    options = json.loads(sys.stdin.readline())
    torch.set_num_threads(1)
    model = tiny_llama()
    tell(loaded=True)
    sys.stdin.readline()
    config = EngineConfig(staging_bytes=16 * MIB, memory_reserve_bytes=options["reserve_bytes"])
    with DualBladeCache.for_model(model, store=options["store"], config=config) as cache:
        fill(cache)
        decode = Decode(model, cache)
        if options["steps"] is not None:
            for _ in range(options["steps"]):
                decode.step()
        else:
            for _ in range(4):
                decode.step()
            planned = cache.stats().memory.page_cache_planned_bytes
            tell(planned=planned, steps=len(decode.tokens))
            went_down = decode.until(lambda now: now < planned * 3 // 4)
            tell(went_down=went_down, planned=cache.stats().memory.page_cache_planned_bytes)
            # Promotions take half of the free room at a time: the last two units may stay out.
            came_back = decode.until(lambda now: now >= planned * 4 // 5)
            tell(came_back=came_back)
            for _ in range(4):
                decode.step()
        tell(tokens=decode.tokens, stats=cache.stats().to_dict())


if __name__ == "__main__":
    main()
