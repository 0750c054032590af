"""One long text, many questions: the text is computed once, and its KV kept on the drive.

    python examples/questions.py MODEL FILE QUESTION [QUESTION ...]

MODEL is a folder or a hub id that transformers can load.
"""

# ruff: noqa: E402, T201 - what torch's threads do is said before torch is imported; it prints
import sys
import time

import dualblade

if len(sys.argv) < 4:
    sys.exit("usage: python questions.py MODEL FILE QUESTION [QUESTION ...]")
dualblade.wait_briefly()

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

name, file, *questions = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)
dualblade.widen_linears(model)

with open(file, encoding="utf-8") as lines:
    text = tokenizer(lines.read() + "\n\n")["input_ids"]

with dualblade.DualBladeCache.for_model(model) as cache:
    for question in questions:
        # By itself: after the same text come the same tokens, whatever is asked.
        asked = tokenizer(f"Question: {question}\nAnswer:", add_special_tokens=False)["input_ids"]
        ids, known, began = torch.tensor([text + asked]), cache.get_seq_length(), time.time()
        answer = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            cache=cache,
            max_new_tokens=30,
            do_sample=False,
            prefill_chunk_size=1024,
        )
        print(tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True).strip())
        print(f"  {time.time() - began:.1f} s; of {ids.shape[1]} tokens {known} were there already")
        cache.crop(len(text) - cache.get_seq_length())  # forget the question and its answer
