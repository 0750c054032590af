"""How commands end by signals."""

from __future__ import annotations

import os
import signal
import time

import pytest

from dualblade.cli.command import Terminated, ending_at_signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_ends_us_is_an_exception_unless_it_is_ignored(number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with pytest.raises(Terminated) as ended, ending_at_signals():
            os.kill(os.getpid(), number)
            time.sleep(5)
        assert ended.value.status == 128 + number
        assert signal.getsignal(number) is signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN)  # as nohup leaves it
        with ending_at_signals():
            os.kill(os.getpid(), number)
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before or signal.SIG_DFL)
