"""Where a model's files are: in a package, in a folder, or on the hub (downloaded once, then found in its cache)."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

from launcher.config import ConfigError, ModelConfig, WeightsKind
from parallel.checkpoint.headers import read_index

PACKAGE_PREFIX = "pkg://"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
SHARD_NAME = re.compile(r"-\d+-of-\d+\.safetensors$")
# No .bin or .pt: they are pickles, which can run code when they are read.
WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]
CONFIG = "config.json"
TEXTS = ["*.json", "tokenizer.model", "*.jinja", "*.tiktoken"]


def find_local_model(model: ModelConfig) -> Path | None:
    """The folder of a model that is on this machine; None for a hub name that has not been downloaded whole.

    Dummy weights need no more of a download than config.json.

    Raises:
        ConfigError: its path is neither a folder nor a hub name.
    """
    if model.path.startswith(PACKAGE_PREFIX):
        return _find_in_package(model)
    path = Path(model.path).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ConfigError(
            f"{model.key}={model.path} is a file; give the folder that holds config.json and the weights."
        )
    if not HUB_NAME.fullmatch(model.path):
        raise ConfigError(f"{model.key}={model.path}: no such folder, and not a hub name such as org/name.")
    return _find_in_hub_cache(model)


def _find_in_package(model: ModelConfig) -> Path:
    package, _, name = model.path.removeprefix(PACKAGE_PREFIX).partition("/")
    try:
        folder = Path(str(files(package))) / name
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{model.key}={model.path}: {error}. Write pkg://PACKAGE/FOLDER.") from error
    if not folder.is_dir():
        raise ConfigError(f"{model.key}={model.path}: package {package} has no folder {name}.")
    return folder


def _patterns(model: ModelConfig) -> list[str]:
    """The files of a hub model that a run needs."""
    return TEXTS if model.weights == WeightsKind.dummy else WEIGHTS + TEXTS


def _find_in_hub_cache(model: ModelConfig) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(model.path, allow_patterns=_patterns(model), local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    is_whole = (folder / CONFIG).is_file() if model.weights == WeightsKind.dummy else _has_all_weights(folder)
    return folder if is_whole else None


def _has_all_weights(folder: Path) -> bool:
    """Whether a download came to its end: every file of the index is there, or weights that need no index."""
    names = [file.name for file in folder.glob("*.safetensors")]
    weight_map = read_index(folder)
    if weight_map is not None:
        return set(weight_map.values()) <= set(names)
    return bool(names) and not any(SHARD_NAME.search(name) for name in names)


def download_model(model: ModelConfig) -> Path:
    """Downloads what is missing of a hub model, with progress bars, and returns its folder.

    Raises:
        ConfigError: as download_texts.
    """
    return _download(model, _patterns(model))


def download_texts(model: ModelConfig) -> Path:
    """As download_model, without the weights: what tells whether they are worth a download.

    Raises:
        ConfigError: the hub has no such model, refuses it, or cannot be reached (or HF_HUB_OFFLINE forbids it).
    """
    return _download(model, TEXTS)


def _download(model: ModelConfig, patterns: list[str]) -> Path:
    from huggingface_hub import constants, snapshot_download

    if constants.HF_HUB_OFFLINE:
        raise ConfigError(
            f"{model.key}={model.path} is not on this machine and HF_HUB_OFFLINE forbids a download. Unset it, or give "
            f"the folder of a checkpoint: {model.key}=FOLDER."
        )
    try:
        return Path(snapshot_download(model.path, allow_patterns=patterns))
    except Exception as error:  # The hub's client raises many kinds; all mean that there is no model to run.
        raise ConfigError(
            f"{model.key}={model.path} could not be downloaded: {str(error).rstrip('.')}. Check the name, your "
            f"network and, for gated models, `hf auth login`; or give the folder of a checkpoint: {model.key}=FOLDER."
        ) from error
