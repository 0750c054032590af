"""`dualblade store`: make, look at, check and wipe stores, on devices and in files."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dualblade.cli import options
from dualblade.cli.command import Command
from dualblade.errors import ConfigError, CorruptExtent, NotAStore
from dualblade.units import format_size

if TYPE_CHECKING:
    from dualblade.store.formatting import Plan
    from dualblade.store.inspect import Report

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Make, inspect, verify and wipe stores, on devices and in files.",
)

Places = Annotated[
    list[str],
    typer.Argument(
        metavar="STORE...",
        help="A block device, partition, /dev/ngXnY, or a file. Several: striped, one store.",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]


@app.command("format", cls=Command)
def format_store(
    store: Places,
    dry_run: DryRun = False,
    yes: Yes = False,
    json: options.Json = False,
    debug: options.Debug = False,  # noqa: ARG001 - read by Command
) -> None:
    """Make a store on a device that is free, or a new file; or on several, striped.

    Refused: what is mounted, partitioned, swap, part of something (RAID, volumes), carries any
    signature, is read-only, zoned, has metadata or blocks of more than 4096 bytes, is open
    elsewhere, or is the drive that this machine boots from. What was found is listed, with the
    command that frees it. All that the devices hold is lost. Of several, none is written before all
    were found free.

    \b
    Examples:
      dualblade store format /dev/nvme1n1 --dry-run
      dualblade store format /dev/ng1n1
      dualblade store format /dev/nvme1n1 /dev/nvme2n1
    """
    from dualblade.store.formatting import carry_out_format, plan_formats

    plans = plan_formats(store)
    result = {"command": "store format", **_facts(plans), "dry_run": dry_run, "done": False}
    if not dry_run:
        _confirm(plans, "format", yes)
        superblock = carry_out_format(*plans)
        result |= {"done": True, "uuid": str(superblock.uuid)}
    told = "formatted" if result["done"] else "free; would be formatted"
    _tell(result, json, f"{' + '.join(store)}: {told}{_size(result['capacity_bytes'])}")


@app.command("wipe", cls=Command)
def wipe_store(
    store: Places,
    dry_run: DryRun = False,
    yes: Yes = False,
    json: options.Json = False,
    debug: options.Debug = False,  # noqa: ARG001 - read by Command
) -> None:
    """Remove a store and what it holds: of a device by TRIM, or zeros where the drive has none or
    refuses. A file is deleted; what its blocks held is then the file system's free space.

    Touches only what carries a dualblade superblock that names this very device. One member of a
    striped store may be wiped alone: the rest is then no store any more.

    \b
    Examples:
      dualblade store wipe /dev/nvme1n1
      dualblade store wipe /dev/nvme1n1 /dev/nvme2n1
    """
    from dualblade.cli.output import Reporter
    from dualblade.store.formatting import carry_out_wipe, plan_wipes

    plans = plan_wipes(store)
    result = {"command": "store wipe", **_facts(plans), "dry_run": dry_run, "done": False}
    told = ["a store; would be wiped"] * len(plans)
    if not dry_run:
        _confirm(plans, "wipe", yes)
        with Reporter() as reporter:
            reporter.tell(f"wiping {' + '.join(store)}")
            told = carry_out_wipe(*plans, tell=reporter.fraction)
        result |= {"done": True, "how": ", ".join(dict.fromkeys(told))}
        for member, how in zip(result.get("members", []), told, strict=False):
            member["how"] = how
    lines = [
        f"{plan.path}{f', {plan.member.words}' if plan.member else ''}: "
        f"{how}{_size(plan.capacity_bytes)}"
        for plan, how in zip(plans, told, strict=True)
    ]
    _tell(result, json, "\n".join(lines))


@app.command("inspect", cls=Command)
def inspect(
    store: Places,
    json: options.Json = False,
    debug: options.Debug = False,  # noqa: ARG001 - read by Command
) -> None:
    """Show what the superblocks of a store say. Only reads; also while it is in use.

    \b
    Examples:
      dualblade store inspect /dev/nvme1n1 --json
      dualblade store inspect /dev/nvme1n1 /dev/nvme2n1
    """
    from dualblade.store.inspect import inspect_store, store_problem

    reports = [inspect_store(path) for path in store]
    lines = [_report_text(report) for report in reports]
    if len(reports) > 1:
        together = store_problem(reports) or "all members of one store"
        lines.append(f"together: {together}")
    _tell({"command": "store inspect", **_report_facts(reports)}, json, "\n".join(lines))


@app.command("verify", cls=Command)
def verify(
    store: Places,
    superblocks_only: Annotated[
        bool, typer.Option("--superblocks-only", help="Do not read the rest.")
    ] = False,
    json: options.Json = False,
    debug: options.Debug = False,  # noqa: ARG001 - read by Command
) -> None:
    """Check all superblocks, and that every block can be read. Only reads.

    \b
    Examples:
      dualblade store verify /dev/nvme1n1
      dualblade store verify /dev/nvme1n1 /dev/nvme2n1
      dualblade store verify kv.store --superblocks-only
    """
    from dualblade.store.inspect import UNREADABLE_MAX, inspect_store, store_problem

    reports = [inspect_store(path) for path in store]
    problem = store_problem(reports)
    read_all = problem is None and not superblocks_only
    bad = _unreadable(reports) if read_all else []
    copies = [copy for report in reports for copy in report.copies]
    problems = [copy.problem for copy in copies if copy.problem is not None]
    if problem is not None and problem not in problems:
        problems.insert(0, problem)
    name = " + ".join(store)
    result = {
        "command": "store verify",
        **_report_facts(reports),
        "problems": problems,
        "read_all": read_all,
        "unreadable": [{"path": path, "offset": at, "size_bytes": n} for path, at, n in bad],
    }
    whole = "is whole" if read_all else "has whole superblocks"
    _tell(result, json, f"{name}: {whole}" if not problems and not bad else "")
    if bad:
        path, offset, size_bytes = bad[0]
        count = f"at least {len(bad)}" if len(bad) >= UNREADABLE_MAX else f"{len(bad)}"
        raise CorruptExtent(
            f"{name}: {count} blocks cannot be read, the first at offset {offset} of {path}",
            path=path,
            offset=offset,
            size_bytes=size_bytes,
            hint="wipe it and use another drive; its health: smartctl -a or nvme smart-log",
        )
    if problems:
        raise NotAStore("\n".join(problems), operation="verify", path=name)


def _unreadable(reports: list[Report]) -> list[tuple[str, int, int]]:
    """(path, offset, bytes) of what cannot be read, member by member."""
    from dualblade.cli.output import Reporter
    from dualblade.store.inspect import unreadable_ranges

    bad = []
    with Reporter() as reporter:
        for report in reports:
            reporter.tell(f"reading {report.path}")
            found = unreadable_ranges(report, reporter.fraction)
            bad += [(report.path, at, size_bytes) for at, size_bytes in found]
    return bad


def _facts(plans: list[Plan]) -> dict[str, Any]:
    """Of the one place; of several, what they come to, and each."""
    if len(plans) == 1:
        return _plan_facts(plans[0])
    sizes = [plan.capacity_bytes for plan in plans if plan.capacity_bytes is not None]
    return {
        "path": [plan.path for plan in plans],
        "capacity_bytes": min(sizes) * len(plans) if sizes else None,
        "members": [_plan_facts(plan) for plan in plans],
    }


def _plan_facts(plan: Plan) -> dict[str, Any]:
    drive = plan.drive
    return {
        "path": plan.path,
        "capacity_bytes": plan.capacity_bytes,
        "serial": None if drive is None else drive.serial or None,
        "model": None if drive is None else drive.model or None,
        "block_path": None if drive is None else drive.block_path,
    }


def _report_facts(reports: list[Report]) -> dict[str, Any]:
    """Of the one place; of several, what they are together, and each."""
    if len(reports) == 1:
        return reports[0].to_dict()
    from dualblade.store.inspect import store_problem

    problem = store_problem(reports)
    return {
        "path": [report.path for report in reports],
        "is_store": problem is None,
        "problem": problem,
        "members": [report.to_dict() for report in reports],
    }


def _confirm(plans: list[Plan], operation: str, yes: bool) -> None:
    """Ask for the serials. Raises: ConfigError when something else, or nothing, was typed."""
    if yes or (plans[0].drive is None and operation == "format"):
        return
    from dualblade.cli.output import without_controls

    for plan in plans:
        what = plan.path
        if plan.drive is not None:
            size = format_size(plan.drive.size_bytes)
            what += f" ({' '.join(filter(None, (without_controls(plan.drive.model), size)))})"
        sys.stderr.write(f"all that {what} holds will be lost\n")
    wanted = " ".join(plan.confirmation for plan in plans)
    sys.stderr.write(f"type {wanted} to {operation} {'them' if plans[1:] else 'it'}: ")
    sys.stderr.flush()
    if _typed().split() != wanted.split():
        left = " + ".join(plan.path for plan in plans)
        raise ConfigError(
            f"not confirmed: {left} was left alone",
            hint=f"type exactly {wanted}, or give --yes",
        )


def _typed() -> str:
    """A line of stdin; nothing where that is closed, or no text."""
    try:
        return "" if sys.stdin is None else sys.stdin.readline()
    except (OSError, UnicodeDecodeError):
        return ""


def _size(capacity_bytes: int | None) -> str:
    return "" if capacity_bytes is None else f" ({format_size(capacity_bytes)} for KV)"


def _report_text(report: Report) -> str:
    from dualblade.cli.output import without_controls

    block = report.superblock
    what = "a dualblade store"
    if block is not None and block.member is not None:
        what = f"{block.member.words} of a dualblade store"
    lines = [f"{report.path}: {report.problem or what}"]
    if block is not None:
        state = "in use now" if report.in_use_now else "not closed cleanly"
        lines += [
            f"  uuid        {block.uuid}",
            f"  capacity    {format_size(block.capacity_bytes)}",
            f"  generation  {block.generation}, {state if block.in_use else 'closed cleanly'}",
        ]
    if block is not None and block.device is not None:
        lines.append(
            f"  device      serial {without_controls(block.device.serial) or '-'}, "
            f"{format_size(block.device.size_bytes)}, blocks of {block.device.block_bytes} bytes"
        )
    for copy in report.copies:
        lines.append(f"  superblock  at {copy.offset}: {copy.problem or 'whole'}")
    return "\n".join(lines)


def _tell(result: dict[str, Any], json: bool, text: str) -> None:
    from dualblade.cli.output import write_json

    if json:
        write_json(result)
    elif text:
        sys.stdout.write(text + "\n")
