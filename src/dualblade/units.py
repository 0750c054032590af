"""Sizes and alignments: the words for bytes, parsed at the edge, plain integers inside."""

from __future__ import annotations

import re

from dualblade.errors import ConfigError

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

BLOCK_BYTES = 4096
"""Every transfer is a multiple of this: it covers LBAs of 512 and of 4096 bytes."""

EXTENT_ALIGN_BYTES = 2 * MIB
"""Extents start and end here, so that dropping one never meets a page-cache folio of another."""

HUGE_PAGE_BYTES = 2 * MIB
"""Of memory that is read into: a device pays for each page of a transfer. On x86-64, and on ARM
with pages of 4 KiB."""

_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?B?)\s*$", re.IGNORECASE)
_POWER = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def parse_size(text: str | int) -> int:
    """Bytes in `text`: `2GiB`, `512M`, `1.5 GiB`, `4096`. `GB`, `G` and `GiB` all mean 2**30.

    Raises: ConfigError when it is not a size, or is negative.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        if text < 0:
            raise ConfigError(f"a size cannot be negative: {text}")
        return text
    match = _SIZE.match(str(text))
    if match is None:
        raise ConfigError(f"not a size: {text!r}", hint="write it like 512MiB or 2GiB")
    return int(float(match[1]) * 1024 ** _POWER[match[2].upper()])


def format_size(size_bytes: float) -> str:
    """`size_bytes` for people: `1.50 GiB`, `24.0 MiB`, `512 B`."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(size_bytes) >= unit:
            value = size_bytes / unit
            digits = 0 if value >= 100 else 1 if value >= 10 else 2
            return f"{value:.{digits}f} {name}"
    return f"{int(size_bytes)} B"


def round_up(value: int, multiple: int) -> int:
    """The least multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple
