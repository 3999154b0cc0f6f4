"""The process from which tests fork ranks has imported what most of them need, once for all."""

from tools import local_ranks

local_ranks.PRELOADED += (
    "pytest",
    "tests.parallel.ranks",
    "launcher.cli",
    "launcher.rank.context",
    "launcher.tasks",
    "launcher.rank.worker",
    "tests.frozen",
)
# Several runs share the cores: threads that spin while they wait keep others from their work.
local_ranks.ENVIRONMENT["OMP_WAIT_POLICY"] = "passive"
