"""Everything that can be wrong with a cache's model, budget or calls: told, and nothing lost."""

from __future__ import annotations

import contextlib
import copy
import errno
import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    DynamicCache,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.bert.modeling_bert import BertModel

import dualblade
from dualblade import (
    BudgetError,
    Closed,
    ConfigError,
    DeviceError,
    DualBladeCache,
    NoSpace,
    StorageError,
    Unsupported,
)
from dualblade.config import EngineConfig
from dualblade.config import Path as KVPath
from dualblade.hf import speeds
from dualblade.io import Arena, Engine, open_engine
from dualblade.pipeline import KVPipeline, KVSettings
from dualblade.pipeline.gather import GatherBuffers
from dualblade.pipeline.unit import Unit
from dualblade.store import Extent, Store
from dualblade.store.format import DATA_OFFSET
from dualblade.units import MIB
from tests.fault.disks import disk_with_failing_writeback, ext4_disk, needs_root
from tests.integration.tiny_models import prompt, tiny_model
from tests.stepping import take_turn

# Python 3.12 warns of forking with threads: that it is survived is what is tested.
FORKING = [sys.executable, "-W", "ignore::DeprecationWarning", "-c"]

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64}


def rows(tokens: int, **changes: Any) -> tuple[torch.Tensor, torch.Tensor]:
    shape = {"batch": 1, "heads": 2, "dim": 16, "dtype": torch.float32, **changes}
    made = torch.ones(shape["batch"], shape["heads"], tokens, shape["dim"], dtype=shape["dtype"])
    return made, made


def step(cache: DualBladeCache, tokens: int, **changes: Any) -> None:
    for layer in range(3):
        take_turn(cache, *rows(tokens, **changes), layer)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: BertModel(BertConfig(**SMALL, num_attention_heads=2)), "does not generate"),
        (lambda: MambaForCausalLM(MambaConfig(**SMALL)), "no full-attention layers"),
        (
            lambda: MistralForCausalLM(
                MistralConfig(**SMALL, num_attention_heads=2, sliding_window=8)
            ),
            "bounded by the window",
        ),
        (
            lambda: T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=32, num_layers=1)),
            "encoder-decoder",
        ),
    ],
)
def test_models_without_such_a_cache(make: Any, why: str) -> None:
    with pytest.raises(Unsupported, match=why):
        DualBladeCache.for_model(make(), memory_budget="16MiB")


def test_a_layer_type_that_nobody_knows_is_named() -> None:
    model = tiny_model()
    model.config.layer_types = ["full_attention", "warp_attention", "full_attention"]
    with pytest.raises(Unsupported, match="warp_attention"):
        DualBladeCache.for_model(model, memory_budget="16MiB")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"path": "dirct"}, "unknown path 'dirct'"),
        ({"attention": "flash"}, "unknown attention"),
        ({"memory_budget": "lots"}, "not a size"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"memory_budget": "much", "path": "memory"}, "not a size"),
    ],
)
def test_arguments_that_mean_nothing(options: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        DualBladeCache.for_model(tiny_model(), **{"memory_budget": "16MiB", **options})


def test_an_unknown_engine_setting_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'queue_depth'"):
        dualblade.EngineConfig.from_mapping({"que_depth": 4})


@pytest.mark.parametrize("percent", [-1, 101, 2.5, True])
def test_a_cache_percent_is_a_percentage(percent: Any) -> None:
    with pytest.raises(ConfigError, match="cache_percent must be"):
        dualblade.EngineConfig(cache_percent=percent)
    with pytest.raises(ConfigError, match="splits the dual path"):
        DualBladeCache.for_model(
            tiny_model(), path="direct", config=dualblade.EngineConfig(cache_percent=50)
        )


def test_a_budget_below_staging_says_the_least_that_would_do() -> None:
    with pytest.raises(BudgetError, match="at least") as caught:
        DualBladeCache.for_model(tiny_model(), memory_budget="1MiB")
    with DualBladeCache.for_model(tiny_model(), memory_budget=2 * caught.value.needed_bytes):
        pass


@pytest.mark.parametrize(
    "change", [{"batch": 2}, {"heads": 3}, {"dim": 8}, {"dtype": torch.bfloat16}]
)
def test_another_shape_or_dtype_between_updates_changes_nothing(change: dict[str, Any]) -> None:
    with DualBladeCache.for_model(tiny_model(), memory_budget="16MiB") as cache:
        step(cache, 70)
        with pytest.raises(ConfigError, match="of layer 0 changed"):
            cache.update(*rows(1, **change), 0)
        step(cache, 1)
        assert cache.get_seq_length() == 71


def test_keys_and_values_that_disagree() -> None:
    with DualBladeCache.for_model(tiny_model(), memory_budget="16MiB") as cache:
        keys, values = rows(4)
        with pytest.raises(ConfigError, match="same batch and tokens"):
            cache.update(keys, values[:, :, :3], 0)
        with pytest.raises(ConfigError, match=r"\[batch, kv_heads, tokens, dim\]"):
            cache.update(keys[0], values[0], 0)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"model": "gpt2"}, "a loaded model, not a str"),
        ({"config": {"queue_depth": 4}}, "an EngineConfig, not a dict"),
    ],
)
def test_arguments_of_another_kind_are_refused(given: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        DualBladeCache.for_model(**{"model": tiny_model(), **given})


def test_gradients_are_refused() -> None:
    with DualBladeCache.for_model(tiny_model(), memory_budget="16MiB") as cache:
        keys, values = rows(4)
        with pytest.raises(Unsupported, match="no_grad"):
            cache.update(keys.requires_grad_(), values, 0)


def test_a_context_that_outgrows_the_budget_is_refused_before_the_step() -> None:
    with DualBladeCache.for_model(tiny_model(), memory_budget="8MiB") as cache:
        while 2 * cache.stats().memory.gather_bytes < 8 << 20:
            step(cache, 1000)
        with pytest.raises(BudgetError, match="group buffer") as caught:
            step(cache, 100_000)
        tokens = cache.get_seq_length()
        assert caught.value.needed_bytes > cache.stats().memory.budget_bytes
        assert [cache.get_seq_length(i) for i in range(3)] == [tokens] * 3, "half a step was taken"
        cache.crop(-1000)
        step(cache, 1)


def test_a_layer_that_there_is_no_room_to_gather_costs_the_text_not_the_cache() -> None:
    """A model that touches its keys, over tiles so far, under a budget that is for tiles."""
    model = tiny_model()
    with DualBladeCache.for_model(model, memory_budget="24MiB", attention="tiles") as cache:
        for layer in range(3):
            cache.append(*rows(150_000), layer)
        keys, _ = cache.update(*rows(1), 0)
        with pytest.raises(BudgetError, match="gather buffer"):
            keys + 0
        with pytest.raises(Closed, match="failed earlier") as caught:
            step(cache, 1)
        assert caught.value.hint == "reset it for another prompt"
        cache.reset()
        step(cache, 100)
        assert cache.get_seq_length() == 100


def test_max_tokens_is_a_limit() -> None:
    with DualBladeCache.for_model(tiny_model(), memory_budget="16MiB", max_tokens=100) as cache:
        step(cache, 100)
        with pytest.raises(ConfigError, match="max_tokens=100"):
            step(cache, 1)
        assert cache.get_seq_length() == 100


def test_use_after_close_and_closing_twice() -> None:
    cache = DualBladeCache.for_model(tiny_model(), memory_budget="16MiB")
    step(cache, 70)
    cache.close()
    cache.close()
    with pytest.raises(Closed, match="is closed"):
        cache.update(*rows(1), 0)
    with pytest.raises(Closed):
        cache.reset()
    assert cache.stats().path == "dual"


@pytest.mark.parametrize(
    ("attention", "inner"),
    [
        ("exact", "dualblade.pipeline.kv.scatter"),
        ("tiles", "dualblade.attention.kernel.KernelAttention.both"),
    ],
)
def test_an_interrupt_in_the_middle_of_a_step_spoils_the_cache(
    monkeypatch: pytest.MonkeyPatch, attention: Any, inner: str
) -> None:
    with DualBladeCache.for_model(
        tiny_model(), memory_budget="16MiB", attention=attention
    ) as cache:
        step(cache, 70)
        with monkeypatch.context() as patch:
            patch.setattr(inner, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                step(cache, 1)
        with pytest.raises(Closed, match="failed earlier"):
            step(cache, 1)


def test_nothing_is_left_behind(own_cache_directory: Path) -> None:
    model = tiny_model()
    with DualBladeCache.for_model(model, memory_budget="16MiB") as cache:
        model.generate(**prompt(), cache=cache, max_new_tokens=5)
    assert list(own_cache_directory.iterdir()) == []


def test_a_cache_cannot_be_copied() -> None:
    import copy

    with (
        DualBladeCache.for_model(tiny_model(), memory_budget="16MiB") as cache,
        pytest.raises(Unsupported, match="cannot be copied"),
    ):
        copy.deepcopy(cache)


def test_two_caches_on_one_model() -> None:
    model, inputs = tiny_model(), prompt()
    want = model.generate(**inputs, cache=DynamicCache(config=model.config), max_new_tokens=80)
    with (
        DualBladeCache.for_model(model, memory_budget="16MiB") as first,
        DualBladeCache.for_model(model, memory_budget="16MiB", path="direct") as second,
    ):
        for cache in (first, second, first):
            cache.reset()
            got = model.generate(**inputs, cache=cache, max_new_tokens=80)
            assert torch.equal(got, want)


@needs_root
def test_a_failed_writeback_raises_and_no_page_is_trusted_again(tmp_path: Path) -> None:
    """After it the kernel may call the page clean, evict it, and read old bytes back."""
    with disk_with_failing_writeback(tmp_path, real_bytes=16 * MIB, size_bytes=96 * MIB) as disk:
        cache = DualBladeCache.for_model(
            tiny_model(), store=disk / "kv.store", path="page-cache", memory_budget="64MiB"
        )
        with pytest.raises(DeviceError) as caught:
            for _ in range(100):
                step(cache, 1000)
        assert caught.value.errno in (errno.EIO, errno.ENOSPC)
        with pytest.raises(Closed, match="failed earlier"):
            step(cache, 1)
        with contextlib.suppress(StorageError):  # the superblock may not be writable either
            cache.close()


@needs_root
def test_a_disk_that_fills_up_in_mid_generation(tmp_path: Path) -> None:
    with (
        ext4_disk(tmp_path / "disk", tmp_path / "disk.img", 24 * MIB) as disk,
        DualBladeCache.for_model(
            tiny_model(),
            store=disk / "kv.store",
            memory_budget="64MiB",
            config=dualblade.EngineConfig(disk_capacity_bytes=64 * MIB),
        ) as cache,
    ):
        with pytest.raises(NoSpace, match="cannot grow"):
            for _ in range(100):
                step(cache, 500)
        tokens = cache.get_seq_length()
        assert [cache.get_seq_length(layer) for layer in range(3)] == [tokens] * 3
        step(cache, 1)


def test_layers_share_what_a_store_has_left(tmp_path: Path) -> None:
    """None takes so much for tokens to come that another has no room for those that are there."""
    config = dualblade.EngineConfig(disk_capacity_bytes=64 * MIB)
    with DualBladeCache.for_model(
        tiny_model(), store=tmp_path / "kv.store", memory_budget="256MiB", config=config
    ) as cache:
        with pytest.raises(NoSpace):
            for _ in range(1000):
                for layer in range(3):
                    cache.append(*rows(1024), layer)
        stored = cache.stats().stored_bytes
    assert stored >= 0.9 * 64 * MIB


def test_a_prompt_that_does_not_fit_the_store_is_no_end_for_the_next_one(tmp_path: Path) -> None:
    """Refused in the middle of its first step, of which some layers have rows already."""
    room = dualblade.EngineConfig(disk_capacity_bytes=16 * MIB)
    with DualBladeCache.for_model(
        tiny_model(), store=tmp_path / "kv.store", memory_budget="64MiB", config=room
    ) as cache:
        with pytest.raises(NoSpace):
            step(cache, 40_000)
        assert cache.get_seq_length(0) > 0, "the first layer was taken in"
        with pytest.raises(Closed, match="reset it"):
            step(cache, 1)
        cache.reset()
        assert cache.get_seq_length(0) == 0
        step(cache, 500)
        step(cache, 1)
        assert cache.get_seq_length(2) == 501


def test_a_cache_of_a_smaller_model_says_so() -> None:
    with DualBladeCache.for_model(tiny_model(), memory_budget="16MiB") as cache:
        step(cache, 1)
        with pytest.raises(ConfigError, match="a model of 3 layers"):
            cache.update(*rows(1), 3)


def test_a_first_layer_that_is_refused_leaves_nothing(tmp_path: Path) -> None:
    """There was room for its keys, not for its values."""
    config = dualblade.EngineConfig(disk_capacity_bytes=2 * MIB)
    with DualBladeCache.for_model(
        tiny_model(), store=tmp_path / "kv.store", memory_budget="16MiB", config=config
    ) as cache:
        for _ in range(2):
            with pytest.raises(NoSpace):
                take_turn(cache, *rows(100), 0)
            assert cache._store.used_bytes == 0
            assert cache.get_seq_length() == 0
        step(cache, 10)  # in tails


@pytest.mark.parametrize("indices", [[0, 3], [-4], []])
def test_sequences_that_are_none_change_nothing(indices: list[int]) -> None:
    with DualBladeCache.for_model(tiny_model(), memory_budget="16MiB") as cache:
        step(cache, 100, batch=3)
        with pytest.raises(ConfigError, match="no sequences of a batch of 3"):
            cache.batch_select_indices(torch.tensor(indices, dtype=torch.int64))
        step(cache, 1, batch=3)
        cache.batch_select_indices(torch.tensor([-1, 0]))
        step(cache, 1, batch=2)


# -- the end, in every way ------------------------------------------------------------------------


def a_step_old(store: Path | None = None, **settings: Any) -> DualBladeCache:
    settings = {"memory_budget": "32MiB", "attention": "exact", **settings}
    cache = DualBladeCache.for_model(tiny_model(), store=store, **settings)
    step(cache, 200)
    step(cache, 1)
    return cache


def open_files() -> int:
    for _ in range(3):  # what a finalizer lets go of is found by the next
        gc.collect()
    return len(os.listdir("/proc/self/fd"))


def test_a_cache_that_is_dropped_closes_its_store(tmp_path: Path) -> None:
    before, store = open_files(), tmp_path / "kv.store"
    cache = a_step_old(store)
    assert open_files() > before
    del cache
    assert open_files() == before
    assert store.stat().st_size == DATA_OFFSET


def test_a_failed_cache_that_is_dropped_closes_its_store_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it failed with came through frames that hold it."""
    before, model = open_files(), tiny_model()

    def fail(*_: Any, **__: Any) -> None:
        raise StorageError("the drive is gone")

    def use() -> None:
        cache = DualBladeCache.for_model(
            model, store=tmp_path / "kv.store", path="direct", memory_budget="16MiB"
        )
        model(**prompt(tokens=200), cache=cache)
        monkeypatch.setattr(KVPipeline, "_append", fail)
        with pytest.raises(StorageError, match="the drive is gone"):
            model(input_ids=torch.tensor([[5]]), cache=cache)
        with pytest.raises(Closed, match="StorageError: the drive is gone"):
            model(input_ids=torch.tensor([[5]]), cache=cache)

    with torch.no_grad():
        use()
    assert open_files() == before
    assert model.config._attn_implementation == "sdpa"


def test_a_closed_cache_holds_no_memory_and_still_tells() -> None:
    with a_step_old() as cache:
        pipeline, before = cache._pipeline, cache.stats()
        addresses = [pipeline._machinery.arena.address, pipeline._gather._keys.data_ptr()]
        assert all(map(is_mapped, addresses))
    assert not any(map(is_mapped, addresses))
    after = cache.stats()
    assert (after.memory.tail_bytes, after.memory.page_cache_bytes) == (0, 0)
    assert (after.kv_bytes, after.stored_bytes) == (before.kv_bytes, before.stored_bytes)
    assert after.tuning == before.tuning


def is_mapped(address: int) -> bool:
    ranges = (line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines())
    bounds = ([int(bound, 16) for bound in some.split("-")] for some in ranges)
    return any(start <= address < end for start, end in bounds)


def test_a_close_that_ctrl_c_ends_is_ended_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by an impatient second Ctrl-C, while a slow drive takes what was written behind."""
    before, store = open_files(), tmp_path / "kv.store"
    cache = a_step_old(store)
    plain, interrupts = Store._settle, iter([KeyboardInterrupt])

    def settle(store: Store, extent: Extent) -> None:
        for interrupt in interrupts:
            raise interrupt
        plain(store, extent)

    monkeypatch.setattr(Store, "_settle", settle)
    with pytest.raises(KeyboardInterrupt):
        cache.close()
    with pytest.raises(Closed):
        step(cache, 1)
    cache.close()
    assert store.stat().st_size == DATA_OFFSET
    a_step_old(store).close()  # nobody has it any more
    del cache
    assert open_files() == before


@pytest.mark.parametrize("after", [False, True])
def test_a_reset_that_ctrl_c_ends_loses_no_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, after: bool
) -> None:
    plain, calls = Store.free, 0

    def free(store: Store, extent: Extent) -> None:
        nonlocal calls
        calls += 1
        if calls != 2 or after:
            plain(store, extent)
        if calls == 2:
            raise KeyboardInterrupt

    with a_step_old(tmp_path / "kv.store", path="direct") as cache:
        monkeypatch.setattr(Store, "free", free)
        with pytest.raises(KeyboardInterrupt):
            cache.reset()
        cache.reset()
        assert cache._store is not None
        assert cache._store.free_bytes == cache._store.capacity_bytes
        step(cache, 100)


def test_a_new_layer_that_ctrl_c_ends_leaves_no_blocks_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, calls = Unit.make_room, 0

    def make_room(unit: Unit, *args: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        plain(unit, *args, **kwargs)
        if calls == 2:
            raise KeyboardInterrupt

    with DualBladeCache.for_model(
        tiny_model(), store=tmp_path / "kv.store", memory_budget="32MiB", path="direct"
    ) as cache:
        monkeypatch.setattr(Unit, "make_room", make_room)
        with pytest.raises(KeyboardInterrupt):
            step(cache, 200)
        assert cache._store is not None
        assert cache._store.free_bytes == cache._store.capacity_bytes
        cache.reset()
        step(cache, 200)


def test_staging_that_ctrl_c_left_registered_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine keeps what it was given: a second arena would be memory beside the budget."""
    plain, given = Engine.register_arena, list[int]()

    def register(engine: Engine, arena: Arena) -> bool:
        registered = plain(engine, arena)
        given.append(arena.address)
        if len(given) == 1:
            raise KeyboardInterrupt
        return registered

    with DualBladeCache.for_model(
        tiny_model(), store=tmp_path / "kv.store", memory_budget="32MiB", path="direct"
    ) as cache:
        monkeypatch.setattr(Engine, "register_arena", register)
        with pytest.raises(KeyboardInterrupt):
            step(cache, 200)
        cache.reset()
        step(cache, 200)
        step(cache, 1)
        assert len(given) == 2  # once more, for it may have been cut short; then no more
        assert len(set(given)) == 1


def test_segments_that_ctrl_c_left_half_cut_are_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = a_step_old(tmp_path / "kv.store", path="direct")
    plain = Unit.make_room

    def make_room(unit: Unit, *args: Any, **kwargs: Any) -> None:
        plain(unit, *args, **kwargs)
        unit.is_torn = True
        raise KeyboardInterrupt

    monkeypatch.setattr(Unit, "make_room", make_room)
    with pytest.raises(KeyboardInterrupt):
        step(cache, 200)
    monkeypatch.undo()
    with pytest.raises(Closed, match="failed earlier"):
        step(cache, 1)
    cache.close()


def test_memory_that_transfers_may_still_reach_stays_until_the_engine_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second Ctrl-C ends the wait for what the first measurement had under way."""
    kept: list[int] = []

    def measure(_: Store, arena: Arena, *__: Any, **___: Any) -> None:
        kept.append(arena.address)
        raise KeyboardInterrupt

    monkeypatch.setattr(speeds, "measure_rates", measure)
    with open_engine() as engine, Store.open(tmp_path / "kv.store", engine) as store:
        with pytest.raises(KeyboardInterrupt):
            speeds.measure_at_first_use(tmp_path / "kv.store", store, engine)
        gc.collect()
        assert is_mapped(kept[0])
    gc.collect()
    assert not is_mapped(kept[0])


_CLOSED_UNDER_A_VIEW = """
import gc, sys, threading
from dualblade.io import Arena, open_engine
from dualblade.store import Door, Store
from tests.fault.test_cache_trouble import is_mapped

engine = open_engine()
store = Store.open(sys.argv[1], engine, capacity_bytes=16 << 20)
extent = store.allocate(4 << 20, Door.PAGE_CACHE)
with Arena(4 << 20) as arena:
    arena.buffer[:] = b"x" * (4 << 20)
    store.write(extent, 0, arena.address, 4 << 20).wait()
there = store.in_place(extent, 0, 4 << 20)
view, address = there.hold(), there.address
assert bytes(view[:2]) == b"xx"
store.close()
assert there.hold() is None
assert bytes(view[:2]) == bytes(2) and is_mapped(address)
del view, there
extent.memory = None
gc.collect()
assert not is_mapped(address)
"""


def test_what_is_seen_in_place_can_be_looked_at_after_close(tmp_path: Path) -> None:
    """By a traceback that shows its locals, or a thread that was not told; it ended the process."""
    done = subprocess.run(
        [sys.executable, "-c", _CLOSED_UNDER_A_VIEW, tmp_path / "kv.store"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("attention", ["exact", "tiles"])
@pytest.mark.parametrize("path", ["direct", "memory"])
def test_a_layer_during_which_the_cache_was_closed_gives_nothing(
    monkeypatch: pytest.MonkeyPatch, path: str, attention: str
) -> None:
    """By a signal's handler, or another thread: what it had in place is zeros since."""
    model = tiny_model()
    cache = DualBladeCache.for_model(model, path=path, attention=attention, memory_budget="32MiB")
    if attention == "exact" and path == "memory":
        cache.close()
        pytest.skip("the model's own tensors in memory: nothing is read from elsewhere")
    with torch.no_grad():
        model(**prompt(tokens=200), cache=cache)
        kind = type(cache._pipeline)
        name = "_arriving" if attention == "tiles" else "_gathered"
        plain = getattr(kind, name)

        def arriving(*args: Any, **kwargs: Any) -> Any:
            yield from plain(*args, **kwargs)
            cache.close()

        def gathered(*args: Any, **kwargs: Any) -> Any:
            made = plain(*args, **kwargs)
            cache.close()
            return made

        monkeypatch.setattr(kind, name, arriving if attention == "tiles" else gathered)
        with pytest.raises(Closed, match="this cache is closed"):
            model(input_ids=torch.full((1, 1), 5), cache=cache)
    cache.close()


def test_a_model_that_was_moved_or_is_nowhere_is_told() -> None:
    model = tiny_model()
    with DualBladeCache.for_model(model, memory_budget="32MiB", path="direct") as cache:
        elsewhere = torch.ones((1, 2, 3, 16), device="meta")
        with pytest.raises(ConfigError, match="keys are on meta, and the cache was made for"):
            cache.update(elsewhere, elsewhere, 0)
        step(cache, 1)
    with pytest.raises(Unsupported, match="has no weights on a device"):
        DualBladeCache.for_model(model.to("meta"))


def test_an_extent_whose_discard_failed_is_free_and_no_segments_any_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = Store.free

    def free(store: Store, extent: Extent) -> None:
        plain(store, extent)
        raise StorageError("cannot discard", operation="discard")

    with a_step_old(path="direct") as cache:
        unit = cache._pipeline._layers[0].keys.unit
        with monkeypatch.context() as patch:
            patch.setattr(Store, "free", free)
            with pytest.raises(StorageError):
                unit.free()
        assert unit.segments == []


@pytest.mark.parametrize("use", ["keys", "values", "copy"])
def test_code_that_looks_into_a_layer_is_told(use: str) -> None:
    with a_step_old(path="direct") as cache:
        with pytest.raises(Unsupported, match=r"looks into the layers of its cache"):
            copy.deepcopy(cache.layers[0]) if use == "copy" else getattr(cache.layers[0], use)
        step(cache, 1)


@pytest.mark.parametrize(("max_tokens", "is_told"), [(None, True), (65, True), (64, False)])
def test_a_model_that_forgets_its_cache_at_a_boundary_is_told_of(
    caplog: pytest.LogCaptureFixture, max_tokens: int | None, *, is_told: bool
) -> None:
    config = Phi3Config(
        **SMALL,
        num_attention_heads=2,
        intermediate_size=64,
        pad_token_id=0,
        sliding_window=None,
        max_position_embeddings=256,
        original_max_position_embeddings=64,
    )
    DualBladeCache.for_model(Phi3ForCausalLM(config), path="memory", max_tokens=max_tokens).close()
    assert ("computes a text anew" in caplog.text) == is_told


@pytest.mark.parametrize("path", ["direct", "page-cache"])
def test_a_forked_child_leaves_the_parents_kv_alone(tmp_path: Path, path: str) -> None:
    """It leaves the `with` by an exception, as a program does that forks and goes on."""
    store = tmp_path / "kv.store"
    program = f"""
import os, sys
from dualblade import Closed
from tests.fault.test_cache_trouble import a_step_old, step
from pathlib import Path
with a_step_old(Path({str(store)!r}), path={path!r}) as cache:
    size = os.stat({str(store)!r}).st_size
    for use in (lambda: step(cache, 1), cache.reset, lambda: cache.crop(-150)):
        child = os.fork()
        if child == 0:
            try:
                use()
            except Closed as exc:
                assert "parent" in str(exc), exc
                sys.exit(3)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        assert os.stat({str(store)!r}).st_size == size
        step(cache, 1)
    print(cache.stats().checksums.mismatches)
"""
    done = subprocess.run(
        [*FORKING, program], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.stderr == ""
    assert done.stdout == "3\n3\n3\n0\n"


@pytest.mark.parametrize("attention", ["exact", "tiles"])
def test_a_forked_child_reads_no_zeros_for_kv_in_memory(attention: str) -> None:
    """Tiles are in memory that a child does not inherit; what it computed on would be zeros."""
    program = f"""
import os, sys, torch
from dualblade import Closed
from tests.fault.test_cache_trouble import a_step_old, step
torch.set_num_threads(1)
with a_step_old(path="memory", attention={attention!r}) as cache:
    child = os.fork()
    if child == 0:
        try:
            step(cache, 1)
        except Closed as exc:
            assert "parent" in str(exc), exc
            os._exit(3)
        os._exit(0 if bool((cache.layers[0].keys == 1).all()) else 1)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    step(cache, 1)
"""
    done = subprocess.run(
        [*FORKING, program], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.stderr, done.stdout) == ("", "0\n" if attention == "exact" else "3\n")


def test_a_forked_child_ends_though_attention_had_threads() -> None:
    """They are none of the child's: it neither waits for them at its end nor uses them."""
    program = """
import os, sys, time, torch
from dualblade.attention import kernel
from tests.fault.test_cache_trouble import a_step_old, step
torch.get_num_threads = lambda: 3  # set, torch itself would crash at the child's end
with a_step_old(attention="tiles"):
    time.sleep(0.1)  # they sleep by then
    child = os.fork()
    if child == 0:
        vars(kernel._of_thread).clear()
        sys.exit(3)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run(
        [*FORKING, program], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.stderr, done.stdout) == ("", "3\n")


def test_a_device_without_room_to_gather_refuses_the_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A GPU's memory is not in the budget. For the tokens that there are is better than for an
    eighth more; what has no room is refused, and goes on once there is some."""
    room = 0
    real = GatherBuffers._buffer

    def limited(self: GatherBuffers, size_bytes: int) -> torch.Tensor:
        if size_bytes > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, size_bytes)

    monkeypatch.setattr(GatherBuffers, "_buffer", limited)
    model, inputs = tiny_model(), prompt(batch=2, tokens=300)
    settings = {"max_new_tokens": 5, "do_sample": False}
    want = model.generate(**inputs, cache=DynamicCache(config=model.config), **settings)
    with DualBladeCache.for_model(
        model, memory_budget="16MiB", path="direct", attention="exact"
    ) as cache:
        with pytest.raises(BudgetError, match="of gathered keys and values") as caught:
            model.generate(**inputs, cache=cache, **settings)
        heads, dim = model.config.num_key_value_heads, model.config.head_dim
        token_bytes = 2 * heads * dim * 4  # of keys, of both sequences
        assert caught.value.needed_bytes == 2 * 320 * token_bytes
        room = 320 * token_bytes
        assert torch.equal(model.generate(**inputs, cache=cache, **settings), want)
        cache.reset()
        assert torch.equal(model.generate(**inputs, cache=cache, **settings), want)


def pipeline_of(shapes: list[tuple[int, int]], **settings: Any) -> KVPipeline:
    """Layers of (heads, dim), on a store of their own; staging of eight slots of 64 KiB."""
    engine = open_engine("posix", queue_depth=2)
    return KVPipeline(
        Store.open(None, engine, capacity_bytes=256 * MIB),
        engine,
        KVSettings(
            path=KVPath.DIRECT,
            budget_bytes=160 * MIB,
            layer_count=len(shapes),
            tokens_max=None,
            device=torch.device("cpu"),
            config=EngineConfig(staging_bytes=512 << 10, **settings),
            over_tiles=False,
            layers_alike=len(set(shapes)) == 1,
        ),
    )


def feed(kv: KVPipeline, shapes: list[tuple[int, int]], batch: int) -> None:
    for layer, (heads, dim) in enumerate(shapes):
        made = torch.randn(batch, heads, 130, dim).to(torch.bfloat16)
        kv.append(layer, made, made)
    for layer, (heads, dim) in enumerate(shapes):
        one = torch.zeros(batch, heads, 1, dim, dtype=torch.bfloat16)
        keys, _ = kv.update(layer, one, one)
        assert keys.shape[2] == 131


def test_a_smaller_batch_after_reset_has_slabs_that_fit_the_slots() -> None:
    """Of 16 sequences tiles have 32 tokens, of one they would have 64: 128 KiB."""
    shapes = [(8, 128)] * 8
    kv = pipeline_of(shapes)
    try:
        for batch in (16, 1):
            feed(kv, shapes, batch)
            kv.reset()
    finally:
        kv.close()


def test_a_wide_layer_after_a_narrow_one_has_slabs_that_fit_the_slots() -> None:
    shapes = [(1, 64), (8, 128)]
    kv = pipeline_of(shapes)
    try:
        feed(kv, shapes, 1)
    finally:
        kv.close()


def test_tiles_that_cannot_fit_the_slots_are_refused_and_a_reset_goes_on() -> None:
    shapes = [(1, 64), (8, 128)]
    kv = pipeline_of(shapes, tile_tokens=64)
    try:
        with pytest.raises(BudgetError, match="a tile of 64 tokens takes 128 KiB") as caught:
            feed(kv, shapes, 1)
        assert "staging_bytes=1048576" in str(caught.value)
        kv.reset()
        feed(kv, [(1, 64), (1, 64)], 1)
    finally:
        kv.close()


@pytest.mark.parametrize("path", ["memory", "direct"])
def test_reset_after_all_tokens_were_taken_back(path: str) -> None:
    with DualBladeCache.for_model(tiny_model(), memory_budget="16MiB", path=path) as cache:
        step(cache, 70)
        cache.crop(-70)
        assert cache.get_seq_length() == 0
        cache.reset()
        step(cache, 5, batch=2)
        assert cache.get_seq_length() == 5


def test_a_model_that_is_set_to_use_no_cache_is_refused() -> None:
    """transformers would give the whole text to the cache at each step, as what is new."""
    model = tiny_model()
    model.generation_config.use_cache = False
    with pytest.raises(ConfigError, match="use no cache") as caught:
        DualBladeCache.for_model(model)
    assert "generation_config.use_cache = True" in str(caught.value)
