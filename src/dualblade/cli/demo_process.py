"""Starting one run of the demo and following it to its end, leaving nothing behind."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import Any

from dualblade.bench.child_process import newest_result, stop_child
from dualblade.cli.demo_run import DemoRun
from dualblade.cli.output import Reporter
from dualblade.errors import DualBladeError
from dualblade.host.cgroup import MemoryCgroup

_COMMAND = [sys.executable, "-P", "-m", "dualblade.cli.demo_run"]  # -P: no module from where we are


def run_demo_child(options: DemoRun, *, in_cgroup: bool, reporter: Reporter) -> dict[str, Any]:
    """Run one child, in a memory cgroup of its own if asked for, and return its result.

    Raises: DualBladeError when it fails or is killed; on KeyboardInterrupt the child is
            interrupted and awaited first.
    """
    with ExitStack() as stack:
        group = stack.enter_context(MemoryCgroup()) if in_cgroup else None
        if group is not None:
            options = replace(
                options,
                cgroup_directory=str(group.directory),
                cgroup_version=group.limit.version,
            )
        out = stack.enter_context(tempfile.TemporaryFile("w+"))
        # A session of its own: Ctrl-C reaches the parent alone, which then decides.
        pipes: dict[str, Any] = {
            "stdin": subprocess.PIPE,
            "stdout": out,
            "stderr": subprocess.PIPE,
            "text": True,
            "errors": "replace",
            "start_new_session": True,
        }
        start = subprocess.Popen if group is None else group.popen
        child = stack.enter_context(start(_COMMAND, **pipes))
        try:
            said = _follow(child, json.dumps(asdict(options)), reporter)
        except BaseException:
            stop_child(child)
            raise
        out.seek(0)
        result = newest_result(out.read())
        if child.returncode == 0 and result is not None:
            return result
        if result is not None and "error" in result:
            raise DualBladeError(f"path {options.path}: {result['error']}", hint=result["hint"])
        if group is not None and group.was_oom_killed(child.returncode):
            raise DualBladeError(
                f"path {options.path}: killed for want of memory",
                hint="give it a larger --memory-budget",
            )
        raise DualBladeError(
            f"path {options.path}: the run ended with status {child.returncode}: {said}"
        )


def _follow(child: subprocess.Popen[str], options: str, reporter: Reporter) -> str:
    """Pass progress on until the child ends; what it said last."""
    assert child.stdin is not None
    assert child.stderr is not None
    child.stdin.write(options)
    child.stdin.close()
    said = "no message"
    for line in child.stderr:
        if line.startswith("%"):
            reporter.fraction(float(line[1:]))
        elif line.strip():
            said = line.strip()
            reporter.tell(said)
    child.wait()
    return said
