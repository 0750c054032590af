"""The pieces of bench decode that need no model."""

from __future__ import annotations

import contextlib
import errno
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dualblade.bench import child_run, decode, decode_child, decode_rows, figures, workload
from dualblade.bench.child_process import ChildOutcome
from dualblade.bench.child_run import ChildOptions
from dualblade.bench.decode import DecodeBenchOptions, plan_decode, run_decode_bench
from dualblade.bench.decode_child import Steps
from dualblade.bench.decode_rows import LayerShape, RandomRows, fill, kv_bytes, whole_layer
from dualblade.bench.decode_run import DecodeWorkload, one_run
from dualblade.bench.envelope import EnvelopeOptions, run_envelope
from dualblade.bench.fio import FioYardstick
from dualblade.bench.prefill import PrefillBenchOptions, run_prefill_bench
from dualblade.bench.report import write_report
from dualblade.bench.workload import LeftForCache, Limit, parse_limit, parse_mode, static_percent
from dualblade.cli.bench_decode import _decode_row
from dualblade.errors import BudgetError, ConfigError, NoSpace, StorageError, Unsupported
from dualblade.host.cgroup import MemoryLimit
from dualblade.host.process import ProcessIO
from dualblade.io import open_engine
from dualblade.store import Door, Store
from dualblade.store.format import DATA_OFFSET
from dualblade.units import GIB, MIB

NARROW = LayerShape(kv_heads=2, key_dim=16, value_dim=8, item_bytes=2, grows=True)
SLIDING = LayerShape(kv_heads=2, key_dim=16, value_dim=8, item_bytes=2, grows=False)
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.25", 0.25),
        ("25%", 0.25),
        ("110%", 1.1),
        ("1", 1.0),
        ("1.1", 1.1),  # of results that were kept
        ("4096B", 4096),
        ("2GiB", 2 * GIB),
        ("1.5G", 3 * GIB // 2),
        ("+2GiB", LeftForCache(2 * GIB)),
        ("none", None),
    ],
)
def test_a_limit_is_a_size_or_a_fraction(text: str, value: float | LeftForCache | None) -> None:
    parsed = parse_limit(text)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize("text", ["25", "4", "1.5", "4294967296"])
def test_a_number_without_its_unit_is_refused(text: str) -> None:
    """25 was 25 bytes, and 4 was four times the KV."""
    for make in (
        lambda: DecodeBenchOptions(model="random:llama", memory_limits=(text,)),
        lambda: PrefillBenchOptions(model="random:llama", memory_limits=(text,)),
        lambda: EnvelopeOptions(limits=(text,)),
    ):
        with pytest.raises(ConfigError, match=f"write {text}% for a part of the KV"):
            make()
    DecodeBenchOptions(model="random:llama", memory_limits=("1", "0.25", "150%", "4096B", "none"))


@pytest.mark.parametrize("text", ["", "half", "-1", "25 %%", "2XiB", "+half"])
def test_what_is_no_limit(text: str) -> None:
    with pytest.raises(ConfigError, match="not a memory limit"):
        parse_limit(text)


@pytest.mark.parametrize(
    "wrong",
    [
        {"modes": ("dual", "mmap-ish")},
        {"modes": ()},
        {"modes": ("dual+pipeline",)},
        {"modes": ("dual+pipeline=quick",)},
        {"modes": ("dual+attention=none",)},
        {"batch": 0},
        {"context": 0},
        {"steps": 0},
        {"repeats": 0},
        {"warmup_steps": -1},
        {"memory_limits": ("much",)},
        {"memory_budget": "12XB"},
        {"dtype": "bf16"},
        {"engine": {"queue_dept": 8}},
    ],
)
def test_wrong_options_are_config_errors(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        DecodeBenchOptions(model="random:llama", **wrong)


def test_a_static_mode_is_dual_with_a_percentage(monkeypatch: pytest.MonkeyPatch) -> None:
    for mode, percent in (
        ("static-0", 0),
        ("static-100", 100),
        ("static-101", None),
        ("dual", None),
    ):
        assert static_percent(mode) == percent
    given: list[dict[str, Any]] = []

    def child(payload: dict[str, Any], _group: object) -> ChildOutcome:
        given.append(payload)
        return ChildOutcome(result={}, oom_killed=False, error="not run")

    monkeypatch.setattr(workload, "run_child", child)
    nothing = Limit(asked=None, limit_bytes=None, budget="auto")
    run = one_run(DecodeWorkload(model="random:llama"), "static-40", nothing)
    assert run["mode"] == "static-40"
    assert (given[0]["mode"], given[0]["engine"]) == ("dual", {"cache_percent": 40})


@pytest.mark.parametrize("value", ["much", "0", "1KiB"])
def test_the_drive_does_not_read_ahead_by_anything(value: str) -> None:
    with pytest.raises(ConfigError):
        parse_mode(f"mmap+read_ahead={value}")


def test_the_drive_reads_ahead_as_a_mode_wants_it_while_it_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Any] = []

    @contextlib.contextmanager
    def ahead(_folder: Path, size_bytes: int) -> Iterator[None]:
        seen.append(size_bytes)
        yield
        seen.append("as it was")

    def child(payload: dict[str, Any], _group: object) -> ChildOutcome:
        seen.append((payload["mode"], payload["engine"]))
        return ChildOutcome(result={}, oom_killed=False, error="not run")

    monkeypatch.setattr(workload, "reading_ahead", ahead)
    monkeypatch.setattr(workload, "run_child", child)
    shape = DecodeWorkload(model="random:llama")
    nothing = Limit(asked=None, limit_bytes=None, budget="auto")
    run = one_run(shape, "mmap+read_ahead=1MiB", nothing)
    assert run["mode"] == "mmap+read_ahead=1MiB"
    one_run(shape, "mmap", nothing)
    assert seen == [MIB, ("mmap", {}), "as it was", ("mmap", {})]


def test_a_mode_may_have_settings_and_attention_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    mode = parse_mode("static-40+pipeline=serial+queue_depth=4+attention=exact")
    assert (mode.path, mode.attention) == ("dual", "exact")
    assert mode.settings == {"cache_percent": 40, "pipeline": "serial", "queue_depth": 4}
    given: list[dict[str, Any]] = []

    def child(payload: dict[str, Any], _group: object) -> ChildOutcome:
        given.append(payload)
        return ChildOutcome(result={}, oom_killed=False, error="not run")

    monkeypatch.setattr(workload, "run_child", child)
    shape = DecodeWorkload(model="random:llama", attention="tiles", engine={"queue_depth": 2})
    nothing = Limit(asked=None, limit_bytes=None, budget="auto")
    for word in ("direct+attention=exact", "direct"):
        assert one_run(shape, word, nothing)["mode"] == word
    first, second = given
    assert (first["attention"], second["attention"]) == ("exact", "tiles")
    assert first["engine"] == second["engine"] == {"queue_depth": 2}


def rows(shapes: list[LayerShape], *, batch: int = 2, seed: int = 0) -> RandomRows:
    return RandomRows(shapes, batch, torch.bfloat16, seed)


def test_rows_are_the_same_every_time_and_differ_between_layers_kinds_and_seeds() -> None:
    first, again, other = rows([NARROW] * 2), rows([NARROW] * 2), rows([NARROW] * 2, seed=1)
    keys, values = (tensor.clone() for tensor in first.chunk(1, 0, 64))
    assert keys.shape == (2, 2, 64, 16)
    assert values.shape == (2, 2, 64, 8)
    assert torch.equal(keys, again.chunk(1, 0, 64)[0])
    assert not torch.equal(keys, again.chunk(0, 0, 64)[0])
    assert not torch.equal(keys, other.chunk(1, 0, 64)[0])
    assert not torch.equal(keys.flatten()[: values.numel()], values.flatten())


class Recorder:
    """Takes in what `fill` hands over: layer 0 grows, layer 1 slides."""

    def __init__(self, parts: dict[int, list[torch.Tensor]]) -> None:
        self._parts = parts

    def append(self, keys: torch.Tensor, _values: torch.Tensor, layer: int) -> None:
        assert layer == 0
        self._parts[layer].append(keys.clone())

    def update(self, keys: torch.Tensor, _values: torch.Tensor, layer: int) -> None:
        assert layer == 1
        self._parts[layer].append(keys.clone())


def test_a_layer_in_chunks_is_the_whole_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_rows, "CHUNK_BYTES", 16 * 1024)
    source = rows([NARROW, SLIDING])
    assert source.chunk_tokens == 128
    parts: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    fill(source, 300, Recorder(parts), CPU)
    assert [part.shape[2] for part in parts[0]] == [128, 128, 44]
    for layer in (0, 1):
        assert torch.equal(torch.cat(parts[layer], dim=2), whole_layer(source, layer, 300, CPU)[0])
    keys, _ = whole_layer(source, 0, 300, CPU, spare=1)
    assert keys.shape[2] == 301
    assert not keys[:, :, 300].any()


def test_rows_look_like_activations_and_cannot_be_compressed() -> None:
    wide = LayerShape(kv_heads=8, key_dim=64, value_dim=64, item_bytes=2, grows=True)
    source = rows([wide])
    keys = source.chunk(0, 0, source.chunk_tokens)[0].clone()
    assert abs(float(keys.float().mean())) < 0.01
    assert abs(float(keys.float().std()) - 1) < 0.01
    data = keys.view(torch.uint8).numpy().tobytes()
    assert len(zlib.compress(data, 1)) > 0.75 * len(data)  # bf16's exponents repeat, no more
    tiles = keys[:, :, : 64 * (keys.shape[2] // 64)].reshape(16, -1, 64 * 64)
    seen = {tile.view(torch.uint8).numpy().tobytes() for tile in tiles.reshape(-1, 64 * 64)}
    assert len(seen) == tiles.shape[0] * tiles.shape[1]


def test_kv_bytes_counts_layers_that_grow() -> None:
    assert kv_bytes([NARROW, SLIDING], batch=3, tokens=10) == 3 * 10 * 2 * (16 + 8) * 2


def test_hit_fraction_is_of_page_cache_reads_alone() -> None:
    def fraction(device: int, direct: int, cached: int) -> float | None:
        return decode_child._hit_fraction(
            Steps(
                device_read_bytes=[device],
                direct_read_bytes=[direct],
                page_cache_read_bytes=[cached],
            )
        )

    assert fraction(100, 100, 0) is None
    assert fraction(100, 100, 50) == 1.0
    assert fraction(150, 100, 50) == 0.0
    assert fraction(125, 100, 50) == 0.5
    assert fraction(900, 100, 50) == 0.0  # readahead beyond what was asked for


class Passing:
    """A cache that reads 1000 bytes directly at each step, by an engine of the name given."""

    def __init__(self, engine: str) -> None:
        self._engine = engine
        self._reads = 0

    def step(self) -> tuple[float, float]:
        self._reads += 1
        return 1.0, 1.0

    def stats(self) -> Passing:
        return self

    def to_dict(self) -> dict[str, Any]:
        io = {"direct_read_bytes": 1000 * self._reads, "direct_write_bytes": 70}
        return {"engine": {"name": self._engine}, "io": io, "memory": {"used_bytes": 0}}


@pytest.mark.parametrize(
    ("engine", "counted"), [("uring-cmd", 1000), ("nvme-ioctl", 1000), ("io_uring", 0)]
)
def test_nvme_commands_are_counted_by_the_cache(
    monkeypatch: pytest.MonkeyPatch, engine: str, counted: int
) -> None:
    kernel = ProcessIO(read_bytes=5, write_bytes=7)
    monkeypatch.setattr(child_run, "process_io", lambda: kernel)
    cache = Passing(engine)
    steps = decode_child._timed_steps(2, SimpleNamespace(timed=cache.step), cache)  # type: ignore[arg-type]
    assert steps.device_read_bytes == [counted] * 2
    assert steps.direct_read_bytes == [1000] * 2
    written = child_run.device_io(cache.to_dict()).write_bytes
    assert written == 7 + (70 if counted else 0)


def old_group(folder: Path) -> MemoryLimit:
    """cgroup v2 before Linux 5.19: no peak is told, and none can be started anew."""
    (folder / "memory.current").write_text(str(300 * MIB))
    (folder / "memory.stat").write_text("")
    (folder / "memory.max").write_text("max")
    return MemoryLimit(folder, 2)


def test_without_a_peak_of_the_group_it_is_the_process_s(tmp_path: Path) -> None:
    old_group(tmp_path)
    options = ChildOptions(
        task="run",
        model="",
        dtype="",
        batch=1,
        context=1,
        seed=0,
        cgroup_directory=str(tmp_path),
        cgroup_version=2,
        limit_bytes=GIB,
    )
    with child_run.under_limit(options) as memory:
        block = bytearray(64 * MIB)
    told = memory.to_dict()
    assert (tmp_path / "memory.max").read_text() == str(GIB)
    assert told["peak_memory_of"] == "process"
    assert told["peak_memory_bytes"] > len(block)


def test_a_peak_that_nobody_knows_is_a_dash() -> None:
    limit = {"memory_limit_bytes": None, "page_cache_hit_fraction": None, "engine": None}
    run = run_of("direct", 1.0, step_seconds_p99=1.0, error=None, **limit)
    assert _decode_row({**run, "peak_memory_bytes": None})[-2:] == ["-", "-"]


def test_p99_is_the_largest_of_few() -> None:
    assert decode_child._p99([3.0, 1.0, 2.0]) == 3.0
    assert decode_child._p99([float(i) for i in range(1, 201)]) == 198.0


def run_of(mode: str, seconds: float | None, **more: Any) -> dict[str, Any]:
    run = {
        "mode": mode,
        "memory_limit": None,
        "attention": "tiles",
        "step_seconds_median": seconds,
        "device_read_bytes_per_step": None if seconds is None else 0,
        "oom_killed": seconds is None,
        "tokens_sha256": None if seconds is None else "a",
        "fio_read_bytes_per_second": None,
        "cpu_seconds_per_step": None if seconds is None else 0.5,
        "peak_memory_bytes": None if seconds is None else 1000,
        "ssd_utilisation": None,
    }
    return {**run, **more}


def test_summary_compares_with_memory_and_the_drive() -> None:
    fast = {"device_read_bytes_per_step": 400, "fio_read_bytes_per_second": 200}
    slow = {"device_read_bytes_per_step": 400, "fio_read_bytes_per_second": 100}
    runs = [
        run_of("memory", 1.0),
        run_of("direct", 3.0, **fast),
        run_of("direct", 5.0, **slow),
        run_of("dual", 1.2, device_read_bytes_per_step=10, fio_read_bytes_per_second=100),
        run_of("direct", None, memory_limit="0.1"),
    ]
    memory, direct, dual, killed = decode._summaries(runs)
    assert memory["step_to_memory"] == 1.0
    assert memory["step_to_roof"] is None  # reads nothing: there is no fio beside it
    assert (direct["runs"], direct["step_seconds_median"]) == (2, 4.0)
    assert (direct["roof_seconds"], direct["step_to_roof"]) == (3.0, 1.375)
    assert direct["step_seconds_spread"] == [3.0, 5.0]
    assert direct["step_to_roof_spread"] == [1.25, 1.5]
    assert dual["step_to_roof"] == 1.2  # here computing is the roof
    assert killed["oom_killed"] == 1
    assert killed["step_seconds_median"] is killed["step_to_roof"] is None


def test_utilisation_is_what_the_drive_gave_of_what_fio_had() -> None:
    run = run_of("direct", 2.0, device_read_bytes_per_step=100)
    assert decode._utilisation(run, 200) == 0.25
    assert decode._utilisation(run, None) is None
    assert decode._utilisation(run_of("direct", None), 200) is None


def test_tokens_agree_needs_two() -> None:
    assert workload.tokens_agree([run_of("direct", 1.0), run_of("dual", None)]) is None
    assert workload.tokens_agree([run_of("direct", 1.0), run_of("dual", 1.0)]) is True
    other = run_of("dual", 1.0, tokens_sha256="b")
    assert workload.tokens_agree([run_of("direct", 1.0), other]) is False
    rounded = run_of("dynamic-cache", 1.0, tokens_sha256="b", attention="exact")
    assert workload.tokens_agree([run_of("direct", 1.0), rounded]) is None


def test_a_store_that_was_not_there_is_removed(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    theirs.touch()
    with pytest.raises(KeyboardInterrupt), workload.store_left_as_found(ours):
        _make_and_interrupt(ours)
    with workload.store_left_as_found(theirs):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_a_link_that_leads_nowhere_is_left_as_found(tmp_path: Path) -> None:
    link = tmp_path / "kv.store"
    link.symlink_to(tmp_path / "not-mounted" / "kv.store")
    with workload.store_left_as_found(link):
        pass
    assert link.is_symlink()


def test_a_store_that_was_there_is_left_empty(tmp_path: Path) -> None:
    path = tmp_path / "kv.store"
    options: dict[str, Any] = {"direct": False, "capacity_bytes": 16 * MIB}
    with open_engine("posix") as engine:
        Store.open(path, engine, **options).close()
        kept = Store.open(path, engine, **options, keep_blocks=True)
        kept.allocate(2 * MIB, Door.PAGE_CACHE)
        kept.close()
        before = path.stat().st_size
        with workload.store_left_as_found(path):
            pass
        assert path.stat().st_size == before > DATA_OFFSET, "nothing was written to it"
        with workload.store_left_as_found(path):
            store = Store.open(path, engine, **options, keep_blocks=True)
            store.allocate(8 * MIB, Door.PAGE_CACHE)
            store.close()
            assert path.stat().st_size > 8 * MIB
    assert path.stat().st_size == DATA_OFFSET


def _make_and_interrupt(path: Path) -> None:
    path.touch()
    raise KeyboardInterrupt


def test_fio_measures_and_leaves_nothing(tmp_path: Path) -> None:
    try:
        with yardstick(tmp_path) as fio:
            result = fio.measure(seconds=0.2)
    except Unsupported as exc:
        pytest.skip(f"fio cannot run here: {exc}")
    assert result["read_bytes_per_second"] > 0
    assert isinstance(result["huge_pages"], bool)
    assert list(tmp_path.iterdir()) == []


def yardstick(folder: Path) -> FioYardstick:
    return FioYardstick(folder, size_bytes=4 * MIB, chunk_bytes=MIB, queue_depth=4)


def test_without_fio_it_is_unsupported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unsupported, match="not installed"):
        yardstick(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.ENOSPC, NoSpace), (errno.EDQUOT, NoSpace), (errno.EIO, StorageError)],
)
def test_a_file_for_fio_that_cannot_be_written_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[StorageError]
) -> None:
    def fail(_fd: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("dualblade.bench.fio.find_fio", lambda: "fio")
    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(
        kind, match=r"fio's file of 4\.00 MiB cannot be made in .*\nmake room"
    ) as told:
        yardstick(tmp_path)
    assert type(told.value) is kind
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(StorageError, match="No such file"):
        yardstick(tmp_path / "nowhere")


def test_a_fio_that_fails_is_unsupported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "fio"
    fake.write_text("#!/bin/sh\necho 'fio: no such engine' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with yardstick(tmp_path) as fio, pytest.raises(Unsupported, match="no such engine"):
        fio.measure()
    assert list(tmp_path.iterdir()) == [fake]


def test_a_folder_is_where_the_store_of_all_runs_lies(tmp_path: Path) -> None:
    in_folder = DecodeWorkload(model="random:llama", store=tmp_path)
    assert in_folder.store == tmp_path / "dualblade-bench.store"
    named = tmp_path / "kv.store"
    assert DecodeWorkload(model="random:llama", store=named).store == named


def test_a_folder_that_is_not_there_is_refused_before_a_run(tmp_path: Path) -> None:
    options = DecodeBenchOptions(model="random:llama", modes=("direct",), store=tmp_path / "nvme")
    with pytest.raises(ConfigError, match="there is no"):
        run_decode_bench(options)


def test_each_limit_has_a_trace_of_its_own(tmp_path: Path) -> None:
    limits = ("none", "25%", "+1GiB")
    options = DecodeBenchOptions(
        model="random:llama",
        modes=("dual", "memory"),
        memory_limits=limits,
        repeats=2,
        trace=tmp_path / "t.json",
    )
    traced = [decode._traced(options, planned) for planned in plan_decode(options)]
    files = [Path(each["trace"]).name for each in traced if each]
    assert len(files) == len(set(files)) == 2 * len(limits)
    assert {"t-dual-0.json", "t-dual-25%-0.json", "t-dual-+1GiB-1.json"} < set(files)


@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("bench", ["decode", "prefill", "envelope"])
def test_a_model_that_cannot_fit_is_refused_before_the_first_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bench: str, *, limited: bool
) -> None:
    """The kernel killed child after child while it loaded."""

    def no_child(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(workload, "run_child", no_child)
    monkeypatch.setattr(workload, "require_cgroup", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    limits = ("25%",) if limited else ()
    shape: dict[str, Any] = {
        "model": "random:llama-3-8b?layers=2,vocab=1000000000",
        "store": tmp_path,
    }
    with pytest.raises(BudgetError, match="of memory before any KV"):
        if bench == "decode":
            run_decode_bench(DecodeBenchOptions(memory_limits=limits, **shape))
        elif bench == "prefill":
            run_prefill_bench(PrefillBenchOptions(memory_limits=limits, **shape))
        else:
            run_envelope(EnvelopeOptions(**shape), tmp_path / "log.jsonl")


def test_where_a_figure_or_page_cannot_be_is_told_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no folder"):
        figures.require_figures(tmp_path / "no" / "x.svg")
    folder = tmp_path / "folder.svg"
    folder.mkdir()
    with pytest.raises(ConfigError, match="cannot write"):
        figures.require_figures(folder)
    figures.require_figures(tmp_path / "x.svg")
    with pytest.raises(ConfigError, match="there is no folder"):  # before it looks for results
        write_report(tmp_path / "none", tmp_path / "no" / "r.html")
