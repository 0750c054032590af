"""What `dualblade plan` says, for people."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from dualblade.cli.output import result_console
from dualblade.cli.plan import PATHS
from dualblade.units import format_size


def show_plan(result: dict[str, Any]) -> None:
    """The table of layers, then what it comes to."""
    console = result_console()
    budget = result["budget_bytes"]
    console.print(
        f"{result['model']}, {result['dtype']}: {result['batch']} x {result['context']} tokens, "
        f"KV {format_size(result['kv_bytes'])}"
        + ("" if budget is None else f", budget {format_size(budget)}")
    )
    positions = result["positions_max"]
    if positions is not None and result["context"] > positions:
        console.print(f"past the model's {positions} positions: generate refuses this")
    table = Table(box=None, pad_edge=False)
    for name in ("layer", "part", "path", "per layer", "reason"):
        table.add_column(name, justify="right" if name in ("layer", "per layer") else "left")
    for first, last, unit in _runs(result["units"]):
        layers = str(first) if first == last else f"{first}-{last}"
        size = "?" if unit["bytes"] is None else format_size(unit["bytes"])
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
    lines = [", ".join(f"{word} {format_size(sizes[word])}" for word in PATHS if sizes[word])]
    if result["shares"] is not None:
        lines += _stored_lines(result)
    lines.append(_memory_line(result))
    if result["store_bytes"]:
        place = " + ".join(result["store"] or ["~/.cache/dualblade"])
        takes, free = result["store_bytes"], result["store_free_bytes"]
        short = ": too little" if takes > free else ""
        lines.append(
            f"the store takes {format_size(takes)}; {format_size(free)} free at {place}{short}"
        )
    return lines


def _stored_lines(result: dict[str, Any]) -> list[str]:
    shares, step, faster = result["shares"], result["step"], result["faster_drive"]
    lines = [
        f"of the budget: staging {format_size(shares['staging_bytes'])}, "
        f"{'group' if result['attention'] == 'tiles' else 'gather'} buffer "
        f"{format_size(shares['gather_bytes'])}, tails "
        f"{format_size(shares['tail_bytes'])}, left for the page cache "
        f"{format_size(shares['page_cache_bytes'])}",
        *_read_lines(result),
        "no profile of the store's device: dualblade tune STORE measures it"
        if step is None
        else _step_line(step),
        *(_other_line(other) for other in result["other_memory"]),
    ]
    if faster is not None:
        lines.append(
            f"with a drive twice as fast ({format_size(int(faster['direct_bytes_per_s']))}/s): "
            f"{format_size(faster['direct_bytes'])} of each step from the drive, "
            f"{_milliseconds(faster['step'])}"
        )
    return lines


def _read_lines(result: dict[str, Any]) -> list[str]:
    """What a step reads, and from where."""
    read, cached = (result["bytes_by_path"][word] for word in ("direct", "page-cache"))
    room = result["shares"]["page_cache_bytes"]
    if read == 0 and cached <= room:
        return ["everything fits: a warm step reads nothing from the drive"]
    lines = []
    if cached > room:  # the page cache alone, or a split that was fixed
        lines.append(
            f"through the page cache at each step: {format_size(cached)}, of which "
            f"{format_size(room)} can stay; a sweep over more than fits finds next to none of it"
        )
    if read:
        lines.append(f"read directly from the drive at each step: {format_size(read)}")
    return lines


def _memory_line(result: dict[str, Any]) -> str:
    """Weights, activations, budget, and KV that is in memory, beside what there is."""
    there, weights = result["memory_available_bytes"], result["weights_bytes"]
    kept = {"KV in memory": result["bytes_by_path"]["memory"]}
    parts = {"budget": result["budget_bytes"]}
    if result["device"] == "cpu":
        parts |= kept
    head = "weights ? (quantised)" if weights is None else f"weights {format_size(weights)}"
    if result["device"] == "cpu" and weights is not None:
        parts = {"activations": result["activation_bytes"], **parts}
    told = [f"{name} {format_size(size)}" for name, size in parts.items() if size]
    has = f"this machine has {format_size(there)} ({result['memory_source']})"
    if result["device"] != "cpu":
        own = "".join(f" + {name} {format_size(size)}" for name, size in kept.items() if size)
        host = " + ".join(told) or "nothing"
        return f"on the GPU: {head}{own} + activations; of the host: {host}; {has}"
    line = f"{' + '.join([head, *told])}; {has}"
    if weights is None:
        return line
    needed = weights + sum(size for size in parts.values() if size)
    loading = result["loading_bytes"]
    if loading > max(there, needed):
        return f"{line}: does not fit, {format_size(loading)} while the weights are loaded"
    return f"{line}: {'it fits' if needed <= there else 'does not fit'}"


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
