"""Tables in documents are what the result files say."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_tables_are_generated_from_committed_results() -> None:
    script = ROOT / "scripts" / "render_results.py"
    if not script.exists():
        pytest.skip("installed without the sources")
    run = subprocess.run(
        [sys.executable, script, "--check"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
