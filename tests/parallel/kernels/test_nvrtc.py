"""Kernels are compiled without a card and without a CUDA toolkit."""

from __future__ import annotations

import pytest

from parallel.kernels import nvrtc
from tests.parallel.kernels.nvrtc_wheel import find_nvrtc

SOURCE = 'extern "C" __global__ void twice(float* values) { values[threadIdx.x] *= FACTOR; }'


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc.cuda_utils, "_get_gpu_rtc_library", find_nvrtc)
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)


def test_a_source_becomes_machine_code_for_the_card_that_is_named() -> None:
    found = {name: nvrtc.compile_source(SOURCE, "twice", (f"--gpu-architecture={name}", "-DFACTOR=2")) for name in
             ("sm_86", "sm_89")}  # fmt: skip
    assert all(code.startswith(b"\x7fELF") and b"twice" in code and not log for code, log in found.values())
    assert found["sm_86"] != found["sm_89"]
    assert nvrtc.nvrtc_version().startswith("13.")


def test_an_error_begins_with_its_place_and_names_what_is_wrong() -> None:
    with pytest.raises(RuntimeError, match=r'^twice\.cu\(1\): error: identifier "FACTOR" is undefined'):
        nvrtc.compile_source(SOURCE, "twice", ("--gpu-architecture=sm_89",))


def test_a_card_that_it_does_not_know_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="invalid value for --gpu-architecture"):
        nvrtc.compile_source(SOURCE, "twice", ("--gpu-architecture=sm_12345", "-DFACTOR=2"))
