#!/usr/bin/env python3
"""FlexLLMGen with computing that takes no time, on a machine without a GPU: what is left is how it
stores and fetches its attention cache. Run by measure_flexllmgen.py --storage-only, in FlexLLMGen's
own Python with its checkout on the path; takes the arguments of flexllmgen.flex_opt.

FlexLLMGen's own: the generation loop, the files, the copies and the threads that make them. Ours,
in its place: layers that return at once, weights of one number each, and a GPU that is ordinary
memory, of six buffers used in turn, so that what is fetched is copied once, from the mapped file to
where attention would read it (with a GPU twice), and never meets a page that was not touched. The
prompt's rows are made at the speed of memory, so all is written back before the second step.

What FlexLLMGen does not tell goes to --log-file as one line of JSON: seconds of each step, what the
drive had given the process when it began, and the process's anonymous memory.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from flexllmgen import flex_opt
from flexllmgen.pytorch_backend import TorchDevice, TorchTensor
from flexllmgen.timer import timers

BUFFERS = 6  # keys and values of the layer that is computed, of the next, and of one to spare


def without_cuda() -> None:
    """What FlexLLMGen asks of CUDA does nothing, and no memory is pinned."""
    torch.cuda.set_device = lambda _device: None
    torch.cuda.synchronize = lambda: None
    torch.cuda.Stream = lambda: None
    torch.cuda.stream = lambda _stream: contextlib.nullcontext()
    empty = torch.empty
    torch.empty = lambda *sizes, **options: empty(*sizes, **{**options, "pin_memory": False})
    transformers.AutoTokenizer.from_pretrained = lambda *_name, **_options: (
        lambda prompts, *, max_length, **_others: SimpleNamespace(
            input_ids=[[2] * max_length for _ in prompts]
        )
    )


class Buffers:
    """The memory of the GPU that is not there, for at most `tokens` rows of the cache: each fetch
    and each row that is made gets the next of its buffers."""

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self._memory: list[torch.Tensor] = []
        self._turns = itertools.cycle(range(BUFFERS))

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Rows of any content; `shape` begins with how many."""
        row_bytes = torch.Size(shape[1:]).numel() * dtype.itemsize
        if not self._memory:
            size_bytes = self._tokens * row_bytes
            self._memory = [torch.ones(size_bytes, dtype=torch.uint8) for _ in range(BUFFERS)]
        memory = self._memory[next(self._turns)]
        return memory[: shape[0] * row_bytes].view(dtype).view(*shape)


def without_computing(config: Any, tokens: int) -> None:
    """Layers that hand their input on, and make rows of the cache for it: `tokens` in all."""
    heads, head_dim = config.n_head, config.input_dim // config.n_head
    buffers = Buffers(tokens)
    init, allocate = TorchDevice.__init__, TorchDevice.allocate

    def allocate_here(self: Any, shape: Any, dtype: Any, *_pinned: Any, **named: Any) -> Any:
        if len(shape) < 3:
            return allocate(self, shape, dtype, pin_memory=False)
        memory = buffers.take(shape, torch_dtype(dtype))
        return TorchTensor.create_from_torch(memory, self, name=named.get("name"))

    def rows_of(self: Any, hidden: Any) -> tuple[Any, Any, Any]:
        sequences, tokens, _ = hidden.shape
        rows = buffers.take((tokens, sequences * heads, head_dim), torch.float16)
        return (hidden, *(TorchTensor.create_from_torch(rows, self) for _ in ("keys", "values")))

    def embed(self: Any, tokens: Any, *_rest: Any) -> Any:
        return TorchTensor.create_from_torch(torch.zeros(*tokens.shape, 1), self)

    def choose(self: Any, hidden: Any, *_rest: Any) -> Any:
        ids = torch.full((hidden.shape[0], 1), 2, dtype=torch.int32)
        return TorchTensor.create_from_torch(ids, self)

    replaced: dict[str, Callable[..., Any]] = {
        "__init__": lambda self, _name, *rest: init(self, "cpu", *rest),
        "allocate": allocate_here,
        "opt_input_embed": embed,
        "mha": lambda self, hidden, *_rest: rows_of(self, hidden),
        "mha_gen": lambda self, hidden, *_rest: rows_of(self, hidden),
        "mlp": lambda _self, hidden, *_rest: hidden,
        "opt_output_embed": choose,
        "synchronize": lambda _self: None,
    }
    for name, method in replaced.items():
        setattr(TorchDevice, name, method)
    flex_opt.init_weight_list = lambda specs, _policy, env: [
        env.gpu.allocate((1,), dtype) for _, dtype, _ in specs
    ]


def torch_dtype(dtype: Any) -> torch.dtype:
    """Of a numpy dtype, as FlexLLMGen names them."""
    return torch.from_numpy(dtype().reshape(1)).dtype


def drive_bytes() -> int:
    """What the drive gave this process so far, by reads and by page faults."""
    found = re.search(r"^read_bytes: (\d+)$", Path("/proc/self/io").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


def anonymous_bytes() -> int:
    """Of this process, now."""
    found = re.search(r"^RssAnon:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) << 10


def main() -> None:
    parser = argparse.ArgumentParser()
    flex_opt.add_parser_arguments(parser)
    arguments = parser.parse_args()
    without_cuda()
    config = flex_opt.get_opt_config(arguments.model)
    without_computing(config, arguments.prompt_len + arguments.gen_len)
    begin, given = flex_opt.OptLM.update_attention_mask, [0] * arguments.gen_len

    def begin_step(self: Any, step: int, *rest: Any) -> None:
        if step == 1:
            os.sync()  # what a GPU's prompt takes seconds to make is made at once here
        given[step] = drive_bytes()
        begin(self, step, *rest)

    flex_opt.OptLM.update_attention_mask = begin_step
    flex_opt.run_flexllmgen(arguments)
    told = {
        "step_seconds": timers("generate").costs[1:],
        "drive_bytes": [*given[1:], drive_bytes()],
        "anonymous_bytes": anonymous_bytes(),
    }
    with open(arguments.log_file, "a") as log:
        log.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    sys.exit(main())
