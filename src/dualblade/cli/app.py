"""The `dualblade` command. Each subcommand imports what it needs when it runs."""

from __future__ import annotations

import io
import sys
from typing import Annotated

import typer

from dualblade.cli.bench import app as bench_app
from dualblade.cli.command import Command
from dualblade.cli.demo import demo
from dualblade.cli.doctor import doctor
from dualblade.cli.generate import generate
from dualblade.cli.plan import plan
from dualblade.cli.store import app as store_app
from dualblade.cli.tune import tune
from dualblade.host.threads import wait_briefly

app = typer.Typer(
    name="dualblade",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(asked: bool) -> None:
    if asked:
        from dualblade import __version__

        sys.stdout.write(f"dualblade {__version__}\n")
        raise typer.Exit


@app.callback()
def _root(
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Generate with a KV cache larger than memory: it lives on the drive, read back at each step.

    Sizes are written 512MiB or 2GiB. Exit status: 0 done, 1 failed, 2 bad usage.
    """


for function in (demo, generate, plan, tune, doctor):
    app.command(cls=Command)(function)
app.add_typer(store_app, name="store")
app.add_typer(bench_app, name="bench")


def main() -> None:
    """Entry point of `dualblade` and `python -m dualblade`."""
    wait_briefly()  # before torch is imported
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")  # names of files may be in any encoding
    app(prog_name="dualblade")
