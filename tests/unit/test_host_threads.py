"""How threads wait is set where nobody decided, and left alone where somebody did."""

from __future__ import annotations

import pytest

from dualblade.host import threads
from dualblade.host.threads import wait_briefly


@pytest.mark.parametrize(
    ("model", "spins"),
    [
        ("AMD EPYC", "3000"),
        ("Intel(R) Xeon(R)", "1000"),
        ("Raspberry Pi 5", "1000"),
        (None, "1000"),
    ],
)
def test_threads_spin_for_as_long_as_waking_takes(
    monkeypatch: pytest.MonkeyPatch, model: str | None, spins: str
) -> None:
    monkeypatch.setattr(threads, "cpu_model", lambda: model)
    environment: dict[str, str] = {}
    assert wait_briefly(environment)
    assert environment == {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": spins}
    assert not wait_briefly(environment)


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT"])
def test_what_the_user_set_stays(name: str) -> None:
    environment = {name: "his"}
    assert not wait_briefly(environment)
    assert environment == {name: "his"}
