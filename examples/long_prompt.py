"""Generate from a long prompt with the KV cache on the drive: 256 MiB of memory for it, whatever
the prompt's length.

    python examples/long_prompt.py MODEL FILE

MODEL is a folder or a hub id that transformers can load.
"""

# ruff: noqa: E402, T201 - what torch's threads do is said before torch is imported; it prints
import sys

import dualblade

if len(sys.argv) != 3:
    sys.exit("usage: python long_prompt.py MODEL FILE")
dualblade.wait_briefly()

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

name, file = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)
dualblade.widen_linears(model)
with open(file, encoding="utf-8") as text:
    inputs = tokenizer(text.read(), return_tensors="pt")

with dualblade.DualBladeCache.for_model(model, memory_budget="256MiB") as cache:
    model.generate(
        **inputs,
        cache=cache,
        max_new_tokens=40,
        do_sample=False,
        prefill_chunk_size=1024,
        streamer=TextStreamer(tokenizer, skip_prompt=True),
    )
    stats = cache.stats()

cached = sum(unit.cached_bytes for unit in stats.plan)
print(f"{stats.tokens} tokens, {stats.kv_bytes >> 20} MiB of KV")
print(f"{cached >> 20} MiB of it through the page cache, the rest by {stats.engine.name}")
