"""How many ranks a run has, and over which links they talk: decided from what was asked and what was found."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

from launcher.amounts import count
from launcher.config import MAX_CARDS, PeerAccess, RunConfig, TopologyKind, TransportKind
from launcher.hardware.inventory import Card, Inventory

NUM_CARDS = {
    TopologyKind.single: 1,
    TopologyKind.dual_nvlink: 2,
    TopologyKind.dual_pcie: 2,
    TopologyKind.triple: 3,
    TopologyKind.quad: 4,
}
# The topology that a number of cards has on any machine.
PLAIN_TOPOLOGY = {
    1: TopologyKind.single,
    2: TopologyKind.dual_pcie,
    3: TopologyKind.triple,
    4: TopologyKind.quad,
}


class PlanError(ValueError):
    """A run that cannot work on this machine; the message names the value, the rule and what would work.

    `summary`: its first line, or what says the same in fewer words.
    """

    def __init__(self, message: str, summary: str | None = None) -> None:
        super().__init__(message)
        self.summary = summary or message.partition("\n")[0]


@dataclass(frozen=True)
class Placement:
    """Where the ranks of a run are and over which links they talk: what every task needs, with a model or without."""

    world_size: int
    # "cuda" | "cpu"
    device: str
    # single, dual_nvlink, dual_pcie, triple or quad
    topology: str
    topology_reason: str
    # CUDA index of each rank's card; None on the CPU.
    cards: tuple[int | None, ...]
    names: tuple[str, ...]
    # What carries the collectives: nccl (and what a rank finds faster for small ones), gloo or solo.
    transport: str
    # Whether NVLink joins each card to all others, and may be used.
    over_nvlink: bool = False


def resolve_world_size(run: RunConfig, env_world_size: int | None) -> int:
    """Ranks of the run: gpus, else what topology says, else torchrun's WORLD_SIZE where it is above 1, else 1.

    Raises:
        PlanError: gpus and topology disagree, or WORLD_SIZE is above 1 and says something else.
    """
    started = env_world_size if env_world_size is not None and env_world_size > 1 else None
    by_topology = NUM_CARDS.get(run.topology.kind)
    if run.gpus is not None and by_topology is not None and run.gpus != by_topology:
        raise PlanError(
            f"gpus={run.gpus} but topology={run.topology.kind.value} means {count(by_topology, 'card')}. "
            f"Set gpus={by_topology} or topology={PLAIN_TOPOLOGY[run.gpus].value}."
        )
    world_size = run.gpus or by_topology or started or 1
    if world_size > MAX_CARDS:
        raise PlanError(f"WORLD_SIZE={world_size} ranks were started; at most {MAX_CARDS} are supported. "
                        f"Use torchrun --nproc-per-node {MAX_CARDS} -m launcher.")  # fmt: skip
    if started is not None and started != world_size:
        raise PlanError(
            f"WORLD_SIZE={started} ranks were started, but {world_size} are asked for. Start them with "
            f"`torchrun -m launcher gpus={world_size}`, or with "
            f"`torchrun --nproc-per-node {world_size} -m launcher gpus={world_size}`."
        )
    return world_size


def cards_knob(run: RunConfig, num_cards: int) -> str:
    """What asks for so many cards: a topology that was set says how many, too."""
    topology = "" if run.topology.kind == TopologyKind.auto else f" topology={PLAIN_TOPOLOGY[num_cards].value}"
    return f"gpus={num_cards}{topology}"


def place_ranks(run: RunConfig, world_size: int, inventory: Inventory) -> Placement:
    """Gives each rank a card (or the CPU) and names the links.

    Raises:
        PlanError: too few cards, or a topology that this machine does not have.
    """
    device = "cpu" if inventory.source == "none" else "cuda"
    _check_num_cards(run, world_size, inventory)
    topology, reason = plan_topology(run, world_size, inventory)
    cards = inventory.cards[:world_size]
    return Placement(
        world_size=world_size,
        device=device,
        topology=topology,
        topology_reason=reason,
        cards=tuple(card.index for card in cards) if cards else (None,) * world_size,
        names=tuple(card.name for card in cards) if cards else ("CPU",) * world_size,
        transport=plan_transport(run, world_size, device),
        over_nvlink=goes_over_nvlink(run, inventory, world_size),
    )


def goes_over_nvlink(run: RunConfig, inventory: Inventory, world_size: int) -> bool:
    """Whether NVLink joins each of so many cards to all others, and may be used. Of cards that are described there may
    be more than the inventory has; on a machine those that it has tell of more."""
    if world_size == 1 or run.limits.peer_access == PeerAccess.off:
        return False
    return run.hardware.nvlink if inventory.source == "facts" else _has_nvlink(inventory, world_size)


def plan_transport(run: RunConfig, world_size: int, device: str) -> str:
    """What carries every collective, or between cards whatever a faster one does not take.

    Raises:
        PlanError: a transport between cards was asked for and there are none.
    """
    wanted = run.engine.transport
    if wanted != TransportKind.auto and device == "cpu":
        raise PlanError(
            f"engine.transport={wanted.value} connects cards, but ranks run on the CPU here, through gloo. "
            "Set engine.transport=auto."
        )
    return "solo" if world_size == 1 else {"cuda": "nccl", "cpu": "gloo"}[device]


def communicator_key(transport: str, *, over_nvlink: bool) -> str:
    """Under which memory/process.py has what a transport takes."""
    return f"{transport} over nvlink" if over_nvlink else transport


def _check_num_cards(run: RunConfig, world_size: int, inventory: Inventory) -> None:
    found = len(inventory.cards)
    if inventory.source == "none" or world_size <= found:
        return
    raise PlanError(
        f"{cards_knob(run, world_size)} but {count(found, 'card')} can be seen. Set {cards_knob(run, found)}, show "
        "more of them with CUDA_VISIBLE_DEVICES, or set hardware=cpu."
    )


def plan_topology(run: RunConfig, world_size: int, inventory: Inventory) -> tuple[str, str]:
    """Name of the topology (single, dual_nvlink, dual_pcie, triple, quad) and a sentence that says why.

    Raises:
        PlanError: dual_nvlink was asked for and the first two cards have no NVLink, or may not use it.
    """
    kind = run.topology.kind
    if kind == TopologyKind.dual_nvlink:
        return kind.value, _require_nvlink(run, inventory)
    if kind != TopologyKind.auto:
        return kind.value, f"topology={kind.value} was asked for."
    if world_size == 2:
        return _auto_pair(run, inventory)
    where = "on the CPU" if inventory.source == "none" else f"on {_names(inventory.cards[:world_size])}"
    return PLAIN_TOPOLOGY[world_size].value, f"{count(world_size, 'rank')} {where}."


def _auto_pair(run: RunConfig, inventory: Inventory) -> tuple[str, str]:
    if inventory.source == "none":
        return "dual_pcie", "2 ranks on the CPU talk through host memory."
    pair = f"cards {_indices(inventory.cards[:2])} ({_names(inventory.cards[:2])})"
    if not _has_nvlink(inventory):
        return "dual_pcie", f"{pair} have no NVLink between them."
    if run.limits.peer_access == PeerAccess.off:
        return "dual_pcie", f"{pair} have NVLink, but limits.peer_access=off keeps it unused."
    return "dual_nvlink", f"{pair} are linked by NVLink."


def _require_nvlink(run: RunConfig, inventory: Inventory) -> str:
    """The reason for dual_nvlink where it was asked for and can be had."""
    if inventory.source == "none":
        raise PlanError("topology=dual_nvlink needs two cards with NVLink, but ranks run on the CPU here. "
                        "Set topology=dual_pcie or topology=auto.")  # fmt: skip
    pair = inventory.cards[:2]
    if not _has_nvlink(inventory):
        linked = next((link for link in inventory.links if link.kind == "nvlink"), None)
        other = (
            f" Cards {linked.first} and {linked.second} have: choose them with CUDA_VISIBLE_DEVICES." if linked else ""
        )
        raise PlanError(
            f"topology=dual_nvlink, but cards {_indices(pair)} ({_names(pair)}) have no NVLink between them; "
            f"RTX 4090s never have. Set topology=dual_pcie.{other}"
        )
    if run.limits.peer_access == PeerAccess.off:
        raise PlanError("topology=dual_nvlink uses peer access, but limits.peer_access=off forbids it. "
                        "Set limits.peer_access=auto or topology=dual_pcie.")  # fmt: skip
    return f"topology=dual_nvlink was asked for, and cards {_indices(pair)} ({_names(pair)}) are linked by NVLink."


def _has_nvlink(inventory: Inventory, world_size: int = 2) -> bool:
    """Whether the cards of the first ranks are linked by NVLink, each to all others."""
    linked = {frozenset((link.first, link.second)) for link in inventory.links if link.kind == "nvlink"}
    pairs = set(map(frozenset, combinations([card.index for card in inventory.cards[:world_size]], 2)))
    return bool(pairs) and pairs <= linked


def _indices(cards: tuple[Card, ...]) -> str:
    return " and ".join(str(card.index) for card in cards)


def _names(cards: tuple[Card, ...]) -> str:
    """Each distinct name once, in order."""
    return ", ".join(dict.fromkeys(card.name for card in cards))
