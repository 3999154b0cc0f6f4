"""The process from which tests fork ranks has imported what most of them need, once for all."""

from tools import local_ranks

local_ranks.PRELOADED += (
    "pytest",
    "tests.parallel.ranks",
    "launcher.cli",
    "launcher.rank",
    "launcher.tasks",
    "launcher.worker",
    "tests.frozen",
)
