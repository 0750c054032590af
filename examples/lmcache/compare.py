"""`lmcache bench l2` with the dualblade plug-in and with LMCache's own back ends, in turn.

    python compare.py FOLDER --output results.json

FOLDER is on the drive. Each run is a process of its own on a new or a written file, with direct I/O
and L1 memory in huge pages (root; without it in ordinary pages, and the result says so); repeats
are interleaved because drives change speed. fio reads a file beside it before each repeat. LMCache
verifies what was loaded after each run; one that loses a key or a byte ends the comparison.
"""

# ruff: noqa: T201 - an example prints

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dualblade.bench.fio import FioYardstick, huge_pages
from dualblade.host.machine import command_line, machine_facts, package_version
from dualblade.units import GIB, KIB, MIB

PACKAGES = ("lmcache", "lmcache-rust-raw-block-io")
PLUGIN = Path(__file__).resolve().parent
# Beside the objects: raw_block's own tables take 256 MiB and a block for each object.
FILE_BYTES = 2 * GIB


@dataclass(frozen=True, kw_only=True)
class Workload:
    """128 objects of 1 MiB a round, in four batches at once: a round is well above a drive's own
    latencies, and what five rounds write is far above its cache."""

    num_keys: int = 32
    in_flight: int = 4
    data_size_kb: int = 1024
    rounds: int = 5

    @property
    def round_bytes(self) -> int:
        """Moved by each round."""
        return self.num_keys * self.in_flight * self.data_size_kb * KIB


@dataclass(frozen=True)
class Contender:
    """An adapter at its settings: LMCache's JSON, with FOLDER for a folder of its own.

    written: it writes to blocks that hold data already; else to a new file or files.
    """

    name: str
    settings: str
    spec: dict[str, Any]
    written: bool = False

    def prepare(self, folder: Path) -> str:
        """What LMCache is told; the file that raw_block takes for a device is made."""
        if "device_path" in self.spec and not (folder / "device").exists():
            with (folder / "device").open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, FILE_BYTES)
        return json.dumps(self.spec).replace("FOLDER", str(folder))


def dualblade(**parameters: Any) -> dict[str, Any]:
    return {
        "type": "plugin",
        "module_path": "dualblade_l2",
        "class_name": "DualBladeL2Adapter",
        "adapter_params": {"store": "FOLDER/store", "capacity_bytes": FILE_BYTES, **parameters},
    }


def raw_block(**settings: Any) -> dict[str, Any]:
    # A run does not begin with the objects of the last one: all of them are to be written.
    shape = {"slot_bytes": MIB + 4 * KIB, "load_checkpoint_on_init": False}
    return {"type": "raw_block", "device_path": "FOLDER/device", **shape, **settings}


def files(kind: str, **settings: Any) -> dict[str, Any]:
    return {"type": kind, "base_path": "FOLDER/objects", "use_odirect": True, **settings}


URING = {"io_engine": "io_uring"}
THREADS = {"num_store_workers": 8, "num_load_workers": 8}
CONTENDERS = (
    Contender("dualblade", "io_uring", dualblade()),
    Contender("raw_block", "io_uring", raw_block(**URING)),
    Contender("raw_block", "posix, 8 + 8 threads", raw_block(**THREADS)),
    Contender("fs_native", "16 threads", files("fs_native", num_workers=16)),
    Contender("fs", "asyncio", files("fs")),
    Contender("dualblade", "io_uring", dualblade(keep_blocks=True), written=True),
    Contender("raw_block", "io_uring", raw_block(**URING), written=True),
)


def run(program: str, spec: str, load: Workload, *, huge: bool) -> dict[str, Any]:
    """One `lmcache bench l2`: its metrics by operation. Raises: RuntimeError when it failed."""
    sizes = {f"--{name.replace('_', '-')}": str(value) for name, value in asdict(load).items()}
    with tempfile.NamedTemporaryFile(suffix=".json") as metrics:
        done = subprocess.run(
            [
                *(program, "bench", "l2", "--l2-adapter", spec),
                *(word for option in sizes.items() for word in option),
                *("--l1-align-bytes", "4096", "--lookup-max-hit-rate", "1"),
                *(["--l1-use-hugepages"] if huge else []),
                *("--no-skip-verify", "--format", "json", "--output", metrics.name),
            ],
            capture_output=True,
            text=True,
            check=False,
            env={
                **os.environ,
                "PYTHONPATH": str(PLUGIN),
                "LMCACHE_TRACK_USAGE": "false",  # it would report to its makers
                "LMCACHE_LOG_LEVEL": "WARNING",
            },
        )
        if done.returncode != 0 or "data verified OK" not in done.stdout:
            raise RuntimeError(f"{spec} failed:\n{done.stdout}{done.stderr}")
        sections = json.load(metrics)["metrics"]
    found = {
        section["operation"].lower(): section
        for name, section in sections.items()
        if name.startswith("op_")
    }
    for operation in found.values():
        if operation["total_success"] != operation["total_keys"]:
            raise RuntimeError(f"{spec} lost keys: {operation}")
    return found


def compare(folder: Path, program: str, load: Workload, repeats: int) -> dict[str, Any]:
    """All contenders, interleaved."""
    runs: list[dict[str, Any]] = []
    fio: list[dict[str, Any]] = []
    with (
        tempfile.TemporaryDirectory(prefix=".dualblade-lmcache-", dir=folder) as scratch,
        FioYardstick(folder, size_bytes=GIB, chunk_bytes=MIB, queue_depth=8) as yardstick,
        huge_pages(2 * load.round_bytes) as huge,  # LMCache's L1: to store from, to load into
    ):
        for repeat in range(repeats):
            fio.append(yardstick.measure())
            turn = repeat % len(CONTENDERS)
            for each in CONTENDERS[turn:] + CONTENDERS[:turn]:
                place = Path(scratch) / str(CONTENDERS.index(each))
                if each.written and not place.exists():
                    place.mkdir()
                    run(program, each.prepare(place), load, huge=huge)  # writes its blocks
                place.mkdir(exist_ok=True)
                operations = run(program, each.prepare(place), load, huge=huge)
                shown = {
                    name: load.round_bytes / (operations[name]["duration_p50_ms"] / 1000)
                    for name in ("store", "load")
                }
                speeds = ", ".join(f"{name} {rate / MIB:.0f}" for name, rate in shown.items())
                print(f"{repeat + 1}/{repeats} {each.name}: {speeds} MiB/s", file=sys.stderr)
                runs.append(
                    {
                        "contender": CONTENDERS.index(each),
                        "repeat": repeat,
                        "bytes_per_second": shown,
                        "operations": operations,
                    }
                )
                if not each.written:
                    shutil.rmtree(place)
    machine = machine_facts(folder)
    machine["versions"] |= {name: package_version(name) for name in PACKAGES}
    return {
        "command": command_line(),
        "machine": machine,
        "workload": asdict(load),
        "huge_pages": huge,
        "contenders": [asdict(each) for each in CONTENDERS],
        "runs": runs,
        "fio": fio,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="on the drive; 6 GiB free")
    beside = str(Path(sys.executable).parent / "lmcache")
    parser.add_argument("--lmcache", default=beside, help="the program (default: this Python's)")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--output", type=Path, help="JSON; default: standard output")
    options = parser.parse_args()
    result = compare(options.folder, options.lmcache, Workload(), options.repeats)
    text = json.dumps(result, indent=1) + "\n"
    if options.output is None:
        print(text, end="")
    else:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
