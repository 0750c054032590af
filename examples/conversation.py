"""A conversation on one cache: each turn reads only its own new tokens.

    python examples/conversation.py MODEL

MODEL is a folder or a hub id of a model that chats. `reset` begins another conversation.
"""

# ruff: noqa: T201 - an example prints
import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import dualblade

QUESTIONS = ("What is the capital of France?", "And of Italy?")

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")

with dualblade.DualBladeCache.for_model(model, memory_budget="64MiB", path="direct") as cache:
    messages: list[dict[str, str]] = []
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        known = cache.get_seq_length()
        output = model.generate(**inputs, cache=cache, max_new_tokens=30, do_sample=False)
        answer = tokenizer.decode(
            output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        messages.append({"role": "assistant", "content": answer})
        print(f"{question} {answer}")
        print(f"  {known} tokens were in the cache already, {cache.get_seq_length()} are now")
    cache.reset()
    print(f"after reset: {cache.get_seq_length()}")
