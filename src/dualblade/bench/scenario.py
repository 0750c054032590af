"""Scenario files: which benchmarks make an experiment, with what settings, and why (in comments).

    title, about, minutes       what it is, what it answers, how long it takes
    device_bytes_per_second     optional: the drive is held to this speed, in all runs
    [defaults]                  settings of all runs that have them
    [[runs]]                    name, benchmark (decode or prefill), maybe a speed of its own, and
                                settings by the names of DecodeBenchOptions or PrefillBenchOptions

What is wrong with a file is told with the file, the run, the key and what would be allowed.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from dualblade.bench.decode import DecodeBenchOptions, plan_decode
from dualblade.bench.prefill import WRITTEN, PrefillBenchOptions, plan_prefill
from dualblade.bench.workload import MMAP, Progress, is_device, is_stored, parse_mode, quiet
from dualblade.errors import ConfigError
from dualblade.units import parse_size

FOLDER = Path(__file__).parent / "scenarios"
"""Those that come with dualblade."""

Options = DecodeBenchOptions | PrefillBenchOptions

BENCHMARKS: dict[str, type[Options]] = {
    "decode": DecodeBenchOptions,
    "prefill": PrefillBenchOptions,
}

_NOT_IN_FILES = {"store", "trace"}
"""Of one machine, or for looking into one run."""

_SPEED = "device_bytes_per_second"

_ROOT: dict[str, type | tuple[type, ...]] = {
    "title": str,
    "about": str,
    "minutes": int,
    _SPEED: (int, str),
}

_TYPES: dict[str, tuple[type, str]] = {
    "int": (int, "a whole number"),
    "str": (str, "text"),
    "bool": (bool, "true or false"),
    "Sequence[str]": (list, "a list of texts"),
    "Mapping[str, Any]": (dict, "a table"),
}
"""Of a setting, by its annotation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One benchmark of a scenario. Its result is NAME.json. `device_bytes_per_second` None:
    the drive as it is."""

    name: str
    benchmark: str
    options: Options
    device_bytes_per_second: int | None = None

    @property
    def run_count(self) -> int:
        """Children that it starts, calibration not counted."""
        if isinstance(self.options, DecodeBenchOptions):
            return len(plan_decode(self.options))
        return len(plan_prefill(self.options))

    @property
    def is_stored(self) -> bool:
        """Whether a mode of it uses the drive."""
        return any(is_stored(mode) for mode in self.options.modes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """An experiment; see the module. `minutes` is about, on 2 cores with a drive of 3 GiB/s."""

    name: str
    title: str
    about: str
    minutes: int
    entries: tuple[Entry, ...]

    @property
    def run_count(self) -> int:
        return sum(entry.run_count for entry in self.entries)

    def on(self, store: Path | None, tell: Progress = quiet) -> Scenario:
        """The same with its KV in this store; what cannot be on a device is left out and told.
        Raises: ConfigError naming a run of which nothing is left."""
        entries = self.entries
        if is_device(store):
            entries = tuple(_on_device(entry, tell) for entry in entries)
        moved = (replace(entry.options, store=store) for entry in entries)
        return replace(
            self,
            entries=tuple(replace(e, options=o) for e, o in zip(entries, moved, strict=True)),
        )

    def only(self, names: Collection[str]) -> Scenario:
        """The same with these entries alone, in the file's order. Raises: ConfigError."""
        known = [entry.name for entry in self.entries]
        for name in names:
            if name not in known:
                raise ConfigError(
                    f"scenario {self.name} has no run {name!r}", hint=_nearest(name, known)
                )
        return replace(self, entries=tuple(e for e in self.entries if e.name in names))


def _on_device(entry: Entry, tell: Progress) -> Entry:
    """What of an entry a store on a device can do; see `check_modes` and `store_state`."""
    options = entry.options
    modes = tuple(mode for mode in options.modes if parse_mode(mode).path != MMAP)
    if not modes:
        raise ConfigError(
            f"run {entry.name} maps files, and the store is a device",
            hint="leave it out (--run NAME takes others), or name a store in a file system",
        )
    if len(modes) < len(options.modes):
        tell(f"{entry.name}: without {MMAP}, which maps files and not a device")
    if isinstance(options, PrefillBenchOptions) and options.store_state != WRITTEN:
        tell(f"{entry.name}: blocks of a device are never fresh: {WRITTEN} ones only")
        options = replace(options, store_state=WRITTEN)
    return replace(entry, options=replace(options, modes=modes))


def scenario_names() -> list[str]:
    """Those that come with dualblade."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def find_scenario(word: str) -> Scenario:
    """The scenario of this name, or of this file (a path ends in .toml). Raises: ConfigError."""
    if word.endswith(".toml"):
        return read_scenario(Path(word))
    names = scenario_names()
    if word not in names:
        raise ConfigError(
            f"unknown scenario {word!r}",
            hint=f"{_nearest(word, names)}; or a file that ends in .toml",
        )
    return read_scenario(FOLDER / f"{word}.toml")


def read_scenario(path: Path) -> Scenario:
    """Raises: ConfigError that names the file, the run and the key."""
    try:
        with path.open("rb") as file:
            told = tomllib.load(file)
    except OSError as exc:
        raise ConfigError(f"cannot read {path}: {exc.strerror}") from exc
    except ValueError as exc:  # a broken encoding is one too
        raise ConfigError(f"{path}: not TOML: {exc}") from exc
    root = {name: value for name, value in told.items() if name not in ("defaults", "runs")}
    _check_keys(path, "", root, {*_ROOT, "defaults", "runs"})
    for name, kind in _ROOT.items():
        if name not in root and name != _SPEED:
            raise ConfigError(f"{path}: {name} is missing")
        if name in root and (isinstance(root[name], bool) or not isinstance(root[name], kind)):
            raise ConfigError(f"{path}: {name} cannot be {root[name]!r}")
    speed = root.get(_SPEED)
    return Scenario(
        name=path.stem,
        title=root["title"],
        about=root["about"],
        minutes=root["minutes"],
        entries=_entries(path, speed, told.get("defaults", {}), told.get("runs", [])),
    )


def _entries(path: Path, speed: Any, defaults: Any, runs: Any) -> tuple[Entry, ...]:
    if not isinstance(defaults, dict):
        raise ConfigError(f"{path}: defaults is a table, [defaults]")
    if not isinstance(runs, list) or not runs or not all(isinstance(run, dict) for run in runs):
        raise ConfigError(f"{path}: runs is missing", hint="write a table [[runs]] for each")
    _check_keys(path, " [defaults]", defaults, {*_settings("decode"), *_settings("prefill")})
    entries: list[Entry] = []
    for number, run in enumerate(runs, start=1):
        entries.append(_entry(path, number, defaults, {_SPEED: speed} | run))
        if entries[-1].name in {entry.name for entry in entries[:-1]}:
            raise ConfigError(f"{path}: two runs have the name {entries[-1].name!r}")
    return tuple(entries)


def _entry(path: Path, number: int, defaults: Mapping[str, Any], run: Mapping[str, Any]) -> Entry:
    name, benchmark = run.get("name"), run.get("benchmark")
    where = f" [[runs]] {number}" + (f" ({name})" if isinstance(name, str) else "")
    if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", name):
        raise ConfigError(
            f"{path}:{where}: name cannot be {name!r}",
            hint="small letters, digits, dots and hyphens: it becomes NAME.json",
        )
    if benchmark not in BENCHMARKS:
        raise ConfigError(
            f"{path}:{where}: benchmark cannot be {benchmark!r}",
            hint=f"use one of: {', '.join(BENCHMARKS)}",
        )
    known = _settings(benchmark)
    given = {key: value for key, value in run.items() if key not in ("name", "benchmark", _SPEED)}
    _check_keys(path, where, given, {*known, _SPEED})
    settings = {key: value for key, value in defaults.items() if key in known} | given
    for key, value in settings.items():
        kind, words = _TYPES[known[key]]
        is_texts = not isinstance(value, list) or all(isinstance(text, str) for text in value)
        if not isinstance(value, kind) or not is_texts or (kind is int and isinstance(value, bool)):
            raise ConfigError(f"{path}:{where}: {key} is {words}, not {value!r}")
    if "model" not in settings:
        raise ConfigError(f"{path}:{where}: model is missing", hint="such as random:opt-1.3b")
    options = _told_in(path, lambda all_: BENCHMARKS[benchmark](**all_), settings, where)
    speed = run[_SPEED]
    if speed is not None:
        speed = _told_in(path, parse_size, speed, where)
    return Entry(name=name, benchmark=benchmark, options=options, device_bytes_per_second=speed)


def _settings(benchmark: str) -> dict[str, str]:
    """Settings of a benchmark in a file, with their annotations."""
    known = fields(BENCHMARKS[benchmark])
    return {field.name: str(field.type) for field in known if field.name not in _NOT_IN_FILES}


def _check_keys(path: Path, where: str, given: Mapping[str, Any], known: set[str]) -> None:
    for key in given:
        if key not in known:
            raise ConfigError(
                f"{path}:{where} unknown key {key!r}", hint=_nearest(key, sorted(known))
            )


def _nearest(word: str, known: Sequence[str]) -> str:
    """The hint for a word that is not one of `known`."""
    near = difflib.get_close_matches(word, known, n=1)
    return (f"did you mean {near[0]!r}? " if near else "") + f"known: {', '.join(known)}"


def _told_in(path: Path, make: Any, value: Any, where: str = "") -> Any:
    """`make(value)`; what it refuses is told with the file and the run."""
    try:
        return make(value)
    except ConfigError as exc:
        raise ConfigError(f"{path}:{where} {exc.message}", hint=exc.hint) from exc
