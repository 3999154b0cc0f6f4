"""Descriptions of tensors by which a card of sm_90 copies boxes of them to shared memory (the driver's CUtensorMap)."""

from __future__ import annotations

import ctypes
from functools import lru_cache

from torch import Tensor
from torch.cuda import _utils as cuda_utils

from parallel.kernels.launch import open_driver

MAP_BYTES = 128
ALIGNMENT = 64
# cuda.h: CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, .._INTERLEAVE_NONE, .._SWIZZLE_128B, .._L2_PROMOTION_L2_256B, .._OOB_FILL_NONE.
BFLOAT16, PLAIN, SWAPPED, PROMOTED, ZEROS = 9, 0, 3, 3, 0
# Columns of a box: 128 bytes, over which pieces of 16 are swapped.
BOX_COLUMNS = 64


def describe_boxes(tensor: Tensor, box_rows: int) -> bytes:
    """Boxes of `box_rows` rows (up to 256) and 64 columns of a contiguous tensor [m, n] of bf16, n a multiple of 8.

    In shared memory, piece i of 16 bytes of row r of a box is at i ^ (r & 7) among those of the row.
    """
    assert tensor.is_contiguous() and tensor.data_ptr() % 16 == 0, tensor.shape
    return encode(tensor.data_ptr(), *tensor.shape, box_rows)


# Buffers come back at the same addresses pass after pass.
@lru_cache(maxsize=1024)
def encode(address: int, num_rows: int, num_columns: int, box_rows: int) -> bytes:
    buffer = ctypes.create_string_buffer(MAP_BYTES + ALIGNMENT)
    start = -(-ctypes.addressof(buffer) // ALIGNMENT) * ALIGNMENT
    sizes = (ctypes.c_uint64 * 2)(num_columns, num_rows)
    strides = (ctypes.c_uint64 * 1)(num_columns * 2)
    box = (ctypes.c_uint32 * 2)(BOX_COLUMNS, box_rows)
    steps = (ctypes.c_uint32 * 2)(1, 1)
    error = open_driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(start), BFLOAT16, 2, ctypes.c_void_p(address), sizes, strides, box, steps,
        PLAIN, SWAPPED, PROMOTED, ZEROS,
    )  # fmt: skip
    if error:
        cuda_utils._check_cuda(error)
    return ctypes.string_at(start, MAP_BYTES)
