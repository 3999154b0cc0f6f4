"""What a user can set: the typed form of conf/. `run` joins the sections, each in the file of its name."""

from launcher.config.engine import EngineConfig, KVDType, SamplingConfig, TransportKind
from launcher.config.hardware import HardwareConfig, HardwareKind, LimitsConfig, PeerAccess
from launcher.config.model import DraftModelConfig, DType, ModelConfig, ModelFacts, QuantizeKind, WeightsKind
from launcher.config.offload import KVPlace, OffloadConfig, OffloadKind
from launcher.config.run import (
    MAX_CARDS,
    ConfigError,
    RunConfig,
    TimeoutsConfig,
    TopologyConfig,
    TopologyKind,
    to_run_config,
)
from launcher.config.speculation import SpeculationConfig, SpeculationKind
from launcher.config.tasks import Aim, CalibrateConfig, PlanConfig, PredictionsConfig, ProbeConfig, TaskConfig, TaskKind
from launcher.config.workload import RANDOM_PROMPT_TOKENS, BaselineKind, BenchConfig, WorkloadConfig

__all__ = [
    "MAX_CARDS",
    "RANDOM_PROMPT_TOKENS",
    "Aim",
    "BaselineKind",
    "BenchConfig",
    "CalibrateConfig",
    "ConfigError",
    "DType",
    "DraftModelConfig",
    "EngineConfig",
    "HardwareConfig",
    "HardwareKind",
    "KVDType",
    "KVPlace",
    "LimitsConfig",
    "ModelConfig",
    "ModelFacts",
    "OffloadConfig",
    "OffloadKind",
    "PeerAccess",
    "PlanConfig",
    "PredictionsConfig",
    "ProbeConfig",
    "QuantizeKind",
    "RunConfig",
    "SamplingConfig",
    "SpeculationConfig",
    "SpeculationKind",
    "TaskConfig",
    "TaskKind",
    "TimeoutsConfig",
    "TopologyConfig",
    "TopologyKind",
    "TransportKind",
    "WeightsKind",
    "WorkloadConfig",
    "to_run_config",
]
