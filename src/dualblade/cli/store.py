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

Place = Annotated[
    str, typer.Argument(metavar="STORE", help="A block device, partition, /dev/ngXnY, or a file.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]


@app.command("format", cls=Command)
def format_store(
    store: Place,
    dry_run: DryRun = False,
    yes: Yes = False,
    json: options.Json = False,
    debug: options.Debug = False,  # noqa: ARG001 - read by Command
) -> None:
    """Make a store on a device that is free, or a new file.

    Refused: what is mounted, partitioned, swap, part of something (RAID, volumes), carries any
    signature, is open elsewhere, or is the drive that this machine boots from. What was found is
    listed, with the command that frees it. All that the device holds is lost.

    \b
    Examples:
      dualblade store format /dev/nvme1n1 --dry-run
      dualblade store format /dev/ng1n1
    """
    from dualblade.store.formatting import carry_out_format, plan_format

    plan = plan_format(store)
    result = {"command": "store format", **_plan_facts(plan), "dry_run": dry_run, "done": False}
    if not dry_run:
        _confirm(plan, "format", yes)
        superblock = carry_out_format(plan)
        result |= {"done": True, "uuid": str(superblock.uuid)}
    told = "formatted" if result["done"] else "free; would be formatted"
    _tell(result, json, f"{store}: {told}{_size(plan)}")


@app.command("wipe", cls=Command)
def wipe_store(
    store: Place,
    dry_run: DryRun = False,
    yes: Yes = False,
    json: options.Json = False,
    debug: options.Debug = False,  # noqa: ARG001 - read by Command
) -> None:
    """Remove a store and what it holds: TRIM, or zeros where the drive has none.

    Touches only what carries a dualblade superblock that names this very device.

    \b
    Examples:
      dualblade store wipe /dev/nvme1n1
    """
    from dualblade.cli.output import Reporter
    from dualblade.store.formatting import carry_out_wipe, plan_wipe

    plan = plan_wipe(store)
    result = {"command": "store wipe", **_plan_facts(plan), "dry_run": dry_run, "done": False}
    told = "a store; would be wiped"
    if not dry_run:
        _confirm(plan, "wipe", yes)
        with Reporter() as reporter:
            reporter.tell(f"wiping {store}")
            told = carry_out_wipe(plan, reporter.fraction)
        result |= {"done": True, "how": told}
    _tell(result, json, f"{store}: {told}{_size(plan)}")


@app.command("inspect", cls=Command)
def inspect(
    store: Place,
    json: options.Json = False,
    debug: options.Debug = False,  # noqa: ARG001 - read by Command
) -> None:
    """Show what the superblocks of a store say. Only reads; also while it is in use.

    \b
    Examples:
      dualblade store inspect /dev/nvme1n1 --json
    """
    from dualblade.store.inspect import inspect_store

    report = inspect_store(store)
    _tell({"command": "store inspect", **report.to_dict()}, json, _report_text(report))


@app.command("verify", cls=Command)
def verify(
    store: Place,
    superblocks_only: Annotated[
        bool, typer.Option("--superblocks-only", help="Do not read the rest.")
    ] = False,
    json: options.Json = False,
    debug: options.Debug = False,  # noqa: ARG001 - read by Command
) -> None:
    """Check both superblocks, and that every block can be read. Only reads.

    \b
    Examples:
      dualblade store verify /dev/nvme1n1
      dualblade store verify kv.store --superblocks-only
    """
    from dualblade.cli.output import Reporter
    from dualblade.store.inspect import inspect_store, unreadable_ranges

    report = inspect_store(store)
    bad: list[tuple[int, int]] = []
    if report.problem is None and not superblocks_only:
        with Reporter() as reporter:
            reporter.tell(f"reading {store}")
            bad = unreadable_ranges(report, reporter.fraction)
    problems = [copy.problem for copy in report.copies if copy.problem is not None]
    if report.problem is not None and report.problem not in problems:
        problems.insert(0, report.problem)
    result = {
        "command": "store verify",
        **report.to_dict(),
        "problems": problems,
        "read_all": not superblocks_only and report.problem is None,
        "unreadable": [{"offset": at, "size_bytes": size} for at, size in bad],
    }
    whole = "is whole" if result["read_all"] else "has whole superblocks"
    _tell(result, json, f"{store}: {whole}" if not problems and not bad else "")
    if bad:
        raise CorruptExtent(
            f"{store}: {len(bad)} blocks cannot be read, the first at offset {bad[0][0]}",
            path=store,
            offset=bad[0][0],
            size_bytes=bad[0][1],
            hint="wipe it and use another drive; its health: smartctl -a or nvme smart-log",
        )
    if problems:
        raise NotAStore("\n".join(problems), operation="verify", path=store)


def _plan_facts(plan: Plan) -> dict[str, Any]:
    drive = plan.drive
    return {
        "path": plan.path,
        "capacity_bytes": plan.capacity_bytes,
        "serial": None if drive is None else drive.serial or None,
        "model": None if drive is None else drive.model or None,
        "block_path": None if drive is None else drive.block_path,
    }


def _confirm(plan: Plan, operation: str, yes: bool) -> None:
    """Ask for the serial. Raises: ConfigError when something else, or nothing, was typed."""
    if yes or (plan.drive is None and operation == "format"):
        return
    what = plan.path
    if plan.drive is not None:
        size = format_size(plan.drive.size_bytes)
        what += f" ({' '.join(filter(None, (plan.drive.model, size)))})"
    sys.stderr.write(
        f"all that {what} holds will be lost\ntype {plan.confirmation} to {operation} it: "
    )
    sys.stderr.flush()
    typed = sys.stdin.readline().strip()
    if typed != plan.confirmation:
        raise ConfigError(
            f"not confirmed: {plan.path} was left alone",
            hint=f"type exactly {plan.confirmation}, or give --yes",
        )


def _size(plan: Plan) -> str:
    room = plan.capacity_bytes
    return "" if room is None else f" ({format_size(room)} for KV)"


def _report_text(report: Report) -> str:
    lines = [f"{report.path}: {report.problem or 'a dualblade store'}"]
    block = report.superblock
    if block is not None:
        state = "in use now" if report.in_use_now else "not closed cleanly"
        lines += [
            f"  uuid        {block.uuid}",
            f"  capacity    {format_size(block.capacity_bytes)}",
            f"  generation  {block.generation}, {state if block.in_use else 'closed cleanly'}",
        ]
    if block is not None and block.device is not None:
        lines.append(
            f"  device      serial {block.device.serial or '-'}, "
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
