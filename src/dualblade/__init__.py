"""dualblade: generate with a KV cache on an NVMe drive, fast and exactly."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from dualblade.config import EngineConfig
from dualblade.errors import (
    BudgetError,
    Closed,
    ConfigError,
    CorruptExtent,
    DeviceError,
    DualBladeError,
    NoSpace,
    NotAStore,
    StorageError,
    Unsupported,
)
from dualblade.host.threads import wait_briefly
from dualblade.metrics import CacheStats

if TYPE_CHECKING:
    from dualblade.hf.boundary import use_long_rope
    from dualblade.hf.cache import DualBladeCache
    from dualblade.hf.linear import widen_linears

__version__ = version("dualblade")

__all__ = [
    "BudgetError",
    "CacheStats",
    "Closed",
    "ConfigError",
    "CorruptExtent",
    "DeviceError",
    "DualBladeCache",
    "DualBladeError",
    "EngineConfig",
    "NoSpace",
    "NotAStore",
    "StorageError",
    "Unsupported",
    "__version__",
    "use_long_rope",
    "wait_briefly",
    "widen_linears",
]


if not TYPE_CHECKING:  # who checks types would find any name

    def __getattr__(name: str) -> Any:
        # transformers and torch take seconds to import; the command line's --help must not.
        if name == "DualBladeCache":
            from dualblade.hf.cache import DualBladeCache

            return DualBladeCache
        if name == "use_long_rope":
            from dualblade.hf.boundary import use_long_rope

            return use_long_rope
        if name == "widen_linears":
            from dualblade.hf.linear import widen_linears

            return widen_linears
        raise AttributeError(f"module 'dualblade' has no attribute {name!r}")


def __dir__() -> list[str]:
    """With the names that are loaded when they are first used."""
    return sorted({*globals(), *__all__})
