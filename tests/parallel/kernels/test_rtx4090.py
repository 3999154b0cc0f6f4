"""Kernels as an RTX 4090 gets them: none spills, none asks for more than there is, and as many blocks as the launch
counts on are at work at a time.

Compiled are launches that are nearest to what the card has. `python -m tests.parallel.kernels.rtx4090` compiles all
that the product may ask for, some 700 in five minutes, and prints what each takes.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import gpu
from tests.launcher.cli import environment
from tests.parallel.kernels.rtx4090 import (
    SOURCES,
    Nvrtc,
    Use,
    every_use,
    pretended_card,
    problem,
)

# By what their names begin with, of every source. Small groups, many columns and many ranks take the most registers.
NEAREST = (
    "w4a16 (128-20-bfloat16|32-20-bfloat16|64-codebook)",
    "w8a16 int8-groups",
    "wide (128-20-bfloat16|int8-groups|32-codebook) (16|64|256) rows",
    "wide (128-20-bfloat16|int8-groups) swiglu 32 rows",
    "dequantize_packed (32-codebook|int8-groups)",
    "paged_attention 128 bfloat16( fp8)?( tree)? (8|32) columns",
    "(fused_norm|fused_silu|fused_rotary (64|256)|pack_four_bits|pack_eight_bits|dequantize_host)",
    "round_groups",
    "host_memory.* of 4,",
)


@pytest.fixture(scope="module")
def nvrtc() -> Iterator[Nvrtc]:
    with pretended_card() as pretended:
        yield pretended


@pytest.fixture(scope="module")
def uses(nvrtc: Nvrtc) -> list[Use]:
    return every_use()


@pytest.mark.parametrize("nearest", NEAREST)
def test_kernels_fit(nvrtc: Nvrtc, uses: list[Use], nearest: str) -> None:
    problems = {use.name: problem(use, nvrtc.measure(use)) for use in uses if re.match(nearest, use.name)}
    assert problems and set(problems.values()) == {""}, {name: why for name, why in problems.items() if why}


def test_all_sources_are_compiled_but_that_of_warp_groups(uses: list[Use]) -> None:
    compiled = {use.name.split()[0] for use in uses if any(re.match(each, use.name) for each in NEAREST)}
    assert compiled == {path.stem for path in SOURCES} - {"wide_wgmma"}


def test_processes_that_stand_in_for_one_get_code_of_it_from_any_card(tmp_path: Path) -> None:
    """tests/gpu/as_rtx4090, as far as that shows without a card."""
    folder = Path(gpu.__file__).parent / "as_rtx4090"
    code = (
        "import torch, pynvml; from parallel.kernels import launch, fused; "
        "from tests.parallel.kernels.nvrtc_wheel import find_nvrtc; "
        "torch.cuda._utils._get_gpu_rtc_library = find_nvrtc; "
        "source = launch.read_source(fused.FOLDER / 'fused_silu.cu'); "
        "assert launch.read_or_compile(source, 'silu_mul', (), '89').startswith(b'//'); "
        "print(torch.cuda.get_device_capability(), pynvml.nvmlDeviceGetCudaComputeCapability(None))"
    )
    paths = (str(folder), str(folder.parents[2]))
    notes = {"PYTHONPATH": os.pathsep.join(paths), "AS_RTX4090_KERNELS": str(tmp_path / "kernels")}
    env = environment(notes | {"XDG_CACHE_HOME": str(tmp_path)})
    found = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert found.stdout.splitlines()[-1:] == ["(8, 9) [8, 9]"], found.stderr
    assert (tmp_path / "kernels").read_text().startswith(".target sm_89 silu_mul ")
    assert [path.parent.name for path in tmp_path.rglob("*.cubin")] == ["as_rtx4090"]
