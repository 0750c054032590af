"""bench report: one self-contained HTML page from any mixture of our result files.

A file's kind is told by what is in it, not by its name. Each becomes a section: what was asked,
figures, a table of medians with their spread, the command to repeat it, and what it was measured
on. Where another mode beats `dual`, the section says so.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dualblade.bench import figures
from dualblade.bench.report_compute import (
    attention_section,
    contention_section,
    products_section,
    spinning_section,
)
from dualblade.bench.report_decode import (
    ablation_section,
    decode_section,
    envelope_section,
    grows,
    growth_section,
    is_growth,
    series_key,
)
from dualblade.bench.report_prefill import prefill_section
from dualblade.bench.report_section import Made, Named, Section
from dualblade.bench.report_tables import (
    changing_memory_section,
    control_section,
    deepspeed_section,
    demo_section,
    fits_section,
    flexllmgen_section,
    generate_section,
    io_section,
    striping_section,
)
from dualblade.errors import ConfigError, Unsupported

STRANGE = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""What a file of an older or newer version, or of somebody else, raises on its way to a section;
ConfigError, of a limit that is none, is a ValueError."""


@dataclass(frozen=True, slots=True)
class Card:
    """A key figure: `value`, `what` it is, and the section, by number from 1, that it is from."""

    value: str
    what: str
    number: int
    title: str


@dataclass(slots=True)
class Page:
    """What was found: sections, key figures, and files left out with why."""

    sections: list[Section] = field(default_factory=list)
    cards: list[Card] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def write_report(folder: Path, output: Path) -> Page:
    """The page of all results below `folder`, written to `output`.

    Raises: Unsupported without jinja2 and matplotlib (extra `report`); ConfigError when there is
            no folder, no result in it, or the page cannot be written.
    """
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError as exc:
        raise Unsupported("a report needs jinja2", hint="pip install 'dualblade[report]'") from exc
    figures.require_figures()
    figures.require_place(output)
    page = collect(folder)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template("report.html").render(page=page, folder=str(folder))
    try:
        output.write_text(text, encoding="utf-8", errors="replace")  # names may be no text
    except OSError as exc:
        raise ConfigError(f"cannot write {output}: {exc.strerror}") from exc
    return page


def collect(folder: Path) -> Page:
    """Sections of all results below `folder`, in the order of SECTIONS. Raises: ConfigError."""
    if not folder.is_dir():
        raise ConfigError(f"no folder {folder}")
    page = Page()
    for kind, groups in _found(folder, page).items():
        for group in groups.values():
            try:
                made = _made(kind, group)
            except STRANGE as exc:
                names = ", ".join(name for name, _ in group)
                page.skipped.append(f"{names}: {type(exc).__name__} {exc}")
                continue
            for section, cards in made:
                page.sections.append(section)
                number = len(page.sections)
                page.cards += [Card(value, what, number, section.title) for value, what in cards]
    if not page.sections:
        raise ConfigError(f"no results in {folder}", hint="make some: dualblade bench --help")
    return page


def _found(folder: Path, page: Page) -> dict[str, dict[Any, list[Named]]]:
    """The results below `folder` by kind, and of a kind by what makes them one section."""
    found: dict[str, dict[Any, list[Named]]] = {kind: {} for kind in SECTIONS}
    for path in sorted(folder.rglob("*.json")):
        name = str(path.relative_to(folder))
        try:
            result = json.loads(path.read_text())
            kind = kind_of(result)
            if kind is None:
                page.skipped.append(f"{name}: not a result of ours")
            else:
                key = _section_key(kind, name, result)
                found[kind].setdefault(key, []).append((name, result))
        except (OSError, *STRANGE) as exc:
            page.skipped.append(f"{name}: {type(exc).__name__} {exc}")
    return found


def kind_of(result: Any) -> str | None:
    """Which of SECTIONS a parsed file is, if any."""
    if not isinstance(result, dict):
        return None
    marks = {
        "striping": {"benchmark", "throttle_bytes_per_second", "runs"},
        "control": {"control_seconds_per_step", "share_of_a_10_ms_step", "machine"},
        "deepspeed": {"deepspeed_setting", "pairs", "machine"},
        "contention": {"beside", "step_ratio_median", "rounds", "machine"},
        "fits": {"cases", "command", "machine"},
        "changing-memory": {"phases", "kv_bytes", "runs", "machine"},
        "products": {"products", "prompt", "cpu_capability", "machine"},
        "spinning": {"medians", "runs", "repeats", "benchmark", "machine"},
        "flexllmgen": {"flexllmgen_commit", "rounds", "machine"},
        "envelope": {"benchmark", "calibration", "target"},
        "io": {"read_bytes_per_second", "effective_queue_depth", "machine"},
        "demo": {"kv_to_budget", "answer", "machine"},
        "generate": {"prefill_seconds", "decode_seconds_per_token", "tokens_per_sweep", "cache"},
    }
    kind = next((kind for kind, mark in marks.items() if mark <= set(result)), None)
    benchmark = result.get("benchmark", result.get("bench"))  # as attention said it at first
    if benchmark == "decode":
        kind = "growth" if is_growth(result) else "decode"
        if (result.get("options") or {}).get("ablation"):
            kind = "ablation"
    return benchmark if benchmark in ("prefill", "attention") else kind


def _section_key(kind: str, name: str, result: dict[str, Any]) -> Any:
    """Equal for files that make one section: one series of contexts; generations."""
    if kind == "generate":
        return kind
    return series_key(result) if kind == "growth" else name


def _made(kind: str, group: list[Named]) -> list[Made]:
    """The sections of a group; of a series whose sizes are all one, each file stands alone."""
    if kind == "growth" and not grows(group):
        return [decode_section([one]) for one in group]
    return [SECTIONS[kind](group)]


SECTIONS: dict[str, Callable[[list[Named]], Made]] = {
    "envelope": envelope_section,
    "decode": decode_section,
    "prefill": prefill_section,
    "ablation": ablation_section,
    "growth": growth_section,
    "demo": demo_section,
    "io": io_section,
    "deepspeed": deepspeed_section,
    "flexllmgen": flexllmgen_section,
    "striping": striping_section,
    "contention": contention_section,
    "fits": fits_section,
    "changing-memory": changing_memory_section,
    "control": control_section,
    "attention": attention_section,
    "products": products_section,
    "spinning": spinning_section,
    "generate": generate_section,
}
