"""quantization_config of real checkpoints: what is read from it, and what is refused, with the reason."""

from itertools import accumulate, pairwise
from typing import Any

import pytest

from parallel.formats.config import READERS, read_scheme
from parallel.formats.registry import format_of
from parallel.formats.scheme import Box, FormatError, Scheme, inputs_problem, part_slices, stored_shape
from parallel.partition import split_by_grain
from tests.parallel.packers import AWQ, BY_CHANNEL, GROUPED, NF4, compressed, gptq_config

FLOAT = {"num_bits": 8, "type": "float", "strategy": "channel", "group_size": None}


@pytest.mark.parametrize(
    ("section", "scheme"),
    [
        (None, None),
        ({}, None),
        (AWQ, Scheme("awq", "awq", 4, 32, has_zeros=True)),
        (AWQ | {"version": "GEMM", "group_size": 128, "modules_to_not_convert": None},
         Scheme("awq", "awq", 4, 128, has_zeros=True)),
        (AWQ | {"version": None, "format": "gemm"}, Scheme("awq", "awq", 4, 32, has_zeros=True)),
        ({"quant_method": "awq", "w_bit": 4, "q_group_size": 64}, Scheme("awq", "awq", 4, 64, has_zeros=True)),
        (gptq_config(), Scheme("gptq", "gptq", 4, 32, has_zeros=True, zeros_less_one=True)),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True, "sym": True},
         Scheme("gptq", "gptq", 4, 128, act_order=True, zeros_less_one=True)),
        (gptq_config(checkpoint_format="gptq_v2", bits=8, sym=True), Scheme("gptq", "gptq", 8, 32)),
        (gptq_config(dynamic={"-:.*down.*": {}}), Scheme("gptq", "gptq", 4, 32, has_zeros=True, zeros_less_one=True)),
        (gptq_config(group_size=-1, desc_act=True, sym=True), Scheme("gptq", "gptq", 4, None, zeros_less_one=True)),
        (compressed("pack-quantized", **GROUPED), Scheme("compressed-tensors", "pack-quantized", 4, 32)),
        (compressed("pack-quantized", **GROUPED, symmetric=False, actorder="static"),
         Scheme("compressed-tensors", "pack-quantized", 4, 32, has_zeros=True)),
        (compressed("pack-quantized", **GROUPED, actorder="group"),
         Scheme("compressed-tensors", "pack-quantized", 4, 32, act_order=True)),
        (compressed("pack-quantized", **BY_CHANNEL), Scheme("compressed-tensors", "pack-quantized", 8, None)),
        (compressed("float-quantized", {"dynamic": True}, **FLOAT),
         Scheme("compressed-tensors", "float-quantized", 8, None, is_float=True)),
        (compressed("float-quantized", **FLOAT | {"strategy": "tensor"}),
         Scheme("compressed-tensors", "float-quantized", 8, None, is_float=True, per_tensor=True)),
        ({"quant_method": "fp8", "activation_scheme": "dynamic"},
         Scheme("fp8", "float-quantized", 8, None, is_float=True, per_tensor=True)),
        ({"quant_method": "fp8", "weight_block_size": [128, 64], "modules_to_not_convert": ["lm_head"]},
         Scheme("fp8", "fp8-block", 8, 64, is_float=True, block_outputs=128)),
        (compressed("float-quantized", **FLOAT | {"strategy": "block", "block_structure": [128, 64]}),
         Scheme("compressed-tensors", "float-quantized", 8, 64, is_float=True, block_outputs=128)),
        (NF4, Scheme("bitsandbytes", "nf4", 4, 64, has_codebook=True, nested_scales=True)),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
         Scheme("bitsandbytes", "nf4", 4, 64, has_codebook=True)),
    ],
)  # fmt: skip
def test_section_says_how_weights_are_stored(section: dict[str, Any] | None, scheme: Scheme | None) -> None:
    assert read_scheme(section) == scheme


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"quant_method": "quanto"}, ["quant_method='quanto'", *READERS]),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, ["bnb_4bit_quant_type='fp4'", "only nf4"]),
        (NF4 | {"bnb_4bit_quant_type": "fp4"}, ["bnb_4bit_quant_type='fp4'", "bitsandbytes (4 bits, NF4 in uint8)"]),
        (NF4 | {"load_in_8bit": True, "load_in_4bit": False}, ["load_in_8bit=True", "bitsandbytes (4 bits, NF4"]),
        (NF4 | {"load_in_4bit": False}, ["load_in_4bit=False"]),
        (NF4 | {"bnb_4bit_quant_storage": "bfloat16"}, ["bnb_4bit_quant_storage='bfloat16'", "only uint8"]),
        ({"quant_method": None}, ["quant_method=None"]),
        ("awq", ["quantization_config='awq'"]),
        (AWQ | {"version": "gemv"}, ["version='gemv'", "gemm"]),
        (AWQ | {"version": "marlin"}, ["version='marlin'"]),
        (AWQ | {"version": None, "format": "gemv_fast"}, ["format='gemv_fast'", "only gemm"]),
        (AWQ | {"zero_point": False}, ["zero_point=False"]),
        (AWQ | {"bits": 3}, ["bits=3", "AWQ (4 bits"]),
        (AWQ | {"group_size": 0}, ["group_size=0", "-1"]),
        (gptq_config(bits=3), ["bits=3", "only 4, 8"]),
        (gptq_config(bits=True), ["bits=True"]),
        (gptq_config(checkpoint_format="marlin"), ["checkpoint_format='marlin'", "gptq_v2"]),
        (gptq_config(is_marlin_format=True), ["is_marlin_format=True"]),
        (gptq_config(dynamic={"-:.*up.*": {}, "+:.*down.*": {"bits": 8}}),
         ["dynamic={'+:.*down.*': {'bits': 8}}", "by layer"]),
        (gptq_config(dynamic={".*down.*": {"group_size": 64}}), ["dynamic={'.*down.*'"]),
        (gptq_config(dynamic=["-:.*down.*"]), ["dynamic=['-:.*down.*']", "no JSON object"]),
        (compressed("nvfp4-pack-quantized", **GROUPED), ["format='nvfp4-pack-quantized'", "pack-quantized"]),
        (compressed("marlin-24", **GROUPED), ["format='marlin-24'"]),
        (compressed("pack-quantized", **GROUPED | {"num_bits": 3}), ["weights.num_bits=3"]),
        (compressed("float-quantized", **FLOAT | {"strategy": "block"}), ["weights.block_structure=None"]),
        (compressed("int-quantized", **BY_CHANNEL | {"strategy": "block"}), ["weights.strategy='block'"]),
        (compressed("pack-quantized", **GROUPED) | {"kv_cache_scheme": {"num_bits": 8}}, ["kv_cache_scheme"]),
        (compressed("pack-quantized", **GROUPED) | {"sparsity_config": {"format": "sparse-24-bitmask"}},
         ["sparsity_config.format='sparse-24-bitmask'"]),
        (compressed("pack-quantized", **GROUPED) | {"transform_config": {"config_groups": {}}}, ["transform_config"]),
        (compressed("pack-quantized", **GROUPED) | {"config_groups": {}}, ["no config_groups"]),
        (compressed("pack-quantized", **GROUPED) | {"config_groups": {"group_0": 4}}, ["group_0=4", "no JSON object"]),
        (compressed("pack-quantized", **GROUPED) | {"config_groups": {"group_0": {"weights": "int4"}}},
         ["group_0.weights='int4'", "no JSON object"]),
        (compressed("pack-quantized", **GROUPED) | {"sparsity_config": "dense"},
         ["sparsity_config='dense'", "no JSON object"]),
        (compressed("pack-quantized", **GROUPED | {"strategy": None, "group_size": [128]}), ["group_size=[128]"]),
        ({"quant_method": "fp8", "weight_block_size": [128, 0]}, ["weight_block_size=[128, 0]", "above 0"]),
        ({"quant_method": "fp8", "weight_block_size": 128}, ["weight_block_size=128", "two whole numbers"]),
    ],
)  # fmt: skip
def test_what_cannot_be_loaded_is_refused_with_field_and_value(section: Any, words: list[str]) -> None:
    with pytest.raises(FormatError) as caught:
        read_scheme(section)
    assert [word for word in words if word not in str(caught.value)] == []


def test_groups_of_layers_that_differ_are_refused() -> None:
    section = compressed("pack-quantized", **GROUPED)
    other = compressed("pack-quantized", **BY_CHANNEL)["config_groups"]["group_0"]
    with pytest.raises(FormatError, match="more ways than one") as caught:
        read_scheme(section | {"config_groups": section["config_groups"] | {"group_1": other}})
    for way in ("group_0: pack-quantized, 4 bits, a scale for 1 x 32", "group_1: pack-quantized, 8 bits, a scale"):
        assert way in str(caught.value)
    with pytest.raises(FormatError, match="no group has weights"):
        read_scheme(section | {"config_groups": {"group_0": {"weights": None}}})
    same = section["config_groups"] | {"group_1": section["config_groups"]["group_0"]}
    assert read_scheme(section | {"config_groups": same}) == read_scheme(section)


@pytest.mark.parametrize(("num_in", "world_size"), [(29568, 2), (29568, 3), (28672, 4), (8192, 3)])
def test_grains_of_a_group_cut_no_group_and_no_word(num_in: int, world_size: int) -> None:
    """Qwen2.5-72B's MLP is 231 groups wide: two ranks take 116 and 115."""
    scheme = read_scheme(gptq_config(group_size=128))
    assert scheme is not None
    ends = [0, *accumulate(split_by_grain(num_in, world_size, 128))]
    boxes = [Box((0, 64), bounds) for bounds in pairwise(ends)]
    for part in format_of(scheme).parts(scheme):
        along = [index for index, (axis, _) in enumerate(part.axes) if axis in ("in", "group")]
        slices = [part_slices(part, scheme, num_in, box)[along[0]] for box in boxes]
        stored = stored_shape(part, scheme, 64, num_in)[along[0]]
        assert [piece.start for piece in slices] == [0, *(piece.stop for piece in slices[:-1])]
        assert slices[-1].stop == stored


def test_rows_that_share_a_block_of_nf4_are_refused() -> None:
    scheme, other = read_scheme(NF4), read_scheme(gptq_config())
    assert scheme is not None and other is not None
    assert "blocks of 64 weights run on from one row of 96 inputs" in inputs_problem(scheme, 96)
    assert (inputs_problem(scheme, 128), inputs_problem(other, 100)) == ("", "")
