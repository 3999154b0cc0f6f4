"""What a run asks of SLURM: cards, cores, host memory and minutes, each with where its figure comes from."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from importlib.resources import files

from omegaconf import OmegaConf

from launcher.config import HardwareConfig, HardwareKind, RunConfig, TaskConfig, TaskKind
from launcher.hardware.inventory import Inventory, read_inventory
from launcher.memory.weights import stored_bytes
from launcher.models.draft import find_draft
from launcher.models.find import find_model
from launcher.plan.plan import Plan, plan_run
from launcher.plan.timed import predict_run, with_chunk
from launcher.plan.topology import place_ranks, resolve_world_size
from launcher.prompt_lengths import estimate_longest_prompt, with_prompts_of
from launcher.run import WITHOUT_MODEL
from launcher.slurm.duration import (
    Duration,
    minutes_of,
    minutes_without_model,
)
from launcher.timing.predict import Times
from parallel.units import GIB

# Host memory of a rank beside its card, in GiB. Two ranks of a 70B in 4 bits peaked at 3.0 to 3.1 each, files of
# libraries included (`host_peak_bytes`, results/early_start_h200_202611.json); four ranks have .25 more of slots of
# transports, and the rest is left over. What the kernel counts of files that were read is given back before memory
# runs out.
RANK_GIB = 5
# The process that starts the ranks, with torch, Hydra and telemetry: .25 measured on a CPU; plots of a sweep, and room.
PARENT_GIB = 2
# Ranks on the CPU have their model in host memory; measured peaks were up to 5 % above the predicted ones.
CPU_MARGIN = 1.25
# One that launches kernels, and readers of the checkpoint or threads of the product on a CPU.
CORES_PER_RANK = 4
# Cards that a login node without any plans for.
DEFAULT_CARDS = "rtx4090"
# Why there is no time for task=predictions.
GRID_REASON = "its workloads are many"


@dataclass(frozen=True)
class Needs:
    """What one job takes; `why` has a sentence for each of cards, cores, memory and time."""

    num_cards: int
    num_cores: int
    memory_gib: int
    minutes: int
    why: dict[str, str]


def find_needs(run: RunConfig, cards: str = DEFAULT_CARDS) -> Needs:
    """The needs of a run, from its plan; the model's config.json is all that this may download.

    Args:
        cards: of conf/hardware, to plan with where this machine has not as many cards as the run.

    Raises:
        ValueError: the run cannot work on such cards, or does not fit.
    """
    num_ranks = resolve_world_size(run, None)
    if run.task.kind == TaskKind.plan:
        raise ValueError("task=plan needs no card and takes a second: run it here.")
    hardware = choose_hardware(run, num_ranks, cards)
    planned, inventory = as_planned(run, hardware), read_inventory(hardware, num_ranks)
    if run.task.kind in WITHOUT_MODEL:
        return build_needs(run, num_ranks, inventory, None, minutes_without_model(run))
    model = find_model(planned, lambda shape: None)
    draft = find_draft(planned, model.shape, model.folder)
    shapes = [model.shape, *([] if draft is None else [draft.shape])]
    placement = place_ranks(planned, num_ranks, inventory)
    timed = with_prompts_of(planned, run.num_prompt_tokens or estimate_longest_prompt(run))
    plan = plan_run(planned, placement, model.shape, inventory, draft=None if draft is None else draft.shape)
    times: Times | str = GRID_REASON
    if run.task.kind != TaskKind.predictions:
        times = predict_run(timed, with_chunk(timed, plan, model.shape, inventory), model.shape, inventory)
    return build_needs(run, num_ranks, inventory, plan, minutes_of(run, times, sum(map(stored_bytes, shapes))))


def choose_hardware(run: RunConfig, num_ranks: int, cards: str) -> HardwareConfig:
    """This machine's cards where it has enough, else such ones; the CPU where the run says so."""
    if run.hardware.kind != HardwareKind.local:
        return run.hardware
    here = read_inventory(run.hardware, num_ranks)
    return run.hardware if len(here.cards) >= num_ranks else hardware_of(cards)


def hardware_of(name: str) -> HardwareConfig:
    """Facts of conf/hardware.

    Raises:
        ValueError: there is no such file, or it describes no cards.
    """
    folder = files("conf") / "hardware"
    known = sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if "facts" in file.read_text())
    if name not in known:
        raise ValueError(f"--cards {name}: no such cards are described. Known: {', '.join(known)}.")
    values = OmegaConf.create((folder / f"{name}.yaml").read_text())
    found = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(HardwareConfig), values))
    assert isinstance(found, HardwareConfig), found
    return found


def as_planned(run: RunConfig, hardware: HardwareConfig) -> RunConfig:
    """`run` as task=plan sees it: the memory that others have taken here now does not count, and prompts that are not
    counted yet may be of any length."""
    tokens = None if run.task.kind == TaskKind.generate else run.num_prompt_tokens
    return with_prompts_of(replace(run, task=TaskConfig(TaskKind.plan), hardware=hardware), tokens)


def build_needs(run: RunConfig, num_ranks: int, inventory: Inventory, plan: Plan | None, duration: Duration) -> Needs:
    on_cpu = inventory.source == "none"
    memory_gib, memory_why = memory_on_cpu(plan) if on_cpu and plan else memory_beside_cards(num_ranks, plan)
    name = inventory.cards[0].name if inventory.cards else "CPU"
    cards = f"ranks on the CPU, by hardware={run.hardware.name}." if on_cpu else f"one a rank; planned for {name}."
    return Needs(
        num_cards=0 if on_cpu else num_ranks,
        num_cores=CORES_PER_RANK * num_ranks,
        memory_gib=memory_gib,
        minutes=duration.minutes,
        why={
            "cards": cards,
            "cores": f"{CORES_PER_RANK} a rank.",
            "memory": memory_why,
            "time": duration.why,
        },
    )


def memory_beside_cards(num_ranks: int, plan: Plan | None) -> tuple[int, str]:
    """GiB, and why."""
    offload = None if plan is None else plan.offload
    streamed = 0.0 if offload is None else sum((*offload.host_bytes, *offload.ring_bytes, *offload.kv_host_bytes)) / GIB
    what = "streamed layers" + (", their keys and values" if offload is not None and any(offload.kv_host_bytes) else "")
    why = f"estimated, {RANK_GIB} GiB a rank and {PARENT_GIB} for their parent"
    why += f"; predicted, {streamed:.2f} GiB of {what}." if streamed else "; the model is on the cards."
    return RANK_GIB * num_ranks + PARENT_GIB + math.ceil(streamed), why


def memory_on_cpu(plan: Plan) -> tuple[int, str]:
    predicted = sum(card.predicted_bytes for card in plan.cards) / GIB
    why = f"{predicted:.2f} GiB predicted for the ranks, a quarter more, and {PARENT_GIB} GiB for their parent."
    return math.ceil(predicted * CPU_MARGIN) + PARENT_GIB, why
