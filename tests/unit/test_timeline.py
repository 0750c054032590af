"""Busy times are unions, stalls add up, and a trace is what Perfetto reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dualblade.metrics import PipelineStages
from dualblade.pipeline import timeline as timeline_module
from dualblade.pipeline.timeline import Lane, Timeline


def test_what_overlaps_in_a_lane_counts_once() -> None:
    timeline = Timeline()
    for start, end in ((100, 300), (200, 400), (250, 260), (500, 600)):
        timeline.span(Lane.READS, "keys", start, end)
    timeline.span(Lane.COMPUTE, "keys", 200, 500)
    timeline.span(Lane.CONTROL, "take in", 600, 700, idle_ns=40)
    stages = timeline.stages()
    assert stages.reads_seconds == pytest.approx(400e-9)
    assert stages.compute_seconds == pytest.approx(300e-9)
    assert stages.control_seconds == pytest.approx(60e-9)


def test_the_model_computes_between_two_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1_000, 2_000, 5_000, 6_000, 50_000, 51_000])
    monkeypatch.setattr(timeline_module, "now_ns", lambda: next(clock))
    timeline = Timeline()
    timeline.enter()  # at 1000
    timeline.leave()  # at 2000
    timeline.enter()  # at 5000: 3000 of the model
    timeline.enter()  # is inside
    timeline.leave()  # at 6000
    timeline.pause()
    assert timeline.stages().wall_seconds == pytest.approx(5e-6)
    timeline.enter()  # another prompt: nobody computed
    timeline.leave()
    assert timeline.stages().compute_seconds == pytest.approx(3e-6)
    assert timeline.stages().wall_seconds == pytest.approx(6e-6)
    timeline.pause()
    timeline.pause()
    assert timeline.stages().wall_seconds == pytest.approx(6e-6)


def test_overlap_and_utilisation() -> None:
    stages = PipelineStages(
        wall_seconds=2.0,
        reads_seconds=2.0,
        compute_seconds=1.0,
        direct_bytes=3_000,
        profile_bytes_per_second=2_000.0,
    )
    assert stages.overlap_efficiency == pytest.approx(1.5)
    assert stages.direct_utilisation == pytest.approx(0.75)
    assert PipelineStages().overlap_efficiency is None
    assert PipelineStages(wall_seconds=1.0).direct_utilisation is None
    # All through the page cache: the drive may be busy, but that is not known here.
    unknown = PipelineStages(wall_seconds=1.0, profile_bytes_per_second=2_000.0)
    assert unknown.direct_utilisation is None


def test_a_trace_has_a_lane_per_stage_and_the_newest_spans(tmp_path: Path) -> None:
    timeline = Timeline(events_max=3)
    timeline.span(Lane.COMPUTE, "forgotten", 0, 1)
    timeline.span(Lane.COMPUTE, "keys", 3_000, 4_000, layer=2, size_bytes=64)
    timeline.span(Lane.READS, "keys, direct", 1_000, 3_000, layer=2, size_bytes=64)
    timeline.span(Lane.READS, "values, direct", 2_000, 5_000, layer=2, size_bytes=64)
    assert timeline.write_trace(tmp_path / "trace.json") == 3
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    lanes = {e["args"]["name"] for e in events if e.get("name") == "thread_name"}
    assert lanes == {"reads", "copies", "compute", "writes", "control"}
    computed = [e for e in events if e["ph"] == "X"]
    assert [(e["name"], e["ts"], e["dur"], e["args"]["layer"]) for e in computed] == [
        ("keys", 2.0, 1.0, 2)
    ]
    began = {e["id"]: e for e in events if e["ph"] == "b"}
    ended = {e["id"]: e for e in events if e["ph"] == "e"}
    assert began.keys() == ended.keys()
    assert sorted((began[i]["ts"], ended[i]["ts"]) for i in began) == [(0.0, 2.0), (1.0, 4.0)]
