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

from dualblade.config import PipelineMode
from dualblade.pipeline.tuner import Setting, StepTimes, Tuner

SLOT_BYTES = 4 << 20
STEP_BYTES = 1 << 30
LAYERS = 16


@dataclass
class Machine:
    """`spread`: how much slower the drive is for each slot. Times in seconds, of a whole step."""

    compute: float
    drive: float
    spread: float = 0.0
    noise: float = 0.0
    share_read: float = 1.0
    random: random.Random = field(default_factory=lambda: random.Random(1))

    def drive_seconds(self, slots: int) -> float:
        return self.drive * (1 + self.spread * slots)

    def times(self, slots: int) -> StepTimes:
        """A layer computes while the slots fill; then the drive waits for one to come free."""
        reading = self.drive_seconds(slots)
        fill = slots * SLOT_BYTES / STEP_BYTES * reading
        idle = max(0.0, min(self.compute, self.drive) / LAYERS - fill) * LAYERS
        took = max(self.compute, reading + idle)
        noise = 1 + self.random.uniform(-self.noise, self.noise)
        return step(
            seconds=took * noise,
            idle_seconds=(took - reading) * noise,
            stalled_seconds=(took - self.compute) * noise,
            slots_read=self.share_read * STEP_BYTES / SLOT_BYTES,
        )

    def step(self, slots: int) -> float:
        return self.times(slots).seconds

    def best(self, slots_max: int) -> float:
        quiet = Machine(self.compute, self.drive, self.spread)
        return min(quiet.step(slots) for slots in range(4, slots_max + 1))


def tuned(slots: int, first: int = 6) -> tuple[Tuner, list[tuple[int, int, str]]]:
    events: list[tuple[int, int, str]] = []
    tuner = Tuner(
        "auto",
        slots=slots,
        slots_first=first,
        lookahead=4,
        tell=lambda *event: events.append(event),
    )
    tuner.step(step())  # the first has none before it
    return tuner, events


def step(rows: int = 1, tokens: int = 4096, **times: float) -> StepTimes:
    told = {"seconds": 1.0, "idle_seconds": 0.1, "stalled_seconds": 0.4, "slots_read": 256, **times}
    return StepTimes(rows=rows, tokens=tokens, layers=LAYERS, **told)


def run(tuner: Tuner, machine: Machine, steps: int) -> list[float]:
    seconds = []
    for _ in range(steps):
        times = machine.times(tuner.setting.slots)
        seconds.append(times.seconds)
        tuner.step(times)
    return seconds


machines = st.builds(
    Machine,
    compute=st.floats(0.05, 1.0),
    drive=st.floats(0.05, 1.0),
    spread=st.sampled_from([0.0, 0.001, 0.004]),
    noise=st.sampled_from([0.0, 0.005]),
)


@settings(max_examples=200, deadline=None)
@given(machine=machines, slots=st.integers(2, 60), first=st.integers(1, 60))
def test_it_comes_to_rest_and_loses_little(machine: Machine, slots: int, first: int) -> None:
    tuner, events = tuned(slots, first)
    run(tuner, machine, 70)
    settled, found = tuner.setting, len(events)
    assert found <= 10, "a search takes some tries"
    run(tuner, machine, 30)  # it rests for 100, after 12 at the earliest
    assert (tuner.setting, len(events)) == (settled, found), "it does not rest"
    assert min(4, slots) <= settled.slots <= slots
    quiet = Machine(machine.compute, machine.drive, machine.spread)
    allowed = 1.02 * (1 + machine.noise) ** 2 / (1 - machine.noise)
    # No slower than where it began, nor than what starved it less.
    assert quiet.step(settled.slots) <= allowed * quiet.step(min(slots, max(4, first)))
    times = quiet.times(settled.slots)
    if settled.slots < slots and times.starved_fraction > 0.04:
        more = min(slots, settled.slots + (settled.slots + 1) // 2)
        assert times.seconds <= (1.02 + 3 * machine.noise) * quiet.step(more)


def test_where_compute_is_the_limit_memory_is_left_alone() -> None:
    tuner, events = tuned(20, first=20)
    run(tuner, Machine(compute=1.0, drive=0.1), 100)
    assert tuner.setting.slots == 4
    assert [event[:2] for event in events] == [(20, 13), (13, 8), (8, 5), (5, 4)]


def test_where_the_drive_would_stand_still_it_takes_what_is_needed() -> None:
    """A layer computes while 14.4 slots are filled: found at once, from what was missed."""
    machine = Machine(compute=0.9, drive=1.0)
    tuner, events = tuned(40)
    run(tuner, machine, 100)
    assert [event[:2] for event in events] == [(6, 15)]
    assert machine.step(tuner.setting.slots) <= 1.02 * machine.best(40)
    assert all("stood still" in event[2] for event in events)


def test_more_that_gains_nothing_is_given_back() -> None:
    """A drive that computing slows down stands still, and is none the faster for more slots."""
    tuner, events = tuned(18)
    for _ in range(100):
        tuner.step(step())
    assert [event[:2] for event in events] == [(6, 9), (9, 6)]
    assert "no shorter with 9" in events[-1][2]


def test_steps_of_seconds_tell_each_by_itself() -> None:
    """Who waits seconds for a token does not wait for medians of five."""
    tuner, events = tuned(40)
    machine = Machine(compute=3.6, drive=4.0)
    run(tuner, machine, 2)
    assert [event[:2] for event in events] == [(6, 15)]
    run(tuner, machine, 1)
    assert machine.step(tuner.setting.slots) <= 1.02 * machine.best(40)
    assert len(events) == 1, "and it rests"


def test_a_drive_that_stood_still_all_the_time_asks_for_no_more_than_there_is() -> None:
    tuner, events = tuned(18)
    for _ in range(2):
        tuner.step(step(seconds=4.0, idle_seconds=4.0, stalled_seconds=4.0))
    assert [event[:2] for event in events] == [(6, 18)]


def test_searches_become_rare() -> None:
    """Over a long time a search is a few steps in thousands: it does not oscillate."""
    tuner, events = tuned(24, first=24)
    run(tuner, Machine(compute=0.5, drive=0.5, noise=0.01), 20_000)
    assert len(events) <= 4 * 10, "looks after 100, 200, 400 ... 3200, 3200 steps"


def test_other_work_is_noticed() -> None:
    tuner, _ = tuned(40)
    run(tuner, Machine(compute=1.0, drive=0.1), 100)
    assert tuner.setting.slots == 4
    other = Machine(compute=1.8, drive=2.0)
    run(tuner, other, 40)
    assert other.step(tuner.setting.slots) <= 1.02 * other.best(40)


def test_another_text_begins_no_try_of_the_last_one() -> None:
    """Six slots were being tried when it ended: its steps say nothing of the next one's."""
    machine = Machine(compute=0.5, drive=1.0)
    tuner, events = tuned(20, first=10)
    run(tuner, machine, 7)
    assert tuner.setting.slots == 6
    tuner.restart()
    assert tuner.setting.slots == 10
    assert "text ended" in events[-1][2]
    for _ in range(8):  # of a text half as long
        tuner.step(Machine(compute=0.25, drive=0.5).times(tuner.setting.slots))
    assert events[-1][:2] == (10, 6), "compared with steps of its own"
    run(tuner, Machine(compute=0.25, drive=0.5), 60)
    settled, found = tuner.setting, len(events)
    tuner.restart()
    assert (tuner.setting, len(events)) == (settled, found), "what was found stays"


def test_a_prompt_teaches_nothing() -> None:
    """Its steps grow with the context, by as much as a wrong setting costs."""
    tuner, events = tuned(18, first=10)
    for chunk in range(1, 20):
        tuner.step(step(rows=512, tokens=512 * chunk, seconds=3.0 + 0.1 * chunk))
    assert events == []
    run(tuner, Machine(compute=1.0, drive=0.1), 7)
    assert [event[:2] for event in events] == [(10, 6)], "decoding is searched from the start"


def test_after_a_long_prompt_it_begins_anew() -> None:
    tuner, events = tuned(18, first=10)
    for _ in range(9):
        tuner.step(step(rows=512, tokens=1 << 20, idle_seconds=0.0))
    assert tuner.setting.slots == 4
    tuner.step(step(tokens=1 << 20))
    tuner.step(step(tokens=1 << 20))
    assert tuner.setting.slots == 10
    assert "steps of 1 rows are other work" in events[-1][2]


@pytest.mark.parametrize("candidates", [10, 40])
def test_candidates_do_not_disturb_it(candidates: int) -> None:
    """Steps of one row and, now and then, of many: only pairs of the same are looked at."""
    tuner, events = tuned(18, first=10)
    machine = Machine(compute=1.0, drive=0.1)
    for _ in range(30):
        run(tuner, machine, 5)
        tuner.step(step(rows=1 + candidates, tokens=1 << 20))
    assert [event[:2] for event in events] == [(10, 6), (6, 4)]


@pytest.mark.parametrize(
    ("mode", "setting"),
    [
        ("serial", Setting(slots=1, lookahead=0)),
        ("key-value", Setting(slots=2, lookahead=0)),
        ("tiled", Setting(slots=12, lookahead=0)),
        ("layers", Setting(slots=12, lookahead=4)),
    ],
)
def test_a_forced_mode_stays(mode: PipelineMode, setting: Setting) -> None:
    events: list[tuple[int, int, str]] = []
    tuner = Tuner(
        mode, slots=12, slots_first=6, lookahead=4, tell=lambda *event: events.append(event)
    )
    run(tuner, Machine(compute=0.1, drive=0.5, noise=0.3), 300)
    assert tuner.setting == setting
    assert events == []


# What slots cost on a drive that gains from many (decision 0009): milliseconds of a step.
_MANY_SLOTS = {4: 360, 5: 340, 6: 321, 7: 305, 8: 296, 9: 290, 10: 290, 11: 290, 12: 290}


def of_many_slots(tuner: Tuner, steps: int, *, longer: dict[int, float] | None = None) -> None:
    for number in range(steps):
        seconds = _MANY_SLOTS[tuner.setting.slots] / 1000
        extra = (longer or {}).get(number, 0.0)
        tuner.step(step(seconds=seconds + extra, idle_seconds=0.001 + extra, stalled_seconds=0.1))


def test_steps_that_read_nothing_teach_nothing() -> None:
    """All was cached for a while: four slots were as good as ten. Then memory fell."""
    tuner, events = tuned(12, first=10)
    for _ in range(200):
        tuner.step(step(seconds=0.11, idle_seconds=0.11, stalled_seconds=0.0, slots_read=0))
    assert events == []
    of_many_slots(tuner, 60)
    assert tuner.setting.slots >= 9


def test_where_much_more_is_read_it_begins_anew() -> None:
    tuner, events = tuned(12, first=10)
    for _ in range(60):
        tuner.step(step(seconds=0.11, idle_seconds=0.1, stalled_seconds=0.0, slots_read=20))
    assert tuner.setting.slots == 4
    of_many_slots(tuner, 60)
    assert tuner.setting.slots >= 9
    assert any("read so much" in event[2] for event in events)


def test_a_pause_in_the_first_steps_is_no_measure() -> None:
    """The program was stopped for a while, or the machine slept."""
    tuner, _ = tuned(12, first=10)
    of_many_slots(tuner, 80, longer={2: 10.0})
    assert tuner.setting.slots >= 9
