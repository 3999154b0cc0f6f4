"""What each kernel keeps in memory for a weight, and takes beside it while it works; without torch, for plans."""

from __future__ import annotations

from parallel.formats.scheme import NESTED_GROUP, Scheme

# Above this many rows tinygemm's weight is dequantised for F.linear: the time of tinygemm grows with every row (10.1 ms
# a step at one row, 24.2 at 8, 40.4 at 16: one rank's linears of Llama-70B at TP2, H200, torch 2.11), that of F.linear
# does not. Where the two cross has not been measured.
MAX_TINYGEMM_ROWS = 16
# Weights that are dequantised at a time: large enough to keep a card busy, small beside the weight itself.
BLOCK_ELEMENTS = 8 * 1024**2
# Bytes that a dequantised block takes beside its place in the result: values unpacked, and numbers before rounding.
# dequantize: uint8, float32, and float32 scales; tinygemm: uint8 twice, bf16 twice.
BLOCK_BYTES_PER_ELEMENT = {"dequantize": 1 + 4 + 4, "tinygemm": 2 * 1 + 2 * 2, "w4a16": 0, "w8a16": 0}
# w4a16 and w8a16: their dequantising kernels write nothing but the result.
# Of the own kernels.
UNIT_INPUTS = 128
# Weights of a linear that are dequantised for one product: 64 MiB of bf16. Both took, for 80 layers of Llama-70B at TP2
# on an H200 (4 bits; 512 / 1024 / 2048 rows), 79.3 / 123.3 / 225.6 ms with 16 Mi at a time, 71.7 / 120.8 / 216.3 with
# 32 Mi, and 70.9 / 122.2 / 224.3 with 64 Mi, for 64 MiB more.
DEQUANTIZED_AT_A_TIME = 32 * 1024**2
# Beside its operands, of a product on the card with a weight that is packed for the host: one such block of bf16.
HOST_INT4_PRODUCT_BYTES = 2 * DEQUANTIZED_AT_A_TIME
W4A16_GROUP_SIZES = (128, 64, 32)
W8A16_GROUP_SIZE = 128
# w8a16: float32 scales; w4a16: those that come in 16 bits stay that, and zeros take 4 bits beside them.
W8A16_BITS_PER_GROUP = 32
OWN_ZERO_BITS = 4
OWN_KERNELS = ("w4a16", "w8a16")
# Above this many rows they may go through wide.cu, whose blocks leave parts of sums to one another.
MAX_NARROW_ROWS = 8
# Two for each of an H200's 132 multiprocessors, of 128 outputs by 256 tokens in float32, or the other way round.
WIDE_WORKSPACE_BYTES = 33 * 1024**2
# Up to so many rows they always multiply by the packed weight; up to how many more, a trial on the card decides
# (parallel/product_trial.py). At 256 rows both ways took as long on an H200: 52.6 and 55.6 ms (results/LOG.md).
MIN_FUSED_ROWS = 256
# The same where it was measured what the trial finds, by kernel and compute capability: 2048 rows of gate and up took
# an H200 0.70 ms with packed weights and 0.78 with dequantised ones. Plans count on it, and no trial goes below.
MEASURED_FUSED_ROWS = {("w4a16", (9, 0)): 2048}
# bf16 scale and shift.
TINYGEMM_BITS_PER_GROUP = 32
SCALE_BITS = 16
# Of formats whose files have float32.
WIDE_SCALE_BITS = 32
WIDE_SCALES = ("nf4", "fp8-block")
ZERO_BITS = 8
# A single scale for many inputs is repeated for each group of the largest size that tinygemm knows.
LARGEST_TINYGEMM_GROUP = 256


def predict_kernel(scheme: Scheme, device: str, dtype: str) -> str:
    """The kernel that linears of usual shapes get (parallel/kernels/choice.py decides, tensor by tensor)."""
    if device != "cuda" or dtype != "bfloat16":
        return "dequantize"
    if scheme.bits == 8:
        return "dequantize" if scheme.group_size and scheme.group_size % W8A16_GROUP_SIZE else "w8a16"
    fitting = scheme.group_size is None or own_group_size(scheme.group_size) is not None
    return "w4a16" if fitting else "tinygemm"


def own_group_size(group_size: int) -> int | None:
    """Into which of the sizes that w4a16 knows groups of this size are cut; None: into none."""
    return next((size for size in W4A16_GROUP_SIZES if group_size % size == 0), None)


def stored_bits(scheme: Scheme, num_in: int) -> float:
    """Bits in the checkpoint for one weight of a linear with `num_in` inputs, with its share of scales and zeros."""
    # GPTQ has zeros in its files even where they are all the same.
    zero_bits = scheme.bits if scheme.has_zeros or scheme.layout == "gptq" else 0
    scale = 8 + WIDE_SCALE_BITS / NESTED_GROUP if scheme.nested_scales else scale_bits(scheme)
    return scheme.bits + (scale + zero_bits) / (scheme.group_size or num_in) / scheme.block_outputs


def held_bits(scheme: Scheme, device: str, dtype: str, num_in: int) -> float:
    """Bits in memory for one weight of a linear with `num_in` inputs, with its share of scales and zeros."""
    group_size = scheme.group_size or num_in
    kernel = predict_kernel(scheme, device, dtype)
    if kernel == "w4a16":
        per_group = scale_bits(scheme) + (OWN_ZERO_BITS if scheme.has_zeros else 0)
        return scheme.bits + per_group / (own_group_size(group_size) or W4A16_GROUP_SIZES[0])
    if kernel == "w8a16":
        return scheme.bits + W8A16_BITS_PER_GROUP / (W8A16_GROUP_SIZE if scheme.group_size else num_in)
    if kernel == "tinygemm":
        return scheme.bits + TINYGEMM_BITS_PER_GROUP / min(group_size, LARGEST_TINYGEMM_GROUP)
    per_group = scale_bits(scheme) + (ZERO_BITS if scheme.has_zeros else 0)
    return scheme.bits + per_group / group_size


def scale_bits(scheme: Scheme) -> int:
    """Bits of a scale that is a number by itself; of formats that allow float32 too, those that their writers use."""
    return WIDE_SCALE_BITS if scheme.layout in WIDE_SCALES else SCALE_BITS


def sure_fused_rows(scheme: Scheme, device: str, dtype: str, capability: tuple[int, int] | None) -> int:
    """Rows up to which linears multiply by packed weights whatever a trial says, where they can at all.

    Args:
        capability: of all cards; None: unknown.
    """
    if capability is None:
        return MIN_FUSED_ROWS
    return MEASURED_FUSED_ROWS.get((predict_kernel(scheme, device, dtype), capability), MIN_FUSED_ROWS)


def may_dequantize(scheme: Scheme, device: str, dtype: str, num_rows: int, fused_rows: int = MIN_FUSED_ROWS) -> bool:
    """Whether a product of so many rows may make numbers of its weight first; `fused_rows` as of sure_fused_rows."""
    kernel = predict_kernel(scheme, device, dtype)
    always = {"tinygemm": MAX_TINYGEMM_ROWS, **dict.fromkeys(OWN_KERNELS, fused_rows)}
    return num_rows > always.get(kernel, 0)


def product_bytes(
    scheme: Scheme,
    device: str,
    dtype: str,
    element_bytes: int,
    num_rows: int,
    numel: int,
    fused_rows: int = MIN_FUSED_ROWS,
) -> int:
    """Bytes beside its operands that a product of `num_rows` rows with a weight of `numel` elements takes, at most.

    Parts of sums, or the weight dequantised: whichever is more where the card decides between both.
    """
    kernel = predict_kernel(scheme, device, dtype)
    parts = WIDE_WORKSPACE_BYTES if kernel in OWN_KERNELS and num_rows > MAX_NARROW_ROWS else 0
    if not may_dequantize(scheme, device, dtype, num_rows, fused_rows):
        return parts
    if kernel != "dequantize":
        numel = min(numel, DEQUANTIZED_AT_A_TIME)
    return max(parts, numel * element_bytes + min(numel, BLOCK_ELEMENTS) * BLOCK_BYTES_PER_ELEMENT[kernel])


# Layers that the host computes


def host_refusal(scheme: Scheme, dtype: str) -> str | None:
    """Why the host multiplies by no linears of this kind (parallel/kernels/host_int4.py decides, tensor by tensor)."""
    checks = {
        "only linears of 4 bits": scheme.bits == 4 and not scheme.is_float,
        "no codebooks": not scheme.has_codebook,
        "only activations in bfloat16": dtype == "bfloat16",
    }
    return next((rule for rule, kept in checks.items() if not kept), None)


def host_int4_bits(scheme: Scheme, num_in: int) -> float:
    """Bits for one weight that is packed for the host."""
    return scheme.bits + TINYGEMM_BITS_PER_GROUP / min(scheme.group_size or num_in, LARGEST_TINYGEMM_GROUP)
