#!/usr/bin/env python3
"""Decode the same shape by FlexLLMGen and by dualblade in turn, with all KV on the drive; write
results/flexllmgen.json.

    .venv/bin/python scripts/measure_flexllmgen.py CHECKOUT [--python PYTHON] [--store FOLDER]
        [--model opt-6.7b] [--batch N] [--context N] [--steps N] [--memory-limit SIZE]

CHECKOUT is your clone of FlexLLMGen, PYTHON the one that can run it (its dependencies are older
than ours: give it a virtual environment of its own). FlexLLMGen needs an NVIDIA GPU and, for its
tokenizer, the model hub; its weights are dummies here, as ours are random.

Its policy is the one of this comparison: weights and activations on the GPU, the whole attention
cache on disk, copies overlapped with computing. Ours: the modes direct and dual, in float16, as it
computes. --memory-limit holds every process to the same memory, page cache included (needs root);
without it FlexLLMGen's files may all stay in the page cache. Ours is limited once its model is
loaded, FlexLLMGen from its start. It logs the sum of its decode steps, so that its step is a mean;
ours are medians. A run that the limit kills is told as such. Each finished round is kept.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from dualblade.host.cgroup import MemoryCgroup
from dualblade.host.machine import machine_facts
from dualblade.store import cache_directory
from dualblade.units import parse_size

RESULT = Path(__file__).resolve().parent.parent / "results" / "flexllmgen.json"
MODES = ("direct", "dual")
Round = dict[str, dict[str, float | None]]
_LATENCY = re.compile(r"(prefill|decode) latency: ([0-9.]+) s")


def flexllmgen(options: argparse.Namespace) -> dict[str, float | None]:
    """One run of a prompt and `steps` decode steps after its first token."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(
            tempfile.TemporaryDirectory(dir=options.store, prefix="flexllmgen-")
        )
        log = Path(folder) / "log"
        command = [
            options.python, "-m", "flexllmgen.flex_opt", "--model", f"facebook/{options.model}",
            "--path", "_DUMMY_", "--offload-dir", folder, "--log-file", str(log),
            "--percent", "100", "0", "0", "0", "100", "0",
            "--gpu-batch-size", str(options.batch), "--num-gpu-batches", "1",
            "--prompt-len", str(options.context), "--gen-len", str(options.steps + 1),
            "--overlap", "true", "--verbose", "0",
        ]  # fmt: skip
        group, popen = None, subprocess.Popen
        if options.memory_limit is not None:
            group = stack.enter_context(MemoryCgroup(options.memory_limit))
            popen = group.popen
        with popen(
            command, cwd=options.checkout, stdout=sys.stderr, env=environment(options)
        ) as child:
            stack.callback(child.kill)
            code = child.wait()
        if group is not None and group.was_oom_killed(code):
            return {"prefill_seconds": None, "step_seconds": None}
        if code:
            raise SystemExit(f"FlexLLMGen ended with {code}: {' '.join(command)}")
        return latencies(log.read_text(), options.steps)


def environment(options: argparse.Namespace) -> dict[str, str]:
    """Ours, with the checkout first among the modules."""
    paths = [str(options.checkout), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def latencies(log: str, steps: int) -> dict[str, float | None]:
    """Seconds of the prompt and of a step, from FlexLLMGen's log."""
    found = {what: float(seconds) for what, seconds in _LATENCY.findall(log)}
    if found.keys() != {"prefill", "decode"}:
        raise SystemExit(
            "FlexLLMGen's log has no latencies: is this a checkout of its main branch?"
        )
    return {"prefill_seconds": found["prefill"], "step_seconds": found["decode"] / steps}


def ours(mode: str, options: argparse.Namespace) -> dict[str, float | None]:
    """One run of `dualblade bench decode`, which cleans up behind it when it is interrupted."""
    command = [
        sys.executable, "-m", "dualblade", "bench", "decode", "--model", f"random:{options.model}",
        "--dtype", "float16", "--batch", str(options.batch), "--context", str(options.context),
        "--steps", str(options.steps), "--mode", mode, "--store", str(options.store), "--json",
    ]  # fmt: skip
    if options.memory_limit is not None:
        command += ["--memory-limit", str(options.memory_limit)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        try:
            text, _ = child.communicate()
        except KeyboardInterrupt:
            child.wait()  # it got the same Ctrl-C
            raise
    if child.returncode:
        raise SystemExit(f"{mode} ended with {child.returncode}: {' '.join(command)}")
    (run,) = json.loads(text)["runs"]
    if run["error"] is not None:
        raise SystemExit(f"{mode}: {run['error']}")
    return {"step_seconds": run["step_seconds_median"]}


def ratio(mode: str, rounds: list[Round]) -> float | None:
    """Of step times, the median over the rounds in which neither was killed."""
    pairs = ((each[mode]["step_seconds"], each["flexllmgen"]["step_seconds"]) for each in rounds)
    ratios = [mine / its for mine, its in pairs if mine is not None and its is not None]
    return statistics.median(ratios) if ratios else None


def told(run: dict[str, float | None]) -> str:
    seconds = run["step_seconds"]
    return "killed" if seconds is None else f"{1000 * seconds:.0f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument(
        "--store", type=Path, default=cache_directory(), help="a folder on the drive to measure"
    )
    parser.add_argument("--model", default="opt-6.7b", help="an OPT shape that both know")
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--context", type=int, default=1984)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory-limit", type=parse_size, metavar="SIZE")
    options = parser.parse_args()
    options.checkout, options.store = options.checkout.resolve(), options.store.resolve()
    options.python = shutil.which(options.python) or options.python
    options.python = os.path.abspath(options.python)  # FlexLLMGen runs in its checkout
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
    rounds: list[Round] = []
    for _ in range(options.repeats):
        rounds.append(
            {"flexllmgen": flexllmgen(options)} | {mode: ours(mode, options) for mode in MODES}
        )
        print({who: told(run) for who, run in rounds[-1].items()})
        result: dict[str, Any] = {
            "command": "scripts/measure_flexllmgen.py CHECKOUT "
            f"--model {options.model} --batch {options.batch} --context {options.context} "
            f"--steps {options.steps} --repeats {options.repeats}"
            + (f" --memory-limit {options.memory_limit}" if options.memory_limit else ""),
            "flexllmgen_commit": commit or None,
            "model": options.model,
            "batch": options.batch,
            "context": options.context,
            "memory_limit_bytes": options.memory_limit,
            "step_ratio_median": {mode: ratio(mode, rounds) for mode in MODES},
            "rounds": rounds,
            "machine": machine_facts(str(options.store)),
        }
        RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {RESULT}")


if __name__ == "__main__":
    main()
