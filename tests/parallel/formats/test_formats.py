"""Readers of quantised linears against independent writers: whole, and any part of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file
from torch import Tensor

from parallel.checkpoint.headers import read_header
from parallel.checkpoint.match import viewed
from parallel.checkpoint.quantized import decode, local_slices
from parallel.checkpoint.read_ahead import ReadAhead
from parallel.formats.config import read_scheme
from parallel.formats.nf4 import STATE
from parallel.formats.registry import FORMATS, format_of
from parallel.formats.scheme import Box, CheckpointError, is_expected
from parallel.quantized import QuantizedWeight
from tests.parallel.packers import (
    CASES,
    FLOAT8_CASES,
    NF4_CASES,
    Stored,
    compressed,
    draw,
    gptq,
    gptq_config,
)

CPU = torch.device("cpu")
SHAPE = (48, 160)
# Outputs and inputs: all; on boundaries of words and groups; through words; through groups too; one of each; none.
BOXES = {
    "whole": Box((0, 48), (0, 160)),
    "on boundaries": Box((16, 40), (32, 128)),
    "through words": Box((11, 37), (32, 160)),
    "through groups": Box((0, 48), (40, 133)),
    "through both": Box((13, 22), (77, 90)),
    "one weight": Box((47, 48), (159, 160)),
    "no outputs": Box((24, 24), (0, 160)),
    "no inputs": Box((0, 48), (72, 72)),
}


def read(
    stored: Stored, config: dict[str, Any], file: Path, box: Box, shape: tuple[int, int] = SHAPE
) -> QuantizedWeight:
    """What a rank that holds `box` reads, from a file."""
    save_file({f"linear.{name}": tensor for name, tensor in stored.items()}, file)
    entries = {name.removeprefix("linear."): entry for name, entry in read_header(file).items()}
    scheme = read_scheme(config)
    assert scheme is not None
    parts = format_of(scheme).parts(scheme)
    for part in parts:
        assert part.name in entries or not part.required, part.name
        if part.name in entries:
            assert is_expected(part, entries[part.name].shape, scheme, *shape)
            assert entries[part.name].dtype in part.dtypes
    entries = viewed(parts, scheme, entries, *shape)
    reads = local_slices(entries, scheme, shape[1], box)
    with ReadAhead(reads.values(), CPU) as reader:
        return decode(reads, scheme, box, {name: reader.take(wanted) for name, wanted in reads.items()})


def cut(weight: Tensor, box: Box) -> Tensor:
    return weight[slice(*box.outputs), slice(*box.inputs)]


def test_every_format_has_a_case() -> None:
    schemes = [read_scheme(case.config) for case in (CASES | FLOAT8_CASES | NF4_CASES).values()]
    assert {scheme.layout for scheme in schemes if scheme} == set(FORMATS)


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("name", CASES)
def test_part_of_a_linear_is_what_was_drawn(tmp_path: Path, name: str, box: str) -> None:
    case = CASES[name]
    drawn = case.drawn(SHAPE, seed=1)
    weight = read(case.store(drawn, case.config), case.config, tmp_path / "f.safetensors", BOXES[box])
    assert weight.values.dtype == torch.uint8
    assert torch.equal(weight.values.long(), cut(torch.from_numpy(drawn.values), BOXES[box]))
    assert torch.equal(weight.dequantize(torch.float64), cut(drawn.weight, BOXES[box]))
    assert (weight.zeros is None) == case.symmetric


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("name", FLOAT8_CASES)
def test_part_of_a_float8_linear_is_what_was_drawn(tmp_path: Path, name: str, box: str) -> None:
    case = FLOAT8_CASES[name]
    drawn = case.drawn(SHAPE, seed=9)
    weight = read(case.store(drawn, case.config), case.config, tmp_path / "f.safetensors", BOXES[box])
    assert weight.values.dtype == torch.float8_e4m3fn
    assert torch.equal(weight.dequantize(torch.float64), cut(drawn.weight, BOXES[box]))


# In blocks of 64, 7 to a row, the 256 whose scales share a scale end within row 36, after 4 blocks.
NF4_BOXES = BOXES | {"behind nested": Box((30, 40), (270, 448)), "before nested": Box((30, 37), (0, 256))}


@pytest.mark.parametrize("box", NF4_BOXES)
@pytest.mark.parametrize("name", NF4_CASES)
def test_part_of_an_nf4_linear_is_what_bitsandbytes_makes_of_it(tmp_path: Path, name: str, box: str) -> None:
    shape, case, part = (48, 448), NF4_CASES[name], NF4_BOXES[box]
    drawn = case.drawn(shape, seed=10)
    weight = read(case.store(drawn, case.config), case.config, tmp_path / "f.safetensors", part, shape)
    assert weight.values.dtype == torch.uint8
    assert torch.equal(weight.dequantize(torch.float32), cut(drawn.weight.float(), part))
    assert weight.scales.shape[1] <= -(-weight.shape[1] // 64) + 1


@pytest.mark.parametrize("stored_zero", range(16))
def test_gptq_zeros_of_the_first_version_are_one_more(tmp_path: Path, stored_zero: int) -> None:
    drawn = draw((8, 32), 4, 32, seed=2)
    drawn.zeros[:] = (stored_zero + 1) % 16
    stored = gptq(drawn, gptq_config())
    assert stored["qzeros"].tolist() == [[int.from_bytes([stored_zero * 17] * 4, "little", signed=True)]]
    weight = read(stored, gptq_config(), tmp_path / "f.safetensors", Box((0, 8), (0, 32)), (8, 32))
    assert torch.equal(weight.dequantize(torch.float64), drawn.weight)


def test_known_word_of_awq(tmp_path: Path) -> None:
    """0x76543210 holds 0 to 7, the lowest bits first; they are outputs 0, 2, 4, 6, 1, 3, 5, 7."""
    stored = {
        "qweight": torch.tensor([[0x76543210]], dtype=torch.int32).repeat(32, 1),
        "qzeros": torch.zeros(1, 1, dtype=torch.int32),
        "scales": torch.ones(1, 8, dtype=torch.float16),
    }
    weight = read(stored, CASES["awq"].config, tmp_path / "f.safetensors", Box((0, 8), (0, 32)), (8, 32))
    assert weight.values[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


def wrong_zero(stored: Stored) -> None:
    stored["qzeros"][0, 0] = 0


def wrong_order(stored: Stored) -> None:
    stored["g_idx"][:2] = torch.tensor([1, 0])


@pytest.mark.parametrize(
    ("config", "change", "words"),
    [
        (gptq_config(sym=True), wrong_zero, ["zeros are 1", "sym=true", "checkpoint_format"]),
        (gptq_config(), wrong_order, ["g_idx is in act order", "desc_act=false"]),
    ],
)
def test_gptq_file_that_contradicts_its_config_is_refused(
    tmp_path: Path, config: dict[str, Any], change: Callable[[Stored], None], words: list[str]
) -> None:
    stored = gptq(draw(SHAPE, 4, 32, seed=3, symmetric=config["sym"]), config)
    change(stored)
    with pytest.raises(CheckpointError) as caught:
        read(stored, config, tmp_path / "f.safetensors", BOXES["whole"])
    assert all(word in str(caught.value) for word in [*words, "linear", "f.safetensors"])


def strange_group(name: str, group: int) -> Callable[[Stored], None]:
    def change(stored: Stored) -> None:
        stored[name][3] = group

    return change


def state_of(text: str) -> Callable[[Stored], None]:
    return lambda stored: stored.update({STATE: torch.tensor(list(text.encode()), dtype=torch.uint8)})


NESTED = '"quant_type": "nf4", "blocksize": 64, "nested_blocksize": 256'
DAMAGED = [
    ("gptq act order", strange_group("g_idx", 5), ["group 5", "groups are 0 to 4"]),
    ("gptq act order", strange_group("g_idx", -1), ["group -1", "groups are 0 to 4"]),
    ("w4a16 act order", strange_group("weight_g_idx", -1), ["group -1", "groups are 0 to 4"]),
    ("nf4 nested", state_of("[1]"), [STATE, "no JSON object"]),
    ("nf4 nested", state_of("{"), [STATE, "no valid JSON"]),
    ("nf4 nested", state_of(f'{{{NESTED}, "nested_offset": 0.1}}'), [STATE, "shape"]),
    ("nf4 nested", state_of(f'{{{NESTED}, "nested_offset": 0.1, "shape": [48]}}'), [STATE, "shape"]),
    ("nf4 nested", state_of(f'{{{NESTED}, "shape": [48, 192]}}'), [STATE, "nested_offset"]),
]


@pytest.mark.parametrize(("name", "change", "words"), DAMAGED)
def test_file_whose_numbers_point_nowhere_is_refused(
    tmp_path: Path, name: str, change: Callable[[Stored], None], words: list[str]
) -> None:
    """The driver of a card would name neither the file nor the linear."""
    case, shape = (CASES | NF4_CASES)[name], (48, 192) if name in NF4_CASES else SHAPE
    stored = case.store(case.drawn(shape, 3), case.config)
    change(stored)
    with pytest.raises(CheckpointError) as caught:
        read(stored, case.config, tmp_path / "f.safetensors", Box((0, 48), (0, shape[1])), shape)
    assert all(word in str(caught.value) for word in [*words, "linear", "f.safetensors"])


# compressed-tensors writes these itself.

LIBRARY_CASES = {
    "4 bits": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}),
    "4 bits with zeros": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}),
    "8 bits": ("pack-quantized", {"num_bits": 8, "strategy": "channel"}),
    "8 bits in groups": ("pack-quantized", {"num_bits": 8, "strategy": "group", "group_size": 32}),
    "8 bits with zeros": ("pack-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}),
    "int8": ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
    "fp8 by channel": ("float-quantized", {"num_bits": 8, "strategy": "channel", "type": "float"}),
    "fp8 by tensor": ("float-quantized", {"num_bits": 8, "strategy": "tensor", "type": "float"}),
    "fp8 by block": (
        "float-quantized",
        {"num_bits": 8, "strategy": "block", "type": "float", "block_structure": [16, 40]},
    ),
}


def library_stored(layout: str, weights: dict[str, Any], weight: Tensor) -> tuple[Stored, Tensor]:
    """What compressed-tensors stores for `weight`, and what it reads back."""
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    grouped = weight.unflatten(1, (-1, weights.get("group_size") or weight.shape[1]))
    # [out, groups]; one number, in a list, for the whole tensor; one for each block.
    largest = grouped.abs().amax().view(1) if weights["strategy"] == "tensor" else grouped.abs().amax(dim=2)
    if weights["strategy"] == "block":
        rows, columns = weights["block_structure"]
        largest = weight.abs().unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).amax(dim=(1, 3))
    top = 448 if weights.get("type") == "float" else 2 ** (weights["num_bits"] - 1) - 1
    state = {"weight": weight, "weight_scale": largest / top}
    if not weights.get("symmetric", True):
        state["weight_zero_point"] = torch.randint(-3, 4, largest.shape, dtype=torch.int8)
    compressor = BaseCompressor.get_value_from_registry(layout)
    stored = compressor.compress(state, scheme)
    return stored, compressor.decompress(dict(stored), scheme)["weight"]


@pytest.mark.parametrize("box", ["whole", "through both"])
@pytest.mark.parametrize("name", LIBRARY_CASES)
def test_what_compressed_tensors_writes_is_read_as_it_reads_it(tmp_path: Path, name: str, box: str) -> None:
    layout, weights = LIBRARY_CASES[name]
    with torch.random.fork_rng():
        torch.manual_seed(5)
        stored, expected = library_stored(layout, weights, torch.randn(SHAPE))
    config = compressed(layout, **{"type": "int", **weights})
    weight = read(stored, config, tmp_path / "f.safetensors", BOXES[box])
    torch.testing.assert_close(weight.dequantize(torch.float32), cut(expected.float(), BOXES[box]), rtol=1e-6, atol=0)
    assert expected.std() > 0.5


@pytest.mark.parametrize("scale_shape", [(), (1,), (1, 1)])
def test_fp8_scale_of_a_tensor_in_any_rank_and_activations_scale_beside_it(
    tmp_path: Path, scale_shape: tuple[int, ...]
) -> None:
    values = torch.randn(SHAPE, generator=torch.Generator().manual_seed(6)).to(torch.float8_e4m3fn)
    stored = {"weight": values, "weight_scale": torch.full(scale_shape, 0.5), "input_scale": torch.tensor(3.0)}
    config = {"quant_method": "fp8", "activation_scheme": "static"}
    weight = read(stored, config, tmp_path / "f.safetensors", BOXES["through both"])
    assert torch.equal(weight.dequantize(torch.float32), cut(values.float() * 0.5, BOXES["through both"]))


def test_dequantised_blocks_join_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = draw(SHAPE, 4, 32, seed=7)
    weight = QuantizedWeight(
        torch.from_numpy(drawn.values).byte(),
        4,
        torch.from_numpy(drawn.scales),
        torch.from_numpy(drawn.zeros).byte(),
        32,
    )
    monkeypatch.setattr("parallel.quantized.BLOCK_ELEMENTS", 5 * SHAPE[1])
    assert torch.equal(weight.dequantize(torch.float64), drawn.weight)


def test_bf16_is_rounded_once() -> None:
    drawn = draw(SHAPE, 4, 32, seed=8)
    # As fine as scales in fp16 are.
    scales = torch.from_numpy(drawn.scales) * (1 + 2.0**-10)
    weight = QuantizedWeight(torch.from_numpy(drawn.values).byte(), 4, scales, torch.from_numpy(drawn.zeros).byte(), 32)
    assert torch.equal(weight.dequantize(torch.bfloat16), weight.dequantize(torch.float32).bfloat16())
