"""Kernels are compiled without a card and without a CUDA toolkit."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest
from torch.utils import cpp_extension

from parallel.kernels import binaries, nvrtc
from tests.parallel.kernels.nvrtc_wheel import find_nvrtc

SOURCE = 'extern "C" __global__ void twice(float* values) { values[threadIdx.x] *= FACTOR; }'


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc.cuda_utils, "_get_gpu_rtc_library", find_nvrtc)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)


def test_a_source_becomes_machine_code_for_the_card_that_is_named() -> None:
    codes = [binaries.compile_binary(SOURCE, "twice", ("-DFACTOR=2",), capability) for capability in ("86", "89")]
    assert all(code.startswith(b"\x7fELF") and b"twice" in code for code in codes)
    assert codes[0] != codes[1]
    assert nvrtc.nvrtc_version().startswith("13.")


def test_an_error_begins_with_its_place_and_names_what_is_wrong() -> None:
    with pytest.raises(RuntimeError, match=r'^twice\.cu\(1\): error: identifier "FACTOR" is undefined'):
        nvrtc.compile_source(SOURCE, "twice", ("--gpu-architecture=sm_89",))


def test_a_card_that_it_does_not_know_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="invalid value for --gpu-architecture"):
        nvrtc.compile_source(SOURCE, "twice", ("--gpu-architecture=sm_12345", "-DFACTOR=2"))


def test_libraries_are_found_whatever_bytes_their_paths_have(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9 and\xc2\x85 more")
    folder.mkdir()
    (folder / "library.so").write_bytes(b"x")
    with (folder / "library.so").open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ):
        assert any(line.endswith(f" {folder}/library.so") for line in nvrtc.memory_maps())
