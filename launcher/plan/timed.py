"""Which rates a run is predicted with: those measured on such cards, else those that published facts give."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from launcher.amounts import count
from launcher.config import (
    RANDOM_PROMPT_TOKENS,
    HardwareConfig,
    HardwareKind,
    PeerAccess,
    RunConfig,
    SpeculationKind,
    TransportKind,
)
from launcher.config.engine import AUTO
from launcher.config.workload import middle_tokens
from launcher.hardware.inventory import Inventory
from launcher.models.shape import ModelShape
from launcher.plan.plan import Plan, demand_of, plan_run
from launcher.plan.topology import Placement
from launcher.timing.chunk_choice import predict_chunk
from launcher.timing.fit import Calibration, fit_rates, with_older
from launcher.timing.load import Workload
from launcher.timing.power_draw import EnergyBetween, Load, find_power_draws
from launcher.timing.predict import Copies, Times, predict_times
from launcher.timing.published import Facts, rates_from_facts
from launcher.timing.rates import Rates
from launcher.timing.store import calibration_path, load_calibration, save_calibration
from launcher.timing.work import work_of

NEEDED_FACTS = ("memory_gb_per_sec", "bf16_tflops", "pcie_generation", "pcie_lanes")
# Facts give the times of sums through host memory, in 16 bits.
SUMS_BY_NCCL = "what sums take through NCCL alone (engine.transport=nccl)"
WHOLE_SUMS = "sums are of 16 bits, engine.all_reduce_bits=8 left out"


def plan_timed(
    run: RunConfig,
    placement: Placement,
    shape: ModelShape,
    inventory: Inventory,
    *,
    draft: ModelShape | None = None,
) -> tuple[Plan, Times | str]:
    """As plan_run, with what times decide; and as predict_run."""
    plan = with_chunk(run, plan_run(run, placement, shape, inventory, draft=draft), shape, inventory)
    return plan, predict_run(run, plan, shape, inventory)


def with_chunk(run: RunConfig, plan: Plan, shape: ModelShape, inventory: Inventory) -> Plan:
    """`plan` with the chunk of prompts while answers are written that suits the machine, where its rates are known and
    engine.prefill_chunk_while_decoding leaves it open."""
    is_open = run.engine.prefill_chunk_while_decoding == AUTO and plan.offload is None
    rates = find_rates(run, plan.placement, inventory) if is_open and plan.placement.device == "cuda" else None
    if rates is None:
        return plan
    context = middle_tokens(run.num_prompt_tokens or RANDOM_PROMPT_TOKENS, run.workload.output_tokens)
    sizes = {"prefill_chunk": run.engine.prefill_chunk, "batch_size": plan.batch_size, "context": context}
    try:
        found = predict_chunk(work_of(demand_of(run, plan.placement, shape, None)), rates, **sizes)
    except ValueError:
        # predict_run says why.
        return plan
    return replace(plan, prefill_chunk_while_decoding=found.tokens, longest_wait_ms=found.wait_ms)


def predict_run(run: RunConfig, plan: Plan, shape: ModelShape, inventory: Inventory) -> Times | str:
    """The times of a run's workload, or why none can be told."""
    if plan.placement.device == "cpu":
        return "there are no rates of CPUs"
    if run.speculation.kind != SpeculationKind.none:
        return "with speculation they hang on how many drafts are accepted"
    rates = find_rates(run, plan.placement, inventory)
    if rates is None:
        return without_rates(run, plan.placement)
    return predict_by(rates, run, plan, shape)


def predict_by(rates: Rates, run: RunConfig, plan: Plan, shape: ModelShape) -> Times | str:
    """As `predict_run`, on a machine of these rates."""
    prompt_tokens = run.num_prompt_tokens
    if prompt_tokens is None:
        return "workload.prompt_tokens is not set"
    load = Workload(
        run.workload.batch_size,
        prompt_tokens,
        run.workload.output_tokens,
        run.engine.prefill_chunk,
        plan.prefill_chunk_while_decoding or run.engine.prefill_chunk,
    )
    pass_ms, kv_token_ms = (0.0, 0.0) if plan.offload is None else (plan.offload.pass_ms, plan.offload.kv_token_ms)
    if pass_ms is None:
        return "layers are streamed over a link that is not known"
    copies = Copies(pass_ms, kv_token_ms)
    try:
        times = predict_times(work_of(demand_of(run, plan.placement, shape, None)), load, rates, copies)
    except ValueError as error:
        return str(error)
    return replace(times, assumptions=(*times.assumptions, *one_batch(run), *copied_layers(plan)))


def one_batch(run: RunConfig) -> list[str]:
    """What times leave out of a workload of more than that."""
    left_out = run.workload.beyond_a_batch()
    requests = count(run.workload.batch_size, "request")
    return [f"of {requests} at once, {' and '.join(left_out)} left out"] if left_out else []


def copied_layers(plan: Plan) -> list[str]:
    """That a trial has yet to say what the host computes, where it may."""
    may_compute = plan.offload is not None and plan.offload.host_may_compute
    return ["every streamed layer is copied, what the host computes left out"] if may_compute else []


def find_rates(run: RunConfig, placement: Placement, inventory: Inventory) -> Rates | None:
    measured = load_calibration(rates_path(run, placement, inventory))
    if measured is not None:
        return fit_rates(measured)
    if run.hardware.kind != HardwareKind.facts or untold(run, placement):
        return None
    rates = rates_from_facts(facts_of(run.hardware), placement.world_size)
    is_rounded = placement.world_size > 1 and run.engine.all_reduce_bits == 8
    return replace(rates, assumptions=(*rates.assumptions, *([WHOLE_SUMS] if is_rounded else [])))


def untold(run: RunConfig, placement: Placement) -> list[str]:
    """What times of a run on described cards need, and facts do not say."""
    unknown = [f"hardware.{name}" for name in NEEDED_FACTS if not getattr(run.hardware, name)]
    is_by_nccl = placement.world_size > 1 and run.engine.transport == TransportKind.nccl
    return [*unknown, *([SUMS_BY_NCCL] if is_by_nccl else [])]


def without_rates(run: RunConfig, placement: Placement) -> str:
    """Why a run has none, and how it would have some."""
    if run.hardware.kind == HardwareKind.facts:
        return f"hardware={run.hardware.name} does not say {' and '.join(untold(run, placement))}"
    return "this machine's rates are not known: task=calibrate measures them in a minute"


def rates_path(run: RunConfig, placement: Placement, inventory: Inventory) -> Path:
    """Where the calibration of such a run is kept."""
    engine, peers = run.engine, has_peer_access(run, placement, inventory)
    sums = [engine.transport.value] if engine.transport != TransportKind.auto else []
    sums += ["8-bit-sums"] if engine.all_reduce_bits == 8 else []
    return calibration_path(placement.names[0], placement.world_size, peer_access=peers, sums=sums)


def has_peer_access(run: RunConfig, placement: Placement, inventory: Inventory) -> bool:
    """Whether every two cards of the run can read each other's memory, and may."""
    if run.limits.peer_access == PeerAccess.off:
        return False
    links = [link for link in inventory.links if link.second < placement.world_size]
    return all(bool(link.peer_access) for link in links)


def keep_calibration(
    run: RunConfig, placement: Placement, inventory: Inventory, report: dict[str, Any], energy_between: EnergyBetween
) -> Path:
    """Stores what task=calibrate measured where the next plans look for it, with what cards drew under its loads."""
    calibration = TypeAdapter(Calibration).validate_python(report["calibration"])
    loads = TypeAdapter(list[Load]).validate_python(report["loads"])
    path = rates_path(run, placement, inventory)
    calibration = replace(calibration, power_draws=find_power_draws(loads, energy_between, placement.world_size))
    save_calibration(path, with_older(calibration, load_calibration(path)))
    return path


def facts_of(hardware: HardwareConfig) -> Facts:
    return Facts(
        name=hardware.name,
        memory_gb_per_sec=hardware.memory_gb_per_sec,
        bf16_tflops=hardware.bf16_tflops,
        pcie_generation=hardware.pcie_generation,
        pcie_lanes=hardware.pcie_lanes,
        power_w=hardware.power_limit_w or None,
        compute_capability=hardware.compute_capability or None,
    )
