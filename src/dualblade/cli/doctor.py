"""`dualblade doctor`: what this machine and this place can do, and what would be in force."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dualblade.cli import options
from dualblade.cli.command import FAILED
from dualblade.host.machine import cpu_text
from dualblade.units import format_size

_GOOD, _POOR = "ok", "!"
_COLORS = {_GOOD: "green", _POOR: "yellow"}


def doctor(
    store: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[STORE]...",
            help="A store file, a folder or a device, or the members of a striped store; by "
            "default the cache directory.",
            show_default=False,
        ),
    ] = None,
    json: options.Json = False,
    debug: options.Debug = False,  # noqa: ARG001 - read by Command
) -> None:
    """Say what this machine and drive can do, and why.

    The memory budget seen and from where, the I/O engine that would be in force, and what a store
    would stand on. Existing files are only read. Ends with 1 where a place cannot be looked at.

    \b
    Examples:
      dualblade doctor
      dualblade doctor /mnt/nvme/kv.store --json
      dualblade doctor /dev/nvme1n1 /dev/nvme2n1
    """
    from dualblade.cli import checks
    from dualblade.cli.output import write_json

    result: dict[str, Any] = {
        "command": "doctor",
        "machine": checks.machine(),
        "memory": checks.memory(),
        "engine": checks.engine(),
    }
    places = [checks.store(path) for path in store or (None,)]
    result["store"] = places[0]
    if store is not None and len(store) > 1:
        result |= {"members": places, "members_problem": checks.together(store)}
    elif store and places[0]["error"] is None:
        places[0]["refused"] = checks.together(store)  # a member alone is refused too
    if json:
        write_json(result)
    else:
        _show(result)
    if any(place["error"] is not None for place in places):
        raise typer.Exit(FAILED)


def _show(result: dict[str, Any]) -> None:
    from rich.table import Table

    from dualblade.cli.output import colored, result_console, without_controls

    table = Table(show_header=False, box=None, pad_edge=False)
    for section in (_machine_rows, _memory_rows, _engine_rows, _members_rows):
        for mark, name, text in section(result):
            table.add_row(colored(mark, _COLORS.get(mark, "")), name, without_controls(text))
    result_console().print(table)


_Rows = list[tuple[str, str, str]]


def _mark(good: bool) -> str:
    return _GOOD if good else _POOR


def _machine_rows(result: dict[str, Any]) -> _Rows:
    facts = result["machine"]
    versions = facts["versions"]
    known = ", ".join(f"{name} {number}" for name, number in versions.items() if number)
    gpus = ", ".join(facts["gpus"]) or "none that torch can use"
    processor = f"{cpu_text(facts)}, {facts['cpu_usable_count']} usable"
    return [
        (_GOOD, "kernel", f"Linux {facts['kernel']}"),
        (_GOOD, "processor", processor),
        (_mark(facts["torch_error"] is None), "versions", facts["torch_error"] or known),
        (_GOOD, "GPU", gpus),
    ]


def _memory_rows(result: dict[str, Any]) -> _Rows:
    facts = result["memory"]
    version = facts["cgroup_version"]
    group = "none" if version is None else f"v{version}, {facts['cgroup_path']}"
    limits = facts["cgroup_cannot_limit"] or "demo and bench can set real memory limits"
    return [
        (_GOOD, "memory", f"{format_size(facts['available_bytes'])} available: {facts['source']}"),
        (
            _GOOD,
            "auto budget",
            f"{format_size(facts['auto_budget_bytes'])}; {format_size(facts['reserve_bytes'])} are "
            "left to others",
        ),
        *((_POOR, "", warning) for warning in facts["warnings"]),
        (_mark(facts["cgroup_cannot_limit"] is None), "cgroup", f"{group}; {limits}"),
    ]


def _engine_rows(result: dict[str, Any]) -> _Rows:
    facts = result["engine"]
    limit = facts["memlock_limit_bytes"]
    because = facts["reason"] or "the first choice"
    return [
        (_mark(facts["reason"] is None), "I/O engine", f"{facts['engine']}: {because}"),
        *((_POOR, "", note) for note in facts["notes"]),
        (
            _mark(facts["registered_buffers"] or facts["engine"] == "posix"),
            "memlock",
            "unlimited" if limit is None else format_size(limit),
        ),
        (
            _mark(facts["huge_pages_given"]),
            "huge pages",
            f"mode {facts['huge_pages'] or 'none'}, "
            + (
                "given when asked for" if facts["huge_pages_given"] else "not given: reads are slow"
            ),
        ),
    ]


def _members_rows(result: dict[str, Any]) -> _Rows:
    """The one store, or each member and what they are together."""
    members = result.get("members")
    if members is None:
        return _store_rows(result)
    rows = [row for facts in members for row in _store_rows({"store": facts})]
    problem = result["members_problem"]
    return [*rows, (_mark(problem is None), "together", problem or "members of one striped store")]


def _store_rows(result: dict[str, Any]) -> _Rows:
    facts = result["store"]
    if facts["error"] is not None:
        return [(_POOR, "store", facts["error"])]
    if facts["refused"] is not None and facts["kind"] in ("missing", "other"):
        return [(_POOR, "store", facts["refused"])]  # what is around it says nothing of a store
    default = " (default)" if facts["is_default"] else ""
    align = facts["direct_align_bytes"]
    direct = f"works, aligned to {align} bytes" if align else "works"
    told = {True: "cachestat", False: "mincore (older kernel)", None: "could not be tried here"}
    return [
        (_mark(facts["refused"] is None), "store", f"{facts['path']}{default}: {_state(facts)}"),
        (
            _GOOD,
            "file system",
            f"{facts['file_system']} on {facts['mount_point'] or '-'}, "
            f"{format_size(facts['free_bytes'])} free",
        ),
        (_GOOD, "device", _device(facts)),
        (
            _mark(facts["direct"]),
            "O_DIRECT",
            direct if facts["direct"] else f"no: {facts['direct_reason']}",
        ),
        *(_drive_rows(facts) if facts["drive"] is not None else ()),
        (_GOOD, "speeds", _speeds(facts)),
        (_GOOD, "page cache", f"counted by {told[facts['cachestat']]}"),
        *((_POOR, f"path {way}", text) for way, text in facts["ways"].items() if text != "works"),
    ]


def _drive_rows(facts: dict[str, Any]) -> _Rows:
    drive, nvme = facts["drive"], facts["drive"]["nvme"]
    found = drive["findings"]
    command = f"{format_size(drive['command_bytes_max'])} a command"
    rows = [
        (
            _GOOD,
            "drive",
            f"{drive['whole_path']}, serial {drive['serial'] or '-'}, "
            f"{command} in {drive['segments_max']} segments, "
            + ("TRIM" if drive["discard_bytes_max"] else "no TRIM"),
        )
    ]
    if nvme is not None:
        mdts = "none" if nvme["mdts_bytes"] is None else format_size(nvme["mdts_bytes"])
        cache = "volatile write cache" if nvme["volatile_write_cache"] else "no write cache"
        metadata = nvme["metadata_bytes"]
        blocks = f"blocks of {nvme['block_bytes']} + {metadata} bytes"
        text = f"namespace id {nvme['namespace_id']}, {blocks}, MDTS {mdts}, {cache}"
        rows.append((_mark(not metadata), "namespace", text))
    elif drive["nvme_problem"] is not None:
        rows.append((_POOR, "namespace", drive["nvme_problem"]))
    if drive["passthrough"] is not None:
        told = drive["passthrough"]
        possible = told.startswith("possible")
        rows.append((_mark(possible), "passthrough", told if possible else f"no: {told}"))
    for finding in found or ():
        free = f"; to free it: {finding['free_with']}" if finding["free_with"] else ""
        rows.append((_POOR, "not free", finding["what"] + free))
    if found == [] and facts["store"] is None:
        rows.append((_GOOD, "free", f"yes: dualblade store format {drive['path']}"))
    return rows


def _speeds(facts: dict[str, Any]) -> str:
    known = facts["speeds"]
    if known is None:
        how = f"dualblade tune {facts['path']} does it well"
        return f"not measured yet: briefly done at first use; {how}"
    names = ("direct", "cache_hit", "cache_miss")
    direct, hit, miss = (format_size(int(known[f"{name}_bytes_per_s"])) for name in names)
    by = "briefly at first use" if known["quick"] else "by tune"
    when = f"measured {by}, {known['measured_at'][:10]}"
    return f"direct {direct}/s, page cache {hit}/s, {miss}/s when missed ({when})"


def _state(facts: dict[str, Any]) -> str:
    if facts["store"] is None and facts["refused"] is not None:
        return str(facts["refused"])
    if facts["store"] is not None:
        store = facts["store"]
        state = "in use now" if facts["in_use_now"] else "free"
        unclean = "" if store["closed_cleanly"] or facts["in_use_now"] else ", not closed cleanly"
        fragments = facts["fragments"]
        told = "" if fragments is None else f", in {fragments} fragments on the device"
        what = f"{store['member']} of a store" if store["member"] else "a dualblade store"
        alone = "" if facts["refused"] is None else f"; refused: {facts['refused']}"
        return f"{what}, {state}{unclean}{told}{alone}"
    words = {"missing": "would be made here", "directory": "a folder; stores are files in it"}
    return words.get(facts["kind"]) or str(facts["store_problem"])


def _device(facts: dict[str, Any]) -> str:
    if facts["device"] is None:
        return "no single block device below it"
    kind = {True: "rotating disk", False: "solid state", None: "of unknown kind"}[
        facts["rotational"]
    ]
    model = f" {facts['device_model']}" if facts["device_model"] else ""
    return f"{facts['device']}{model}, {kind}, logical block {facts['logical_block_bytes']} bytes"
