"""The script that measures beside FlexLLMGen, as far as it goes without FlexLLMGen and a GPU."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.scripts import load_script

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts/measure_flexllmgen.py"

pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="installed without the sources")

STAND_IN = """
import json, pathlib, sys
words = sys.argv[1:]
told = dict(zip(words, words[1:]))
pathlib.Path("told.json").write_text(json.dumps(words))
assert pathlib.Path(told["--offload-dir"]).is_dir()
with open(told["--log-file"], "w") as log:
    log.write("peak gpu mem: 1.000 GB\\tprojected: False\\n")
    log.write("prefill latency: 2.500 s\\tprefill throughput: 9.000 token/s\\n")
    log.write("decode latency: 6.000 s\\tdecode throughput: 9.000 token/s\\n")
    log.write("total latency: 8.500 s\\ttotal throughput: 9.000 token/s\\n")
"""


@pytest.fixture
def script() -> ModuleType:
    return load_script(SCRIPT)


def checkout(folder: Path, program: str) -> Path:
    package = folder / "checkout/flexllmgen"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "flex_opt.py").write_text(program)
    return package.parent


def options(checkout: Path, store: Path) -> argparse.Namespace:
    return argparse.Namespace(
        checkout=checkout, python=sys.executable, store=store, model="opt-6.7b", batch=12,
        context=1984, steps=8, memory_limit=None,
    )  # fmt: skip


def test_a_checkout_is_run_with_its_cache_on_the_drive(tmp_path: Path, script: ModuleType) -> None:
    store = tmp_path / "drive"
    store.mkdir()
    place = checkout(tmp_path, STAND_IN)
    took = script.flexllmgen(options(place, store))
    assert took == {"prefill_seconds": 2.5, "step_seconds": 0.75}
    told = (place / "told.json").read_text()
    assert '"--percent", "100", "0", "0", "0", "100", "0"' in told, "the cache on disk alone"
    assert '"--prompt-len", "1984", "--gen-len", "9"' in told, "a first token and eight steps"
    assert not list(store.iterdir()), "what it offloaded is gone"


def test_a_run_that_fails_ends_the_script(tmp_path: Path, script: ModuleType) -> None:
    place = checkout(tmp_path, "raise SystemExit(3)")
    with pytest.raises(SystemExit, match="FlexLLMGen ended with 3"):
        script.flexllmgen(options(place, tmp_path))
    place = checkout(tmp_path / "silent", STAND_IN.replace("latency", "time"))
    with pytest.raises(SystemExit, match="has no latencies"):
        script.flexllmgen(options(place, tmp_path))


def refused(*words: str | Path) -> str:
    done = subprocess.run(
        [sys.executable, SCRIPT, *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    return done.stderr.splitlines()[-1]


def test_what_cannot_run_is_refused(tmp_path: Path) -> None:
    assert "is no checkout of FlexLLMGen" in refused(tmp_path)
    place = checkout(tmp_path, STAND_IN)
    assert "FlexLLMGen serves OPT shapes" in refused(place, "--model", "llama-3.2-1b")
    if not torch.cuda.is_available():
        assert "no torch that finds a GPU" in refused(place)
