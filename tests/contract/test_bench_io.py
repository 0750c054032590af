"""`bench io` runs tiny, and writes only to files that are its own."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from dualblade.bench.io import HEADER_BYTES, IoBenchOptions, run_io_bench
from dualblade.errors import ConfigError, CorruptExtent, NoSpace, Unsupported
from dualblade.io import Engine, Ticket
from dualblade.units import KIB, MIB


@pytest.fixture
def options(tmp_path: Path) -> IoBenchOptions:
    return IoBenchOptions(
        store=str(tmp_path / "scratch"),
        size_bytes=9 * MIB,
        chunk_bytes=128 * KIB,
        queue_depth=4,
        repeats=2,
    )


@pytest.mark.parametrize("engine", ["io_uring", "posix"])
def test_prints_what_it_promises(options: IoBenchOptions, engine: str) -> None:
    lines: list[str] = []
    options = replace(options, io_engine=engine)
    for _ in range(2):  # the second time the file is there
        result = json.loads(json.dumps(run_io_bench(options, lines.append)))
        assert (result["benchmark"], result["engine"]) == ("io", engine)
        for key in ("read_bytes_per_second", "write_bytes_per_second"):
            assert result[key] > 0
        assert result["cpu_seconds_per_gib_read"] >= 0
        assert 0 < result["effective_queue_depth"] <= 4
        assert isinstance(result["huge_pages"], bool)
        assert len(result["reads"]) == len(result["writes"]) == 2
        # 2 passes of 72 pieces, nothing beside them.
        assert result["read_counters"]["read_ops"] == 144
        assert result["read_counters"]["read_bytes"] == 18 * MIB
        assert "kernel" in result["machine"]
    assert any("read 2" in line for line in lines)
    assert os.stat(options.store).st_mode & 0o777 == 0o600


def test_several_files_are_striped(options: IoBenchOptions, tmp_path: Path) -> None:
    """Each holds its part, in requests as large as those of one file; the depth is that of each."""
    places = [str(tmp_path / f"scratch{index}") for index in range(3)]
    several = replace(options, store=places, chunk_bytes=MIB)
    result = run_io_bench(several)
    assert result["read_counters"]["read_bytes"] == 18 * MIB
    assert result["read_counters"]["read_ops"] == 18
    assert 0 < result["effective_queue_depth"] <= 12
    assert [os.stat(place).st_size for place in places] == [HEADER_BYTES + 3 * MIB] * 3
    Path(places[2]).write_bytes(b"letters")
    os.unlink(places[0])
    with pytest.raises(ConfigError, match="did not write"):
        run_io_bench(several)
    assert not os.path.exists(places[0])
    with pytest.raises(ConfigError, match="fio reads one file"):
        replace(several, compare_fio=True)


def test_beside_fio(options: IoBenchOptions) -> None:
    if shutil.which("fio") is None or os.geteuid() != 0:
        pytest.skip("needs fio, and root for its huge pages")
    reserved = Path("/proc/sys/vm/nr_hugepages").read_text()
    fio = run_io_bench(replace(options, compare_fio=True))["fio"]
    assert len(fio["throughput_ratios"]) == 2
    # Of passes this short fio may count no CPU.
    assert (fio["cpu_ratio_median"] is None) == (fio["cpu_ratios"] == [])
    assert fio["throughput_ratio_median"] > 0
    assert "--iomem=mmaphuge" in fio["command"]
    assert Path("/proc/sys/vm/nr_hugepages").read_text() == reserved


def test_foreign_files_are_left_alone(options: IoBenchOptions, tmp_path: Path) -> None:
    foreign = Path(options.store)
    foreign.write_bytes(b"letters to my grandmother" * 1000)
    with pytest.raises(ConfigError, match="did not write"):
        run_io_bench(options)
    assert foreign.read_bytes() == b"letters to my grandmother" * 1000
    with pytest.raises(ConfigError):
        run_io_bench(replace(options, store=str(tmp_path)))
    with pytest.raises(ConfigError):
        run_io_bench(replace(options, store=str(tmp_path / "missing" / "scratch")))
    with pytest.raises(ConfigError, match="regular"):
        run_io_bench(replace(options, store="/dev/null"))
    with pytest.raises(ConfigError, match="no device /dev/nvme77n1"):
        run_io_bench(replace(options, store="/dev/nvme77n1"))  # it would be a file in memory
    assert not Path("/dev/nvme77n1").exists()


def test_a_file_system_without_direct_io_is_left_as_it_was(
    options: IoBenchOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel makes the file, and then says that it cannot be opened so."""
    real = os.open

    def refusing(path: str, *flags: int, **more: int) -> int:
        fd = real(path, *flags, **more)
        if path != options.store:
            return fd
        os.close(fd)
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "open", refusing)
    with pytest.raises(Unsupported, match="no O_DIRECT"):
        run_io_bench(options)
    assert not Path(options.store).exists()


def test_no_room(options: IoBenchOptions) -> None:
    with pytest.raises(NoSpace):
        run_io_bench(replace(options, size_bytes=1 << 50))
    assert not Path(options.store).exists()


@pytest.mark.parametrize("existed", [False, True])
def test_an_engine_that_cannot_be_had_leaves_files_as_they_were(
    options: IoBenchOptions, monkeypatch: pytest.MonkeyPatch, *, existed: bool
) -> None:
    def refuse(*_: object, **_options: object) -> Engine:
        raise Unsupported("no io_uring here")

    if existed:
        Path(options.store).touch()
    with monkeypatch.context() as patch:
        patch.setattr("dualblade.bench.io.open_engine", refuse)
        with pytest.raises(Unsupported):
            run_io_bench(options)
    assert Path(options.store).exists() == existed
    assert not existed or os.stat(options.store).st_size == 0
    run_io_bench(options)


def test_wrong_bytes_are_noticed(options: IoBenchOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that loses a block between writing and reading it."""
    submit = Engine.submit
    lost = HEADER_BYTES + 8 * MIB + 4096

    def lossy(self: Engine, transfers: list, **path: str) -> Ticket:
        ticket = submit(self, transfers, **path)
        if transfers[0].offset <= lost < transfers[0].offset + transfers[0].size_bytes:
            ticket.wait()
            fd = os.open(options.store, os.O_WRONLY)
            os.pwrite(fd, bytes(4096), lost)
            os.close(fd)
        return ticket

    monkeypatch.setattr(Engine, "submit", lossy)
    with pytest.raises(CorruptExtent) as caught:
        run_io_bench(options)
    assert caught.value.offset == lost


@pytest.mark.parametrize("wrong", [{"repeats": 0}, {"size_bytes": 1}, {"size_bytes": 3 * MIB + 1}])
def test_wrong_options(options: IoBenchOptions, wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        replace(options, **wrong)


def test_ctrl_c_ends_the_engine_before_its_files_are_closed(
    options: IoBenchOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transfers may be under way: their descriptors would be other files' by then."""
    used: set[int] = set()
    closed: list[str] = []
    register, close = Engine.register_file, Engine.close

    def noted(engine: Engine, fd: int) -> bool:
        used.add(fd)
        return register(engine, fd)

    def ended(engine: Engine) -> None:
        closed.append("files" if any(not _is_open(fd) for fd in used) else "engine")
        close(engine)

    monkeypatch.setattr(Engine, "register_file", noted)
    monkeypatch.setattr(Engine, "close", ended)

    def interrupt(_line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_io_bench(options, interrupt)
    assert used
    assert not Path(options.store).exists(), "nothing in it says yet that it is the benchmark's"
    assert closed == ["engine"]


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True
