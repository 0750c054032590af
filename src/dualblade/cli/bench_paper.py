"""`dualblade bench paper`: a thin layer over `dualblade.bench.paper`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dualblade.cli import options
from dualblade.cli.bench_options import require_agreement
from dualblade.errors import ConfigError, DualBladeError
from dualblade.units import format_size

if TYPE_CHECKING:
    from dualblade.bench.scenario import Scenario


def bench_paper(
    scenario: Annotated[
        str,
        typer.Argument(metavar="[SCENARIO|FILE.toml]", help="One of --list, or a file of yours."),
    ] = "quick",
    output: Annotated[
        Path | None, typer.Option("--output", metavar="DIR", help="Folder for the results.")
    ] = None,
    runs: Annotated[
        list[str] | None,
        typer.Option(
            "--run", metavar="NAME", help="Only this run of the scenario; may be repeated."
        ),
    ] = None,
    list_: Annotated[
        bool, typer.Option("--list", help="Show the scenarios that there are, and run nothing.")
    ] = False,
    store: options.OneStore = None,
    json: options.Json = False,
    debug: options.Debug = False,  # noqa: ARG001 - read by Command
) -> None:
    """Run a whole experiment from a scenario file.

    Each of its runs leaves one result in DIR, as bench decode and bench prefill write them. After
    an interruption the same command goes on where it stopped; a run that fails stops no other, and
    the status is 1 then. A scenario that needs more memory or
    space than there is is refused at once, with the numbers; memory limits need root.

    \b
    Examples:
      dualblade bench paper --list
      dualblade bench paper quick --output quick
      dualblade bench report quick --output quick.html
      dualblade bench paper paper-24gib --run paper-llama-3.2-1b --output results
      dualblade bench paper my.toml --output results --store /mnt/nvme/kv.store
    """
    from dualblade.bench.paper import run_paper
    from dualblade.bench.scenario import find_scenario, scenario_names
    from dualblade.cli.output import Reporter, write_json, write_json_file

    if list_:
        _show_scenarios([find_scenario(name) for name in scenario_names()], as_json=json)
        return
    if output is None:
        raise ConfigError("--output is missing", hint="name a folder for the results")
    whole = find_scenario(scenario)
    with Reporter() as reporter:
        chosen = (whole.only(runs) if runs else whole).on(options.one_store(store), reporter.tell)
        share = chosen.run_count / whole.run_count
        reporter.tell(
            f"{chosen.name}: {chosen.run_count} runs, about {share * chosen.minutes:.0f} minutes "
            "on 2 cores with a drive of 3 GiB/s"
        )
        result = run_paper(chosen, output, write_json_file, reporter.tell)
    if json:
        write_json(result)
    else:
        _show(result, output)
    failed = [entry["name"] for entry in result["entries"] if entry["error"] is not None]
    if failed:
        raise DualBladeError(
            f"failed: {', '.join(failed)}", hint="the same command takes them again, and only them"
        )
    for entry in result["entries"]:
        require_agreement(entry)


def _show_scenarios(scenarios: list[Scenario], *, as_json: bool) -> None:
    from rich.table import Table

    from dualblade.cli.output import result_console, write_json

    if as_json:
        told = [
            {
                "name": scenario.name,
                "title": scenario.title,
                "about": scenario.about,
                "minutes": scenario.minutes,
                "runs": {entry.name: entry.run_count for entry in scenario.entries},
            }
            for scenario in scenarios
        ]
        write_json({"scenarios": told})
        return
    table = Table(box=None, pad_edge=False)
    for name in ("scenario", "about", "runs", "minutes"):
        table.add_column(name, justify="right" if name in ("runs", "minutes") else "left")
    for scenario in scenarios:
        table.add_row(
            scenario.name,
            f"{scenario.title}. {scenario.about}",
            str(scenario.run_count),
            str(scenario.minutes),
        )
    result_console().print(table)


def _show(result: dict[str, Any], output: Path) -> None:
    from rich.table import Table

    from dualblade.cli.output import colored, result_console

    table = Table(box=None, pad_edge=False)
    for name in ("run", "mode", "store", "limit", "time", "spread", "/ memory", "read", "peak"):
        table.add_column(name, justify="left" if name in ("run", "mode", "store") else "right")
    for entry in result["entries"]:
        for line in entry["summary"]:
            table.add_row(entry["name"], *_row(entry["benchmark"], line))
    console = result_console()
    console.print(table)
    for entry in result["entries"]:
        if entry["error"] is not None:
            console.print(colored("failed", "red"), f"{entry['name']}: {entry['error']}")
        if entry["tokens_agree"] is False:
            console.print(colored(f"the tokens of {entry['name']} differ", "red"))
    console.print("time of a decode step in ms, of a prefill in s; medians")
    console.print(f"dualblade bench report {output} --output {output}.html draws it")


def _row(benchmark: str, line: dict[str, Any]) -> list[str]:
    place = [line["mode"], line.get("store_state") or "-", line["memory_limit"] or "-"]
    name, scale, form, ratio, read = (
        ("prefill_seconds", 1, ".2f", "prefill_to_memory", "device_read_bytes")
        if benchmark == "prefill"
        else ("step_seconds", 1000, ".1f", "step_to_memory", "device_read_bytes_per_step")
    )
    time = line["prefill_seconds" if benchmark == "prefill" else "step_seconds_median"]
    if time is None:
        return [*place, "killed" if line["oom_killed"] else "failed", "-", "-", "-", "-"]
    peak = line["peak_memory_bytes"]
    low, high = (format(scale * seconds, form) for seconds in line[f"{name}_spread"])
    return [
        *place,
        format(scale * time, form),
        f"{low}-{high}",
        "-" if line[ratio] is None else f"{line[ratio]:.2f}",
        format_size(line[read]),
        "-" if peak is None else format_size(peak),
    ]
