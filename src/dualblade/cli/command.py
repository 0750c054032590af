"""What all commands share: how a failure becomes one or two lines and an exit status.

0 done; 1 the work failed; 2 bad usage; 129 the terminal was closed; 130 interrupted; 143
terminated. A traceback only with --debug.
"""

from __future__ import annotations

import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType
from typing import Any

import typer
from typer.core import TyperCommand

from dualblade.errors import ConfigError, DualBladeError

FAILED, BAD_USAGE, INTERRUPTED = 1, 2, 130


class Terminated(KeyboardInterrupt):
    """SIGTERM, from a service manager or `timeout`, or SIGHUP, from a terminal that is closed: all
    ends as after Ctrl-C."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.status = 128 + number


def _terminate(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001
    raise Terminated(signum)


@contextmanager
def ending_at_signals() -> Iterator[None]:
    """Within, SIGTERM and SIGHUP end what there is to end, as Ctrl-C does. Raises: Terminated."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are for the main thread alone
        return
    with ExitStack() as stack:
        for number in (signal.SIGTERM, signal.SIGHUP):
            before = signal.getsignal(number)
            if before is not signal.SIG_IGN:  # as nohup wants it
                signal.signal(number, _terminate)
                stack.callback(signal.signal, number, before or signal.SIG_DFL)
        yield


class Command(TyperCommand):
    """A command whose errors are told shortly. All its `with` blocks have ended by then."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with ending_at_signals():
                return super().invoke(ctx)
        except Terminated as exc:
            _tell("terminated")
            raise typer.Exit(exc.status) from None
        except KeyboardInterrupt:
            _tell("interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except Exception as exc:
            if _is_usage_error(exc):
                raise
            if ctx.params.get("debug"):
                traceback.print_exc()
            elif isinstance(exc, DualBladeError):
                _tell(f"error: {exc}")
            else:
                told = " ".join(str(exc).split())[:300] or "no message"
                _tell(f"error: {type(exc).__name__}: {told}\nthis is unexpected; see --debug")
            status = BAD_USAGE if isinstance(exc, ConfigError) else FAILED
            raise typer.Exit(status) from exc


def _is_usage_error(exc: Exception) -> bool:
    """An error that the option parser tells of itself; its class moved between typer versions."""
    return hasattr(exc, "exit_code") and hasattr(exc, "format_message")


def _tell(text: str) -> None:
    with suppress(OSError):  # the terminal may be gone
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
