"""bench prefill: every mode end to end, tiny; what is run, on which store, and how it goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dualblade.bench import prefill
from dualblade.bench.decode_run import DecodeWorkload
from dualblade.bench.prefill import (
    Planned,
    PrefillBenchOptions,
    plan_prefill,
    run_prefill_bench,
    summarize,
)
from dualblade.bench.report import collect
from dualblade.bench.series import Watch
from dualblade.bench.workload import Limit
from dualblade.cli.app import app
from dualblade.errors import ConfigError
from dualblade.host.cgroup import MemoryCgroup
from dualblade.io import open_engine
from dualblade.store import Store
from dualblade.units import MIB

MODEL = "random:llama?layers=4,hidden=64,heads=2,kv_heads=2,head_dim=64,vocab=256"
TOKENS = 1024
KV_BYTES = 4 * MIB  # 4 layers x keys and values x 2 heads x 64 dims x 4 bytes = 4 KiB a token
SHAPE: dict[str, Any] = {
    "model": MODEL,
    "context": TOKENS,
    "dtype": "float32",
    "prefill_chunk": 256,
    "memory_budget": "32MiB",
    "attention": "exact",
}
MODES = ("memory", "dynamic-cache", "mmap", "page-cache", "direct", "dual")
STORED = MODES[2:]

REASON = MemoryCgroup.available()
needs_cgroup = pytest.mark.skipif(REASON is not None, reason=f"no memory cgroup: {REASON}")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All modes, without a limit, on both states of a store that is named."""
    folder = tmp_path_factory.mktemp("prefill")
    options = PrefillBenchOptions(
        **SHAPE, modes=MODES, store_state="both", store=folder / "kv.store"
    )
    result: dict[str, Any] = json.loads(json.dumps(run_prefill_bench(options)))
    assert list(folder.iterdir()) == []
    return result


def of(result: dict[str, Any], mode: str, state: str | None) -> dict[str, Any]:
    found = [r for r in result["runs"] if (r["mode"], r["store_state"]) == (mode, state)]
    (run,) = found
    assert run["error"] is None, run["error"]
    return dict(run)


def test_every_mode_gives_the_same_first_token(runs: dict[str, Any]) -> None:
    assert runs["tokens_agree"] is True
    assert len(runs["runs"]) == 2 + 2 * len(STORED)
    assert {run["kv_bytes"] for run in runs["runs"]} == {KV_BYTES}
    assert all(run["prefill_seconds"] > 0 for run in runs["runs"])
    assert all(run["peak_memory_bytes"] > run["base_memory_bytes"] > 0 for run in runs["runs"])


@pytest.mark.parametrize("state", ["fresh", "written"])
@pytest.mark.parametrize("mode", ["page-cache", "direct", "dual"])
def test_all_kv_is_handed_to_the_store_once(runs: dict[str, Any], mode: str, state: str) -> None:
    run = of(runs, mode, state)
    assert run["store_written_bytes"] == KV_BYTES  # the prompt is whole tiles
    assert 0 <= run["stall_seconds"] <= run["prefill_seconds"]
    assert run["stall_fraction"] == pytest.approx(run["stall_seconds"] / run["prefill_seconds"])
    if mode == "direct":
        assert run["device_written_bytes"] >= KV_BYTES / 2  # the rest may be on its way
        # Chunks 2, 3 and 4 read what is before them: 1 + 2 + 3 quarters.
        read = run["cache"]["io"]["direct_read_bytes"]
        assert read >= 6 * KV_BYTES // 4


def test_what_stores_nothing_has_no_state_and_writes_nothing(runs: dict[str, Any]) -> None:
    for mode in ("memory", "dynamic-cache"):
        run = of(runs, mode, None)
        assert run["device_written_bytes"] == 0
        assert run["engine"] is None
    assert of(runs, "memory", None)["stall_seconds"] == 0
    assert of(runs, "dynamic-cache", None)["stall_seconds"] is None


def test_the_report_has_a_section_of_it(runs: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "prefill.json").write_text(json.dumps(runs))
    page = collect(tmp_path)
    assert page.skipped == []
    (section,) = page.sections
    assert [row[:2] for row in section.rows][:3] == [
        ["memory", "-"],
        ["dynamic-cache", "-"],
        ["mmap", "fresh"],
    ]
    assert "<svg" in section.figures[0]
    assert any("mapped files" in card.what for card in page.cards)


@needs_cgroup
def test_a_limit_leaves_what_it_says_and_kills_what_needs_more() -> None:
    shape = {**SHAPE, "batch": 16, "attention": "tiles"}
    options = PrefillBenchOptions(**shape, modes=("direct", "memory"), memory_limits=("50%",))
    result = run_prefill_bench(options)
    direct, memory = result["runs"]
    assert (direct["error"], direct["oom_killed"]) == (None, False)
    assert direct["memory_limit_bytes"] == result["calibration"]["base_bytes"] + int(
        0.5 * 16 * KV_BYTES
    )
    assert direct["peak_memory_bytes"] <= direct["memory_limit_bytes"]
    assert memory["oom_killed"] is True
    assert memory["prefill_seconds"] is None
    assert result["summary"][1]["oom_killed"] == 1


def test_the_command_writes_a_result(tmp_path: Path) -> None:
    output = tmp_path / "prefill.json"
    words = ["bench", "prefill", "--model", MODEL, "--mode", "memory", "--context", "128"]
    done = CliRunner().invoke(app, [*words, "--output", str(output)])
    assert done.exit_code == 0, done.stderr
    assert json.loads(output.read_text())["benchmark"] == "prefill"
    assert "memory" in done.stdout
    log = output.with_suffix(".jsonl")
    assert len(log.read_text().splitlines()) == 2
    again = CliRunner().invoke(app, [*words, "--output", str(output), "--json"])
    assert json.loads(again.stdout)["runs"] == json.loads(output.read_text())["runs"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"store_state": "old"},
        {"prefill_chunk": 0},
        {"modes": ()},
        {"modes": ("quick",)},
        {"memory_limits": ("much",)},
        {"memory_budget": "12XB"},
        {"dtype": "bf16"},
        {"repeats": 0},
        {"store": Path("/dev/null")},  # not a file: never fresh
    ],
)
def test_wrong_options_are_config_errors(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        PrefillBenchOptions(model=MODEL, **wrong)


def test_repeats_are_interleaved_and_states_are_of_what_is_stored() -> None:
    options = PrefillBenchOptions(
        model=MODEL, modes=("memory", "dual"), store_state="both", repeats=2
    )
    memory, fresh, written = (None, "memory"), ("fresh", "dual"), ("written", "dual")
    orders = [(memory, fresh, written), (fresh, memory, written)]
    assert plan_prefill(options) == [
        Planned(repeat, None, state, mode)
        for repeat, order in enumerate(orders)
        for state, mode in order
    ]


Install = Callable[[int], list[PrefillBenchOptions]]


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Puts a list of their options in the place of the children; after `enough` comes Ctrl-C."""

    def install(enough: int) -> list[PrefillBenchOptions]:
        given: list[PrefillBenchOptions] = []

        def one(options: PrefillBenchOptions, mode: str, limit: Limit) -> dict[str, Any]:
            if len(given) == enough:
                raise KeyboardInterrupt
            given.append(options)
            run = dict.fromkeys((*prefill._MEASURED, "error"))
            return {
                **run,
                "mode": mode,
                "attention": "tiles",
                "memory_limit": limit.asked,
                "memory_limit_bytes": None,
                "prefill_seconds": 1.0,
                "device_written_bytes": 0,
                "oom_killed": mode == "direct" and len(given) == 2,
            }

        monkeypatch.setattr(prefill, "one_prefill", one)
        return given

    return install


def test_it_goes_on_where_it_was_interrupted(children: Install, tmp_path: Path) -> None:
    options = PrefillBenchOptions(model=MODEL, modes=("dual",), repeats=4)
    told: list[str] = []
    watch = Watch(progress=told.append, log_path=tmp_path / "log.jsonl", following=3)
    children(3)
    with pytest.raises(KeyboardInterrupt):
        run_prefill_bench(options, watch)
    assert told[0].startswith("1 of 4: fresh dual: 1.0 s, 0 B written; ")
    assert "the same command goes on" in told[-1]
    rest = children(100)
    assert len(run_prefill_bench(options, watch)["runs"]) == 4
    assert len(rest) == 1


def test_a_written_store_is_written_before_and_after_a_failure(
    children: Install, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    written: list[tuple[str, DecodeWorkload]] = []
    monkeypatch.setattr(prefill, "write_store", lambda w, mode: written.append((mode, w)))
    given = children(100)
    options = PrefillBenchOptions(
        model=MODEL,
        modes=("mmap", "direct", "dual"),
        store_state="written",
        repeats=2,
        store=tmp_path / "kv.store",
    )
    run_prefill_bench(options)
    # The second run, of direct, was killed: the store is written anew for the third.
    assert [mode for mode, _ in written] == ["mmap", "direct", "direct"]
    assert {workload.store for _, workload in written} == {tmp_path / "kv.store"}
    assert all(o.engine["keep_store_blocks"] for o in (*given, *(w for _, w in written)))


def test_a_summary_compares_with_memory() -> None:
    runs = [
        {
            **dict.fromkeys(prefill._MEASURED),
            "mode": mode,
            "store_state": state,
            "memory_limit": None,
            "prefill_seconds": seconds,
            "oom_killed": False,
        }
        for mode, state, seconds in (
            ("memory", None, 2.0),
            ("dual", "fresh", 3.0),
            ("dual", "written", 2.5),
            ("dual", "fresh", 5.0),
        )
    ]
    memory, fresh, written = summarize(runs)
    assert (memory["prefill_to_memory"], memory["runs"]) == (1.0, 1)
    assert (fresh["prefill_seconds"], fresh["prefill_seconds_spread"]) == (4.0, [3.0, 5.0])
    assert (fresh["prefill_to_memory"], written["prefill_to_memory"]) == (2.0, 1.25)


def test_what_a_killed_benchmark_left_in_the_cache_directory_is_removed(tmp_path: Path) -> None:
    """Of one that is no more; those of others, and what is not ours, stay."""
    left = [f"bench-prefill-99999999.store{end}" for end in ("", ".mmap", ".fresh-99999999")]
    others = ["bench-prefill-1.store", "bench-prefill-x.store", "my.store"]
    for name in [*left, *others]:
        if name.endswith(".mmap"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "keys-0").touch()
        else:
            (tmp_path / name).touch()
    prefill._Stores(PrefillBenchOptions(**SHAPE), tmp_path, Watch())
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)


def test_a_fresh_store_is_new_after_a_run_that_was_killed(tmp_path: Path) -> None:
    """It leaves its blocks, and the next run would only rewrite them."""
    options = PrefillBenchOptions(**SHAPE, store=tmp_path / "kv.store")
    stale, running = tmp_path / "kv.store.fresh-99999999", tmp_path / "kv.store.fresh-1"
    copy = tmp_path / "kv.store.fresh-99999998"
    copy.write_text("somebody's, of no process")
    with open_engine("posix") as engine:
        for path in (stale, running):
            Store.open(path, engine, direct=False, capacity_bytes=2 * MIB).close()
    stores = prefill._Stores(options, tmp_path, Watch())
    planned = Planned(0, None, "fresh", "direct")
    assert stores.ready(planned).store == stores.fresh
    stores.fresh.write_bytes(b"left behind")
    assert stores.ready(planned).store == stores.fresh
    assert not stores.fresh.exists()
    assert not stale.exists(), "of a benchmark that was killed itself"
    assert running.exists()
    assert copy.exists()
