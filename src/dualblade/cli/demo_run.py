"""One run of the demo, in a process of its own: options as JSON on stdin, result on stdout.

    python -m dualblade.cli.demo_run < options.json

Order: load the model into memory of its own, warm up, release what that left over; *then* set the
memory limit, start the peak anew and generate. So what is limited and measured is generating. The
prefill needs memory for its activations, which in decoding would be so much more page cache: at
the first token it is released, the limit lowered by it, and the peak started anew.
Progress goes to stderr: lines of words, and `%0.25` for a quarter done.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from dualblade.config import EngineConfig
from dualblade.errors import DualBladeError
from dualblade.host.cgroup import MemoryLimit
from dualblade.host.memory import process_memory
from dualblade.host.process import die_with_parent, process_io, release_memory, reset_peak_memory
from dualblade.metrics import CacheStats, TransferTotals
from dualblade.units import HUGE_PAGE_BYTES, round_up

QUESTION = (
    "Which house of Congress has the sole power to impeach, and which has the sole power to try "
    "impeachments?"
)
_PROMPT = (
    "Read the text and answer this question: {question}\n\nText:\n{text}\n\n"
    "Question: {question}\nAnswer in one or two sentences."
)
_WARM_UP_TOKENS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoRun:
    """What one child does. `memory_budget` None: as much as it likes (path memory).

    The limits are told as bytes beyond what the process needs after loading and warm-up, for that
    differs: the first one is charged for the libraries' pages.
    """

    path: str
    dtype: str
    max_new_tokens: int
    prefill_chunk_tokens: int
    memory_budget: int | None
    io_engine: str
    prefill_room_bytes: int | None
    decode_room_bytes: int | None
    cgroup_directory: str | None
    cgroup_version: int

    def cgroup(self) -> MemoryLimit | None:
        """The memory cgroup that the parent put this process into."""
        if self.cgroup_directory is None:
            return None
        return MemoryLimit(Path(self.cgroup_directory), self.cgroup_version)


def demo_prompt() -> str:
    """The question and the text that it is about."""
    text = resources.files("dualblade.cli").joinpath("data/constitution.txt").read_text()
    body = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    return _PROMPT.format(question=QUESTION, text=body.strip())


class _Phase:
    """The memory of prefill, or of decoding: what was there before, its limit, and its peak.

    `room_bytes` None: no limit; `beyond_bytes` None: beyond what there is before.
    """

    def __init__(
        self, limit: MemoryLimit | None, room_bytes: int | None, beyond_bytes: int | None = None
    ) -> None:
        release_memory()
        self._limit = limit
        self._resident_bytes = process_memory().resident_bytes
        self.base_bytes = self._resident_bytes if limit is None else limit.needed_bytes()
        beyond = self.base_bytes if beyond_bytes is None else beyond_bytes
        self.limit_bytes = None if room_bytes is None else beyond + room_bytes
        if limit is not None:
            limit.set(self.limit_bytes)
        self.of_cgroup = limit is not None and limit.reset_peak()
        reset_peak_memory()

    def end(self) -> dict[str, Any]:
        """`grown_bytes` are the process's own; the cgroup's peak, where the kernel can begin it
        anew, has the page cache in it."""
        grown = process_memory().peak_resident_bytes - self._resident_bytes
        peak: int | None = self.base_bytes + grown
        if self._limit is not None and self.of_cgroup:
            peak = self._limit.peak_bytes()
        return {
            "limit_bytes": self.limit_bytes,
            "base_bytes": self.base_bytes,
            "grown_bytes": grown,
            "peak_bytes": peak,
        }


def run(options: DemoRun) -> dict[str, Any]:
    """Load, warm up, limit, generate. Raises: DualBladeError."""
    loaded = _load(options)
    prompt = loaded.encode(demo_prompt())
    _warm_up(loaded.model, prompt)
    limit = options.cgroup()
    phases = [_Phase(limit, options.prefill_room_bytes)]
    ends: list[dict[str, Any]] = []

    def first_token() -> None:
        ends.append(phases[-1].end())
        phases.append(_Phase(limit, options.decode_room_bytes, phases[0].base_bytes))

    result = _generate(options, loaded, prompt, first_token)
    ends.append(phases[-1].end())
    prefill, decode = ends
    return {
        "path": options.path,
        "model": loaded.name,
        "prompt_tokens": len(prompt),
        **result,
        "prefill_memory": prefill,
        "decode_memory": decode,
        "peak_memory_bytes": decode["peak_bytes"],
        "peak_memory_of": "cgroup" if phases[-1].of_cgroup else "process",
        "memory_limit_bytes": decode["limit_bytes"],
    }


def _generate(
    options: DemoRun, loaded: Any, prompt: list[int], on_first: Callable[[], None]
) -> dict[str, Any]:
    """The answer and what it cost. Figures of decoding begin after the first token."""
    from dualblade.cli.generation import Sampling, generate_text
    from dualblade.hf.cache import DualBladeCache

    tokens_max = len(prompt) + options.max_new_tokens
    at_first: list[tuple[int, TransferTotals]] = []
    sampling = Sampling(
        max_new_tokens=options.max_new_tokens,
        temperature=0.0,
        seed=0,
        prefill_chunk_tokens=options.prefill_chunk_tokens,
    )
    with DualBladeCache.for_model(
        loaded.model,
        memory_budget="auto" if options.memory_budget is None else options.memory_budget,
        path=options.path,
        max_tokens=tokens_max,
        config=EngineConfig.from_mapping({"io_engine": options.io_engine}),
    ) as cache:
        _tell(f"{options.path}: prefill of {len(prompt)} tokens")

        def first_token() -> None:
            on_first()
            at_first.append((process_io().read_bytes, cache.stats().io))
            _tell(f"{options.path}: decoding")

        generation = generate_text(
            loaded, prompt, cache, sampling, lambda _text: None, _progress(), first_token
        )
        stats = cache.stats()
    device_bytes = process_io().read_bytes - at_first[0][0]
    return {
        "new_tokens": len(generation.tokens),
        "answer": loaded.decode(generation.tokens).strip(),
        "tokens_sha256": generation.sha256(),
        "prefill_seconds": generation.prefill_seconds,
        "decode_seconds_per_token": generation.decode_seconds_per_token,
        "device_read_bytes_per_token": device_bytes // max(1, len(generation.tokens) - 1),
        "page_cache_hit_fraction": _hit_fraction(at_first[0][1], stats.io, device_bytes),
        "kv_room_bytes": _room_bytes(stats, tokens_max),
        "cache": stats.to_dict(),
    }


def _room_bytes(stats: CacheStats, tokens_max: int) -> int:
    """What path `memory` takes for the KV of so many tokens; over tiles in whole huge pages."""
    units = 2 * (stats.memory_layers + stats.offloaded_layers)
    unit = stats.kv_bytes // stats.tokens * tokens_max // units
    return units * (round_up(unit, HUGE_PAGE_BYTES) if stats.attention == "tiles" else unit)


def _load(options: DemoRun) -> Any:
    """The model, its weights in memory of this process rather than mapped from the file, so that
    they count against its limit and are not read again under pressure."""
    from dualblade.hf.demo_model import demo_folder
    from dualblade.hf.models import load_model, parse_dtype
    from dualblade.host.page_cache import drop

    _tell(f"{options.path}: loading the model")
    loaded = load_model("demo", dtype=parse_dtype(options.dtype), device="cpu", tell=_tell)
    seen: dict[int, Any] = {}
    for parameter in loaded.model.parameters():
        key = parameter.data.data_ptr()  # tied weights stay one
        parameter.data = seen.setdefault(key, parameter.data.clone())
    for path in demo_folder(_tell).glob("*.safetensors"):
        with path.open("rb") as file:
            drop(file.fileno(), 0, path.stat().st_size)
    return loaded


def _warm_up(model: Any, prompt: list[int]) -> None:
    """Threads, allocators and kernels are made at the first use; that is not generating."""
    import torch

    with torch.inference_mode():
        model(torch.tensor([prompt[:_WARM_UP_TOKENS]]), use_cache=False, logits_to_keep=1)


def _hit_fraction(before: TransferTotals, after: TransferTotals, device_bytes: int) -> float | None:
    """Of what decoding read through the page cache, the part that no device was asked for."""
    asked = after.page_cache_read_bytes - before.page_cache_read_bytes
    if asked == 0:
        return None
    missed = device_bytes - (after.direct_read_bytes - before.direct_read_bytes)
    return min(1.0, max(0.0, 1 - missed / asked))


def _progress() -> Callable[[float], None]:
    """Tells each hundredth once."""
    told = -1

    def tell(done: float) -> None:
        nonlocal told
        if int(done * 100) > told:
            told = int(done * 100)
            _tell(f"%{done:.2f}")

    return tell


def _tell(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def main() -> int:
    """Exit status 0: a result on stdout; 1: an error there; 130: interrupted."""
    die_with_parent()
    options = DemoRun(**json.loads(sys.stdin.read()))
    out, sys.stdout = sys.stdout, sys.stderr  # whatever libraries print is not the result
    status = 0
    try:
        result = run(options)
    except DualBladeError as exc:
        result, status = {"error": exc.message, "hint": exc.hint}, 1
    except KeyboardInterrupt:
        return 130
    out.write(json.dumps(result) + "\n")
    out.flush()
    return status


if __name__ == "__main__":
    sys.exit(main())
