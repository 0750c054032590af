"""unpack_kernel.py VMLINUZ VMLINUX: the ELF image in a compressed kernel.

Where it lies: Documentation/arch/x86/boot.rst, setup_sects, payload_offset and payload_length.
"""

import lzma
import struct
import subprocess
import sys
from pathlib import Path

image = Path(sys.argv[1]).read_bytes()
setup_bytes = ((image[0x1F1] or 4) + 1) * 512
offset, length = struct.unpack_from("<II", image, 0x248)
payload = image[setup_bytes + offset : setup_bytes + offset + length - 4]  # 4: its length again
if payload.startswith(b"\xfd7zXZ"):
    kernel = lzma.decompress(payload)
else:
    tool = "lz4" if payload.startswith(b"\x02\x21\x4c\x18") else "zstd"
    unpacked = subprocess.run([tool, "-dcq"], input=payload, capture_output=True, check=True)
    kernel = unpacked.stdout
assert kernel.startswith(b"\x7fELF")
Path(sys.argv[2]).write_bytes(kernel)
