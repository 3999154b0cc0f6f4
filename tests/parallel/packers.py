"""Quantised checkpoints written from the formats' descriptions, bit by bit, without the product's code.

A linear is drawn at random: integer values, scales and zeros, and the group of each input; each format stores the same
four in its own way. The dequantised weight is what a plain checkpoint of the same model would hold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]
Stored = dict[str, Tensor]
# Of a word's eight values, the lowest bits first, which output each is.
AWQ_OUTPUTS = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Drawn:
    """values [out, in], zeros [out, groups]: unsigned; scales [out, groups]; group_of [in]."""

    values: Ints
    scales: NDArray[np.float64]
    zeros: Ints
    group_of: Ints

    @property
    def weight(self) -> Tensor:
        """[out, in] float64."""
        return torch.from_numpy((self.values - self.zeros[:, self.group_of]) * self.scales[:, self.group_of])


def draw(
    shape: tuple[int, int], bits: int, group: int, seed: int, *, symmetric: bool = False, act_order: bool = False
) -> Drawn:
    """Scales are exact in fp16 and bf16, so that what a format stores is what was drawn."""
    random = np.random.default_rng(seed)
    num_out, num_in = shape
    num_groups = -(-num_in // group)
    group_of = np.arange(num_in) // group
    if act_order:
        random.shuffle(group_of)
    scales = random.integers(64, 128, (num_out, num_groups)) * 2.0**-12 * 16 / 2**bits
    zeros = random.integers(0, 2**bits, (num_out, num_groups))
    if symmetric:
        zeros[:] = 2 ** (bits - 1)
    # The extremes of zeros, whatever was drawn.
    elif zeros.size > 1:
        zeros.flat[0], zeros.flat[-1] = 0, 2**bits - 1
    return Drawn(random.integers(0, 2**bits, shape), scales, zeros, group_of)


def words(rows: Ints, bits: int) -> Tensor:
    """[rows, n] -> [rows, ceil(n / per word)] int32: value i of a word times 2**(bits * i)."""
    per_word = 32 // bits
    packed = np.zeros((len(rows), -(-rows.shape[1] // per_word)), dtype=np.uint32)
    for column in range(rows.shape[1]):
        packed[:, column // per_word] |= (rows[:, column] << (bits * (column % per_word))).astype(np.uint32)
    return torch.from_numpy(packed.view(np.int32).copy())


def awq_words(rows: Ints) -> Tensor:
    """As `words`, but value i of a word is column AWQ_OUTPUTS[i] of its eight."""
    columns = [8 * word + output for word in range(rows.shape[1] // 8) for output in AWQ_OUTPUTS]
    return words(rows[:, columns], 4)


def awq(linear: Drawn, config: dict[str, Any]) -> Stored:
    return {
        "qweight": awq_words(linear.values.T),
        "qzeros": awq_words(linear.zeros.T),
        "scales": floats(linear.scales.T, torch.float16),
    }


def gptq(linear: Drawn, config: dict[str, Any]) -> Stored:
    bits = config["bits"]
    zeros = linear.zeros.T
    if config["checkpoint_format"] == "gptq":
        zeros = (zeros - 1) % 2**bits
    return {
        "qweight": words(linear.values, bits).t().contiguous(),
        "qzeros": words(zeros, bits),
        "scales": floats(linear.scales.T, torch.float16),
        "g_idx": torch.from_numpy(linear.group_of.astype(np.int32)),
    }


def pack_quantized(linear: Drawn, config: dict[str, Any]) -> Stored:
    weights = config["config_groups"]["group_0"]["weights"]
    stored = {
        "weight_packed": words(linear.values, weights["num_bits"]),
        "weight_scale": floats(linear.scales, torch.bfloat16),
        "weight_shape": torch.tensor(linear.values.shape),
    }
    if not weights["symmetric"]:
        stored["weight_zero_point"] = words(linear.zeros.T, weights["num_bits"]).t().contiguous()
    if weights.get("actorder") == "group":
        stored["weight_g_idx"] = torch.from_numpy(linear.group_of.astype(np.int32))
    return stored


def int_quantized(linear: Drawn, config: dict[str, Any]) -> Stored:
    return {
        "weight": torch.from_numpy((linear.values - 128).astype(np.int8)),
        "weight_scale": floats(linear.scales, torch.bfloat16),
    }


@dataclass(frozen=True)
class DrawnFloat8:
    """values [out, in] e4m3; scales [out, 1], or [1] for all, or one for each block of [block, block]."""

    values: Tensor
    scales: Tensor
    block: tuple[int, int] = (1, 1)

    @property
    def weight(self) -> Tensor:
        if self.block == (1, 1):
            return self.values.double() * self.scales.double()
        rows, columns = (torch.arange(size) // step for size, step in zip(self.values.shape, self.block, strict=True))
        return self.values.double() * self.scales.double()[rows][:, columns]


def float_quantized(linear: DrawnFloat8, config: dict[str, Any]) -> Stored:
    stored = {"weight": linear.values, "weight_scale": linear.scales}
    return stored if linear.scales.numel() > 1 else stored | {"input_scale": torch.tensor([0.125])}


def fp8_block(linear: DrawnFloat8, config: dict[str, Any]) -> Stored:
    return {"weight": linear.values, "weight_scale_inv": linear.scales, "activation_scale": torch.tensor(0.125)}


@dataclass(frozen=True)
class DrawnNF4:
    """What bitsandbytes stores for a weight, and the weight that it makes of that."""

    stored: Stored
    weight: Tensor


def nf4(linear: DrawnNF4, config: dict[str, Any]) -> Stored:
    return linear.stored


def draw_nf4(shape: tuple[int, int], seed: int, *, nested: bool) -> DrawnNF4:
    """By bitsandbytes itself, on the CPU."""
    # Seconds for ranks that need nothing of it.
    from bitsandbytes import functional

    generator = torch.Generator().manual_seed(seed)
    # Rows of very different size, so that a scale that is not its own shows.
    weight = torch.randn(shape, generator=generator) * torch.rand(shape[0], 1, generator=generator)
    values, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=nested, quant_type="nf4")
    beside = {f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    return DrawnNF4({"weight": values} | beside, functional.dequantize_4bit(values, state).double())


def floats(values: NDArray[np.float64], dtype: torch.dtype) -> Tensor:
    stored = torch.from_numpy(np.ascontiguousarray(values)).to(dtype)
    assert torch.equal(stored.double(), torch.from_numpy(values)), "scales must be exact"
    return stored


def compressed(layout: str, activations: dict[str, Any] | None = None, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "input_activations": activations, "output_activations": None,
             "weights": {"symmetric": True, "dynamic": False, "actorder": None, **weights}}  # fmt: skip
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": group},
            "ignore": ["lm_head"], "kv_cache_scheme": None, "quantization_status": "compressed"}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A way of storing linears: `config` is quantization_config, `store` makes the tensors of a drawn linear."""

    config: dict[str, Any]
    store: Callable[[Any, dict[str, Any]], Stored]
    bits: int = 4
    group: int | None = 32
    symmetric: bool = False
    act_order: bool = False

    def drawn(self, shape: tuple[int, int], seed: int) -> Any:
        group = self.group or shape[1]
        return draw(shape, self.bits, group, seed, symmetric=self.symmetric, act_order=self.act_order)


@dataclass(frozen=True)
class Float8Case(Case):
    def drawn(self, shape: tuple[int, int], seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        values = (100 * torch.randn(shape, generator=generator)).clamp(-448, 448).to(torch.float8_e4m3fn)
        scales = torch.rand(shape[0], 1, generator=generator) / 500 + 1e-3
        return DrawnFloat8(values, scales[0] if self.group is None else scales)


@dataclass(frozen=True)
class Float8BlockCase(Case):
    block: tuple[int, int] = (40, 32)

    def drawn(self, shape: tuple[int, int], seed: int) -> DrawnFloat8:
        plain = Float8Case(self.config, self.store).drawn(shape, seed)
        blocks = [-(-size // step) for size, step in zip(shape, self.block, strict=True)]
        scales = torch.rand(blocks, generator=torch.Generator().manual_seed(seed + 1000)) / 500 + 1e-3
        return DrawnFloat8(plain.values, scales, self.block)


@dataclass(frozen=True)
class NF4Case(Case):
    group: int | None = 64

    def drawn(self, shape: tuple[int, int], seed: int) -> DrawnNF4:
        return draw_nf4(shape, seed, nested=self.config["bnb_4bit_use_double_quant"])


def gptq_config(**changes: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False,
            "checkpoint_format": "gptq", **changes}  # fmt: skip


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
GROUPED = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
BY_CHANNEL = {"num_bits": 8, "type": "int", "strategy": "channel", "group_size": None}
ACTIVATIONS = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
CASES = {
    "awq": Case(AWQ, awq),
    "awq by channel": Case(AWQ | {"group_size": -1}, awq, group=None),
    "gptq v1": Case(gptq_config(), gptq),
    "gptq v2": Case(gptq_config(checkpoint_format="gptq_v2"), gptq),
    "gptq symmetric": Case(gptq_config(sym=True), gptq, symmetric=True),
    "gptq act order": Case(gptq_config(desc_act=True), gptq, act_order=True),
    "gptq 8 bits": Case(gptq_config(bits=8, desc_act=True, sym=True), gptq, bits=8, symmetric=True, act_order=True),
    "w4a16": Case(compressed("pack-quantized", **GROUPED), pack_quantized, symmetric=True),
    "w4a16 with zeros": Case(compressed("pack-quantized", **GROUPED, symmetric=False), pack_quantized),
    "w4a16 act order": Case(
        compressed("pack-quantized", **GROUPED, symmetric=False, actorder="group"), pack_quantized, act_order=True
    ),
    "w8a16": Case(compressed("pack-quantized", **BY_CHANNEL), pack_quantized, bits=8, group=None, symmetric=True),
    "w8a8": Case(
        compressed("int-quantized", ACTIVATIONS, **BY_CHANNEL), int_quantized, bits=8, group=None, symmetric=True
    ),
}
FLOAT8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
FLOAT8_CASES = {
    "fp8 by channel": Float8Case(compressed("float-quantized", ACTIVATIONS, **FLOAT8), float_quantized, group=1),
    "fp8 by tensor": Float8Case({"quant_method": "fp8", "activation_scheme": "static"}, float_quantized, group=None),
    "fp8 by block": Float8BlockCase(
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [40, 32]}, fp8_block
    ),
    "fp8 by block, compressed": Float8BlockCase(
        compressed("float-quantized", ACTIVATIONS, **FLOAT8 | {"strategy": "block", "block_structure": [40, 32]}),
        float_quantized,
    ),
}
# As transformers 5 writes it.
NF4 = {
    "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "_load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": "uint8",
    "bnb_4bit_compute_dtype": "bfloat16", "llm_int8_skip_modules": ["lm_head"], "llm_int8_threshold": 6.0,
}  # fmt: skip
NF4_CASES = {
    "nf4": NF4Case(NF4 | {"bnb_4bit_use_double_quant": False}, nf4),
    "nf4 nested": NF4Case(NF4, nf4),
}
