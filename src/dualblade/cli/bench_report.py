"""`dualblade bench report`: a page of results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dualblade.cli import options


def bench_report(
    results: Annotated[
        Path, typer.Argument(metavar="RESULTS_DIR", help="Folder of result files, also nested.")
    ],
    output: Annotated[Path, typer.Option("--output", metavar="FILE.html", help="The page.")],
    json: options.Json = False,
    debug: options.Debug = False,  # noqa: ARG001 - read by Command
) -> None:
    """Make one self-contained HTML page of results, with figures and how to repeat them.

    Any mixture of what the bench commands, demo, generate --json and the scripts wrote; other files
    are skipped with a warning. Needs the extra `report`.

    \b
    Examples:
      dualblade bench report results --output results.html
    """
    from dualblade.bench.report import write_report
    from dualblade.cli.output import Reporter, colored, result_console, write_json

    with Reporter() as reporter:
        reporter.tell(f"drawing the results in {results}")
        page = write_report(results, output)
    files = [section.file for section in page.sections]
    if json:
        write_json({"output": str(output), "files": files, "skipped": page.skipped})
        return
    warnings = result_console(stderr=True)
    for skipped in page.skipped:
        warnings.print(colored("skipped", "yellow"), skipped)
    result_console().print(f"{output}: {len(files)} sections, {len(page.skipped)} files skipped")
