"""Result files as benchmarks write them, as far as bench report reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dualblade.units import GIB, MIB

MACHINE: dict[str, Any] = {
    "date": "2026-01-01",
    "cpu_count": 2,
    "cpu_model": "a <b>processor</b>",
    "memory_bytes": 24 * GIB,
    "kernel": "6.18",
    "versions": {"torch": "2", "transformers": "5", "dualblade": "0"},
    "git": {"commit": "0123456789abcdef", "dirty": False},
}


def decode_result(seconds: dict[tuple[str, str | None], float | None]) -> dict[str, Any]:
    """What bench decode writes, as far as a report reads it; None: killed."""
    options = {"model": "m", "batch": 1, "context": 9, "dtype": "bfloat16", "attention": "tiles"}
    runs, summary = [], []
    for (mode, limit), step in seconds.items():
        died = step is None
        runs.append(
            {
                "mode": mode,
                "memory_limit": limit,
                "attention": "tiles",
                "engine": "io_uring",
                "oom_killed": died,
                "error": None,
                "kv_bytes": GIB,
                "batch": 1,
                "context": 9,
                "step_seconds": [] if died else [step, step],
                "step_seconds_median": step,
                "cpu_seconds_per_step": None if died else 0.1,
                "device_read_bytes_per_step": None if died else 100 * MIB,
                "peak_memory_bytes": None if died else GIB,
                "base_memory_bytes": None if died else GIB // 2,
                "seconds_per_step": None
                if died
                else {"read_wait": 0.2, "attention": 0.1, "gather": 0.0, "append": 0.0},
            }
        )
        summary.append(
            {
                "mode": mode,
                "memory_limit": limit,
                "step_seconds_median": step,
                "step_seconds_spread": None if died else [step, step],
                "step_to_memory": None,
                "cpu_seconds_per_step": None if died else 0.1,
                "device_read_bytes_per_step": None if died else 100 * MIB,
                "peak_memory_bytes": None if died else GIB,
                "ssd_utilisation": None if step is None else 0.5 / step,  # fio has 200 MiB/s
            }
        )
    return {
        "benchmark": "decode",
        "command": "dualblade bench decode",
        "options": {
            **options,
            "modes": list(dict.fromkeys(mode for mode, _ in seconds)),
            "steps": 2,
            "repeats": 1,
            "memory_budget": "auto",
            "engine": {},
            "store": None,
        },
        "machine": MACHINE,
        "summary": summary,
        "runs": runs,
    }


def growing(context: int, limit: str | None = None) -> dict[str, Any]:
    """`direct` beside `memory`, with KV and step as long as the context."""
    result = decode_result({("memory", limit): 0.05, ("direct", limit): 0.1 * context})
    result["options"]["context"] = context
    for run in result["runs"]:
        run |= {"context": context, "kv_bytes": context * GIB}
    return result


LIMITED = decode_result(
    {
        ("dual", "25%"): 0.5,
        ("mmap", "25%"): 1.0,
        ("direct", "25%"): 0.4,
        ("memory", "25%"): None,
    }
)


def envelope_entry(limit: str, ratio: float | None = 1.0) -> dict[str, Any]:
    """One limit as bench envelope sums it up; no ratio: every run of dual was killed."""
    dual, killed = (None, 3) if ratio is None else (0.1 * ratio, 0)
    return {
        "memory_limit": limit,
        "memory_limit_bytes": GIB,
        "best_static_percent": 40,
        "best_static_seconds": 0.1,
        "best_static_seconds_spread": [0.1, 0.1],
        "dual_seconds": dual,
        "dual_seconds_spread": None if dual is None else [dual, dual],
        "dual_to_best": ratio,
        "dual_to_best_spread": None if ratio is None else [ratio, ratio],
        "pairs": 0 if ratio is None else 3,
        "dual_oom_killed": killed,
        "oom_killed": killed,
        "errors": [],
        "splits": [{"percent": 40, "step_seconds_median": 0.1}],
    }


def envelope_result(*summary: dict[str, Any], reached: bool) -> dict[str, Any]:
    return {
        **decode_result({}),
        "benchmark": "envelope",
        "options": {"model": "m", "batch": 1, "context": 9, "dtype": "bfloat16", "rounds": 3},
        "calibration": {"kv_bytes": GIB},
        "target": 1.05,
        "reached": reached,
        "summary": summary,
        "runs": [],
    }


def write(folder: Path, name: str, content: Any) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
