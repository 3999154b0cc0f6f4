"""Which layers a run streams from host memory, what that takes there, and how long it makes a pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from launcher.config import RunConfig, TaskKind
from launcher.hardware import Card, Inventory
from launcher.memory import Demand
from launcher.memory_fit import fits
from launcher.offload_config import OffloadKind
from launcher.plan_refusal import refuse_host_memory
from launcher.topology import PlanError
from launcher.units import GIB
from parallel.kernels.held import host_refusal
from parallel.offload.spread import spread_layers

# Of host memory for the process of a rank beside its layers: Python, torch and CUDA, and buffers for reading.
HOST_BYTES_PER_RANK = 4 * GIB
# What copies from pinned memory reach, by PCIe generation, over 16 lanes: 55 measured on an H200 (5.0); 25 and 12.4 are
# usual of 4.0 and 3.0, 0.8 of what the lanes carry.
COPY_GB_PER_SEC = {3: 12.4, 4: 25.0, 5: 55.0}
FULL_LANES = 16


@dataclass(frozen=True)
class OffloadPlan:
    """Layers that lie in host memory; `reason` says why they do."""

    streamed_layers: tuple[int, ...]
    resident_layers: int
    reason: str
    # On each rank: of host memory, for these layers and the embedding; and what of it a pass copies to the card.
    host_bytes: tuple[int, ...]
    pass_bytes: tuple[int, ...]
    # Of each rank's link, predicted; None where its generation is not known.
    copy_gb_per_sec: tuple[float | None, ...]
    # Whether the host computes some of these layers if a trial shows that to be faster; then steps copy less.
    host_may_compute: bool = False

    @property
    def pass_ms(self) -> float | None:
        """What the copies of a pass take on the slowest rank; None where a link is not known."""
        times_ms = []
        for num_bytes, rate in zip(self.pass_bytes, self.copy_gb_per_sec, strict=True):
            if rate is None:
                return None
            times_ms.append(num_bytes / (rate * 1e9) * 1e3)
        return max(times_ms)


def choose_num_streamed(
    run: RunConfig, demand: Demand, budgets: tuple[int, ...], needed: int, wanted: int, kept_free: float
) -> int:
    """How many layers to stream: none where the run fits without, or may not; else the fewest that make it fit.

    Args:
        needed: tokens of a sequence without which the run cannot be; `wanted`: those to make room for.
        kept_free: share of each budget that stays unused.

    Raises:
        PlanError: offload.resident_layers exceeds the layers of the model.
    """
    num_layers, resident = demand.shape.num_layers, run.offload.resident_layers
    if resident is not None:
        if resident > num_layers:
            raise PlanError(f"offload.resident_layers={resident} exceeds the model's {num_layers} layers. Lower it.")
        return num_layers - resident
    if not MUST_STREAM[run.offload.enabled](demand, budgets, needed):
        return 0
    room = tuple(round(budget * (1 - kept_free)) for budget in budgets)
    fitting = (num for num in range(1, num_layers) if fits(replace(demand, num_streamed=num), room, wanted))
    return next(fitting, num_layers)


def weights_exceed(demand: Demand, budgets: tuple[int, ...], needed: int) -> bool:
    """Whether those alone are too much for a single card."""
    return demand.device == "cuda" and demand.world_size == 1 and sum(demand.fixed_lines()[0].values()) > budgets[0]


def run_exceeds(demand: Demand, budgets: tuple[int, ...], needed: int) -> bool:
    return not fits(demand, budgets, needed)


def never(demand: Demand, budgets: tuple[int, ...], needed: int) -> bool:
    return False


MUST_STREAM: dict[OffloadKind, Callable[[Demand, tuple[int, ...], int], bool]] = {
    OffloadKind.auto: weights_exceed,
    OffloadKind.on: run_exceeds,
    OffloadKind.off: never,
}


def plan_offload(run: RunConfig, demand: Demand, budgets: tuple[int, ...], inventory: Inventory) -> OffloadPlan | None:
    """What `demand.num_streamed` layers in host memory mean; None where there are none.

    Raises:
        PlanError: host memory does not suffice; the message has the sizes.
    """
    if demand.num_streamed == 0:
        return None
    check_shared(run, demand)
    host_bytes = demand.host_bytes()
    if inventory.source == "nvml":
        free_bytes = inventory.host_memory_bytes if run.task.kind == TaskKind.plan else inventory.host_free_bytes
        needed_bytes = sum(host_bytes) + demand.world_size * HOST_BYTES_PER_RANK
        if needed_bytes > free_bytes:
            raise refuse_host_memory(demand, budgets, inventory, needed_bytes, free_bytes)
    return OffloadPlan(
        streamed_layers=spread_layers(demand.shape.num_layers, demand.num_streamed),
        resident_layers=demand.shape.num_layers - demand.num_streamed,
        reason=_reason(run, demand),
        host_bytes=host_bytes,
        pass_bytes=tuple(demand.num_streamed * size for size in demand.layer_bytes()),
        copy_gb_per_sec=tuple(map(copy_gb_per_sec, inventory.cards[: demand.world_size])) or (None,) * len(host_bytes),
        host_may_compute=demand.host_computes,
    )


def check_shared(run: RunConfig, demand: Demand) -> None:
    """Raises PlanError: the host is to compute layers, and cannot."""
    if not run.offload.host_layers or demand.device != "cuda":
        return
    scheme = demand.shape.scheme
    why_not = "only linears of 4 bits" if scheme is None else host_refusal(scheme, demand.dtype)
    if why_not is not None:
        raise PlanError(
            f"offload.host_layers={run.offload.host_layers}: the host computes {why_not}. Leave it out, or set "
            "model.quantize=int4 for a checkpoint in 16 or 32 bits, and model.dtype=bfloat16."
        )


def _reason(run: RunConfig, demand: Demand) -> str:
    if run.offload.resident_layers is not None:
        return "offload.resident_layers was set."
    fewer_bits = "; model.quantize=int4 streams less, or nothing" if demand.shape.quantization == "none" else ""
    return f"what does not fit beside cache and activations{fewer_bits}."


def copy_gb_per_sec(card: Card) -> float | None:
    """Of a copy from pinned memory; None where the link is not known."""
    rate = COPY_GB_PER_SEC.get(card.pcie_generation or 0)
    return None if rate is None or not card.pcie_lanes else rate * card.pcie_lanes / FULL_LANES
