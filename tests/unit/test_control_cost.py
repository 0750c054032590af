"""The measurement of the control's cost runs, tiny; no time is asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "measure_control.py"


def test_the_cost_of_control_is_measured() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--steps", "3"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["steps"] == 3
    assert told["units"] == told["units_cached"] == 48
    assert set(told["control_seconds_per_step"]) >= {"mean", "median", "max"}
