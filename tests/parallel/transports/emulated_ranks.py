"""Kernels through host memory, compiled for the CPU with their instructions emulated (emulated_ranks.h)."""

from __future__ import annotations

import ctypes
import re
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from torch import Tensor

from parallel.kernels.launch import read_source

HEADER = Path(__file__).with_name("emulated_ranks.h")
# A part of each instruction, and what does the same here.
INSTRUCTIONS = {
    "globaltimer": "time = nanoseconds()",
    "cvt.rn.bf16x2": "result = rounded(high) << 16 | rounded(low)",
    "cvt.rn.f16x2": "__builtin_trap()",
    "cvt.f32.f16": "__builtin_trap()",
    "st.relaxed.sys.global.u32": "*(volatile u32*)error = peer + 1",
}
# Of lines that are one access, or two words.
LINES = {
    "st.relaxed.sys.global.b128": "store_line(line, v)",
    "ld.relaxed.sys.global.b128": "load_line(line, low, high)",
}
WORDS = {
    "st.relaxed.sys.global.v2.b64": "store_words(line, flag | data.x, flag | data.y)",
    "ld.relaxed.sys.global.v2.b64": "load_words(line, words.first, words.second)",
}


@cache
def compile_source(source: Path, *options: str) -> ctypes.CDLL:
    text = read_source(source)
    own = WORDS if any(part in text for part in WORDS) else LINES
    for part, instead in (INSTRUCTIONS | own).items():
        text, count = re.subn(rf'asm( volatile)?\((?:(?!;\n|asm)[\s\S])*?{re.escape(part)}[\s\S]*?\);\n',
                              f"{instead};\n", text)  # fmt: skip
        assert count, part
    # Only the first thread of a block asks for the epoch; a static variable is every thread's own here.
    text = text.replace("epoch = shared_epoch;", "epoch = (u32)block->first(threadIdx.x, shared_epoch);")
    text = text.replace("return shared_failed == 0;", "return block->first(threadIdx.x, shared_failed) == 0;")
    text = text.replace("__syncthreads();", "block->meet();")
    text = text.replace("__shared__ float shared_sums[MAX_WARPS];", "float* const shared_sums = block->floats;")
    text = text.replace("(word = *at)", "(std::this_thread::yield(), word = *at)")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kernel.h").write_text(text)
        target = f"{folder}/kernel.so"
        command = ["g++", "-std=c++20", "-w", "-fPIC", "-shared", "-pthread", "-x", "c++", str(HEADER), "-o", target]
        subprocess.run([*command, f'-DKERNEL_FILE="{folder}/kernel.h"', *options], check=True)
        return ctypes.CDLL(target)


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def pointers(tensors: list[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*(each.data_ptr() for each in tensors))
