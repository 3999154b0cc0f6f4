"""What plans say that making a layer from the disk moves and computes, against what the code does, counted on a CPU."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from launcher.models.shape import quantized_shape
from launcher.plan.offload_disk import (
    DECODE_BYTES,
    INSTRUCTIONS_PER_SEC,
    PACK_BYTES,
    ROUND_BYTES,
    ROUND_INSTRUCTIONS,
    pack_ms,
)
from launcher.plan.plan import demand_of
from launcher.plan.topology import place_ranks
from parallel.checkpoint.quantize import quantize_weight
from parallel.checkpoint.quantize_schemes import QUANTIZE_SCHEMES
from parallel.formats.registry import format_of
from parallel.formats.scheme import Box
from parallel.kernels import launch, round_groups, w4a16, w8a16
from parallel.kernels.merge import merge
from parallel.kernels.nvrtc import compile_source
from parallel.kernels.tiles import FOLDER
from parallel.quantized import QuantizedWeight
from tests.launcher.plans import LLAMA_70B, cards_of, run_of
from tests.parallel.kernels.nvrtc_wheel import find_nvrtc
from tests.parallel.moved import Moved
from tools.checkpoint.quantization import WRITERS

NUM_OUT, NUM_IN = 1024, 2048
NUMEL = NUM_OUT * NUM_IN


@contextmanager
def counted() -> Iterator[Moved]:
    """Of plain torch all that it moves; of kernels what they are given, which each reads or writes once."""

    def packs(words: int) -> Callable[..., Tensor]:
        def pack(values: Tensor, **_: Any) -> Tensor:
            packed = torch.empty(values.shape[0] // 16, values.shape[1] // 128, words, 32, 4, dtype=torch.int32)
            moved.add(values, packed)
            return packed

        return pack

    def round_all(*tensors: Any) -> None:
        moved.add(*tensors[:-1])

    with (
        patch.object(w4a16, "pack_values", packs(2)),
        patch.object(w8a16, "pack_values", packs(4)),
        patch.object(round_groups, "takes", lambda weight, scheme: True),
        patch.object(round_groups, "run", round_all),
        Moved() as moved,
    ):
        yield moved


def pack_and_join(weight: QuantizedWeight) -> None:
    assert weight.bits == 4 or w8a16.values_refusal(weight) is None
    packed = w4a16.W4A16Linear(weight) if weight.bits == 4 else w8a16.W8A16Linear(weight)
    assert merge([packed]) is not None


@pytest.mark.parametrize("kind", QUANTIZE_SCHEMES)
def test_rounding_moves_what_is_predicted(kind: str) -> None:
    scheme, stored = QUANTIZE_SCHEMES[kind], torch.zeros(NUM_OUT, NUM_IN, dtype=torch.bfloat16)
    with counted() as moved:
        pack_and_join(quantize_weight(stored, scheme))
    predicted = ROUND_BYTES + PACK_BYTES["w4a16" if scheme.bits == 4 else "w8a16"]
    assert 0.75 * predicted < moved.num_bytes / NUMEL <= predicted
    # Only then the host runs ahead of the card.
    assert not moved.waits


def decoded_bytes(name: str) -> float:
    writer = WRITERS[name]
    stored = writer.stored(torch.randn(NUM_OUT, NUM_IN))
    with counted() as moved:
        pack_and_join(format_of(writer.scheme).decode(stored, writer.scheme, Box((0, NUM_OUT), (0, NUM_IN))))
    return moved.num_bytes / NUMEL


def test_decoding_moves_no_more_than_is_predicted() -> None:
    four, eight = DECODE_BYTES + PACK_BYTES["w4a16"], DECODE_BYTES + PACK_BYTES["w8a16"]
    found = {name: decoded_bytes(name) for name in ("gptq", "gptq_act_order", "w4a16", "w4a16_zeros")}
    assert 0.8 * four < decoded_bytes("awq") <= four
    assert max(found.values()) < 0.8 * four
    assert max(map(decoded_bytes, ("w8a16", "fp8", "fp8_block"))) <= eight


def code_bytes(cubin: bytes, name: str) -> int:
    """Of a kernel, by the section headers of its ELF file."""
    (headers,) = struct.unpack_from("<Q", cubin, 40)
    size, number, names_place = struct.unpack_from("<3H", cubin, 58)
    sections = [struct.unpack_from("<2I4Q", cubin, headers + place * size) for place in range(number)]
    names = sections[names_place][4]
    texts = {cubin[names + each[0] :].partition(b"\0")[0].decode(): each[5] for each in sections}
    return texts[f".text.{name}"]


@pytest.mark.parametrize("kind", QUANTIZE_SCHEMES)
def test_instructions_are_those_of_the_compiled_source(kind: str) -> None:
    source = launch.read_source(FOLDER / "round_groups.cu")
    options = round_groups.options_of(QUANTIZE_SCHEMES[kind], torch.bfloat16)
    with patch.object(launch.cuda_utils, "_get_gpu_rtc_library", find_nvrtc):
        cubin, _ = compile_source(source, kind, ["--gpu-architecture=sm_89", *options])
    # Each takes 16 bytes. Other versions of NVRTC may find others.
    assert code_bytes(cubin, "round_groups") / 16 == pytest.approx(ROUND_INSTRUCTIONS[kind], rel=0.25)


def test_time_is_that_of_bytes_and_of_instructions() -> None:
    on_disk = 3
    weights = on_disk * LLAMA_70B.num_linear_weights / LLAMA_70B.num_layers
    times = []
    for gb_per_sec in (1008.0, 1e9):
        inventory = cards_of(1, memory_gb_per_sec=gb_per_sec)
        demand = demand_of(run_of(), place_ranks(run_of(), 1, inventory), quantized_shape(LLAMA_70B, "int4"), None)
        times.append(pack_ms(replace(demand, num_streamed=on_disk, num_on_disk=on_disk), inventory.cards))
    moved_ms = weights * (ROUND_BYTES + PACK_BYTES["w4a16"]) / 1008e9 * 1e3
    computed_ms = weights / 128 * ROUND_INSTRUCTIONS["int4"] / INSTRUCTIONS_PER_SEC * 1e3
    assert times == pytest.approx([moved_ms + computed_ms, computed_ms], rel=1e-3)
