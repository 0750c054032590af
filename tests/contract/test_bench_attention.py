"""`dualblade bench attention`, tiny: the figures are there, and nothing is asserted of time."""

from __future__ import annotations

import pytest

from dualblade.bench.attention import AttentionBenchOptions, AttentionShape, run_attention_bench
from dualblade.errors import ConfigError


def test_every_way_is_timed_in_every_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dualblade.bench.attention._SAMPLE_SECONDS", 0.0)
    monkeypatch.setattr("dualblade.bench.attention._BANDWIDTH_BYTES", 1 << 20)
    options = AttentionBenchOptions(
        shapes=[AttentionShape.parse("2,4,2,192,64")], query_tokens=20, repeats=1
    )
    result = run_attention_bench(options, lambda _: None)
    assert result["benchmark"] == "attention"
    assert [run["dtype"] for run in result["runs"]] == ["bfloat16", "float32"]
    for run in result["runs"]:
        assert run["kv_bytes"] == 2 * 2 * 2 * 192 * 64 * (2 if run["dtype"] == "bfloat16" else 4)
        assert not run["by_kernel"], "40 rows of a KV head are for torch"
        for way in ("tiles", "exact", "sdpa_contiguous", "memory_read"):
            assert run[f"{way}_gib_per_second"] > 0


@pytest.mark.parametrize("text", ["1,2,3", "1,3,2,64,64", "a,b,c,d,e", "1,0,1,64,64"])
def test_shapes_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        AttentionShape.parse(text)
