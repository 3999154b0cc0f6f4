"""Sums that a norm follows: what every transport makes of them, what a pass asks for, and what the self-test finds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from parallel.communicator import Communicator, ElidedAllReduce, TransportError
from parallel.kernels import reference
from parallel.transports import norm_trial
from parallel.transports.by_size import BySize
from parallel.transports.choice import Proof, Trial, prove
from parallel.transports.host_memory_norm import (
    LINES,
    MAX_ROWS,
    MAX_THREADS,
    MAX_WARPS,
    NormLayout,
    choose_row_blocks,
    row_threads,
)
from parallel.transports.selftest import DECODE_BYTES
from tests.parallel.ranks import CPU, forced_logits, make_engine
from tests.parallel.small_models import prompts_of
from tools.local_ranks import run_on_ranks

EPS = 1e-5
FORCED = [[5, 6, 7], [8, 9, 10], [11, 12, 13], [14, 15, 16]]


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def add_norms(communicator: Communicator) -> list[tuple[Tensor, Tensor]]:
    """Of a transport, of one by size over it, and of one without sums: the residual and its norm."""
    found = []
    by_size = BySize(communicator, [(0, communicator)], communicator, CPU)
    for each in (communicator, by_size, ElidedAllReduce(communicator)):
        residual = numbers(9, 3, 40)
        normed = each.all_reduce_add_norm(numbers(communicator.rank, 3, 40), residual, numbers(8, 40), EPS)
        found.append((residual, normed))
    return found


@pytest.mark.parametrize("world_size", (1, 2, 3))
def test_every_transport_adds_the_sum_and_norms(world_size: int) -> None:
    total = torch.stack([numbers(rank, 3, 40) for rank in range(world_size)]).sum(dim=0)
    for rank, (plain, by_size, elided) in enumerate(run_on_ranks(add_norms, world_size)):
        for (residual, normed), update in ((plain, total), (by_size, total), (elided, numbers(rank, 3, 40))):
            expected = numbers(9, 3, 40) + update
            torch.testing.assert_close(residual, expected)
            torch.testing.assert_close(normed, reference.rms_norm(expected, numbers(8, 40), EPS))


class Recording(ElidedAllReduce):
    """Passes everything on; knows what was asked for, and spoils an update that a norm took, as a transport may."""

    def __init__(self, inner: Communicator) -> None:
        super().__init__(inner)
        self.asked: list[str] = []

    def all_reduce(self, tensor: Tensor) -> Tensor:
        self.asked.append("sum")
        return self.inner.all_reduce(tensor)

    def all_reduce_add_norm(self, update: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        self.asked.append("norm")
        normed = self.inner.all_reduce_add_norm(update, residual, weight, eps)
        update.fill_(float("nan"))
        return normed


def asked_of(communicator: Communicator, folder: Path, streamed: list[int]) -> tuple[Tensor, Tensor, list[str]]:
    """Logits with and without a recording communicator, and what the last pass asked for."""
    recording = Recording(communicator)
    name = "llama_with_biases" if "biases" in folder.name else "llama"
    ours, plain = (
        forced_logits(make_engine(each, folder, streamed=streamed), prompts_of(name), FORCED)
        for each in (recording, communicator)
    )
    return ours, plain, recording.asked


@pytest.mark.parametrize(
    ("name", "streamed", "expected"),
    [
        # Of two layers; the last one's norm is not part of the pass.
        ("llama", [], ["norm", "norm", "norm", "sum"]),
        ("llama_with_biases", [], ["sum"] * 4),
        ("llama", [1], ["norm", "sum", "norm", "sum"]),
    ],
)
@pytest.mark.parametrize("world_size", (1, 2))
def test_a_pass_asks_for_norms_where_nothing_comes_between(
    folders: dict[str, Path], name: str, streamed: list[int], expected: list[str], world_size: int
) -> None:
    for ours, plain, asked in run_on_ranks(asked_of, world_size, folders[name], streamed):
        assert torch.equal(ours, plain) and torch.isfinite(ours).all()
        assert asked[-len(expected) :] == expected


class Wrong(ElidedAllReduce):
    """Adds a little to one number of the norm or of the residual on rank 1, where rows are long."""

    def __init__(self, inner: Communicator, place: str) -> None:
        super().__init__(inner)
        self.place = place

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return self.inner.all_reduce(tensor)

    def all_reduce_add_norm(self, update: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed = super().all_reduce_add_norm(update, residual, weight, eps)
        if self.rank == 1 and update.shape[1] == 2560:
            spoiled = {"norm": normed, "residual": residual, "nothing": torch.zeros(1)}[self.place]
            spoiled.view(-1)[-1] += 1
        return normed


def unexpected(error: TransportError) -> None:
    raise AssertionError(error)


def trial_of(communicator: Communicator, place: str) -> Proof:
    trial = Trial(norm_trial.find_wrong_norms, norm_trial.time_norm)
    opener = lambda: Wrong(communicator, place)  # noqa: E731
    sizes = norm_trial.NORM_BYTES[:2]
    checked = {"control": communicator, "device": CPU, "timeout_sec": 60, "on_timeout": unexpected}
    return prove("it", opener, sizes, trial=trial, **checked)[1]  # type: ignore[arg-type]


@pytest.mark.parametrize("place", ("norm", "residual", "nothing"))
def test_wrong_norms_are_found_on_all_ranks(place: str) -> None:
    first, second = run_on_ranks(trial_of, 2, place)
    assert first == second
    if place == "nothing":
        assert not first.error and list(first.times_us) == [DECODE_BYTES, 2 * DECODE_BYTES]
    else:
        assert first.error == "rank 1: gave wrong sums or norms of 1 x 2560 numbers"


@pytest.mark.parametrize("hidden_size", (8, 64, 520, 2560, 5120, 8192, 9216, 16384, 992 * 16))
def test_blocks_of_a_row_share_its_threads(monkeypatch: pytest.MonkeyPatch, hidden_size: int) -> None:
    threads = row_threads(hidden_size)
    assert threads % 32 == 0 and threads * 16 >= hidden_size > (threads - 32) * 16
    assert threads // 32 <= MAX_WARPS
    for wanted in (1, 2, 4, 8):
        monkeypatch.setattr("parallel.transports.host_memory_norm.ROW_BLOCKS", wanted)
        blocks = choose_row_blocks(hidden_size)
        assert threads // 32 % blocks == 0 and threads // blocks <= MAX_THREADS
        if hidden_size == 8192:
            assert blocks == wanted


def test_rows_that_do_not_fit_are_refused() -> None:
    layout = NormLayout(2)
    assert layout.takes(32, 8192) and layout.takes(16, 16384) and layout.takes(MAX_ROWS, 8)
    for rows, hidden_size in ((33, 8192), (32, 8200), (0, 8192), (1, 16392), (1, 12), (1, 0), (MAX_ROWS + 1, 8)):
        assert not layout.takes(rows, hidden_size)
    assert layout.slot_lines == 32 * row_threads(8192) * LINES
    # Slots are whole pages, one behind the other.
    assert [layout.own(rank) for rank in (0, 1)] == [(4096, 4096 + 2 * 786432), (4096 + 2 * 786432, layout.num_bytes)]
