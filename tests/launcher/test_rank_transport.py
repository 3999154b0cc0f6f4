"""What a rank reports of its transports, and which candidates engine.transport lets compete."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch

from launcher import rank_transport
from launcher.config import TransportKind
from launcher.events import EventWriter
from launcher.rank import RankContext
from launcher.rank_transport import open_transport
from parallel.communicator import TransportError
from parallel.selftest import DECODE_BYTES
from parallel.transport_choice import PREFILL_BYTES, Proof, Range
from parallel.transports.host_memory import KIB, HostMemory
from parallel.transports.solo import Solo
from parallel.transports.two_step import TwoStepHostMemory
from tests.launcher.jobs import make_job, make_run

CPU = torch.device("cpu")


def summary(tmp_path: Path, *ranges: Range) -> dict[str, Any]:
    return RankContext(make_job(tmp_path), 0, CPU, Solo(CPU), ranges, cast(EventWriter, None)).transport_summary()


def test_one_transport_carries_all_sizes(tmp_path: Path) -> None:
    assert summary(tmp_path, Range("gloo", None, "why", {DECODE_BYTES: 90.5})) == {
        "all_sizes": {"name": "gloo", "reason": "why", "decode_all_reduce_us": 90.5, "prefill_gb_per_sec": None}
    }


def test_each_range_of_sizes_has_its_transport(tmp_path: Path) -> None:
    small = Range("host_memory", 256 * KIB, "faster", {DECODE_BYTES: 4.3})
    large = Range("nccl", None, "slower", {DECODE_BYTES: 24.7, PREFILL_BYTES: 1183.0})
    found = summary(tmp_path, small, large)
    assert list(found) == ["up_to_262144_bytes", "larger"]
    assert [each["decode_all_reduce_us"] for each in found.values()] == [4.3, 24.7]
    assert found["up_to_262144_bytes"]["prefill_gb_per_sec"] is None
    assert found["larger"]["prefill_gb_per_sec"] == pytest.approx(2**25 / 1183e-6 / 1e9)


SMALL, LARGE = HostMemory.name, TwoStepHostMemory.name
MIB = 2**20


class FakeChannel:
    closed = False
    timeout_sec = 0.0

    def close(self) -> None:
        self.closed = True


class Fake(Solo):
    """Stands for a transport; its proof is what a test says."""

    max_bytes = min_bytes = 0

    def __init__(self, name: str) -> None:
        super().__init__(CPU)
        self.name = name
        self.channel = FakeChannel()
        self.inner: Fake | None = None


def open_with(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: TransportKind, *proofs: Proof
) -> tuple[Any, dict[str, Fake]]:
    """The choice among fakes with these proofs, and all that were tried."""
    by_name, tried = {proof.name: proof for proof in proofs}, {}

    def fake_prove(name: str, opener: object, sizes: object, **_: object) -> tuple[Fake | None, Proof]:
        tried[name] = Fake(name)
        return (None if by_name[name].error else tried[name]), by_name[name]

    monkeypatch.setattr(rank_transport, "prove", fake_prove)
    monkeypatch.setattr(rank_transport, "open_kind", lambda job, kind, device: Fake(kind))
    run = make_run()
    run.engine.transport = kind
    return open_transport(make_job(tmp_path, cards=True, run=run), CPU, lambda error: None), tried


NCCL = Proof("nccl", {DECODE_BYTES: 24.7, MIB: 63.0})
FAST, SLOW = Proof(SMALL, {DECODE_BYTES: 4.3}), Proof(SMALL, {DECODE_BYTES: 99.0})
FAST_LARGE, SLOW_LARGE = Proof(LARGE, {MIB: 40.0}), Proof(LARGE, {MIB: 99.0})
BROKEN, BROKEN_LARGE = Proof(SMALL, error="rank 0: no memory"), Proof(LARGE, error="rank 0: no memory")


@pytest.mark.parametrize(
    ("kind", "small", "large", "chain"),
    [
        (TransportKind.auto, FAST, FAST_LARGE, [SMALL, LARGE, "nccl"]),
        (TransportKind.auto, FAST, SLOW_LARGE, [SMALL, "nccl"]),
        (TransportKind.auto, SLOW, FAST_LARGE, [LARGE, "nccl"]),
        (TransportKind.auto, SLOW, BROKEN_LARGE, ["nccl"]),
        (TransportKind.auto, BROKEN, SLOW_LARGE, ["nccl"]),
        (TransportKind.nccl, FAST, FAST_LARGE, ["nccl"]),
        (TransportKind.host_memory, SLOW, SLOW_LARGE, [SMALL, LARGE, "nccl"]),
        (TransportKind.host_memory, SLOW, BROKEN_LARGE, [SMALL, "nccl"]),
    ],
)
def test_each_hands_on_what_it_does_not_carry(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: TransportKind, small: Proof, large: Proof, chain: list[str]
) -> None:
    choice, tried = open_with(monkeypatch, tmp_path, kind, NCCL, small, large)
    names, each = [], choice.communicator
    while each is not None:
        names.append(each.name)
        if each.name == SMALL:
            assert each.max_bytes == DECODE_BYTES
        if each.name == LARGE:
            assert each.min_bytes == MIB
        if each.name != "nccl":
            # The limit of the self-test ends with it.
            assert each.channel.timeout_sec == make_run().timeouts.collective_sec
        each = each.inner
    assert names == chain
    assert {range_.name for range_ in choice.ranges} == set(chain)
    assert list(tried) == (["nccl"] if kind == TransportKind.nccl else ["nccl", LARGE, SMALL])
    working = {proof.name for proof in (small, large) if not proof.error} & set(tried)
    assert {name for name in working if tried[name].channel.closed} == working - set(chain)


def test_what_was_asked_for_and_fails_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(TransportError, match=r"self-test of host_memory failed on rank 0: no memory\."):
        open_with(monkeypatch, tmp_path, TransportKind.host_memory, NCCL, BROKEN, FAST_LARGE)


def test_nothing_works_without_nccl(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = Proof("nccl", error="rank 1: gave wrong sums of 4 bytes of float32")
    with pytest.raises(TransportError, match=r"nccl failed on rank 1: gave wrong .*limits.peer_access=off"):
        open_with(monkeypatch, tmp_path, TransportKind.auto, broken)
