from pathlib import Path

import pytest

from tests.parallel.small_models import (
    CONFIGS,
    DEMO,
    NAMES,
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
