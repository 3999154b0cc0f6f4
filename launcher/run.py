"""The life of a run in the parent: decide, start the ranks, watch, report. Each step is one function here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.config import RunConfig, TaskKind
from launcher.console import print_plan, print_report
from launcher.events import EventFollower
from launcher.hardware import Inventory, read_inventory
from launcher.job import Job, save_job
from launcher.model_files import download_model, find_local_model
from launcher.plan import Plan, plan_run, resolve_world_size
from launcher.prompts import prompts_to_do, read_prompts
from launcher.report import build_report, plan_report
from launcher.shape import ModelShape, shape_from_checkpoint, shape_from_facts
from launcher.telemetry import Telemetry
from parallel.checkpoint.headers import read_checkpoint

StartRanks = Callable[[Job, Path], None]


@dataclass(frozen=True)
class Decision:
    """Everything that is settled before a rank starts. `folder` is None where facts stand in for a checkpoint."""

    plan: Plan
    shape: ModelShape
    inventory: Inventory
    folder: Path | None


def execute(run: RunConfig, run_dir: Path, start_ranks: StartRanks, env_world_size: int | None) -> dict[str, Any]:
    """Runs `run` and returns its report.

    Raises:
        ValueError: something the user typed cannot be run; nothing was started.
        RunFailed: ranks were started and one failed.
    """
    decision = decide(run, env_world_size)
    print_plan(run, decision.plan, decision.shape)
    if run.task.kind == TaskKind.plan:
        return plan_report(run, decision.plan, decision.shape, run_dir)
    job = build_job(run, run_dir, decision)
    with (
        Telemetry(run_dir, decision.inventory, used_cards(decision.plan)) as telemetry,
        EventFollower(run_dir),
    ):
        start_ranks(job, save_job(job))
    report = build_report(job, decision.shape, decision.inventory, telemetry)
    print_report(report)
    return report


def decide(run: RunConfig, env_world_size: int | None) -> Decision:
    """Finds the model and the cards and plans the run; what cannot work is refused here, in seconds."""
    world_size = resolve_world_size(run, env_world_size)
    inventory = read_inventory(run.hardware, world_size)
    folder = find_local_model(run.model)
    use_facts = folder is None and run.task.kind == TaskKind.plan and run.model.shape is not None
    if folder is None and not use_facts:
        folder = download_model(run.model)
    if folder is None:
        assert run.model.shape is not None
        shape = shape_from_facts(run.model.shape)
    else:
        shape = shape_from_checkpoint(folder)
        read_checkpoint(folder)
    return Decision(plan_run(run, world_size, shape, inventory), shape, inventory, folder)


def build_job(run: RunConfig, run_dir: Path, decision: Decision) -> Job:
    assert decision.folder is not None, "only task=plan does without a checkpoint"
    job = Job(run, decision.plan, str(decision.folder), str(run_dir), (), decision.inventory.host_cores)
    if run.task.kind != TaskKind.generate:
        return job
    prompts = read_prompts(run)
    if run.prompts_file is not None:
        prompts = prompts_to_do(prompts, job.output_path, resume=run.resume)
    return Job(run, decision.plan, job.model_folder, str(run_dir), prompts, job.host_cores)


def used_cards(plan: Plan) -> list[int]:
    return [card.card for card in plan.cards if card.card is not None]
