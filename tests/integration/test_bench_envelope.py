"""bench envelope: what is run next, what is judged, how it goes on; and one tiny real run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dualblade.bench import decode_run, envelope, figures
from dualblade.bench.envelope import EnvelopeOptions, next_run, run_envelope, summarize
from dualblade.bench.run_log import RunLog
from dualblade.bench.workload import Limit, Workload
from dualblade.errors import ConfigError
from dualblade.host.cgroup import MemoryCgroup

REASON = MemoryCgroup.available()
needs_cgroup = pytest.mark.skipif(REASON is not None, reason=f"no memory cgroup: {REASON}")
CALIBRATION = {"base_bytes": 300 << 20, "loaded_bytes": 280 << 20, "kv_bytes": 64 << 20}
SMALL = EnvelopeOptions(limits=("50%",), splits=(0, 50, 100), coarse_rounds=2, rounds=3)


def ran(limit: str, turn: int, mode: str, seconds: float | None) -> dict[str, Any]:
    return {
        "memory_limit": limit,
        "memory_limit_bytes": 300 << 20,
        "round": turn,
        "mode": mode,
        "step_seconds_median": seconds,
        "attention": "tiles",
        "tokens_sha256": None if seconds is None else "a",
        "oom_killed": seconds is None,
        "error": None,
    }


def played(
    options: EnvelopeOptions, seconds: Callable[[str, int], float | None]
) -> list[dict[str, Any]]:
    """All runs that are asked for, one after the other, each with the seconds given."""
    runs: list[dict[str, Any]] = []
    while (planned := next_run(options, runs)) is not None:
        runs.append(ran(*planned, seconds(planned.mode, planned.round)))
        assert len(runs) < 1000
    return runs


BY_SPLIT = {"dual": 1.0, "static-0": 4.0, "static-50": 2.0, "static-100": 8.0}


def test_coarse_rounds_choose_and_fine_rounds_judge() -> None:
    runs = played(SMALL, lambda mode, _: BY_SPLIT.get(mode, 1.5))
    rounds = [{r["mode"] for r in runs if r["round"] == turn} for turn in range(6)]
    coarse = {"dual", "static-0", "static-50", "static-100"}
    fine = {"dual", "static-0", "static-50", "static-40", "static-60"}
    assert rounds == [coarse] * 2 + [fine] * 3 + [set()]
    assert len(runs) == 2 * 4 + 3 * 5  # none twice
    first = [next(r["mode"] for r in runs if r["round"] == turn) for turn in range(2)]
    assert first == ["dual", "static-0"]


def test_a_slip_in_a_coarse_round_does_not_judge() -> None:
    def seconds(mode: str, turn: int) -> float:
        return 0.1 if mode == "static-0" and turn < 2 else BY_SPLIT.get(mode, 3.0)

    entry = summarize(SMALL, "50%", played(SMALL, seconds))
    assert (entry["best_static_percent"], entry["best_static_seconds"]) == (50, 2.0)
    assert (entry["dual_seconds"], entry["dual_to_best"], entry["pairs"]) == (1.0, 0.5, 3)


def test_ratios_are_within_a_round() -> None:
    """The drive is half as fast in each round; only ratios of one round tell anything."""
    runs = played(SMALL, lambda mode, turn: 2**turn * (1.0 if mode == "dual" else 2.0))
    entry = summarize(SMALL, "50%", runs)
    assert entry["dual_to_best_spread"] == [0.5, 0.5]
    assert entry["best_static_seconds_spread"] == [8.0, 32.0]


def test_kills_are_counted_and_compare_with_nothing() -> None:
    entry = summarize(SMALL, "50%", played(SMALL, lambda mode, _: None if mode == "dual" else 1.0))
    assert entry["dual_oom_killed"] == 5
    assert entry["dual_seconds"] is entry["dual_to_best"] is None
    everything = played(SMALL, lambda *_: None)
    assert summarize(SMALL, "50%", everything)["best_static_percent"] is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"limits": ("none",)},
        {"limits": ("50%", "50%")},
        {"splits": ()},
        {"splits": (101,)},
        {"rounds": 0},
        {"steps": 0},
    ],
)
def test_wrong_options_are_config_errors(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        EnvelopeOptions(**wrong)


class Runs:
    """Stands for the children: counts them, and is interrupted after `enough`."""

    def __init__(self, enough: int) -> None:
        self.enough = enough
        self.payloads: list[tuple[str, Limit, Workload]] = []

    def __call__(self, workload: Workload, mode: str, limit: Limit) -> dict[str, Any]:
        if len(self.payloads) == self.enough:
            raise KeyboardInterrupt
        self.payloads.append((mode, limit, workload))
        run = ran(limit.asked or "none", 0, mode, BY_SPLIT.get(mode, 1.5))
        return {
            **dict.fromkeys((*decode_run._MEASURED, *envelope._KEPT)),
            **run,
            "device_read_bytes_per_step": 0,
        }


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Runs]:
    """Puts a `Runs` in place of the children, the calibration and the cgroups."""

    def install(enough: int) -> Runs:
        runs = Runs(enough)
        monkeypatch.setattr(envelope, "one_run", runs)
        monkeypatch.setattr(decode_run, "one_run", runs)  # which writes the store
        return runs

    monkeypatch.setattr(envelope, "require_cgroup", lambda: None)
    monkeypatch.setattr(envelope, "calibrate", lambda *_: CALIBRATION)
    return install


def test_it_goes_on_where_it_was_interrupted(
    machine: Callable[[int], Runs], tmp_path: Path
) -> None:
    log, told = tmp_path / "log.jsonl", []
    machine(6)  # the first writes the store
    with pytest.raises(KeyboardInterrupt):
        run_envelope(SMALL, log, told.append)
    assert len(log.read_text().splitlines()) == 1 + 5
    assert "the same command goes on" in told[-1]
    log.write_text(log.read_text() + '{"cut sho')  # as a crash leaves it
    runs = machine(100)
    result = run_envelope(SMALL, log)
    assert len(runs.payloads) == 1 + 23 - 5
    assert len(result["runs"]) == 23
    assert result["reached"] is True
    assert json.loads(json.dumps(result))["summary"][0]["dual_to_best"] == 1.0 / 1.5
    again = machine(0)
    assert run_envelope(SMALL, log)["summary"] == result["summary"]
    assert again.payloads == []


def test_runs_share_a_store_that_is_written_once_and_a_reserve(
    machine: Callable[[int], Runs], tmp_path: Path
) -> None:
    runs = machine(100)
    run_envelope(SMALL, tmp_path / "log.jsonl")
    (first, anywhere, _), *others = runs.payloads
    assert (first, anywhere.limit_bytes) == ("direct", None)
    assert {limit.budget for _, limit, _ in others} == {"auto"}
    assert {limit.reserve_bytes for _, limit, _ in others} == {20 << 20}
    assert {limit.limit_bytes for _, limit, _ in others} == {(300 + 32) << 20}
    assert len({workload.store for *_, workload in runs.payloads}) == 1
    assert all(workload.engine["keep_store_blocks"] for *_, workload in runs.payloads)


def test_other_options_are_refused_in_a_line(
    machine: Callable[[int], Runs], tmp_path: Path
) -> None:
    machine(100)
    run_envelope(SMALL, tmp_path / "log.jsonl")
    other = EnvelopeOptions(limits=("50%",), splits=(0, 50, 100), rounds=3, steps=4)
    with pytest.raises(ConfigError, match="begun with steps 8, not 4"):
        run_envelope(other, tmp_path / "log.jsonl")


def test_more_rounds_are_added_to_a_log_and_fewer_are_refused(
    machine: Callable[[int], Runs], tmp_path: Path
) -> None:
    log = tmp_path / "log.jsonl"
    machine(100)
    run_envelope(SMALL, log)
    more = machine(100)
    result = run_envelope(replace(SMALL, rounds=SMALL.rounds + 2), log)
    modes = [mode for mode, *_ in more.payloads[1:]]  # the store is written first
    assert len(modes) == 2 * (1 + 4), "two rounds of dual and four splits; nothing is run again"
    assert result["summary"][0]["pairs"] == SMALL.rounds + 2
    with pytest.raises(ConfigError, match=f"begun with rounds {SMALL.rounds + 2}, not "):
        run_envelope(SMALL, log)
    assert run_envelope(replace(SMALL, rounds=SMALL.rounds + 2), log) == result


def test_a_log_that_is_not_ours_or_not_free_is_refused(tmp_path: Path) -> None:
    for text in ("a diary", "a diary\n", '{"runs": 1}\n', "[1]\n"):
        foreign = tmp_path / "foreign"
        foreign.write_text(text)
        with pytest.raises(ConfigError, match="not a log of ours"):
            RunLog(foreign, {}, dict)
        assert foreign.read_text() == text
    with RunLog(tmp_path / "log", {}, dict), pytest.raises(ConfigError, match="another run"):
        RunLog(tmp_path / "log", {}, dict)
    with pytest.raises(ConfigError, match="cannot write"):
        RunLog(tmp_path / "nowhere" / "log", {}, dict)


def test_a_log_without_facts_is_not_left_behind(tmp_path: Path) -> None:
    def fail() -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        RunLog(tmp_path / "log", {}, fail)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ending", [".svg", ".png"])
def test_the_figure_is_drawn_and_is_the_same_again(tmp_path: Path, ending: str) -> None:
    options = EnvelopeOptions(limits=("25%", "110%"), splits=(0, 50, 100), rounds=1)
    runs = played(options, lambda mode, _: BY_SPLIT.get(mode, 1.5))
    result = {"summary": [summarize(options, limit, runs) for limit in options.limits]}
    for name in ("one", "two"):
        figures.save_figure(figures.envelope_figure(result), tmp_path / f"{name}{ending}")
    one, two = ((tmp_path / f"{name}{ending}").read_bytes() for name in ("one", "two"))
    assert one == two
    if ending == ".svg":
        text = one.decode()
        for word in ("dual (automatic)", "best fixed split", "percent of the KV", "50 %"):
            assert word in text
    with pytest.raises(ConfigError, match=r"\.svg or \.png"):
        figures.require_figures(tmp_path / "figure.gif")


@needs_cgroup
def test_a_tiny_envelope_measures(tmp_path: Path) -> None:
    options = EnvelopeOptions(
        model="random:llama?layers=8,hidden=128,heads=2,kv_heads=2,intermediate=128,vocab=256",
        batch=4,
        context=4096,
        steps=2,
        warmup_steps=1,
        limits=("60%",),
        splits=(0, 50),
        coarse_rounds=1,
        rounds=1,
        store=tmp_path / "kv.store",
    )
    result = json.loads(json.dumps(run_envelope(options, tmp_path / "log.jsonl")))
    kv = result["calibration"]["kv_bytes"]
    read = {run["mode"]: run["direct_read_bytes_per_step"] for run in result["runs"]}
    assert read["static-0"] == kv
    assert read["static-50"] == kv // 2
    assert 0 < read["dual"] < kv
    assert result["tokens_agree"] is True
    (entry,) = result["summary"]
    assert entry["oom_killed"] == 0
    assert entry["errors"] == []
    assert entry["dual_to_best"] > 0
    assert entry["best_static_percent"] in (0, 10, 40, 50, 60)  # each of the two, or beside it
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl"]
