"""Starting one child of a benchmark and learning how it ended, leaving nothing behind."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from dualblade.host.cgroup import MemoryCgroup

_LET_GO_SECONDS = 15.0
"""For a child that was interrupted to close its cache; then it is killed."""

_COMMAND = [sys.executable, "-P", "-m", "dualblade.bench.child"]  # -P: no module from where we are


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildOutcome:
    """How a child ended: with a result, killed by its memory limit, or with an error in words."""

    result: dict[str, Any]
    oom_killed: bool
    error: str | None


def run_child(payload: dict[str, Any], group: MemoryCgroup | None) -> ChildOutcome:
    """Run a child with these options, in `group` if there is one, and wait for it.

    An exception while waiting (Ctrl-C) interrupts the child, waits for it, then goes on.
    """
    if group is not None:
        payload = {
            **payload,
            "cgroup_directory": str(group.directory),
            "cgroup_version": group.limit.version,
        }
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        # A session of its own: Ctrl-C reaches the parent alone, which then decides.
        pipes: dict[str, Any] = {
            "stdin": subprocess.PIPE,
            "stdout": subprocess.PIPE,
            "stderr": errors,
            "text": True,
            "start_new_session": True,
        }
        child = (
            subprocess.Popen(_COMMAND, **pipes) if group is None else group.popen(_COMMAND, **pipes)
        )
        try:
            out, _ = child.communicate(json.dumps(payload))
        except BaseException:
            stop_child(child)
            raise
        errors.seek(0)
        return _outcome(child.returncode, out, errors.read(), group)


def stop_child(child: subprocess.Popen[str]) -> None:
    """Interrupt `child`, end it if that does not help, and close its pipes."""
    try:
        child.send_signal(signal.SIGINT)
        child.wait(_LET_GO_SECONDS)
    except subprocess.TimeoutExpired:
        pass
    finally:
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                pipe.close()


def _outcome(status: int, out: str, errors: str, group: MemoryCgroup | None) -> ChildOutcome:
    if group is not None and group.was_oom_killed(status):
        return ChildOutcome(result={}, oom_killed=True, error=None)
    told = newest_result(out)
    if status == 0 and told is not None:
        return ChildOutcome(result=told, oom_killed=False, error=None)
    if status == 1 and told is not None and "error" in told:
        return ChildOutcome(result={}, oom_killed=False, error=told["error"])
    said = " ".join(errors.strip().splitlines()[-1:])
    how = f"signal {-status}" if status < 0 else f"status {status}"
    return ChildOutcome(
        result={}, oom_killed=False, error=f"the run ended with {how}: {said or 'no message'}"
    )


def newest_result(out: str) -> dict[str, Any] | None:
    """The newest line that is a result: libraries print at their end, too."""
    for line in reversed(out.splitlines()):
        with suppress(ValueError):
            told = json.loads(line)
            if isinstance(told, dict):
                return told
    return None
