"""Checkpoints for the command line: the demo model, whole or changed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import launcher

DEMO = Path(launcher.__file__).parent / "models" / "demo"
WEIGHTS = "model.safetensors"
# Renders a conversation as `<|bos|>role: content` lines and an opening for the answer.
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


def copy_demo(folder: Path, **config: Any) -> Path:
    """A copy of the demo model, with some fields of its config.json changed. Its weights are a hard link or a copy."""
    folder.mkdir(parents=True)
    for file in DEMO.iterdir():
        if file.name != WEIGHTS:
            shutil.copy(file, folder)
    change_json(folder / "config.json", **config)
    try:
        os.link(DEMO / WEIGHTS, folder / WEIGHTS)
    except OSError:
        shutil.copy(DEMO / WEIGHTS, folder)
    return folder


def change_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_weights(folder: Path, change: Callable[[bytearray], None]) -> Path:
    """Rewrites the weights of a copy; the demo model itself stays as it is."""
    weights = bytearray((DEMO / WEIGHTS).read_bytes())
    change(weights)
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).write_bytes(weights)
    return folder
