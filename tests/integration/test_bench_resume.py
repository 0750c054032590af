"""What a benchmark that is asked for again runs, and what it takes from its log."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dualblade.bench import decode, decode_run
from dualblade.bench.decode import DecodeBenchOptions, run_decode_bench
from dualblade.bench.run_log import RunLog
from dualblade.bench.series import Watch, in_turn
from dualblade.bench.workload import Limit
from dualblade.cli.app import app
from dualblade.errors import ConfigError, DualBladeError, Unsupported
from dualblade.host.machine import machine_facts

OPTIONS = DecodeBenchOptions(model="random:llama", modes=("direct", "memory"), repeats=2)
FULL = "no space left on the device"

Install = Callable[..., list[str]]


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Puts a list of their modes in the place of the children; those of `failing` end with an
    error, those of `killed` for want of memory."""

    def install(*, failing: tuple[str, ...] = (), killed: tuple[str, ...] = ()) -> list[str]:
        modes: list[str] = []

        def one(_options: object, mode: str, limit: Limit, **_more: object) -> dict[str, Any]:
            modes.append(mode)
            got_through = mode not in (*failing, *killed)
            return {
                **dict.fromkeys(decode_run._MEASURED),
                "mode": mode,
                "attention": "tiles",
                "memory_limit": limit.asked,
                "memory_limit_bytes": None,
                "step_seconds_median": 1.0 if got_through else None,
                "device_read_bytes_per_step": 0,
                "oom_killed": mode in killed,
                "error": FULL if mode in failing else None,
            }

        monkeypatch.setattr(decode, "one_run", one)
        return modes

    return install


def test_runs_that_ended_with_an_error_are_taken_again_in_their_places(
    children: Install, tmp_path: Path
) -> None:
    watch = Watch(log_path=tmp_path / "log.jsonl")
    children(failing=("direct",))
    before = run_decode_bench(OPTIONS, watch)
    assert [run["error"] for run in before["runs"]] == [FULL, None, None, FULL]
    assert "retaken_after_error" not in before
    again = children()
    result = run_decode_bench(OPTIONS, watch)
    assert again == ["direct", "direct"]
    places = [(run["repeat"], run["mode"], run["error"]) for run in result["runs"]]
    assert places == [(n, mode, None) for n in (0, 1) for mode in in_turn(OPTIONS.modes, n)]
    assert result["retaken_after_error"] == {"direct": 2}
    nothing = children()
    last = run_decode_bench(OPTIONS, watch)
    assert last["summary"] == result["summary"]
    assert last["retaken_after_error"] == {"direct": 2}, "that they failed stays told"
    assert nothing == []


def test_what_failed_altogether_is_run_when_it_is_asked_for_again(
    children: Install, tmp_path: Path
) -> None:
    watch = Watch(log_path=tmp_path / "log.jsonl")
    children(failing=OPTIONS.modes)
    with pytest.raises(DualBladeError, match=f"no run got through: {FULL}"):
        run_decode_bench(OPTIONS, watch)
    children()
    assert len(run_decode_bench(OPTIONS, watch)["runs"]) == 4


def test_a_run_that_its_limit_killed_is_a_result(children: Install, tmp_path: Path) -> None:
    watch = Watch(log_path=tmp_path / "log.jsonl")
    children(killed=("memory",))
    run_decode_bench(OPTIONS, watch)
    again = children()
    more = run_decode_bench(replace(OPTIONS, repeats=3), watch)
    assert again == ["memory", "direct"], "the third repeat alone"
    assert [run["oom_killed"] for run in more["runs"]] == [False, True, True, False, False, False]


def test_a_mode_that_is_named_twice_runs_twice(children: Install, tmp_path: Path) -> None:
    twice = replace(OPTIONS, modes=("direct", "direct"), repeats=1)
    modes = children()
    run_decode_bench(twice, Watch(log_path=tmp_path / "log.jsonl"))
    assert modes == ["direct", "direct"]


def test_tokens_that_differ_are_a_failure_once_they_are_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    result = {"tokens_agree": False, "runs": []}
    monkeypatch.setattr(decode, "run_decode_bench", lambda *_: result)
    output = tmp_path / "result.json"
    command = ["bench", "decode", "-m", "random:llama", "--mode", "direct"]
    done = CliRunner().invoke(app, [*command, "--output", str(output)])
    assert done.exit_code == 1
    assert "the tokens differ" in done.stdout
    assert "gave different tokens" in done.stderr
    assert json.loads(output.read_text()) == result


@pytest.mark.parametrize("command", ["decode", "prefill", "envelope"])
def test_a_result_is_not_written_over_its_own_log(command: str, tmp_path: Path) -> None:
    mode = [] if command == "envelope" else ["--model", "random:llama", "--mode", "direct"]
    output = tmp_path / "result.jsonl"
    done = CliRunner().invoke(app, ["bench", command, *mode, "--output", str(output)])
    assert done.exit_code == 2
    assert "finished runs are kept there" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_runs_on_a_drive_held_to_another_speed_are_others(
    children: Install, tmp_path: Path
) -> None:
    """A scenario's file may be edited between two calls."""
    watch = Watch(log_path=tmp_path / "log.jsonl", device_bytes_per_second=10**9)
    children()
    run_decode_bench(OPTIONS, watch)
    for other, said in ((2 * 10**8, "200000000"), (None, "None")):
        with pytest.raises(ConfigError, match=f"device_bytes_per_second 1000000000, not {said}"):
            run_decode_bench(OPTIONS, replace(watch, device_bytes_per_second=other))


def test_the_log_keeps_what_failed(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    with RunLog(log, {}, dict) as first:
        for error in (None, FULL):
            first.append({"error": error, "mode": "dual"})
        assert len(first.runs) == 2, "done for this time"
    with RunLog(log, {}, dict) as second:
        assert second.runs == [{"error": None, "mode": "dual"}]
        assert second.retaken() == {"retaken_after_error": {"dual": 1}}
    assert json.loads(log.read_text().splitlines()[-1]) == {"error": FULL, "mode": "dual"}


def test_a_log_of_other_code_or_another_machine_gets_no_more_runs(
    children: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch(log_path=tmp_path / "log.jsonl")
    facts = {"git": {"commit": "a" * 40, "dirty": False}, "device": {"path": "/mnt/kv"}}
    here = {**machine_facts(), **facts}
    monkeypatch.setattr(decode, "machine_facts", lambda *_: here)
    children()
    result = run_decode_bench(OPTIONS, watch)
    for other, said in (
        ({"git": {"commit": "b" * 40, "dirty": False}}, f"commit {'a' * 40}, not {'b' * 40}"),
        ({"git": None}, "commit .*, not None"),
        ({"kernel": "1.0"}, f"kernel {here['kernel']}, not 1.0"),
        ({"cpu_model": "Z80"}, "cpu_model .*, not Z80"),
        ({"cpu_features": ["sve"]}, r"cpu_features .*, not \[.sve.\]"),
        ({"versions": {**here["versions"], "torch": "1.0"}}, "torch .*, not 1.0"),
        ({"cpu_count": 64}, "cpu_count .*, not 64"),
        ({"device": {"path": "/mnt/other"}}, "store on /mnt/kv, not /mnt/other"),
        (
            {"device": {"path": "/mnt/kv", "queue": {"read_ahead_bytes": 131072}}},
            "bytes read ahead None, not 131072",
        ),
    ):
        now = {**here, **other}
        monkeypatch.setattr(decode, "machine_facts", lambda *_, now=now: now)
        modes = children()
        with pytest.raises(ConfigError, match=rf"was begun with {said}\ngo on there, or name"):
            run_decode_bench(replace(OPTIONS, repeats=3), watch)
        assert run_decode_bench(OPTIONS, watch)["runs"] == result["runs"], "nothing is left to run"
        assert modes == []


def test_two_benchmarks_at_once_are_told_of(
    children: Install, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "dualblade").mkdir()
    told: list[str] = []
    outer = children()
    real = decode.one_run

    def with_another_inside(*asked: Any, **more: Any) -> dict[str, Any]:
        if not told:
            inner = Watch(progress=told.append)
            monkeypatch.setattr(decode, "one_run", real)
            run_decode_bench(replace(OPTIONS, repeats=1), inner)
        return real(*asked, **more)

    monkeypatch.setattr(decode, "one_run", with_another_inside)
    alone: list[str] = []
    run_decode_bench(OPTIONS, Watch(progress=alone.append))
    assert sum("another benchmark is under way" in line for line in told) == 1
    assert not any("another benchmark" in line for line in alone)
    assert len(outer) == 6


def test_changes_that_are_not_committed_stop_nothing(
    children: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch(log_path=tmp_path / "log.jsonl")
    children()
    here = {**machine_facts(), "git": {"commit": "a" * 40, "dirty": True}}
    monkeypatch.setattr(decode, "machine_facts", lambda *_: here)
    run_decode_bench(OPTIONS, watch)
    now = {**here, "date": "tomorrow", "memory_available_bytes": 1}
    monkeypatch.setattr(decode, "machine_facts", lambda *_: now)
    assert len(run_decode_bench(replace(OPTIONS, repeats=3), watch)["runs"]) == 6


def test_what_is_finished_is_told_again_without_root(
    children: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise Unsupported("no cgroups")

    limited = replace(OPTIONS, memory_limits=("2GiB",))
    watch = Watch(log_path=tmp_path / "log.jsonl")
    monkeypatch.setattr(decode, "calibrate", lambda *_: {"base_bytes": 1, "kv_bytes": 1})
    monkeypatch.setattr(decode, "require_cgroup", lambda: None)
    children()
    result = run_decode_bench(limited, watch)
    monkeypatch.setattr(decode, "require_cgroup", refuse)
    assert run_decode_bench(limited, watch)["summary"] == result["summary"]
    with pytest.raises(Unsupported, match="no cgroups"):
        run_decode_bench(replace(limited, repeats=3), watch)
