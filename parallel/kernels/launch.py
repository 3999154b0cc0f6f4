"""Kernels of .cu files: compiled at run time by the NVRTC that torch brings, and started with little Python.

torch's own wrapper of a compiled kernel opens the driver's library and wraps every argument at each call: 27 us of host
time where this takes 2 (one core of a server, without the driver's own share).
"""

from __future__ import annotations

import ctypes
import re
import struct
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any, cast

import torch
from torch import Tensor
from torch.cuda import _utils as cuda_utils

from parallel.kernels.binaries import read_or_compile

# Whether kernels that wait for those before them by themselves (programmatic.cuh) start early where they can; looked at
# when a graph is captured.
ENABLED = True
# Shared memory that a block gets without being asked for.
UNTOLD_SHARED_BYTES = 48 * 1024
# What such a source has in it.
WAIT = "wait_for_predecessors();"
# cuda.h: CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION is 1; a CUlaunchAttribute, its value in 64 bytes.
START_EARLY = struct.pack("@I4xi60x", 6, 1)
# cuda.h, CUlaunchConfig: grid, block, shared bytes; stream, attributes, their number.
CONFIG = struct.Struct("@7IPPI4x")


class Kernel:
    """A compiled kernel on one card.

    `parameters` are its parameters in order, as struct codes: P pointer, i int, q long long, f float, 128s 128 bytes.
    `shared_bytes` is the dynamic shared memory of a block. `waits`: it waits for the kernels before it by itself, as
    programmatic.cuh says, and in a captured graph starts before they have ended. Only there: elsewhere the kernel right
    ahead may have written the weights, which are not waited for, and the host takes longer to queue a kernel than this
    would save.
    """

    def __init__(
        self, function: int, parameters: str, device_index: int, shared_bytes: int = 0, *, waits: bool = False
    ) -> None:
        self.function, self.device_index, self.shared_bytes = function, device_index, shared_bytes
        self.waits = waits
        self.layout = struct.Struct(f"@{parameters}")
        self.values = ctypes.create_string_buffer(self.layout.size)
        # The driver copies parameters while it is called, so that one place serves every call.
        start = ctypes.addressof(self.values)
        places = [start + at for at in offsets(parameters)]
        self.pointers = (ctypes.c_void_p * len(places))(*places)
        self.pointers_at = ctypes.addressof(self.pointers)
        self.lock = Lock()
        self.attribute = ctypes.create_string_buffer(START_EARLY)
        self.attribute_at = ctypes.addressof(self.attribute)
        self.config = ctypes.create_string_buffer(CONFIG.size)
        self.config_at = ctypes.addressof(self.config)
        driver = open_driver()
        self.launch, self.launch_early = driver.cuLaunchKernel, driver.cuLaunchKernelEx

    def __call__(self, grid: Sequence[int], num_threads: int, *arguments: Tensor | int | float | bytes | None) -> None:
        """Three numbers of blocks; on the current stream. A pointer is a tensor on the card, or None."""
        values = [each.data_ptr() if isinstance(each, Tensor) else each or 0 for each in arguments]
        stream = torch._C._cuda_getCurrentRawStream(self.device_index)
        with self.lock:
            self.layout.pack_into(self.values, 0, *values)
            block = num_threads, 1, 1, self.shared_bytes, stream
            if ENABLED and self.waits and torch._C._cuda_isCurrentStreamCapturing():
                CONFIG.pack_into(self.config, 0, *grid, *block, self.attribute_at, 1)
                error = self.launch_early(self.config_at, self.function, self.pointers_at, None)
            else:
                error = self.launch(self.function, *grid, *block, self.pointers_at, None)
        if error:
            cuda_utils._check_cuda(error)


def offsets(parameters: str) -> list[int]:
    """Where each parameter lies, in bytes, aligned as C aligns the members of a struct."""
    codes = re.findall(r"\d*\D", parameters)
    return [struct.calcsize(f"@{''.join(codes[:place])}0{code[-1]}") for place, code in enumerate(codes)]


@cache
def open_driver() -> ctypes.CDLL:
    """The driver's library, with the types of what is called in it."""
    driver = cuda_utils._get_gpu_runtime_library()
    pointer, count = ctypes.c_void_p, ctypes.c_uint
    driver.cuLaunchKernel.argtypes = [pointer, *[count] * 7, pointer, pointer, pointer]
    driver.cuLaunchKernelEx.argtypes = [pointer] * 4
    return driver


@cache
def load_kernel(
    path: Path, name: str, options: tuple[str, ...], parameters: str, device_index: int, shared_bytes: int = 0
) -> Kernel:
    """The kernel `name` (extern "C") of a .cu file, compiled for this card.

    Raises RuntimeError with NVRTC's log, OSError where there is no NVRTC.
    """
    major, minor = torch.cuda.get_device_capability(device_index)
    source = read_source(path)
    binary = read_or_compile(source, name, options, architecture(major, minor))
    with torch.cuda.device(device_index):
        loaded = cast(dict[str, Any], cuda_utils._cuda_load_module(binary, [name]))
        # Above 48 KiB a kernel must be told beforehand. What it declares by itself counts too, and is not known here.
        loaded[name].set_shared_memory_config(max(shared_bytes, UNTOLD_SHARED_BYTES) if shared_bytes else 0)
    waits = major >= 9 and WAIT in source
    return Kernel(loaded[name].func.value, parameters, device_index, shared_bytes, waits=waits)


def architecture(major: int, minor: int) -> str:
    """What to compile for on a card of this capability. Instructions of warp groups are in sm_90a alone."""
    return f"{major}{minor}a" if (major, minor) == (9, 0) else f"{major}{minor}"


@cache
def load_problem(load: Callable[..., object], *arguments: Hashable) -> str | None:
    """Why what `load(*arguments)` loads cannot be compiled on this card; None: it can."""
    try:
        load(*arguments)
    except Exception as error:  # NVRTC missing or of another version, or a driver that refuses the code.
        return f"it cannot be compiled: {first_line(error)}"
    return None


def first_line(error: Exception) -> str:
    """What an exception says, or its name where it says nothing, without a point at its end."""
    return (str(error) or repr(error)).splitlines()[0].removesuffix(".")


@cache
def has_tensor_cores(device: torch.device) -> bool:
    """Whether `device` is a card of sm_80 or later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def read_source(path: Path) -> str:
    """A file, with the files of its folder that it includes in their place."""
    text = path.read_text(encoding="utf-8")
    return re.sub(r'^#include "(.+)"$', lambda match: read_source(path.parent / match[1]), text, flags=re.MULTILINE)
