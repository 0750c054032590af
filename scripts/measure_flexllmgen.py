#!/usr/bin/env python3
"""Decode the same shape by FlexLLMGen and by dualblade in turn, with all KV on the drive; write
results/flexllmgen.json.

    .venv/bin/python scripts/measure_flexllmgen.py CHECKOUT [--python PYTHON] [--store FOLDER]
        [--model opt-6.7b] [--batch N] [--context N] [--steps N] [--memory-limit SIZE]

CHECKOUT is your clone of FlexLLMGen, PYTHON the one that can run it (its dependencies are older
than ours: give it a virtual environment of its own). FlexLLMGen needs an NVIDIA GPU and, for its
tokenizer, the model hub; its weights are dummies here, as ours are random.

Its policy is the one of this comparison: weights and activations on the GPU, the whole attention
cache on disk, copies overlapped with computing. Ours: the modes mmap and dual, in float16, as it
computes. --memory-limit holds every process to the same memory (page cache included); needs root.
FlexLLMGen logs the sum of its decode steps, so that its step is a mean; ours are medians.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from dualblade.host.cgroup import MemoryCgroup
from dualblade.host.machine import machine_facts
from dualblade.units import parse_size

RESULT = Path(__file__).resolve().parent.parent / "results" / "flexllmgen.json"
MODES = ("mmap", "dual")
_LATENCY = re.compile(r"(prefill|decode) latency: ([0-9.]+) s")


def flexllmgen(options: argparse.Namespace) -> dict[str, float]:
    """One run of a prompt and `steps` decode steps after its first token."""
    limited = (
        MemoryCgroup(options.memory_limit) if options.memory_limit else contextlib.nullcontext()
    )
    with tempfile.TemporaryDirectory(dir=options.store, prefix="flexllmgen-") as folder, limited:
        log = Path(folder) / "log"
        command = [
            options.python, "-m", "flexllmgen.flex_opt", "--model", f"facebook/{options.model}",
            "--path", "_DUMMY_", "--offload-dir", folder, "--log-file", str(log),
            "--percent", "100", "0", "0", "0", "100", "0",
            "--gpu-batch-size", str(options.batch), "--num-gpu-batches", "1",
            "--prompt-len", str(options.context), "--gen-len", str(options.steps + 1),
            "--overlap", "true", "--verbose", "0",
        ]  # fmt: skip
        popen = limited.popen if isinstance(limited, MemoryCgroup) else subprocess.Popen
        child = popen(command, cwd=options.checkout, stdout=sys.stderr, env=environment(options))
        try:
            code = child.wait()
        finally:
            child.kill()
            child.wait()
        if code:
            raise SystemExit(f"FlexLLMGen ended with {code}: {' '.join(command)}")
        return latencies(log.read_text(), options.steps)


def environment(options: argparse.Namespace) -> dict[str, str]:
    """Ours, with the checkout first among the modules."""
    paths = [str(options.checkout), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def latencies(log: str, steps: int) -> dict[str, float]:
    """Seconds of the prompt and of a step, from FlexLLMGen's log."""
    found = {what: float(seconds) for what, seconds in _LATENCY.findall(log)}
    if found.keys() != {"prefill", "decode"}:
        raise SystemExit(
            "FlexLLMGen's log has no latencies: is this a checkout of its main branch?"
        )
    return {"prefill_seconds": found["prefill"], "step_seconds": found["decode"] / steps}


def ours(mode: str, options: argparse.Namespace) -> dict[str, float]:
    """One run of `dualblade bench decode`."""
    command = [
        sys.executable, "-m", "dualblade", "bench", "decode", "--model", f"random:{options.model}",
        "--dtype", "float16", "--batch", str(options.batch), "--context", str(options.context),
        "--steps", str(options.steps), "--mode", mode, "--json",
    ]  # fmt: skip
    command += ["--store", str(options.store)] if options.store else []
    command += ["--memory-limit", str(options.memory_limit)] if options.memory_limit else []
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{mode} ended with {done.returncode}: {' '.join(command)}")
    (run,) = json.loads(done.stdout)["runs"]
    if run["error"] is not None:
        raise SystemExit(f"{mode}: {run['error']}")
    return {"step_seconds": run["step_seconds_median"]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--store", type=Path, help="a folder on the drive to measure")
    parser.add_argument("--model", default="opt-6.7b", help="an OPT shape that both know")
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--context", type=int, default=1984)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory-limit", type=parse_size, metavar="SIZE")
    options = parser.parse_args()
    options.checkout = options.checkout.resolve()
    if not (options.checkout / "flexllmgen" / "flex_opt.py").exists():
        parser.error(f"{options.checkout} is no checkout of FlexLLMGen: no flexllmgen/flex_opt.py")
    if not re.fullmatch(r"opt-[0-9.]+[mb]", options.model):
        parser.error(f"FlexLLMGen serves OPT shapes, such as opt-6.7b, not {options.model}")
    finds_gpu = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    for python in {sys.executable, options.python}:
        if subprocess.run([python, "-c", finds_gpu], stderr=subprocess.DEVNULL).returncode:
            parser.error(f"{python} has no torch that finds a GPU: FlexLLMGen computes on one")
    commit = subprocess.run(
        ["git", "-C", str(options.checkout), "rev-parse", "HEAD"],
        stdout=subprocess.PIPE, text=True, check=False,
    ).stdout.strip()  # fmt: skip
    rounds: list[dict[str, dict[str, float]]] = []
    for _ in range(options.repeats):
        rounds.append(
            {"flexllmgen": flexllmgen(options)} | {mode: ours(mode, options) for mode in MODES}
        )
        print({who: f"{1e3 * run['step_seconds']:.0f} ms" for who, run in rounds[-1].items()})
    result: dict[str, Any] = {
        "command": f"scripts/measure_flexllmgen.py CHECKOUT {' '.join(sys.argv[2:])}".strip(),
        "flexllmgen_commit": commit or None,
        "model": options.model,
        "batch": options.batch,
        "context": options.context,
        "memory_limit_bytes": options.memory_limit,
        "step_ratio_median": {
            mode: statistics.median(
                each[mode]["step_seconds"] / each["flexllmgen"]["step_seconds"] for each in rounds
            )
            for mode in MODES
        },
        "rounds": rounds,
        "machine": machine_facts(str(options.store or Path.home())),
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(f"dual / FlexLLMGen: {result['step_ratio_median']['dual']:.2f}; written to {RESULT}")


if __name__ == "__main__":
    main()
