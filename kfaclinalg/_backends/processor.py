"""Which processor this is."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path


@cache
def is_intel() -> bool:
    """Whether the processor is Intel's."""
    info = Path("/proc/cpuinfo")
    name = info.read_text(errors="replace") if info.is_file() else platform.processor()
    return "GenuineIntel" in name or (platform.system() == "Darwin" and platform.machine() == "x86_64")
