"""What a run will take and whether it fits, decided before anything is loaded.

RunConfig + ModelShape + Inventory -> Plan. Every number in a plan is a prediction.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from launcher.config import DType, RunConfig, SpeculationKind, TaskKind
from launcher.hardware.inventory import Card, Inventory
from launcher.memory.demand import Demand
from launcher.memory.fit import largest_context
from launcher.memory.layer import cublas_bytes
from launcher.models.shape import ModelShape
from launcher.plan.context import choose_context
from launcher.plan.offload import OffloadPlan, check_disk, check_shared, plan_offload
from launcher.plan.offload_choice import stream_layers
from launcher.plan.offload_disk import largest_host_context
from launcher.plan.prefill import capture_passes, hides_sums, planned_fused_rows, wanted_passes
from launcher.plan.topology import Placement, PlanError, cards_knob, communicator_key
from parallel.footprint import MIN_FUSED_ROWS
from parallel.partition import choose_grain
from parallel.units import GIB, MIB

# The driver keeps part of a card: of 23.99 GiB that NVML reports for an RTX 4090, CUDA offers 23.61 to 23.68
# (capacities in public PyTorch out-of-memory messages).
DRIVER_RESERVED_BYTES = 400 * MIB


@dataclass(frozen=True)
class CardPlan:
    """One rank: its card (CUDA index; None on the CPU) and the predicted bytes on it, line by line."""

    rank: int
    card: int | None
    name: str
    lines: dict[str, int]
    predicted_bytes: int
    budget_bytes: int


@dataclass(frozen=True)
class Plan:
    """What a run with a model will do and take; made before any rank starts, and followed by all of them."""

    placement: Placement
    dtype: str
    # Rows in which MLP and vocabulary are dealt over the ranks.
    grain: int
    # The same for the draft model, where there is one.
    draft_grain: int | None
    max_context: int
    max_context_reason: str
    batch_size: int
    # Of the rank that holds most, for one sequence, wherever they lie.
    kv_bytes_per_token: int
    # Tokens of all sequences together for which there is room, with what grows beside their keys and values.
    kv_tokens_that_fit: int
    cards: tuple[CardPlan, ...]
    # The least that a step of the workload takes, whatever the program: reading each byte of weights, keys and values
    # once at the card's published memory bandwidth, or copying what is streamed, which goes on meanwhile. None where a
    # speed is unknown or a step may do otherwise: drafts give it several tokens, and the host may compute layers.
    tpot_floor_ms: float | None
    # None where all layers are on the cards.
    offload: OffloadPlan | None = None
    # Passes of prompts that are captured as graphs at a time; and whether they would be if they fitted.
    captured_passes: int = 0
    captured_passes_left_out: bool = False
    # Rows of a product up to which no packed weight is dequantised, which memory counts on.
    fused_rows: int = MIN_FUSED_ROWS
    # Tokens of prompt in a pass while answers are under way (None: as many as otherwise), and what a token then waits
    # for it and its step, where rates tell.
    prefill_chunk_while_decoding: int | None = None
    longest_wait_ms: float | None = None


def plan_run(
    run: RunConfig,
    placement: Placement,
    shape: ModelShape,
    inventory: Inventory,
    *,
    draft: ModelShape | None = None,
) -> Plan:
    """Decides dtype, context and bytes per card.

    Args:
        draft: of the model that guesses, where one does.

    Raises:
        PlanError: the run cannot work here, or does not fit; the message says what would.
        PartitionError: a dimension of the model is too small for that many ranks.
    """
    _check_model(run, placement.world_size, shape, draft)
    wanted = _wanted_demand(run, placement, shape, inventory, draft)
    budgets = _budgets(run, placement.world_size, inventory)
    demand = _placed_demand(run, wanted, budgets, inventory)
    max_context, max_context_reason = choose_context(run, demand, budgets, inventory)
    offload = plan_offload(run, demand, budgets, inventory, max_context)
    return Plan(
        placement=placement,
        dtype=demand.dtype,
        grain=demand.grain,
        draft_grain=None if demand.draft is None else demand.draft.grain,
        max_context=max_context,
        max_context_reason=max_context_reason,
        batch_size=demand.batch_size,
        kv_bytes_per_token=max(demand.kv_bytes_per_token()),
        kv_tokens_that_fit=_kv_tokens_that_fit(run, demand, budgets, inventory),
        cards=_plan_cards(demand, budgets, max_context, placement),
        tpot_floor_ms=_tpot_floor_ms(run, demand, inventory.cards[: placement.world_size], offload),
        offload=offload,
        captured_passes=0 if offload else demand.captured_passes,
        captured_passes_left_out=offload is None and demand.captured_passes < wanted.captured_passes,
        fused_rows=demand.fused_rows,
        # A pass that streams layers costs the same for few tokens.
        prefill_chunk_while_decoding=None if offload else run.engine.untimed_chunk,
    )


def _wanted_demand(
    run: RunConfig, placement: Placement, shape: ModelShape, inventory: Inventory, draft: ModelShape | None
) -> Demand:
    """What the bytes of such a run depend on if it has all it wants on its cards.

    Raises:
        PlanError: as demand_of.
    """
    demand, cards = demand_of(run, placement, shape, draft), inventory.cards[: placement.world_size]
    return replace(
        demand,
        captured_passes=wanted_passes(run, placement, inventory),
        fused_rows=planned_fused_rows(run, demand, cards),
        cublas_bytes=cublas_bytes(card.compute_capability for card in cards),
    )


def _placed_demand(run: RunConfig, wanted: Demand, budgets: tuple[int, ...], inventory: Inventory) -> Demand:
    """`wanted` without captured passes, and with layers in host memory or on the disk, where it must be.

    Raises:
        PlanError: layers would be where the run cannot have them.
    """
    demand = stream_layers(run, capture_passes(run, wanted, budgets), budgets, inventory)
    check_shared(run, demand)
    check_disk(run, demand)
    return demand


def demand_of(run: RunConfig, placement: Placement, shape: ModelShape, draft: ModelShape | None) -> Demand:
    """What the bytes of such a run depend on, nothing being streamed.

    Raises:
        PlanError: the dtype cannot be run on that device.
    """
    return Demand(
        shape=shape,
        world_size=placement.world_size,
        grain=choose_grain((shape.intermediate_size, shape.vocab_size), placement.world_size),
        dtype=_choose_dtype(run, shape, placement.device),
        kv_dtype=run.engine.kv_dtype.value,
        device=placement.device,
        transport=communicator_key(placement.transport, over_nvlink=placement.over_nvlink),
        batch_size=run.workload.batch_size,
        prefill_chunk=run.engine.prefill_chunk,
        rows_per_sequence=run.rows_per_sequence,
        draft_rows=run.speculation.draft_rows,
        drafting_rows=run.speculation.drafting_rows,
        drafting_passes=run.speculation.drafting_passes,
        num_ahead=run.num_ahead,
        is_sampled=run.sampling.temperature > 0,
        draft_shape=draft,
        may_share=run.offload.host_layers != 0,
        hides_sums=hides_sums(run, over_nvlink=placement.over_nvlink),
    )


def _check_model(run: RunConfig, world_size: int, shape: ModelShape, draft: ModelShape | None) -> None:
    """Raises PlanError: the model, or the one that guesses, cannot be loaded, or not by so many ranks."""
    for each in (shape, *([] if draft is None else [draft])):
        _check_loadable(run, each)
    _check_heads(run, world_size, shape)


def _check_loadable(run: RunConfig, shape: ModelShape) -> None:
    if run.task.kind != TaskKind.plan and shape.not_loadable:
        raise PlanError(
            f"weights quantised as {shape.quantization}: {shape.not_loadable} "
            "Set model.path to another checkpoint of the model, or task=plan to see what this one would take."
        )


def _check_heads(run: RunConfig, world_size: int, shape: ModelShape) -> None:
    if shape.num_kv_heads < world_size:
        raise PlanError(
            f"the model has {shape.num_kv_heads} KV heads; over {world_size} ranks some would hold none. "
            f"Use {cards_knob(run, shape.num_kv_heads)}."
        )


def _choose_dtype(run: RunConfig, shape: ModelShape, device: str) -> str:
    dtype = shape.dtype if run.model.dtype == DType.auto else run.model.dtype.value
    if run.model.dtype == DType.auto and shape.scheme is not None and dtype == DType.float16.value:
        # AWQ and GPTQ files say float16 whatever the model was trained in; the kernels of cards and CPUs want bfloat16.
        return DType.bfloat16.value
    if dtype == DType.float16.value and device == "cpu":
        raise PlanError("float16 is slow or missing on CPUs. Set model.dtype=float32 (or bfloat16).")
    return dtype


def _budgets(run: RunConfig, world_size: int, inventory: Inventory) -> tuple[int, ...]:
    """Bytes that each rank may use."""
    if inventory.source == "none":
        share_bytes = inventory.host_memory_bytes // world_size
        return (min(_known(share_bytes, _limit_bytes(run))),) * world_size
    return tuple(_card_budget(run, card) for card in inventory.cards[:world_size])


def _card_budget(run: RunConfig, card: Card) -> int:
    sizes = list(_known(card.memory_bytes, _limit_bytes(run)))
    if not sizes:
        raise PlanError(f"the driver does not tell the memory of card {card.index} ({card.name}). "
                        "Set limits.card_memory_gib.")  # fmt: skip
    budget = max(min(sizes) - DRIVER_RESERVED_BYTES, 0)
    # A plan is about the machine; a run has to live with what others have taken.
    if run.task.kind == TaskKind.plan or card.free_bytes is None:
        return budget
    return min(budget, card.free_bytes)


def _limit_bytes(run: RunConfig) -> int:
    return round((run.limits.card_memory_gib or 0) * GIB)


def _known(*sizes: int) -> Iterable[int]:
    return (size for size in sizes if size)


def _plan_cards(
    demand: Demand, budgets: tuple[int, ...], max_context: int, placement: Placement
) -> tuple[CardPlan, ...]:
    return tuple(
        CardPlan(rank, card, name, lines, predicted_bytes=sum(lines.values()), budget_bytes=budget)
        for rank, (card, name, lines, budget) in enumerate(
            zip(placement.cards, placement.names, demand.lines(max_context), budgets, strict=True)
        )
    )


def _kv_tokens_that_fit(run: RunConfig, demand: Demand, budgets: tuple[int, ...], inventory: Inventory) -> int:
    """Of all sequences, each with the most that it could have if only memory set a limit."""
    most = largest_context(demand, budgets, max(budgets))
    return demand.batch_size * largest_host_context(run, demand, inventory, most)


def _tpot_floor_ms(
    run: RunConfig, demand: Demand, cards: tuple[Card, ...], offload: OffloadPlan | None
) -> float | None:
    """Every step reads all weights but the embedding, of which it reads few rows; a tied head is read as the head.

    What is streamed is copied at the same time, to be read as all else.
    """
    if run.speculation.kind != SpeculationKind.none or (offload is not None and offload.host_may_compute):
        return None
    num_tokens = run.attended_tokens
    times_ms = []
    resident = replace(demand, num_streamed=0)
    for card, lines, token_bytes in zip(cards, resident.fixed_lines(), demand.kv_bytes_per_token(), strict=False):
        unread = () if demand.shape.tied_embeddings else ("weights.embedding",)
        num_bytes = sum(size for name, size in lines.items() if name.startswith("weights.") and name not in unread)
        if card.memory_gb_per_sec is None:
            return None
        times_ms.append((num_bytes + token_bytes * num_tokens) / (card.memory_gb_per_sec * 1e9) * 1e3)
    if offload is not None:
        if offload.pass_ms is None:
            return None
        times_ms.append(offload.pass_ms + offload.kv_token_ms * num_tokens)
    return max(times_ms, default=None)
