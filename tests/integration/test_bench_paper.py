"""bench paper: scenario files, what is wrong with them, and the tiny one from end to end."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dualblade.bench import paper
from dualblade.bench.decode import DecodeBenchOptions
from dualblade.bench.paper import needs_of, run_paper
from dualblade.bench.report import collect
from dualblade.bench.run_log import RunLog
from dualblade.bench.scenario import find_scenario, read_scenario, scenario_names
from dualblade.bench.series import Watch
from dualblade.cli.app import app
from dualblade.errors import BudgetError, ConfigError, DualBladeError, NoSpace, Unsupported
from dualblade.host import throttle
from dualblade.host.memory import MemoryReading
from dualblade.host.profile import profiles_file
from dualblade.units import GIB, MIB

GOOD = """
title = "T"
about = "A"
minutes = 1
[defaults]
model = "random:llama"
context = 512
[[runs]]
name = "one"
benchmark = "decode"
modes = ["dual", "memory"]
repeats = 2
[[runs]]
name = "two"
benchmark = "prefill"
modes = ["direct"]
context = 64
prefill_chunk = 32
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text)
    return path


def test_the_tiny_scenario_and_its_report(tmp_path: Path) -> None:
    output = tmp_path / "out"
    done = CliRunner().invoke(app, ["bench", "paper", "tiny", "--output", str(output)])
    assert done.exit_code == 0, done.stderr
    assert "[2/3 ablation]" in done.stderr
    assert "left" in done.stderr
    assert "dualblade bench report" in done.stdout
    results = {path.stem: json.loads(path.read_text()) for path in output.glob("*.json")}
    assert set(results) == {"decode", "ablation", "prefill"}
    assert results["decode"]["tokens_agree"] is True
    assert results["ablation"]["tokens_agree"] is True
    for result in results.values():
        assert [run["error"] for run in result["runs"]] == [None] * len(result["runs"])
        assert result["scenario"]["name"] == "tiny"
    before = {path.name: path.read_text() for path in output.glob("*.jsonl")}
    again = CliRunner().invoke(app, ["bench", "paper", "tiny", "--output", str(output), "--json"])
    told = json.loads(again.stdout)
    assert [entry["name"] for entry in told["entries"]] == ["decode", "ablation", "prefill"]
    assert [each["summary"] for each in told["entries"]] == [
        results[entry["name"]]["summary"] for entry in told["entries"]
    ]
    assert {path.name: path.read_text() for path in output.glob("*.jsonl")} == before  # ran nothing
    page = tmp_path / "page.html"
    report = CliRunner().invoke(
        app, ["bench", "report", str(output), "--output", str(page), "--json"]
    )
    assert report.exit_code == 0, report.stderr
    assert json.loads(report.stdout)["skipped"] == []
    text = page.read_text()
    for title in (": decoding llama (", "What each part gains", ": prefill of llama ("):
        assert title in text


def test_all_packaged_scenarios_are_valid_and_say_what_they_need() -> None:
    names = scenario_names()
    assert {"tiny", "quick", "paper", "ablation", "pipeline"} < set(names)
    assert {"laptop-8gb", "jetson", "long-document"} < set(names)
    for scenario in map(find_scenario, names):
        assert scenario.title
        assert scenario.about
        for entry in scenario.entries:
            needs = needs_of(entry)
            assert needs.memory_bytes > 500 * MIB
            assert needs.store_bytes > 0


def test_what_a_run_needs_is_weights_and_the_kv_in_memory() -> None:
    by_name = {entry.name: entry for entry in find_scenario("paper").entries}
    needs = needs_of(by_name["decode-opt-6.7b"])
    kv = 2 * 32 * 4096 * 2 * 12 * 1984  # keys and values, layers, hidden, bytes, batch, context
    weights = needs.memory_bytes - paper.PROCESS_BYTES - 11 * GIB
    own = 6.66e9 * 2 / 32  # all 32 layers share the weights of one, beside the embeddings
    assert own < weights < own + 5e8
    assert needs.store_bytes == kv + GIB


def test_a_file_has_runs_with_defaults(tmp_path: Path) -> None:
    scenario = read_scenario(written(tmp_path, GOOD)).on(tmp_path / "kv.store")
    one, two = scenario.entries
    assert isinstance(one.options, DecodeBenchOptions)
    assert (one.options.context, two.options.context) == (512, 64)
    assert (one.run_count, two.run_count, scenario.run_count) == (4, 1, 5)
    assert {entry.options.store for entry in scenario.entries} == {tmp_path / "kv.store"}
    assert {entry.device_bytes_per_second for entry in scenario.entries} == {None}


def test_a_drive_may_be_held_to_a_speed_in_all_runs_or_in_one(tmp_path: Path) -> None:
    text = GOOD.replace("minutes = 1", "minutes = 1\ndevice_bytes_per_second = 1_000_000_000")
    text = text.replace('name = "two"', 'name = "two"\ndevice_bytes_per_second = "200MiB"')
    scenario = read_scenario(written(tmp_path, text))
    assert [entry.device_bytes_per_second for entry in scenario.entries] == [
        10**9,
        200 * MIB,
    ]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('modes = ["direct"]', 'mode = ["direct"]', r"2 \(two\) unknown key 'mode'.*'modes'"),
        ('modes = ["direct"]', 'modes = "direct"', "modes is a list of texts, not 'direct'"),
        ('modes = ["direct"]', "modes = [1]", "modes is a list of texts"),
        ('modes = ["direct"]', 'modes = ["fast"]', r"\(two\) unknown mode 'fast'.*page-cache"),
        ("repeats = 2", "repeats = true", "repeats is a whole number, not True"),
        ("repeats = 2", "repeats = 0", "repeats must be at least 1, not 0"),
        ("repeats = 2", "prefill_chunk = 2", "unknown key 'prefill_chunk'"),
        ("repeats = 2", 'store = "x"', "unknown key 'store'"),
        ("repeats = 2", 'ablation = ["a"]', "ablation names 1 steps"),
        ("repeats = 2", "engine = {queue_dept = 8}", "queue_dept"),
        ('benchmark = "prefill"', 'benchmark = "io"', "use one of: decode, prefill"),
        ('name = "two"', 'name = "one"', "two runs have the name 'one'"),
        ('name = "two"', 'name = "../two"', "name cannot be"),
        ('model = "random:llama"', "", "model is missing"),
        ('model = "random:llama"', "modell = 1", r"\[defaults\] unknown key 'modell'.*'model'"),
        ("minutes = 1", "", "minutes is missing"),
        ("minutes = 1", "minutes = 1\nhours = 2", "unknown key 'hours'"),
        ("minutes = 1", "minutes = 'long'", "minutes cannot be"),
        ("minutes = 1", "minutes = 1\ndevice_bytes_per_second = 'fast'", "not a size"),
        ('name = "two"', 'name = "two"\ndevice_bytes_per_second = []', r"\(two\) not a size"),
        ('title = "T"', "title = ", "not TOML"),
    ],
)
def test_what_is_wrong_is_told_with_file_and_key(
    tmp_path: Path, old: str, new: str, said: str
) -> None:
    path = written(tmp_path, GOOD.replace(old, new))
    with pytest.raises(ConfigError, match=rf"(?s){path}.*{said}") as failed:
        read_scenario(path)
    assert len(str(failed.value).splitlines()) <= 2


def test_what_cannot_be_found_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown scenario 'tiney'\ndid you mean 'tiny'"):
        find_scenario("tiney")
    with pytest.raises(ConfigError, match="cannot read"):
        find_scenario(str(tmp_path / "none.toml"))
    done = CliRunner().invoke(app, ["bench", "paper", "tiny"])
    assert done.exit_code == 2
    assert "--output is missing" in done.stderr
    listed = CliRunner().invoke(app, ["bench", "paper", "--list", "--json"])
    assert [s["name"] for s in json.loads(listed.stdout)["scenarios"]] == scenario_names()


def test_one_run_of_a_scenario(tmp_path: Path) -> None:
    scenario = read_scenario(written(tmp_path, GOOD))
    assert [entry.name for entry in scenario.only(["two"]).entries] == ["two"]
    assert scenario.only(["two", "one"]) == scenario, "in the file's order"
    file, output = str(tmp_path / "mine.toml"), str(tmp_path / "out")
    done = CliRunner().invoke(
        app, ["bench", "paper", file, "--run", "tow", "--output", output], terminal_width=200
    )
    assert done.exit_code == 2
    assert "scenario mine has no run 'tow'" in done.stderr
    assert "did you mean 'two'? known: one, two" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_scenario_on_a_device_leaves_out_what_cannot_be_there(tmp_path: Path) -> None:
    """Each shipped one that compares with mapped files can be run on a drive of its own."""
    text = GOOD.replace('["dual", "memory"]', '["dual", "mmap", "mmap+pipeline=serial"]')
    scenario, lines = read_scenario(written(tmp_path, text)), list[str]()
    one, two = scenario.on(Path("/dev/null"), lines.append).entries
    assert (one.options.modes, two.options.modes) == (("dual",), ("direct",))
    assert {entry.options.store for entry in (one, two)} == {Path("/dev/null")}
    assert two.options.store_state == "written"
    assert [line.partition(":")[0] for line in lines] == ["one", "two"]
    assert scenario.on(tmp_path / "kv.store").entries[0].options.modes[1] == "mmap"
    lone = read_scenario(written(tmp_path, text.replace('"dual", ', "")))
    with pytest.raises(ConfigError, match="run one maps files"):
        lone.on(Path("/dev/null"))
    assert lone.only(["two"]).on(Path("/dev/null")).run_count == 1


def keep(path: Path, result: dict[str, Any]) -> None:
    path.write_text(json.dumps(result))


def test_a_machine_that_is_too_small_is_told_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = MemoryReading(
        available_bytes=GIB, source="a test", machine_available_bytes=GIB, limits=()
    )
    monkeypatch.setattr(paper, "available_memory", lambda: small)
    with pytest.raises(BudgetError, match=r"scenario paper needs 14\.\d GiB .* there are 1.00 GiB"):
        run_paper(find_scenario("paper"), tmp_path / "out", keep)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(paper.shutil, "disk_usage", lambda _: type("U", (), {"free": MIB // 2}))
    with pytest.raises(NoSpace, match=r"needs .* on the drive"):
        run_paper(find_scenario("tiny"), tmp_path / "out", keep)


def test_what_is_finished_needs_no_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither room nor root: its result is only written again."""

    def refuse(*_: object) -> None:
        raise Unsupported("not here")

    def done(_options: object, _watch: Watch) -> dict[str, Any]:
        return {"tokens_agree": None, "summary": []}

    text = GOOD.replace("minutes = 1", "minutes = 1\ndevice_bytes_per_second = 1_000_000_000")
    text = text.replace("context = 512", 'context = 512\nmemory_limits = ["50%"]')
    scenario, output = read_scenario(written(tmp_path, text)), tmp_path / "out"
    output.mkdir()
    for name in ("_require_room", "require_cgroup", "throttled"):
        monkeypatch.setattr(paper, name, refuse)
    monkeypatch.setattr(paper, "run_decode_bench", done)
    monkeypatch.setattr(paper, "run_prefill_bench", done)
    for entry in scenario.entries:
        with RunLog(output / f"{entry.name}.jsonl", {}, dict) as log:
            for _ in range(entry.run_count):
                log.append({"error": None})
    told = run_paper(scenario, output, keep)
    assert [entry["error"] for entry in told["entries"]] == [None, None]
    with (output / "two.jsonl").open("a") as file:
        file.write("cut sho")
    with pytest.raises(Unsupported, match="not here"):
        run_paper(scenario, output, keep)


def test_memory_with_settings_of_its_own_needs_memory_too(tmp_path: Path) -> None:
    plain = GOOD.replace('["dual", "memory"]', '["memory"]')
    exact = GOOD.replace('["dual", "memory"]', '["memory+attention=exact"]')
    needs = [
        needs_of(read_scenario(written(tmp_path, text)).entries[0]).memory_bytes
        for text in (plain, exact)
    ]
    assert needs[0] == needs[1]


def test_an_entry_that_fails_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_options: object, _watch: Watch) -> dict[str, Any]:
        raise DualBladeError("the drive is gone")

    def prefill(_options: object, watch: Watch) -> dict[str, Any]:
        watch.progress("one run")
        return {"tokens_agree": None, "summary": []}

    monkeypatch.setattr(paper, "run_decode_bench", fail)
    monkeypatch.setattr(paper, "run_prefill_bench", prefill)
    lines: list[str] = []
    scenario = read_scenario(written(tmp_path, GOOD))
    told = run_paper(scenario, tmp_path / "out", keep, lines.append)
    assert [entry["error"] for entry in told["entries"]] == ["the drive is gone", None]
    assert lines == ["[1/2 one] the drive is gone", "[2/2 two] one run"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["two.json"]
    monkeypatch.setattr(paper, "run_prefill_bench", fail)
    with pytest.raises(DualBladeError, match="no run of mine got through"):
        run_paper(scenario, tmp_path / "out", keep)


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ({"error": "the drive is gone", "tokens_agree": None}, "failed: two\nthe same command"),
        ({"error": None, "tokens_agree": False}, "gave different tokens"),
        ({"error": None, "tokens_agree": True}, None),
    ],
)
def test_the_status_says_whether_all_went_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, second: dict[str, Any], said: str | None
) -> None:
    one = {"name": "one", "benchmark": "decode", "error": None, "tokens_agree": True, "summary": []}
    result = {"entries": [one, {**one, "name": "two", **second}]}
    monkeypatch.setattr(paper, "run_paper", lambda *_: result)
    command = ["bench", "paper", "tiny", "--output", str(tmp_path), "--json"]
    done = CliRunner().invoke(app, command)
    assert json.loads(done.stdout) == result
    assert done.exit_code == (0 if said is None else 1)
    assert said is None or said in done.stderr


def test_without_fio_only_its_figure_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def note(options: Any, _watch: Watch) -> dict[str, Any]:
        asked.append(options.compare_fio)
        return {"tokens_agree": None, "summary": []}

    monkeypatch.setattr(paper, "run_decode_bench", note)
    monkeypatch.setattr(paper, "run_prefill_bench", note)
    monkeypatch.setenv("PATH", str(tmp_path))
    text = GOOD.replace("repeats = 2", "compare_fio = true")
    lines: list[str] = []
    run_paper(read_scenario(written(tmp_path, text)), tmp_path / "out", keep, lines.append)
    assert asked == [False, False]
    assert "fio is not installed" in lines[0]


def test_a_throttle_that_is_impossible_is_told(tmp_path: Path) -> None:
    proc = tmp_path / "proc/self"
    proc.mkdir(parents=True)
    (proc / "mounts").write_text("cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n")
    (proc / "cgroup").write_text("0::/\n")
    with pytest.raises(Unsupported, match=r"cannot be throttled: .*not mounted"):
        throttle._blkio_group(tmp_path)
    (proc / "mounts").write_text(f"cgroup {tmp_path} cgroup rw,blkio 0 0\n")
    (proc / "cgroup").write_text("7:blkio:/ours\n")
    assert throttle._blkio_group(tmp_path) == (tmp_path, "/ours")


def test_a_throttle_holds_this_process_and_lets_it_go(tmp_path: Path) -> None:
    try:
        with throttle.throttled(tmp_path, 100_000_000):
            inside = throttle._blkio_group()[1]
            rule = (
                throttle._blkio_group()[0] / inside.lstrip("/") / ("blkio.throttle.read_bps_device")
            )
            assert inside == f"/dualblade-{os.getpid()}"
            assert rule.read_text().split()[1] == "100000000"
    except Unsupported as exc:
        pytest.skip(str(exc))
    assert throttle._blkio_group()[1] != inside
    assert not rule.exists()


def test_a_drive_that_is_held_has_no_profile_of_its_own_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paper, "throttled", lambda *_: contextlib.nullcontext())
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    own = profiles_file()
    with paper._held_to(None, tmp_path):
        assert profiles_file() == own
    with paper._held_to(1_000_000_000, tmp_path):
        inside = profiles_file()
        assert inside != own
        assert inside.parent.parent.exists()
    assert profiles_file() == own
    assert not inside.parent.parent.exists()


def test_results_of_a_scenario_are_found_by_the_report_alone(tmp_path: Path) -> None:
    """The log beside a result is no result."""
    (tmp_path / "decode.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match="no results"):
        collect(tmp_path)
