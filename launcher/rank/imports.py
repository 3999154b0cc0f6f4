"""A rank imports torch, transformers and DeepSpeed: with nothing that it does not need, and its card made ready beside.

On one core of a server 3.3 s with scipy installed and collections of garbage, 2.0 without (torch 2.13, transformers
5.23).
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
import threading
from collections.abc import Iterator

# Transformers imports these wherever they are installed: for images, losses and metrics that no rank has to do with.
UNUSED = ("scipy", "sklearn", "torchvision")


@contextlib.contextmanager
def lean_imports() -> Iterator[None]:
    """What is imported inside stays: the collector of cycles does not look for garbage in it, nor later.

    Modules are 650,000 objects, which it would go through again and again while they are imported.
    """
    for name in UNUSED:
        # As if it were not installed.
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def begin_context(card: int) -> threading.Thread:
    """Makes the context of a card, which torch finds later: the driver takes a while, and nothing of Python's time.

    In order only: where it cannot be had, torch says why.
    """
    # As torch has it, which comes too late.
    os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")
    thread = threading.Thread(target=retain_context, args=(card,), name="context", daemon=True)
    thread.start()
    return thread


def retain_context(card: int) -> None:
    device, context = ctypes.c_int(), ctypes.c_void_p()
    with contextlib.suppress(OSError):
        driver = ctypes.CDLL("libcuda.so.1")
        if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(device), card) == 0:
            driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
