"""The command line in process: options, exit statuses, what is told, the plan."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from transformers import GptOssConfig
from typer.testing import CliRunner, Result

from dualblade import DualBladeCache, EngineConfig
from dualblade.cli import generation, output
from dualblade.cli.app import app
from dualblade.cli.demo_run import QUESTION, demo_prompt
from dualblade.cli.generate import _prompt_text
from dualblade.cli.generation import Generation, PrefillProgress, TokenStream, check_length
from dualblade.config import Path as KVPath
from dualblade.errors import BudgetError, ConfigError
from dualblade.hf.footprint import footprint, skeleton, weights_per_token
from dualblade.hf.models import LoadedModel, config_of, load_model
from dualblade.hf.plan import PlanRequest, gathers_on_host, plan_cache
from dualblade.host.memory import MemoryReading
from dualblade.io import open_engine
from dualblade.store import Store
from dualblade.units import GIB, MIB

TINY = "random:llama?layers=3,hidden=64,heads=4,kv_heads=2,vocab=300,positions=600"
HEAVY = "random:llama?layers=1,hidden=1024,heads=8,kv_heads=2,intermediate=4096,vocab=300"


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), prog_name="dualblade")


def test_help_imports_nothing_heavy() -> None:
    """--help must come in well under 0.3 s: torch alone takes two."""
    code = (
        "import sys; from dualblade.cli.app import app\n"
        "try: app(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'rich.console'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def commands(group: Any, name: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """All that can be called, by their words."""
    for word, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*name, word))
        else:
            yield (*name, word)


COMMANDS = list(commands(typer.main.get_command(app)))


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help(command: tuple[str, ...]) -> None:
    result = invoke(*command, "--help")
    assert result.exit_code == 0
    assert "Usage:" in result.stdout
    assert "Examples:" in result.stdout
    assert "--json" in result.stdout


@pytest.mark.parametrize("group", ["bench", "store"])
def test_a_group_tells_of_its_commands(group: str) -> None:
    result = invoke(group, "--help")
    assert result.exit_code == 0
    names = [command[1] for command in COMMANDS if command[0] == group]
    assert len(names) > 3
    assert all(name in result.stdout for name in names)


@pytest.mark.parametrize("name", ["--store", "--offload-dir"])
def test_the_store_has_two_names(name: str, tmp_path: Path) -> None:
    missing = tmp_path / "no" / "kv.store"
    result = invoke("generate", "-m", TINY, "-p", "hello", name, str(missing))
    assert result.exit_code == 1
    assert str(missing.parent) in result.stderr


@pytest.mark.parametrize("bench", ["decode", "prefill", "envelope", "paper"])
def test_a_benchmark_of_several_stores_is_refused(bench: str, tmp_path: Path) -> None:
    """Not run on the last of them."""
    stores = [part for name in "ab" for part in ("--store", str(tmp_path / name))]
    needed = {"decode": ["-m", TINY], "prefill": ["-m", TINY]}.get(
        bench, ["--output", str(tmp_path / "out")]
    )
    modes = ["--mode", "direct"] if bench in ("decode", "prefill") else []
    result = invoke("bench", bench, *needed, *modes, *stores)
    assert result.exit_code == 2
    assert "--store more than once" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_fixed_split_is_planned_as_asked() -> None:
    arguments = ["plan", "-m", TINY, "--context", "512", "--memory-budget", "8MiB", "--json"]
    for percent, cached in ((0, 0), (34, 2), (100, 6)):
        told = json.loads(invoke(*arguments, "--cache-percent", str(percent)).stdout)
        assert told["cache_percent"] == percent
        assert [unit["path"] for unit in told["units"]].count("page-cache") == cached


def test_a_plan_leaves_room_for_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `auto` says before they are loaded is not what the cache will have."""
    there, reserve = 1 << 30, 64 << 20
    reading = MemoryReading(
        available_bytes=there + reserve,
        reserve_bytes=reserve,
        source="a test",
        machine_available_bytes=there + reserve,
        limits=(),
    )
    monkeypatch.setattr("dualblade.host.memory.available_memory", lambda: reading)
    spec = "random:llama?layers=4,hidden=1024,heads=8,vocab=1000"
    config = config_of(spec)
    needed = footprint(config, torch.bfloat16, rows=512, staging_bytes=0)
    weights = needed.weights_bytes
    assert needed.activation_bytes < reserve
    arguments = ["plan", "-m", spec, "--context", "512", "--device", "cpu", "--json"]
    assert json.loads(invoke(*arguments).stdout)["budget_bytes"] == there - weights
    on_gpu = ["cuda" if word == "cpu" else word for word in arguments]
    assert json.loads(invoke(*on_gpu).stdout)["budget_bytes"] == there
    told = json.loads(invoke(*arguments, "--memory-budget", "64MiB").stdout)
    assert told["budget_bytes"] == 64 << 20
    full = replace(reading, available_bytes=weights + reserve)
    monkeypatch.setattr("dualblade.host.memory.available_memory", lambda: full)
    refused = invoke(*arguments)
    assert refused.exit_code == 1
    assert "the weights alone take" in refused.stderr
    assert "--memory-budget" in refused.stderr


def test_version() -> None:
    assert invoke("--version").stdout.startswith("dualblade ")


USAGE_ERRORS = [
    (["generate", "-p", "x"], "--model"),
    (["generate", "-m", TINY], "no prompt is given"),
    (["generate", "-m", TINY, "--prompt-file", "/nope"], "cannot read the prompt"),
    (["generate", "-m", TINY, "-p", ""], "the prompt is empty"),
    (["generate", "-m", TINY, "-p", " \n "], "the prompt is empty"),
    (["generate", "-m", TINY, "--prompt-file", "/dev/null"], "the text of /dev/null is empty"),
    (["generate", "-m", TINY, "--prompt-file", "/dev/null", "-p", "Who?"], "of /dev/null is empty"),
    (["generate", "-m", "random:lama", "-p", "x"], "did you mean 'llama'?"),
    (["generate", "-m", TINY, "-p", "x", "--path", "fast"], "dual, page-cache, direct, memory"),
    (["generate", "-m", TINY, "-p", "x", "--memory-budget", "lots"], "not a size"),
    (["generate", "-m", TINY, "-p", "x", "--attention", "tiled"], "unknown attention"),
    (["generate", "-m", TINY, "-p", "x", "--io-engine", "aio"], "unknown io_engine"),
    (["generate", "-m", TINY, "-p", "x", "--queue-depth", "0"], "queue_depth must be"),
    (["generate", "-m", TINY, "-p", "x", "--cache-percent", "101"], "--cache-percent"),
    (
        ["generate", "-m", TINY, "-p", "x", "--cache-percent", "5", "--path", "direct"],
        "splits the dual path",
    ),
    (
        ["plan", "-m", TINY, "--context", "9", "--cache-percent", "5", "--path", "memory"],
        "splits the dual path",
    ),
    (["generate", "-m", TINY, "-p", "x", "--dtype", "int8"], "unknown dtype"),
    (["generate", "-m", TINY, "-p", "x", "--device", "gpu"], "unknown device"),
    (["generate", "-m", TINY, "-p", "x", "--system", "y"], "no chat template"),
    (["generate", "-m", TINY, "-p", "x" * 700], "700 tokens; random:llama"),
    (["generate", "-m", TINY, "-p", "x", "--max-new-tokens", "600"], "--max-new-tokens 599"),
    (["plan", "-m", TINY], "--context"),
    (["plan", "-m", TINY, "--context", "many"], "4096 or 32k"),
    (["plan", "-m", TINY, "--context", "0"], "4096 or 32k"),
    (["plan", "-m", TINY, "--context", "10", "--device", "tpu"], "use cpu or cuda"),
    (["plan", "-m", "./nowhere", "--context", "10"], "no model at ./nowhere"),
    (["bench", "decode", "-m", TINY, "--mode", "mapped"], "unknown mode"),
    (["bench", "decode", "-m", TINY, "--mode", "dual", "--memory-limit", "x"], "memory limit"),
    (["generate", "-m", TINY, "-p", "x", "--checksums", "some"], "off, sample, all"),
    (["generate", "-m", TINY, "-p", "x", "--engine", "staging=1"], "unknown setting 'staging'"),
    (["generate", "-m", TINY, "-p", "x", "--engine", "lookahead"], "write it like"),
    (["bench", "decode", "-m", TINY, "--mode", "direct", "--engine", "checksums"], "checksums=all"),
    (
        ["bench", "decode", "-m", TINY, "--mode", "direct", "--engine", "cheksums=all"],
        "'checksums'",
    ),
    (["bench", "decode", "-m", TINY, "--mode", "static-101"], "unknown mode"),
    (["bench", "decode", "-m", TINY, "--output", "/tmp"], "/tmp is a folder"),
    (["bench", "envelope", "--output", "/tmp"], "/tmp is a folder"),
    (["bench", "io", "--store", "x", "--seed", "-1"], "--seed"),
    (["generate", "-m", "~nobody-of-this-name/x", "-p", "x"], "cannot be looked into"),
    (["plan", "-m", TINY, "--context", "9", "--path", "memory", "--memory-budget", "x"], "a size"),
    (["bench", "envelope", "--output", "x", "--figure", "x.gif"], "a .svg or .png file"),
    (["bench", "envelope", "--output", "x", "--memory-limit", "none"], "under limits"),
    (["bench", "io", "--store", "x", "--size", "1KiB"], "not whole chunks"),
    (["demo", "--dtype", "int8"], "unknown dtype"),
    (["demo", "--io-engine", "uring-cmd"], "the demo's stores are private files"),
    (["frobnicate"], "No such command"),
]


@pytest.mark.parametrize(("arguments", "said"), USAGE_ERRORS, ids=lambda value: str(value)[:60])
def test_bad_usage_ends_with_2(arguments: list[str], said: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


FAILURES = [
    (["generate", "-m", "org/name", "-p", "x"], "no model hub can be reached"),
    (["generate", "-m", TINY, "-p", "x", "--memory-budget", "1MiB"], "give it at least"),
    (["generate", "-m", TINY, "-p", "x", "--store", "/nope/kv"], "does not exist"),
    (["generate", "-m", TINY, "-p", "x", "--store", "/etc/hostname"], "not a dualblade store"),
    (["plan", "-m", TINY, "--context", "600", "--memory-budget", "2MiB"], "give it at least"),
    (["store", "format", "/nope/kv", "--dry-run"], "the store's directory /nope does not exist"),
]


@pytest.mark.parametrize(("arguments", "said"), FAILURES, ids=lambda value: str(value)[:60])
def test_failed_work_ends_with_1(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dualblade.hf.models._hub_reachable", lambda: False)
    result = invoke(*arguments)
    assert result.exit_code == 1
    error = result.stderr[result.stderr.index("error: ") :]
    assert said in error
    assert len(error.strip().splitlines()) <= 2
    assert result.stdout == ""


def test_a_prompt_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "prompt").write_bytes(b"abc\xff")
    result = invoke("generate", "-m", TINY, "--prompt-file", str(tmp_path / "prompt"))
    assert result.exit_code == 2
    assert "not UTF-8 text (byte 3)" in result.stderr


def test_a_mark_at_the_beginning_of_a_file_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "notepad.txt").write_bytes("\ufeffabc".encode())
    assert _prompt_text(None, str(tmp_path / "notepad.txt")) == "abc"


def test_a_question_about_a_file_comes_after_it(tmp_path: Path) -> None:
    text = tmp_path / "book.txt"
    text.write_text("A long story.\n\n\n")
    assert _prompt_text("Who did it?", str(text)) == "A long story.\n\nWho did it?"
    assert _prompt_text(None, str(text)) == "A long story.\n\n\n", "alone as it is"
    both = ["-p", "Who?", "--prompt-file", str(text), "--max-new-tokens", "1", "--path", "memory"]
    result = invoke("generate", "-m", TINY, *both, "--json")
    assert json.loads(result.stdout)["prompt_tokens"] == len("A long story.\n\nWho?")


def test_an_answer_that_was_cut_off_is_told() -> None:
    """Where nobody said how long it may be; a stand-in never ends by itself."""
    command = ["generate", "-m", TINY, "--path", "memory", "--json"]
    whole = invoke(*command, "-p", "x")
    assert json.loads(whole.stdout)["ended"] == "limit"
    assert "stopped at 256 tokens: --max-new-tokens takes more" in whole.stderr
    asked = invoke(*command, "-p", "x", "--max-new-tokens", "3")
    assert json.loads(asked.stdout)["ended"] == "limit"
    assert "stopped at" not in asked.stderr
    full = invoke(*command, "-p", "x" * 590)
    assert "stopped at 10 tokens, where the model's positions end" in full.stderr


def test_text_for_a_terminal_has_nothing_that_it_obeys() -> None:
    hostile = "a\tb\n\x1b]52;c;cm0=\x07\x9b2J\r"
    assert output.without_controls(hostile) == "a\tb\n\ufffd]52;c;cm0=\ufffd\ufffd2J\ufffd"
    assert output.without_controls("é 漢 🙂") == "é 漢 🙂"


@pytest.mark.parametrize("child", ["bench.child_process", "cli.demo_process"])
def test_children_take_no_module_from_where_they_are_started(child: str, tmp_path: Path) -> None:
    """It may be a folder of others, who would be root then; or have a json.py of one's own."""
    (tmp_path / "json.py").write_text("raise SystemExit('taken from here')\n")
    command = importlib.import_module(f"dualblade.{child}")._COMMAND
    done = subprocess.run(
        command, cwd=tmp_path, input="", capture_output=True, text=True, check=False, timeout=120
    )
    assert "taken from here" not in done.stderr


def test_all_options_that_a_path_does_not_heed_are_told() -> None:
    given = ["--checksums", "all", "--memory-budget", "64MiB", "--engine", "in_place=false"]
    heeded = ["--engine", "tile_tokens=16", "--max-new-tokens", "1"]
    command = ["generate", "-m", TINY, "-p", "x", *given, *heeded]
    told = invoke(*command, "--path", "memory").stderr
    for option in ("--checksums", "--memory-budget", "--engine in_place"):
        assert f"{option} has no effect on path memory" in told
    assert "tile_tokens" not in told
    assert "has no effect" not in invoke(*command, "--path", "direct").stderr


def test_settings_without_an_option_reach_the_cache() -> None:
    command = ["generate", "-m", TINY, "-p", "x", "--max-new-tokens", "1", "--memory-budget", "64M"]
    settings = ["--engine", "staging_bytes=6MiB", "--engine", "checksums=off"]
    cache = json.loads(invoke(*command, *settings, "--json").stdout)["cache"]
    assert cache["memory"]["staging_bytes"] == 6 * MIB
    assert cache["checksums"]["mode"] == "off"


def test_a_traceback_only_with_debug() -> None:
    failing = ["generate", "-m", "random:lama", "-p", "x"]
    assert "Traceback" not in invoke(*failing).stderr
    told = invoke(*failing, "--debug")
    assert told.exit_code == 2
    assert "Traceback" in told.stderr


def test_a_bug_is_told_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise ZeroDivisionError("a\nlong story")

    monkeypatch.setattr("dualblade.cli.checks.machine", broken)
    result = invoke("doctor")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ZeroDivisionError: a long story\nthis is unexpected")


def test_plan_in_words_and_json() -> None:
    arguments = ["plan", "-m", "random:llama-3-8b", "--context", "128k"]
    words = invoke(*arguments, "--memory-budget", "4GiB")
    assert words.exit_code == 0
    assert "KV 16.0 GiB, budget 4.00 GiB" in words.stdout
    plan = json.loads(invoke(*arguments, "--memory-budget", "4GiB", "--json").stdout)
    assert plan["kv_bytes"] == 32 * 2 * 8 * 128 * 2 * 131072
    assert len(plan["units"]) == 64
    assert plan["bytes_by_path"]["direct"] + plan["bytes_by_path"]["page-cache"] == 16 << 30
    assert plan["shares"]["page_cache_bytes"] <= 4 << 30
    assert all(unit["reason"] for unit in plan["units"])


def test_a_plan_takes_the_way_into_attention_that_the_model_will(tmp_path: Path) -> None:
    """transformers loads this family with attention code of its own, which `auto` leaves alone."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_local_experts": 2, "vocab_size": 100}
    GptOssConfig(**sizes, intermediate_size=64).save_pretrained(tmp_path)
    arguments = ["plan", "-m", str(tmp_path), "--context", "512", "--memory-budget", "8MiB"]
    on_cpu = [*arguments, "--device", "cpu", "--dtype", "float32", "--json"]
    assert json.loads(invoke(*on_cpu).stdout)["attention"] == "exact"
    assert json.loads(invoke(*on_cpu, "--attention", "tiles").stdout)["attention"] == "tiles"


def test_plan_names_what_stays_in_memory() -> None:
    arguments = ["plan", "-m", "random:gemma3?layers=6,window=64,hidden=64,heads=4"]
    result = invoke(*arguments, "--context", "1000", "--memory-budget", "64MiB")
    assert "sliding_attention stays in memory" in result.stdout
    memory = invoke(*arguments, "--context", "1000", "--path", "memory", "--json")
    assert json.loads(memory.stdout)["bytes_by_path"]["direct"] == 0


@pytest.mark.parametrize(
    ("name", "budget", "path", "attention"),
    [
        *(
            (TINY, 8 * MIB, *way)
            for way in product(["dual", "direct", "page-cache"], ["exact", "tiles"])
        ),
        (TINY, 64 * MIB, "dual", "tiles"),  # staging is larger for the drive
        (TINY, 96 * MIB, "dual", "tiles"),  # but no larger where all fits
        (HEAVY, 1024 * MIB, "dual", "tiles"),  # and for its weights
    ],
)
def test_the_plan_is_what_a_cache_does(name: str, budget: int, path: str, attention: Any) -> None:
    """From the configuration alone: the same units, paths, bytes and shares as a running cache."""
    tokens, batch = 512, 2
    config = config_of(name)
    plan = plan_cache(
        config,
        PlanRequest(
            tokens=tokens,
            batch=batch,
            item_bytes=4,
            budget_bytes=budget,
            path=KVPath.parse(path),
            engine=EngineConfig(),
            over_tiles=attention == "tiles",
            weights_bytes=weights_per_token(skeleton(config, torch.float32)),
        ),
    )
    model = load_model(name, dtype=torch.float32, device="cpu").model
    with DualBladeCache.for_model(
        model, memory_budget=budget, path=path, max_tokens=tokens, attention=attention
    ) as cache:
        with torch.inference_mode():
            model(torch.ones(batch, tokens, dtype=torch.long), cache=cache)
        stats = cache.stats()
    assert plan.placements == stats.plan
    assert plan.kv_bytes == stats.kv_bytes
    assert plan.shares is not None
    for name in ("staging_bytes", "gather_bytes", "tail_bytes", "table_bytes"):
        assert getattr(plan.shares, name) == getattr(stats.memory, name), name
    least = {8 * MIB: 2 * MIB, 64 * MIB: 16 * MIB, 96 * MIB: 32 * MIB, 1024 * MIB: 65 * MIB}[budget]
    assert plan.shares.staging_bytes >= least


def test_layers_are_numbered_as_the_model_numbers_them() -> None:
    """Where some have windows, too: those are in memory, and count all the same."""
    name = "random:gemma3?layers=7,hidden=64,heads=2,kv_heads=1,vocab=500,positions=8192"
    model = load_model(name, dtype=torch.float32, device="cpu").model
    full = [n for n, kind in enumerate(model.config.layer_types) if kind == "full_attention"]
    assert full == [5]
    with DualBladeCache.for_model(model, memory_budget="16MiB", path="direct") as cache:
        with torch.inference_mode():
            model(torch.ones(1, 40, dtype=torch.long), cache=cache)
        assert [placed.layer for placed in cache.stats().plan] == [5, 5]


def test_sequences_that_are_multiplied_in_turn_take_staging(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While their products go on the drive does; in the plan as in the cache."""
    monkeypatch.setattr("dualblade.hf.cache.rows_in_turn", lambda _: 7)
    model = load_model(HEAVY, dtype=torch.float32, device="cpu").model
    staging = {}
    for batch in (1, 3, 12):
        request = PlanRequest(
            tokens=128,
            batch=batch,
            item_bytes=4,
            budget_bytes=2 * GIB,
            path=KVPath.DIRECT,
            engine=EngineConfig(),
            over_tiles=True,
            weights_bytes=weights_per_token(skeleton(model.config, torch.float32)),
            rows_in_turn=7,
        )
        with DualBladeCache.for_model(
            model, memory_budget=2 * GIB, path="direct", attention="tiles", max_tokens=128
        ) as cache:
            with torch.inference_mode():
                model(torch.ones(batch, 128, dtype=torch.long), cache=cache)
            staging[batch] = cache.stats().memory.staging_bytes
        shares = plan_cache(model.config, request).shares
        assert shares is not None
        assert shares.staging_bytes == staging[batch]
    layer_bytes = request.weights_bytes // model.config.num_hidden_layers
    for batch, turns in ((1, 1), (3, 3), (12, 7)):
        more = staging[batch] - 64 * MIB
        assert turns * layer_bytes // 6 <= more + 4 * MIB, "whole slots"
        assert more <= turns * layer_bytes // 6 + 2 * MIB, "whole huge pages"


def test_buffers_of_a_gpu_without_memory_of_its_own_are_planned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A Jetson plans for itself as its cache does; for another machine the GPU has its own."""
    monkeypatch.setattr("dualblade.hf.plan.shares_host_memory", lambda _: True)
    for is_here in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda is_here=is_here: is_here)
        assert gathers_on_host("cuda") is is_here
        assert gathers_on_host("cpu")


def test_a_plan_that_does_not_fit() -> None:
    request = PlanRequest(
        tokens=600,
        batch=1,
        item_bytes=4,
        budget_bytes=MIB,
        path=KVPath.DUAL,
        engine=EngineConfig(),
    )
    with pytest.raises(BudgetError) as caught:
        plan_cache(config_of(TINY), request)
    assert caught.value.needed_bytes > MIB


def test_doctor_tells_what_is_there(tmp_path: Path) -> None:
    result = invoke("doctor", str(tmp_path), "--json")
    assert result.exit_code == 0
    facts = json.loads(result.stdout)
    assert facts["memory"]["available_bytes"] > 0
    assert facts["engine"]["engine"] in ("io_uring", "posix")
    assert facts["store"]["kind"] == "directory"
    words = invoke("doctor", str(tmp_path))
    assert "I/O engine" in words.stdout
    assert list(tmp_path.iterdir()) == []


def test_doctor_reads_a_store_and_leaves_it(tmp_path: Path) -> None:
    place = tmp_path / "kv.store"
    assert json.loads(invoke("doctor", str(place), "--json").stdout)["store"]["kind"] == "missing"
    assert not place.exists()
    model = load_model(TINY, device="cpu").model
    with DualBladeCache.for_model(model, store=place, memory_budget=8 * MIB, path="page-cache"):
        open_now = json.loads(invoke("doctor", str(place), "--json").stdout)["store"]
        assert open_now["in_use_now"] is True
    before = place.read_bytes()
    closed = json.loads(invoke("doctor", str(place), "--json").stdout)["store"]
    assert closed["in_use_now"] is False
    assert closed["store"]["closed_cleanly"] is True
    assert place.read_bytes() == before
    place.write_bytes(b"something else")
    foreign = json.loads(invoke("doctor", str(place), "--json").stdout)["store"]
    assert "not a dualblade store" in foreign["store_problem"]


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("/dev/nvme99n1", "No such file or directory"),
        ("/etc/hostname", "is not a dualblade store"),
        ("/proc/cpuinfo", "is not a dualblade store"),
        ("/dev/null", "no NVMe namespace"),
    ],
)
def test_doctor_marks_what_will_be_refused(place: str, said: str) -> None:
    rows = [line.split(maxsplit=2) for line in invoke("doctor", place).stdout.splitlines()]
    (row,) = [row for row in rows if row[1:2] == ["store"]]
    assert row[0] == "!"
    assert said in " ".join(invoke("doctor", place).stdout.split())


def test_doctor_of_a_place_that_cannot_be_looked_at_tells_the_rest(tmp_path: Path) -> None:
    result = invoke("doctor", "/nope/at/all", str(tmp_path / "kv.store"))
    assert result.exit_code == 1
    rows = [line.split(maxsplit=2) for line in result.stdout.splitlines()]
    assert ["ok", "kernel"] in [row[:2] for row in rows]
    stores = [(row[0], row[2].strip()) for row in rows if row[1:2] == ["store"]]
    assert stores[0] == ("!", "cannot examine /nope/at/all: No such file or directory")
    assert stores[1][0] == "ok"
    facts = json.loads(invoke("doctor", "/nope/at/all", "--json").stdout)
    assert "cannot examine" in facts["store"]["error"]
    assert facts["machine"]["kernel"]


def test_doctor_marks_a_member_that_is_named_alone(tmp_path: Path) -> None:
    places = [tmp_path / "a.store", tmp_path / "b.store"]
    with open_engine() as engine, Store.open(places, engine):
        pass
    both = invoke("doctor", *map(str, places))
    assert "members of one striped store" in both.stdout
    alone = invoke("doctor", str(places[0])).stdout
    assert "refused:" in alone
    (row,) = [line.split()[0] for line in alone.splitlines() if line.split()[1:2] == ["store"]]
    assert row == "!"


def test_doctor_says_why_not_direct() -> None:
    if not Path("/dev/shm").is_dir():
        pytest.skip("no /dev/shm to look at")
    result = invoke("doctor", "/dev/shm")
    assert "tmpfs keeps its files in memory" in result.stdout
    assert "path direct" in result.stdout


def stream_of(pieces: dict[int, bytes]) -> tuple[TokenStream, list[str]]:
    """A stream whose token n is the bytes `pieces[n]`, and what it wrote."""
    written: list[str] = []

    def decode(tokens: list[int]) -> str:
        return b"".join(pieces[token] for token in tokens).decode(errors="replace")

    stream = TokenStream(decode, written.append, lambda: written.append("|"))
    stream.put(torch.tensor([[9, 9]]))
    return stream, written


def test_text_is_written_as_soon_as_it_is_whole() -> None:
    stream, written = stream_of({0: b"caf", 1: b"\xc3", 2: b"\xa9", 3: b"!\n", 4: b"next"})
    for token in range(5):
        stream.put(torch.tensor([token]))
    stream.end()
    assert written == ["|", "caf", "é", "!\n", "next"]
    assert stream.generation.tokens == [0, 1, 2, 3, 4]


def test_lines_keep_their_indentation() -> None:
    """As sentencepiece decodes: one space is taken from where the text begins."""
    pieces = {0: " def", 1: ":\n", 2: "    return", 3: "\n", 4: "\n", 5: "  x"}
    written: list[str] = []
    stream = TokenStream(
        lambda tokens: "".join(pieces[token] for token in tokens).removeprefix(" "),
        written.append,
        lambda: None,
    )
    stream.put(torch.tensor([[9, 9]]))
    for token in pieces:
        stream.put(torch.tensor([token]))
    stream.end()
    assert "".join(written) == "def:\n    return\n\n  x"


def test_an_unfinished_character_is_written_at_the_end() -> None:
    stream, written = stream_of({0: b"a", 1: b"\xc3"})
    stream.put(torch.tensor([0]))
    stream.put(torch.tensor([1]))
    assert written == ["|", "a"]
    stream.end()
    assert "".join(written) == "|a\ufffd"


def test_what_is_done_at_the_first_token_is_no_time_of_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The demo lowers its memory limit there, and looks at what was read so far."""
    now = 10.0
    monkeypatch.setattr(generation.time, "perf_counter", lambda: now)

    def first() -> None:
        nonlocal now
        now += 5.0

    stream = TokenStream(lambda _tokens: "", lambda _text: None, first)
    for value in (torch.tensor([[9, 9]]), *torch.tensor([[1], [2], [3]])):
        now += 1.0
        stream.put(value)
    assert stream.generation.seconds == [2.0, 3.0, 4.0]


def test_times_of_a_generation() -> None:
    assert Generation().prefill_seconds is None
    assert Generation(tokens=[1], seconds=[2.0]).decode_seconds_per_token is None
    three = Generation(tokens=[1, 2, 3], seconds=[2.0, 2.5, 3.0])
    assert (three.prefill_seconds, three.decode_seconds_per_token) == (2.0, 0.5)
    assert three.sha256() != Generation(tokens=[1, 2, 4]).sha256()


def test_prefill_progress_counts_layers_and_goes_away() -> None:
    model = load_model(TINY, device="cpu").model
    told: list[float] = []
    with PrefillProgress(model, 10, 5, told.append), torch.inference_mode():
        for _ in range(2):
            model(torch.ones(1, 5, dtype=torch.long), use_cache=False)
    assert told == pytest.approx([n / 6 for n in range(1, 7)])
    model(torch.ones(1, 5, dtype=torch.long), use_cache=False)
    assert len(told) == 6


def test_room_for_new_tokens() -> None:
    def model_with(positions: int | None) -> LoadedModel:
        return LoadedModel(
            model=None,  # type: ignore[arg-type]
            config=None,  # type: ignore[arg-type]
            tokenizer=None,
            name="m",
            source="s",
            chat=False,
            positions_max=positions,
        )

    assert check_length(model_with(None), 10_000, None) == 256
    assert check_length(model_with(300), 100, None) == 200
    assert check_length(model_with(300), 100, 200) == 200
    with pytest.raises(ConfigError, match="has 300 positions"):
        check_length(model_with(300), 300, None)
    assert check_length(model_with(300), 100, None, candidates=10) == 190
    with pytest.raises(ConfigError, match="beside 10 of prompt lookup") as refused:
        check_length(model_with(300), 100, 195, candidates=10)
    assert "--max-new-tokens 190" in str(refused.value.hint)


def test_the_demo_text_is_long_and_without_its_header() -> None:
    prompt = demo_prompt()
    assert prompt.count(QUESTION) == 2
    assert "We the People" in prompt
    assert "#" not in prompt
    assert len(prompt) > 19_000


def test_progress_in_a_pipe_says_of_what_and_how_long(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "_LINE_EVERY_SECONDS", 0.0)
    with output.Reporter() as reporter:
        reporter.tell("prefill of 700 tokens")
        reporter.fraction(0.5)
    first, second = capsys.readouterr().err.splitlines()
    assert first == "prefill of 700 tokens"
    assert second.startswith("prefill of 700 tokens: 50%, about ")


@pytest.mark.parametrize("path", ["dual", "memory"])
def test_stats_as_text_say_where_the_kv_is(path: str) -> None:
    model = load_model(TINY, dtype=torch.float32, device="cpu").model
    with DualBladeCache.for_model(model, memory_budget="8MiB", path=path) as cache:
        with torch.inference_mode():
            model(torch.ones(1, 300, dtype=torch.long), cache=cache)
        lines = str(cache.stats()).splitlines()
    assert lines[0].startswith(f"path {path}, attention tiles")
    assert lines[1].startswith("300 tokens in each sequence, 225 KiB of KV, ")
    assert len(lines) == (5 if path == "dual" else 2)
    if path == "dual":
        assert all(word in lines[2] for word in ("memory: ", " of 8.00 MiB"))
