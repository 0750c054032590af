"""The commands on a striped store: made, looked at, used, refused and wiped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from dualblade.cli.app import app
from dualblade.units import MIB
from tests.devices import contents, loop_device, needs_root

TINY = "random:llama?layers=2,hidden=64,heads=4,kv_heads=2,vocab=128"


def invoke(*words: object, typed: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], input=typed)


def told(*words: object) -> Any:
    result = invoke(*words, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return [tmp_path / "kv.a", tmp_path / "kv.b"]


def test_files_from_format_to_wipe(files: list[Path]) -> None:
    assert told("store", "format", *files)["done"]
    report = told("store", "inspect", *files)
    assert report["is_store"]
    assert [m["superblocks"][0]["member"]["index"] for m in report["members"]] == [0, 1]
    assert "together: all members of one store" in invoke("store", "inspect", *files).stdout
    assert told("store", "verify", *files)["read_all"]
    assert invoke("store", "verify", *files).stdout.endswith(f"{files[0]} + {files[1]}: is whole\n")
    assert "member 2 of 2" in invoke("store", "inspect", files[1]).stdout
    facts = told("doctor", *files)
    assert facts["members_problem"] is None
    assert [member["store"]["member"] for member in facts["members"]] == [
        "member 1 of 2",
        "member 2 of 2",
    ]
    assert told("store", "wipe", *files, "--yes")["how"] == "removed"
    assert not any(file.exists() for file in files)


def test_generate_takes_several_stores(files: list[Path]) -> None:
    """The text is that of memory; a member alone is refused."""
    common = ["generate", "-m", TINY, "-p", "x" * 200, "--max-new-tokens", 8]
    expected = told(*common, "--path", "memory")["tokens_sha256"]
    stores = ["--store", files[0], "--store", files[1], "--disk-capacity-bytes", "64MiB"]
    result = told(*common, *stores, "--path", "direct", "--memory-budget", "64MiB")
    assert result["tokens_sha256"] == expected
    assert result["cache"]["store_path"] == f"{files[0]} + {files[1]}"
    assert result["cache"]["engine"]["queue_depth"] == 16
    alone = invoke(*common, "--store", files[0], "--path", "direct")
    assert alone.exit_code == 1
    assert "is member 1 of 2 of a striped store" in alone.output
    assert "name all 2 members" in alone.output


def test_verify_says_what_is_wrong_together(files: list[Path], tmp_path: Path) -> None:
    invoke("store", "format", *files)
    invoke("store", "format", tmp_path / "kv.c")
    result = invoke("store", "verify", files[0], tmp_path / "kv.c")
    assert result.exit_code == 1
    assert "is a whole store, no member of a striped one" in result.output
    assert "name it alone" in result.output
    facts = told("doctor", files[0], tmp_path / "kv.c")
    assert "is a whole store" in facts["members_problem"]


@pytest.mark.parametrize("options", [(), ("--superblocks-only",)])
def test_one_member_is_no_whole_store(files: list[Path], options: tuple[str, ...]) -> None:
    invoke("store", "format", *files)
    result = invoke("store", "verify", files[1], *options)
    assert result.exit_code == 1
    assert "is whole" not in result.output
    assert "is member 2 of 2 of a striped store; name all 2 members" in result.output
    shown = invoke("store", "verify", files[1], "--json", *options).stdout
    facts = json.loads(shown[: shown.rindex("}") + 1])
    assert (facts["is_store"], facts["read_all"]) == (False, False)
    assert not told("store", "inspect", files[1])["is_store"]
    assert told("store", "inspect", *files)["is_store"]


@needs_root
def test_devices_are_confirmed_all_together(tmp_path: Path) -> None:
    """One wrong word, and neither is written."""
    with (
        loop_device(tmp_path / "a", 24 * MIB, 512) as first,
        loop_device(tmp_path / "b", 24 * MIB, 4096) as second,
    ):
        result = invoke("store", "format", first, second, typed=f"{first} nonsense\n")
        assert result.exit_code == 2
        assert f"type exactly {first} {second}" in result.output
        assert not any(contents(first))
        dry = told("store", "format", first, second, "--dry-run")
        assert (dry["capacity_bytes"], dry["done"]) == (40 * MIB, False)
        assert not any(contents(first))
        result = invoke("store", "format", first, second, typed=f"{first} {second}\n")
        assert f"{first} + {second}: formatted (40.0 MiB for KV)" in result.stdout
        assert invoke("store", "format", first, second, "--yes").exit_code == 1
        assert told("store", "verify", second, first)["read_all"]
        wiped = invoke("store", "wipe", second, "--yes")
        assert "member 2 of 2: discarded" in wiped.stdout
        assert invoke("store", "verify", first, second).exit_code == 1
