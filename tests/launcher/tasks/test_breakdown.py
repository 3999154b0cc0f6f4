"""Which part of a decode step a kernel belongs to, and what is said of a step's kernels."""

from __future__ import annotations

import re
from itertools import chain
from pathlib import Path

import pytest
import torch

import parallel
import parallel.kernels.choice
import parallel.kernels.paged_attention
from launcher.tasks.breakdown import NAMES, Piece, break_down_steps, part_of, parts_of
from parallel.kernels.operators import NAMESPACE


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "all_reduce"),
        ("reduce_bfloat16", "all_reduce"),
        ("reduce_bfloat16_and_norm", "all_reduce"),
        ("gloo:all_reduce", "all_reduce"),
        ("w4a16", "linears"),
        ("dequantize_w8", "linears"),
        ("nvjet_tst_64x8_64x16_4x1_v_bz_splitK_TNT", "linears"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float>", "linears"),
        ("void tinygemm_m16n8k16_chunk_kernel<ALayout_RM>", "linears"),
        ("void gemv2T_kernel_val<int, int, __nv_bfloat16>", "linears"),
        ("aten::linear", "linears"),
        ("paged_attention", "attention"),
        ("launch70b::attend", "attention"),
        ("void flash::flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits<128, 64>>", "attention"),
        ("rms_norm", "norms"),
        ("launch70b::add_rms_norm", "norms"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::rsqrt_kernel_cuda>", "norms"),
        ("rotary_and_cache", "rotary"),
        ("silu_mul", "activation"),
        ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::MaxOps>>", "other"),
        ("Memcpy DtoD (Device -> Device)", "other"),
        ("something new", "other"),
    ],
)
def test_name_tells_the_part(name: str, part: str) -> None:
    assert part_of(name) == part


def own_names() -> list[str]:
    """Every operator and every CUDA kernel of this project."""
    operators = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith(f"{NAMESPACE}::")]
    sources = [file.read_text() for file in Path(parallel.__file__).parent.rglob("*.cu")]
    plain = [re.findall(r'^extern "C" __global__[^;{]*?\n(\w+)\(', source, re.MULTILINE) for source in sources]
    macros = [re.findall(r"^KERNEL\((\w+),", source, re.MULTILINE) for source in sources]
    return [*operators, *chain(*plain, *macros)]


def test_every_kernel_of_this_project_has_a_part() -> None:
    names = own_names()
    assert {"launch70b::attend", "launch70b::w4a16", "w8a16", "rms_norm", "gather_bytes", "paged_attention"} <= set(
        names
    )
    assert [name for name in names if part_of(name) == "other"] == []


def test_what_follows_the_last_norm_is_head_and_sampling() -> None:
    names = ["embedding", "rms_norm", "nvjet_a", "paged_attention", "nccl", "rms_norm", "nvjet_b", "max", "ncclGather"]
    assert parts_of(names) == [
        *("other", "norms", "linears", "attention", "all_reduce", "norms"),
        *("head", "sampling", "sampling"),
    ]


def test_without_a_norm_nothing_is_head() -> None:
    assert parts_of(["nvjet", "max"]) == ["linears", "other"]


def steps_of(*steps: list[tuple[str, float, float]]) -> list[Piece]:
    """Steps of (name, start within the step, us), 100 us apart."""
    return [Piece(name, 100.0 * n + start, us) for n, step in enumerate(steps) for name, start, us in step]


def test_times_are_means_over_the_steps_but_the_first() -> None:
    first = [("rms_norm", 0.0, 900.0), ("w4a16", 10.0, 900.0), ("odd", 30.0, 900.0), ("rms_norm", 70.0, 1.0)]
    second = [("rms_norm", 0.0, 10.0), ("w4a16", 10.0, 20.0), ("odd", 30.0, 6.0), ("rms_norm", 70.0, 2.0)]
    third = [("rms_norm", 0.0, 14.0), ("w4a16", 20.0, 30.0), ("odd", 60.0, 4.0), ("rms_norm", 98.0, 2.0)]
    found = break_down_steps(steps_of(first, second, third), num_steps=2)
    assert found["step_us"] == 100.0
    us = {name: part["us"] for name, part in found["parts"].items()}
    assert (us["norms"], us["linears"], us["other"], us["between"]) == (14.0, 25.0, 5.0, 56.0)
    assert set(us) == {*NAMES, "between"}
    assert sum(part["share"] for part in found["parts"].values()) == pytest.approx(1)
    assert (found["other_us"], found["problem"]) == ({"odd": 5.0}, None)


def test_a_kernel_that_starts_early_counts_from_the_end_of_those_before() -> None:
    step = [("w4a16", 0.0, 30.0), ("rms_norm", 20.0, 15.0), ("odd", 25.0, 5.0), ("w4a16", 36.0, 4.0)]
    us = {name: part["us"] for name, part in break_down_steps(steps_of(step, step), num_steps=1)["parts"].items()}
    assert (us["linears"], us["norms"], us["other"], us["head"], us["between"]) == (30.0, 5.0, 0.0, 4.0, 1.0)


@pytest.mark.parametrize("num_pieces", (0, 7))
def test_steps_that_cannot_be_told_apart_give_nothing_but_why(num_pieces: int) -> None:
    found = break_down_steps([Piece("w4a16", float(n), 1.0) for n in range(num_pieces)], num_steps=2)
    assert found["parts"] is None
    assert f"{num_pieces} kernels" in found["problem"]
