"""The script that measures beside FlexLLMGen, as far as it goes without FlexLLMGen and a GPU."""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from dualblade.units import GIB, MIB
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

# What scripts/flexllmgen_storage.py meets of FlexLLMGen (004ffef): devices that allocate and
# compute, a disk with files, a loop that stores what a prompt and steps made and fetches it.
BACKEND = """
import numpy as np, os, torch
KINDS = {np.float16: torch.float16, np.int32: torch.int32}

class TorchTensor:
    def __init__(self, shape, dtype, data, device):
        self.shape, self.dtype, self.data, self.device = shape, dtype, data, device
    @classmethod
    def create_from_torch(cls, data, device, name=None):
        return cls(data.shape, data.dtype, data, device)

class TorchDevice:
    def __init__(self, name, capacity=None):
        self.dev = torch.device(name)
    def allocate(self, shape, dtype, pin_memory=None, name=None):
        data = torch.empty(shape, dtype=KINDS[dtype], pin_memory=bool(pin_memory), device=self.dev)
        return TorchTensor.create_from_torch(data, self)
    def mha(self, *words): raise NotImplementedError  # computing
    mha_gen = mlp = opt_input_embed = opt_output_embed = synchronize = mha
"""
TIMER = """
import collections, types
kept = collections.defaultdict(types.SimpleNamespace)
def timers(name): return kept[name]
"""
FLEX_OPT = """
import argparse, types
import numpy as np, torch
from transformers import AutoTokenizer
from flexllmgen.pytorch_backend import TorchDevice
from flexllmgen.timer import timers

def get_opt_config(name):
    return types.SimpleNamespace(n_head=2, input_dim=64)

def init_weight_list(specs, policy, env): raise NotImplementedError

def add_parser_arguments(parser):
    for name in ("model", "path", "offload-dir", "log-file", "overlap"):
        parser.add_argument("--" + name)
    parser.add_argument("--percent", nargs="+", type=int)
    for name in ("gpu-batch-size", "num-gpu-batches", "prompt-len", "gen-len", "verbose"):
        parser.add_argument("--" + name, type=int)

class OptLM:
    def __init__(self, gpu, folder):
        self.gpu, self.file = gpu, folder + "/t_1"
        env = types.SimpleNamespace(gpu=gpu)
        (weight,) = init_weight_list([((64, 64), np.float16, "w")], None, env)
        assert weight.shape == (1,)
    def update_attention_mask(self, step, batch): pass
    def generate(self, inputs, max_new_tokens):
        self.update_attention_mask(0, 0)
        torch.cuda.set_device(0)
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.empty(8, pin_memory=True)
        tokens = self.gpu.allocate((len(inputs), len(inputs[0])), np.int32)
        shape = (len(inputs[0]) + max_new_tokens - 1, 2 * len(inputs), 32)
        file = np.lib.format.open_memmap(self.file, mode="w+", shape=shape, dtype=np.float16)
        hidden = self.gpu.opt_input_embed(tokens, None, None, None, 1, [])
        hidden, keys, values = self.gpu.mha(hidden, None)
        assert keys.shape == values.shape == (len(inputs[0]), 2 * len(inputs), 32)
        torch.from_numpy(file)[: keys.shape[0]].copy_(keys.data)
        buffers = [self.gpu.allocate((4, 2, 32), np.float16) for _ in range(6)]
        assert len({buffer.data.data_ptr() for buffer in buffers}) == 6, "of two layers at least"
        for step in range(max_new_tokens - 1):
            self.update_attention_mask(step + 1, 0)
            fetched = self.gpu.allocate((len(inputs[0]) + step, *shape[1:]), np.float16)
            fetched.data.copy_(torch.from_numpy(file)[: fetched.shape[0]])
            hidden = self.gpu.opt_input_embed(types.SimpleNamespace(shape=(len(inputs), 1)))
            hidden, keys, _ = self.gpu.mha_gen(hidden, None)
            assert keys.shape == (1, 2 * len(inputs), 32)
            hidden = self.gpu.mlp(hidden)
            self.gpu.synchronize()
        return self.gpu.opt_output_embed(hidden).data

def run_flexllmgen(args):
    tokenizer = AutoTokenizer.from_pretrained("facebook/opt-30b", padding_side="left")
    prompt = tokenizer(["Paris"], padding="max_length", max_length=args.prompt_len).input_ids[0]
    model = OptLM(TorchDevice("cuda:0"), args.offload_dir)
    model.generate((prompt[:32],) * args.gpu_batch_size, max_new_tokens=1)
    ids = model.generate((prompt,) * args.gpu_batch_size, max_new_tokens=args.gen_len)
    timers("generate").costs = [9.0, 8.0, 7.0, 6.0] + [float(i) for i in range(args.gen_len - 4)]
    assert ids.shape == (args.gpu_batch_size, 1)
    with open(args.log_file, "a") as log:
        log.write("prefill latency: 2.500 s\\tprefill throughput: 9.000 token/s\\n")
        log.write("decode latency: 6.000 s\\tdecode throughput: 9.000 token/s\\n")
"""


@pytest.fixture
def script() -> ModuleType:
    return load_script(SCRIPT)


def checkout(folder: Path, program: str, backend: str = "") -> Path:
    package = folder / "checkout/flexllmgen"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "flex_opt.py").write_text(program)
    (package / "pytorch_backend.py").write_text(backend)
    (package / "timer.py").write_text(TIMER)
    return package.parent


def options(checkout: Path, store: Path, **others: object) -> argparse.Namespace:
    asked = argparse.Namespace(
        checkout=checkout, python=sys.executable, store=store, model="opt-6.7b", batch=12,
        context=1984, steps=8, memory_limit=None, read_ahead=None, storage_only=False,
    )  # fmt: skip
    vars(asked).update(others)
    return asked


def test_a_checkout_is_run_with_its_cache_on_the_drive(tmp_path: Path, script: ModuleType) -> None:
    store = tmp_path / "drive"
    store.mkdir()
    place = checkout(tmp_path, STAND_IN)
    took = script.flexllmgen(options(place, store), steps=8, limit_bytes=None)
    assert took == {"prefill_seconds": 2.5, "step_seconds": 0.75}
    told = (place / "told.json").read_text()
    assert '"--percent", "100", "0", "0", "0", "100", "0"' in told, "the cache on disk alone"
    assert '"--prompt-len", "1984", "--gen-len", "9"' in told, "a first token and eight steps"
    assert not list(store.iterdir()), "what it offloaded is gone"


def test_a_run_that_fails_ends_the_script(tmp_path: Path, script: ModuleType) -> None:
    place = checkout(tmp_path, "raise SystemExit(3)")
    with pytest.raises(SystemExit, match="FlexLLMGen ended with 3"):
        script.flexllmgen(options(place, tmp_path), steps=8, limit_bytes=None)
    place = checkout(tmp_path / "silent", STAND_IN.replace("latency", "time"))
    with pytest.raises(SystemExit, match="has no latencies"):
        script.flexllmgen(options(place, tmp_path), steps=8, limit_bytes=None)


@pytest.mark.parametrize("kind", ["stand-in", "real"])
def test_its_storage_runs_without_a_gpu(kind: str, tmp_path: Path, script: ModuleType) -> None:
    """With DUALBLADE_FLEXLLMGEN=CHECKOUT also with the real one."""
    place = checkout(tmp_path, FLEX_OPT, BACKEND)
    if kind == "real":
        if "DUALBLADE_FLEXLLMGEN" not in os.environ:
            pytest.skip("DUALBLADE_FLEXLLMGEN names no checkout")
        if importlib.util.find_spec("attr") is None:
            pytest.skip("FlexLLMGen needs attrs")
        place = Path(os.environ["DUALBLADE_FLEXLLMGEN"])
    asked = options(
        place, tmp_path, storage_only=True, model="opt-125m", batch=2, context=48, steps=3
    )
    took = script.flexllmgen(asked, steps=3, limit_bytes=None)
    if kind == "real":
        assert took["step_seconds"] > 0
    else:
        assert took["step_seconds"] == 1.0, "the median of three, after a prompt and three steps"
    assert took["anonymous_bytes"] > 50 * MIB, "Python and torch alone"
    assert took["read_bytes_per_step"] >= 0
    asked.memory_limit = "+1GiB"
    own = script.limit_of(asked) - GIB
    assert own == pytest.approx(took["anonymous_bytes"], rel=0.2)
    asked.memory_limit = "2GiB"
    assert script.limit_of(asked) == 2 * GIB


def test_a_result_says_the_command_that_makes_it(tmp_path: Path, script: ModuleType) -> None:
    """Not one that would write over another result."""
    asked = options(tmp_path, tmp_path, repeats=1, output=script.RESULT)
    assert "--output" not in script.result_of(asked, None, None, [])["command"]
    asked.output = Path("results/narrow.json")
    assert script.result_of(asked, None, None, [])["command"].endswith(
        "--repeats 1 --output results/narrow.json"
    )
    asked.read_ahead = "1MiB"
    assert "--read-ahead 1MiB --output" in script.result_of(asked, None, None, [])["command"]


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
    assert "write it like 512MiB" in refused(place, "--memory-limit", "some")
    assert "needs --storage-only" in refused(place, "--memory-limit", "+1GiB")
    assert "write it like 512MiB" in refused(place, "--storage-only", "--read-ahead", "far")
    for output in (tmp_path, tmp_path / "nowhere" / "file.json"):
        assert "cannot be written" in refused(place, "--output", output)
    if not torch.cuda.is_available():
        assert "no torch that finds a GPU" in refused(place)
