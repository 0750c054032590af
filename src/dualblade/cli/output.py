"""Results to stdout, progress to stderr."""

from __future__ import annotations

import contextlib
import json
import sys
import time
import unicodedata
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from dualblade.errors import ConfigError

_WIDTH_WITHOUT_TERMINAL = 120
_LINE_EVERY_SECONDS = 5.0


def result_console(*, stderr: bool = False) -> Console:
    """For tables: as wide as the terminal; in a file or pipe wide enough for all columns. It reads
    no markup: names may have brackets."""
    console = Console(stderr=stderr, highlight=False, markup=False)
    if not console.is_terminal:
        console.width = _WIDTH_WITHOUT_TERMINAL
    return console


def colored(words: str, color: str) -> Text:
    """`words` for a result_console."""
    return Text(words, style=color)


def without_controls(text: str) -> str:
    """`text` of others for a terminal, which obeys control characters: only line ends and tabs
    stay, others become U+FFFD."""
    return "".join(
        one if one in "\n\t" or unicodedata.category(one) != "Cc" else "\ufffd" for one in text
    )


def write_json(result: dict[str, Any]) -> None:
    """The one JSON object of `--json`."""
    sys.stdout.write(json.dumps(result, indent=2) + "\n")
    sys.stdout.flush()


def write_json_file(path: Path, result: dict[str, Any]) -> None:
    """The same object as a file, whole or not at all. Raises: ConfigError."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(json.dumps(result, indent=2) + "\n")
        part.replace(path)
    except OSError as exc:
        with contextlib.suppress(OSError):
            part.unlink()
        raise ConfigError(f"cannot write {path}: {exc.strerror}") from exc


class Reporter:
    """What is going on, on stderr: one moving line on a terminal, else plain lines now and then.

    A context manager; `finish` takes the moving line away early, before text is streamed.
    """

    def __init__(self) -> None:
        console = Console(stderr=True, highlight=False)
        self._terminal = console.is_terminal
        self._what, self._began = "", time.monotonic()
        self._last_line = 0.0
        self._task: TaskID | None = None
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not self._terminal,
        )

    def __enter__(self) -> Reporter:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def tell(self, what: str) -> None:
        """A new thing begins."""
        self._what, self._began = what, time.monotonic()
        self._last_line = self._began
        if not self._terminal:
            sys.stderr.write(f"{what}\n")
            sys.stderr.flush()
            return
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(what, total=None)

    def fraction(self, done: float) -> None:
        """The thing that goes on is `done` (0 to 1)."""
        if self._task is not None:
            self._progress.update(self._task, total=1.0, completed=done)
        elif time.monotonic() - self._last_line >= _LINE_EVERY_SECONDS:
            self._last_line = time.monotonic()
            took = self._last_line - self._began
            left = f", about {took / done - took:.0f} s left" if done else ""
            sys.stderr.write(f"{self._what}: {done:.0%}{left}\n")
            sys.stderr.flush()

    def note(self, line: str) -> None:
        """A line that stays, after `finish`."""
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()

    def finish(self) -> None:
        """Take the moving line away."""
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._task = None
        self._progress.stop()
