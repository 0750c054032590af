"""The script for machines with a GPU, as far as it goes without one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.scripts import load_script

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts/gpu_bench"


@pytest.mark.skipif(not SCRIPT.exists(), reason="installed without the sources")
def test_the_gpu_script_measures_and_tells(tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, "--quick", "--no-gpu", "--steps", "2", "--output", tmp_path]
    done = subprocess.run(
        [*command, "--memory-budget", "16MiB"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines()[2:]}
    assert set(rows) == {"memory", "direct", "dual"}
    assert float(rows["memory"][2]) == 0  # no reads
    assert float(rows["direct"][2]) > 0
    assert float(rows["direct"][7]) == 2  # MiB of staging
    (run,) = json.loads((tmp_path / "quick-direct.json").read_text())["runs"]
    assert run["device_read_bytes_per_step"] == run["kv_bytes"]
    if load_script(SCRIPT).clean_commit_here() is None:
        return  # of code that is not committed everything is measured anew
    # Asked again, by a relative name, it measures nothing anew.
    command[-1] = tmp_path.name
    again = subprocess.run(
        [*command, "--memory-budget", "16MiB"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path.parent,
    )
    assert again.stdout == done.stdout


@pytest.fixture
def script() -> Any:
    return load_script(SCRIPT)


@pytest.mark.skipif(not SCRIPT.exists(), reason="installed without the sources")
def test_only_what_was_measured_as_asked_by_this_code_is_kept(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit: str | None = "b" * 40
    monkeypatch.setattr(script, "clean_commit_here", lambda: commit)
    output = tmp_path / "quick-direct.json"
    asked = ["bench", "decode", "--steps", "8"]
    assert not script.is_kept(output, asked, on_cpu=True)
    result = {
        "command": "__main__.py bench decode --steps 8",
        "machine": {"git": {"commit": commit, "dirty": False}},
        "runs": [{"device": "cpu"}],
    }
    output.write_text(json.dumps(result))
    assert script.is_kept(output, asked, on_cpu=True)
    assert not script.is_kept(output, asked, on_cpu=False)
    assert not script.is_kept(output, [*asked[:-1], "2"], on_cpu=True)
    for git in ({"commit": "a" * 40, "dirty": False}, {"commit": commit, "dirty": True}, None):
        output.write_text(json.dumps({**result, "machine": {"git": git}}))
        assert not script.is_kept(output, asked, on_cpu=True)
    output.write_text(json.dumps(result))
    commit = None  # something is not committed now
    assert not script.is_kept(output, asked, on_cpu=True)


def test_a_trace_that_keeps_the_newest_steps_says_so(script: Any, tmp_path: Path) -> None:
    """Reads of 0.5 s in each of eight steps of 1 s, of which three are kept."""
    events = [
        {"ph": "X", "cat": "reads", "ts": 1e6 * step, "dur": 0.5e6} for step in range(5, 8)
    ] + [{"ph": "X", "cat": "compute", "ts": 7.5e6, "dur": 0.5e6}]
    (tmp_path / "trace").write_text(json.dumps({"traceEvents": events}))
    found, share = script.stages(tmp_path / "trace", 8.0)
    assert share == pytest.approx(3 / 8)
    assert script.length(found["reads"]) / (8 * share) == pytest.approx(0.5)


@pytest.mark.skipif(not SCRIPT.exists(), reason="installed without the sources")
def test_fio_is_asked_for_beside_files_alone(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert script.on_drive("/mnt/kv.store") == ["--compare-fio", "--store", "/mnt/kv.store"]
    assert script.on_drive("/dev/null") == ["--store", "/dev/null"]
    assert script.on_drive(None) == ["--compare-fio"]
    monkeypatch.setattr(script.shutil, "which", lambda _: None)
    assert script.on_drive("/mnt/kv.store") == ["--store", "/mnt/kv.store"]
    assert script.on_drive(None) == []


@pytest.mark.skipif(not SCRIPT.exists(), reason="installed without the sources")
def test_the_gpu_script_measures_nothing_of_worth_without_a_gpu() -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--no-gpu"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "--no-gpu only tries the script" in done.stderr
