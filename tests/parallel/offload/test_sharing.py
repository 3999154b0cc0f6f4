"""Layers that the host computes where they lie: their products, and models of which some layers are shared so."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from parallel.checkpoint.headers import read_checkpoint
from parallel.checkpoint.load import load_checkpoint
from parallel.checkpoint.quantize_schemes import QUANTIZE_SCHEMES
from parallel.communicator import Communicator
from parallel.engine.engine import Engine
from parallel.engine.limits import EngineLimits
from parallel.kernels import choice, host_int4
from parallel.kernels.host_int4 import HostInt4Linear, pack_values, unpack_values
from parallel.kernels.merge import merge
from parallel.layers.merged import LayerMerger
from parallel.offload.host_layers import HostLayers, HostLoader, SharedLayers
from parallel.offload.sharing import SharingStreamer
from parallel.offload.split import PassCosts, choose_num_on_host, spread_on_host
from parallel.quantized import QuantizedWeight
from tests.parallel.ranks import CPU, build, forced_logits, run_on_ranks
from tests.parallel.small_models import COMMON, CONFIGS, write_model

# By what rounding to bf16 may change a number.
BF16_ERROR = 2**-8
needs_layout = pytest.mark.skipif(host_int4.layout_problem() is not None, reason="no known layout on this CPU")


def random_weight(num_out: int, num_in: int, *, zeros: bool, group_size: int = 128) -> QuantizedWeight:
    shape = (num_out, num_in // group_size)
    return QuantizedWeight(
        torch.randint(0, 16, (num_out, num_in), dtype=torch.uint8),
        4,
        (0.01 * (1 + torch.rand(shape))).bfloat16(),
        torch.randint(0, 16, shape, dtype=torch.uint8) if zeros else None,
        group_size,
    )


def bound(rows: Tensor, weight: QuantizedWeight) -> Tensor:
    """What bf16 may be off by: the rounding of the result, and of each shift of a group, (8 - zero) * scale."""
    scales, zeros = weight.scales.double(), weight.zeros
    shifts = torch.zeros_like(scales) if zeros is None else ((8 - zeros.double()) * scales).abs()
    groups = rows.double().view(len(rows), -1, weight.group_size).sum(-1).abs()
    exact = rows.double() @ weight.dequantize(torch.float64).t()
    magnitude = rows.double().abs() @ weight.dequantize(torch.float64).abs().t()
    return BF16_ERROR * (exact.abs() + groups @ shifts.t()) + 1e-5 * magnitude


@needs_layout
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("group_size", [32, 128])
def test_products_on_the_host_are_those_of_float64(zeros: bool, group_size: int) -> None:
    weight = random_weight(192, 512, zeros=zeros, group_size=group_size)
    layer = HostInt4Linear(weight)
    assert layer.group_size == group_size
    for num_rows in (1, 3, 4, 5, 17):
        rows = torch.randn(num_rows, 512).bfloat16()
        exact = rows.double() @ weight.dequantize(torch.float64).t()
        assert ((layer(rows).double() - exact).abs() <= bound(rows, weight)).all()


@pytest.mark.parametrize("block", host_int4.OUTPUTS_PER_BLOCK)
def test_values_are_packed_once_each(block: int) -> None:
    values = torch.randint(0, 16, (128, 96), dtype=torch.uint8)
    packed = pack_values(values, block)
    assert packed.shape == (128, 48)
    assert torch.equal(unpack_values(packed, block), values)
    # Output 1 of the second block, input 2: beside the one half a block later, which is in the high bits.
    first = packed.view(-1)[block * 48 + 2 * block // 2 + 1]
    assert (int(first) & 15, int(first) >> 4) == (int(values[block + 1, 2]), int(values[block + 1 + block // 2, 2]))


@needs_layout
def test_what_the_card_dequantises_is_what_the_host_multiplies_by() -> None:
    """Both round shifts alike; only the sum of both is rounded on the card."""
    weight = random_weight(320, 256, zeros=True)
    layer = HostInt4Linear(weight)
    shown = layer(torch.eye(256, dtype=torch.bfloat16)).t()
    made = layer.dequantize(slice(64, 320))
    torch.testing.assert_close(made, shown[64:], rtol=2 * BF16_ERROR, atol=1e-6)
    wide = random_weight(320, 256, zeros=False)
    assert torch.equal(HostInt4Linear(wide).dequantize(slice(0, 320)), wide.dequantize(torch.bfloat16))


@needs_layout
def test_joined_linears_give_outputs_side_by_side() -> None:
    parts = [HostInt4Linear(random_weight(num_out, 256, zeros=True)) for num_out in (128, 64, 64)]
    joined, rows = merge(parts), torch.randn(3, 256).bfloat16()
    assert joined is not None
    assert torch.equal(joined(rows), torch.cat([part(rows) for part in parts], dim=-1))


@needs_layout
def test_weights_that_the_operator_cannot_take_are_refused() -> None:
    weight = random_weight(128, 256, zeros=False)
    assert host_int4.refusal(weight, torch.bfloat16) is None
    assert host_int4.refusal(weight, torch.float32) == "activations in float32"
    assert host_int4.refusal(weight[0:96], torch.bfloat16) == "96 outputs"
    codebook = QuantizedWeight(weight.values, 4, weight.scales, None, 128, codebook=torch.arange(16.0))
    assert host_int4.refusal(codebook, torch.bfloat16) == "a codebook"
    assert isinstance(choice.pack_linear(weight, torch.bfloat16, on_host=True)[0], HostInt4Linear)
    assert not isinstance(choice.pack_linear(weight, torch.float32, on_host=True)[0], HostInt4Linear)


# The split


def test_the_split_evens_copies_and_computing() -> None:
    """Link and host as fast as each other: half each, and half the time."""
    costs = PassCosts(80, 40, host_sec=0.018, copy_sec=0.018, copy_alone_sec=0.018, card_sec=0.0)
    assert choose_num_on_host(costs) == 20
    assert costs.pass_sec(20) == pytest.approx(costs.pass_sec(0) / 2)


def test_a_slow_host_computes_nothing() -> None:
    """Where its products slow the copies down by more than they save, or the card is what holds a pass."""
    slow = PassCosts(80, 40, host_sec=0.5, copy_sec=0.019, copy_alone_sec=0.018, card_sec=0.0005)
    busy = PassCosts(80, 40, host_sec=0.01, copy_sec=0.01, copy_alone_sec=0.01, card_sec=0.006)
    assert choose_num_on_host(slow) == choose_num_on_host(busy) == 0
    quick = PassCosts(80, 40, host_sec=0.001, copy_sec=0.018, copy_alone_sec=0.018, card_sec=0.0005)
    assert 35 <= choose_num_on_host(quick) <= 40


def test_layers_of_the_host_lie_evenly_among_the_others() -> None:
    offloaded = tuple(range(1, 80, 2))
    assert spread_on_host(offloaded, 0) == ()
    assert spread_on_host(offloaded, 40) == offloaded
    chosen = spread_on_host(offloaded, 10)
    assert set(chosen) < set(offloaded)
    assert {after - before for before, after in pairwise(chosen)} == {8}


# Passes

CONFIG = LlamaConfig(
    **COMMON | {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 4, "num_key_value_heads": 4},
    head_dim=32,
    attention_bias=True,
    tie_word_embeddings=False,
)
PROMPTS = [[5, 17, 999, 3, 250, 8, 90, 12, 77, 4, 31], [71, 4]]
FORCED = [[12, 600, 9], [44, 3, 2]]


def open_engine(
    communicator: Communicator, folder: Path, layers: HostLayers | None, device: torch.device = CPU
) -> Engine:
    """In bf16, its linears rounded to 4 bits; staging buffers hold what no weight is."""
    model = build(communicator, folder, torch.bfloat16)
    on_placed = LayerMerger(model.module) if layers is None else HostLoader(model.module, layers)
    load_checkpoint(model, read_checkpoint(folder), device, quantize=QUANTIZE_SCHEMES["int4"], on_placed=on_placed)
    engine = Engine(model.module, communicator, EngineLimits(64, 2, 8), host_layers=layers)
    if engine.streamer is not None:
        engine.streamer.buffers.fill_(0xFF)
    return engine


def logits_of(communicator: Communicator, folder: Path) -> tuple[Tensor, list[Tensor], list[bool]]:
    """Of the resident model; of ones whose layers are shared; and of these, whether anything was copied."""
    resident = forced_logits(open_engine(communicator, folder, None), PROMPTS, FORCED)
    found, copied = [], []
    # Never computed by the host, though packed for it; in steps of two rows; in all passes, of chunks of 8 too.
    for max_rows in (0, 2, 8):
        engine = open_engine(communicator, folder, HostLayers(range(4), CPU, SharedLayers((0, 1, 2, 3), max_rows)))
        found.append(forced_logits(engine, PROMPTS, FORCED))
        assert isinstance(engine.streamer, SharingStreamer)
        assert set(engine.streamer.on_host) == {0, 1, 2, 3}
        copied.append(bool((engine.streamer.buffers != 0xFF).any()))
    return resident, found, copied


@needs_layout
@pytest.mark.parametrize("world_size", [1, 2])
def test_shared_layers_answer_as_streamed_ones(world_size: int, tmp_path: Path) -> None:
    folder = write_model(CONFIG, tmp_path)
    for resident, found, copied in run_on_ranks(logits_of, world_size, folder):
        assert copied == [True, True, False]
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])
        spread = resident.double().std()
        assert ((found[0] - resident).double().pow(2).mean().sqrt() / spread) < 0.02


def steps_of(communicator: Communicator, folder: Path) -> tuple[Tensor, list[Tensor], bool]:
    """Logits with two, and one, of three streamed layers on the host, twice each, so that passes of both kinds follow
    one another; whether a step copies the others."""
    layers = [HostLayers((0, 1, 3), CPU, SharedLayers(on_host, 2)) for on_host in ((1, 3), (0,))]
    engines = [open_engine(communicator, folder, each) for each in layers]
    found = [forced_logits(engine, PROMPTS, FORCED) for engine in engines for _ in range(2)]
    copied = [engine.streamer.pass_bytes(1) for engine in engines if engine.streamer is not None]
    expected = [layers[0].kept[0].layout.num_bytes, sum(layers[1].kept[index].layout.num_bytes for index in (1, 3))]
    return forced_logits(open_engine(communicator, folder, None), PROMPTS, FORCED), found, copied == expected


@needs_layout
def test_passes_of_few_and_of_many_rows_take_turns(tmp_path: Path) -> None:
    resident, found, copies_others = run_on_ranks(steps_of, 1, write_model(CONFIG, tmp_path))[0]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[2], found[3])
    for logits in found:
        assert ((logits - resident).double().pow(2).mean().sqrt() / resident.double().std()) < 0.02
    assert copies_others


def test_layers_that_the_host_cannot_compute_are_streamed(tmp_path: Path) -> None:
    """Here those of 80 outputs, in float32."""
    folder = write_model(CONFIGS["llama"], tmp_path)
    answers = run_on_ranks(plain_logits, 1, folder)[0]
    assert torch.equal(*answers)


def plain_logits(communicator: Communicator, folder: Path) -> list[Tensor]:
    found = []
    for shared in (SharedLayers((), 0), SharedLayers((0, 1), 64)):
        model, layers = build(communicator, folder), HostLayers((0, 1), CPU, shared)
        load_checkpoint(model, read_checkpoint(folder), CPU, on_placed=HostLoader(model.module, layers))
        engine = Engine(model.module, communicator, EngineLimits(64, 2, 8), host_layers=layers)
        assert engine.streamer is not None
        assert engine.streamer.pass_bytes(1) == layers.streamed_bytes
        assert not engine.streamer.on_host
        found.append(forced_logits(engine, PROMPTS, FORCED))
    return found
