"""Lets every process that has this folder on PYTHONPATH run on a card of sm_80 or later as on an RTX 4090.

torch and NVML answer that the card is of compute capability 8.9 and has the multiprocessors and the shared memory of an
RTX 4090; kernels are compiled to PTX of compute_89, of which the driver makes code for the card that is there; one that
takes more shared memory than an RTX 4090 has is refused. There is no CUDA toolkit. Memory, names and rates stay those
of the card, and so does what cuBLAS, NCCL and torch's own kernels choose. Times are not those of an RTX 4090.

AS_RTX4090_KERNELS: a file that gets a line for each kernel that is loaded: its target, its name, and its source's hash.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

CAPABILITY = (8, 9)
PROPERTIES = {
    "major": 8,
    "minor": 9,
    "multi_processor_count": 128,
    "shared_memory_per_multiprocessor": 100 * 1024,
    "shared_memory_per_block_optin": 99 * 1024,
    "max_threads_per_multi_processor": 1536,
}
TARGET = b".target sm_89"
# cuda.h: CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES.
STATIC_SHARED = 1
# What torch gives cuBLAS on cards before sm_90: two of 4096 KiB and eight of 16.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8")


class Properties:
    """A card's, some of them others."""

    def __init__(self, real: Any) -> None:
        self.real = real

    def __getattr__(self, name: str) -> Any:
        return PROPERTIES[name] if name in PROPERTIES else getattr(self.real, name)


def change_torch(cuda: Any) -> None:
    real = cuda.get_device_properties
    cuda.get_device_capability = lambda device=None: CAPABILITY
    cuda.get_device_properties = lambda device=None: Properties(real(device))


def change_toolkit(cpp_extension: Any) -> None:
    cpp_extension.CUDA_HOME = None


def change_nvml(pynvml: Any) -> None:
    pynvml.nvmlDeviceGetCudaComputeCapability = lambda handle: list(CAPABILITY)


def change_compiler(nvrtc: Any) -> None:
    """NVRTC gives PTX where machine code is asked for."""
    compile_source, read_result = nvrtc.compile_source, nvrtc.read_result

    def compile_ptx(source: str, name: str, options: Sequence[str]) -> tuple[bytes, str]:
        assert "--gpu-architecture=sm_89" in options, options
        found = compile_source(source, name, [option.replace("=sm_89", "=compute_89") for option in options])
        assert TARGET in found[0], found[0][:400]
        return found

    nvrtc.compile_source = compile_ptx
    nvrtc.read_result = lambda program, kind: read_result(program, "PTX" if kind == "CUBIN" else kind)


def change_cache(binaries: Any) -> None:
    """PTX lies elsewhere than machine code, and what is read is noted."""
    folder, read_or_compile = binaries.cache_folder, binaries.read_or_compile
    binaries.cache_folder = lambda: folder() / "as_rtx4090"

    def read_and_note(source: str, name: str, options: Sequence[str], capability: str) -> bytes:
        code: bytes = read_or_compile(source, name, options, capability)
        note(code, name, source)
        return code

    binaries.read_or_compile = read_and_note


def note(code: bytes, name: str, source: str) -> None:
    path = os.environ.get("AS_RTX4090_KERNELS")
    if path:
        target = TARGET.decode() if TARGET in code else "of another target"
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(f"{target} {name} {hashlib.sha256(source.encode()).hexdigest()}\n")


def change_launches(launch: Any) -> None:
    """A kernel that would not start on an RTX 4090 is refused."""
    load_kernel = launch.load_kernel

    def load_checked(*arguments: Any, **named: Any) -> Any:
        kernel = load_kernel(*arguments, **named)
        size = ctypes.c_int()
        error = launch.open_driver().cuFuncGetAttribute(
            ctypes.byref(size), STATIC_SHARED, ctypes.c_void_p(kernel.function)
        )
        taken, most = size.value + kernel.shared_bytes, PROPERTIES["shared_memory_per_block_optin"]
        if error or taken > most:
            raise RuntimeError(f"{arguments[:3]}: {taken} bytes of shared memory of {most}, {error=}")
        assert not kernel.waits, arguments[:3]
        return kernel

    launch.load_kernel = load_checked


CHANGES: dict[str, Callable[[Any], None]] = {
    "torch.cuda": change_torch,
    "torch.utils.cpp_extension": change_toolkit,
    "pynvml": change_nvml,
    "parallel.kernels.nvrtc": change_compiler,
    "parallel.kernels.binaries": change_cache,
    "parallel.kernels.launch": change_launches,
}


class Changed(Loader):
    """Runs a module, then what is to be changed in it, before anybody has imported from it."""

    def __init__(self, loader: Loader, change: Callable[[Any], None]) -> None:
        self.loader, self.change = loader, change

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        self.change(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)


class Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in CHANGES:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = Changed(spec.loader, CHANGES[fullname])
        return spec


sys.meta_path.insert(0, Finder())
