"""What a plan is asked to rank by."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Aim(str, Enum):
    latency = "latency"
    throughput = "throughput"
    context = "context"


@dataclass
class PlanConfig:
    # Of topology=all: least time a token, most tokens a second of all copies, or most tokens of KV cache.
    aim: Aim = Aim.latency
