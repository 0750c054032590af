#!/usr/bin/env python3
"""Products of 16-bit weights with some rows: torch's own, and widened to float32.

    python scripts/measure_products.py [--repeats N] > results/products.json

For processors without 16-bit arithmetic: on others `dualblade.hf.linear` does nothing, and this
ends with a word on it. Each size of matrix with each number of rows, in turns, and a prompt of the
demo's model without its KV: medians of the repeats.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from dualblade.attention import widening_pays
from dualblade.hf.linear import WidenedLinear, widen_linears
from dualblade.hf.models import load_model
from dualblade.host.machine import command_line, machine_facts
from dualblade.host.threads import wait_briefly

SIZES = ((576, 1536), (4096, 4096), (4096, 14336))
"""Input and output features: SmolLM2-135M's, and 7B models'."""

ROWS = (1, 8, 12, 16, 64, 512)
PROMPT_TOKENS = 2048


def medians(ways: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Seconds of each way, taken in turns after a call of each."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if turn:
                taken[name].append(time.perf_counter() - began)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def product(size: tuple[int, int], rows: int, repeats: int) -> dict[str, Any]:
    """Both ways of one product; they share the weights."""
    inputs, outputs = size
    plain = torch.nn.Linear(inputs, outputs, bias=False).bfloat16()
    ours = WidenedLinear(inputs, outputs, bias=False)
    ours.weight = plain.weight
    given = torch.randn(rows, inputs).bfloat16()
    seconds = medians({"torch": lambda: plain(given), "widened": lambda: ours(given)}, repeats)
    return {
        "in_features": inputs,
        "out_features": outputs,
        "rows": rows,
        "multiplications": rows * inputs * outputs,
        "seconds": seconds,
    }


def prompt(repeats: int) -> dict[str, Any]:
    """The demo's model over a prompt, with its layers as torch has them and as we have them."""
    loaded = load_model("demo", dtype=torch.bfloat16, device="cpu")
    ours = [module for module in loaded.model.modules() if isinstance(module, WidenedLinear)]
    tokens = torch.arange(PROMPT_TOKENS)[None]

    def run() -> None:
        loaded.model(tokens, use_cache=False, logits_to_keep=1)

    def run_plain() -> None:
        for module in ours:
            module.__class__ = torch.nn.Linear
        run()
        widen_linears(loaded.model)

    seconds = medians({"torch": run_plain, "widened": run}, repeats)
    return {"model": loaded.name, "tokens": PROMPT_TOKENS, "layers": len(ours), "seconds": seconds}


def main() -> int:
    """The command line; a status for the shell."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="of each product (5)")
    options = parser.parse_args()
    if not widening_pays(torch.bfloat16):
        print("this processor has bfloat16 arithmetic: nothing is widened", file=sys.stderr)
        return 1
    with torch.inference_mode():
        products = [product(size, rows, options.repeats) for size in SIZES for rows in ROWS]
        result = {
            "benchmark": "products",
            "command": command_line(),
            "machine": machine_facts(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "dtype": "bfloat16",
            "repeats": options.repeats,
            "products": products,
            "prompt": prompt(min(3, options.repeats)),
        }
    print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    if wait_briefly():  # read when torch is imported; as `dualblade` has it
        os.execv(sys.executable, [sys.executable, *sys.argv])
    sys.exit(main())
