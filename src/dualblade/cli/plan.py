"""`dualblade plan`: which unit goes which way, for a model that need not be there."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dualblade.cli import options
from dualblade.errors import ConfigError
from dualblade.units import format_size, parse_size

if TYPE_CHECKING:
    from dualblade.config import EngineConfig
    from dualblade.hf.footprint import Footprint
    from dualblade.hf.plan import CachePlan, PlanRequest

PATHS = ("memory", "page-cache", "direct")


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
        str | None,
        typer.Option(
            "--device",
            metavar="DEVICE",
            help="cpu or cuda, which need not be here; by default a GPU if there is.",
        ),
    ] = None,
    store: options.Store = None,
    json: options.Json = False,
    debug: options.Debug = False,  # noqa: ARG001 - read by Command
) -> None:
    """Show which way each layer's KV would go.

    The residency plan of a model, context and budget; no weights are needed. For each layer: the
    path of its keys and values, their bytes, and the reason. Where `tune` has measured the store's
    device and this processor, also the time of a step (reads and computing overlap, so the longer
    one), and what half and twice the memory or a drive of twice the speed would change. On a GPU
    only the reads are predicted. Then what that takes of memory and of the drive, beside what this
    machine has.

    \b
    Examples:
      dualblade plan --model random:llama-3.1-8b --context 128k --memory-budget 4GiB
      dualblade plan --model ./llama --context 32k --batch 4 --memory-budget 2GiB --json
    """
    from dualblade.cli.output import write_json
    from dualblade.cli.store_place import look_at_store
    from dualblade.config import Path as KVPath
    from dualblade.config import check_attention

    way = KVPath.parse(path)
    check_attention(attention)
    if device not in (None, "cpu", "cuda"):
        raise ConfigError(f"unknown device {device!r}", hint="use cpu or cuda")
    engine = options.engine_config(io_engine="auto", queue_depth=None, cache_percent=cache_percent)
    if way is not KVPath.MEMORY:
        look_at_store(store)
    subject = _Subject.of(model, dtype, device, attention)
    tokens = options.parse_tokens(context)
    needed = subject.footprint(tokens, batch)
    activations = 0 if needed is None else needed.activation_bytes
    stated = None if memory_budget == "auto" else parse_size(memory_budget)
    budget = 0 if way is KVPath.MEMORY else _budget_bytes(stated, subject, activations)
    request = subject.request(
        tokens=tokens,
        batch=batch,
        budget_bytes=budget,
        path=way,
        engine=engine,
        store=store,
    )
    result = _planned(subject, request)
    result |= _needs(subject, request, result, store, needed)
    if json:
        write_json(result)
    else:
        from dualblade.cli.plan_text import show_plan

        show_plan(result)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Subject:
    """The model that is planned for, `unloaded` without memory, on `device`, cpu or cuda."""

    name: str
    config: Any
    unloaded: Any
    device: str
    over_tiles: bool

    @classmethod
    def of(cls, name: str, dtype: str, device: str | None, attention: str) -> _Subject:
        import torch

        from dualblade.hf.choice import choose
        from dualblade.hf.footprint import skeleton
        from dualblade.hf.models import (
            config_of,
            default_dtype,
            foreign_errors_in_brief,
            parse_dtype,
        )

        place = device or ("cuda" if torch.cuda.is_available() else "cpu")
        config = config_of(name)
        with foreign_errors_in_brief(name):
            unloaded = skeleton(config, parse_dtype(dtype) or default_dtype(config, place))
        return cls(
            name=name,
            config=config,
            unloaded=unloaded,
            device=place,
            over_tiles=choose(unloaded, attention, place).over_tiles,
        )

    @property
    def dtype(self) -> str:
        """The word for it."""
        return str(self.unloaded.dtype).removeprefix("torch.")

    @property
    def weights_bytes(self) -> int:
        """What they take in memory."""
        return sum(parameter.nbytes for parameter in self.unloaded.parameters())

    def footprint(self, tokens: int, batch: int) -> Footprint | None:
        """What it takes beside a cache, with prompts of `tokens`; None for quantised weights."""
        from dualblade.hf.footprint import footprint
        from dualblade.hf.models import is_packed

        if getattr(self.config, "quantization_config", None) is not None:
            return None
        rows = min(tokens, options.PREFILL_CHUNK_TOKENS) * batch
        dtype, packed = self.unloaded.dtype, is_packed(self.name)
        return footprint(self.config, dtype, rows=rows, staging_bytes=0, is_packed=packed)

    def request(self, *, store: Any, engine: EngineConfig, **asked: Any) -> PlanRequest:
        """What is `asked`, as the model and the drive below `store` have it."""
        from dualblade.hf.plan import PlanRequest

        return PlanRequest.of(
            self.unloaded,
            device=self.device,
            engine=engine,
            over_tiles=self.over_tiles,
            **asked,
            **_measured(self.unloaded, self.device, store, engine),
        )


def _planned(subject: _Subject, request: PlanRequest) -> dict[str, Any]:
    from dualblade.config import Path as KVPath
    from dualblade.hf.plan import plan_cache

    made = plan_cache(subject.config, request)
    result = _result(subject, request, made)
    if made.shares is not None and request.path is KVPath.DUAL:
        result["other_memory"] = [_other_memory(subject.config, request, by) for by in (0.5, 2.0)]
        result["faster_drive"] = _faster_drive(subject.config, request, 2.0)
    return result


def _needs(
    subject: _Subject,
    request: PlanRequest,
    result: dict[str, Any],
    store: Any,
    needed: Footprint | None,
) -> dict[str, Any]:
    """What it takes of memory and of the drive, and what there is. `needed` is of
    `subject.footprint`; of quantised weights it is not known (None)."""
    from dualblade.cli.store_place import store_room
    from dualblade.config import Path as KVPath
    from dualblade.host.memory import available_memory
    from dualblade.units import EXTENT_ALIGN_BYTES, round_up

    weights = activations = loading = None
    if needed is not None:
        weights, activations = needed.weights_bytes, needed.activation_bytes
        loading = weights + needed.loading_bytes
    takes_store = request.path is not KVPath.MEMORY
    stored = [unit for unit in result["units"] if unit["path"] != KVPath.MEMORY.value]
    there = available_memory()
    return {
        "device": subject.device,
        "weights_bytes": weights,
        "loading_bytes": loading,
        "activation_bytes": activations,
        "memory_available_bytes": there.available_bytes,
        "memory_source": there.source,
        "store": [str(place) for place in store or ()] or None,
        "store_bytes": sum(round_up(unit["bytes"], EXTENT_ALIGN_BYTES) for unit in stored),
        "store_free_bytes": store_room(store) if takes_store else None,
    }


def _budget_bytes(stated: int | None, subject: _Subject, activations: int) -> int:
    """What is stated; of `auto` (None) what will be there once the weights are loaded, beside
    `activations`.

    Raises: BudgetError if the weights leave nothing, ConfigError if nobody knows what they take.
    """
    from dualblade.errors import BudgetError
    from dualblade.host.memory import available_memory

    if stated is not None:
        return stated
    memory = available_memory()
    there = memory.budget_bytes
    if subject.device != "cpu":
        return there
    if getattr(subject.config, "quantization_config", None) is not None:
        raise ConfigError(
            "what quantised weights take beside the cache is not known before they are loaded",
            hint="say with --memory-budget what the cache would have",
        )
    weights = subject.weights_bytes
    if weights >= there:
        raise BudgetError(
            f"the weights alone take {format_size(weights)}; there are {format_size(there)}",
            hint="say with --memory-budget what the cache would have on the machine you plan for",
            needed_bytes=weights,
        )
    # A prompt's activations take the reserve first; the budget gives way to the rest of them.
    return max(0, there - weights - max(0, activations - memory.reserve_bytes))


def _measured(unloaded: Any, device: str, store: Any, engine: EngineConfig) -> dict[str, Any]:
    """What is known of the processor's speed and the drive's, as PlanRequest takes it."""
    from dualblade.hf.speeds import door_speeds, known_profile, reads_in_place

    told: dict[str, Any] = {}
    if profile := known_profile(store):
        in_place = reads_in_place(engine, device, store)
        told["speeds"] = door_speeds(profile, in_place=in_place)
        if device == "cpu":
            told["compute"] = profile.compute.get(str(unloaded.dtype).removeprefix("torch."))
    return told


def _result(subject: _Subject, request: PlanRequest, made: CachePlan) -> dict[str, Any]:
    from dualblade.config import Path as KVPath

    shares = made.shares
    decoder = subject.config.get_text_config(decoder=True)
    return {
        "command": "plan",
        "model": subject.name,
        "dtype": subject.dtype,
        "context": request.tokens,
        "positions_max": getattr(decoder, "max_position_embeddings", None),
        "batch": request.batch,
        "path": request.path.value,
        "cache_percent": request.engine.cache_percent,
        "attention": "tiles" if request.over_tiles else "exact",
        "kv_bytes": made.kv_bytes,
        "kv_bytes_per_token": made.token_bytes,
        "budget_bytes": None if request.path is KVPath.MEMORY else request.budget_bytes,
        "shares": None
        if shares is None
        else {**asdict(shares), "page_cache_bytes": shares.page_cache_bytes},
        "bytes_by_path": {word: made.bytes_on(KVPath(word)) for word in PATHS},
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
