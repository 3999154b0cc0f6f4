"""The project installed as a package, away from its checkout: everything that a run needs is there."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.launcher.cli import environment

ROOT = Path(__file__).parent.parent
SOURCES = ("launcher", "parallel", "conf", "hydra_plugins", "tools", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed packages, built from a copy so that the checkout stays clean."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in SOURCES:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif path.exists():
            shutil.copy(path, source)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # pyproject.toml's own minimum. An older one is left to pip, which then needs the network.
    new_enough = int(version("setuptools").partition(".")[0]) >= 77
    offline = ["--no-build-isolation", "--no-index"] if new_enough else []
    command = [*pip, *offline, "--no-deps", "--target", str(target), str(source)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    return target


def test_every_module_config_and_kernel_is_installed(installed: Path) -> None:
    patterns = ("*.py", "*.yaml", "*.cu", "*.cuh")
    for package in ("launcher", "parallel", "conf", "hydra_plugins", "tools"):
        files = {path.relative_to(ROOT) for pattern in patterns for path in (ROOT / package).rglob(pattern)}
        assert files
        assert {file for file in files if not (installed / file).is_file()} == set()


def test_demo_model_is_installed_whole(installed: Path) -> None:
    folder = Path("launcher/models/demo")
    files = {path.name: path.stat().st_size for path in (ROOT / folder).iterdir()}
    assert {path.name: path.stat().st_size for path in (installed / folder).iterdir()} == files


def test_installed_launcher_plans_the_demo_model_from_any_folder(installed: Path, tmp_path: Path) -> None:
    # PYTHONPATH comes before an editable install of the checkout.
    env = environment({"PYTHONPATH": str(installed)})
    command = [sys.executable, "-m", "launcher", "task=plan", "gpus=2", "hardware=cpu"]
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    assert (report["task"], report["model"], report["world_size"]) == ("plan", "demo", 2)
    assert Path(report["run_dir"]).is_relative_to(tmp_path / "runs")
    assert json.loads((Path(report["run_dir"]) / "report.json").read_text()) == report


def test_it_is_the_installed_one_that_answers(installed: Path, tmp_path: Path) -> None:
    """The tests above would pass with the checkout too."""
    program = (
        "import launcher, conf\n"
        "from launcher.config import ModelConfig\n"
        "from launcher.models.files import find_local_model\n"
        "print(launcher.__file__, conf.__file__, find_local_model(ModelConfig('pkg://launcher/models/demo')))"
    )
    env = environment({"PYTHONPATH": str(installed)})
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert [Path(place).is_relative_to(installed) for place in result.stdout.split()] == [True] * 3, result


def test_hydra_finds_the_plugin_of_the_installed_one(installed: Path, tmp_path: Path) -> None:
    program = (
        "from hydra.core.plugins import Plugins; import sys; "
        "name = 'hydra_plugins.launch70b.slurm_launcher.SlurmLauncher'; "
        "print(sys.modules[Plugins.instance().class_name_to_class[name].__module__].__file__)"
    )
    env = environment({"PYTHONPATH": str(installed)})
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert Path(result.stdout.strip()).is_relative_to(installed), result
