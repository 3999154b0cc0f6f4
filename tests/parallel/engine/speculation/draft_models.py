"""Models that are nearly another: its first layers alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file


def write_truncated(folder: Path, target: Path, num_layers: int) -> Path:
    """The first layers of the model in `folder`, with its embedding, last norm and head."""
    target.mkdir(parents=True)
    for file in folder.iterdir():
        if file.suffix in (".json", ".jinja"):
            shutil.copy(file, target)
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if layer_of(name) < num_layers}
    assert len(kept) < len(tensors)
    save_file(kept, target / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = num_layers
    config.pop("layer_types", None)
    (target / "config.json").write_text(json.dumps(config))
    return target


def layer_of(name: str) -> int:
    """-1 for what belongs to no layer."""
    parts = name.split(".")
    return int(parts[parts.index("layers") + 1]) if "layers" in parts else -1
