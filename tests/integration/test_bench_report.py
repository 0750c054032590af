"""bench report: one page from any mixture of files."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dualblade.bench import report_decode
from dualblade.bench.figures import decode_figure
from dualblade.bench.report import collect, kind_of, write_report
from dualblade.bench.report_decode import ablation_section, decode_section, envelope_section
from dualblade.bench.report_prefill import prefill_section
from dualblade.bench.report_section import model_text
from dualblade.bench.report_tables import flexllmgen_section, striping_section
from dualblade.bench.workload import stolen_text
from dualblade.cli.app import app
from dualblade.errors import ConfigError
from dualblade.units import GIB, MIB
from tests.integration.sample_results import (
    LIMITED,
    MACHINE,
    decode_result,
    envelope_entry,
    envelope_result,
    growing,
    write,
)

ROOT = Path(__file__).resolve().parents[2]


class Balanced(HTMLParser):
    """Counts tags that are open, and what the page would load."""

    VOID = ("meta", "br", "img", "input", "hr", "link")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value or "" for name, value in attrs if name in ("src", "srcset")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """An SVG element that closes itself."""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_committed_results_make_a_page(tmp_path: Path) -> None:
    if not (ROOT / "results").is_dir():
        pytest.skip("installed without the sources")
    output = tmp_path / "page.html"
    done = CliRunner().invoke(
        app, ["bench", "report", str(ROOT / "results"), "--output", str(output), "--json"]
    )
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["skipped"] == []
    text = output.read_text()
    parser = Balanced()
    parser.feed(text)
    assert parser.open == []
    assert parser.loads == []
    assert not re.search(r"url\((?!#)|@import", text)  # one file, from nowhere else
    assert text.count("<section") == len(told["files"])
    files = [path.name for path in (ROOT / "results").glob("*.json")]
    assert all(name in text for name in files)


def test_foreign_broken_and_nested_files(tmp_path: Path) -> None:
    write(tmp_path, "deep/er/decode.json", LIMITED)
    write(tmp_path, "foreign.json", {"name": "somebody's", "version": 1})
    write(tmp_path, "list.json", [1, 2])
    write(tmp_path, "broken.json", "{")
    write(tmp_path, "old.json", {**LIMITED, "options": {}})
    write(tmp_path, "notes.txt", "not looked at")
    page = collect(tmp_path)
    assert [section.file for section in page.sections] == ["deep/er/decode.json"]
    names = [line.split(":")[0] for line in page.skipped]
    assert sorted(names) == ["broken.json", "foreign.json", "list.json", "old.json"]
    done = CliRunner().invoke(
        app, ["bench", "report", str(tmp_path), "--output", str(tmp_path / "page.html")]
    )
    assert done.exit_code == 0
    assert "skipped foreign.json: not a result of ours" in done.stderr
    assert "a &lt;b&gt;processor" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    "strange",
    [
        {"benchmark": "decode"},
        {**LIMITED, "options": None},
        {**LIMITED, "summary": None},
        {**LIMITED, "summary": [{}]},
        {**LIMITED, "summary": [{**LIMITED["summary"][0], "memory_limit": "lots"}]},
        {**decode_result({("direct", None): 0.1}), "options": None},
    ],
)
def test_a_file_that_looks_like_ours_stops_no_other(
    strange: dict[str, Any], tmp_path: Path
) -> None:
    write(tmp_path, "strange.json", strange)
    write(tmp_path, "ours.json", LIMITED)
    page = collect(tmp_path)
    assert [section.file for section in page.sections] == ["ours.json"]
    assert [line.split(":")[0] for line in page.skipped] == ["strange.json"]


@pytest.mark.parametrize(
    ("facts", "told"),
    [
        ({}, "Linux 6.18, torch 2, transformers 5, dualblade 0 at 0123456789ab"),
        ({"device": {"file_system": "ext4", "queue": {"name": "vda"}}}, "6.18, ext4 on vda, torch"),
        (
            {"device": {"file_system": "xfs", "queue": {"name": "sda", "read_ahead_bytes": 4096}}},
            "6.18, xfs on sda, 4 KiB read ahead, torch",
        ),
        ({"device": {"file_system": "overlay", "queue": None}}, "Linux 6.18, overlay, torch 2"),
        ({"device": None, "git": None}, "transformers 5, dualblade 0"),
        ({"git": {"commit": None, "dirty": False}}, "transformers 5, dualblade 0"),
        ({"cpu_model": None}, "2 x an unnamed processor, 24 GiB"),
    ],
)
def test_a_page_tells_the_machine_as_far_as_it_is_known(
    facts: dict[str, Any], told: str, tmp_path: Path
) -> None:
    write(tmp_path, "decode.json", {**LIMITED, "machine": {**MACHINE, **facts}})
    page = write_report(tmp_path, tmp_path / "page.html")
    assert page.skipped == []
    assert told in page.sections[0].machine
    assert told in (tmp_path / "page.html").read_text()


def test_a_machine_that_cannot_be_told_costs_its_own_section(tmp_path: Path) -> None:
    write(tmp_path, "strange.json", {**LIMITED, "machine": {"date": "2026-01-01"}})
    write(tmp_path, "ours.json", LIMITED)
    page = write_report(tmp_path, tmp_path / "page.html")
    assert [section.file for section in page.sections] == ["ours.json"]
    assert page.skipped == ["strange.json: KeyError 'cpu_count'"]


def test_a_section_says_where_another_mode_is_faster() -> None:
    section, cards = decode_section([("x", LIMITED)])
    assert section.notes == ["With 25 %, direct is faster: dual takes 1.25 times as long."]
    assert cards == [("50 %", "less time per step than memory-mapped files, under memory limits")]
    by_mode = {row[0]: row for row in section.rows}
    assert by_mode["memory"][2] == "killed"
    assert by_mode["dual"][2] == "500 (500-500)"
    assert by_mode["dual"][5] == "100 %"  # 100 MiB in half a second of 200 MiB/s
    assert len(section.figures) == 3


def test_mapped_files_may_read_ahead_by_several_sizes() -> None:
    """`dual` is told beside the fastest of them, and their lines differ."""
    times = {"mmap+read_ahead=128KiB": 2.0, "mmap+read_ahead=1MiB": 1.0, "dual": 0.75}
    result = decode_result({(m, at): t for at in ("10%", "25%", "50%") for m, t in times.items()})
    section, cards = decode_section([("x", result)])
    assert cards[0][0] == "25 %"
    lines = decode_figure(result).axes[0].lines
    looks = [(line.get_color(), line.get_linestyle()) for line in lines]
    assert len(set(looks)) == len(times)
    assert looks[0][0] == looks[1][0]
    assert "mmap+read_ahead=1MiB" in {row[0] for row in section.rows}


def test_who_failed_was_not_killed_and_survivors_are_counted() -> None:
    result = decode_result({("dual", "25%"): 0.5, ("mmap", "25%"): None, ("direct", "25%"): None})
    dual, killed, failed = result["runs"]
    failed |= {"oom_killed": False, "error": "no space left"}
    result["runs"] += [{**dual, **failed, "mode": "dual"}, {**killed, "mode": "dual"}, failed]
    section, _ = decode_section([("x", result)])
    assert [row[2] for row in section.rows] == [
        "500 (500-500), 1 of 3 runs",
        "killed",
        "failed",
    ]
    assert section.notes == ["Failed (2 x direct, 1 x dual): no space left"]


def test_stolen_processors_are_told() -> None:
    """Results from before it was measured have no such word."""
    result = decode_result({("dual", "25%"): 0.5, ("direct", "25%"): 0.6})
    dual, direct = result["runs"]
    assert decode_section([("x", result)])[0].notes == []
    dual["stolen_fraction"], direct["stolen_fraction"] = 0.019, 0.0
    assert decode_section([("x", result)])[0].notes == []
    direct["stolen_fraction"] = 0.31
    (note,) = decode_section([("x", result)])[0].notes
    assert "While 1 of 2 runs were timed" in note
    assert "31% at most" in note
    assert stolen_text(dual) == ""
    assert stolen_text(direct) == ", 31% of the processors stolen"


def test_a_prefill_that_failed_was_not_killed() -> None:
    entry: dict[str, Any] = {
        "mode": "dual",
        "store_state": "fresh",
        "memory_limit": None,
        "prefill_seconds": 1.0,
        "prefill_seconds_spread": [1.0, 1.0],
        "prefill_to_memory": None,
        "stall_fraction": 0.1,
        "cpu_seconds": 1.0,
        **dict.fromkeys(("device_written_bytes", "device_read_bytes", "peak_memory_bytes"), MIB),
    }
    run = {**entry, "attention": "tiles", "kv_bytes": GIB, "oom_killed": False, "error": None}
    broken = {**run, "prefill_seconds": None, "error": "no space left"}
    other = {**entry, "mode": "direct", "prefill_seconds": None, "prefill_seconds_spread": None}
    result = {
        **decode_result({}),
        "benchmark": "prefill",
        "summary": [entry, other],
        "runs": [run, broken, {**broken, "mode": "direct"}],
    }
    result["options"]["prefill_chunk"] = 8
    section, _ = prefill_section([("x", result)])
    assert [row[3] for row in section.rows] == ["1.00 (1.00-1.00), 1 of 2 runs", "failed"]
    assert section.notes == ["Failed (1 x dual, 1 x direct): no space left"]


def test_an_envelope_is_within_its_target_only_where_dual_ran() -> None:
    good, failed = envelope_entry("50%"), envelope_entry("25%")
    section, cards = envelope_section([("x", envelope_result(good, reached=True))])
    assert section.notes == ["dual is within 1.05 of the best split at every limit."]
    assert cards[0][0] == "1.00 x"
    killed = envelope_entry("10%", None)
    failed |= {"pairs": 2, "errors": ["no space left"]}
    slow = envelope_entry("75%", 1.5)
    result = envelope_result(good, killed, failed, slow, reached=False)
    section, cards = envelope_section([("x", result)])
    assert section.notes == [
        "At 10 % dual was killed for want of memory: 3 x.",
        "At 10 % dual has no time beside one of the best split.",
        "At 25 % runs failed: no space left",
        "At 75 % the best fixed split is faster: dual takes 1.50 times as long.",
    ]
    assert cards == [], "the worst is not known"
    ratios = [row[4] for row in section.rows]
    assert ratios == [
        "1.00 (1.00-1.00)",
        "-",
        "1.00 (1.00-1.00), 2 of 3 rounds",
        "1.50 (1.50-1.50)",
    ]


def test_stages_of_a_step_add_up() -> None:
    parts = report_decode._stages(LIMITED["runs"][0])
    assert parts is not None
    assert sum(parts.values()) == pytest.approx(500)
    assert (parts["waiting for reads"], parts["model"]) == (pytest.approx(200), pytest.approx(200))


def test_three_limits_are_lines_and_one_mode_over_contexts_is_growth(tmp_path: Path) -> None:
    times = {(mode, f"{part}%"): part / 50 for mode in ("dual", "mmap") for part in (10, 25, 50)}
    write(tmp_path, "lines.json", decode_result(times))
    for context in (1, 2):
        write(tmp_path, f"context-{context}.json", growing(context))
    lines, growth = collect(tmp_path).sections
    assert "under memory limits" in lines.figures[0]
    assert growth.title.startswith("Growing contexts, direct: ")
    assert [row[2] for row in growth.rows] == ["100", "200"], "of the path alone, not of memory"


@pytest.mark.parametrize(
    ("where", "other"),
    [
        ("options", {"attention": "exact"}),
        ("options", {"engine": {"queue_depth": 2}}),
        ("options", {"memory_budget": "64MiB"}),
        ("options", {"store": "/dev/nvme1n1"}),
        ("scenario", {"name": "s", "run": "r", "device_bytes_per_second": 10**9}),
        ("scenario", {"name": "another", "run": "r", "device_bytes_per_second": None}),
        ("machine", {"cpu_model": "another"}),
        ("machine", {"kernel": "6.19"}),
        ("machine", {"git": {"commit": "another", "dirty": False}}),
        ("machine", {"device": {"mount_point": "/mnt", "file_system": "ext4", "queue": None}}),
    ],
)
def test_what_was_measured_otherwise_is_no_part_of_a_series(
    where: str, other: dict[str, Any], tmp_path: Path
) -> None:
    scenario = {"name": "s", "run": "r", "device_bytes_per_second": None}
    for context in (1, 2, 3):
        one = {**growing(context), "scenario": scenario}
        if context == 3:
            one[where] = {**one[where], **other}
        write(tmp_path, f"context-{context}.json", one)
    growth, alone = sorted(collect(tmp_path).sections, key=lambda section: section.file)
    assert growth.file == "context-1.json, context-2.json"
    assert alone.file == "context-3.json"
    assert alone.title.startswith("r: decoding")


def test_one_size_again_and_a_run_under_a_limit_are_no_growth(tmp_path: Path) -> None:
    for name in ("a.json", "b.json"):
        write(tmp_path, name, growing(1))
    for context in (1, 2):
        write(tmp_path, f"limited-{context}.json", growing(context, limit="1GiB"))
    titles = {section.title for section in collect(tmp_path).sections}
    assert len(collect(tmp_path).sections) == 4
    assert titles == {"Decoding m"}


def test_a_peak_that_the_kernel_does_not_keep_is_a_dash(tmp_path: Path) -> None:
    """memory.peak of a cgroup is there since Linux 5.19."""
    for context in (1, 2):
        one = growing(context)
        for entry in [*one["runs"], *one["summary"]]:
            entry["peak_memory_bytes"] = None
        write(tmp_path, f"context-{context}.json", one)
    write(tmp_path, "alone.json", {**one, "options": {**one["options"], "model": "another"}})
    decode, growth = collect(tmp_path).sections
    assert [row[-1] for row in decode.rows] == ["-", "-"]
    assert [row[-1] for row in growth.rows] == ["-", "-"]


def test_a_key_figure_leads_to_its_section(tmp_path: Path) -> None:
    write(tmp_path, "growth.json", decode_result({("direct", None): 0.1}))
    write(tmp_path, "limited.json", LIMITED)
    page = collect(tmp_path)
    (card,) = page.cards
    assert page.sections[card.number - 1].file == "limited.json"
    assert card.title == page.sections[card.number - 1].title


def test_what_cannot_be_reported_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no results"):
        collect(tmp_path)
    with pytest.raises(ConfigError, match="no folder"):
        collect(tmp_path / "nowhere")
    write(tmp_path, "decode.json", LIMITED)
    with pytest.raises(ConfigError, match="cannot write"):
        write_report(tmp_path, tmp_path / "nowhere" / "page.html")
    assert kind_of({"benchmark": "decode", "summary": [1, 2]}) == "decode"
    for word in ("benchmark", "bench"):  # the older one
        assert kind_of({word: "attention", "runs": []}) == "attention"
    assert kind_of(None) is None


def test_striping_is_measured_against_the_throttles_together() -> None:
    runs = [
        {
            "devices": devices,
            "times_one_device": float(devices),
            "queue_depth_of_each": 8,
            "read_bytes_per_second": 90e6 * devices,
            "write_bytes_per_second": 80e6 * devices,
            "cpu_seconds_per_gib_read": 0.02,
            "machine": MACHINE,
        }
        for devices in (1, 3)
    ]
    result = {
        "benchmark": "striping",
        "command": "measure",
        "throttle_bytes_per_second": 100_000_000,
        "runs": runs,
    }
    assert kind_of(result) == "striping"
    section, cards = striping_section([("striping.json", result)])
    assert list(section.rows[1]) == ["3", "8", "270", "3.00", "90 %", "240", "80 %", "0.020"]
    assert cards == [("90 %", "of the bandwidth of 3 striped devices")]


def test_flexllmgen_is_one_row_beside_ours() -> None:
    """As scripts/measure_flexllmgen.py writes it."""
    result = {
        "command": "measure",
        "flexllmgen_commit": None,
        "model": "opt-6.7b",
        "batch": 12,
        "context": 1984,
        "memory_limit_bytes": 4 * GIB,
        "step_ratio_median": {"direct": None, "dual": 0.25},
        "rounds": [
            {"flexllmgen": {"step_seconds": 2 * t}, "direct": {"step_seconds": None},
             "dual": {"step_seconds": t / 2}, "page-cache": {"step_seconds": t if t > 1 else None}}
            for t in (1.0, 1.5)
        ],
        "machine": MACHINE,
    }  # fmt: skip
    assert kind_of(result) == "flexllmgen"
    section, cards = flexllmgen_section([("flexllmgen.json", result)])
    nothing = ["-", "-"]
    assert list(section.rows[0]) == ["flexllmgen", "2500", "2000-3000", "-", *nothing]
    assert list(section.rows[1]) == ["direct", "killed", "-", "-", *nothing]
    assert list(section.rows[2]) == ["dual", "625", "500-750", "0.25", *nothing]
    assert list(section.rows[3]) == ["page-cache", "1500, 1 of 2 runs", "1500-1500", "-", *nothing]
    assert "4.0 GiB of memory for each" in section.about
    assert cards == [("0.25 x", "FlexLLMGen's step time")]


def test_flexllmgen_without_computing_is_told_as_such_with_what_it_reads() -> None:
    """As scripts/measure_flexllmgen.py --storage-only writes it."""
    runs = {"flexllmgen": (8.0, 4 * GIB), "direct": (None, None), "dual": (2.0, 3 * GIB)}
    result = {
        "command": "measure",
        "flexllmgen_commit": "1" * 40,
        "storage_only": True,
        "model": "opt-2.7b",
        "batch": 8,
        "context": 1984,
        "memory_limit": "+1GiB",
        "memory_limit_bytes": 2 * GIB,
        "step_ratio_median": {"direct": None, "dual": 0.25},
        "fio_read_bytes_per_second": [2 * GIB, GIB],
        "rounds": [
            {
                who: {"step_seconds": step, "read_bytes_per_step": read}
                for who, (step, read) in runs.items()
            }
        ]
        * 2,
        "machine": MACHINE,
    }
    section, _ = flexllmgen_section([("flexllmgen.json", result)])
    assert list(section.rows[0][4:]) == ["0.50", "38 %"]
    assert list(section.rows[1]) == ["direct", "killed", "-", "-", "-", "-"]
    assert list(section.rows[2][4:]) == ["1.50", "112 %"]
    assert "FlexLLMGen's computing left out" in section.about
    assert "1GiB of memory beside each process's own" in section.about


def test_a_generation_of_one_token_is_a_row_with_dashes(tmp_path: Path) -> None:
    whole = {
        "cache": {"path": "dual", "attention": "tiles"},
        "dtype": "bfloat16",
        "prompt_tokens": 9,
        "new_tokens": 3,
        "prefill_seconds": 1.0,
        "decode_seconds_per_token": 0.05,
        "tokens_per_sweep": 1.0,
        "read_bytes_per_token": 2 * MIB,
    }
    nothing = dict.fromkeys(
        ("decode_seconds_per_token", "tokens_per_sweep", "read_bytes_per_token")
    )
    write(tmp_path, "a.json", whole)
    write(tmp_path, "b.json", {**whole, "new_tokens": 1, **nothing})
    write(tmp_path, "c.json", {**whole, "new_tokens": 0, "prefill_seconds": None, **nothing})
    page = collect(tmp_path)
    assert page.skipped == []
    assert [row[3:] for row in page.sections[0].rows] == [
        ["1.0", "50", "1.00", "2.0"],
        ["1.0", "-", "-", "-"],
        ["-", "-", "-", "-"],
    ]


def test_an_ablation_tells_what_each_step_gains() -> None:
    steps = {"mmap": 1.0, "page-cache": 0.8, "direct": 1.0, "dual": 0.5}
    result = decode_result({(mode, "25%"): seconds for mode, seconds in steps.items()})
    result["options"] |= {
        "modes": list(steps),
        "ablation": ["baseline", "our engine", "+ direct", "+ residency"],
    }
    assert kind_of(result) == "ablation"
    section, cards = ablation_section([("x", result)])
    assert [row[0] for row in section.rows] == result["options"]["ablation"]
    assert [row[4] for row in section.rows] == ["-", "20.0 %", "-25.0 %", "50.0 %"]
    assert [row[5] for row in section.rows] == ["-", "20.0 %", "0.0 %", "50.0 %"]
    assert section.notes == ["With 25 %, + direct makes a step 25 % longer."]
    assert cards[0][0] == "50 %"


def test_a_heading_names_a_model_shortly() -> None:
    shape = "random:llama?layers=24,hidden=256,heads=32,positions=8192"
    assert model_text(shape) == "llama (24 layers, 256 wide)"
    assert model_text("random:opt-6.7b") == "opt-6.7b"
    assert model_text("/models/mine") == "/models/mine"
