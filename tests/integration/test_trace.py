"""A trace of real steps: every read, every piece attended to, in the order that they happened."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dualblade import DualBladeCache, EngineConfig, Unsupported
from dualblade.units import KIB
from tests.integration.tiny_models import tiny_model
from tests.stepping import take_turn

LAYERS, CONTEXT = 3, 2000


def rows(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.randn(2, 1, 2, tokens, 16, generator=torch.Generator().manual_seed(tokens))
    return made[0], made[1]


def step(cache: DualBladeCache) -> None:
    for layer in range(LAYERS):
        take_turn(cache, *rows(1), layer)


def spans(path: Path, lane: str) -> list[dict[str, Any]]:
    """(start, end, args) of a lane as dictionaries, in order of their starts."""
    events = json.loads(path.read_text())["traceEvents"]
    found = [e for e in events if e.get("cat") == lane]
    ends = {e["id"]: e["ts"] for e in found if e["ph"] == "e"}
    return [
        {
            **e["args"],
            "start": e["ts"],
            "end": ends[e["id"]] if e["ph"] == "b" else e["ts"] + e["dur"],
        }
        for e in found
        if e["ph"] in "bX"
    ]


def test_a_step_in_the_trace(tmp_path: Path) -> None:
    config = EngineConfig(staging_bytes=512 * KIB, trace_events=10_000)
    options: dict[str, Any] = {"memory_budget": "16MiB", "path": "direct", "attention": "tiles"}
    with DualBladeCache.for_model(tiny_model(), config=config, **options) as cache:
        for layer in range(LAYERS):
            cache.append(*rows(CONTEXT), layer)
        step(cache)
        before = cache.stats()
        step(cache)
        after = cache.stats()
        read = after.io.direct_read_bytes - before.io.direct_read_bytes
        assert cache.write_trace(tmp_path / "trace.json") > 0
    reads, computed = (
        spans(tmp_path / "trace.json", "reads"),
        spans(tmp_path / "trace.json", "compute"),
    )
    attended = [span for span in computed if span["what"] in ("keys", "values")]
    assert sum(span["bytes"] for span in attended) == 2 * after.stored_bytes == 2 * read
    # Each piece is attended to after it landed, and reads go on while others are attended to.
    assert [(r["layer"], r["bytes"]) for r in reads] == [(a["layer"], a["bytes"]) for a in attended]
    assert all(r["end"] <= a["start"] for r, a in zip(reads, attended, strict=True))
    assert any(r["start"] < a["end"] and r["layer"] > a["layer"] for r in reads for a in attended)
    assert {span["what"] for span in computed} == {"keys", "values", "newest rows", "model"}
    assert {s["what"] for s in spans(tmp_path / "trace.json", "writes")} == {
        "keys, direct",
        "values, direct",
    }
    stages = after.stages
    assert 0 < stages.reads_seconds <= stages.wall_seconds
    assert 0 < stages.compute_seconds <= stages.wall_seconds
    assert stages.direct_bytes == after.io.direct_read_bytes + after.io.direct_write_bytes


def test_where_nothing_is_kept_a_trace_is_refused(tmp_path: Path) -> None:
    with DualBladeCache.for_model(tiny_model(), memory_budget="16MiB") as cache:
        step(cache)
        with pytest.raises(Unsupported, match=r"no spans are kept\n.*trace_events"):
            cache.write_trace(tmp_path / "none.json")
    with (
        DualBladeCache.for_model(tiny_model(), path="memory", attention="exact") as cache,
        pytest.raises(Unsupported, match="nothing is traced"),
    ):
        cache.write_trace(tmp_path / "none.json")


def test_generate_writes_a_trace(tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "dualblade", "generate", "-m"),
        *("random:llama?layers=2,hidden=128,heads=4,vocab=300,positions=4096", "-p", "words " * 60),
        *("--max-new-tokens", "4", "--path", "direct", "--memory-budget", "16MiB", "--stats"),
        *("--dtype", "float32", "--trace", str(tmp_path / "trace.json")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "spans in" in done.stderr
    assert "stages at a time" in done.stderr
    assert len(spans(tmp_path / "trace.json", "reads")) >= 2 * 2 * 3
