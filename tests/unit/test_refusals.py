"""What is refused or warned of before anything is opened."""

from __future__ import annotations

import logging
from typing import Any
from unittest import mock

import pytest
from transformers import DynamicCache

from dualblade import DualBladeCache
from dualblade.attention import kernel
from dualblade.errors import ConfigError, Unsupported
from dualblade.hf import models
from dualblade.hf.refusals import TESTED_TRANSFORMERS, check_model, warn_of_version
from tests.integration.tiny_models import tiny_model


def test_a_model_that_is_spread_over_devices_is_refused() -> None:
    model = tiny_model()
    layers: list[Any] = list(DynamicCache(config=model.config).layers)
    stored = [True] * len(layers)
    model.hf_device_map = {"model.embed_tokens": 0, "model.layers.0": 0}
    check_model(model, layers, stored)
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": "cpu"}
    with pytest.raises(Unsupported, match="is spread over devices 0, cpu"):
        check_model(model, layers, stored)


def test_a_newer_transformers_than_the_tested_one_is_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    major, minor = TESTED_TRANSFORMERS
    warn_of_version.cache_clear()
    with caplog.at_level(logging.WARNING, logger="dualblade.hf"):
        for fine in (f"{major}.{minor}.9", f"{major}.{minor - 1}.0"):
            warn_of_version(fine)
        assert not caplog.records
        for _ in range(2):
            warn_of_version(f"{major}.{minor + 1}.0.dev0")
    (record,) = caplog.records
    assert "tested with transformers up to" in record.message


def test_a_kernel_that_is_none_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUALBLADE_KERNEL", "sse")
    vars(kernel._of_thread).clear()
    try:
        with pytest.raises(ConfigError, match="names no kernel of this machine: sse"):
            kernel._native()
    finally:
        vars(kernel._of_thread).clear()


def test_offline_is_what_the_hub_makes_of_its_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """HF_HUB_OFFLINE=0 is online."""
    connected = mock.Mock()
    monkeypatch.setattr(models.socket, "create_connection", connected)
    monkeypatch.setattr(models.urllib.request, "getproxies", dict)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(models.hub, "HF_HUB_OFFLINE", True)
    assert not models._hub_reachable()
    connected.assert_not_called()
    monkeypatch.setattr(models.hub, "HF_HUB_OFFLINE", False)
    assert models._hub_reachable()
    connected.assert_called_once()


def test_a_cache_is_made_by_for_model_alone() -> None:
    unusual: Any = DualBladeCache
    with pytest.raises(ConfigError, match="not made from a model") as caught:
        unusual(tiny_model())
    assert "for_model" in str(caught.value.hint)
