"""What `plan` says beside which unit goes where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from dualblade.cli.app import app
from dualblade.hf.footprint import footprint
from dualblade.hf.models import config_of
from dualblade.host.memory import MemoryReading
from dualblade.units import GIB, MIB

TINY = "random:llama?layers=3,hidden=64,heads=4,kv_heads=2,vocab=300,positions=600"
LLAMA = "random:llama-3.1-8b"


def plan(*arguments: str, model: str = TINY, context: str = "512") -> Result:
    words = ["plan", "-m", model, "--context", context, *arguments]
    return CliRunner().invoke(app, words, prog_name="dualblade")


def facts(*arguments: str, **named: str) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(plan(*arguments, "--json", **named).stdout)
    return told


def words(*arguments: str, **named: str) -> str:
    return " ".join(plan(*arguments, **named).stdout.split())


def there(monkeypatch: pytest.MonkeyPatch, size_bytes: int) -> None:
    reading = MemoryReading(
        available_bytes=size_bytes, source="a test", machine_available_bytes=size_bytes, limits=()
    )
    monkeypatch.setattr("dualblade.host.memory.available_memory", lambda: reading)


def test_a_context_past_the_positions_is_told() -> None:
    past = "past the model's 600 positions: generate refuses this"
    assert past in words("--memory-budget", "8MiB", context="601")
    assert past not in words("--memory-budget", "8MiB", context="600")
    assert facts("--memory-budget", "8MiB")["positions_max"] == 600


def test_the_shape_of_the_examples_has_the_positions_that_they_ask_for() -> None:
    assert config_of(LLAMA).max_position_embeddings == 131072
    told = words("--memory-budget", "2GiB", model=LLAMA, context="128k")
    assert "positions" not in told


def test_weights_activations_and_budget_are_held_against_the_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    needed = footprint(config_of(TINY), torch.bfloat16, rows=512, staging_bytes=0)
    asked = ["--memory-budget", "8MiB", "--device", "cpu"]
    told = facts(*asked)
    assert told["weights_bytes"] == needed.weights_bytes
    assert told["activation_bytes"] == needed.activation_bytes
    whole = needed.weights_bytes + needed.activation_bytes + 8 * MIB
    there(monkeypatch, whole)
    assert "budget 8.00 MiB; this machine has" in words(*asked)
    assert "(a test): it fits" in words(*asked)
    there(monkeypatch, whole - 1)
    assert "(a test): does not fit" in words(*asked)
    assert facts(*asked)["memory_available_bytes"] == whole - 1


def test_path_memory_says_whether_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["--path", "memory", "--device", "cpu"]
    there(monkeypatch, 20 * GIB)
    assert "KV in memory 4.00 GiB; this machine has 20.0 GiB (a test): it fits" in words(
        *asked, model=LLAMA, context="32k"
    )
    told = words(*asked, model=LLAMA, context="128k")
    assert "KV in memory 16.0 GiB; this machine has 20.0 GiB (a test): does not fit" in told
    assert "budget" not in told
    assert facts(*asked)["store_bytes"] == 0


def test_the_store_is_held_against_the_drive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["--memory-budget", "2GiB", "--store", str(tmp_path)]
    told = facts(*asked, model=LLAMA, context="32k")
    assert told["store_bytes"] == 4 * GIB
    assert told["store_free_bytes"] > 0
    monkeypatch.setattr("dualblade.cli.store_place.store_room", lambda _: 3 * GIB)
    line = f"the store takes 4.00 GiB; 3.00 GiB free at {tmp_path}: too little"
    assert line.replace(" ", "") in words(*asked, model=LLAMA, context="32k").replace(" ", "")


def test_members_on_one_file_system_share_its_room(tmp_path: Path) -> None:
    from dualblade.cli.store_place import store_room

    one, two = tmp_path / "a.store", tmp_path / "b.store"
    assert store_room([one, two]) == pytest.approx(store_room([one]), rel=0.1)


def test_the_page_cache_path_says_what_can_stay() -> None:
    told = words("--memory-budget", "2GiB", "--path", "page-cache", model=LLAMA, context="32k")
    assert "through the page cache at each step: 4.00 GiB, of which 1.8" in told
    assert "directly" not in told
    small = words("--memory-budget", "64MiB", "--path", "page-cache")
    assert "a warm step reads nothing from the drive" in small


def test_the_buffer_has_the_name_of_what_is_in_it() -> None:
    for attention, name in (("tiles", "group buffer"), ("exact", "gather buffer")):
        asked = ["--memory-budget", "8MiB", "--attention", attention]
        assert name in words(*asked)


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("/dev/nvme99n1", "cannot examine /dev/nvme99n1: No such file or directory"),
        ("/etc/hostname", "is not a dualblade store"),
        ("/proc/cpuinfo", "/proc/cpuinfo"),
        ("/nope/kv.store", "the store's directory /nope does not exist"),
    ],
)
def test_a_store_that_cannot_be_is_refused_as_generate_does(place: str, said: str) -> None:
    planned = plan("--memory-budget", "8MiB", "--store", place)
    assert planned.exit_code == 1
    assert said in planned.stderr
    generate = ["generate", "-m", TINY, "-p", "x", "--store", place]
    made = CliRunner().invoke(app, generate, prog_name="dualblade")
    errors = [r.stderr[r.stderr.index("error: ") :] for r in (planned, made)]
    assert errors[0] == errors[1]


def test_looking_makes_nothing(tmp_path: Path) -> None:
    assert facts("--memory-budget", "8MiB", "--store", str(tmp_path / "kv.store"))[
        "store_free_bytes"
    ]
    assert list(tmp_path.iterdir()) == []


def test_the_device_is_generates(monkeypatch: pytest.MonkeyPatch) -> None:
    assert facts("--memory-budget", "8MiB")["device"] == "cpu"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("dualblade.hf.plan.shares_host_memory", lambda _: False)
    assert facts("--memory-budget", "8MiB")["device"] == "cuda"


def test_what_does_nothing_is_no_option() -> None:
    result = plan("--memory-budget", "8MiB", "--queue-depth", "4")
    assert result.exit_code == 2
    assert "--queue-depth" in result.stderr


def test_what_auto_gives_fits_beside_a_prompt_with_large_activations() -> None:
    told = facts("--batch", "64", context="2k")
    taken = told["weights_bytes"] + told["activation_bytes"] + told["budget_bytes"]
    assert taken <= told["memory_available_bytes"]
    assert ": it fits" in words("--batch", "64", context="2k")
