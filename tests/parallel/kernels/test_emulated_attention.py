"""paged_attention.cu itself, compiled for the CPU with its instructions emulated, against float64.

It shows layouts, masks, indices and the ring of copies; not what a card's instructions do, nor races between warps.
"""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from parallel.kernels import paged_attention as own
from parallel.kernels.attention_launch import Launch, choose_launch, num_passes
from parallel.kernels.pages import FP8
from tests.parallel.paged import Case, make_case
from tests.parallel.trees import make_tree_case

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")

HEADER = Path(__file__).with_name("emulated_attention.h")
BF16, F16 = torch.bfloat16, torch.float16
# Of the query and of KV, the head, and two depths of rings: an odd and an even one.
KINDS = {
    "bf16": (BF16, BF16, 64, 3),
    "e4m3": (BF16, FP8, 128, 4),
    "fp16": (F16, F16, 128, 4),
    "small": (F16, FP8, 64, 3),
}


@pytest.mark.parametrize("kind", KINDS)
def test_one_row_a_sequence(kind: str, tmp_path: Path) -> None:
    dtype, kv_dtype, head_dim, depth = KINDS[kind]
    group = 5
    launch = replace(choose_launch(head_dim, group, dtype, kv_dtype, warps=2), depth=depth)
    library = compile_source(tmp_path, launch, eager=kind == "bf16")
    # More than the 32 tiles whose pages a warp looks up at once.
    lengths = [0, 1100] if kind == "small" else [0, 1, 130, 333]
    case = make_case(lengths, 1 if kind == "small" else 2, group, head_dim, dtype=dtype, kv_dtype=kv_dtype)
    for splits in (1, 3):
        assert case.worst_error(run(library, launch, splits, case.query, case)) < 0.08


@pytest.mark.parametrize(("kind", "cluster", "splits"), [("bf16", 2, 4), ("small", 4, 4)])
def test_splits_of_clusters(kind: str, cluster: int, splits: int, tmp_path: Path) -> None:
    dtype, kv_dtype, head_dim, depth = KINDS[kind]
    launch = choose_launch(head_dim, 5, dtype, kv_dtype, warps=2)
    library = compile_source(tmp_path, replace(launch, depth=depth, cluster=cluster), eager=kind == "bf16")
    # Fewer tiles than warps, and with two clusters more than one takes.
    case = make_case([0, 1, 130, 600], 1, 5, head_dim, dtype=dtype, kv_dtype=kv_dtype)
    launch = replace(launch, cluster=cluster)
    assert case.worst_error(run(library, launch, splits, case.query, case)) < 0.08


def test_rows_of_a_tree_in_clusters(tmp_path: Path) -> None:
    launch = replace(choose_launch(64, 10, BF16, BF16, tree=True, warps=2), depth=4, cluster=2)
    library = compile_source(tmp_path, launch, eager=True)
    held = make_tree_case([70, 0, -1, 520], [5, 5, 0, 2], 5, 1, 2, 64, dtype=BF16, kv_dtype=BF16)
    found = run(library, launch, 4, held.query, held.case, held.tree.starts, held.tree.masks)
    assert held.worst_error(found) < 0.08


# One tile of columns, passes of three tiles (the query in shared memory), as many rows as a word has bits, and more.
@pytest.mark.parametrize(
    ("kind", "rows", "group"), [("small", 2, 4), ("bf16", 5, 8), ("e4m3", 3, 5), ("bf16", 64, 1), ("small", 130, 3)]
)
def test_rows_of_a_tree(rows: int, group: int, kind: str, tmp_path: Path) -> None:
    dtype, kv_dtype, head_dim, depth = KINDS[kind]
    launch = choose_launch(head_dim, rows * group, dtype, kv_dtype, tree=True, warps=2)
    launch = replace(launch, depth=depth)
    library = compile_source(tmp_path, launch, eager=kind == "bf16")
    held = make_tree_case([70, 0, -1, 30], [rows, rows, 0, 2], rows, 1, group, head_dim, dtype=dtype, kv_dtype=kv_dtype)
    for splits in (2,) if rows > 5 else (1, 2):
        found = run(library, launch, splits, held.query, held.case, held.tree.starts, held.tree.masks)
        assert held.worst_error(found) < 0.08


def run(
    library: ctypes.CDLL,
    launch: Launch,
    splits: int,
    query: Tensor,
    case: Case,
    starts: Tensor | None = None,
    masks: Tensor | None = None,
) -> Tensor:
    query = query if own.has_aligned_rows(query) else query.contiguous()
    output = torch.full(query.shape, math.nan, dtype=query.dtype)
    kv_heads, rows = case.kv.keys.shape[1], len(query) // len(case.lengths)
    group = query.shape[1] // kv_heads
    grid = (kv_heads * num_passes(rows * group), splits, len(case.lengths))
    work = [each.fill_(math.nan) for each in own.workspace(launch, grid, query)]
    tensors = (query, case.kv.keys, case.kv.values, case.block_table, case.lengths, starts, masks, output, *work)
    pointers = [ctypes.c_void_p(0 if each is None else each.data_ptr()) for each in tensors]
    scale = ctypes.c_float(case.scale * math.log2(math.e))
    words = 0 if masks is None else masks.shape[1]
    sizes = (query.stride(0), case.block_table.stride(0), case.block_table.shape[1], kv_heads, group, rows, words)
    library.run_attention(*pointers, scale, *sizes, *grid, len(case.kv.keys))
    return output


def compile_source(folder: Path, launch: Launch, *, eager: bool) -> ctypes.CDLL:
    target = folder / "kernel.so"
    command = ["g++", "-std=c++17", "-w", "-fPIC", "-shared", "-pthread", "-x", "c++", str(HEADER)]
    options = [f'-DKERNEL_FILE="{own.SOURCE}"', f"-DEAGER={int(eager)}", *launch.options()]
    subprocess.run([*command, "-o", str(target), *options], check=True)
    return ctypes.CDLL(str(target))
