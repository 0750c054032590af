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
def test_only_what_was_measured_as_asked_is_kept(script: Any, tmp_path: Path) -> None:
    output = tmp_path / "quick-direct.json"
    asked = ["bench", "decode", "--steps", "8"]
    assert not script.is_kept(output, asked, on_cpu=True)
    result = {
        "command": "__main__.py bench decode --steps 8",
        "machine": {"git": {"commit": script.commit_here(), "dirty": False}},
        "runs": [{"device": "cpu"}],
    }
    output.write_text(json.dumps(result))
    assert script.is_kept(output, asked, on_cpu=True)
    assert not script.is_kept(output, asked, on_cpu=False)
    assert not script.is_kept(output, [*asked[:-1], "2"], on_cpu=True)
    result["machine"]["git"]["commit"] = "a" * 40
    output.write_text(json.dumps(result))
    assert not script.is_kept(output, asked, on_cpu=True)


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
