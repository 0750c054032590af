"""What is refused is refused before a model's weights are read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from dualblade.cli.app import app
from dualblade.errors import DualBladeError
from dualblade.hf.models import config_of, text_of

TINY = "random:llama?layers=3,hidden=64,heads=4,kv_heads=2,vocab=300,positions=600"


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), prog_name="dualblade")


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("dualblade.hf.models.load_model", refuse)


REFUSED = [
    (["-p", "x" * 700], 2, "700 tokens; random:llama"),
    (["-p", "x", "--max-new-tokens", "600"], 2, "--max-new-tokens 599"),
    (["-p", "x", "--system", "y"], 2, "no chat template"),
    (["-p", "x", "--device", "gpu"], 2, "unknown device"),
    (["-p", "x", "--dtype", "int8"], 2, "unknown dtype"),
    (["-p", "x", "--store", "/nope/kv"], 1, "the store's directory /nope does not exist"),
    (["-p", "x", "--store", "/etc/hostname"], 1, "not a dualblade store"),
    (["-p", "x", "--store", "/proc/cpuinfo"], 1, "error: "),
    (["-p", "x", "--store", "/dev/nvme99n1"], 1, "cannot examine /dev/nvme99n1"),
    (["-p", "x", "--io-engine", "uring-cmd"], 1, "needs a store on an NVMe namespace"),
    (["-p", "x", "--memory-budget", "1MiB"], 1, "give it at least"),
    (["-p", "x", "--trace", "/tmp"], 2, "/tmp is a folder"),
    (["-p", "x" * 500, "--attention", "exact", "--memory-budget", "2300KiB"], 1, "gather buffer"),
]


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(("arguments", "status", "said"), REFUSED, ids=lambda v: str(v)[:50])
def test_it_is_told_first(arguments: list[str], status: int, said: str) -> None:
    result = invoke("generate", "-m", TINY, *arguments)
    assert said in " ".join(result.stderr.replace("│", "").split())
    assert result.exit_code == status
    assert result.stdout == ""


@pytest.mark.usefixtures("no_weights")
def test_a_store_in_use_is_told_first(tmp_path: Path) -> None:
    from dualblade.io import open_engine
    from dualblade.store import Store

    place = tmp_path / "kv.store"
    with open_engine() as engine, Store.open(place, engine):
        result = invoke("generate", "-m", TINY, "-p", "x", "--store", str(place))
    assert "in use by another" in result.stderr


@pytest.mark.usefixtures("no_weights")
def test_looking_leaves_nothing(tmp_path: Path) -> None:
    """A file that was not there is not there after a refusal; one that was is as it was."""
    place = tmp_path / "kv.store"
    command = ["generate", "-m", TINY, "-p", "x", "--memory-budget", "1MiB", "--store", str(place)]
    assert "give it at least" in invoke(*command).stderr
    assert list(tmp_path.iterdir()) == []
    from dualblade.io import open_engine
    from dualblade.store import Store

    with open_engine() as engine, Store.open(place, engine):
        pass
    before = place.read_bytes()
    assert "give it at least" in invoke(*command).stderr
    assert place.read_bytes() == before


def test_quantised_weights_are_not_counted_as_if_they_were_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = config_of(TINY)
    config.quantization_config = {"quant_method": "bitsandbytes"}
    text = replace(text_of(TINY), config=config)
    monkeypatch.setattr("dualblade.cli.before_loading.text_of", lambda *_, **__: text)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("its weights were counted")

    class Loaded(DualBladeError):
        pass

    def load(*_: object, **__: object) -> None:
        raise Loaded("loaded")

    monkeypatch.setattr("dualblade.cli.before_loading.footprint", refuse)
    monkeypatch.setattr("dualblade.hf.models.load_model", load)
    assert "error: loaded" in invoke("generate", "-m", TINY, "-p", "x").stderr
