"""NVRTC where torch brings none: that of the wheel nvidia-cuda-nvrtc."""

from __future__ import annotations

import ctypes
import re
from functools import cache
from importlib import metadata


@cache
def find_nvrtc() -> ctypes.CDLL:
    files = metadata.files("nvidia-cuda-nvrtc") or []
    found = next(file for file in files if re.fullmatch(r"libnvrtc\.so\.\d+", file.name))
    return ctypes.CDLL(str(found.locate()))
