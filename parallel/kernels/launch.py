"""Kernels of this folder's .cu files: compiled at run time by the NVRTC that torch brings, started with little Python.

torch's own wrapper of a compiled kernel opens the driver's library and wraps every argument at each call: 27 us of host
time where this takes 2 (one core of a server, without the driver's own share).
"""

from __future__ import annotations

import ctypes
import re
import struct
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any, cast

import torch
from torch.cuda import _utils as cuda_utils

from parallel.kernels.binaries import read_or_compile

FOLDER = Path(__file__).parent


class Kernel:
    """A compiled kernel on one card.

    `parameters` are its parameters in order, as struct codes: P pointer, i int, q long long, f float.
    """

    def __init__(self, function: int, parameters: str, device_index: int) -> None:
        self.function, self.device_index = function, device_index
        self.layout = struct.Struct(f"@{parameters}")
        self.values = ctypes.create_string_buffer(self.layout.size)
        # The driver copies parameters while it is called, so that one place serves every call.
        start = ctypes.addressof(self.values)
        self.pointers = (ctypes.c_void_p * len(parameters))(*(start + at for at in offsets(parameters)))
        self.pointers_at = ctypes.addressof(self.pointers)
        self.lock = Lock()
        self.launch = open_driver().cuLaunchKernel

    def __call__(self, grid: tuple[int, int], num_threads: int, *arguments: int | float) -> None:
        """On the current stream. Tensors are passed as their data_ptr(); the caller keeps them until it returns."""
        stream = torch._C._cuda_getCurrentRawStream(self.device_index)
        with self.lock:
            self.layout.pack_into(self.values, 0, *arguments)
            error = self.launch(
                self.function, grid[0], grid[1], 1, num_threads, 1, 1, 0, stream, self.pointers_at, None
            )
        if error:
            cuda_utils._check_cuda(error)


def offsets(parameters: str) -> list[int]:
    """Where each parameter lies, in bytes, aligned as C aligns the members of a struct."""
    return [struct.calcsize(f"@{parameters[:place]}0{code}") for place, code in enumerate(parameters)]


@cache
def open_driver() -> ctypes.CDLL:
    """The driver's library, with the types of what is called in it."""
    driver = cuda_utils._get_gpu_runtime_library()
    pointer, count = ctypes.c_void_p, ctypes.c_uint
    driver.cuLaunchKernel.argtypes = [pointer, *[count] * 7, pointer, pointer, pointer]
    return driver


@cache
def load_kernel(file: str, name: str, options: tuple[str, ...], parameters: str, device_index: int) -> Kernel:
    """The kernel `name` (extern "C") of a .cu file of this folder, compiled for this card.

    Raises RuntimeError with NVRTC's log, OSError where there is no NVRTC.
    """
    major, minor = torch.cuda.get_device_capability(device_index)
    binary = read_or_compile(read_source(file), name, options, f"{major}{minor}")
    with torch.cuda.device(device_index):
        loaded = cast(dict[str, Any], cuda_utils._cuda_load_module(binary, [name]))
    return Kernel(loaded[name].func.value, parameters, device_index)


@cache
def read_source(file: str) -> str:
    """A file of this folder, with the files that it includes in their place."""
    text = (FOLDER / file).read_text(encoding="utf-8")
    return re.sub(r'^#include "(.+)"$', lambda match: read_source(match[1]), text, flags=re.MULTILINE)
