"""Descriptions of tensors by which a card of sm_90 copies boxes of them to shared memory (the driver's CUtensorMap)."""

from __future__ import annotations

import ctypes
from functools import lru_cache

from torch import Tensor
from torch.cuda import _utils as cuda_utils

from parallel.kernels.launch import open_driver

MAP_BYTES = 128
ALIGNMENT = 64
# cuda.h: CU_TENSOR_MAP_DATA_TYPE_.., .._INTERLEAVE_NONE, .._SWIZZLE_NONE and _128B, .._L2_PROMOTION_L2_256B,
# .._OOB_FILL_NONE, which fills with zeros.
DATA_TYPES = {2: 9, 8: 4}
PLAIN, SWAPPED, PROMOTED = 0, 3, 3
# Of strides and of a tensor's first byte.
TENSOR_ALIGNMENT = 16


def describe_boxes(tensor: Tensor, box: tuple[int, int], element_bytes: int, *, swapped: bool = False) -> bytes:
    """Boxes of some rows and columns (up to 256 of each) of a contiguous tensor, seen as [first dimension, all others].

    Columns are counted in elements of 2 bytes (bf16) or 8 (any bits). `swapped`, for boxes that are 128 bytes wide: in
    shared memory, piece i of 16 bytes of row r of a box is at i ^ (r & 7) among those of the row.
    """
    assert tensor.is_contiguous() and tensor.data_ptr() % TENSOR_ALIGNMENT == 0, tensor.shape
    # len() of a tensor takes the host four times as long.
    num_rows = tensor.shape[0]
    return encode(tensor.data_ptr(), num_rows, tensor.nbytes // num_rows, box, element_bytes, swapped)


# Buffers come back at the same addresses pass after pass.
@lru_cache(maxsize=4096)
def encode(
    address: int, num_rows: int, row_bytes: int, box: tuple[int, int], element_bytes: int, swapped: bool
) -> bytes:
    buffer = ctypes.create_string_buffer(MAP_BYTES + ALIGNMENT)
    start = -(-ctypes.addressof(buffer) // ALIGNMENT) * ALIGNMENT
    sizes = (ctypes.c_uint64 * 2)(row_bytes // element_bytes, num_rows)
    strides = (ctypes.c_uint64 * 1)(row_bytes)
    rows, columns = box
    error = open_driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(start), DATA_TYPES[element_bytes], 2, ctypes.c_void_p(address), sizes, strides,
        (ctypes.c_uint32 * 2)(columns, rows), (ctypes.c_uint32 * 2)(1, 1), PLAIN, SWAPPED if swapped else PLAIN,
        PROMOTED, PLAIN,
    )  # fmt: skip
    if error:
        cuda_utils._check_cuda(error)
    return ctypes.string_at(start, MAP_BYTES)
