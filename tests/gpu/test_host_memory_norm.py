"""Sum, residual and norm in one kernel: the bits of the two steps, with ranks as streams of one card."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from parallel.communicator import TransportError
from parallel.kernels.fused import add_rms_norm
from parallel.transports import host_memory_norm
from parallel.transports.host_memory_norm import NormChannel
from tests.gpu.one_card import DEVICE
from tests.parallel.transports.sums import ordered_sum
from tools.bench.ranks_on_one_card import RanksOnOneCard, norm_on_one_card

pytestmark = pytest.mark.gpu

EPS = 1e-5
# One piece, whole and part warps, a prime number of warps, a 70B's row, and rows of more threads than a block has.
SHAPES = [
    *((rows, 8192) for rows in (1, 2, 4, 5, 8, 32)),
    *((1, 8), (3, 264), (32, 520), (1, 2560), (7, 5120), (2, 15_872), (1, 16_376), (16, 16_384)),
]


class Case:
    """Fresh inputs of each rank, whose residuals differ so that none can stand for another's; poisoned outputs.

    A row below those of the residuals and the outputs shows what was written beyond their end.
    """

    def __init__(self, world_size: int, rows: int, hidden_size: int) -> None:
        wide = torch.full((3, world_size, rows + 1, hidden_size), float("nan"), device=DEVICE).bfloat16()
        self.updates, self.residuals, self.outputs = wide.unbind()
        self.rows, self.weight = rows, torch.empty(hidden_size, device=DEVICE, dtype=torch.bfloat16)
        self.draw()

    def draw(self) -> None:
        self.updates[:, : self.rows].normal_()
        self.residuals[:, : self.rows].normal_(std=4)
        self.outputs.fill_(float("nan"))
        self.weight.normal_()
        self.before = self.residuals.clone()

    def call(self, channel: NormChannel) -> None:
        tensors = (each[channel.rank, : self.rows] for each in (self.updates, self.residuals))
        channel.all_reduce_add_norm(*tensors, self.weight, self.outputs[channel.rank, : self.rows], EPS)

    def check(self) -> None:
        update = ordered_sum([each[: self.rows] for each in self.updates])
        for before, residual, output in zip(self.before, self.residuals, self.outputs, strict=True):
            expected = before[: self.rows].clone()
            normed = add_rms_norm(update.clone(), expected, self.weight, EPS)
            assert_same_bits(residual[: self.rows], expected)
            assert_same_bits(output[: self.rows], normed)
            assert residual[self.rows :].isnan().all() and output[self.rows :].isnan().all()
            exact = before[: self.rows].double() + update.double()
            exact *= (exact.square().mean(dim=1, keepdim=True) + EPS).rsqrt() * self.weight.double()
            torch.testing.assert_close(output[: self.rows].double(), exact, rtol=2**-6, atol=1e-3)


def assert_same_bits(found: Tensor, expected: Tensor) -> None:
    assert torch.equal(found.view(torch.int16), expected.view(torch.int16))


def run(ranks: RanksOnOneCard[NormChannel], case: Case) -> None:
    ranks.run(case.call)
    ranks.check()
    case.check()


@pytest.mark.parametrize("row_blocks", (1, 2, 4, 8))
@pytest.mark.parametrize("world_size", (2, 3, 4))
def test_bits_are_those_of_two_steps(monkeypatch: pytest.MonkeyPatch, world_size: int, row_blocks: int) -> None:
    monkeypatch.setattr(host_memory_norm, "ROW_BLOCKS", row_blocks)
    with norm_on_one_card(world_size, DEVICE) as ranks:
        for rows, hidden_size in SHAPES:
            run(ranks, Case(world_size, rows, hidden_size))


@pytest.mark.parametrize("row_blocks", (1, 4))
def test_graphs_replay_right(monkeypatch: pytest.MonkeyPatch, row_blocks: int) -> None:
    """An odd number of calls of several shapes, replayed on fresh values between plain calls."""
    monkeypatch.setattr(host_memory_norm, "ROW_BLOCKS", row_blocks)
    with norm_on_one_card(2, DEVICE) as ranks:
        cases = [Case(2, rows, size) for rows, size in ((1, 8192), (32, 8192), (1, 8192), (3, 264), (8, 5120))]
        graphs = ranks.capture(lambda channel: [case.call(channel) for case in cases])
        for _ in range(40):
            for case in cases:
                case.draw()
            ranks.run(lambda channel: graphs[channel.rank].replay())
            ranks.check()
            for case in cases:
                case.check()
            run(ranks, Case(2, 2, 1024))


@pytest.mark.parametrize("row_blocks", (1, 8))
def test_soak(monkeypatch: pytest.MonkeyPatch, row_blocks: int) -> None:
    """Many calls in flight; nothing waits for the host in between. Epochs wrap on the way."""
    monkeypatch.setattr(host_memory_norm, "ROW_BLOCKS", row_blocks)
    with norm_on_one_card(2, DEVICE) as ranks:
        for channel in ranks.channels:
            channel.state[0] = -100 << 32
        for _ in range(5):
            cases = [Case(2, *SHAPES[i % len(SHAPES)]) for i in range(100)]
            torch.cuda.synchronize()
            ranks.run(lambda channel, cases=cases: [case.call(channel) for case in cases])  # type: ignore[misc]
            ranks.check()
            for case in cases:
                case.check()
        # 99 calls to 0xffffffff, then 2 and on to 402.
        assert {channel.state[0].item() for channel in ranks.channels} == {402 << 32}


@pytest.mark.parametrize("row_blocks", (1, 4))
@pytest.mark.parametrize("rows", (1, 8))
def test_a_rank_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch, rows: int, row_blocks: int) -> None:
    monkeypatch.setattr(host_memory_norm, "ROW_BLOCKS", row_blocks)
    with norm_on_one_card(3, DEVICE, timeout_sec=0.3) as ranks:
        case = Case(3, rows, 8192)
        ranks.run(case.call, ranks=(0, 2))
        torch.cuda.synchronize()
        for rank in (0, 2):
            with pytest.raises(TransportError, match=f"rank 1 did not answer rank {rank} through host memory within"):
                ranks.channels[rank].check()
        assert case.outputs.isnan().all()
        assert_same_bits(case.residuals, case.before)
        # The first time-out ends all further waiting.
        for _ in range(2000):
            ranks.run(case.call, ranks=(0, 2))
        torch.cuda.synchronize()
