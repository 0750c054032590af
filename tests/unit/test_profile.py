"""Profiles of devices: measured once, found again by the device, and used by plans."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from dualblade import DualBladeCache
from dualblade.bench.doors import TuneOptions, measure_doors
from dualblade.cli.app import app
from dualblade.config import EngineConfig
from dualblade.config import Path as KVPath
from dualblade.errors import ConfigError, NotAStore, StorageError
from dualblade.hf.models import config_of, load_model
from dualblade.hf.plan import PlanRequest, plan_cache
from dualblade.hf.speeds import (
    FIRST_USE_BYTES,
    door_speeds,
    known_profile,
    measure_at_first_use,
    reads_in_place,
)
from dualblade.host.process import process_io
from dualblade.host.profile import (
    ComputeSpeeds,
    DeviceProfile,
    device_identity,
    load_profile,
    profiles_file,
    save_profile,
)
from dualblade.io import open_engine
from dualblade.metrics import TransferTotals
from dualblade.residency.speeds import worth_caching
from dualblade.store import Store
from dualblade.store.backing import cache_directory
from dualblade.store.formatting import carry_out_format, plan_format
from dualblade.store.in_place import DoorCounters
from dualblade.store.inspect import inspect_store
from dualblade.store.measure import SWEEP_BYTES
from dualblade.units import GIB, MIB
from tests.devices import contents, loop_device, needs_root

TINY = "random:llama?layers=4,hidden=64,heads=4,kv_heads=2"


def profile_of(path: Path) -> DeviceProfile:
    return DeviceProfile(
        device=device_identity(path),
        engine="io_uring",
        measured_at="2026-01-01T00:00:00+00:00",
        direct_bytes_per_s=1.0 * GIB,
        cache_hit_bytes_per_s=8.0 * GIB,
        cache_miss_bytes_per_s=0.8 * GIB,
        memory_copy_bytes_per_s=8.0 * GIB,
    )


@pytest.fixture
def doors_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tuning that does not measure how fast this processor computes, which takes seconds."""
    monkeypatch.setattr("dualblade.bench.doors.measure_compute", lambda _repeats: {})
    monkeypatch.setattr("dualblade.bench.doors._copy_rate", lambda _repeats: 8.0 * GIB)


def test_a_profile_is_found_by_its_device(tmp_path: Path) -> None:
    assert load_profile(tmp_path) is None
    profile = profile_of(tmp_path)
    save_profile(replace(profile, device="another drive"))
    assert load_profile(tmp_path) is None
    save_profile(profile)
    assert load_profile(tmp_path / "a store that is not there yet") == profile
    assert len(json.loads(profiles_file().read_text())) == 2


def test_profiles_that_cannot_be_used_are_left_out(tmp_path: Path) -> None:
    profile = profile_of(tmp_path)
    file = save_profile(profile)
    for wrong in ({"direct_bytes_per_s": 0}, {"cache_hit_bytes_per_s": "fast"}):
        file.write_text(json.dumps({profile.device: {**asdict(profile), **wrong}}))
        assert load_profile(tmp_path) is None
    for text in ("not JSON", "[]", json.dumps({profile.device: {}})):
        file.write_text(text)
        assert load_profile(tmp_path) is None
    assert load_profile(tmp_path / "no" / "such" / "folder") is None


@pytest.mark.usefixtures("doors_alone")
def test_tune_measures_both_doors_and_leaves_nothing(tmp_path: Path) -> None:
    profile = measure_doors(TuneOptions(places=(tmp_path,), size_bytes=16 * MIB, repeats=1))
    assert profile.device == device_identity(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError):
        TuneOptions(places=(tmp_path,), size_bytes=0)
    places = (tmp_path,) * 3
    assert TuneOptions(places=places).size_bytes == 264 * MIB, "whole sweeps of all three"


@needs_root
@pytest.mark.usefixtures("doors_alone")
def test_tune_measures_a_formatted_device_itself(tmp_path: Path) -> None:
    """Not the file system of /dev. One that is not ours keeps every byte; a store in use, too."""
    (tmp_path / "image").write_bytes(b"precious" * (64 * MIB // 8))
    with loop_device(tmp_path / "image", 64 * MIB) as device:
        options = TuneOptions(places=(Path(device),), size_bytes=16 * MIB, repeats=1)
        with pytest.raises(NotAStore):
            measure_doors(options)
        assert contents(device) == b"precious" * (64 * MIB // 8)
        Path(device).write_bytes(bytes(64 * MIB))
        carry_out_format(plan_format(device))
        profile = measure_doors(options)
        assert profile.device == device_identity(device)
        assert "block device" in profile.device
        assert profile.device != device_identity("/dev")
        save_profile(profile)
        assert load_profile(device) == profile
        report = inspect_store(device)
        assert report.problem is None
        assert all(c.superblock and not c.superblock.in_use for c in report.copies)
        with open_engine() as engine, Store.open(device, engine), pytest.raises(NotAStore):
            measure_doors(options)


def test_first_use_measures_once_and_costs_the_kv_nothing(tmp_path: Path) -> None:
    """32 MiB written, seven times that read, none of it counted as KV; `tune` wins over it."""
    store = tmp_path / "kv.store"
    with open_engine() as engine, Store.open(store, engine) as opened:
        before = process_io()
        profile = measure_at_first_use(store, opened, engine)
        engine.drain()
        after = process_io()
        assert profile is not None
        assert profile.quick
        assert load_profile(store) == profile
        assert opened.counters == DoorCounters()
        assert opened.used_bytes == opened.page_cache_bytes() == 0
        assert SWEEP_BYTES <= after.write_bytes - before.write_bytes <= FIRST_USE_BYTES + MIB
        assert after.read_bytes - before.read_bytes <= 5 * FIRST_USE_BYTES + MIB  # and 2 of hits
    save_profile(profile_of(store))
    assert load_profile(store) == profile_of(store)


@pytest.mark.parametrize("count", [3, 5])
def test_first_use_of_a_striped_store_of_any_count(tmp_path: Path, count: int) -> None:
    """Of three a sweep is 24 MiB, of five 40: neither is a part of 32."""
    places = [tmp_path / f"{index}.store" for index in range(count)]
    with open_engine() as engine, Store.open(places, engine) as opened:
        profile = measure_at_first_use(places, opened, engine)
        engine.drain()
    assert profile is not None
    assert load_profile(*places) == profile


@pytest.mark.usefixtures("doors_alone")
def test_tune_measures_three_folders_by_its_default(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
    profile = measure_doors(TuneOptions(places=folders, repeats=1))
    assert profile.device == device_identity(*folders)
    assert [list(folder.iterdir()) for folder in folders] == [[], [], []]


def test_caches_measure_only_when_the_plan_has_something_to_gain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    monkeypatch.setattr("dualblade.hf.opening.FIRST_USE_KV_BYTES_MIN", 8 * MIB)
    monkeypatch.setattr(
        "dualblade.hf.opening.measure_at_first_use",
        lambda *given: asked.append(given) or measure_at_first_use(*given),
    )
    model = load_model(TINY, dtype=torch.float32, device="cpu").model
    quiet: list[dict[str, Any]] = [
        {"path": "direct"},
        {"path": "page-cache"},
        {"max_tokens": 512},
        {"memory_budget": 7 * MIB},
        {"config": EngineConfig(cache_percent=50)},
    ]
    for options in quiet:
        given = {"memory_budget": 64 * MIB, **options}
        with DualBladeCache.for_model(model, store=tmp_path / "kv.store", **given) as cache:
            assert cache.stats().speeds is None
    assert asked == []
    for _ in range(2):  # the second time it is known
        with DualBladeCache.for_model(
            model, store=tmp_path / "kv.store", memory_budget=64 * MIB
        ) as one:
            stats = one.stats()
        assert stats.speeds is not None
        assert stats.speeds.measured_by == "first use"
        assert stats.io == TransferTotals()
    assert len(asked) == 1


def test_a_first_use_that_does_not_work_out_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        open_engine() as engine,
        Store.open(tmp_path / "kv.store", engine, capacity_bytes=16 * MIB) as store,
    ):
        assert measure_at_first_use(tmp_path / "kv.store", store, engine) is None  # no room
        assert store.used_bytes == 0
    with open_engine() as engine, Store.open(tmp_path / "kv.store", engine) as store:
        monkeypatch.setattr(Store, "cached_bytes", lambda *_: MIB)  # pages went as they came
        assert measure_at_first_use(tmp_path / "kv.store", store, engine) is None
        assert store.counters == DoorCounters()
    assert load_profile(tmp_path / "kv.store") is None


def test_a_folder_that_is_not_there_is_not_taken_for_its_parent(tmp_path: Path) -> None:
    """A drive that is not mounted: its profile would be another drive's."""
    told = CliRunner().invoke(app, ["tune", str(tmp_path / "nvme"), "--size", "16MiB"])
    assert told.exit_code == 2
    assert f"there is no {tmp_path / 'nvme'}" in told.stderr
    assert list(tmp_path.iterdir()) == []
    assert load_profile(tmp_path) is None


def test_the_tune_command_saves_what_plan_then_uses(tmp_path: Path) -> None:
    runner = CliRunner()
    plan = ["plan", "-m", TINY, "--context", "4096", "--memory-budget", "8MiB", "--json"]
    before = json.loads(runner.invoke(app, [*plan, "--store", str(tmp_path / "kv.store")]).stdout)
    assert before["step"] is None
    tuned = runner.invoke(app, ["tune", str(tmp_path), "--size", "16MiB", "--json"])
    assert tuned.exit_code == 0, tuned.output
    assert json.loads(tuned.stdout)["direct_bytes_per_s"] > 0
    for compute in json.loads(tuned.stdout)["compute"].values():
        assert compute["layer_seconds"] > 0
    after = json.loads(runner.invoke(app, [*plan, "--store", str(tmp_path / "kv.store")]).stdout)
    assert after["step"]["seconds"] > 0
    half, twice = after["other_memory"]
    assert half["factor"] == 0.5
    assert "error" in half or half["direct_bytes"] >= twice["direct_bytes"]
    assert twice["step"]["seconds"] <= after["step"]["seconds"]
    assert after["step"]["compute_seconds"] > 0
    faster = after["faster_drive"]
    assert faster["step"]["drive_seconds"] <= after["step"]["drive_seconds"]
    assert faster["step"]["compute_seconds"] == after["step"]["compute_seconds"]
    shown = runner.invoke(app, [*plan[:-1], "--store", str(tmp_path / "kv.store")]).stdout
    assert "a step: " in shown
    assert "with a drive twice as fast" in shown
    on_a_gpu = runner.invoke(
        app, [*plan, "--store", str(tmp_path / "kv.store"), "--device", "cuda"]
    )
    assert json.loads(on_a_gpu.stdout)["step"]["compute_seconds"] == 0


@pytest.mark.usefixtures("doors_alone")
def test_tune_without_a_place_measures_the_drive_of_private_stores() -> None:
    tuned = CliRunner().invoke(app, ["tune", "--size", "16MiB", "--json"])
    assert tuned.exit_code == 0, tuned.output
    found = load_profile(cache_directory())
    assert found is not None
    assert found.device == json.loads(tuned.stdout)["device"]
    assert list(cache_directory().iterdir()) == []


@pytest.mark.usefixtures("doors_alone")
def test_what_tune_found_is_told_even_where_it_cannot_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config").write_text("no folder")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    told = CliRunner().invoke(app, ["tune", str(tmp_path), "--size", "16MiB", "--json"])
    assert told.exit_code == 1
    assert "cannot save the profile" in told.stderr
    result = json.loads(told.stdout)
    assert result["profile_file"] is None
    assert result["direct_bytes_per_s"] > 0


def test_computing_a_token_is_bytes_and_layers() -> None:
    speeds = ComputeSpeeds(
        weights_bytes_per_s=10 * GIB, tiles_bytes_per_s=20 * GIB, exact_bytes_per_s=5 * GIB
    )
    assert speeds.seconds(GIB, GIB, layers=30, over_tiles=True) == pytest.approx(0.15)
    assert speeds.seconds(GIB, GIB, layers=30, over_tiles=False) == pytest.approx(0.3)
    slow = replace(speeds, layer_seconds=0.001)
    assert slow.seconds(GIB, GIB, layers=30, over_tiles=True) == pytest.approx(0.18)


def test_hits_are_copies_where_the_kernel_cannot_bring_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before Linux 5.14 nothing is read in place, and the plan knows."""
    assert reads_in_place(EngineConfig(), "cpu", tmp_path)
    monkeypatch.setattr("dualblade.host.mapped._MADV_POPULATE_READ", 9999)
    assert not reads_in_place(EngineConfig(), "cpu", tmp_path)


@pytest.mark.parametrize("direct_gib_per_s", [0.1, 3.0, 12.0])
def test_in_place_all_that_fits_is_cached(tmp_path: Path, direct_gib_per_s: float) -> None:
    """No drive takes a part that the model's thread has at hand; copies leave one to it."""
    profile = replace(profile_of(tmp_path), direct_bytes_per_s=direct_gib_per_s * GIB)
    assert worth_caching(GIB, GIB, door_speeds(profile, in_place=True)).cache_bytes == GIB
    copied = worth_caching(GIB, GIB, door_speeds(profile, in_place=False)).cache_bytes
    assert (copied < GIB) == (direct_gib_per_s > 1)


def test_a_measured_device_gives_plan_and_cache_the_same_units(tmp_path: Path) -> None:
    """Copies out of the page cache gain nothing over this drive: both leave the memory alone and
    say so."""
    copied = EngineConfig(in_place=False)
    profile = replace(profile_of(tmp_path), cache_hit_bytes_per_s=1.0 * GIB)
    save_profile(profile)
    store = tmp_path / "kv.store"
    request = PlanRequest(
        tokens=512,
        batch=1,
        item_bytes=4,
        budget_bytes=8 * MIB,
        path=KVPath.DUAL,
        engine=copied,
        speeds=door_speeds(known_profile(store), in_place=reads_in_place(copied, "cpu", store)),
    )
    plan = plan_cache(config_of(TINY), request)
    model = load_model(TINY, dtype=torch.float32, device="cpu").model
    with DualBladeCache.for_model(
        model, store=store, memory_budget=8 * MIB, max_tokens=512, config=copied
    ) as cache:
        with torch.inference_mode():
            model(torch.ones(1, 512, dtype=torch.long), cache=cache)
        assert cache.stats().plan == plan.placements
    assert {unit.path for unit in plan.placements} == {"direct"}
    assert "as fast as" in plan.placements[0].reason


def test_without_a_home_nothing_is_made_of_its_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A uid that the machine does not know, and no HOME: '~' stands for nothing."""
    monkeypatch.chdir(tmp_path)
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert load_profile(tmp_path) is None
    with pytest.raises(StorageError, match="no home directory"):
        cache_directory()
    assert list(tmp_path.iterdir()) == []
