"""Profiles of devices: measured once, found again by the device, and used by plans."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from dualblade import DualBladeCache
from dualblade.bench.doors import TuneOptions, measure_doors
from dualblade.cli.app import app
from dualblade.config import EngineConfig
from dualblade.config import Path as KVPath
from dualblade.errors import ConfigError
from dualblade.hf.models import config_of, load_model
from dualblade.hf.plan import PlanRequest, plan_cache
from dualblade.hf.speeds import door_speeds
from dualblade.host.profile import (
    DeviceProfile,
    device_identity,
    load_profile,
    profiles_file,
    save_profile,
)
from dualblade.units import GIB, MIB

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


def test_tune_measures_both_doors_and_leaves_nothing(tmp_path: Path) -> None:
    profile = measure_doors(TuneOptions(folders=[tmp_path], size_bytes=16 * MIB, repeats=1))
    assert profile.device == device_identity(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError):
        TuneOptions(folders=[tmp_path], size_bytes=MIB)


def test_the_tune_command_saves_what_plan_then_uses(tmp_path: Path) -> None:
    runner = CliRunner()
    plan = ["plan", "-m", TINY, "--context", "4096", "--memory-budget", "8MiB", "--json"]
    before = json.loads(runner.invoke(app, [*plan, "--store", str(tmp_path / "kv")]).stdout)
    assert before["step"] is None
    tuned = runner.invoke(app, ["tune", str(tmp_path), "--size", "16MiB", "--json"])
    assert tuned.exit_code == 0, tuned.output
    assert json.loads(tuned.stdout)["direct_bytes_per_s"] > 0
    after = json.loads(runner.invoke(app, [*plan, "--store", str(tmp_path / "kv")]).stdout)
    assert after["step"]["seconds"] > 0
    half, twice = after["other_memory"]
    assert half["factor"] == 0.5
    assert "error" in half or half["direct_bytes"] >= twice["direct_bytes"]
    assert twice["step"]["seconds"] <= after["step"]["seconds"]


def test_a_measured_device_gives_plan_and_cache_the_same_units(tmp_path: Path) -> None:
    """The page cache gains nothing over this drive: both leave the memory alone and say so."""
    profile = replace(profile_of(tmp_path), cache_hit_bytes_per_s=1.0 * GIB)
    save_profile(profile)
    store = tmp_path / "kv.store"
    request = PlanRequest(
        tokens=512,
        batch=1,
        item_bytes=4,
        budget_bytes=8 * MIB,
        path=KVPath.DUAL,
        engine=EngineConfig(),
        speeds=door_speeds(store),
    )
    plan = plan_cache(config_of(TINY), request)
    model = load_model(TINY, dtype=torch.float32, device="cpu").model
    with DualBladeCache.for_model(
        model, store=store, memory_budget=8 * MIB, max_tokens=512
    ) as cache:
        with torch.inference_mode():
            model(torch.ones(1, 512, dtype=torch.long), past_key_values=cache)
        assert cache.stats().plan == plan.placements
    assert {unit.path for unit in plan.placements} == {"direct"}
    assert "as fast as" in plan.placements[0].reason
