"""The runs of a benchmark one after another: each kept when it is done, with what is left to do."""

from __future__ import annotations

import contextlib
import fcntl
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from dualblade.bench.fio import FioYardstick, find_fio
from dualblade.bench.run_log import RunLog
from dualblade.bench.workload import Progress, Workload, is_device, is_stored, quiet, store_place
from dualblade.config import EngineConfig
from dualblade.errors import Unsupported
from dualblade.store.backing import cache_folder
from dualblade.units import MIB

P = TypeVar("P")
Run = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """Who looks on.

    progress    is told a line when something begins or ends.
    log_path    keeps each finished run, so that the same call goes on after an interruption; None:
                nothing is kept.
    following   runs of other benchmarks that come after these: part of the time left.
    device_bytes_per_second   what the drive is held to; None: nothing. Runs at another speed are
                others.
    """

    progress: Progress = quiet
    log_path: Path | None = None
    following: int = 0
    device_bytes_per_second: int | None = None


@contextlib.contextmanager
def opened_log(
    watch: Watch, options: Mapping[str, Any], find_facts: Callable[[], Mapping[str, Any]]
) -> Iterator[RunLog]:
    """The log of these options, of which more `repeats` may be asked; a private one that is gone
    afterwards when nothing is kept. Raises: ConfigError, see RunLog."""
    with contextlib.ExitStack() as stack:
        path = watch.log_path
        if path is None:
            path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "runs.jsonl"
        asked = {**options, "device_bytes_per_second": watch.device_bytes_per_second}
        yield stack.enter_context(RunLog(path, asked, find_facts, may_grow="repeats"))


def in_turn(modes: Sequence[str], repeat: int) -> tuple[str, ...]:
    """The modes in the order of one repeat: forwards and backwards in turn, each pair of repeats
    from another mode on. So none comes after the same one, or last, in all."""
    first = repeat // 2 % len(modes)
    order = (*modes[first:], *modes[:first])
    return order[::-1] if repeat % 2 else order


def run_all(
    log: RunLog,
    watch: Watch,
    *,
    next_run: Callable[[Sequence[Run]], P | None],
    run: Callable[[P], Run],
    total: Callable[[Sequence[Run]], int],
    told: Callable[[Run], str],
) -> None:
    """Run what the log lacks. `next_run` and `total` are asked with the runs that are done, after
    each: what comes may depend on what was. The estimate is by the median of the runs so far.

    Raises: what `run` raises; KeyboardInterrupt. The finished runs are in the log.
    """
    try:
        with _telling_of_others(watch.progress):
            while (planned := next_run(log.runs)) is not None:
                started = time.monotonic()
                done = run(planned)
                log.append({**done, "wall_seconds": round(time.monotonic() - started, 1)})
                left = max(0, total(log.runs) - len(log.runs))
                seconds = statistics.median(each["wall_seconds"] for each in log.runs)
                watch.progress(
                    f"{len(log.runs)} of {len(log.runs) + left}: {told(done)}; "
                    f"{_time_left(seconds * (left + watch.following))}"
                )
    except KeyboardInterrupt:
        if watch.log_path is not None:
            watch.progress(f"{len(log.runs)} runs are kept; the same command goes on from there")
        raise


@contextlib.contextmanager
def _telling_of_others(tell: Progress) -> Iterator[None]:
    """Say at once if another benchmark of this user is under way: they would measure each other,
    and put back each other's read-ahead."""
    try:
        place = os.open(cache_folder(), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:  # nowhere to see each other
        yield
        return
    try:
        try:
            fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            tell("warning: another benchmark is under way, and both will measure each other")
        yield
    finally:
        os.close(place)


def _time_left(seconds: float) -> str:
    if seconds >= 90:
        return f"about {seconds / 60:.0f} minutes left"
    return f"about {seconds:.0f} s left" if seconds else "done"


@dataclass(frozen=True, slots=True)
class Plan(Generic[P]):
    """What is to be run, in its order, when that does not depend on what is measured. `planned`
    tells which of `all` a run is."""

    all: Sequence[P]
    planned: Callable[[Run], P]

    def next_run(self, done: Sequence[Run]) -> P | None:
        """The first that has not been run; None: all have. One may be planned more than once."""
        were = [self.planned(run) for run in done]
        for each in self.all:
            if each not in were:
                return each
            were.remove(each)
        return None

    def in_order(self, done: Sequence[Run]) -> list[Run]:
        """As planned: a run that was taken again after an error came later than its place."""
        return sorted(done, key=lambda run: self.all.index(self.planned(run)))


class FioBeside:
    """fio just before a stored run, with our chunk and depth, on a file of 1 GiB or as large as the
    KV where that is less (512 MiB where no limit made it known): drives change speed within
    minutes. Of None: no fio."""

    def __init__(self, fio: FioYardstick | None) -> None:
        self._fio = fio

    def measure(self, mode: str) -> dict[str, Any]:
        """What a run of `mode` keeps of it: the account, and of that the speed; None for a mode
        that does not read."""
        account = self._fio.measure() if self._fio is not None and is_stored(mode) else None
        speed = None if account is None else account["read_bytes_per_second"]
        return {"fio": account, "fio_read_bytes_per_second": speed}


def require_fio(store: Path | None) -> None:
    """Raises: Unsupported when fio is missing, or has nothing to read beside this store.

    On a device it would have to read the store's own blocks, and those that hold nothing are read
    faster than any KV.
    """
    find_fio()
    if is_device(store):
        raise Unsupported(
            f"fio reads a file beside the store, and {store} is a device",
            hint="compare on a file system, or without fio",
        )


@contextlib.contextmanager
def fio_beside(
    workload: Workload, calibration: Mapping[str, Any] | None, *, asked: bool
) -> Iterator[FioBeside]:
    """The yardstick; of nothing when not `asked`. Raises: Unsupported, see require_fio."""
    if not asked:
        yield FioBeside(None)
        return
    require_fio(workload.store)
    engine = EngineConfig.from_mapping(workload.engine)
    with FioYardstick(
        store_place(workload.store),
        size_bytes=calibration["kv_bytes"] if calibration is not None else 512 * MIB,
        chunk_bytes=engine.chunk_bytes,
        queue_depth=engine.queue_depth,
    ) as fio:
        yield FioBeside(fio)


def median(values: Sequence[float]) -> float | None:
    """None of nothing."""
    return statistics.median(values) if values else None


def spread(values: Sequence[float]) -> list[float] | None:
    """Least and most; None of nothing."""
    return [min(values), max(values)] if values else None


def median_of(runs: Sequence[Run], name: str) -> float | None:
    """Over the runs that have it."""
    return median([run[name] for run in runs if run[name] is not None])


def spread_of(runs: Sequence[Run], name: str) -> list[float] | None:
    """Over the runs that have it: least and most."""
    return spread([run[name] for run in runs if run[name] is not None])
