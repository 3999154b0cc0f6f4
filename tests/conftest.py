"""The process from which tests fork ranks has imported what most of them need, once for all."""

import gc

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


# Garbage collectors do not look through what is imported and collected, which stays: 4% of the work of some folders.
gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()
