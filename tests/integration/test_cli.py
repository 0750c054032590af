"""The command as people run it: a process, its streams, its exit status, signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dualblade.io import open_engine
from dualblade.store import Door, Store
from dualblade.units import MIB

TINY = "random:llama?layers=6,hidden=128,heads=4,vocab=300,positions=4096"
# Slow enough to be interrupted: about 20 ms a token, 10 s of prefill in small chunks.
SLOW = "random:llama?layers=12,hidden=1024,heads=8,vocab=300,positions=8192"
PATHS = ("memory", "page-cache", "direct", "dual")
LONG_PROMPT = "a long prompt " * 100  # 1400 tokens of the byte-level stand-in


def dualblade(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dualblade", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        **options,
    )


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The result of `generate --json` on each path, with a budget that not all KV fits in."""
    folder = tmp_path_factory.mktemp("generated")
    results = {}
    for path in PATHS:
        done = dualblade(
            *("generate", "-m", TINY, "-p", LONG_PROMPT, "--max-new-tokens", "12"),
            *("--prefill-chunk-size", "256", "--memory-budget", "9MiB", "--dtype", "float32"),
            *("--path", path, "--store", str(folder / f"{path}.store"), "--json", "--stats"),
        )
        assert done.returncode == 0, done.stderr
        results[path] = {**json.loads(done.stdout), "told": done.stderr}
    return results


def test_all_paths_generate_the_same(generated: dict[str, dict[str, Any]]) -> None:
    assert len({result["tokens_sha256"] for result in generated.values()}) == 1
    assert len({result["text"] for result in generated.values()}) == 1
    for path, result in generated.items():
        assert result["cache"]["path"] == path
        assert (result["prompt_tokens"], result["new_tokens"]) == (1400, 12)


def test_options_that_a_path_does_not_heed_are_told(
    generated: dict[str, dict[str, Any]],
) -> None:
    said = {path: "--store has no effect on path" in run["told"] for path, run in generated.items()}
    assert said == {path: path == "memory" for path in PATHS}


def test_a_trace_that_cannot_be_written_is_told_before_the_work(tmp_path: Path) -> None:
    done = dualblade("generate", "-m", TINY, "-p", "a", "--trace", str(tmp_path / "no" / "t.json"))
    assert done.returncode == 2
    assert f"no file can be made in {tmp_path / 'no'}" in done.stderr


def test_a_trace_of_nothing_is_refused_before_the_work(tmp_path: Path) -> None:
    done = dualblade(
        *("generate", "-m", TINY, "-p", "a", "--path", "memory", "--attention", "exact"),
        *("--trace", str(tmp_path / "t.json")),
    )
    assert done.returncode == 1
    assert "nothing is traced" in done.stderr
    assert "prefill" not in done.stderr
    assert done.stdout == ""


def test_candidates_stay_within_learned_positions(tmp_path: Path) -> None:
    """Looking up a position that is not there would be an IndexError near the end."""
    done = dualblade(
        *("generate", "-m", "random:opt?layers=1,hidden=64,heads=4,vocab=300,positions=160"),
        *("-p", "ab" * 60, "--prompt-lookup", "10", "--store", str(tmp_path), "--json"),
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["prompt_tokens"] + result["new_tokens"] == 160 - 10


def test_prompt_lookup_takes_several_tokens_a_sweep(
    generated: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    """The same text, up to the last token that there is room for; fewer bytes for each."""
    done = dualblade(
        *("generate", "-m", TINY, "-p", LONG_PROMPT, "--max-new-tokens", "12"),
        *("--prefill-chunk-size", "256", "--memory-budget", "9MiB", "--dtype", "float32"),
        *(
            "--path",
            "direct",
            "--prompt-lookup",
            "6",
            "--store",
            str(tmp_path / "kv.store"),
            "--json",
        ),
    )
    assert done.returncode == 0, done.stderr
    result, plain = json.loads(done.stdout), generated["direct"]
    assert result["text"] == plain["text"]
    assert plain["tokens_per_sweep"] == 1
    assert result["tokens_per_sweep"] > 1
    assert result["sweeps"] < plain["sweeps"]
    assert result["read_bytes_per_token"] < plain["read_bytes_per_token"]


def test_what_json_tells(generated: dict[str, dict[str, Any]]) -> None:
    for result in generated.values():
        assert result["prefill_seconds"] > 0
        assert result["decode_seconds_per_token"] > 0
        assert result["dtype"] == "float32"
        # 6 layers, keys and values, 4 heads of 32, 4 bytes; the last token was not fed back.
        assert result["cache"]["kv_bytes"] == 6 * 2 * 4 * 32 * 4 * 1411
    direct = generated["direct"]["cache"]
    assert direct["engine"]["name"] in ("io_uring", "posix")
    assert direct["io"]["direct_read_bytes"] > 0
    assert direct["io"]["page_cache_read_bytes"] == 0
    assert direct["memory"]["page_cache_bytes"] == 0
    assert direct["memory"]["used_bytes"] <= direct["memory"]["budget_bytes"] == 9 << 20
    assert {unit["path"] for unit in direct["plan"]} == {"direct"}
    assert direct["checksums"]["mode"] == "sample"
    read = direct["io"]["direct_read_bytes"]
    assert 0 < direct["checksums"]["verified_bytes"] <= read // 8  # a sixteenth, in whole tiles
    assert direct["checksums"]["mismatches"] == 0
    dual = generated["dual"]["cache"]
    assert {unit["path"] for unit in dual["plan"]} == {"direct", "page-cache"}
    assert dual["memory"]["used_bytes"] <= dual["memory"]["budget_bytes"]
    assert generated["page-cache"]["cache"]["io"]["direct_read_bytes"] == 0
    assert generated["memory"]["cache"]["engine"] is None


def test_progress_and_stats_go_to_stderr(generated: dict[str, dict[str, Any]]) -> None:
    told = generated["dual"]["told"]
    assert "loading random:llama" in told
    assert "prefill of 1400 tokens" in told
    assert "through the page cache" in told
    assert "waiting for reads" in told
    assert "0 mismatches" in told


def test_text_goes_to_stdout_and_nothing_else(own_cache_directory: Path) -> None:
    done = dualblade("generate", "-m", TINY, "--prompt-file", "-", "--seed", "3", input="hello")
    assert done.returncode == 0
    assert len(done.stdout) == 256 + 1
    assert done.stdout.endswith("\n")
    assert "prefill of 5 tokens" in done.stderr
    assert list(own_cache_directory.iterdir()) == []  # the private store is gone


def test_a_seed_repeats_a_sampled_text() -> None:
    def sampled(seed: str) -> str:
        sampling = ("--temperature", "1.5", "--seed", seed, "--path", "memory")
        return dualblade(
            "generate", "-m", TINY, "-p", "x", "--max-new-tokens", "20", *sampling
        ).stdout

    assert sampled("1") == sampled("1") != sampled("2")


def test_a_reader_that_goes_away_is_no_error() -> None:
    child = subprocess.Popen(
        [sys.executable, "-m", "dualblade", "generate", "-m", SLOW, "-p", "x"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stderr is not None
    with child:
        assert child.stdout.read(1)
        child.stdout.close()
        told = child.stderr.read()
        child.wait(60)
    assert child.returncode == 1
    assert "Traceback" not in told
    assert "error" not in told.lower()


@pytest.fixture
def slow_child(own_cache_directory: Path) -> Iterator[subprocess.Popen[str]]:
    """`generate`, slow, with small chunks of a long prompt; interrupted by the test."""
    command = [sys.executable, "-m", "dualblade", "generate", "-m", SLOW, "--path", "direct"]
    options = ["--prefill-chunk-size", "64", "--memory-budget", "64MiB"]
    child = subprocess.Popen(
        [*command, "--prompt-file", "-", *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    yield child
    child.kill()
    child.wait()
    for pipe in (child.stdin, child.stdout, child.stderr):
        if pipe is not None:
            pipe.close()
    assert list(own_cache_directory.iterdir()) == []


def give_prompt(child: subprocess.Popen[str], prompt: str) -> None:
    assert child.stdin is not None
    child.stdin.write(prompt)
    child.stdin.close()
    child.stdin = None


def wait_for_line(child: subprocess.Popen[str], start: str) -> None:
    assert child.stderr is not None
    for line in child.stderr:
        if line.startswith(start):
            return
    pytest.fail(f"no line {start!r}")


def test_ctrl_c_in_prefill(slow_child: subprocess.Popen[str]) -> None:
    give_prompt(slow_child, "a long prompt " * 500)
    wait_for_line(slow_child, "prefill of 7000 tokens")
    time.sleep(0.5)
    slow_child.send_signal(signal.SIGINT)
    out, told = slow_child.communicate(timeout=60)
    assert slow_child.returncode == 130
    assert out == "\n"
    assert told.strip().splitlines()[-1] == "interrupted"
    assert "Traceback" not in told


@pytest.mark.parametrize(
    ("number", "status", "word"),
    [
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGTERM, 143, "terminated"),
        (signal.SIGHUP, 129, "terminated"),
    ],
)
def test_a_signal_in_decode_keeps_what_was_written(
    slow_child: subprocess.Popen[str], number: signal.Signals, status: int, word: str
) -> None:
    give_prompt(slow_child, "hello")
    assert slow_child.stdout is not None
    first = slow_child.stdout.read(3)
    slow_child.send_signal(number)
    out, told = slow_child.communicate(timeout=60)
    assert slow_child.returncode == status
    assert len(first + out) < 257
    assert out.endswith("\n")
    assert told.strip().splitlines()[-1] == word
    assert "Traceback" not in told


def test_a_full_disk_in_mid_generation(tmp_path: Path) -> None:
    """The store may take 2 MiB and the KV needs more: a clear error, and the store is usable."""
    done = dualblade(
        *("generate", "-m", TINY, "-p", LONG_PROMPT, "--store", str(tmp_path / "kv.store")),
        *("--disk-capacity-bytes", "2MiB", "--memory-budget", "8MiB", "--path", "direct"),
    )
    assert done.returncode == 1
    error = done.stderr[done.stderr.index("error:") :]
    assert "2.00 MiB" in error
    assert len(error.strip().splitlines()) <= 2
    with open_engine() as engine, Store.open(tmp_path / "kv.store", engine) as store:
        assert not store._members.was_unclean
        store.allocate(MIB, Door.DIRECT)


def test_bench_io_prints_what_the_issue_names(tmp_path: Path) -> None:
    done = dualblade(
        *("bench", "io", "--store", str(tmp_path / "scratch"), "--size", "8MiB"),
        *("--chunk", "128KiB", "--queue-depth", "4", "--repeats", "1", "--json"),
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    for name in (
        "engine",
        "read_bytes_per_second",
        "write_bytes_per_second",
        "cpu_seconds_per_gib_read",
        "effective_queue_depth",
        "huge_pages",
    ):
        assert name in result


def test_bench_decode_prints_what_the_issue_names(tmp_path: Path) -> None:
    command = ["bench", "decode", "-m", TINY, "--context", "256", "--steps", "2"]
    modes = ["--mode", "memory", "--mode", "direct", "--memory-budget", "8MiB"]
    done = dualblade(*command, *modes, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [run["mode"] for run in result["runs"]] == ["memory", "direct"]
    assert result["tokens_agree"] is True
    for name in (
        *("mode", "attention", "engine", "dtype", "memory_limit_bytes", "kv_bytes"),
        *("step_seconds_median", "step_seconds_p99", "device_read_bytes_per_step"),
        *("page_cache_hit_fraction", "peak_memory_bytes", "oom_killed", "tokens_sha256"),
    ):
        assert all(name in run for run in result["runs"])
    words = dualblade(*command, "--mode", "direct", "--memory-budget", "8MiB", cwd=tmp_path)
    assert "ms per step" in words.stdout


def test_commands_run_from_an_installed_script() -> None:
    script = Path(sys.executable).with_name("dualblade")
    done = subprocess.run([str(script), "--version"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.startswith("dualblade ")


def test_doctor_without_io_uring_says_why(tmp_path: Path) -> None:
    """A filter that forbids io_uring, as containers have, must show in the engine's reason."""
    if not Path("/usr/bin/strace").exists():
        pytest.skip("strace is not installed")
    done = subprocess.run(
        [
            *("strace", "-f", "-o", "/dev/null", "-e", "inject=io_uring_setup:error=EPERM"),
            *(sys.executable, "-m", "dualblade", "doctor", str(tmp_path), "--json"),
        ],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if done.returncode != 0 and "ptrace" in done.stderr:
        pytest.skip(f"strace may not trace here: {done.stderr.strip()[-100:]}")
    assert done.returncode == 0, done.stderr
    engine = json.loads(done.stdout)["engine"]
    assert engine["engine"] == "posix"
    assert "EPERM" in engine["reason"]


def test_arguments_that_are_no_text_are_told() -> None:
    for option in ("-p", "--system"):
        arguments = ["generate", "-m", TINY, *(() if option == "-p" else ("-p", "a"))]
        command = [sys.executable, "-m", "dualblade", *arguments, option, b"a\xffb"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
        assert done.returncode == 2
        assert "is not UTF-8 text (character 1)" in done.stderr


def test_a_closed_stdin_and_a_seed_out_of_range_are_told() -> None:
    shell = f'exec "{sys.executable}" -m dualblade generate -m {TINY} --prompt-file - <&-'
    done = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "stdin is closed" in done.stderr
    done = dualblade("generate", "-m", TINY, "-p", "a", "--seed", "99999999999999999999")
    assert done.returncode == 2
    assert "--seed" in done.stderr


def test_brackets_in_names_are_shown(tmp_path: Path) -> None:
    """They are markup to rich."""
    place = tmp_path / "a[b]c"
    place.mkdir()
    done = dualblade("doctor", str(place))
    assert done.returncode == 0
    assert str(place) in done.stdout.replace("\n", "")
    done = dualblade("plan", "-m", "./a[/b]c", "--context", "100")
    assert "no model at ./a[/b]c" in done.stderr
