"""The storage layer alone: its example runs, and nothing outside the standard library is loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "store.py"


@pytest.mark.skipif(not EXAMPLE.exists(), reason="installed without the sources")
def test_the_example_reads_what_it_wrote(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLE, tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "8 MiB came back as they were" in done.stdout
    assert "1 MiB of the extent are in the page cache" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_storage_layer_loads_nothing_outside_the_standard_library() -> None:
    code = (
        "import sys\n"
        "before = set(sys.modules)\n"
        "import dualblade.store, dualblade.io\n"
        "tops = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(*sorted(tops - sys.stdlib_module_names))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["dualblade"]
