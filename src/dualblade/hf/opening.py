"""Opening what a cache over a store stands on: budget, engine, store, and the drive's speeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedModel

from dualblade.config import EngineConfig, Path
from dualblade.hf.footprint import weights_per_token
from dualblade.hf.geometry import layer_shapes
from dualblade.hf.speeds import (
    FIRST_USE_KV_BYTES_MIN,
    door_speeds,
    known_profile,
    measure_at_first_use,
    reads_in_place,
)
from dualblade.host.memory import MemoryProbe
from dualblade.host.profile import DeviceProfile
from dualblade.io import QUEUE_DEPTH_MAX, Engine, open_engine
from dualblade.metrics import SpeedFacts
from dualblade.pipeline import KVPipeline, KVSettings
from dualblade.pipeline.memory_watch import MemorySource
from dualblade.store import Place, Store, member_count
from dualblade.units import MIB


def budget_of(stated: int | None, config: EngineConfig) -> tuple[int, MemorySource]:
    """The budget to begin with, and where it comes from while the cache lives. None: `auto`."""
    reserve = config.memory_reserve_bytes
    if stated is None:
        probe = MemoryProbe(reserve_bytes=reserve)
        return probe.read().budget_bytes, MemorySource(asked_bytes=None, read=probe.read)
    # Who states a budget has thought of the others: no reserve unless one is stated too.
    probe = MemoryProbe(reserve_bytes=reserve or 0)
    return stated, MemorySource(asked_bytes=stated, read=probe.read)


def open_pipeline(
    store: Place | Sequence[Place] | None, settings: KVSettings, kv_bytes: int | None
) -> tuple[Store, KVPipeline, SpeedFacts | None]:
    """The engine, the store and the pipeline over them, and the drive's speeds; nothing
    stays open when one refuses. `kv_bytes`: the least that is to be expected, None: no end."""
    config = settings.config
    engine = open_engine(
        config.io_engine,
        # Each member's own queue is to be full.
        queue_depth=min(config.queue_depth * member_count(store), QUEUE_DEPTH_MAX),
        chunk_bytes=config.chunk_bytes,
        io_poll=config.io_poll,
    )
    try:
        opened = Store.open(
            store,
            engine,
            direct=settings.path is not Path.PAGE_CACHE,
            capacity_bytes=config.disk_capacity_bytes,
            keep_blocks=config.keep_store_blocks,
            discard=config.discard,
            read_ahead=lets_kernel_read_ahead(settings),
        )
    except BaseException:
        engine.close()
        raise
    try:
        profile = _profile(store, opened, engine, settings, kv_bytes)
        in_place = reads_in_place(config, settings.device.type, store)
        settings = replace(settings, speeds=door_speeds(profile, in_place=in_place))
        speeds = _speed_facts(profile, in_place=in_place)
        return opened, KVPipeline(opened, engine, settings), speeds
    except BaseException:
        opened.close()
        engine.close()
        raise


_READ_AHEAD_BYTES_MIN = 256 * MIB
"""Of budget. With less, what the kernel reads ahead (8 MiB at a time here) may be gone before it
is used: a step of narrow layers took 1.4 s for 0.57 with 77 MiB, and 0.4 to 0.9 for 0.53 with 192.
With 384 MiB it takes 0.4 for 0.53, and one of OPT-6.7B's layers with 1 GiB 3.1 s for 4.2."""


def lets_kernel_read_ahead(settings: KVSettings) -> bool:
    """Whether reads through the page cache do best to let the kernel read farther than asked."""
    is_alone = settings.path is Path.PAGE_CACHE
    return is_alone and settings.budget_bytes >= _READ_AHEAD_BYTES_MIN


def _profile(
    place: Place | Sequence[Place] | None,
    store: Store,
    engine: Engine,
    settings: KVSettings,
    kv_bytes: int | None,
) -> DeviceProfile | None:
    """What is known of the store's device; measured now where a plan of this size asks for it."""
    known = known_profile(place)
    if known is not None or settings.path is not Path.DUAL:
        return known
    worth = settings.budget_bytes if kv_bytes is None else min(kv_bytes, settings.budget_bytes)
    is_fixed = settings.config.cache_percent is not None
    if is_fixed or min(worth, store.capacity_bytes) < FIRST_USE_KV_BYTES_MIN:
        return None
    return measure_at_first_use(place, store, engine)


def _speed_facts(profile: DeviceProfile | None, *, in_place: bool) -> SpeedFacts | None:
    if profile is None:
        return None
    return SpeedFacts(
        measured_by="first use" if profile.quick else "tune",
        measured_at=profile.measured_at,
        direct_bytes_per_s=profile.direct_bytes_per_s,
        cache_hit_bytes_per_s=profile.cache_hit_bytes_per_s,
        cache_miss_bytes_per_s=profile.cache_miss_bytes_per_s,
        in_place=in_place,
    )


def kv_bytes_least(model: PreTrainedModel, tokens_max: int | None) -> int | None:
    """KV of one sequence of the stated maximum; None where none is stated."""
    shapes = [shape for shape in layer_shapes(model.config) if shape.offloaded]
    elements = sum(shape.kv_heads * (shape.key_dim + shape.value_dim) for shape in shapes)
    return None if tokens_max is None else elements * model.dtype.itemsize * tokens_max


def layer_weights_bytes(model: PreTrainedModel, layer_count: int) -> int:
    """What a processor multiplies in each layer. A GPU is done with it before a slot is read."""
    return weights_per_token(model) // layer_count if model.device.type == "cpu" else 0
