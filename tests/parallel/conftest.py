from collections.abc import Callable
from pathlib import Path

import pytest

from parallel.engine.generate import StopRules
from tests.parallel.ranks import ModelRun, run_model, run_on_ranks
from tests.parallel.small_models import (
    CONFIGS,
    DEMO,
    NAMES,
    NUM_FORCED_TOKENS,
    NUM_NEW_TOKENS,
    Reference,
    compute_reference,
    write_model,
)
from tests.threads import one_thread as one_thread


@pytest.fixture(scope="package")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoint folder of each small model."""
    root = tmp_path_factory.mktemp("small_models")
    return {"demo": DEMO} | {name: write_model(config, root / name) for name, config in CONFIGS.items()}


@pytest.fixture(scope="package")
def references(folders: dict[str, Path]) -> dict[str, Reference]:
    return {name: compute_reference(name, folders[name]) for name in NAMES}


@pytest.fixture(scope="package")
def runs(folders: dict[str, Path], references: dict[str, Reference]) -> Callable[[str, int], list[ModelRun]]:
    """(model, world size) -> what each rank saw; a pair runs once for all the tests that ask for it."""
    done: dict[tuple[str, int], list[ModelRun]] = {}

    def run(name: str, world_size: int) -> list[ModelRun]:
        if (name, world_size) not in done:
            reference = references[name]
            done[name, world_size] = run_on_ranks(
                run_model,
                world_size,
                folders[name],
                reference.prompts,
                [tokens[:NUM_FORCED_TOKENS] for tokens in reference.tokens],
                StopRules(NUM_NEW_TOKENS),
            )
        return done[name, world_size]

    return run
