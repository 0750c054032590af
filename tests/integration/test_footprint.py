"""A model that cannot fit is refused in words before its weights are read."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from dualblade.errors import BudgetError
from dualblade.hf.footprint import Footprint, _row_bytes, footprint, skeleton, weights_per_token
from dualblade.hf.models import config_of, load_model
from dualblade.host.cgroup import MemoryCgroup
from dualblade.host.memory import MemoryReading
from dualblade.units import GIB, MIB

REASON = MemoryCgroup.available()
TINY = "random:llama?layers=3,hidden=64,heads=4,kv_heads=2,vocab=300"
_LIMIT_BYTES = 1 * GIB


def there(size_bytes: int) -> MemoryReading:
    return MemoryReading(
        available_bytes=size_bytes, source="test", machine_available_bytes=size_bytes, limits=()
    )


@pytest.mark.parametrize(
    "spec",
    [TINY, f"{TINY},unique_layers=2", "random:opt-1.3b?layers=1", "random:gpt2?layers=1"],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_are_what_the_loaded_model_has(spec: str, dtype: torch.dtype) -> None:
    told = footprint(config_of(spec), dtype, rows=1, staging_bytes=0)
    model = load_model(spec, dtype=dtype, device="cpu").model
    assert told.weights_bytes == sum(parameter.nbytes for parameter in model.parameters())


def test_a_token_reads_shared_weights_in_every_layer() -> None:
    """They are in memory once."""
    own, shared = (config_of(spec) for spec in (TINY, f"{TINY},unique_layers=1"))
    read = weights_per_token(skeleton(own, torch.bfloat16))
    assert weights_per_token(skeleton(shared, torch.bfloat16)) == read
    assert footprint(shared, torch.bfloat16, rows=1, staging_bytes=0).weights_bytes < read


def test_lists_of_layers_and_experts_are_counted_by_the_largest() -> None:
    """As HunYuan's mixtures and Gemma 3n state them."""
    wide = AutoConfig.for_model("gemma3n_text", num_hidden_layers=3, intermediate_size=256)
    mixed = AutoConfig.for_model("gemma3n_text", num_hidden_layers=3, intermediate_size=[8, 256, 9])
    assert _row_bytes(mixed, torch.bfloat16) == _row_bytes(wide, torch.bfloat16)
    experts = AutoConfig.for_model(
        "hunyuan_v1_moe", hidden_size=64, intermediate_size=32, num_hidden_layers=2, vocab_size=99,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=8, moe_topk=2,
    )  # fmt: skip
    once = weights_per_token(skeleton(experts, torch.bfloat16))
    experts.moe_topk = [1, 2]
    assert weights_per_token(skeleton(experts, torch.bfloat16)) == once
    assert once < footprint(experts, torch.bfloat16, rows=1, staging_bytes=0).weights_bytes


def test_the_least_that_fits_is_told() -> None:
    made = Footprint(
        dtype=torch.float32,
        weights_bytes=10 * MIB,
        loading_bytes=4 * MIB,
        activation_bytes=2 * MIB,
        staging_bytes=1 * MIB,
    )
    assert (made.running_bytes, made.needed_bytes) == (13 * MIB, 14 * MIB)
    made.require("model", there(14 * MIB))
    with pytest.raises(BudgetError) as caught:
        made.require("model", there(14 * MIB - 1))
    assert caught.value.needed_bytes == 14 * MIB
    said = str(caught.value)
    for word in (
        "weights 10.0 MiB",
        "14.0 MiB while",
        "activations 2.00 MiB",
        "staging 1.00",
        "float32",
    ):
        assert word in said
    assert "dtype bfloat16" in said


def test_weights_of_another_type_are_cast_one_at_a_time() -> None:
    config = config_of(TINY)
    config.dtype = torch.float16
    assert footprint(config, torch.float16, rows=1, staging_bytes=0).loading_bytes == 0
    largest = 4 * 300 * 64  # the embedding
    assert footprint(config, torch.float32, rows=1, staging_bytes=0).loading_bytes == largest


def test_a_gguf_file_is_unpacked_to_fp32_first() -> None:
    config = config_of(TINY)
    plain = footprint(config, torch.bfloat16, rows=1, staging_bytes=0)
    packed = footprint(config, torch.bfloat16, rows=1, staging_bytes=0, is_packed=True)
    assert packed.weights_bytes == plain.weights_bytes
    assert packed.loading_bytes == 2 * plain.weights_bytes


def generate(start: Any, model: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "dualblade", "generate", "-m", model, "-p", "hello"]
    options = ["--max-new-tokens", "2", "--json", "--device", "cpu"]
    child: subprocess.Popen[str] = start(
        [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    return child


@pytest.mark.skipif(REASON is not None, reason=f"no memory cgroup: {REASON}")
def test_generate_refuses_in_a_small_cgroup_before_loading() -> None:
    """Weights of 2.3 GiB in a group of 1 GiB: told in a line, not killed; what fits runs."""
    with MemoryCgroup(_LIMIT_BYTES) as group:
        with generate(group.popen, "random:llama-3.2-1b") as child:
            out, told = child.communicate(timeout=120)
        assert child.returncode == 1, told
        assert out == ""
        assert "weights 2.30 GiB in bfloat16" in told
        assert group.directory.name in told, "which limit said so"
        with generate(group.popen, TINY) as child:
            out, told = child.communicate(timeout=120)
        assert child.returncode == 0, told
        assert group.limit.oom_kills() == 0
