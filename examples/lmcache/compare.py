"""`lmcache bench l2` with the dualblade plug-in and with LMCache's own back ends, in turn.

    python compare.py FOLDER --output results.json

FOLDER is on the drive. Each run is a process of its own on new files, with direct I/O; repeats are
interleaved because drives change speed, and fio reads a file beside it before each. LMCache
verifies what was loaded after each run; one that loses a key or a byte ends the comparison.
"""

# ruff: noqa: T201 - an example prints

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dualblade.bench.fio import FioYardstick
from dualblade.host.machine import command_line, machine_facts, package_version
from dualblade.units import GIB, KIB, MIB

PACKAGES = ("lmcache", "lmcache-rust-raw-block-io")
PLUGIN = Path(__file__).resolve().parent
# Beside the objects: raw_block's own tables take 256 MiB and a block for each object.
FILE_BYTES = 2 * GIB


@dataclass(frozen=True, kw_only=True)
class Workload:
    """128 objects of 1 MiB a round, in four batches at once; new objects at each round."""

    num_keys: int = 32
    in_flight: int = 4
    data_size_kb: int = 1024
    rounds: int = 8

    @property
    def round_bytes(self) -> int:
        """Moved by each round."""
        return self.num_keys * self.in_flight * self.data_size_kb * KIB


@dataclass(frozen=True)
class Contender:
    """An adapter at its settings: LMCache's JSON, with FOLDER for a folder of its own."""

    name: str
    settings: str
    spec: dict[str, Any]

    def prepare(self, folder: Path) -> str:
        """What LMCache is told; the file that raw_block takes for a device is made."""
        if "device_path" in self.spec:
            with (folder / "device").open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, FILE_BYTES)
        return json.dumps(self.spec).replace("FOLDER", str(folder))


def raw_block(**settings: Any) -> dict[str, Any]:
    place = {"device_path": "FOLDER/device", "slot_bytes": MIB + 4 * KIB}
    return {"type": "raw_block", **place, **settings}


def files(kind: str, **settings: Any) -> dict[str, Any]:
    return {"type": kind, "base_path": "FOLDER/objects", "use_odirect": True, **settings}


DUALBLADE = {
    "type": "plugin",
    "module_path": "dualblade_l2",
    "class_name": "DualBladeL2Adapter",
    "adapter_params": {"store": "FOLDER", "capacity_bytes": FILE_BYTES},
}
CONTENDERS = (
    Contender("dualblade", "io_uring, 8 in flight", DUALBLADE),
    Contender("raw_block", "io_uring", raw_block(io_engine="io_uring")),
    Contender("raw_block", "8 + 8 threads", raw_block(num_store_workers=8, num_load_workers=8)),
    Contender("fs_native", "16 threads", files("fs_native", num_workers=16)),
    Contender("fs", "asyncio", files("fs")),
)

# LMCache has huge pages for its L1 memory only where it has CUDA. This has glibc ask for them: a
# device pays for each page of a transfer, and with ordinary ones that is all that is measured.
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def run(program: str, spec: str, load: Workload) -> dict[str, Any]:
    """One `lmcache bench l2`: its metrics by operation. Raises: RuntimeError when it failed."""
    sizes = {f"--{name.replace('_', '-')}": str(value) for name, value in asdict(load).items()}
    with tempfile.NamedTemporaryFile(suffix=".json") as metrics:
        done = subprocess.run(
            [
                *(program, "bench", "l2", "--l2-adapter", spec),
                *(word for option in sizes.items() for word in option),
                *("--l1-align-bytes", "4096", "--lookup-max-hit-rate", "1"),
                *("--no-skip-verify", "--format", "json", "--output", metrics.name),
            ],
            capture_output=True,
            text=True,
            check=False,
            env={
                **os.environ,
                **HUGE_PAGES,
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
    with FioYardstick(folder, size_bytes=GIB, chunk_bytes=MIB, queue_depth=8) as yardstick:
        for repeat in range(repeats):
            fio.append(yardstick.measure())
            turn = repeat % len(CONTENDERS)
            for each in CONTENDERS[turn:] + CONTENDERS[:turn]:
                with tempfile.TemporaryDirectory(prefix=".lmcache-", dir=folder) as place:
                    operations = run(program, each.prepare(Path(place)), load)
                rates = {
                    name: load.round_bytes / (operations[name]["duration_p50_ms"] / 1000)
                    for name in ("store", "load")
                }
                shown = ", ".join(f"{name} {rate / MIB:.0f}" for name, rate in rates.items())
                print(f"{repeat + 1}/{repeats} {each.name}: {shown} MiB/s", file=sys.stderr)
                runs.append(
                    {
                        "contender": CONTENDERS.index(each),
                        "repeat": repeat,
                        "bytes_per_second": rates,
                        "operations": operations,
                    }
                )
    machine = machine_facts(folder)
    machine["versions"] |= {name: package_version(name) for name in PACKAGES}
    return {
        "command": command_line(),
        "machine": machine,
        "workload": asdict(load),
        "environment": HUGE_PAGES,
        "contenders": [asdict(each) for each in CONTENDERS],
        "runs": runs,
        "fio": fio,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="on the drive; 4 GiB free")
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
