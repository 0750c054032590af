"""How threads wait is set where nobody decided, and left alone where somebody did."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from dualblade import wait_briefly


def test_threads_spin_for_a_while_and_then_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    environment: dict[str, str] = {}
    assert wait_briefly(environment)
    assert environment == {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "1000"}
    assert not wait_briefly(environment)


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT"])
def test_what_the_user_set_stays(name: str) -> None:
    environment = {name: "his"}
    assert not wait_briefly(environment)
    assert environment == {name: "his"}


def test_too_late_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", object())
    with pytest.warns(UserWarning, match="before torch is imported"):
        assert wait_briefly({}), "children heed it"
    assert not wait_briefly({"OMP_WAIT_POLICY": "his"}), "nothing to tell"


def test_the_command_lets_them_spin_for_as_long_as_waking_takes() -> None:
    program = """
import os
from dualblade.cli import app as command
command.app = lambda **_: print(os.environ["GOMP_SPINCOUNT"], os.environ["OMP_WAIT_POLICY"])
command.main()
"""
    free = {name: value for name, value in os.environ.items() if "OMP_" not in name}
    done = subprocess.run(
        [sys.executable, "-c", program], env=free, capture_output=True, text=True, check=True
    )
    assert done.stdout == "1000 passive\n"
