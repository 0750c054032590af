#!/usr/bin/env python3
"""Decode the same shape by FlexLLMGen and by dualblade in turn, with all KV on the drive; write
FILE, flexllmgen.json unless another is named.

    .venv/bin/python scripts/measure_flexllmgen.py CHECKOUT [--storage-only] [--python PYTHON]
        [--store FOLDER] [--model opt-6.7b] [--batch N] [--context N] [--steps N] [--repeats N]
        [--memory-limit LIMIT] [--read-ahead SIZE] [--output FILE]

CHECKOUT is your clone of FlexLLMGen, PYTHON the one that can run it (its dependencies are older
than ours: give it a virtual environment of its own). FlexLLMGen needs an NVIDIA GPU and, for its
tokenizer, the model hub; its weights are dummies here, as ours are random.

--storage-only: FlexLLMGen's computing takes no time (flexllmgen_storage.py says what is left), so
no GPU and no hub is needed; ours computes. Ours is then in bfloat16, else in float16 as FlexLLMGen.

Its policy is the one of this comparison: weights and activations on the GPU, the whole attention
cache on disk, copies overlapped with computing. Ours: the modes mmap, direct and dual.
--memory-limit holds every process to the same memory, page cache included (needs root); without it
FlexLLMGen's files may all stay in the page cache. Ours is limited once its model is loaded,
FlexLLMGen from its start. With --storage-only it may be what is left beside each process's own
memory: +1GiB. FlexLLMGen logs the sum of its decode steps, so that its step is a mean of all; ours
are medians of those after three, as its are with --storage-only. A run that the limit kills is told
as such. Each finished round is kept; each begins with another.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from dualblade.bench.fio import FioYardstick
from dualblade.bench.workload import ALLOWANCE_BYTES
from dualblade.cli.command import ending_at_signals
from dualblade.errors import ConfigError, Unsupported
from dualblade.host.cgroup import MemoryCgroup
from dualblade.host.machine import machine_facts
from dualblade.host.read_ahead import reading_ahead
from dualblade.host.threads import wait_briefly
from dualblade.store import cache_directory
from dualblade.units import GIB, MIB, parse_size

SCRIPTS = Path(__file__).resolve().parent
RESULT = Path("flexllmgen.json")
MODES = ("mmap", "direct", "dual")
WHO = ("flexllmgen", *MODES)
Round = dict[str, dict[str, float | None]]
_LATENCY = re.compile(r"(prefill|decode) latency: ([0-9.]+) s")
_STORAGE = re.compile(r'^{"step_seconds".*}$', re.MULTILINE)
WARMUP_STEPS = 3  # as ours


def flexllmgen(
    options: argparse.Namespace, *, steps: int, limit_bytes: int | None
) -> dict[str, float | None]:
    """One run of a prompt and `steps` decode steps after its first token; with --storage-only three
    more before those."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(
            tempfile.TemporaryDirectory(dir=options.store, prefix="flexllmgen-")
        )
        log = Path(folder) / "log"
        storage = [str(SCRIPTS / "flexllmgen_storage.py")]
        command = [
            options.python, *(storage if options.storage_only else ("-m", "flexllmgen.flex_opt")),
            "--model", f"facebook/{options.model}",
            "--path", "_DUMMY_", "--offload-dir", folder, "--log-file", str(log),
            "--percent", "100", "0", "0", "0", "100", "0",
            "--gpu-batch-size", str(options.batch), "--num-gpu-batches", "1",
            "--prompt-len", str(options.context),
            "--gen-len", str(steps + 1 + (WARMUP_STEPS if options.storage_only else 0)),
            "--overlap", "true", "--verbose", "0",
        ]  # fmt: skip
        group, popen = None, subprocess.Popen
        if limit_bytes is not None:
            group = stack.enter_context(MemoryCgroup(limit_bytes))
            popen = group.popen
        with popen(
            command, cwd=options.checkout, stdout=sys.stderr, env=environment(options)
        ) as child:
            stack.callback(child.kill)
            try:
                code = child.wait()
            except KeyboardInterrupt:  # SIGTERM too, of which it knows nothing
                child.kill()
                raise
        if group is not None and group.was_oom_killed(code):
            return {"prefill_seconds": None, "step_seconds": None}
        if code:
            raise SystemExit(f"FlexLLMGen ended with {code}: {' '.join(command)}")
        return told_by(log.read_text(), steps)


def limit_of(options: argparse.Namespace) -> int | None:
    """Of FlexLLMGen's process, bytes: what is left for the cache comes on top of its own memory,
    which a step without a limit tells, and of the allowance that ours have too."""
    if not str(options.memory_limit).startswith("+"):
        return options.memory_limit and parse_size(options.memory_limit)
    own = flexllmgen(options, steps=options.steps, limit_bytes=None)["anonymous_bytes"]
    return int(own) + ALLOWANCE_BYTES + parse_size(options.memory_limit[1:])


def environment(options: argparse.Namespace) -> dict[str, str]:
    """Ours, with the checkout first among the modules; its threads wait as ours do."""
    paths = [str(options.checkout), os.environ.get("PYTHONPATH", "")]
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with warnings.catch_warnings(action="ignore"):  # torch is imported here; its process heeds it
        wait_briefly(found)
    return found


def told_by(log: str, steps: int) -> dict[str, float | None]:
    """Seconds of the prompt and of a step, from FlexLLMGen's log; and what flexllmgen_storage.py
    adds to it."""
    found = {what: float(seconds) for what, seconds in _LATENCY.findall(log)}
    if found.keys() != {"prefill", "decode"}:
        raise SystemExit(
            "FlexLLMGen's log has no latencies: is this a checkout of its main branch?"
        )
    told = {"prefill_seconds": found["prefill"], "step_seconds": found["decode"] / steps}
    storage = _STORAGE.search(log)
    if storage is not None:
        line = json.loads(storage[0])
        given = line["drive_bytes"][WARMUP_STEPS:]
        told |= {
            "step_seconds": statistics.median(line["step_seconds"][WARMUP_STEPS:]),
            "read_bytes_per_step": (given[-1] - given[0]) / steps,
            "anonymous_bytes": line["anonymous_bytes"],
        }
    return told


def ours(mode: str, options: argparse.Namespace) -> dict[str, float | None]:
    """One run of `dualblade bench decode`, which cleans up behind it when it is interrupted."""
    command = [
        sys.executable, "-m", "dualblade", "bench", "decode", "--model", f"random:{options.model}",
        "--dtype", "bfloat16" if options.storage_only else "float16",
        "--batch", str(options.batch), "--context", str(options.context),
        "--steps", str(options.steps), "--mode", mode, "--store", str(options.store), "--json",
    ]  # fmt: skip
    if options.memory_limit is not None:
        command += ["--memory-limit", str(options.memory_limit)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        try:
            text, _ = child.communicate()
        except KeyboardInterrupt:
            child.send_signal(signal.SIGINT)  # it got Ctrl-C, but no SIGTERM of ours
            child.wait()
            raise
    if child.returncode:
        raise SystemExit(f"{mode} ended with {child.returncode}: {' '.join(command)}")
    (run,) = json.loads(text)["runs"]
    if run["error"] is not None:
        raise SystemExit(f"{mode}: {run['error']}")
    return {
        "step_seconds": run["step_seconds_median"],
        "read_bytes_per_step": run["device_read_bytes_per_step"],
    }


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
        "--storage-only", action="store_true", help="FlexLLMGen's computing takes no time: no GPU"
    )
    parser.add_argument(
        "--store", type=Path, default=cache_directory(), help="a folder on the drive to measure"
    )
    parser.add_argument("--model", default="opt-6.7b", help="an OPT shape that both know")
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--context", type=int, default=1984)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory-limit", metavar="LIMIT", help="6GiB; with --storage-only +1GiB")
    parser.add_argument("--read-ahead", metavar="SIZE", help="of the drive's queue: 1MiB")
    parser.add_argument("--output", type=Path, metavar="FILE", default=RESULT)
    options = parser.parse_args()
    options.checkout, options.store = options.checkout.resolve(), options.store.resolve()
    options.python = shutil.which(options.python) or options.python
    options.python = os.path.abspath(options.python)  # FlexLLMGen runs in its checkout
    if not (options.checkout / "flexllmgen" / "flex_opt.py").exists():
        parser.error(f"{options.checkout} is no checkout of FlexLLMGen: no flexllmgen/flex_opt.py")
    if not re.fullmatch(r"opt-[0-9.]+[mb]", options.model):
        parser.error(f"FlexLLMGen serves OPT shapes, such as opt-6.7b, not {options.model}")
    if options.output.is_dir() or not os.access(options.output.absolute().parent, os.W_OK):
        parser.error(f"--output: {options.output} cannot be written")
    limit = options.memory_limit or ""
    try:
        parse_size(limit.removeprefix("+") or "1")
    except ConfigError as error:
        parser.error(f"--memory-limit: {error}")
    if limit.startswith("+") and not options.storage_only:
        parser.error("--memory-limit +SIZE needs --storage-only: name the memory of a process")
    if shutil.which("fio") is None:
        parser.error("fio is not installed: it says how fast the drive is (apt install fio)")
    finds_gpu = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    for python in {sys.executable, options.python} if not options.storage_only else ():
        if subprocess.run([python, "-c", finds_gpu], stderr=subprocess.DEVNULL).returncode:
            parser.error(
                f"{python} has no torch that finds a GPU: FlexLLMGen computes on one "
                "(--storage-only leaves its computing out)"
            )
    commit = subprocess.run(
        ["git", "-C", str(options.checkout), "rev-parse", "HEAD"],
        stdout=subprocess.PIPE, text=True, check=False,
    ).stdout.strip()  # fmt: skip
    with contextlib.ExitStack() as stack:
        if options.read_ahead is not None:
            try:
                ahead = parse_size(options.read_ahead)
                stack.enter_context(reading_ahead(options.store, ahead))
            except (ConfigError, Unsupported) as error:
                parser.error(f"--read-ahead: {error}")
        measure(options, commit or None)


def measure(options: argparse.Namespace, commit: str | None) -> None:
    """The rounds; each finished one is kept."""
    rounds: list[Round] = []
    fio_speeds: list[int] = []
    limit_bytes = limit_of(options)
    with FioYardstick(options.store, size_bytes=GIB, chunk_bytes=MIB, queue_depth=8) as fio:
        for repeat in range(options.repeats):
            fio_speeds.append(fio.measure()["read_bytes_per_second"])
            turn = repeat % len(WHO)
            runs = {
                who: ours(who, options)
                if who in MODES
                else flexllmgen(options, steps=options.steps, limit_bytes=limit_bytes)
                for who in WHO[turn:] + WHO[:turn]
            }
            rounds.append({who: runs[who] for who in WHO})
            print({who: told(run) for who, run in runs.items()})
            result = result_of(options, commit, limit_bytes, rounds)
            result["fio_read_bytes_per_second"] = fio_speeds
            options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {options.output}")


def result_of(
    options: argparse.Namespace, commit: str | None, limit_bytes: int | None, rounds: list[Round]
) -> dict[str, Any]:
    """What is written."""
    limited = f" --memory-limit {options.memory_limit}" if options.memory_limit else ""
    limited += f" --read-ahead {options.read_ahead}" if options.read_ahead else ""
    output = "" if options.output == RESULT else f" --output {options.output}"
    return {
        "command": "scripts/measure_flexllmgen.py CHECKOUT "
        + ("--storage-only " if options.storage_only else "")
        + f"--model {options.model} --batch {options.batch} --context {options.context} "
        f"--steps {options.steps} --repeats {options.repeats}{limited}{output}",
        "flexllmgen_commit": commit,
        "storage_only": options.storage_only,
        "model": options.model,
        "batch": options.batch,
        "context": options.context,
        "memory_limit": options.memory_limit,
        "memory_limit_bytes": limit_bytes,
        "step_ratio_median": {mode: ratio(mode, rounds) for mode in MODES},
        "rounds": rounds,
        "machine": machine_facts(str(options.store)),
    }


if __name__ == "__main__":
    with ending_at_signals():
        main()
