"""examples/mlperf: a storage tier of MLPerf's KV-cache benchmark keeps what it is given.

The benchmark's `kv_cache` is a stand-in, written from its interface: tiers with write, read and
delete, a cache that makes its NVMe tier by name, a command line. With DUALBLADE_MLPERF=CHECKOUT
(of MLCommons' storage repository) its own program is run too.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from dualblade import DeviceError, NoSpace
from dualblade.io import Op, open_engine
from dualblade.testing import Fault, FaultyEngine
from dualblade.units import GIB, KIB, MIB

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "mlperf"
pytestmark = pytest.mark.skipif(not EXAMPLE.exists(), reason="installed without the sources")

BACKENDS = """
from dataclasses import dataclass
from pathlib import Path
import numpy as np

class StorageBackend:
    @dataclass
    class IOTiming:
        total: float
        device: float
        host: float

class NVMeBackend(StorageBackend):
    def __init__(self, base_path=None):
        self.base_path = Path(base_path)
        self.base_path.mkdir()
    def write(self, key, data):
        np.save(self.base_path / key, data)
        return self.IOTiming(0.25, 0.125, 0.125)
    def read(self, key):
        return np.load(self.base_path / f"{key}.npy"), self.IOTiming(0.25, 0.125, 0.125)
    def delete(self, key):
        (self.base_path / f"{key}.npy").unlink()
"""
# As the benchmark's, it takes what raises for what took no time.
CLI = """
import argparse, json, sys, threading, time
import numpy as np
import kv_cache.cache

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--cache-dir")
    parser.add_argument("--output")
    args, others = parser.parse_known_args()
    tier = kv_cache.cache.NVMeBackend(base_path=args.cache_dir)
    data = np.arange(3_000_000, dtype=np.float16)
    timing = tier.write("a", data)
    try:
        found, _ = tier.read("b" if "--break" in others else "a")
        assert np.array_equal(found, data)
        tier.read("a")
    except KeyError:
        pass
    tier.delete("a")
    with open(args.output, "w") as file:
        json.dump({"given": others, "tier": type(tier).__mro__[1].__name__}, file)
    threading.Thread(target=time.sleep, args=(600,)).start()  # it leaves threads behind
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    package = tmp_path / "checkout" / "kv_cache_benchmark" / "kv_cache"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "backends.py").write_text(BACKENDS)
    (package / "cache.py").write_text("from kv_cache.backends import NVMeBackend\n")
    (package / "cli.py").write_text(CLI)
    return tmp_path / "checkout"


@pytest.fixture
def example(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    def forget() -> None:
        for name in [*sys.modules]:
            if name == "dualblade_tier" or name.split(".")[0] == "kv_cache":
                del sys.modules[name]

    monkeypatch.syspath_prepend(str(checkout / "kv_cache_benchmark"))
    monkeypatch.syspath_prepend(str(EXAMPLE))
    forget()
    yield importlib.import_module("dualblade_tier")
    forget()


@pytest.fixture
def engine(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> FaultyEngine:
    """The engine of the tier."""
    faulty = FaultyEngine(open_engine())
    monkeypatch.setattr(example, "open_engine", lambda: faulty)
    return faulty


@pytest.fixture
def tier(example: ModuleType, engine: FaultyEngine, tmp_path: Path) -> Iterator[Any]:  # noqa: ARG001
    tier = example.DualBladeBackend(str(tmp_path / "objects"))
    yield tier
    tier.close()
    tier.close()


def content(name: int, size_bytes: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(name).integers(0, 256, size_bytes, dtype=np.uint8)


def used_bytes(tier: Any) -> int:
    used: int = tier._store.used_bytes
    return used


@pytest.mark.parametrize("size_bytes", [2, 4096, 3 * MIB + 2, 4 * MIB, 9 * MIB - 4096 + 6])
def test_what_is_written_is_read(tier: Any, size_bytes: int) -> None:
    wanted = content(1, size_bytes).view(np.float16).reshape(1, -1)
    wrote = tier.write("a", wanted)
    found, took = tier.read("a")
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    assert found.tobytes() == wanted.tobytes()
    assert wrote.total == pytest.approx(wrote.device + wrote.host)
    assert took.total == pytest.approx(took.device + took.host)
    assert 0 < took.device <= took.total


def test_an_array_of_any_layout_is_stored_in_order(tier: Any) -> None:
    wanted = content(1, 6 * KIB).reshape(2, 3, -1).transpose(2, 0, 1)
    tier.write("a", wanted)
    assert np.array_equal(tier.read("a")[0], wanted)


def test_a_key_that_is_written_again_has_the_new_content_and_its_room_alone(tier: Any) -> None:
    tier.write("a", content(1, 3 * MIB))
    tier.write("a", content(2, MIB))
    assert np.array_equal(tier.read("a")[0], content(2, MIB))
    assert used_bytes(tier) == 2 * MIB
    tier.write("b", content(3, MIB))
    tier.delete("a")
    tier.delete("a")
    with pytest.raises(KeyError):
        tier.read("a")
    assert used_bytes(tier) == 2 * MIB
    tier.clear()
    assert used_bytes(tier) == 0


def test_more_writers_than_lanes_and_readers_beside_them(
    example: ModuleType, engine: FaultyEngine, tier: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All lanes are taken by writers that want more: none waits for another's."""
    monkeypatch.setattr(example, "LANE_BYTES", 64 * KIB)  # of the larger ones that there are
    tier.write("a", content(99, 5 * MIB))
    engine.hold(Op.WRITE)
    size_bytes = (example.LANES + 3) * example.LANE_BYTES + 1

    def use(name: int) -> None:
        tier.write(str(name), content(name, size_bytes))
        assert np.array_equal(tier.read(str(name))[0], content(name, size_bytes))

    with ThreadPoolExecutor(example.LANES + 2) as threads:
        used = [threads.submit(use, name) for name in range(example.LANES + 2)]
        assert np.array_equal(tier.read("a")[0], content(99, 5 * MIB)), "while all of them wait"
        engine.release()
        for one in used:
            one.result(timeout=60)
    assert tier._lanes.qsize() == example.LANES


def test_a_failed_write_leaves_nothing_behind(
    example: ModuleType, engine: FaultyEngine, tier: Any
) -> None:
    tier.write("a", content(1, MIB))
    engine.inject(Fault(op=Op.WRITE, nth=2))  # the second piece of the next
    with pytest.raises(DeviceError, match=os.strerror(errno.EIO)):
        tier.write("a", content(2, 5 * example.LANE_BYTES))
    assert np.array_equal(tier.read("a")[0], content(1, MIB)), "what was there stays"
    assert used_bytes(tier) == 2 * MIB
    assert tier._lanes.qsize() == example.LANES
    whole = content(3, 2 * example.LANES * example.LANE_BYTES)  # takes every lane twice
    tier.write("b", whole)
    assert np.array_equal(tier.read("b")[0], whole)


def test_a_failed_read_raises(engine: FaultyEngine, tier: Any) -> None:
    tier.write("a", content(1, MIB))
    engine.inject(Fault(op=Op.READ, nth=0))
    with pytest.raises(DeviceError):
        tier.read("a")
    assert not tier._reading
    assert np.array_equal(tier.read("a")[0], content(1, MIB))


def test_what_does_not_fit_is_refused(tier: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_words: object) -> None:
        raise NoSpace("full", operation="allocate", path="x")

    monkeypatch.setattr(tier._store, "allocate", full)
    with pytest.raises(NoSpace):
        tier.write("a", content(1, MIB))
    with pytest.raises(KeyError):
        tier.read("a")


def benchmark(checkout: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, EXAMPLE / "dualblade_tier.py", *words],
        env={**os.environ, "PYTHONPATH": str(checkout / "kv_cache_benchmark")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("tier", ["dualblade", "theirs"])
def test_the_benchmark_runs_with_either_tier_and_says_what_failed(
    tier: str, checkout: Path, tmp_path: Path
) -> None:
    output, objects = tmp_path / "output.json", tmp_path / "objects"
    where = ("--cache-dir", objects, "--output", output)
    done = benchmark(checkout, tier, *where)
    assert done.returncode == 0, done.stderr
    kind = {"dualblade": "DualBladeBackend", "theirs": "NVMeBackend"}[tier]
    assert json.loads(output.read_text())["tier"] == kind
    if tier == "dualblade":
        assert not list(objects.iterdir()), "a private store is gone"
        failed = benchmark(checkout, tier, *where, "--break")
        assert failed.returncode == 1
        assert failed.stderr.splitlines()[-1] == "1 reads or writes failed"
    assert "dualblade_tier.py TIER" in benchmark(checkout, "other").stderr


def test_what_ends_after_the_clock_does_not_count(
    example: ModuleType,  # noqa: ARG001 - puts compare.py where it can be found
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "compare", raising=False)
    compare = importlib.import_module("compare")
    calls = [
        ["write", 1.0, 8.0, 0.5, GIB],  # before a node that only reads begins
        ["read", 10.0, 1.0, 1.0, GIB],
        ["read", 10.5, 3.5, 2.0, GIB],
        ["read", 11.0, 4.5, 9.0, GIB],
    ]
    found = compare.figures(calls, "read", 5.0)
    assert (found["reads"], found["read_bytes"]) == (2, 2 * GIB)
    assert (found["writes"], found["write_bytes"]) == (0, 0)
    assert found["read_p50_seconds"] == pytest.approx(2.25)
    assert found["cpu_seconds_per_gib"] == pytest.approx(1.0)
    assert compare.figures(calls, "both", 8.0)["write_bytes"] == GIB
    assert compare.figures(calls, "both", 8.0)["read_bytes"] == 0


def test_both_tiers_are_compared_in_turn(checkout: Path, tmp_path: Path) -> None:
    if shutil.which("fio") is None:
        pytest.skip("no fio here")
    output = tmp_path / "results.json"
    words = ("--repeats", "2", "--users", "3", "--seconds", "5", "--fio-seconds", "0.2")
    words += ("--output", str(output))
    compare = [sys.executable, EXAMPLE / "compare.py", checkout, tmp_path, *words]
    subprocess.run(compare, check=True, capture_output=True)
    result = json.loads(output.read_text())
    turns = [(run["repeat"], run["workload"], run["tier"]) for run in result["runs"]]
    assert turns[:3] == [(0, "read", "dualblade"), (0, "read", "theirs"), (0, "write", "dualblade")]
    assert turns[6:8] == [(1, "read", "theirs"), (1, "read", "dualblade")]
    assert len(turns) == 12
    moved = {run["workload"]: (run["read_bytes"], run["write_bytes"]) for run in result["runs"]}
    size_bytes = 6_000_000
    assert moved["read"] == (2 * size_bytes, 0), "what was written before does not count"
    assert moved["both"] == (2 * size_bytes, size_bytes)
    assert all(run["read_p50_seconds"] > 0 for run in result["runs"])
    given = result["arguments"]
    assert given[given.index("--num-users") + 1] == "3"
    assert not list(tmp_path.glob(".mlperf-*"))
    output.unlink()
    (checkout / "kv_cache_benchmark/kv_cache/cli.py").write_text(
        CLI.replace("np.array_equal(found, data)", "'--prefill-only' not in others")
    )
    assert subprocess.run(compare, check=False, capture_output=True).returncode == 1
    assert len(json.loads(output.read_text())["runs"]) == 2, "what was finished is kept"
    refused = subprocess.run(
        [sys.executable, EXAMPLE / "compare.py", tmp_path, tmp_path],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert refused.returncode == 2
    assert "has no kv_cache_benchmark" in refused.stderr


@pytest.mark.skipif("DUALBLADE_MLPERF" not in os.environ, reason="DUALBLADE_MLPERF names none")
def test_the_real_benchmark_runs(tmp_path: Path) -> None:
    checkout, output = Path(os.environ["DUALBLADE_MLPERF"]), tmp_path / "output.json"
    done = benchmark(
        checkout, "dualblade", "--config", checkout / "kv_cache_benchmark/config.yaml",
        "--model", "tiny-1b", "--num-users", "2", "--duration", "5", "--gpu-mem-gb", "0",
        "--cpu-mem-gb", "0", "--generation-mode", "none", "--storage-capacity-gb", "2",
        "--cache-dir", tmp_path / "objects", "--output", output,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    stats = json.loads(output.read_text())["summary"]["cache_stats"]
    assert stats["tier_storage_kv_bytes_read_gb"] > 0
    assert stats["tier_storage_kv_bytes_written_gb"] > 0
