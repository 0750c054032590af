"""One run of bench decode or prefill, in a process of its own: options as JSON on stdin, result on
stdout.

    python -m dualblade.bench.child < options.json
"""

from __future__ import annotations

import json
import sys
from typing import Any

from dualblade.bench.child_run import ChildOptions, calibrate, load
from dualblade.bench.decode_child import run
from dualblade.bench.prefill_child import prefill
from dualblade.errors import BudgetError, DualBladeError
from dualblade.host.process import die_with_parent


def _warm(options: ChildOptions) -> dict[str, Any]:
    """Loads, so that files are cached."""
    load(options)
    return {}


_TASKS = {"run": run, "prefill": prefill, "calibrate": calibrate, "warm": _warm}


def _failure(exc: DualBladeError) -> dict[str, Any]:
    failure = {"error": str(exc).replace("\n", ": "), "error_kind": type(exc).__name__}
    if isinstance(exc, BudgetError):
        return {**failure, "needed_bytes": exc.needed_bytes}
    return failure


def main() -> int:
    """Exit status 0: a result on stdout; 1: an error there; 130: interrupted."""
    die_with_parent()
    options = ChildOptions(**json.loads(sys.stdin.read()))
    out, sys.stdout = sys.stdout, sys.stderr  # whatever libraries print is not the result
    status = 0
    try:
        result = _TASKS[options.task](options)
    except DualBladeError as exc:
        result, status = _failure(exc), 1
    except KeyboardInterrupt:
        return 130
    out.write(json.dumps(result) + "\n")
    out.flush()
    return status


if __name__ == "__main__":
    sys.exit(main())
