"""What a rank reports of its transports, and which candidates engine.transport lets compete."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from launcher.config import TransportKind
from launcher.events import EventWriter
from launcher.rank import transport as rank_transport
from launcher.rank.context import RankContext
from launcher.rank.transport import open_transport
from launcher.tasks.probe import opened_transports
from parallel.communicator import TransportError
from parallel.transports import host_memory_norm
from parallel.transports.by_size import BySize
from parallel.transports.choice import PREFILL_BYTES, Proof, Range
from parallel.transports.copies import CopiedHostMemory
from parallel.transports.dense import EXACT, INT8
from parallel.transports.host_memory import HostMemory
from parallel.transports.norm_trial import NORM_BYTES
from parallel.transports.selftest import DECODE_BYTES
from parallel.transports.solo import Solo
from parallel.transports.two_step import TwoStepHostMemory
from parallel.units import KIB
from tests.launcher.jobs import make_job, make_run

CPU = torch.device("cpu")


def summary(tmp_path: Path, *ranges: Range) -> dict[str, Any]:
    return RankContext(make_job(tmp_path), 0, CPU, Solo(CPU), ranges, cast(EventWriter, None)).transport_summary()


def test_one_transport_carries_all_sizes(tmp_path: Path) -> None:
    times = {"decode_all_reduce_us": 90.5, "prefill_gb_per_sec": None}
    assert summary(tmp_path, Range("gloo", None, "why", {DECODE_BYTES: 90.5})) == {
        "all_sizes": {"name": "gloo", "reason": "why", "failed": [], **times}
    }


def test_each_range_of_sizes_has_its_transport(tmp_path: Path) -> None:
    small = Range("host_memory", 256 * KIB, "faster", {DECODE_BYTES: 4.3})
    large = Range("nccl", None, "slower", {DECODE_BYTES: 24.7, PREFILL_BYTES: 1183.0})
    found = summary(tmp_path, small, large)
    assert list(found) == ["up_to_262144_bytes", "larger"]
    assert [each["decode_all_reduce_us"] for each in found.values()] == [4.3, 24.7]
    assert found["up_to_262144_bytes"]["prefill_gb_per_sec"] is None
    assert found["larger"]["prefill_gb_per_sec"] == pytest.approx(2**25 / 1183e-6 / 1e9)


SMALL, MIDDLE, LARGE = HostMemory.name, EXACT.name, TwoStepHostMemory.name
COPIES = CopiedHostMemory.name
NORM, APART = host_memory_norm.NAME, "a kernel each"
MIB = 2**20


class FakeChannel:
    closed = False
    timeout_sec = 0.0

    def close(self) -> None:
        self.closed = True

    def check(self) -> None: ...


class Fake(Solo):
    """Stands for a transport; its proof is what a test says."""

    max_bytes = 0

    def __init__(self, name: str) -> None:
        super().__init__(CPU)
        self.name = name
        self.channel = FakeChannel()
        self.inner: Fake | None = None
        self.reduced: list[int] = []

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        self.reduced.append(tensor.nbytes)
        return tensor


class FakeSlots(Fake, HostMemory):
    def __init__(self, name: str) -> None:
        Fake.__init__(self, name)


def norms(name: str, *times: float) -> Proof:
    return Proof(name, dict(zip(NORM_BYTES, times, strict=True)))


def open_with(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: TransportKind, *proofs: Proof, bits: int = 16
) -> tuple[Any, dict[str, Fake]]:
    """The choice among fakes with these proofs, and all that were tried."""
    by_name = {name: norms(name, *[9.0] * len(NORM_BYTES)) for name in (NORM, APART)}
    by_name |= {proof.name: proof for proof in proofs}
    tried = {}

    def fake_prove(
        name: str, opener: object, sizes: object, close: Callable[[Fake], None] | None, **_: object
    ) -> tuple[Fake | None, Proof]:
        # Of those that a test says nothing of, no size was timed.
        by_name.setdefault(name, Proof(name))
        tried[name] = (FakeSlots if name == SMALL else Fake)(name)
        if by_name[name].error and close is not None:
            close(tried[name])
        return (None if by_name[name].error else tried[name]), by_name[name]

    monkeypatch.setattr(rank_transport, "prove", fake_prove)
    monkeypatch.setattr(rank_transport, "open_kind", lambda job, kind, device: Fake(kind))
    run = make_run()
    run.engine.transport = kind
    run.engine.all_reduce_bits = bits
    return open_transport(make_job(tmp_path, cards=True, run=run), CPU, lambda error: None), tried


NCCL = Proof("nccl", {DECODE_BYTES: 24.7, 128 * KIB: 30.0, MIB: 63.0})
FAST_REASON = "4.3 us for 16384 bytes, where nccl takes 24.7 us"
FAST, SLOW = Proof(SMALL, {DECODE_BYTES: 4.3}), Proof(SMALL, {DECODE_BYTES: 99.0})
FAST_MIDDLE, SLOW_MIDDLE = Proof(MIDDLE, {128 * KIB: 9.0}), Proof(MIDDLE, {128 * KIB: 99.0})
FAST_LARGE, SLOW_LARGE = Proof(LARGE, {MIB: 40.0}), Proof(LARGE, {MIB: 99.0})
BROKEN, BROKEN_LARGE = Proof(SMALL, error="rank 0: no memory"), Proof(LARGE, error="rank 0: no memory")


@pytest.mark.parametrize(
    ("kind", "small", "middle", "large", "carriers"),
    [
        (TransportKind.auto, FAST, FAST_MIDDLE, FAST_LARGE, [SMALL, MIDDLE, LARGE]),
        (TransportKind.auto, FAST, SLOW_MIDDLE, FAST_LARGE, [SMALL, "nccl", LARGE]),
        (TransportKind.auto, SLOW, FAST_MIDDLE, SLOW_LARGE, ["nccl", MIDDLE, "nccl"]),
        (TransportKind.auto, SLOW, SLOW_MIDDLE, BROKEN_LARGE, ["nccl"] * 3),
        (TransportKind.auto, BROKEN, FAST_MIDDLE, SLOW_LARGE, ["nccl", MIDDLE, "nccl"]),
        (TransportKind.nccl, FAST, FAST_MIDDLE, FAST_LARGE, ["nccl"] * 3),
        (TransportKind.host_memory, SLOW, SLOW_MIDDLE, SLOW_LARGE, [SMALL, MIDDLE, LARGE]),
        (TransportKind.host_memory, SLOW, SLOW_MIDDLE, BROKEN_LARGE, [SMALL, MIDDLE, "nccl"]),
    ],
)
def test_each_message_goes_the_way_of_its_size(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    kind: TransportKind,
    small: Proof,
    middle: Proof,
    large: Proof,
    carriers: list[str],
) -> None:
    choice, tried = open_with(monkeypatch, tmp_path, kind, NCCL, small, middle, large)
    assert list(tried) == (
        ["nccl"] if kind == TransportKind.nccl else ["nccl", COPIES, LARGE, MIDDLE, SMALL, NORM, APART]
    )
    sizes = {4: 0, DECODE_BYTES: 0, DECODE_BYTES + 4: 1, 128 * KIB: 1, 128 * KIB + 4: 2, MIB: 2, 64 * MIB: 2}
    for size, place in sizes.items():
        choice.communicator.all_reduce(torch.empty(size // 4))
        assert tried[carriers[place]].reduced.pop() == size
    assert not any(each.reduced for each in tried.values())
    assert [each.name for each in choice.ranges] == [
        name for i, name in enumerate(carriers) if i == 0 or carriers[i - 1] != name
    ]
    for each in (small, middle, large):
        if each.name in tried and not each.error:
            channel = tried[each.name].channel
            assert channel.closed == (each.name not in carriers)
            # The limit of the self-test ends with it.
            assert channel.timeout_sec == make_run().timeouts.collective_sec


@pytest.mark.parametrize(
    ("copies_us", "carriers"), [(700.0, [LARGE, COPIES]), (1250.0, [LARGE, COPIES]), (1300.0, [LARGE])]
)
def test_copies_carry_prefill_where_they_are_faster_beside_products(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, copies_us: float, carriers: list[str]
) -> None:
    nccl = Proof("nccl", {MIB: 63.0, PREFILL_BYTES: 1183.0})
    large, copies = Proof(LARGE, {MIB: 40.0, PREFILL_BYTES: 1030.0}), Proof(COPIES, {PREFILL_BYTES: copies_us})
    choice, tried = open_with(monkeypatch, tmp_path, TransportKind.auto, nccl, large, copies)
    assert [each.name for each in choice.ranges] == carriers
    assert ("hinders products" in choice.ranges[-1].reason) == (copies_us == 1250.0)
    assert tried[COPIES].channel.closed == (COPIES not in carriers)


@pytest.mark.parametrize(("bits", "carrier"), [(8, INT8.name), (16, MIDDLE)])
def test_sums_are_rounded_only_where_that_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bits: int, carrier: str
) -> None:
    proofs = (NCCL, FAST, FAST_MIDDLE, Proof(INT8.name, {128 * KIB: 7.0}))
    choice, tried = open_with(monkeypatch, tmp_path, TransportKind.auto, *proofs, bits=bits)
    assert [each.name for each in choice.ranges] == [SMALL, carrier, "nccl"]
    assert (INT8.name in tried) == (bits == 8)


@pytest.mark.parametrize(("large_us", "captured"), [(1030.0, LARGE), (1300.0, "nccl")])
def test_what_copies_carry_goes_the_next_best_way_in_a_graph(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, large_us: float, captured: str
) -> None:
    nccl, copies = Proof("nccl", {MIB: 63.0, PREFILL_BYTES: 1183.0}), Proof(COPIES, {PREFILL_BYTES: 700.0})
    large = Proof(LARGE, {PREFILL_BYTES: large_us})
    _, tried = open_with(monkeypatch, tmp_path, TransportKind.auto, nccl, large, copies)
    assert tried[COPIES].inner is tried[captured]
    assert tried[LARGE].channel.closed == (captured != LARGE)


@pytest.mark.parametrize(("small", "rest"), [(FAST, SMALL), (SLOW, "nccl"), (BROKEN, "nccl")])
def test_what_a_transport_cannot_carry_goes_through_slots_or_nccl(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, small: Proof, rest: str
) -> None:
    choice, tried = open_with(monkeypatch, tmp_path, TransportKind.auto, NCCL, small, FAST_MIDDLE, FAST_LARGE)
    assert isinstance(choice.communicator, BySize)
    assert choice.communicator.gather is tried[MIDDLE].inner is tried[LARGE].inner is tried[rest]
    assert tried[rest].max_bytes == (DECODE_BYTES if rest == SMALL else 0)


def test_slots_carry_all_reduces_of_their_range_also_where_they_were_slow_before(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    uneven = Proof(SMALL, {DECODE_BYTES: 99.0, 128 * KIB: 20.0})
    choice, tried = open_with(monkeypatch, tmp_path, TransportKind.auto, NCCL, uneven, SLOW_MIDDLE, SLOW_LARGE)
    assert [(each.name, each.up_to_bytes) for each in choice.ranges] == [
        ("nccl", DECODE_BYTES),
        (SMALL, 128 * KIB),
        ("nccl", None),
    ]
    assert not tried[SMALL].channel.closed


@pytest.mark.parametrize(
    ("times", "limit", "found"),
    [
        ((5.0, 6, 7, 8, 9, 10), 32, "host_memory_norm up to 524288 bytes: 5.0 us for 16384 bytes"),
        ((5.0, 6, 7, 99, 9, 10), 4, "host_memory_norm up to 65536 bytes: 5.0 us for 16384 bytes"),
        ((7.5, 6, 7, 8, 9, 10), 0, "host_memory_norm was left out: 7.5 us for 16384 bytes"),
    ],
)
def test_norms_join_sums_up_to_where_that_is_faster(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, times: tuple[float, ...], limit: int, found: str
) -> None:
    apart = norms(APART, 7.3, 8.0, 11.0, 12.0, 15.0, 20.0)
    proofs = (NCCL, FAST, SLOW_MIDDLE, SLOW_LARGE, norms(NORM, *times), apart)
    choice, tried = open_with(monkeypatch, tmp_path, TransportKind.auto, *proofs)
    assert choice.ranges[0].reason == f"{FAST_REASON}; {found}, where a kernel each takes 7.3 us"
    assert not choice.ranges[0].failed
    assert (choice.communicator is tried[NORM]) == (limit > 0) != tried[NORM].channel.closed
    if limit:
        assert tried[NORM].max_bytes == limit * DECODE_BYTES
        assert tried[NORM].channel.timeout_sec == make_run().timeouts.collective_sec


@pytest.mark.parametrize("enabled", (True, False))
def test_norms_that_fail_or_are_switched_off_stay_apart(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, enabled: bool
) -> None:
    monkeypatch.setattr(host_memory_norm, "ENABLED", enabled)
    broken = Proof(NORM, error="rank 1: gave wrong sums or norms of 1 x 64 numbers")
    choice, tried = open_with(monkeypatch, tmp_path, TransportKind.auto, NCCL, FAST, broken)
    left_out = f"; {NORM} was left out: {broken.error}" if enabled else ""
    assert choice.ranges[0].reason == FAST_REASON + left_out
    assert [*choice.ranges[0].failed] == [left_out.removeprefix("; ")] * enabled
    assert isinstance(choice.communicator, BySize)
    assert (NORM in tried) == enabled


def test_what_fails_is_closed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    failed = [Proof(name, error="rank 1: gave wrong sums") for name in (COPIES, LARGE, NORM)]
    _, tried = open_with(monkeypatch, tmp_path, TransportKind.auto, NCCL, FAST, FAST_MIDDLE, *failed)
    closed = {name: each.channel.closed for name, each in tried.items() if name not in ("nccl", APART)}
    assert closed == {COPIES: True, LARGE: True, NORM: True, SMALL: False, MIDDLE: False}


def test_a_probe_times_the_whole_and_each_part(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    choice, tried = open_with(monkeypatch, tmp_path, TransportKind.auto, NCCL, FAST, FAST_MIDDLE, SLOW_LARGE)
    context = RankContext(make_job(tmp_path), 0, CPU, choice.communicator, choice.ranges, cast(EventWriter, None))
    opened = opened_transports(context)
    assert list(opened) == ["by_size", SMALL, MIDDLE, "nccl"]
    assert opened["by_size"] is choice.communicator
    assert all(opened[name] is tried[name] for name in (SMALL, MIDDLE, "nccl"))


def test_what_was_asked_for_and_fails_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(TransportError, match=r"self-test of host_memory failed on rank 0: no memory\."):
        open_with(monkeypatch, tmp_path, TransportKind.host_memory, NCCL, BROKEN, FAST_MIDDLE, FAST_LARGE)


def test_nothing_works_without_nccl(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = Proof("nccl", error="rank 1: gave wrong sums of 4 bytes of float32")
    with pytest.raises(TransportError, match=r"nccl failed on rank 1: gave wrong .*limits.peer_access=off"):
        open_with(monkeypatch, tmp_path, TransportKind.auto, broken)
