"""Multiplications by packed weights: the reference itself, and what of tinygemm can be checked without a card."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel.footprint import DEQUANTIZED_AT_A_TIME, held_bits
from parallel.formats.config import read_scheme
from parallel.kernels import grouping, tinygemm
from parallel.kernels.choice import KERNELS, choose_kernel, pack_linear
from parallel.kernels.dequantize import DequantizeLinear, pack_pairs
from parallel.kernels.grouping import GroupedLinear
from parallel.quantized import QuantizedWeight
from tests.parallel.packers import CASES, NF4, Drawn, draw


def quantized(drawn: Drawn, bits: int, group: int, *, symmetric: bool = False) -> QuantizedWeight:
    in_order = bool((drawn.group_of == sorted(drawn.group_of)).all())
    return QuantizedWeight(
        values=torch.from_numpy(drawn.values).byte(),
        bits=bits,
        scales=torch.from_numpy(drawn.scales).half(),
        zeros=None if symmetric else torch.from_numpy(drawn.zeros).byte(),
        group_size=group,
        group_of=None if in_order else torch.from_numpy(drawn.group_of),
    )


@pytest.mark.parametrize("num_in", [96, 95])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_dequantizing_multiplies_by_what_was_drawn_and_holds_it_packed(bits: int, act_order: bool, num_in: int) -> None:
    drawn = draw((40, num_in), bits, 32, seed=1, act_order=act_order)
    layer = DequantizeLinear(quantized(drawn, bits, 32))
    hidden = torch.randn(2, 3, num_in, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(layer(hidden), hidden @ drawn.weight.t(), rtol=1e-12, atol=1e-12)
    assert layer.values.nbytes == 40 * math.ceil(num_in * bits / 8)


def test_float8_is_multiplied_in_the_dtype_of_the_activations() -> None:
    values = torch.randn(24, 64, generator=torch.Generator().manual_seed(2)).to(torch.float8_e4m3fn)
    scales = torch.rand(24, 1, generator=torch.Generator().manual_seed(3))
    layer = DequantizeLinear(QuantizedWeight(values, 8, scales, None, 64))
    hidden = torch.eye(64, dtype=torch.bfloat16)
    assert torch.equal(layer(hidden).t(), (values.float() * scales).bfloat16())
    assert layer.values.dtype == torch.float8_e4m3fn


# tinygemm


def lane_words(values: Tensor, tiles: int) -> Tensor:
    """The layout of int4mm.cu, one value at a time: [out / 8, in / (16 * tiles), 32, tiles / 2] words."""
    num_out, num_in = values.shape
    words = torch.zeros(num_out // 8, num_in // (16 * tiles), 32, tiles // 2, dtype=torch.int64)
    for output in range(num_out):
        for index in range(num_in):
            super_tile, rest = divmod(index, 16 * tiles)
            word, in_word = divmod(rest, 32)
            second, in_tile = divmod(in_word, 16)
            half, in_half = divmod(in_tile, 8)
            pair, odd = divmod(in_half, 2)
            nibble = 4 * odd + 2 * second + half
            words[output // 8, super_tile, 4 * (output % 8) + pair, word] |= int(values[output, index]) << (4 * nibble)
    return torch.where(words < 2**31, words, words - 2**32).to(torch.int32)


@pytest.mark.parametrize("tiles", tinygemm.INNER_TILES)
def test_tiles_are_unpacked_into_rows(tiles: int) -> None:
    values = torch.randint(16, (24, 256), generator=torch.Generator().manual_seed(4)).byte()
    assert torch.equal(tinygemm.unpack_tiles(lane_words(values, tiles)), values)


@pytest.mark.parametrize("symmetric", [False, True])
def test_scales_and_shifts_are_those_of_torchs_int4_operator(symmetric: bool) -> None:
    """Its sibling for CPUs takes the same; its weights are a byte for two values, the even one low."""
    drawn = draw((32, 128), 4, 32, seed=5, symmetric=symmetric)
    weight = quantized(drawn, 4, 32, symmetric=symmetric)
    hidden = torch.randn(3, 128, generator=torch.Generator().manual_seed(5)).bfloat16()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.values.int(), 1)
    both = tinygemm.scales_and_shifts(weight, weight.groups()[::32])
    output = torch.ops.aten._weight_int4pack_mm_for_cpu(hidden, packed, 32, both)
    expected = hidden.double() @ drawn.weight.t()
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=0.01 * float(expected.abs().max()))


@pytest.mark.parametrize("act_order", [False, True])
def test_tinygemms_own_dequantised_weight_is_the_one_it_was_given(
    monkeypatch: pytest.MonkeyPatch, act_order: bool
) -> None:
    """With the layout above in place of the card's packing. Many rows take this way."""

    def pack(pairs: Tensor, tiles: int) -> Tensor:
        return lane_words(torch.stack([pairs >> 4, pairs & 15], dim=-1).flatten(1), tiles)

    monkeypatch.setattr(torch.ops.aten, "_convert_weight_to_int4pack", pack, raising=False)
    monkeypatch.setattr("parallel.quantized.BLOCK_ELEMENTS", 1024)
    drawn = draw((24, 192), 4, 32, seed=6, act_order=act_order)
    layer = tinygemm.TinygemmLinear(quantized(drawn, 4, 32))
    rows = torch.eye(192, dtype=torch.bfloat16)
    # bf16 has eight bits: the shift, up to 8 scales, is rounded, and then the weight, up to 15.
    error = (layer(rows).t().double() - drawn.weight).abs()
    assert bool((error <= torch.from_numpy(drawn.scales)[:, drawn.group_of] * (8 + 15) * 2.0**-8).all())
    assert sum(buffer.nbytes for buffer in (layer.packed, layer.scales_and_shifts)) * 8 == 24 * 192 * (4 + 32 / 32)


@pytest.mark.parametrize(
    ("group_of", "size"),
    [
        ([0] * 128 + [1] * 128, 128),
        ([0] * 256, 256),
        ([0] * 64 + [1] * 128 + [2] * 64, 64),
        ([1, 0] * 128, 128),
        ([0] * 48 + [1] * 80, None),
        ([0] * 16, None),
    ],
)
def test_groups_are_cut_into_a_size_that_tinygemm_knows(group_of: list[int], size: int | None) -> None:
    weight = QuantizedWeight(
        torch.zeros(8, len(group_of), dtype=torch.uint8), 4, torch.ones(8, 3), None, 128, torch.tensor(group_of)
    )
    assert tinygemm.find_group_size(weight) == size


def test_choice_names_the_kernel_and_why_not_the_others() -> None:
    weight = quantized(draw((16, 64), 4, 32, seed=7), 4, 32)
    module, line = pack_linear(weight, torch.bfloat16)
    assert isinstance(module, DequantizeLinear)
    assert line.startswith("dequantize (not ") and "not tinygemm: not on a card" in line
    assert list(KERNELS)[-1] == "dequantize"
    assert choose_kernel(weight, torch.float32)[0] == "dequantize"


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.act_order])
def test_predicted_bits_are_those_that_the_reference_holds(name: str) -> None:
    case = CASES[name]
    scheme = read_scheme(case.config)
    assert scheme is not None
    weight = quantized(case.drawn((64, 256), 8), case.bits, case.group or 256, symmetric=case.symmetric)
    held = sum(buffer.nbytes for buffer in DequantizeLinear(weight).buffers())
    assert held * 8 / (64 * 256) == held_bits(scheme, "cpu", "bfloat16", 256)


FP8_BLOCK = {"quant_method": "fp8", "weight_block_size": [128, 128]}


@pytest.mark.parametrize("config", [NF4, FP8_BLOCK], ids=["nf4", "fp8 by block"])
def test_predicted_bits_are_those_of_float32_scales(config: dict[str, Any]) -> None:
    scheme = read_scheme(config)
    assert scheme is not None and scheme.group_size is not None
    values = torch.zeros(64, 256, dtype=torch.uint8)
    scales = torch.zeros(64, 256 // scheme.group_size)
    codebook = torch.zeros(16) if scheme.has_codebook else None
    layer = DequantizeLinear(QuantizedWeight(values, scheme.bits, scales, None, scheme.group_size, codebook=codebook))
    held = layer.values.nbytes + layer.scales.nbytes
    assert held * 8 / (64 * 256) == held_bits(scheme, "cuda", "bfloat16", 256)


def test_codebook_is_looked_up_and_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parallel.quantized.BLOCK_ELEMENTS", 1024)
    generator = torch.Generator().manual_seed(9)
    values = torch.randint(16, (40, 190), generator=generator).byte()
    scales, codebook = torch.rand(40, 3, generator=generator), torch.randn(16, generator=generator)
    layer = DequantizeLinear(QuantizedWeight(values, 4, scales, None, 64, codebook=codebook))
    expected = torch.tensor([[float(codebook[int(values[o, i])]) * float(scales[o, i // 64]) for i in range(190)]
                             for o in range(40)], dtype=torch.float64)  # fmt: skip
    hidden = torch.randn(3, 190, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(layer(hidden), hidden @ expected.t(), rtol=1e-12, atol=1e-12)
    assert layer.values.nbytes == 40 * 95


def test_tinygemm_refuses_a_codebook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tinygemm, "layout_problem", lambda device: None)
    weight = quantized(draw((16, 128), 4, 128, seed=10), 4, 128)
    # No card here: only where the values are is made up.
    on_card = SimpleNamespace(
        **vars(weight) | {"values": SimpleNamespace(device=torch.device("cuda"))}, shape=(16, 128)
    )
    on_card.groups = weight.groups
    assert tinygemm.refusal(on_card, torch.bfloat16) is None  # type: ignore[arg-type]
    on_card.codebook = torch.zeros(16)
    assert tinygemm.refusal(on_card, torch.bfloat16) == "a codebook"  # type: ignore[arg-type]


def test_pairs_have_the_even_value_in_the_high_half() -> None:
    assert pack_pairs(torch.tensor([[1, 2, 3]], dtype=torch.uint8)).tolist() == [[0x12, 0x30]]


# What kernels of regrouped inputs share


class ByHand(GroupedLinear):
    """A grouped linear whose kernel and dequantised weight differ by a factor, to show which of them ran."""

    def __init__(self, columns: Tensor, order: Tensor | None) -> None:
        super().__init__((len(columns), columns.shape[1]), order, max_rows=4)
        self.columns = columns

    def multiply(self, rows: Tensor) -> Tensor:
        return rows @ self.columns.t()

    def dequantize(self, outputs: slice) -> Tensor:
        return 2 * self.columns[outputs]


@pytest.mark.parametrize(("num_rows", "factor"), [(4, 1), (5, 2)])
def test_few_rows_go_to_the_kernel_and_more_through_the_weight(num_rows: int, factor: int) -> None:
    columns, order = torch.randn(3, 8), torch.randperm(8)
    hidden = torch.randn(1, num_rows, 8)
    output = ByHand(columns, order)(hidden)
    assert output.shape == (1, num_rows, 3)
    assert torch.allclose(output, factor * hidden[..., order] @ columns.t(), atol=1e-5)


class PlainGrouped(grouping.GroupedLinear):
    """Many rows only, by a weight that is at hand."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__((len(weight), weight.shape[1]), None, max_rows=0)
        self.weight = weight
        self.blocks: list[tuple[int, int]] = []

    def dequantize(self, outputs: slice) -> Tensor:
        self.blocks.append((outputs.start, outputs.stop))
        return self.weight[outputs]


def test_many_rows_dequantise_some_outputs_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouping, "DEQUANTIZED_AT_A_TIME", 300 * 24)
    layer, hidden = PlainGrouped(torch.randn(640, 24)), torch.randn(2, 3, 24)
    torch.testing.assert_close(layer(hidden), hidden @ layer.weight.t())
    assert layer.blocks == [(0, 256), (256, 512), (512, 640)]


@pytest.mark.parametrize("num_in", [8192, 14336, 29568])
@pytest.mark.parametrize("num_out", [16, 128, 5120, 28672, 14784, 128 * 7 + 16, 23 * 128])
def test_blocks_of_outputs_hold_all_of_them_once_and_few_weights_each(num_out: int, num_in: int) -> None:
    blocks = grouping.output_blocks(num_out, num_in)
    assert [output for block in blocks for output in range(num_out)[block]] == list(range(num_out))
    assert all(block.start % 128 == 0 for block in blocks)
    assert max(block.stop - block.start for block in blocks) * num_in <= DEQUANTIZED_AT_A_TIME
