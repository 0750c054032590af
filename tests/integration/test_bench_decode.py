"""bench decode end to end, tiny: every mode, with and without a limit, and what goes wrong.

Each run is a process that imports torch and transformers, so the results are made once per module.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dualblade.bench import decode, workload
from dualblade.bench.child_process import ChildOutcome
from dualblade.bench.decode import DecodeBenchOptions, run_decode_bench
from dualblade.bench.series import Watch
from dualblade.bench.workload import MODES, OFFLOADED
from dualblade.errors import ConfigError, DualBladeError
from dualblade.host.cgroup import MemoryCgroup, _find_parent
from dualblade.units import MIB

MODEL = "random:llama?layers=8,hidden=128,heads=2,kv_heads=2,intermediate=128,vocab=256"
KV_BYTES = 64 * MIB  # 8 layers x keys and values x 2 heads x 64 dims x 2 bytes = 4 KiB a token
SHAPE: dict[str, Any] = {"model": MODEL, "batch": 4, "context": 4096, "steps": 3}
STORED = ("dual", "page-cache", "direct", "mmap")
HERE = tuple(mode for mode in MODES if mode != OFFLOADED)
"""Those that want no GPU."""

REASON = MemoryCgroup.available()
needs_cgroup = pytest.mark.skipif(REASON is not None, reason=f"no memory cgroup: {REASON}")

CONTRACT = {
    "mode",
    "attention",
    "engine",
    "dtype",
    "memory_limit_bytes",
    "kv_bytes",
    "step_seconds_median",
    "step_seconds_p99",
    "device_read_bytes_per_step",
    "page_cache_hit_fraction",
    "peak_memory_bytes",
    "oom_killed",
    "tokens_sha256",
}


@pytest.fixture(scope="module")
def free_runs() -> dict[str, Any]:
    """All modes without a limit, the budget half of the KV."""
    options = DecodeBenchOptions(**SHAPE, modes=HERE, memory_budget="32MiB", compare_fio=False)
    return plain(run_decode_bench(options))


@pytest.fixture(scope="module")
def limited_runs() -> dict[str, Any]:
    """The stored modes and `memory` with half of the KV left for their cache."""
    options = DecodeBenchOptions(**SHAPE, modes=(*STORED, "memory"), memory_limits=("50%",))
    return plain(run_decode_bench(options))


def plain(result: dict[str, Any]) -> dict[str, Any]:
    """As a reader of the JSON sees it."""
    read: dict[str, Any] = json.loads(json.dumps(result))
    return read


def of_mode(result: dict[str, Any], mode: str) -> dict[str, Any]:
    (run,) = [run for run in result["runs"] if run["mode"] == mode]
    assert run["error"] is None, run["error"]
    return dict(run)


@pytest.mark.parametrize("mode", HERE)
def test_every_mode_runs_without_a_limit(free_runs: dict[str, Any], mode: str) -> None:
    run = of_mode(free_runs, mode)
    assert set(run) >= CONTRACT
    assert run["memory_limit_bytes"] is None
    assert run["oom_killed"] is False
    assert (run["dtype"], run["batch"], run["context"]) == ("bfloat16", 4, 4096)
    assert run["kv_bytes"] == KV_BYTES
    assert len(run["step_seconds"]) == 3
    assert run["step_seconds_p99"] == max(run["step_seconds"])
    assert run["peak_memory_bytes"] > run["base_memory_bytes"] > 0


def test_all_modes_give_the_same_tokens(free_runs: dict[str, Any]) -> None:
    assert free_runs["tokens_agree"] is True
    assert len({run["tokens_sha256"] for run in free_runs["runs"]}) == 1


def test_each_mode_reads_what_it_must_and_no_more(free_runs: dict[str, Any]) -> None:
    for mode in ("memory", "dynamic-cache"):
        run = of_mode(free_runs, mode)
        assert run["device_read_bytes_per_step"] == 0
        assert run["page_cache_hit_fraction"] is None
        assert run["engine"] is None
    direct = of_mode(free_runs, "direct")
    assert direct["device_read_bytes_per_step"] == direct["direct_read_bytes_per_step"] == KV_BYTES
    assert direct["page_cache_hit_fraction"] is None
    for mode in ("page-cache", "mmap"):
        cached = of_mode(free_runs, mode)
        assert cached["device_read_bytes_per_step"] == 0
        assert cached["page_cache_read_bytes_per_step"] == KV_BYTES
        assert cached["page_cache_hit_fraction"] == 1.0
    dual = of_mode(free_runs, "dual")
    assert dual["direct_read_bytes_per_step"] == dual["device_read_bytes_per_step"]
    together = dual["direct_read_bytes_per_step"] + dual["page_cache_read_bytes_per_step"]
    assert together == KV_BYTES


@pytest.mark.parametrize("mode", ["dual", "direct"])
def test_the_budget_holds_at_every_step(free_runs: dict[str, Any], mode: str) -> None:
    run = of_mode(free_runs, mode)
    assert run["budget_bytes"] == 32 * MIB
    assert run["budget_held"] is True
    assert 0 < run["budget_used_bytes_max"] <= 32 * MIB


def test_the_result_says_what_it_was_measured_on(free_runs: dict[str, Any]) -> None:
    assert free_runs["machine"]["kernel"]
    assert free_runs["machine"]["device"]["file_system"]
    assert free_runs["command"]
    assert free_runs["options"]["model"] == MODEL
    assert [entry["mode"] for entry in free_runs["summary"]] == list(HERE)


@needs_cgroup
@pytest.mark.parametrize("mode", STORED)
def test_stored_modes_live_in_half_of_the_memory(limited_runs: dict[str, Any], mode: str) -> None:
    run = of_mode(limited_runs, mode)
    base = limited_runs["calibration"]["base_bytes"]
    assert run["memory_limit"] == "50%"
    assert run["memory_limit_bytes"] == base + KV_BYTES // 2
    assert run["memory_limit_from"] == "loaded"
    assert run["oom_killed"] is False
    assert 0 < run["peak_memory_bytes"] <= run["memory_limit_bytes"]
    if mode != "mmap":  # which asks nobody
        assert run["budget_bytes"] == KV_BYTES // 2
    assert run["tokens_sha256"]


@needs_cgroup
def test_mapped_files_are_read_again_at_every_step(limited_runs: dict[str, Any]) -> None:
    """A cyclic sweep over twice the memory: the kernel's cache has no hits, or nearly none."""
    assert of_mode(limited_runs, "mmap")["device_read_bytes_per_step"] > 0.75 * KV_BYTES


def test_mmap_with_exact_attention_is_bit_equal(tmp_path: Path) -> None:
    """On files that are kept, as a series of runs over one store has them."""
    options = DecodeBenchOptions(
        **SHAPE,
        modes=("mmap", "dynamic-cache", "mmap"),
        attention="exact",
        store=tmp_path / "kv.store",
        engine={"keep_store_blocks": True},
    )
    result = run_decode_bench(options)
    assert result["tokens_agree"] is True
    assert [run["error"] for run in result["runs"]] == [None] * 3
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: tests/integration/test_cuda")
def test_transformers_offload_wants_a_gpu_and_others_go_on() -> None:
    result = run_decode_bench(DecodeBenchOptions(**SHAPE, modes=("offloaded-cache", "memory")))
    refused, done = result["runs"]
    assert "keeps KV out of a GPU's memory, and the model is on the cpu" in refused["error"]
    assert refused["step_seconds"] is None
    assert done["error"] is None


@needs_cgroup
def test_what_does_not_fit_is_killed_and_reported(limited_runs: dict[str, Any]) -> None:
    run = of_mode(limited_runs, "memory")
    assert run["oom_killed"] is True
    assert set(run) >= CONTRACT
    for name in ("step_seconds_median", "step_seconds_p99", "step_seconds", "tokens_sha256"):
        assert run[name] is None
    assert limited_runs["tokens_agree"] is True  # of those that ended


@needs_cgroup
def test_a_limit_below_the_process_kills_it_while_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = {"base_bytes": 300 * MIB, "kv_bytes": KV_BYTES}
    monkeypatch.setattr(decode, "calibrate", lambda *_: measured)
    options = DecodeBenchOptions(**SHAPE, modes=("memory",), memory_limits=("48MiB",))
    (run,) = run_decode_bench(options)["runs"]
    assert run["memory_limit_from"] == "start"
    assert run["memory_limit_bytes"] == 48 * MIB
    assert run["oom_killed"] is True


def test_an_error_of_a_run_is_told_and_stops_nothing() -> None:
    options = DecodeBenchOptions(**SHAPE, modes=("direct", "memory"), memory_budget="64KiB")
    told: list[str] = []
    direct, memory = run_decode_bench(options, Watch(progress=told.append))["runs"]
    assert "budget" in direct["error"]
    assert direct["oom_killed"] is False
    assert direct["step_seconds_median"] is None
    assert memory["error"] is None
    assert "budget" in told[0]
    assert "ms a step" in told[1]


def test_when_no_run_gets_through_it_is_an_error() -> None:
    options = DecodeBenchOptions(**SHAPE, modes=("direct",), memory_budget="64KiB")
    with pytest.raises(DualBladeError, match=r"no run got through: .*budget"):
        run_decode_bench(options)
    unknown = replace(options, model="random:nonesuch")
    with pytest.raises(ConfigError, match="unknown random model 'nonesuch'"):  # before a run
        run_decode_bench(unknown)


@needs_cgroup
def test_a_model_that_cannot_be_loaded_stops_the_calibration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failed = ChildOutcome(result={}, oom_killed=False, error="no model 'nonesuch'")
    monkeypatch.setattr(workload, "run_child", lambda *_: failed)
    options = DecodeBenchOptions(model="nonesuch", memory_limits=("50%",))
    with pytest.raises(DualBladeError, match="nonesuch"):
        run_decode_bench(options)


RUN_FOREVER = """
import sys
from pathlib import Path
from dualblade.bench import decode
from dualblade.bench.child_process import ChildOutcome
from dualblade.bench.decode import DecodeBenchOptions, run_decode_bench
decode.calibrate = lambda *_: {"base_bytes": 1 << 30, "kv_bytes": 64 << 20}
options = DecodeBenchOptions(
    model=sys.argv[1], batch=4, context=4096, steps=10**6, modes=("direct",),
    memory_limits=sys.argv[3:], store=Path(sys.argv[2]), memory_budget="32MiB",
)
try:
    run_decode_bench(options)
except KeyboardInterrupt:
    sys.exit(130)
"""


def test_ctrl_c_leaves_no_child_no_cgroup_and_no_store(tmp_path: Path) -> None:
    limit = "1.0" if REASON is None else "none"
    store = tmp_path / "kv.store"
    command = [sys.executable, "-c", RUN_FOREVER, MODEL, str(store), limit]
    with subprocess.Popen(command, start_new_session=True) as parent:
        deadline = time.monotonic() + 120
        while not store.exists() and parent.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert store.exists(), "the run did not start"
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        assert len(children) == 1
        os.kill(parent.pid, signal.SIGINT)
        assert parent.wait(timeout=60) == 130
    assert not Path(f"/proc/{children[0]}").exists()
    assert list(tmp_path.iterdir()) == []
    group = _find_parent(enable=True)[0]
    assert group is None or not list(group.directory.glob(f"dualblade-{parent.pid}-*"))
