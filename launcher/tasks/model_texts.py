"""The text files of a model as transformers reads them, with errors that name them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import AutoConfig, PretrainedConfig


def read_texts(read: Callable[[str], Any], folder: str, files: str) -> Any:
    """What `read` makes of a model's folder; `files` names those that it reads.

    Raises:
        ValueError: it cannot. Transformers raises many kinds, of which most do not say where the trouble is.
    """
    try:
        return read(folder)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{files} in {folder} cannot be used ({type(error).__name__}: {reason}). Take the files that belong to the "
            "weights, or download them again."
        ) from error


def read_config(folder: str) -> PretrainedConfig:
    """Raises ValueError: transformers takes its config.json for no model's."""
    config: PretrainedConfig = read_texts(AutoConfig.from_pretrained, folder, "config.json")
    return config
