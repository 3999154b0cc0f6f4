"""Every way to run a model on some cards, for topology=all: what fits, ranked by an aim, and why the rest does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from launcher.config import Aim, DType, OffloadKind, RunConfig, TopologyKind
from launcher.hardware.inventory import Inventory
from launcher.models.shape import ModelShape, quantized_shape
from launcher.plan.plan import Plan
from launcher.plan.timed import plan_timed
from launcher.plan.topology import PlanError, place_ranks
from launcher.timing.predict import Times
from parallel.checkpoint.quantize_schemes import QUANTIZE_SCHEMES
from parallel.partition import PartitionError

# What is not quantised, by its dtype.
PLAIN = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


@dataclass(frozen=True)
class Option:
    """`replicas` copies of the model, each over `world_size` cards with tensor parallelism, in one format.

    All figures are predicted and of all copies together, but times and tokens a joule; `basis` says from what.
    `tpot_floor_ms`: as the plan's. `streamed_layers` come from host memory in every pass, or from the disk. `reason`
    says why it does not fit, or why it has no times; empty otherwise.
    """

    world_size: int
    replicas: int
    format: str
    fits: bool
    reason: str = ""
    predicted_bytes: int | None = None
    kv_tokens: int | None = None
    tpot_ms: float | None = None
    ttft_ms: float | None = None
    tokens_per_sec: float | None = None
    tpot_floor_ms: float | None = None
    tokens_per_joule: float | None = None
    basis: tuple[str, ...] = ()
    streamed_layers: int = 0


# What is least for the best option of an aim.
COSTS: dict[Aim, Callable[[Option], float]] = {
    Aim.latency: lambda option: option.tpot_ms or float("inf"),
    Aim.throughput: lambda option: -(option.tokens_per_sec or 0.0),
    Aim.context: lambda option: -(option.kv_tokens or 0),
}


def rank_options(
    run: RunConfig, shape: ModelShape, inventory: Inventory, num_cards: int, draft: ModelShape | None = None
) -> list[Option]:
    """All options on `num_cards` cards, the best first; those that do not fit are last.

    Args:
        draft: of the model that guesses, where one does; every copy has its own.
    """
    options = list(find_options(run, shape, inventory, num_cards, draft))
    cost = COSTS[run.plan.aim]
    return sorted(options, key=lambda option: (not option.fits, cost(option)))


def find_options(
    run: RunConfig, shape: ModelShape, inventory: Inventory, num_cards: int, draft: ModelShape | None
) -> Iterator[Option]:
    for world_size in range(1, num_cards + 1):
        for name, variant in variants(run, shape).items():
            option = Option(world_size, num_cards // world_size, name, fits=False)
            yield try_option(run, variant, inventory, option, draft)


def variants(run: RunConfig, shape: ModelShape) -> dict[str, ModelShape]:
    """The model as it is and in the formats that it could have instead; of two of one name, its own.

    Where it is quantised, its dtype does not tell what it would have otherwise: files of AWQ and GPTQ say float16.
    """
    if shape.quantization != "none":
        given = {shape.quantization: shape}
        plain = replace(
            shape, quantization="none", scheme=None, linear_bits=16.0, not_loadable="", dtype=DType.bfloat16.value
        )
    else:
        given, plain = {}, shape
    others = {name: quantized_shape(plain, name) for name in QUANTIZE_SCHEMES if name not in given}
    dtype = plain.dtype if run.model.dtype == DType.auto else run.model.dtype.value
    return given | {PLAIN[dtype]: plain} | others


def try_option(
    run: RunConfig, shape: ModelShape, inventory: Inventory, option: Option, draft: ModelShape | None
) -> Option:
    run = replace(run, gpus=option.world_size, topology=replace(run.topology, kind=TopologyKind.auto))
    run, inventory = share_host(run, inventory, option.replicas)
    if option.world_size * option.replicas > 1 and run.offload.enabled == OffloadKind.auto:
        # Among several cards, only what is on them is compared.
        run = replace(run, offload=replace(run.offload, enabled=OffloadKind.off))
    try:
        plan, times = plan_timed(run, place_ranks(run, option.world_size, inventory), shape, inventory, draft=draft)
    except PlanError as error:
        return replace(option, reason=error.summary)
    except PartitionError as error:
        return replace(option, reason=str(error))
    return with_times(option, plan, times)


def share_host(run: RunConfig, inventory: Inventory, replicas: int) -> tuple[RunConfig, Inventory]:
    """What one of several copies on a machine has of the host's memory."""
    limit = run.limits.host_memory_gib
    limits = replace(run.limits, host_memory_gib=None if limit is None else limit / replicas)
    total, free = inventory.host_memory_bytes // replicas, inventory.host_free_bytes // replicas
    return replace(run, limits=limits), replace(inventory, host_memory_bytes=total, host_free_bytes=free)


def with_times(option: Option, plan: Plan, times: Times | str) -> Option:
    fitting = replace(
        option,
        fits=True,
        predicted_bytes=max(card.predicted_bytes for card in plan.cards),
        kv_tokens=option.replicas * plan.kv_tokens_that_fit,
        tpot_floor_ms=plan.tpot_floor_ms,
        streamed_layers=0 if plan.offload is None else len(plan.offload.streamed_layers + plan.offload.disk_layers),
    )
    if not isinstance(times, Times):
        return replace(fitting, reason=times)
    return replace(
        fitting,
        tpot_ms=times.tpot_ms,
        ttft_ms=times.ttft_ms,
        tokens_per_sec=option.replicas * times.tokens_per_sec,
        tokens_per_joule=times.tokens_per_joule,
        basis=(times.source, *times.assumptions),
    )
