"""The life of a run in the parent: decide, start the ranks, watch, report. Each step is one function here."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from launcher.baseline_runs import run_baselines
from launcher.config import ConfigError, HardwareKind, RunConfig, TaskKind, TopologyKind, WeightsKind
from launcher.failures import Failure, RunFailed
from launcher.hardware.inventory import Inventory, read_inventory
from launcher.job import Job
from launcher.locks import held_output
from launcher.models.disk_files import find_disk_folder, measure_disk
from launcher.models.draft import find_draft
from launcher.models.find import Model, find_model
from launcher.plan.grid import largest_plan, plan_grid
from launcher.plan.options import rank_options
from launcher.plan.plan import Plan, plan_run
from launcher.plan.prefill import wanted_passes
from launcher.plan.timed import keep_calibration, plan_timed
from launcher.plan.topology import Placement, place_ranks, resolve_world_size
from launcher.processes.start import StartRanks
from launcher.prompt_lengths import answered_times, longest_prompt, wants_lengths, with_prompts_of
from launcher.prompts import Prompt, cut_last_line, prompts_to_do, read_prompts
from launcher.report.console import print_note, print_options, print_plan, print_report, print_warning
from launcher.report.report import base_report, build_report, read_results
from launcher.report.slow import slow_parts
from launcher.telemetry.sampler import Telemetry
from launcher.timing.predict import Times
from launcher.watch import watch_ranks

WITHOUT_MODEL = (TaskKind.probe, TaskKind.calibrate)


def execute(run: RunConfig, run_dir: Path, start_ranks: StartRanks, env_world_size: int | None) -> dict[str, Any]:
    """Runs `run` and returns its report.

    Raises:
        ValueError: something the user typed cannot be run; nothing was started.
        RunFailed: ranks were started and one failed.
    """
    started = time.time()
    world_size = resolve_world_size(run, env_world_size)
    if run.topology.kind == TopologyKind.all:
        return compare_options(run, run_dir, world_size)
    check_baselines(run, env_world_size)
    for note in run.speculation.notes():
        print_warning(note)
    inventory = read_inventory(run.hardware, world_size)
    placement = place_ranks(run, world_size, inventory)
    check_calibration(run, placement)
    job = Job(run, placement, str(run_dir), inventory.host_cores, started=started)
    prompts: tuple[Prompt, ...] = ()
    if run.task.kind == TaskKind.generate:
        # Before the model, which may have to be downloaded.
        prompts = read_prompts(run)
        job = replace(job, prompts=unanswered(job, prompts))
    job = decide(job, inventory)
    if run.task.kind == TaskKind.plan:
        return base_report(job)
    if is_complete(job):
        print_note(f"every prompt of prompts_file={run.prompts_file} has its answer in {job.output_path}.")
        return base_report(job) | {"outputs": []}
    with held_answers(job, prompts):
        try:
            telemetry = watch_ranks(job, inventory, start_ranks)
        except RunFailed as error:
            raise RunFailed(hint_at_answers(job, error.failure), error.exit_code) from None
    return measured_report(job, inventory, telemetry, start_ranks)


def decide(job: Job, inventory: Inventory) -> Job:
    """`job` with its model and plan, where its task has a model."""
    run = job.run
    if run.task.kind in WITHOUT_MODEL:
        return replace(job, captured_passes=wanted_passes(run, job.placement, inventory))
    is_grid = run.task.kind == TaskKind.predictions
    plan, prepare = (plan_grid, prepare_grid) if is_grid else (plan_run, prepare_job)
    model = find_model(run, lambda shape: plan(run, job.placement, shape, inventory))
    return prepare(job, model, inventory)


def measured_report(job: Job, inventory: Inventory, telemetry: Telemetry, start_ranks: StartRanks) -> dict[str, Any]:
    """The report of ranks that have ended well, printed; baselines, where there are some, are run for it."""
    run = job.run
    if run.task.kind == TaskKind.generate:
        outputs = read_results(Path(job.run_dir), 1)[0]["outputs"]
        lengths = [(output["num_prompt_tokens"], len(output["token_ids"])) for output in outputs]
        job = replace(job, times=answered_times(job, inventory, lengths))
    report = build_report(job, inventory, telemetry)
    if run.task.kind == TaskKind.bench:
        report["baselines"] = run_baselines(job, inventory, start_ranks)
    if run.task.kind == TaskKind.calibrate:
        report["calibration_file"] = str(
            keep_calibration(run, job.placement, inventory, report, telemetry.energy_between)
        )
    print_report(report)
    for line in slow_parts(report):
        print_warning(f"slower than it could be: {line}")
    return report


def compare_options(run: RunConfig, run_dir: Path, num_cards: int) -> dict[str, Any]:
    """The report of topology=all: every way to run the model on so many cards."""
    inventory = read_inventory(run.hardware, num_cards)
    auto = replace(run, topology=replace(run.topology, kind=TopologyKind.auto))
    placement = place_ranks(auto, num_cards, inventory)
    model = find_model(run, lambda shape: None)
    draft = find_draft(run, model.shape, model.folder)
    options = rank_options(run, model.shape, inventory, num_cards, None if draft is None else draft.shape)
    print_options(options, run.plan.aim, run.workload.batch_size)
    found = {
        "model": run.model.name,
        "topology": run.topology.kind.value,
        "options": [asdict(each) for each in options],
    }
    return base_report(Job(run, placement, str(run_dir), inventory.host_cores)) | found


def check_baselines(run: RunConfig, env_world_size: int | None) -> None:
    """Baselines need the cards for themselves, and ranks that torchrun started keep them to the end.

    Raises:
        ConfigError: torchrun made this process a rank.
    """
    if run.bench.baselines and (env_world_size or 1) > 1:
        raise ConfigError(
            f"bench.baselines runs in ranks that follow each other, but WORLD_SIZE={env_world_size} ranks were started "
            f"already. Use `torchrun -m launcher gpus={env_world_size}`."
        )


def check_calibration(run: RunConfig, placement: Placement) -> None:
    """Raises ConfigError: rates of a CPU were asked for."""
    if run.task.kind == TaskKind.calibrate and placement.device == "cpu":
        raise ConfigError("task=calibrate measures cards, and no NVIDIA card was found (hardware=cpu has none).")


def hint_at_answers(job: Job, failure: Failure) -> Failure:
    """`failure`, with how to go on from the answers that were written before it."""
    path = job.output_path
    if job.run.prompts_file is None or not path.is_file() or path.stat().st_size == 0:
        return failure
    kept = f"Answers so far are kept: go on with resume=true output_file={path}"
    return replace(failure, hint=f"{failure.hint} {kept}".strip())


@contextlib.contextmanager
def held_answers(job: Job, prompts: tuple[Prompt, ...]) -> Iterator[None]:
    """Keeps the file of answers to this run, which has looked into it a while ago.

    Args:
        prompts: all that prompts_file has; it is not read again, for it may be a pipe, or have changed.

    Raises:
        ConfigError: another run writes to it, or has done so meanwhile.
    """
    if job.run.task.kind != TaskKind.generate or job.run.prompts_file is None:
        yield
        return
    with held_output(job.output_path):
        if unanswered(job, prompts) != job.prompts:
            raise ConfigError(f"output_file={job.output_path}: another run wrote to it meanwhile. Start again.")
        cut_last_line(job.output_path)
        yield


def is_complete(job: Job) -> bool:
    """Whether a resumed run finds every answer already there."""
    return job.run.task.kind == TaskKind.generate and not job.prompts


def unanswered(job: Job, prompts: tuple[Prompt, ...]) -> tuple[Prompt, ...]:
    """What a run is to answer: its prompts, less those that its output file has answers to."""
    if job.run.prompts_file is None:
        return prompts
    return prompts_to_do(prompts, job.output_path, resume=job.run.resume)


def prepare_grid(job: Job, model: Model, inventory: Inventory) -> Job:
    """`job` with the plans of all its workloads; raises where none can be run."""
    points = plan_grid(job.run, job.placement, model.shape, inventory)
    if reasons := {point.times for point in points if isinstance(point.times, str)}:
        print_warning(f"no predictions: {'; '.join(reasons)}")
    folder = str(model.folder) if model.folder else None
    return replace(job, plan=largest_plan(points), shape=model.shape, model_folder=folder, grid=points)


def prepare_job(job: Job, model: Model, inventory: Inventory) -> Job:
    """`job` with the plan for its model, which is printed; what cannot work is refused here."""
    run = job.run
    draft = find_draft(run, model.shape, model.folder)
    disk_folder = None
    if run.offload.disk is not None and model.folder is not None and run.model.weights != WeightsKind.dummy:
        disk_folder = find_disk_folder(run, model.folder)
        if run.hardware.kind != HardwareKind.facts:
            inventory = replace(inventory, disk_gb_per_sec=measure_disk(disk_folder))
    folder = str(model.folder) if model.folder else None
    disk = str(disk_folder) if disk_folder else None
    job = replace(job, shape=model.shape, model_folder=folder, disk_folder=disk, draft=draft)
    plan, times = plan_job(job, inventory)
    print_plan(plan, model.shape, times)
    if run.model.weights == WeightsKind.dummy:
        print_warning("model.weights=dummy: weights are random numbers. Times and memory are real, answers are noise.")
    return replace(job, plan=plan, times=times)


def plan_job(job: Job, inventory: Inventory) -> tuple[Plan, Times | str]:
    """As plan_timed, with the lengths of the prompts where the plan hangs on them."""
    assert job.shape is not None
    draft = None if job.draft is None else job.draft.shape
    plan, times = plan_timed(job.run, job.placement, job.shape, inventory, draft=draft)
    if not wants_lengths(job, plan):
        return plan, times
    known = with_prompts_of(job.run, longest_prompt(replace(job, plan=plan)))
    return plan_timed(known, job.placement, job.shape, inventory, draft=draft)
