"""Programs of `scripts/`, as modules: what they compute can be asked for without a process."""

from __future__ import annotations

import importlib.util
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType


def load_script(path: Path) -> ModuleType:
    """A fresh module of the program at `path`, whose name need not end in .py."""
    loader = SourceFileLoader(path.stem, str(path))
    spec = importlib.util.spec_from_loader(path.stem, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module
