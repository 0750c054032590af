"""Finished runs of a long benchmark, one JSON object a line, so that it can go on where it stopped.

The first line says what was asked for and what was found out before the first run; every other
line is a run, or what was asked for when more was asked for. A line is on the drive before the next
run begins. One process writes at a time. Runs that ended with an error stay in the file, but when
it is opened again they are not among its runs: they are taken anew, and counted. One that its
limit killed is done.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dualblade.errors import ConfigError
from dualblade.units import GIB


class RunLog:
    """The runs of `options` in the file `path`, made if missing; a context manager.

    `facts` come from `find_facts`, which is called for a new log alone, so that all runs of a log
    share them. Both are plain values. `may_grow` names an option of which more may be asked later:
    then the runs of fewer must come first, in their order.

    Raises: ConfigError when the file is of other options, is no log, or is being written to.
    """

    def __init__(
        self,
        path: Path,
        options: Mapping[str, Any],
        find_facts: Callable[[], Mapping[str, Any]],
        *,
        may_grow: str | None = None,
    ) -> None:
        self._path = path
        self._may_grow = may_grow
        self.runs: list[dict[str, Any]] = []
        self._failed: Counter[str] = Counter()
        self._is_locked = False
        self._grown: dict[str, Any] | None = None  # the head that goes before the first run more
        try:
            self._file = open(path, "a+b")  # noqa: SIM115 - closed by close()
        except OSError as exc:
            raise ConfigError(f"cannot write {path}: {exc.strerror}") from exc
        try:
            self._lock()
            lines = self._whole_lines()
            if lines:
                heads = [line for line in lines if _is_head(line)]
                self.facts = heads[0]["facts"]
                runs = [each for each in lines if not _is_head(each)]
                self.runs = [each for each in runs if _got_through(each)]
                failed = (each for each in runs if not _got_through(each))
                self._failed.update(str(each.get("mode")) for each in failed)
                if self._check(heads[-1]["options"], _plain(options)):
                    self._grown = {"options": _plain(options), "facts": self.facts}
            else:
                self.facts = _plain(find_facts())
                self._write({"options": _plain(options), "facts": self.facts})
        except BaseException:
            self.close()
            raise

    def require_same_machine(self, now: Mapping[str, Any]) -> None:
        """Raises: ConfigError when the log was begun with other code or on another machine than
        `now` (machine_facts): runs of both would stand under the facts of the first.

        Of changes that are not committed it is known whether there are some, not which.
        """
        if "machine" not in self.facts:
            return
        old, new = _identity(self.facts["machine"]), _identity(now)
        differ = [
            f"{name} {value}, not {new.get(name)}"
            for name, value in old.items()
            if value != new.get(name)
        ]
        if differ:
            raise ConfigError(
                f"{self._path} was begun with {'; '.join(differ)}",
                hint="go on there, or name another --output (or remove the file) to start anew",
            )

    def retaken(self) -> dict[str, Any]:
        """For the result: `retaken_after_error`, of each mode how many runs failed and were taken
        again when the log was opened anew; nothing where none was."""
        return {"retaken_after_error": dict(self._failed)} if self._failed else {}

    def append(self, run: Mapping[str, Any]) -> None:
        """Keep one finished run."""
        if self._grown is not None:
            self._write(self._grown)
            self._grown = None
        self.runs.append(_plain(run))
        self._write(self.runs[-1])

    def close(self) -> None:
        """Let go of the file; one without a line is removed. Idempotent."""
        if not self._file.closed:
            if self._is_locked and os.fstat(self._file.fileno()).st_size == 0:
                self._path.unlink(missing_ok=True)
            self._file.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._is_locked = True
        except BlockingIOError as exc:
            raise ConfigError(f"{self._path} is being written by another run") from exc

    def _whole_lines(self) -> list[dict[str, Any]]:
        """All lines; one that a crash cut short is taken off the file."""
        self._file.seek(0)
        data = self._file.read()
        whole = data[: data.rfind(b"\n") + 1]
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
            known = not lines or _is_head(lines[0])
        except ValueError:
            known = False
        if not known or (data and not whole):
            raise ConfigError(
                f"{self._path} is not a log of ours", hint="name another --output, or remove it"
            )
        self._file.truncate(len(whole))
        return lines

    def _check(self, old: dict[str, Any], options: dict[str, Any]) -> bool:
        """Whether more is asked for than was. Raises: ConfigError naming the first option that
        differs."""
        differ = [name for name in sorted({*old, *options}) if old.get(name) != options.get(name)]
        if differ == [self._may_grow] and old[differ[0]] < options[differ[0]]:
            return True
        for name in differ:
            raise ConfigError(
                f"{self._path} was begun with {name} {old.get(name)!r}, not {options.get(name)!r}",
                hint="repeat the old options to go on, or name another --output",
            )
        return False

    def _write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def _identity(machine: Mapping[str, Any]) -> dict[str, Any]:
    """Of machine_facts what must not change between the runs of one result."""
    git = machine.get("git") or {}
    device = machine.get("device") or {}
    same = ("cpu_model", "cpu_features", "cpu_count", "cpu_usable_count", "kernel")
    names = {name: machine.get(name) for name in same}
    names["memory in GiB"] = round((machine.get("memory_bytes") or 0) / GIB)
    code = {"commit": git.get("commit"), "uncommitted changes": git.get("dirty")}
    store = {"store on": device.get("path")}
    store["bytes read ahead"] = (device.get("queue") or {}).get("read_ahead_bytes")
    return {**code, **store, **names, **machine.get("versions", {})}


def finished_count(path: Path) -> int:
    """Runs that the log at `path` holds and that are not taken again; 0 where there is none.

    A file that is no log of ours has none: whoever opens it is told.
    """
    try:
        lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    except (OSError, ValueError):
        return 0
    runs = (each for each in lines if isinstance(each, dict) and not _is_head(each))
    return sum(map(_got_through, runs))


def _is_head(line: Any) -> bool:
    return isinstance(line, dict) and line.keys() == {"options", "facts"}


def _got_through(run: dict[str, Any]) -> bool:
    return run.get("error") is None


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """As a reader of the file sees it: tuples are lists, numbers are what JSON makes of them."""
    plain: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return plain
