"""Where a model's files are found: in a package, in a folder, in the hub's cache, or nowhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError

from launcher.config import ConfigError, ModelConfig, QuantizeKind, RunConfig
from launcher.models.files import download_model, find_local_model
from launcher.models.find import find_model
from launcher.models.shape import ModelShape
from launcher.plan.topology import PlanError
from parallel.formats.scheme import CheckpointError
from tests.launcher.demo_model import DEMO

HUB_NAME = "org/name"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, and no way to the hub."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def put_in_cache(cache: Path, *names: str) -> Path:
    """A snapshot as huggingface_hub keeps it."""
    repository = cache / f"models--{HUB_NAME.replace('/', '--')}"
    snapshot = repository / "snapshots" / "0123456789abcdef"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    weight_map = {str(number): f"model-0000{number}-of-00002.safetensors" for number in (1, 2)}
    for name in names:
        (snapshot / name).write_text(json.dumps({"weight_map": weight_map}))
    return snapshot


def find(path: str) -> Path | None:
    return find_local_model(ModelConfig(path))


def refused(path: str) -> str:
    with pytest.raises(ConfigError) as caught:
        find(path)
    return str(caught.value)


def test_package_prefix_finds_what_ships_with_a_package() -> None:
    folder = find("pkg://launcher/models/demo")
    assert folder is not None
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in folder.iterdir()}


@pytest.mark.parametrize("path", ["pkg://no_such_package/demo", "pkg://launcher/models/no_such_model", "pkg://"])
def test_package_that_has_no_such_model_is_refused(path: str) -> None:
    assert f"model.path={path}" in refused(path)


def test_folder_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert find(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find("~/org") == tmp_path / "org"


def test_folder_comes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    found = find(HUB_NAME)
    assert found is not None and found.samefile(tmp_path / "org" / "name")


def test_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    assert refused(str(file)) == (
        f"model.path={file} is a file; give the folder that holds config.json and the weights."
    )


@pytest.mark.parametrize("path", ["/no/such/folder", "name", "a/b/c", "org/na me", "./org/name", "-org/name"])
def test_nonsense_is_neither_a_folder_nor_a_hub_name(path: str) -> None:
    message = refused(path)
    assert message == f"model.path={path}: no such folder, and not a hub name such as org/name."


def test_model_that_was_not_downloaded_is_not_on_this_machine(cache: Path) -> None:
    assert find(HUB_NAME) is None


def test_downloaded_model_is_found_in_the_cache(cache: Path) -> None:
    snapshot = put_in_cache(cache, "config.json", "model.safetensors")
    assert find(HUB_NAME) == snapshot


def test_download_that_has_no_weights_is_not_on_this_machine(cache: Path) -> None:
    put_in_cache(cache, "config.json")
    assert find(HUB_NAME) is None


@pytest.mark.parametrize(
    "names",
    [
        ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"],
        ["weights.safetensors"],
        ["model.safetensors", "model.safetensors.index.json"],
    ],
)
def test_download_with_all_its_weights_is_found(cache: Path, names: list[str]) -> None:
    snapshot = put_in_cache(cache, "config.json", *names)
    assert find(HUB_NAME) == snapshot


@pytest.mark.parametrize(
    "names",
    [
        ["model-00001-of-00002.safetensors", "model.safetensors.index.json"],
        ["model.safetensors.index.json"],
        ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
    ],
)
def test_download_that_was_interrupted_is_taken_up_again(cache: Path, names: list[str]) -> None:
    put_in_cache(cache, "config.json", *names)
    assert find(HUB_NAME) is None


def test_offline_download_is_refused_and_names_the_variable(cache: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        download_model(ModelConfig(HUB_NAME))
    message = str(caught.value)
    assert f"model.path={HUB_NAME} is not on this machine and HF_HUB_OFFLINE forbids a download" in message
    assert "model.path=FOLDER" in message


def test_hub_that_cannot_be_reached_is_refused_with_what_to_check(tmp_path: Path) -> None:
    """In a process of its own: huggingface_hub reads its address once. Port 9 answers nobody."""
    program = (
        "from launcher.config import ConfigError, ModelConfig\n"
        "from launcher.models.files import download_model\n"
        "try:\n    download_model(ModelConfig('org/name'))\n"
        "except ConfigError as error:\n    print(error)\n"
    )
    env = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    result = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=120)
    assert result.stdout.startswith("model.path=org/name could not be downloaded: "), result
    assert all(word in result.stdout for word in ("your network", "hf auth login", "model.path=FOLDER"))


def test_what_a_run_cannot_be_is_told_before_weights_are_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub is a folder here; what is asked of it is recorded."""
    asked: list[list[str]] = []
    (tmp_path / "config.json").write_bytes((DEMO / "config.json").read_bytes())

    def download(name: str, allow_patterns: list[str], local_files_only: bool = False) -> str:
        if local_files_only:
            raise LocalEntryNotFoundError("not downloaded")
        asked.append(allow_patterns)
        return str(tmp_path)

    def refuse(shape: ModelShape) -> None:
        raise PlanError(f"{shape.num_layers} layers in {shape.quantization}")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    run = RunConfig(model=ModelConfig(HUB_NAME, quantize=QuantizeKind.int4), prompt="")
    with pytest.raises(PlanError, match="5 layers in int4"):
        find_model(run, refuse)
    assert len(asked) == 1 and not any("safetensors" in each for each in asked[0])
    with pytest.raises(CheckpointError):
        find_model(run, lambda shape: None)
    assert any("safetensors" in each for each in asked[-1])
