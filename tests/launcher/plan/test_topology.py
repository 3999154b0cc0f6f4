"""How many ranks a run has, and over which links they talk."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.config import LimitsConfig, PeerAccess, TopologyConfig, TopologyKind
from launcher.hardware.inventory import Inventory
from launcher.plan.topology import PlanError, plan_topology, resolve_world_size
from tests.launcher.jobs import RTX_4090
from tests.launcher.plans import CPU, cards_of, run_of

# How many ranks


@pytest.mark.parametrize(
    ("gpus", "topology", "env", "world_size"),
    [
        (None, "auto", None, 1),
        (3, "auto", None, 3),
        (3, "auto", 1, 3),
        (3, "triple", 3, 3),
        (None, "single", None, 1),
        (None, "dual_pcie", 1, 2),
        (None, "quad", 4, 4),
        (None, "auto", 2, 2),
        (None, "auto", 1, 1),
    ],
)
def test_world_size_is_gpus_else_topology_else_torchruns(
    gpus: int | None, topology: str, env: int | None, world_size: int
) -> None:
    run = run_of(gpus=gpus, topology=TopologyConfig(TopologyKind(topology)))
    assert resolve_world_size(run, env) == world_size


def test_gpus_and_topology_that_disagree_are_both_named() -> None:
    with pytest.raises(PlanError) as caught:
        resolve_world_size(run_of(gpus=3, topology=TopologyConfig(TopologyKind.dual_pcie)), None)
    assert str(caught.value) == "gpus=3 but topology=dual_pcie means 2 cards. Set gpus=2 or topology=triple."


def test_other_world_size_than_torchruns_names_both_and_both_ways_to_start() -> None:
    with pytest.raises(PlanError) as caught:
        resolve_world_size(run_of(gpus=2), 4)
    for part in ("WORLD_SIZE=4", "2 are asked for", "`torchrun -m launcher gpus=2`",
                 "`torchrun --nproc-per-node 2 -m launcher gpus=2`"):  # fmt: skip
        assert part in str(caught.value)


def test_more_ranks_than_supported_are_refused() -> None:
    with pytest.raises(PlanError, match="WORLD_SIZE=8 ranks were started; at most 4"):
        resolve_world_size(run_of(), 8)


# Topology


@pytest.mark.parametrize(("world_size", "name"), [(1, "single"), (2, "dual_pcie"), (3, "triple"), (4, "quad")])
@pytest.mark.parametrize("inventory", [CPU, cards_of(4)])
def test_auto_topology_follows_the_number_of_ranks(world_size: int, name: str, inventory: Inventory) -> None:
    chosen, reason = plan_topology(run_of(), world_size, inventory)
    assert chosen == name
    assert reason.endswith(".")


def test_auto_pair_with_nvlink_is_dual_nvlink() -> None:
    assert plan_topology(run_of(), 2, cards_of(2, nvlink=((0, 1),)))[0] == "dual_nvlink"


def test_auto_pair_with_peer_access_off_is_dual_pcie() -> None:
    run = run_of(limits=LimitsConfig(peer_access=PeerAccess.off))
    name, reason = plan_topology(run, 2, cards_of(2, nvlink=((0, 1),)))
    assert name == "dual_pcie"
    assert "limits.peer_access=off" in reason


def test_nvlink_between_other_cards_does_not_count() -> None:
    assert plan_topology(run_of(), 2, cards_of(4, nvlink=((2, 3),)))[0] == "dual_pcie"


def nvlink_refusal(inventory: Inventory, **limits: Any) -> str:
    run = run_of(topology=TopologyConfig(TopologyKind.dual_nvlink), limits=LimitsConfig(**limits))
    with pytest.raises(PlanError) as caught:
        plan_topology(run, 2, inventory)
    return str(caught.value)


def test_dual_nvlink_without_nvlink_names_the_card_and_dual_pcie() -> None:
    message = nvlink_refusal(cards_of(2))
    assert all(part in message for part in (RTX_4090, "RTX 4090s never have", "topology=dual_pcie"))


def test_dual_nvlink_names_the_pair_that_has_it() -> None:
    assert "Cards 1 and 2 have: choose them with CUDA_VISIBLE_DEVICES" in nvlink_refusal(cards_of(3, nvlink=((1, 2),)))


def test_dual_nvlink_on_the_cpu_is_refused() -> None:
    assert "topology=dual_pcie" in nvlink_refusal(CPU)


def test_dual_nvlink_without_peer_access_is_refused() -> None:
    message = nvlink_refusal(cards_of(2, nvlink=((0, 1),)), peer_access=PeerAccess.off)
    assert "limits.peer_access=off" in message


def test_dual_nvlink_is_kept_where_the_pair_has_it() -> None:
    run = run_of(topology=TopologyConfig(TopologyKind.dual_nvlink))
    assert plan_topology(run, 2, cards_of(2, nvlink=((0, 1),)))[0] == "dual_nvlink"
