"""`dualblade plan`: which unit goes which way, for a model that need not be there."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dualblade.cli import options
from dualblade.errors import ConfigError
from dualblade.units import format_size, parse_size

if TYPE_CHECKING:
    from dualblade.config import EngineConfig
    from dualblade.hf.plan import CachePlan, PlanRequest

_PATHS = ("memory", "page-cache", "direct")


def plan(
    model: options.Model,
    context: options.Context,
    batch: Annotated[int, typer.Option("--batch", min=1, metavar="B", help="Sequences.")] = 1,
    memory_budget: options.MemoryBudget = "auto",
    path: options.KVPath = "dual",
    cache_percent: options.CachePercent = None,
    attention: options.Attention = "auto",
    dtype: options.Dtype = "auto",
    device: Annotated[
        str, typer.Option("--device", help="cuda: the gather buffer is in the GPU's own memory.")
    ] = "cpu",
    store: options.Store = None,
    queue_depth: options.QueueDepth = None,
    json: options.Json = False,
    debug: options.Debug = False,  # noqa: ARG001 - read by Command
) -> None:
    """Show which way each layer's KV would go.

    The residency plan of a model, context and budget; no weights are needed. For each layer: the
    path of its keys and values, their bytes, and the reason. Where `tune` has measured the store's
    device and this processor, also the time of a step (reads and computing overlap, so the longer
    one), and what half and twice the memory or a drive of twice the speed would change. On a GPU
    only the reads are predicted.

    \b
    Examples:
      dualblade plan --model random:llama-3-8b --context 128k --memory-budget 4GiB
      dualblade plan --model ./llama --context 32k --batch 4 --memory-budget 2GiB --json
    """
    from dualblade.config import Path as KVPath
    from dualblade.config import check_attention

    way = KVPath.parse(path)
    check_attention(attention)
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"unknown device {device!r}", hint="use cpu or cuda")
    engine = options.engine_config(
        io_engine="auto", queue_depth=queue_depth, cache_percent=cache_percent
    )

    from dualblade.cli.output import write_json
    from dualblade.hf.choice import choose
    from dualblade.hf.footprint import skeleton
    from dualblade.hf.geometry import item_bytes
    from dualblade.hf.models import config_of, default_dtype, parse_dtype, told_shortly
    from dualblade.hf.plan import PlanRequest, gathers_on_host, plan_cache

    config = config_of(model)
    element = parse_dtype(dtype) or default_dtype(config, device)
    with told_shortly(model):
        unloaded = skeleton(config, element)
    way_in = choose(unloaded, attention, device).word
    request = PlanRequest(
        tokens=options.parse_tokens(context),
        batch=batch,
        item_bytes=item_bytes(element),
        budget_bytes=_budget_bytes(memory_budget, unloaded, device),
        path=way,
        engine=engine,
        gather_on_host=gathers_on_host(device),
        over_tiles=way_in == "tiles",
        **_measured(unloaded, device, store, engine),
    )
    made = plan_cache(config, request)
    result = _result(model, str(element).removeprefix("torch."), request, made)
    if made.shares is not None and way is KVPath.DUAL:
        result["other_memory"] = [_other_memory(config, request, by) for by in (0.5, 2.0)]
        result["faster_drive"] = _faster_drive(config, request, 2.0)
    write_json(result) if json else _show(result)


def _budget_bytes(asked: str, unloaded: Any, device: str) -> int:
    """What is asked for; of `auto` what will be there once the weights are loaded.

    Raises: ConfigError for no size, BudgetError if the weights leave nothing.
    """
    from dualblade.errors import BudgetError
    from dualblade.host.memory import auto_budget_bytes

    if asked != "auto":
        return parse_size(asked)
    there = auto_budget_bytes()
    if device != "cpu":
        return there
    weights: int = sum(parameter.nbytes for parameter in unloaded.parameters())
    if weights >= there:
        raise BudgetError(
            f"the weights alone take {format_size(weights)}; there are {format_size(there)}",
            hint="say with --memory-budget what the cache would have on the machine you plan for",
            needed_bytes=weights,
        )
    return there - weights


def _measured(unloaded: Any, device: str, store: Any, engine: EngineConfig) -> dict[str, Any]:
    """The processor's work for a token of the model, which has no memory, and what is known of its
    speed and the drive's, as PlanRequest takes them."""
    from dualblade.hf.footprint import weights_per_token
    from dualblade.hf.linear import rows_in_turn
    from dualblade.hf.speeds import door_speeds, known_profile, reads_in_place

    told: dict[str, Any] = {}
    if device == "cpu":
        told["weights_bytes"] = weights_per_token(unloaded)
        told["rows_in_turn"] = rows_in_turn(unloaded.dtype)
    if profile := known_profile(store):
        in_place = reads_in_place(engine, device, store)
        told["speeds"] = door_speeds(profile, in_place=in_place)
        if device == "cpu":
            told["compute"] = profile.compute.get(str(unloaded.dtype).removeprefix("torch."))
    return told


def _result(model: str, dtype: str, request: PlanRequest, made: CachePlan) -> dict[str, Any]:
    from dualblade.config import Path as KVPath

    shares = made.shares
    return {
        "command": "plan",
        "model": model,
        "dtype": dtype,
        "context": request.tokens,
        "batch": request.batch,
        "path": request.path.value,
        "cache_percent": request.engine.cache_percent,
        "attention": "tiles" if request.over_tiles else "exact",
        "kv_bytes": made.kv_bytes,
        "kv_bytes_per_token": made.token_bytes,
        "budget_bytes": request.budget_bytes,
        "shares": None
        if shares is None
        else {**asdict(shares), "page_cache_bytes": shares.page_cache_bytes},
        "bytes_by_path": {word: made.bytes_on(KVPath(word)) for word in _PATHS},
        "tile_rows": sorted(set(made.tile_rows)),
        "units": [asdict(placement) for placement in made.placements],
        "step": _step(made),
        "other_memory": [],
        "faster_drive": None,
    }


def _step(made: CachePlan) -> dict[str, Any] | None:
    """The predicted time of a step; None without a profile of the device."""
    step = made.step
    if step is None:
        return None
    return {**asdict(step), "seconds": step.seconds, "bound": step.bound}


def _faster_drive(config: Any, request: PlanRequest, factor: float) -> dict[str, Any] | None:
    """What the plan would be with a drive `factor` times as fast; None where it is not known how
    fast this one is."""
    from dualblade.config import Path as KVPath
    from dualblade.hf.plan import plan_cache

    speeds = request.speeds
    if speeds is None:
        return None
    faster = replace(
        speeds,
        direct_bytes_per_s=factor * speeds.direct_bytes_per_s,
        cache_miss_bytes_per_s=min(
            factor * speeds.cache_miss_bytes_per_s, speeds.cache_hit_bytes_per_s
        ),
    )
    made = plan_cache(config, replace(request, speeds=faster))
    return {
        "factor": factor,
        "direct_bytes_per_s": faster.direct_bytes_per_s,
        "direct_bytes": made.bytes_on(KVPath.DIRECT),
        "step": _step(made),
    }


def _other_memory(config: Any, request: PlanRequest, factor: float) -> dict[str, Any]:
    """What the plan would be with another budget; `error` where that is too small."""
    from dualblade.config import Path as KVPath
    from dualblade.errors import BudgetError
    from dualblade.hf.plan import plan_cache

    request = replace(request, budget_bytes=int(request.budget_bytes * factor))
    told = {"factor": factor, "budget_bytes": request.budget_bytes}
    try:
        made = plan_cache(config, request)
    except BudgetError as exc:
        return {**told, "error": str(exc).splitlines()[0]}
    return {**told, "direct_bytes": made.bytes_on(KVPath.DIRECT), "step": _step(made)}


def _show(result: dict[str, Any]) -> None:
    from rich.table import Table

    from dualblade.cli.output import result_console

    console = result_console()
    console.print(
        f"{result['model']}, {result['dtype']}: {result['batch']} x {result['context']} tokens, "
        f"KV {format_size(result['kv_bytes'])}, budget {format_size(result['budget_bytes'])}"
    )
    table = Table(box=None, pad_edge=False)
    for name in ("layer", "part", "path", "per layer", "reason"):
        table.add_column(name, justify="right" if name in ("layer", "per layer") else "left")
    for first, last, unit in _runs(result["units"]):
        layers = str(first) if first == last else f"{first}-{last}"
        size = format_size(unit["bytes"]) if unit["bytes"] >= 0 else "?"
        path = unit["path"]
        if path == "dual":
            path += f", {format_size(unit['cached_bytes'])} cached"
        table.add_row(layers, unit["part"], path, size, unit["reason"])
    console.print(table)
    for line in _totals(result):
        console.print(line)


def _runs(units: list[dict[str, Any]]) -> list[tuple[int, int, dict[str, Any]]]:
    """Neighbouring layers that are alike in all their units, as (first, last, unit) lines."""
    layers: dict[int, list[dict[str, Any]]] = {}
    for unit in units:
        layers.setdefault(unit["layer"], []).append(unit)

    def likeness(layer: int) -> list[dict[str, Any]]:
        return [{**unit, "layer": None} for unit in layers[layer]]

    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and likeness(runs[-1][0]) == likeness(layer):
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return [(run[0], run[-1], unit) for run in runs for unit in _merged(layers[run[0]])]


def _merged(units: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Keys and values in one line when they go the same way."""
    if len(units) == 2 and {**units[0], "part": ""} == {**units[1], "part": ""}:
        both = {word: 2 * units[0][word] for word in ("bytes", "cached_bytes")}
        return [{**units[0], **both, "part": "keys, values"}]
    return units


def _totals(result: dict[str, Any]) -> list[str]:
    sizes = result["bytes_by_path"]
    lines = [", ".join(f"{word} {format_size(sizes[word])}" for word in _PATHS if sizes[word])]
    shares = result["shares"]
    if shares is not None:
        lines.append(
            f"of the budget: staging {format_size(shares['staging_bytes'])}, gather buffer "
            f"{format_size(shares['gather_bytes'])}, tails "
            f"{format_size(shares['tail_bytes'])}, left for the page cache "
            f"{format_size(shares['page_cache_bytes'])}"
        )
        read = sizes["direct"]
        lines.append(
            "everything fits: a warm step reads nothing from the drive"
            if read == 0 and result["path"] == "dual"
            else f"read directly from the drive at each step: {format_size(read)}"
        )
        step = result["step"]
        lines.append(
            "no profile of the store's device: dualblade tune STORE measures it"
            if step is None
            else _step_line(step)
        )
        lines += [_other_line(other) for other in result["other_memory"]]
        faster = result["faster_drive"]
        if faster is not None:
            lines.append(
                f"with a drive twice as fast ({format_size(int(faster['direct_bytes_per_s']))}/s): "
                f"{format_size(faster['direct_bytes'])} of each step from the drive, "
                f"{_milliseconds(faster['step'])}"
            )
    return lines


def _step_line(step: dict[str, Any]) -> str:
    reads = max(step["drive_seconds"], step["copy_seconds"])
    if not step["compute_seconds"]:
        return f"reads of a step: {_milliseconds(step)}, bound by {step['bound']}"
    return (
        f"a step: {_milliseconds(step)}, bound by {step['bound']} "
        f"(reads {1000 * reads:.1f} ms, computing {1000 * step['compute_seconds']:.1f} ms)"
    )


def _milliseconds(step: dict[str, Any]) -> str:
    milliseconds: float = step["seconds"] * 1000
    return f"{milliseconds:.1f} ms"


def _other_line(other: dict[str, Any]) -> str:
    words = "half" if other["factor"] < 1 else "twice"
    head = f"with {words} the memory ({format_size(other['budget_bytes'])}): "
    if "error" in other:
        return f"{head}{other['error']}"
    step = other["step"]
    reads = f"{format_size(other['direct_bytes'])} of each step from the drive"
    return head + (reads if step is None else f"{reads}, {_milliseconds(step)}")
