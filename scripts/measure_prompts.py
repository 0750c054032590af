#!/usr/bin/env python3
"""Measure long prompts: many tokens per sweep, chunks against one pass, greedy tokens both ways.

    .venv/bin/python scripts/measure_prompts.py [--output results] [--only NAME ...]

Runs `dualblade generate` and keeps what it tells, a file for each run. All prompts are made of the
text in LICENSE: SmolLM2 is asked to copy its beginning; a random model of the package's own is
given 16,000 characters of it, which are as many tokens to it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from dualblade.host.machine import machine_facts
from dualblade.store import cache_directory

ROOT = Path(__file__).resolve().parent.parent
CHARACTERS_TO_COPY = 9_000
CHARACTERS_TO_PREFILL = 16_000

_LLAMA = "random:llama?layers=4,hidden=1024,heads=16,kv_heads=4,vocab=1000,positions=20000"
_COPY = "--model demo --max-new-tokens 100 --prompt-file copy.txt"
_LOOKUP = f"{_COPY} --dtype float32 --path direct --prompt-lookup"
_GREEDY = f"{_COPY} --path memory --dtype"
_PREFILL = f"--model {_LLAMA} --max-new-tokens 2 --prompt-file long.txt --path direct"
RUNS = {
    "prompt-lookup-0": f"{_LOOKUP} 0",
    "prompt-lookup-10": f"{_LOOKUP} 10",
    **{
        f"greedy-{dtype}-{way}": f"{_GREEDY} {dtype} --attention {way}"
        for dtype in ("float32", "bfloat16")
        for way in ("exact", "tiles")
    },
    "prefill-2048-tiles": f"{_PREFILL} --prefill-chunk-size 2048 --attention tiles",
    "prefill-2048-exact": f"{_PREFILL} --prefill-chunk-size 2048 --attention exact",
    "prefill-16000-exact": f"{_PREFILL} --prefill-chunk-size 16000 --attention exact",
}


def write_prompts(folder: Path) -> None:
    text = (ROOT / "LICENSE").read_text()
    copy = text[:CHARACTERS_TO_COPY].strip()
    (folder / "copy.txt").write_text(
        f"A text:\n\n{copy}\n\nThe same text again, from its beginning:\n\n"
    )
    (folder / "long.txt").write_text((text * 2)[:CHARACTERS_TO_PREFILL])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "results")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), metavar="NAME")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    program = str(Path(sys.executable).with_name("dualblade"))
    with tempfile.TemporaryDirectory() as folder:
        write_prompts(Path(folder))
        for name in options.only:
            print(name, file=sys.stderr)
            words = [program, "generate", *RUNS[name].split(), "--json"]
            done = subprocess.run(words, cwd=folder, stdout=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                sys.exit(f"{name}: dualblade generate ended with {done.returncode}")
            told = {**json.loads(done.stdout), "machine": machine_facts(str(cache_directory()))}
            (options.output / f"{name}.json").write_text(json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    main()
