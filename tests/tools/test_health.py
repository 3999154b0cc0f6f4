"""The health check: cards of a fake NVML, drivers that are too old, folders that cannot be written."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from launcher.config import HardwareConfig, HardwareKind
from launcher.hardware.inventory import Inventory, read_inventory
from tests.fakes.nvml import two_rtx4090
from tools.health import installed_torch_cuda, main, problems


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> Inventory:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    two_rtx4090().install(monkeypatch)
    return read_inventory(HardwareConfig(), 0)


def test_cards_a_driver_and_a_folder_are_all_it_takes(cards: Inventory, tmp_path: Path) -> None:
    assert cards.cuda is not None
    newer_minor = f"{cards.cuda.partition('.')[0]}.99"
    assert list(problems(cards, newer_minor, tmp_path)) == []


def test_everything_that_is_wrong_is_said(cards: Inventory, tmp_path: Path) -> None:
    assert cards.cuda is not None
    found = list(problems(cards, "99.0", tmp_path / "gone"))
    assert len(found) == 2
    assert f"CUDA up to {cards.cuda}, but torch is built for 99.0" in found[0]
    assert found[1].startswith(f"{tmp_path}/gone cannot be written")


def test_machine_without_cards_is_not_well(tmp_path: Path) -> None:
    found = list(problems(read_inventory(HardwareConfig(kind=HardwareKind.cpu), 0), None, tmp_path))
    assert [text.partition(".")[0] for text in found] == ["NVML shows no card", "torch is installed without CUDA"]


def test_version_of_torchs_cuda_is_torchs_own() -> None:
    assert installed_torch_cuda() == torch.version.cuda


@pytest.mark.parametrize("line", ["cuda: Optional[str] = '13.0'", "cuda = '13.0'"])
def test_version_is_read_from_the_lines_that_torch_writes(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "version.py").write_text(f"__version__ = '2.13.0'\n{line}\nhip: Optional[str] = None\n")
    spec = importlib.util.spec_from_file_location("torch", tmp_path / "__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    assert installed_torch_cuda() == "13.0"


def test_exit_code_says_it(monkeypatch: pytest.MonkeyPatch, cards: Inventory, tmp_path: Path,
                           capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.modules["tools.health"], "installed_torch_cuda", lambda: cards.cuda)
    assert main([]) == 0
    assert "well: NVIDIA GeForce RTX 4090, NVIDIA GeForce RTX 4090" in capsys.readouterr().out
    monkeypatch.setattr(sys.modules["tools.health"], "installed_torch_cuda", lambda: None)
    assert main([]) == 1
