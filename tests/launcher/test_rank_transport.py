"""What a rank reports of its transports, and which candidates engine.transport lets compete."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from launcher import rank_transport
from launcher.config import TransportKind
from launcher.events import EventWriter
from launcher.rank import RankContext
from launcher.rank_transport import open_transport
from parallel.communicator import TransportError
from parallel.selftest import DECODE_BYTES
from parallel.transport_choice import PREFILL_BYTES, Proof, Range
from parallel.transports.host_memory import KIB
from parallel.transports.solo import Solo
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


class Fake(Solo):
    """Stands for a transport; its proof is what a test says."""

    max_bytes = 512 * KIB

    def __init__(self, name: str) -> None:
        super().__init__(CPU)
        self.name = name
        self.channel = self
        self.timeout_sec = 0.0

    def all_reduce(self, tensor: Tensor) -> Tensor:
        raise AssertionError("nobody should talk through a fake")


def open_with(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: TransportKind, proofs: dict[str, Proof]
) -> tuple[Any, list[str]]:
    """The choice among fakes with these proofs, and the names of those that were tried."""
    tried: list[str] = []

    def fake_prove(name: str, opener: object, sizes: object, **_: object) -> tuple[Fake | None, Proof]:
        tried.append(name)
        return (None if proofs[name].error else Fake(name)), proofs[name]

    monkeypatch.setattr(rank_transport, "prove", fake_prove)
    monkeypatch.setattr(rank_transport, "open_kind", lambda job, kind, device: Fake(kind))
    run = make_run()
    run.engine.transport = kind
    return open_transport(make_job(tmp_path, cards=True, run=run), CPU, lambda error: None), tried


FASTER = {"nccl": Proof("nccl", {DECODE_BYTES: 24.7}), "host_memory": Proof("host_memory", {DECODE_BYTES: 4.3})}
SLOWER = {"nccl": Proof("nccl", {DECODE_BYTES: 3.0}), "host_memory": Proof("host_memory", {DECODE_BYTES: 4.3})}
BROKEN = {**FASTER, "host_memory": Proof("host_memory", error="rank 0: no memory")}


@pytest.mark.parametrize(
    ("kind", "proofs", "names", "tried"),
    [
        (TransportKind.auto, FASTER, ["host_memory", "nccl"], ["nccl", "host_memory"]),
        (TransportKind.auto, SLOWER, ["nccl"], ["nccl", "host_memory"]),
        (TransportKind.auto, BROKEN, ["nccl"], ["nccl", "host_memory"]),
        (TransportKind.nccl, FASTER, ["nccl"], ["nccl"]),
        (TransportKind.host_memory, SLOWER, ["host_memory", "nccl"], ["nccl", "host_memory"]),
    ],
)
def test_engine_transport_narrows_the_choice(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    kind: TransportKind,
    proofs: dict[str, Proof],
    names: list[str],
    tried: list[str],
) -> None:
    choice, all_tried = open_with(monkeypatch, tmp_path, kind, proofs)
    assert [each.name for each in choice.ranges] == names
    assert choice.communicator.name == names[0]
    assert all_tried == tried
    if names[0] == "host_memory":
        # The limit of the self-test ends with it.
        assert choice.communicator.timeout_sec == make_run().timeouts.collective_sec


def test_what_was_asked_for_and_fails_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(TransportError, match=r"self-test of host_memory failed on rank 0: no memory\."):
        open_with(monkeypatch, tmp_path, TransportKind.host_memory, BROKEN)


def test_nothing_works_without_nccl(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    proofs = {"nccl": Proof("nccl", error="rank 1: gave wrong sums of 4 bytes of float32")}
    with pytest.raises(TransportError, match=r"nccl failed on rank 1: gave wrong .*limits.peer_access=off"):
        open_with(monkeypatch, tmp_path, TransportKind.auto, proofs)
