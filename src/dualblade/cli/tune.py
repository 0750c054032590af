"""`dualblade tune`: measures a device once, so that plans know its speeds."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dualblade.cli import options
from dualblade.units import format_size, parse_size

if TYPE_CHECKING:
    from dualblade.host.profile import DeviceProfile


def tune(
    store: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[STORE]...",
            help="A folder or store file on the device, or a device formatted for dualblade; of a "
            "striped store, one on each.",
            show_default="~/.cache/dualblade, where private stores are",
        ),
    ] = None,
    size: Annotated[
        str, typer.Option("--size", metavar="SIZE", help="Of the scratch store; gone at the end.")
    ] = "256MiB",
    json: options.Json = False,
    debug: options.Debug = False,  # noqa: ARG001 - read by Command
) -> None:
    """Measure a device and save its profile.

    Reads through both doors, copies in memory and computes, for some seconds. `plan` then predicts
    the time of a step, and `generate` caches only what the page cache makes faster. Files are
    measured with a scratch store beside them; a device only if it was formatted (dualblade store
    format) and no cache is using it: nothing else is written to.

    \b
    Examples:
      dualblade tune
      dualblade tune /mnt/nvme
      dualblade tune kv.store --json
      dualblade tune /dev/ng0n1
      dualblade tune /mnt/a /mnt/b
    """
    from dualblade.bench.doors import TuneOptions, measure_doors
    from dualblade.cli.output import Reporter
    from dualblade.errors import StorageError
    from dualblade.host.profile import save_profile
    from dualblade.store import cache_directory

    places = tuple(store or (cache_directory(),))
    with Reporter() as reporter:
        profile = measure_doors(
            TuneOptions(places=places, size_bytes=parse_size(size)), reporter.tell
        )
    try:
        saved = save_profile(profile)
    except StorageError:
        _tell(profile, None, json)  # it took a while to find out
        raise
    _tell(profile, saved, json)


def _tell(profile: DeviceProfile, saved: Path | None, json: bool) -> None:
    from dualblade.cli.output import result_console, write_json

    if json:
        file = None if saved is None else str(saved)
        write_json({"command": "tune", "profile_file": file, **asdict(profile)})
        return
    console = result_console()
    console.print(f"{profile.device} ({profile.engine})")
    for name, rate in (
        ("direct", profile.direct_bytes_per_s),
        ("page cache, hits", profile.cache_hit_bytes_per_s),
        ("page cache, misses", profile.cache_miss_bytes_per_s),
        ("memory copy", profile.memory_copy_bytes_per_s or 0),
    ):
        console.print(f"  {name}: {format_size(int(rate))}/s")
    for dtype, compute in profile.compute.items():
        console.print(
            f"  computing a token in {dtype}: weights "
            f"{format_size(int(compute.weights_bytes_per_s))}/s, KV over tiles "
            f"{format_size(int(compute.tiles_bytes_per_s))}/s, the model's own way "
            f"{format_size(int(compute.exact_bytes_per_s))}/s, and "
            f"{1000 * compute.layer_seconds:.2f} ms a layer"
        )
    if saved is not None:
        console.print(f"saved in {saved}")
