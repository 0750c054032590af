"""A conversation on one cache: each turn computes only its own new tokens.

    python examples/conversation.py MODEL

MODEL is a folder or a hub id of a model that chats. `reset` begins another conversation.
"""

# ruff: noqa: E402, T201 - what torch's threads do is said before torch is imported; it prints
import sys

import dualblade

if len(sys.argv) != 2:
    sys.exit("usage: python conversation.py MODEL")
dualblade.wait_briefly()

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

QUESTIONS = ("What is the capital of France?", "And of Italy?")


def in_common(ids: torch.Tensor, others: torch.Tensor) -> int:
    """How many tokens both texts begin with alike."""
    count = min(len(ids), len(others))
    return int((ids[:count] == others[:count]).cumprod(0).sum())


tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
dualblade.widen_linears(model)

with dualblade.DualBladeCache.for_model(model) as cache:
    messages: list[dict[str, str]] = []
    text = torch.tensor([], dtype=torch.int64)  # all of it so far, as tokens
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids = inputs["input_ids"][0]
        # A template may write earlier turns otherwise than they came about (it may leave thoughts
        # out, or spaces): what differs is forgotten, and the last token is to be computed.
        known = min(in_common(ids, text), len(ids) - 1, cache.get_seq_length())
        if known < cache.get_seq_length():
            cache.crop(known - cache.get_seq_length())
        text = model.generate(
            **inputs, cache=cache, max_new_tokens=30, do_sample=False, prefill_chunk_size=1024
        )[0]
        answer = tokenizer.decode(text[len(ids) :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer})
        print(f"{question} {answer}")
        print(f"  {known} tokens were in the cache already, {cache.get_seq_length()} are now")
    cache.reset()
    print(f"after reset: {cache.get_seq_length()}")
