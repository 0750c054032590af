"""What `dualblade generate --stats` says: where time and bytes went, for people."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from dualblade.cli.output import result_console
from dualblade.units import format_size


def show_stats(result: dict[str, Any]) -> None:
    """What `dualblade generate --stats` tells of its `result`, on stderr."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in _stats_rows(result):
        table.add_row(name, value)
    result_console(stderr=True).print(table)


def _stats_rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    """What a person wants to know, in the order of the way of a tensor."""
    cache = result["cache"]
    memory, io, seconds, engine = (cache[k] for k in ("memory", "io", "seconds", "engine"))
    decode, at_once = result["decode_seconds_per_token"], result["tokens_per_sweep"]
    rows = [
        ("model", f"{result['model']}, {result['dtype']} on {result['device']}"),
        ("tokens", f"{result['prompt_tokens']} of prompt, {result['new_tokens']} new"),
        ("load", f"{result['load_seconds']:.2f} s"),
        ("prefill", f"{result['prefill_seconds']:.2f} s"),
        ("decode", "-" if decode is None else f"{decode * 1000:.1f} ms per token"),
        *(
            [("", f"{at_once:.2f} tokens per sweep of the KV")]
            if result["prompt_lookup"] and at_once
            else []
        ),
        ("path", cache["path"]),
        ("attention", f"{cache['attention']} ({cache['attention_reason']})"),
        ("KV", format_size(cache["kv_bytes"])),
    ]
    if engine is None:
        return rows
    cached, planned = (sum(u[k] for u in cache["plan"]) for k in ("cached_bytes", "bytes"))
    because = f" ({engine['reason']})" if engine["reason"] else ""
    return [
        *rows,
        ("store", cache["store_path"] + _fragments_word(cache["store_fragments"])),
        ("engine", f"{engine['name']}{because}, {engine['queue_depth']} in flight"),
        *(("", note) for note in engine["notes"]),
        ("plan", f"{format_size(cached)} of {format_size(planned)} through the page cache"),
        *([("speeds", _speeds_line(cache["speeds"]))] if cache["speeds"] else []),
        *(("moved", _event_line(event)) for event in cache["events"]),
        ("memory", _memory_line(memory)),
        (
            "read",
            f"{format_size(io['direct_read_bytes'])} direct, "
            f"{format_size(io['page_cache_read_bytes'])} through the page cache",
        ),
        ("written", format_size(io["written_bytes"])),
        ("checksums", _checksums_line(cache["checksums"], seconds["checksums"])),
        (
            "time",
            f"waiting for reads {seconds['read_wait']:.2f} s, "
            f"attention over tiles {seconds['attention']:.2f} s, "
            f"gathering {seconds['gather']:.2f} s, taking in rows {seconds['append']:.2f} s",
        ),
        *_stage_rows(cache["stages"], cache["tuning"]),
    ]


def _fragments_word(fragments: int | None) -> str:
    """None: the file system does not tell."""
    return "" if fragments is None else f", in {fragments} fragment{'' if fragments == 1 else 's'}"


def _tuning_line(tuning: dict[str, Any] | None) -> str:
    if tuning is None:
        return "-"
    slots, most = tuning["slots"], tuning["slots_max"]
    held = f"reads hold up to {slots} of {most} slots of {format_size(tuning['slot_bytes'])}"
    because = f" ({tuning['events'][-1]['reason']})" if tuning["events"] else ""
    return f"{tuning['mode']}: {held}{because}"


def _stage_rows(stages: dict[str, Any], tuning: dict[str, Any] | None) -> list[tuple[str, str]]:
    """How busy each stage was, how much of it at the same time, and what was waited for."""
    wall, efficiency = stages["wall_seconds"], stages["overlap_efficiency"]
    if not wall:
        return []
    names = ("reads", "copies", "compute", "writes", "control")
    busy = ", ".join(f"{name} {stages[f'{name}_seconds'] / wall:.0%}" for name in names)
    causes = ("reads", "copies", "writes")
    stalls = ", ".join(f"{c} {stages[f'stalled_on_{c}_seconds']:.2f} s" for c in causes)
    return [
        ("busy", f"{busy} of {wall:.2f} s: {efficiency:.2f} stages at a time"),
        ("stalls", f"waiting for {stalls}"),
        ("ahead", _tuning_line(tuning)),
        ("direct", _direct_line(stages)),
    ]


def _direct_line(stages: dict[str, Any]) -> str:
    """What the direct door took of the drive's speed; the page cache's part is the kernel's."""
    if stages["profile_bytes_per_second"] is None:
        return "the drive's speed was not measured: dualblade tune"
    used = stages["direct_utilisation"]
    if used is None:
        return "nothing read or written directly"
    return f"{used:.0%} of the drive's measured speed, prompt and pauses included"


def _speeds_line(speeds: dict[str, Any]) -> str:
    direct, hit = (format_size(int(speeds[f"{n}_bytes_per_s"])) for n in ("direct", "cache_hit"))
    cached = "in place, without a copy" if speeds["in_place"] else f"{hit}/s"
    return f"direct {direct}/s, page cache {cached}; measured by {speeds['measured_by']}"


def _checksums_line(sums: dict[str, Any], seconds: float) -> str:
    if sums["mode"] == "off":
        return "off: what is read is believed"
    return (
        f"{sums['mode']}: {format_size(sums['verified_bytes'])} verified in {seconds:.2f} s, "
        f"{sums['mismatches']} mismatches, {sums['healed_reads']} reads right the second time"
    )


def _event_line(event: dict[str, Any]) -> str:
    before, after = format_size(event["from_bytes"]), format_size(event["to_bytes"])
    return (
        f"after {event['time_seconds']:.1f} s, {event['cause']}: page cache {before} -> {after}, "
        f"{format_size(event['moved_bytes'])} of KV changed their path"
    )


def _memory_line(memory: dict[str, Any]) -> str:
    shares = {
        "staging": memory["staging_bytes"],
        "gather": memory["gather_bytes"],
        "tails and tables": memory["tail_bytes"] + memory["table_bytes"],
        "page cache": memory["page_cache_bytes"],
    }
    told = ", ".join(f"{name} {format_size(size)}" for name, size in shares.items())
    used, budget = format_size(memory["used_bytes"]), format_size(memory["budget_bytes"])
    return f"{used} of {budget}: {told}"
