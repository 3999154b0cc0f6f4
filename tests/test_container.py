"""The Dockerfile, which is not built here: its form, what it copies, and those of its commands that can run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.launcher.cli import environment
from tests.test_packaging import SOURCES

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")
IGNORED = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
INSTRUCTIONS = ("FROM", "RUN", "COPY", "ENV", "USER", "WORKDIR", "HEALTHCHECK", "ENTRYPOINT", "CMD")


def parse(text: str) -> list[tuple[str, str]]:
    """(instruction, its words), continued lines joined, comments left out."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.partition(" ")[0], line.partition(" ")[2].strip()) for line in joined.split("\n")]


PARSED = parse(TEXT)


def words_of(name: str) -> list[str]:
    return [words for instruction, words in PARSED if instruction == name]


def command_of(name: str) -> list[str]:
    """The command of the last instruction of its kind, which is a JSON array: a shell would take its signals."""
    command: list[str] = json.loads(words_of(name)[-1].rpartition("CMD ")[2])
    return command


def test_every_instruction_is_known_and_the_base_is_a_fixed_version_of_cuda() -> None:
    assert {instruction for instruction, _ in PARSED} == set(INSTRUCTIONS)
    assert [bool(re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-base-ubuntu24\.04", base)) for base in words_of("FROM")] == [
        True
    ]


def test_it_does_not_run_as_root() -> None:
    """The user is one that the file makes, by a number above those of the system, and installs nothing."""
    (user,) = words_of("USER")
    assert int(user) > 1000
    assert any(f"--uid {user} " in words for words in words_of("RUN"))
    order = [instruction for instruction, _ in PARSED]
    assert order.index("USER") < order.index("ENTRYPOINT")
    assert "RUN" not in order[order.index("USER") :]


@pytest.mark.parametrize("words", words_of("RUN"))
def test_shell_commands_are_whole_and_leave_nothing_behind(words: str) -> None:
    checked = subprocess.run(["sh", "-n", "-c", words], capture_output=True, text=True, timeout=60)
    assert (checked.returncode, checked.stderr) == (0, "")
    # One that fails must fail the build.
    assert ";" not in words and "|" not in words
    if "apt-get install" in words:
        assert words.index("apt-get update") < words.index("apt-get install --yes --no-install-recommends")
        assert words.endswith("rm -rf /var/lib/apt/lists/*")
    if "pip install" in words:
        assert "--no-cache-dir" in words and "--constraint /source/constraints.txt" in words


@pytest.mark.parametrize("name", [*SOURCES, "constraints.txt", "conf/config.yaml", "launcher/models/demo/config.json"])
def test_what_the_image_is_built_from_is_sent_to_it(name: str) -> None:
    assert words_of("COPY") == [". /source"]
    assert (ROOT / name).exists() and not is_ignored(name)


@pytest.mark.parametrize("name", [".git", ".venv", "runs", "multirun", "tests", "results", "launcher/__pycache__"])
def test_what_it_does_not_need_is_not_sent(name: str) -> None:
    assert is_ignored(name)


def is_ignored(name: str) -> bool:
    """Docker's rule: the last pattern that matches the path or a folder above it decides."""
    places = [name, *(str(parent) for parent in Path(name).parents)]
    ignored = False
    for line in IGNORED:
        if line and not line.startswith("#"):
            pattern = line.removeprefix("!").removeprefix("**/")
            if any(fnmatch(place, pattern) or fnmatch(Path(place).name, pattern) for place in places[:-1]):
                ignored = not line.startswith("!")
    return ignored


def test_container_without_arguments_shows_the_help(tmp_path: Path) -> None:
    command = [*command_of("ENTRYPOINT"), *command_of("CMD")]
    assert command[0] == "python"
    done = run([sys.executable, *command[1:]], tmp_path)
    assert done.returncode == 0 and "torchrun -m launcher gpus=2" in done.stdout


def test_health_check_runs_and_says_what_is_missing(tmp_path: Path) -> None:
    command = command_of("HEALTHCHECK")
    done = run([sys.executable, *command[1:]], tmp_path)
    assert (done.returncode, done.stderr) in ((0, ""), (1, ""))
    assert ("well: " in done.stdout) is (done.returncode == 0)


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    env = environment({"PYTHONPATH": str(ROOT)})
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=60)
