"""CUDA C++ to machine code by the NVRTC that torch brings, without a CUDA toolkit.

torch's own call of it wants the headers of a toolkit (CUDA_HOME), which machines that have torch from wheels lack, and
which our sources do not include.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from torch.cuda import _utils as cuda_utils


def compile_source(source: str, name: str, options: Sequence[str]) -> tuple[bytes, str]:
    """The cubin of `source`, which logs call by `name`, and NVRTC's log; RuntimeError with the log.

    Options are NVRTC's, --gpu-architecture=sm_XX among them.
    """
    library, program = open_nvrtc(), ctypes.c_void_p()
    check(library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), f"{name}.cu".encode(), 0, None, None))
    try:
        given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        failed = library.nvrtcCompileProgram(program, len(options), given)
        log = read_result(program, "ProgramLog").rstrip(b"\0").decode()
        if failed:
            raise RuntimeError(log.strip() or error_text(failed))
        return read_result(program, "CUBIN"), log
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def read_result(program: ctypes.c_void_p, kind: str) -> bytes:
    library, size = open_nvrtc(), ctypes.c_size_t()
    check(getattr(library, f"nvrtcGet{kind}Size")(program, ctypes.byref(size)))
    result = ctypes.create_string_buffer(size.value)
    check(getattr(library, f"nvrtcGet{kind}")(program, result))
    return result.raw


def nvrtc_version() -> str:
    major, minor = ctypes.c_int(), ctypes.c_int()
    check(open_nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return f"{major.value}.{minor.value}"


def check(error: int) -> None:
    if error:
        raise RuntimeError(error_text(error))


def error_text(error: int) -> str:
    describe = open_nvrtc().nvrtcGetErrorString
    describe.restype = ctypes.c_char_p
    text: bytes = describe(error)
    return text.decode()


@cache
def open_nvrtc() -> ctypes.CDLL:
    """The library, and beside it what it opens by its name alone. OSError where there is none."""
    library = cuda_utils._get_gpu_rtc_library()
    # Of a line the sixth word, which may have spaces, is the path.
    for folder in {Path(line.split(maxsplit=5)[5]).parent for line in memory_maps() if "/libnvrtc.so" in line}:
        for path in folder.glob("libnvrtc-builtins.so.*"):
            ctypes.CDLL(str(path))
    return library


def memory_maps() -> list[str]:
    """Lines, with paths as Python has them, whatever their bytes."""
    return [os.fsdecode(line) for line in Path("/proc/self/maps").read_bytes().splitlines()]
