"""Jobs as the parent hands them to ranks, made without a command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launcher.config import ModelConfig, PeerAccess, RunConfig
from launcher.job import Job
from launcher.plan.topology import Placement

RTX_4090 = "NVIDIA GeForce RTX 4090"


def make_run(peer_access: PeerAccess = PeerAccess.auto, **fields: Any) -> RunConfig:
    run = RunConfig(model=ModelConfig("folder/some-model"), prompt="hello", **fields)
    run.limits.peer_access = peer_access
    return run


def make_job(run_dir: Path, *, world_size: int = 2, cards: bool = False, run: RunConfig | None = None) -> Job:
    """A job without a plan, on RTX 4090s (ranks on cards 1, 2, ... in this order) or on the CPU of 16 cores."""
    indices = range(1, world_size + 1)
    placement = Placement(
        world_size=world_size,
        device="cuda" if cards else "cpu",
        topology="dual_pcie",
        topology_reason="a test.",
        cards=tuple(indices) if cards else (None,) * world_size,
        names=(RTX_4090 if cards else "CPU",) * world_size,
        transport="nccl" if cards else "gloo",
    )
    return Job(run or make_run(), placement, str(run_dir), host_cores=16)
