"""What programmatic.cuh asks of sources whose kernels start before those ahead have ended, as far as text shows it.

The emulated kernels show more of it: there, what other kernels write is NaN until all threads of a block have waited.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from parallel import transports
from parallel.kernels import launch

KERNELS = Path(launch.__file__).parent
TRANSPORTS = Path(transports.__file__).parent
# Those of a decode step.
EARLY = {
    *("w4a16.cu", "w8a16.cu", "wide.cu", "wide_wgmma.cu", "fused_norm.cu"),
    *("fused_rotary.cu", "fused_silu.cu", "paged_attention.cu"),
    *("host_memory.cu", "host_memory_dense.cu", "host_memory_int8.cu"),
    *("host_memory_norm.cu", "host_memory_two_step.cu"),
}
FILES = {path.name: path for path in (*KERNELS.glob("*.cu"), *TRANSPORTS.glob("*.cu"))}
LAMBDA = r"  auto \w+ = \[&\].*?\};\n"
SUCCESSOR = "let_successor_start();"
# Parameters, and what is made of them, that no kernel of a graph writes.
CONSTANT = {"weights", "scales", "codebook", "cos", "sin", "q_norm", "k_norm"}
# What the kernel right ahead does not write either.
WRITTEN_BEFORE = {"paged_attention.cu": {"block_table", "lengths", "starts", "keys", "values"}}
# What __ldg may read: those, and what functions that read them call them.
READ_ONLY = {"codebook", "norm", "table"}


def kernel_of(name: str) -> tuple[str, str]:
    """The parameters and the body of a file's kernel, or of the macro that makes its kernels; it is the file's end."""
    text = re.sub(r"//.*|\\$", "", launch.read_source(FILES[name]), flags=re.MULTILINE)
    _, kernel = text.split('extern "C" __global__ void')
    header, body = kernel.split("{", maxsplit=1)
    return header[header.rindex("(") + 1 : header.rindex(")")], body


def pointers(parameters: str) -> set[str]:
    return {re.split(r"[\s*]+", each.strip())[-1] for each in parameters.split(",") if "*" in each}


def test_all_of_a_decode_step_start_early() -> None:
    assert {name for name, path in FILES.items() if launch.WAIT in launch.read_source(path)} == EARLY


@pytest.mark.parametrize("name", sorted(EARLY))
def test_every_kernel_waits_on_all_paths_and_then_lets_the_next_start(name: str) -> None:
    parameters, body = kernel_of(name)
    assert body.count(launch.WAIT) == body.count(SUCCESSOR) == 1
    before, after = body.split(launch.WAIT)
    assert SUCCESSOR in after
    # Nothing ends, branches or loops around the wait, and no lambda holds it.
    assert "return" not in re.sub(LAMBDA, "", before, flags=re.DOTALL) and before.count("{") == before.count("}")
    assert not before.strip() or before.strip()[-1] in ";}"
    # Members of that name are no parameters.
    touched = set(re.findall(r"(?<![.\w])\w+", before)) & (pointers(parameters) - CONSTANT)
    touched -= WRITTEN_BEFORE.get(name, set())
    # The first level of the cache may have what was there before.
    assert "load_fresh" not in before and "__ldg" not in before
    assert not touched, f"{touched} before the wait"


@pytest.mark.parametrize("name", sorted(EARLY))
def test_what_kernels_write_is_not_read_as_constant(name: str) -> None:
    text = launch.read_source(FILES[name])
    # The one of load_fresh itself, below sm_90.
    own = text.replace("load_fresh(const T* from) { return __ldg(from); }", "")
    assert own != text
    assert set(re.findall(r"__ldg\(\(?(?:const \w+\*\)\()?(\w+)", own)) <= READ_ONLY


@pytest.mark.parametrize("name", sorted(EARLY))
def test_what_is_const_and_restricted_is_read_fresh(name: str) -> None:
    """By an index, the compiler would read it as constant."""
    parameters, body = kernel_of(name)
    each = [part for part in parameters.split(",") if "const" in part and "__restrict__" in part]
    for pointer in pointers(",".join(each)) - CONSTANT:
        assert not re.search(rf"(?<![.\w]){pointer}\[|\*{pointer}\b", body), pointer
