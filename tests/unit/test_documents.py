"""Tables in documents are what the result files say."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dualblade.units import GIB
from tests.scripts import load_script

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "render_results.py"

if not SCRIPT.exists():
    pytest.skip("installed without the sources", allow_module_level=True)


@pytest.fixture
def script() -> ModuleType:
    return load_script(SCRIPT)


def load(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((ROOT / "results" / f"{name}.json").read_text())
    return result


def end(run: dict[str, Any], error: str | None) -> None:
    """As a run is kept that failed, or with None was killed."""
    asked = ("mode", "memory_limit", "store_state", "repeat", "batch", "context", "dtype")
    kept = {name: run[name] for name in asked if name in run}
    run |= {**dict.fromkeys(run), **kept, "oom_killed": error is None, "error": error}


def test_tables_are_generated_from_committed_results() -> None:
    run = subprocess.run(
        [sys.executable, SCRIPT, "--check"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


def test_a_logarithmic_figure_has_numbers_not_powers() -> None:
    figures = pytest.importorskip("dualblade.bench.figures")
    data = load("budgets/budgets")
    data["summary"][0]["step_seconds_median"] = 4.0  # one that thrashes
    drawn = figures.svg_text(figures.decode_figure(data))
    assert ">1000</text>" in drawn
    changing = figures.svg_text(figures.changing_memory_figure(load("changing-memory")))
    assert ">200</text>" in changing
    for one in (drawn, changing):
        assert "10^" not in one
        assert "baseline-shift" not in one


def test_the_demo_says_whether_the_paths_agree(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "; all paths gave the same " in script.demo()
    monkeypatch.setattr(script, "load", lambda name: {**load(name), "tokens_agree": False})
    assert "; the paths did not all give the same " in script.demo()


def test_survivors_are_counted_and_what_failed_was_not_killed(script: ModuleType) -> None:
    data = load("budgets/budgets")
    killed = next(run for run in data["runs"] if run["memory_limit"] == "50%")
    assert killed["mode"].startswith("mmap")
    end(killed, None)
    head, rows = script.against_limits(data)
    assert rows[2][1].endswith(", 2 of 3 runs")
    assert rows[1][1].isdigit()
    for run in data["runs"]:
        if run["memory_limit"] == "25%":
            end(run, "no space left")
    for item in data["summary"]:
        if item["memory_limit"] == "25%":
            item["step_seconds_median"] = None
    _, rows = script.against_limits(data)
    modes = len(data["options"]["modes"])
    assert rows[1] == ["25 %", *["failed"] * modes, *[""] * (len(head) - 1 - modes)]
    mmap = next(item for item in data["summary"] if item["memory_limit"] == "25%")
    assert script.decode_row(data, mmap)[2] == "failed"


def test_a_ratio_is_of_runs_that_took_turns(script: ModuleType) -> None:
    """A drive that gets slower from turn to turn changes no ratio; nor do runs that were killed."""
    took = {"direct": (1.0, 2.0, 4.0), "dual": (0.5, 1.2, None)}
    runs = [
        {"mode": mode, "repeat": turn, "memory_limit": "50%", "step_seconds_median": seconds}
        for mode, all_seconds in took.items()
        for turn, seconds in enumerate(all_seconds)
    ]
    assert script.paired_cell({"runs": runs}, "50%", "direct") == "0.55 (0.50-0.60)"
    assert script.paired_cell({"runs": runs[:1] + runs[3:4]}, "50%", "direct") == "0.50"
    for data, limit, other in (
        ({"runs": runs}, "50%", None),
        ({"runs": runs}, "50%", "mmap"),
        ({"runs": runs}, None, "direct"),
    ):
        assert script.paired_cell(data, limit, other) == ""


def test_what_stands_beside_a_median_is_one_over_the_runs_that_got_through(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(name: str) -> dict[str, Any]:
        """The last run of page-cache under a limit is killed, and the first of direct fails."""
        data = copy.deepcopy(load(name))
        for turn, mode, limit in ((-1, "page-cache", "0.5"), (0, "direct", None)):
            place = (mode, limit)
            runs = [run for run in data["runs"] if (run["mode"], run["memory_limit"]) == place]
            for number, run in enumerate(runs):
                run |= {"device_read_bytes_per_step": number * GIB, "page_cache_hit_fraction": 0.5}
                run["step_seconds_median"] = number + 1.0
            if runs:
                end(runs[turn], None if limit else "no space left")
        return data

    monkeypatch.setattr(script, "load", broken)
    page_cache = next(
        line for line in script.decode().splitlines() if line.startswith("| page-cache | 0.5")
    )
    summary = load("decode-opt-1.3b")["summary"]
    (item,) = (
        item for item in summary if (item["mode"], item["memory_limit"]) == ("page-cache", "0.5")
    )
    assert f"| {1000 * item['step_seconds_median']:.0f}, 2 of 3 runs |" in page_cache
    assert page_cache.endswith("| 512 | 50 % |"), "of 0 and 1 GiB"
    line = next(line for line in script.growth().splitlines() if line.startswith("| 1 x 4096 |"))
    assert line.split(" | ")[4] == "2000", "of the second run alone"


def test_prefill_paths_tell_how_runs_ended(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(name: str) -> dict[str, Any]:
        data = copy.deepcopy(load(name))
        if name.endswith("chunks"):
            runs = [run for run in data["runs"] if run["mode"] == "direct"]
            item = next(item for item in data["summary"] if item["mode"] == "direct")
            for run in runs:
                end(run, "no space left")
            item |= {key: None for key, value in item.items() if isinstance(value, float | list)}
            item |= {"device_written_bytes": None, "device_read_bytes": None}
            end(next(run for run in data["runs"] if run["mode"] == "dual"), None)
        return data

    monkeypatch.setattr(script, "load", broken)
    text = script.prefill_paths()
    assert "| chunks, written: direct | failed |  |  | - |  |  |" in text
    (dual,) = (line for line in text.splitlines() if line.startswith("| chunks, written: dual"))
    assert ", 2 of 3 runs |" in dual


@pytest.mark.parametrize("name", ["conversation.py", "long_prompt.py", "questions.py"])
def test_an_example_without_arguments_says_what_it_wants(name: str) -> None:
    command = [sys.executable, str(ROOT / "examples" / name)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert run.stderr.startswith(f"usage: python {name} MODEL")
    assert "Traceback" not in run.stderr
