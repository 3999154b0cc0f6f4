"""What a user can set: the typed form of conf/, checked as a whole.

Hydra composes and type-checks single values; `RunConfig.problems` then lists every rule that the values break, so that
one run shows all of them. Nothing here touches files, cards or the network.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf

from launcher.config.engine import EngineConfig, SamplingConfig
from launcher.config.hardware import HardwareConfig, HardwareKind, LimitsConfig
from launcher.config.model import ModelConfig
from launcher.config.offload import OffloadConfig
from launcher.config.speculation import SpeculationConfig, SpeculationKind
from launcher.config.tasks import CalibrateConfig, PlanConfig, PredictionsConfig, ProbeConfig, TaskConfig, TaskKind
from launcher.config.workload import RANDOM_PROMPT_TOKENS, BenchConfig, WorkloadConfig, middle_tokens
from parallel.engine.speculation.tree_plan import TreePlan

MAX_CARDS = 4
# A year: torch counts timeouts in 64 bits of nanoseconds, and infinity is no JSON.
MAX_TIMEOUT_SEC = 365 * 24 * 3600


class ConfigError(ValueError):
    """Values that a user typed and that cannot be run; the message names the value, the rule and the knob."""


class TopologyKind(str, Enum):
    auto = "auto"
    single = "single"
    dual_nvlink = "dual_nvlink"
    dual_pcie = "dual_pcie"
    triple = "triple"
    quad = "quad"
    # Every way to use the cards, compared; for task=plan.
    all = "all"


@dataclass
class TopologyConfig:
    kind: TopologyKind = TopologyKind.auto


@dataclass
class TimeoutsConfig:
    """How long ranks wait for one another before the run fails."""

    # Self-test of the links before the model is loaded.
    selftest_sec: float = 60.0
    # Any single collective after that.
    collective_sec: float = 300.0

    def problems(self) -> Iterator[str]:
        for name, value in (("selftest_sec", self.selftest_sec), ("collective_sec", self.collective_sec)):
            if not 0 < value <= MAX_TIMEOUT_SEC:
                yield f"timeouts.{name}={value} must be above 0 and at most {MAX_TIMEOUT_SEC:,}."


@dataclass
class RunConfig:
    """A run as it was asked for: the sections of conf/, and what belongs to none of them.

    A section with a method `problems` is checked by it; rules that concern several are here.
    """

    # Cards (ranks) to use; null follows topology, or the processes that torchrun started, or 1.
    gpus: int | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    topology: TopologyConfig = field(default_factory=TopologyConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    workload: WorkloadConfig = field(default_factory=WorkloadConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    offload: OffloadConfig = field(default_factory=OffloadConfig)
    speculation: SpeculationConfig = field(default_factory=SpeculationConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    bench: BenchConfig = field(default_factory=BenchConfig)
    predictions: PredictionsConfig = field(default_factory=PredictionsConfig)
    calibrate: CalibrateConfig = field(default_factory=CalibrateConfig)
    timeouts: TimeoutsConfig = field(default_factory=TimeoutsConfig)
    prompt: str = MISSING
    # A .txt file (one prompt a line) or a .jsonl file ({"prompt": ...} or {"messages": [...]}); replaces `prompt`.
    prompts_file: str | None = None
    # Where answers to prompts_file go; null: outputs.jsonl in the run folder.
    output_file: str | None = None
    # Keep the answers that output_file already has and do the rest; of a sweep, the jobs that are done.
    resume: bool = False
    # Wrap prompts in the model's chat template where it has one.
    chat: bool = True

    @property
    def num_prompt_tokens(self) -> int | None:
        """Tokens of each prompt, where that is known before the prompts are read."""
        default = RANDOM_PROMPT_TOKENS if self.task.kind == TaskKind.bench else None
        return self.workload.prompt_tokens or default

    @property
    def needed_tokens(self) -> int:
        """Of a sequence, prompt and answer, where the prompts are not known yet at least."""
        return (self.num_prompt_tokens or 1) + self.workload.output_tokens

    @property
    def attended_tokens(self) -> int:
        """That all sequences of a step attend to together, half way through their answers."""
        return self.workload.batch_size * middle_tokens(self.num_prompt_tokens or 1, self.workload.output_tokens)

    @property
    def timed_trees(self) -> list[TreePlan]:
        """What task=bench times passes of, beside its workload."""
        return [self.speculation.tree_of(size) for size in self.bench.tree_sizes]

    @property
    def rows_per_sequence(self) -> int:
        """Rows that a sequence takes in a decode step, at most."""
        return max([self.speculation.rows_per_sequence, *self.bench.tree_sizes])

    @property
    def num_ahead(self) -> int:
        """Slots in the cache that a sequence takes beyond its tokens'."""
        return max([self.speculation.num_ahead, *(tree.num_ahead for tree in self.timed_trees)])

    def problems(self) -> Iterator[str]:
        """Every rule that the values break, each as a sentence with the value, the rule and the knob."""
        if self.gpus is not None and not 1 <= self.gpus <= MAX_CARDS:
            yield f"gpus={self.gpus} must be from 1 to {MAX_CARDS}."
        for section in vars(self).values():
            if hasattr(section, "problems"):
                yield from section.problems()
        if max(self.bench.tree_sizes, default=1) > 1 and not isinstance(self.speculation.tree_size, int):
            yield from self.speculation.depth_problems()
        if self.task.kind in (TaskKind.generate, TaskKind.plan):
            yield from self._file_problems()
        if self.task.kind != TaskKind.plan and self.hardware.kind == HardwareKind.facts:
            yield (
                f"hardware={self.hardware.name} describes cards for planning, but task={self.task.kind.value} runs. "
                "Use hardware=local, or task=plan."
            )
        if self.topology.kind == TopologyKind.all and self.task.kind != TaskKind.plan:
            yield f"topology=all compares ways to run, but task={self.task.kind.value} runs one. Use task=plan."
        yield from self._task_problems()
        max_context = self.engine.max_context
        if max_context is not None and self.needed_tokens > max_context:
            yield (
                f"workload.prompt_tokens + workload.output_tokens = {self.needed_tokens} exceeds engine.max_context="
                f"{max_context}. Raise engine.max_context or lower workload.output_tokens."
            )

    def _file_problems(self) -> Iterator[str]:
        if self.resume and self.prompts_file is None:
            yield "resume=true needs prompts_file: a single prompt has nothing to resume."
        if self.resume and self.output_file is None:
            yield "resume=true needs output_file: the file of answers that is to be completed."
        if self.output_file is not None and self.prompts_file is None:
            yield (
                f"output_file={self.output_file} is for the answers to prompts_file, which is not set; the answer to "
                "`prompt` goes to stdout and report.json. Set prompts_file, or leave output_file out."
            )

    def _task_problems(self) -> Iterator[str]:
        """Values that the task would leave unread; a plan may be of a run that is to read them."""
        kind = self.task.kind
        if kind == TaskKind.probe and self.engine.all_reduce_bits == 8:
            yield "engine.all_reduce_bits=8 is not for task=probe, which checks that sums are exact. Leave it out."
        if kind == TaskKind.calibrate and self.engine.fused_prefill_rows is not None:
            yield (
                "engine.fused_prefill_rows is not for task=calibrate, whose rates are those of runs that measure it. "
                "Leave it out."
            )
        if kind == TaskKind.predictions and self.speculation.kind != SpeculationKind.none:
            yield (
                f"speculation.kind={self.speculation.kind.value} is not for task=predictions, whose engines have no "
                "drafts: nothing is predicted of them. Leave it out, or use task=bench."
            )
        if kind == TaskKind.plan:
            unread = {TaskKind.bench: self._baselines()}
        else:
            unread = {TaskKind.generate: self._answer_keys(), TaskKind.bench: self._bench_keys()}
        for reader, keys in unread.items():
            for key in keys if reader != kind else ():
                yield f"{key} is read by task={reader.value} only, not by task={kind.value}. Leave it out."

    def _answer_keys(self) -> list[str]:
        """Keys that were set and that only task=generate reads."""
        set_keys = {
            "prompts_file": self.prompts_file is not None,
            "output_file": self.output_file is not None,
            "resume": self.resume,
        }
        return [key for key, is_set in set_keys.items() if is_set]

    def _bench_keys(self) -> list[str]:
        """Keys that were set and that only task=bench reads; task=predictions repeats its runs too."""
        read = {"workload.repeats"} if self.task.kind == TaskKind.predictions else set()
        return [*(key for key in self.workload.bench_keys() if key not in read), *self.bench.bench_keys()]

    def _baselines(self) -> list[str]:
        return ["bench.baselines"] if self.bench.baselines else []


def to_run_config(config: DictConfig) -> RunConfig:
    """The composed config as a checked RunConfig.

    Raises:
        ConfigError: one message with every broken rule, or with every key that has no value.
    """
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ConfigError("\n".join(f"{key} has no value. Add {key}=VALUE." for key in missing))
    run: Any = OmegaConf.to_object(config)
    if not isinstance(run, RunConfig):
        raise ConfigError("the primary config has no schema; its defaults list must start with /schema/run@_here_.")
    problems = [f"{key} is unknown: no part of a run reads it." for key in unknown_keys(run)]
    problems += run.problems()
    if problems:
        raise ConfigError("\n".join(problems))
    return run


def unknown_keys(section: Any, prefix: str = "") -> Iterator[str]:
    """Keys that +KEY=VALUE added to a section, which Hydra lets pass."""
    names = {each.name for each in fields(section)}
    for name, value in vars(section).items():
        if name not in names:
            yield prefix + name
        elif is_dataclass(value):
            yield from unknown_keys(value, f"{prefix}{name}.")
