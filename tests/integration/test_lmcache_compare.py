"""examples/lmcache/compare.py, with a program in LMCache's place that answers as it does."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "lmcache"
PROGRAM = """#!{python}
import json, os, sys
words = sys.argv[1:]
options = dict(zip(words, words[1:]))
spec = json.loads(options["--l2-adapter"])
keys = int(options["--num-keys"]) * int(options["--in-flight"]) * int(options["--rounds"])
assert words[:2] == ["bench", "l2"] and os.environ["LMCACHE_TRACK_USAGE"] == "false"
assert "FOLDER" not in options["--l2-adapter"]
if spec["type"] == "raw_block":
    assert os.path.getsize(spec["device_path"]) > 1 << 30
lost = spec["type"] == {lost!r}
parts = [dict(operation=name, total_keys=keys, total_success=keys - lost, duration_p50_ms=4.0)
         for name in ("Store", "Lookup", "Load")]
metrics = {{"config": {{}}}} | {{f"op_{{i}}": part for i, part in enumerate(parts)}}
json.dump({{"metrics": metrics}}, open(options["--output"], "w"))
print({said!r})
"""


class Fio:
    """A yardstick that measures nothing."""

    def __init__(self, *_place: Any, **_sizes: Any) -> None: ...

    def __enter__(self) -> Fio:
        return self

    def __exit__(self, *_exc_info: object) -> None: ...

    def measure(self) -> dict[str, Any]:
        return {"read_bytes_per_second": 1}


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    sys.modules.pop("compare", None)
    module = importlib.import_module("compare")
    monkeypatch.delitem(sys.modules, "compare")
    monkeypatch.setattr(module, "FioYardstick", Fio)
    return module


def program(folder: Path, *, said: str = "data verified OK", lost: str = "") -> str:
    place = folder / "lmcache"
    place.write_text(PROGRAM.format(python=sys.executable, said=said, lost=lost))
    place.chmod(0o755)
    return str(place)


def test_all_contenders_take_turns(compare: ModuleType, tmp_path: Path) -> None:
    drive = tmp_path / "drive"
    drive.mkdir()
    load = compare.Workload(num_keys=2, in_flight=2, rounds=2)
    result = compare.compare(drive, program(tmp_path), load, 2)
    assert list(drive.iterdir()) == []
    order = [run["contender"] for run in result["runs"]]
    assert order == [0, 1, 2, 3, 4, 1, 2, 3, 4, 0]
    assert {run["bytes_per_second"]["load"] for run in result["runs"]} == {4 * 2**20 / 0.004}
    assert len(result["fio"]) == 2
    committed = json.loads((EXAMPLE / "results.json").read_text())
    assert committed.keys() == json.loads(json.dumps(result)).keys()
    assert [each["name"] for each in committed["contenders"]] == [
        each["name"] for each in result["contenders"]
    ]


def test_a_contender_that_loses_something_ends_it(compare: ModuleType, tmp_path: Path) -> None:
    load = compare.Workload(num_keys=1, in_flight=1, rounds=1)
    with pytest.raises(RuntimeError, match=r"fs_native.* lost keys"):
        compare.compare(tmp_path, program(tmp_path, lost="fs_native"), load, 1)
    with pytest.raises(RuntimeError, match="data mismatches"):
        compare.compare(tmp_path, program(tmp_path, said="1 keys have data mismatches!"), load, 1)
    assert [place.name for place in tmp_path.iterdir()] == ["lmcache"]
