"""The tuner against pipelines in arithmetic: it comes to rest, stays there, and loses little.

A step is the longest of its stages, the drive slower the more slots go round, plus what the drive
stands still because too little was read ahead while the model computed.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualblade.pipeline.tuner import Mode, Setting, Tuner

SLOT_BYTES = 4 << 20
LAYERS = 16


@dataclass
class Machine:
    """`spread`: how much slower the drive is for each slot. Times in seconds, of a whole step."""

    compute: float
    drive: float
    spread: float = 0.0
    noise: float = 0.0
    random: random.Random = field(default_factory=lambda: random.Random(1))

    def drive_seconds(self, slots: int) -> float:
        return self.drive * (1 + self.spread * slots)

    def step(self, slots: int) -> float:
        """A layer computes while the slots fill; then the drive waits for one to come free."""
        total_bytes = 1 << 30
        fill = slots * SLOT_BYTES / total_bytes * self.drive_seconds(slots)
        idle = max(0.0, min(self.compute, self.drive) / LAYERS - fill) * LAYERS
        exact = max(self.compute, self.drive_seconds(slots) + idle)
        return exact * (1 + self.random.uniform(-self.noise, self.noise))

    def best(self, slots_max: int) -> float:
        quiet = Machine(self.compute, self.drive, self.spread)
        return min(quiet.step(slots) for slots in range(4, slots_max + 1))


def tuned(slots: int) -> tuple[Tuner, list[tuple[int, int, str]]]:
    events: list[tuple[int, int, str]] = []
    tuner = Tuner(Mode.AUTO, slots=slots, lookahead=4, tell=lambda *event: events.append(event))
    return tuner, events


def run(tuner: Tuner, machine: Machine, steps: int) -> list[float]:
    seconds = []
    for _ in range(steps):
        seconds.append(machine.step(tuner.setting.slots))
        tuner.step(seconds[-1])
    return seconds


machines = st.builds(
    Machine,
    compute=st.floats(0.05, 1.0),
    drive=st.floats(0.05, 1.0),
    spread=st.sampled_from([0.0, 0.001, 0.004]),
    noise=st.sampled_from([0.0, 0.005]),
)


@settings(max_examples=200, deadline=None)
@given(machine=machines, slots=st.integers(2, 60))
def test_it_comes_to_rest_and_loses_little(machine: Machine, slots: int) -> None:
    tuner, events = tuned(slots)
    run(tuner, machine, 80)
    settled = tuner.setting
    found = len(events)
    assert found <= 14, "a search takes a dozen tries"
    run(tuner, machine, 30)  # it rests for 100, after 12 at the earliest
    assert (tuner.setting, len(events)) == (settled, found), "it does not rest"
    assert min(4, slots) <= settled.slots <= slots
    quiet = Machine(machine.compute, machine.drive, machine.spread)
    allowed = 1.02 * (1 + machine.noise) ** 2 / (1 - machine.noise)
    # As fast as the best of the settings that a search by quarters meets.
    assert quiet.step(settled.slots) <= allowed * quiet.step(slots)


@settings(max_examples=100, deadline=None)
@given(machine=machines, slots=st.integers(8, 60))
def test_the_bottleneck_is_kept_busy(machine: Machine, slots: int) -> None:
    """What the longest stage needs is no less than what it needed with all slots."""
    tuner, _ = tuned(slots)
    run(tuner, machine, 100)
    took = Machine(machine.compute, machine.drive, machine.spread).step(tuner.setting.slots)
    longest = max(machine.compute, machine.drive_seconds(tuner.setting.slots))
    with_all = Machine(machine.compute, machine.drive, machine.spread)
    idle_with_all = with_all.step(slots) - max(machine.compute, machine.drive_seconds(slots))
    assert took - longest <= idle_with_all + 0.04 * took


def test_where_compute_is_the_limit_memory_is_left_alone() -> None:
    tuner, events = tuned(20)
    run(tuner, Machine(compute=1.0, drive=0.1), 100)
    assert tuner.setting.slots == 4
    assert [event[:2] for event in events] == [(20, 15), (15, 11), (11, 8), (8, 6), (6, 4)]


def test_where_the_drive_would_stand_still_it_keeps_what_it_needs() -> None:
    machine = Machine(compute=0.9, drive=1.0)
    tuner, events = tuned(20)
    run(tuner, machine, 100)
    assert machine.step(tuner.setting.slots) <= 1.02 * machine.best(20)
    assert machine.step(tuner.setting.slots * 3 // 4) > 1.02 * machine.best(20)
    assert "longer with fewer" in events[-1][2]


def test_searches_become_rare() -> None:
    """Over a long time a search is a few steps in thousands: it does not oscillate."""
    tuner, events = tuned(24)
    run(tuner, Machine(compute=0.5, drive=0.5, noise=0.01), 20_000)
    searches = sum("look again" in event[2] for event in events)
    assert searches <= 10, "after 100, 200, 400 ... 3200, 3200 steps"
    assert len(events) <= 12 * (searches + 1)


def test_other_work_is_noticed() -> None:
    tuner, events = tuned(20)
    run(tuner, Machine(compute=1.0, drive=0.1), 100)
    assert tuner.setting.slots == 4
    slower = Machine(compute=1.0, drive=3.0)
    run(tuner, slower, 100)
    assert slower.step(tuner.setting.slots) <= 1.02 * slower.step(20)
    assert any("another time" in event[2] for event in events)


@pytest.mark.parametrize(
    ("mode", "setting"),
    [
        (Mode.SERIAL, Setting(slots=1, lookahead=0)),
        (Mode.KEY_VALUE, Setting(slots=2, lookahead=0)),
        (Mode.TILED, Setting(slots=12, lookahead=0)),
        (Mode.LAYERS, Setting(slots=12, lookahead=4)),
    ],
)
def test_a_forced_mode_stays(mode: Mode, setting: Setting) -> None:
    events: list[tuple[int, int, str]] = []
    tuner = Tuner(mode, slots=12, lookahead=4, tell=lambda *event: events.append(event))
    run(tuner, Machine(compute=0.1, drive=0.5, noise=0.3), 300)
    assert tuner.setting == setting
    assert events == []
