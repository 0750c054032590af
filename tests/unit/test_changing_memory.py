"""scripts/measure_changing_memory.py: what its runs come to, and how a limit is changed."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dualblade.bench.report_tables import changing_memory_section, changing_memory_table
from dualblade.errors import BudgetError
from dualblade.units import GIB
from tests.integration.sample_results import MACHINE
from tests.scripts import load_script

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script(ROOT / "scripts" / "measure_changing_memory.py")


def run(mode: str, repeat: int, step_seconds: tuple[float, float, float]) -> dict[str, Any]:
    """Phases of ten seconds, of steps that take the same."""
    steps = [
        {"phase": number, "at_seconds": at * seconds, "seconds": seconds}
        for number, seconds in enumerate(step_seconds)
        for at in range(round(10 / seconds))
    ]
    return {
        "mode": mode,
        "repeat": repeat,
        "oom_killed": False,
        "tokens": len(steps),
        "phases": [{"seconds": 10.0, "change_seconds": 0.1, "device_read_bytes": 1}] * 3,
        "steps": steps,
    }


def result(script: ModuleType) -> dict[str, Any]:
    runs = [
        run("dual", 0, (0.1, 0.2, 0.1)),
        run("dual", 1, (0.1, 0.5, 0.1)),
        run("dual", 2, (0.1, 0.25, 0.1)),
        run("direct", 0, (0.5, 0.5, 0.5)),
        {"mode": script.MODES[0], "repeat": 0, "oom_killed": True, "tokens": None},
    ]
    return {
        "benchmark": "changing-memory",
        "command": "measure_changing_memory.py",
        "repeats": 3,
        "phases": [{"fraction": part, "seconds": 10.0} for part in (0.75, 0.25, 0.75)],
        "kv_bytes": GIB,
        "summary": script.summary(runs),
        "machine": MACHINE,
        "runs": runs,
    }


def test_tokens_and_longest_steps_are_of_each_phase(script: ModuleType) -> None:
    head, rows, about = changing_memory_table(result(script))
    assert head[:3] == ["mode", "tokens/s", "first 75%"]
    cells = {row[0]: row[1:] for row in rows}
    assert cells["dual"] == ["8.0", "10.0", "4.0", "10.0", "100", "500", "100"]
    assert cells["direct"] == ["2.0", "2.0", "2.0", "2.0", "500", "500", "500"]
    assert cells[script.MODES[0]] == ["killed", *[""] * 6]
    assert "75%, then 25%, then 75%, for 10, 10, 10 seconds" in about


def test_the_report_draws_it(script: ModuleType) -> None:
    pytest.importorskip("matplotlib")
    section, cards = changing_memory_section([("r.json", result(script))])
    assert cards == [("4.00 x", "the tokens of the best other where memory changes")]
    (figure,) = section.figures
    assert "25% in memory" in figure
    assert "dual" in figure
    without = {**result(script), "runs": [], "summary": script.summary([])}
    assert changing_memory_section([("r.json", without)])[1] == []


def test_a_limit_is_tried_until_the_kernel_has_freed_enough(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Limit:
        refusals = 3

        def set(self, size_bytes: int) -> None:
            if self.refusals:
                self.refusals -= 1
                raise BudgetError("below what is used", needed_bytes=size_bytes)

    monkeypatch.setattr(script.time, "sleep", lambda _: None)
    limit = Limit()
    script.change(limit, GIB)
    assert limit.refusals == 0
    limit.refusals = 10**6
    with pytest.raises(BudgetError):
        script.change(limit, GIB)
