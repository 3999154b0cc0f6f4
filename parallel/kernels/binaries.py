"""Compiled CUDA kernels on disk, so that only the first run on a machine waits for NVRTC (0.1 to 0.5 s a kernel)."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from parallel.kernels.nvrtc import compile_source, nvrtc_version

DIGEST_BYTES = 32


def read_or_compile(source: str, name: str, options: Sequence[str], capability: str) -> bytes:
    """The cubin of the kernel `name` for a card of `capability` ("89"). RuntimeError with NVRTC's log."""
    path = cache_folder() / f"{key_of(source, name, *options, capability, nvrtc_version(), torch.__version__)}.cubin"
    return read_or_make(path, lambda: compile_binary(source, name, options, capability))


def compile_binary(source: str, name: str, options: Sequence[str], capability: str) -> bytes:
    binary, _ = compile_source(source, name, [f"--gpu-architecture=sm_{capability}", *options])
    return binary


def key_of(*parts: str) -> str:
    """A name for what is made from these."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/launch70b/kernels, in ~/.cache where it is not set."""
    # Where there is no home, "~" stays, cannot be expanded, and is a folder like any other.
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111
    return Path(root) / "launch70b" / "kernels"


def read_or_make(path: Path, make: Callable[[], bytes]) -> bytes:
    """The bytes stored at `path`; where there are none, or not all of them, those of `make`, which it stores."""
    stored = read_whole(path)
    if stored is not None:
        return stored
    made = make()
    # A cache that cannot be written (read-only, full, no home) costs time, never the run.
    with contextlib.suppress(OSError):
        write_whole(path, made)
    return made


def read_whole(path: Path) -> bytes | None:
    """What `write_whole` wrote; None where it is missing, cut or damaged."""
    try:
        stored = path.read_bytes()
    except OSError:
        return None
    digest, content = stored[:DIGEST_BYTES], stored[DIGEST_BYTES:]
    return content if hashlib.sha256(content).digest() == digest else None


def write_whole(path: Path, content: bytes) -> None:
    """All or nothing, whichever rank is first: written beside its place, then renamed. OSError where it cannot be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(hashlib.sha256(content).digest() + content)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink()
        raise
