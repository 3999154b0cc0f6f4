"""The quantised formats that tools write: what config.json says, which tensors a linear becomes, and their values.

Rounding is to the nearest, in groups: quick, and a little worse than what AWQ and GPTQ choose.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from parallel.formats.config import read_scheme
from parallel.formats.registry import format_of
from parallel.formats.scheme import Part, Scheme, inputs_problem, stored_shape
from tools.checkpoint.nf4 import pack_nf4
from tools.checkpoint.stored import Linear
from tools.checkpoint.stored import Tensor as StoredTensor

GROUP_SIZE = 128
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
FLOAT8_MAX = 448.0
TORCH_DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
}


@dataclass(frozen=True)
class Rounded:
    """weight = (values - zeros) * scales: [out, in] uint8, [out, groups] float32, [out, groups] uint8."""

    values: Tensor
    scales: Tensor
    zeros: Tensor


@dataclass(frozen=True)
class Writer:
    """`pack` makes the stored tensors of a linear, by part, in any float dtype; `config` is quantization_config."""

    config: dict[str, Any]
    pack: Callable[[Tensor, Scheme], dict[str, Tensor]]
    scale_dtype: str

    @property
    def scheme(self) -> Scheme:
        scheme = read_scheme(self.config)
        assert scheme is not None
        return scheme

    def tensors(self, num_out: int, num_in: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Dtype, in safetensors' spelling, and shape of each stored tensor of a linear [num_out, num_in]."""
        parts = format_of(self.scheme).parts(self.scheme)
        return {
            part.name: (self.dtype_of(part), stored_shape(part, self.scheme, num_out, num_in))
            for part in parts
            if part.required or part.name in ("g_idx", "weight_shape")
        }

    def dtype_of(self, part: Part) -> str:
        return self.scale_dtype if self.scale_dtype in part.dtypes else part.dtypes[-1 if "shape" in part.name else 0]

    def stored(self, weight: Tensor) -> dict[str, Tensor]:
        """The tensors of a linear whose weight is `weight`, [out, in]."""
        packed = self.pack(weight.float(), self.scheme)
        wanted = self.tensors(*weight.shape)
        return {name: packed[name].to(TORCH_DTYPES[dtype]).contiguous() for name, (dtype, _) in wanted.items()}


def quantized_tensors(name: str, dtype: str, shape: tuple[int, ...], writer: Writer) -> Iterator[StoredTensor]:
    """What a parameter of a plain checkpoint becomes.

    Raises:
        ValueError: the format cannot store a linear of so many inputs.
    """
    if not is_linear(name):
        yield StoredTensor(name, dtype, shape)
        return
    num_out, num_in = shape
    linear = Linear(name.removesuffix(".weight"), shape)
    if problem := inputs_problem(writer.scheme, num_in):
        raise ValueError(f"{linear.name}: {problem}, which {writer.scheme.method} cannot store. Take another format.")
    for part, (part_dtype, part_shape) in writer.tensors(num_out, num_in).items():
        yield StoredTensor(f"{linear.name}.{part}", part_dtype, part_shape, linear)


def is_linear(name: str) -> bool:
    """Whether a parameter is the weight of a linear that formats quantise."""
    return name.endswith(tuple(f".{linear}.weight" for linear in LINEARS))


def round_weight(weight: Tensor, bits: int, group_size: int | None, *, symmetric: bool) -> Rounded:
    """To the nearest of 2**bits levels for each group; symmetric ones have their zero in the middle."""
    groups = weight.split(group_size or weight.shape[1], dim=1)
    largest, top = 2**bits - 1, 2 ** (bits - 1)
    scales, zeros, values = [], [], []
    for group in groups:
        if symmetric:
            scale = (group.abs().amax(dim=1, keepdim=True) / (top - 0.5)).clamp(min=1e-8)
            zero = torch.full_like(scale, top)
        else:
            low, high = group.amin(dim=1, keepdim=True).clamp(max=0), group.amax(dim=1, keepdim=True).clamp(min=0)
            scale = ((high - low) / largest).clamp(min=1e-8)
            zero = (-low / scale).round()
        # As every format can store it, so that values are the nearest for the scale that will be read.
        scale = scale.bfloat16().float()
        scales.append(scale)
        zeros.append(zero)
        values.append((group / scale + zero).round().clamp(0, largest))
    return Rounded(torch.cat(values, dim=1).byte(), torch.cat(scales, dim=1), torch.cat(zeros, dim=1).byte())


def round_inputs(weight: Tensor, scheme: Scheme) -> tuple[Rounded, Tensor]:
    """As `round_weight`, and the group of each input [in].

    In act order inputs are grouped by the size of their weights: nothing is known of activations here.
    """
    num_in = weight.shape[1]
    order = weight.norm(dim=0).argsort(descending=True) if scheme.act_order else torch.arange(num_in)
    rounded = round_weight(weight[:, order], scheme.bits, scheme.group_size, symmetric=not scheme.has_zeros)
    place = order.argsort()
    return Rounded(rounded.values[:, place], rounded.scales, rounded.zeros), place // (scheme.group_size or num_in)


def pack_words(values: Tensor, bits: int) -> Tensor:
    """[rows, n] uint8 -> [rows, ceil(n * bits / 32)] int32, the first value in the lowest bits; padded with zeros."""
    per_word = 32 // bits
    padded = torch.nn.functional.pad(values, (0, -values.shape[1] % per_word)).long()
    shifts = torch.arange(per_word) * bits
    words = (padded.unflatten(1, (-1, per_word)) << shifts).sum(dim=-1)
    return words.to(torch.int32)


def pack_awq(weight: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    rounded = round_weight(weight, scheme.bits, scheme.group_size, symmetric=False)

    def by_input(values: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(values.t(), (0, -len(values) % len(AWQ_ORDER)))
        return pack_words(padded.unflatten(1, (-1, len(AWQ_ORDER)))[..., AWQ_ORDER].flatten(1), scheme.bits)

    return {"qweight": by_input(rounded.values), "qzeros": by_input(rounded.zeros), "scales": rounded.scales.t()}


def pack_gptq(weight: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    rounded, group_of = round_inputs(weight, scheme)
    stored_zeros = (rounded.zeros - int(scheme.zeros_less_one)) & (2**scheme.bits - 1)
    return {
        "qweight": pack_words(rounded.values, scheme.bits).t(),
        "qzeros": pack_words(stored_zeros.t(), scheme.bits),
        "scales": rounded.scales.t(),
        "g_idx": group_of,
    }


def pack_compressed(weight: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    rounded, group_of = round_inputs(weight, scheme)
    return {
        "weight_packed": pack_words(rounded.values, scheme.bits),
        "weight_scale": rounded.scales,
        "weight_zero_point": pack_words(rounded.zeros.t(), scheme.bits).t(),
        "weight_shape": torch.tensor(weight.shape),
        "weight_g_idx": group_of,
    }


def pack_float8(weight: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    """One scale for each block: of rows and columns, of a channel, or of all."""
    num_out, num_in = weight.shape
    rows = num_out if scheme.per_tensor else scheme.block_outputs
    columns = scheme.group_size or num_in
    padded = torch.nn.functional.pad(weight, (0, -num_in % columns, 0, -num_out % rows))
    largest = padded.abs().unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).amax(dim=(1, 3))
    scale = (largest / FLOAT8_MAX).clamp(min=1e-8)
    by_weight = scale.repeat_interleave(rows, dim=0)[:num_out].repeat_interleave(columns, dim=1)[:, :num_in]
    values = (weight / by_weight).clamp(-FLOAT8_MAX, FLOAT8_MAX)
    stored = scale.view(()) if scheme.per_tensor else scale
    return {"weight": values, "weight_scale": stored, "weight_scale_inv": stored}


def compressed_config(layout: str, **weights: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": {"symmetric": True, "actorder": None} | weights}
        },
    }


AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP_SIZE, "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP_SIZE, "desc_act": False, "sym": True,
        "checkpoint_format": "gptq"}  # fmt: skip
GROUPED = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP_SIZE}
W4A16 = compressed_config("pack-quantized", **GROUPED)
W4A16_ZEROS = compressed_config("pack-quantized", **GROUPED, symmetric=False)
W4A16_ACT_ORDER = compressed_config("pack-quantized", **GROUPED, actorder="group")
W8A16 = compressed_config("pack-quantized", num_bits=8, type="int", strategy="channel", group_size=None)
FP8 = compressed_config("float-quantized", num_bits=8, type="float", strategy="channel", group_size=None)
FP8_TENSOR = {"quant_method": "fp8", "activation_scheme": "dynamic"}
FP8_BLOCK = FP8_TENSOR | {"weight_block_size": [GROUP_SIZE, GROUP_SIZE], "fmt": "e4m3"}
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4",
       "bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": "uint8",
       "bnb_4bit_compute_dtype": "bfloat16"}  # fmt: skip
WRITERS = {
    "awq": Writer(AWQ, pack_awq, "F16"),
    "gptq": Writer(GPTQ, pack_gptq, "F16"),
    "gptq_act_order": Writer(GPTQ | {"desc_act": True}, pack_gptq, "F16"),
    "w4a16": Writer(W4A16, pack_compressed, "BF16"),
    "w4a16_zeros": Writer(W4A16_ZEROS, pack_compressed, "BF16"),
    "w4a16_act_order": Writer(W4A16_ACT_ORDER, pack_compressed, "BF16"),
    "w8a16": Writer(W8A16, pack_compressed, "BF16"),
    "fp8": Writer(FP8, pack_float8, "BF16"),
    "fp8_tensor": Writer(FP8_TENSOR, pack_float8, "F32"),
    "fp8_block": Writer(FP8_BLOCK, pack_float8, "F32"),
    "nf4": Writer(NF4, pack_nf4, "F32"),
}
