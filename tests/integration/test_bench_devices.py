"""Benchmarks with their KV on a device: nothing of theirs is put beside its node, into memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from dualblade.bench import paper
from dualblade.bench.decode import DecodeBenchOptions, run_decode_bench
from dualblade.bench.prefill import PrefillBenchOptions
from dualblade.bench.scenario import read_scenario
from dualblade.bench.series import Watch, require_fio
from dualblade.bench.workload import store_place
from dualblade.errors import ConfigError, StorageError, Unsupported
from dualblade.host import throttle
from dualblade.host.machine import machine_facts
from dualblade.store.formatting import carry_out_format, plan_format
from dualblade.units import MIB
from tests.devices import loop_device, needs_root

NODE = Path("/dev/null")
"""Stands for a device in what is refused before one is opened."""

HELD = """
title = "T"
about = "A"
minutes = 1
device_bytes_per_second = "1GiB"
[[runs]]
name = "one"
benchmark = "decode"
model = "random:llama"
modes = ["direct"]
compare_fio = true
"""


@pytest.mark.parametrize("kind", [DecodeBenchOptions, PrefillBenchOptions])
def test_mapped_files_are_refused_on_a_device(kind: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"mode mmap\+pipeline=serial maps files, and /dev/null is"
    ):
        kind(model="random:llama", modes=("direct", "mmap+pipeline=serial"), store=NODE)


def test_fio_is_refused_beside_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fio").write_text("#!/bin/sh\n")
    (tmp_path / "fio").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    require_fio(None)
    with pytest.raises(Unsupported, match="fio reads a file beside the store, and /dev/null is"):
        require_fio(NODE)


def test_a_scenario_on_a_device_goes_without_fio(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(HELD)
    lines: list[str] = []
    scenario = read_scenario(tmp_path / "mine.toml").on(NODE)
    assert not paper._without_fio(scenario, lines.append).entries[0].options.compare_fio
    assert "how much of the drive was used is left out" in lines[0]


def test_a_namespace_cannot_be_throttled(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(HELD)
    scenario = read_scenario(tmp_path / "mine.toml").on(NODE)
    with pytest.raises(Unsupported, match="commands to /dev/null go past the block layer"):
        paper._require_throttle(scenario, tmp_path)


def test_a_device_that_is_missing_is_told() -> None:
    with pytest.raises(StorageError, match="cannot examine /dev/nonesuch"):
        store_place(Path("/dev/nonesuch"))


@needs_root
def test_facts_and_throttle_are_of_the_device_itself(tmp_path: Path) -> None:
    with loop_device(tmp_path / "image", 64 * MIB) as device:
        place = store_place(Path(device))
        facts = machine_facts(place)["device"]
        assert facts["file_system"] == "none (block device)"
        assert facts["queue"]["name"] == Path(device).name
        assert throttle._device_number(place) == (
            Path(f"/sys/class/block/{Path(device).name}/dev").read_text().strip()
        )


@needs_root
def test_a_run_on_a_device_leaves_nothing_in_dev(tmp_path: Path) -> None:
    with loop_device(tmp_path / "image", 128 * MIB) as device:
        carry_out_format(plan_format(device))
        before = set(os.listdir("/dev"))
        options = DecodeBenchOptions(
            model="random:llama?layers=2,hidden=64,heads=1,kv_heads=1,intermediate=64,vocab=64",
            modes=("direct",),
            context=512,
            steps=2,
            store=Path(device),
        )
        result = run_decode_bench(options, Watch(log_path=tmp_path / "log.jsonl"))
        assert [run["error"] for run in result["runs"]] == [None]
        assert result["machine"]["device"]["path"] == device
        assert set(os.listdir("/dev")) == before
