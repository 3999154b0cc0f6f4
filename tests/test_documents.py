"""Documents that cannot rot: generated pages are what their data gives, commands compose, links lead somewhere."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra

from launcher.config import RunConfig, to_run_config
from launcher.sweeps.resume import is_resume_folder
from parallel.units import GIB
from tests.launcher.forked import run_together
from tools import claims, slurm
from tools.results_table import choose_render

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = sorted((ROOT / "results").glob("*.json"))
PAGES = [page for folder in (ROOT, ROOT / "docs", ROOT / "results") for page in sorted(folder.glob("*.md"))]
HOST = (ROOT / "docs" / "host.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^(?:torchrun|python) .*-m launcher (.*)$", README + HOST, flags=re.MULTILINE)
PLAN = ("task=plan", "model=llama3_3_70b_awq", "hardware=rtx4090")
KV_FP8 = "engine.kv_dtype=fp8"
SLURM_COMMANDS = re.findall(r"^python -m tools.slurm (.*) > .*$", README, flags=re.MULTILINE)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_page_beside_a_result_is_the_one_its_data_gives(path: Path) -> None:
    result = json.loads(path.read_text(encoding="utf-8"))
    made = choose_render(result)(path.stem, result)
    assert path.with_suffix(".md").read_text(encoding="utf-8") == made, f"python -m tools.results_table {path}"


def test_claims_page_is_the_one_its_data_gives() -> None:
    found = json.loads((ROOT / "docs" / "claims.json").read_text(encoding="utf-8"))
    made = claims.render(found, claims.read_card())
    assert (ROOT / "docs" / "claims.md").read_text(encoding="utf-8") == made, "python -m tools.claims > docs/claims.md"


def test_readme_shows_commands() -> None:
    assert len(COMMANDS) >= 6


@pytest.mark.parametrize("command", COMMANDS)
def test_command_of_the_readme_composes(command: str) -> None:
    ConfigStore.instance().store(group="schema", name="run", node=RunConfig)
    words = shlex.split(command, comments=True)
    # A sweep that is resumed has its values from its folder.
    arguments = [word for word in words if word != "-m" and not is_resume_folder(word)]
    sweeps = [argument.split(",")[0] if re.search(r"=\d+(,\d+)+$", argument) else argument for argument in arguments]
    GlobalHydra.instance().clear()
    with initialize_config_module("conf", version_base="1.3"):
        to_run_config(compose("config", overrides=sweeps))


@pytest.mark.parametrize("command", SLURM_COMMANDS)
def test_script_of_the_readme_is_written(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    assert slurm.main(shlex.split(command)) == 0, capsys.readouterr().err
    assert "#SBATCH --gres=gpu:2\n" in capsys.readouterr().out


def test_readme_says_what_the_plan_says(tmp_path: Path) -> None:
    """Of two cards, of the same with FP8 keys and values, and of one card with half of the layers."""
    chat = (*PLAN, "gpus=2", "workload=chat")
    # Where nobody has calibrated such cards.
    env = {"XDG_CACHE_HOME": str(tmp_path)}
    two, fp8, one = run_together(tmp_path, chat, (*chat, KV_FP8), (*PLAN, "gpus=1"), env=env)
    predicted, offload = two.report["predicted"], one.report["predicted"]["offload"]
    gib, tokens = predicted["cards"][0]["predicted_bytes"] / GIB, predicted["kv_tokens_that_fit"]
    prose = " ".join(README.split())
    assert f"It predicts {gib:.2f} of 23.60 GiB a card with {two.report['max_context']:,} tokens of context" in prose
    assert f"KV cache for {tokens:,} ({fp8.report['predicted']['kv_tokens_that_fit']:,} with `{KV_FP8}`)" in prose
    assert f"and {predicted['tpot_ms']:.1f} ms a token." in prose
    assert f"the plan says {offload['resident_layers']} of 80 layers, {offload['host_bytes'][0] / GIB:.1f} GiB" in prose
    assert f"{offload['pass_bytes'][0] / 1e9:.1f} GB a pass and {offload['pass_ms']:.0f} ms or more" in prose


def test_readme_shows_scripts() -> None:
    assert len(SLURM_COMMANDS) == 2


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []
