"""Documents that cannot rot: generated pages are what their data gives, commands compose, what they are shown to print
is what they print, tables have the figures of their runs, links lead somewhere."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from rich.console import Console

from launcher.amounts import amount, number, percent
from launcher.config import RunConfig, to_run_config
from launcher.report.bench_text import bench_table, breakdown_tables
from launcher.sweeps.resume import is_resume_folder
from parallel.units import GIB
from tests.launcher.forked import run_together
from tools import claims, slurm
from tools.results_table import choose_render

ROOT = Path(__file__).parent.parent
RESULTS = sorted((ROOT / "results").glob("*.json"))
PAGES = [page for folder in (ROOT, ROOT / "docs", ROOT / "results") for page in sorted(folder.glob("*.md"))]
GUIDES = [page for page in PAGES if page.parent != ROOT / "results"]
README, *_ = TEXTS = [page.read_text(encoding="utf-8") for page in GUIDES]
ALL = "\n".join(TEXTS)
COMMANDS = sorted(set(re.findall(r"^(?:torchrun|python) .*-m launcher (.*)$", ALL, flags=re.MULTILINE)))
SLURM_COMMANDS = re.findall(r"^python -m tools.slurm (.*) > .*$", ALL, flags=re.MULTILINE)
# A command, and below it lines of what it prints; dots are for what is left out.
SHOWN = re.findall(r"^```\n.*-m launcher (.*)\n```\n\n```text\n((?:.*\n)*?)```$", ALL, flags=re.MULTILINE)
# Of a run, in words that settings could be.
FILES = {"predictions.md", "predictions.jsonl"}
RUN_LINK = re.compile(r"\[(\w+)\]\(results/(\w+)\.md\) \|$")


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_page_beside_a_result_is_the_one_its_data_gives(path: Path) -> None:
    result = json.loads(path.read_text(encoding="utf-8"))
    made = choose_render(result)(path.stem, result)
    assert path.with_suffix(".md").read_text(encoding="utf-8") == made, f"python -m tools.results_table {path}"


def test_claims_page_is_the_one_its_data_gives() -> None:
    found = json.loads((ROOT / "docs" / "claims.json").read_text(encoding="utf-8"))
    made = claims.render(found, claims.read_card())
    assert (ROOT / "docs" / "claims.md").read_text(encoding="utf-8") == made, "python -m tools.claims > docs/claims.md"


def test_batches_of_streamed_layers_are_those_of_their_runs() -> None:
    guide = (ROOT / "docs" / "offload.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (\d+) \| ([\d.]+) \| ([\d.]+) \|$", guide, flags=re.MULTILINE)
    runs = json.loads((ROOT / "results" / "one_card_batches_h200_202611.json").read_text(encoding="utf-8"))
    found = [(int(size), runs[f"batch{size}"], layers, ms, rate) for size, layers, ms, rate in rows]
    assert len(found) == 5
    for size, report, layers, ms, rate in found:
        step_ms = report["decode_step_ms"]["measured"]
        assert (layers, ms) == (str(len(report["offload"]["streamed_layers"])), number(step_ms))
        assert rate == number(size / step_ms * 1e3)


def test_guides_show_commands_and_scripts() -> None:
    assert len(COMMANDS) >= 30
    assert len(SLURM_COMMANDS) == 2
    assert len(SHOWN) >= 7


@pytest.mark.parametrize("command", COMMANDS)
def test_command_of_a_guide_composes(command: str) -> None:
    ConfigStore.instance().store(group="schema", name="run", node=RunConfig)
    words = shlex.split(command, comments=True)
    # A sweep that is resumed has its values from its folder.
    arguments = [word for word in words if word != "-m" and not is_resume_folder(word)]
    sweeps = [argument.split(",")[0] if re.search(r"=\d+(,\d+)+$", argument) else argument for argument in arguments]
    GlobalHydra.instance().clear()
    with initialize_config_module("conf", version_base="1.3"):
        to_run_config(compose("config", overrides=sweeps))


@pytest.mark.parametrize("command", SLURM_COMMANDS)
def test_script_of_a_guide_is_written(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    assert slurm.main(shlex.split(command)) == 0, capsys.readouterr().err
    assert "#SBATCH --gres=gpu:2\n" in capsys.readouterr().out


def test_plans_print_what_is_shown(tmp_path: Path) -> None:
    shown = [(command, lines) for command, lines in SHOWN if "task=plan" in command]
    # Where nobody has calibrated such cards.
    results = run_together(
        tmp_path, *(shlex.split(command) for command, _ in shown), env={"XDG_CACHE_HOME": str(tmp_path)}
    )
    pairs = [
        (command, missing_lines(lines, each.stderr)) for (command, lines), each in zip(shown, results, strict=True)
    ]
    assert [(command, missing) for command, missing in pairs if missing] == []


@pytest.mark.parametrize(("command", "lines"), [each for each in SHOWN if "task=bench" in each[0]])
def test_measurements_are_shown_as_they_were_reported(command: str, lines: str) -> None:
    reports = [
        run for path in RESULTS for run in measured_runs(path).values() if run.get("command") == shlex.split(command)
    ]
    missing = [missing_lines(lines, print_bench(report)) for report in reports]
    assert [] in missing


def test_table_of_the_readme_has_the_figures_of_its_runs() -> None:
    rows = [line for line in README.splitlines() if RUN_LINK.search(line)]
    assert len(rows) >= 10
    for line in rows:
        name, page = RUN_LINK.findall(line)[0]
        assert figures_of(measured_runs(ROOT / "results" / f"{page}.json")[name]) == cells_of(line)[2:-1], line


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not leads_somewhere(page, link)] == []


def test_settings_and_tools_that_guides_name_exist() -> None:
    named = set(re.findall(r"`([a-z_]+\.[a-z_]+)(?:=[^`]*)?`", ALL)) - FILES
    sections = {key.partition(".")[0] for key in config_keys(RunConfig)}
    keys = {name for name in named if name.partition(".")[0] in sections}
    assert len(keys) >= 30
    assert keys - config_keys(RunConfig) == set()
    tools = set(re.findall(r"\btools\.[\w.]*\w", ALL)) - {"tools.bench.NAME"}
    assert [name for name in sorted(tools) if importlib.util.find_spec(name) is None] == []


def test_guide_names_every_benchmark_of_a_part() -> None:
    _, section = (ROOT / "docs" / "bench.md").read_text(encoding="utf-8").split("## Kernels by themselves\n")
    programs = (ROOT / "tools" / "bench").glob("*.py")
    started = {path.stem for path in programs if '__name__ == "__main__"' in path.read_text(encoding="utf-8")}
    assert set(re.findall(r"`(\w+)`", section)) == started


def missing_lines(shown: str, printed: str) -> list[str]:
    """Of what is shown, that is not printed in this order; a table breaks long lines at other places."""
    text, missing = " ".join(printed.split()), []
    for line in shown.splitlines():
        if line == "...":
            continue
        wanted = " ".join(line.split())
        if (place := text.find(wanted)) < 0:
            missing.append(line)
        else:
            text = text[place + len(wanted) :]
    return missing


def print_bench(report: dict[str, Any]) -> str:
    console = Console(width=140)
    with console.capture() as printed:
        console.print(bench_table(report), *breakdown_tables(report))
    return printed.get()


def measured_runs(path: Path) -> dict[str, Any]:
    """The reports in a file of results, by their names; of other files nothing."""
    found = json.loads(path.read_text(encoding="utf-8"))
    return {name: run for name, run in found.items() if isinstance(run, dict) and "cards" in run}


def figures_of(report: dict[str, Any]) -> list[str]:
    """At a time, ms of first token and per token, share of communication, GiB predicted and measured."""
    memory = [max(card[key] for card in report["cards"]) for key in ("predicted_bytes", "peak_bytes")]
    communication = percent(report["comm_share"]) if report["world_size"] > 1 else "-"
    times = number(report["ttft_ms"]), number(report["tpot_ms"]["p50"])
    return [str(report["batch_size"]), *times, communication, *(amount(num_bytes, GIB) for num_bytes in memory)]


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def leads_somewhere(page: Path, link: str) -> bool:
    path, _, heading = link.partition("#")
    target = page.parent / path if path else page
    return target.exists() and (not heading or heading in headings(target.read_text(encoding="utf-8")))


def headings(text: str) -> set[str]:
    """Anchors, as GitHub makes them, of the headings of a page."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", prose, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def config_keys(section: type, prefix: str = "") -> set[str]:
    """SECTION.KEY of all that can be set."""
    hints = get_type_hints(section)
    inner = {each.name: hints[each.name] for each in fields(section)}
    deeper = [config_keys(kind, f"{prefix}{name}.") for name, kind in inner.items() if is_dataclass(kind)]
    return {prefix + name for name in inner}.union(*deeper)
