"""Which module may import which: `parallel` nothing of ours, and torch only what runs inside a rank."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.launcher.cli import environment

ROOT = Path(__file__).parent.parent
OURS = ("launcher", "parallel", "conf", "tools", "tests")
# Packages that take a second or more to import, or that need torch.
HEAVY = ("torch", "transformers", "deepspeed", "accelerate")
# What runs inside a rank.
IN_RANKS = ("launcher.rank.", "launcher.tasks", "launcher.baselines")
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("launcher", "parallel", "conf")
    for path in sorted((ROOT / package).rglob("*.py"))
}
BELOW_ENGINE = tuple(
    f"parallel.{name}" for name in ("checkpoint", "formats", "kernels", "layers", "offload", "transports")
)
OUTSIDE_RANKS = [name for name in MODULES if name.startswith("launcher") and not name.startswith(IN_RANKS)]


@cache
def imports(module: str, *, at_top: bool) -> frozenset[str]:
    """What a module imports at its top level (what importing it loads), or anywhere; imports for types left out."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    return frozenset(name for node in walk(tree, at_top=at_top) for name in imported_names(module, node))


def walk(node: ast.AST, *, at_top: bool) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        if at_top and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        yield child
        yield from walk(child, at_top=at_top)


def imported_names(module: str, node: ast.AST) -> set[str]:
    """Dotted names, of modules where they are ours (`from launcher import host` is launcher.hardware.host)."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if not isinstance(node, ast.ImportFrom):
        return set()
    assert node.level == 0, f"{module} imports relatively, which nothing here does"
    deeper = {f"{node.module}.{alias.name}" for alias in node.names}
    return {str(node.module)} | (deeper & set(MODULES))


def package(name: str) -> str:
    return name.partition(".")[0]


@cache
def heavy_imports(module: str) -> frozenset[str]:
    """Heavy packages that come with importing a module of ours, through others of ours too."""
    found, seen, pending = set(), set(), [module]
    while pending:
        name = pending.pop()
        seen.add(name)
        for each in imports(name, at_top=True):
            # Importing a.b imports a too.
            ours = {".".join(each.split(".")[:depth]) for depth in range(1, each.count(".") + 2)} & set(MODULES)
            pending += ours - seen
            found |= {package(each)} & set(HEAVY)
    return frozenset(found)


def part(module: str) -> str:
    """launcher.plan for all of its modules; modules beside the packages stand for themselves."""
    return ".".join(module.split(".")[:2])


@cache
def parts_below(name: str) -> frozenset[str]:
    """Parts of `launcher` that one imports at the top level of its modules, itself left out."""
    used = (each for module in MODULES if part(module) == name for each in imports(module, at_top=True))
    return frozenset(part(each) for each in used if package(each) == "launcher" and each in MODULES) - {name}


def find_cycle(name: str, path: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Parts that import one another, from `name` on; empty where none do."""
    if name in path:
        return (*path[path.index(name) :], name)
    return next((cycle for each in sorted(parts_below(name)) if (cycle := find_cycle(each, (*path, name)))), ())


def test_there_are_modules_to_look_at() -> None:
    assert {"launcher.cli", "parallel.engine.engine", "launcher.tasks.generate", "launcher"} <= set(MODULES)
    assert len(OUTSIDE_RANKS) > 20
    assert "torch" in heavy_imports("parallel.communicator")
    assert "torch" in heavy_imports("launcher.rank.context")


def test_packages_of_the_launcher_build_on_one_another_in_one_direction() -> None:
    assert "launcher.memory" in parts_below("launcher.plan")
    assert find_cycle("launcher.__main__") == find_cycle("launcher.rank") == find_cycle("launcher.tasks") == ()


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("parallel")])
def test_parallel_imports_nothing_of_ours(module: str) -> None:
    foreign = {name for name in imports(module, at_top=False) if package(name) in OURS}
    assert {name for name in foreign if package(name) != "parallel"} == set()


@pytest.mark.parametrize(
    "module", [name for name in MODULES if name.startswith(("parallel.kernels", "parallel.transports"))]
)
def test_what_the_engine_builds_on_knows_nothing_of_it(module: str) -> None:
    assert not {name for name in imports(module, at_top=False) if name.startswith("parallel.engine")}


@pytest.mark.parametrize("module", MODULES)
def test_nobody_imports_tools_or_tests(module: str) -> None:
    assert not {package(name) for name in imports(module, at_top=False)} & {"tools", "tests"}


@pytest.mark.parametrize("module", OUTSIDE_RANKS)
def test_outside_ranks_importing_a_module_imports_no_torch(module: str) -> None:
    assert heavy_imports(module) == frozenset()


@pytest.mark.parametrize("module", OUTSIDE_RANKS)
def test_outside_ranks_nobody_uses_what_needs_torch_of_parallel(module: str) -> None:
    """Not even inside a function: what the parent needs of `parallel` is free of torch."""
    used = {name for name in imports(module, at_top=False) if name in MODULES and package(name) == "parallel"}
    assert {name for name in used if heavy_imports(name)} == set()


@pytest.mark.parametrize(
    "module", ["launcher.run", "launcher.processes.start", "launcher.processes.ranks", "launcher.telemetry.sampler"]
)
def test_what_comes_before_ranks_start_uses_no_torch(module: str) -> None:
    """Not even inside a function: they would wait a second or more for its import."""
    assert not {package(name) for name in imports(module, at_top=False)} & set(HEAVY)


PROGRAM = """
import sys
from launcher.__main__ import run
sys.argv[0] = "launcher"
try:
    code = run()
except SystemExit as error:
    code = error.code
print("code", code, "heavy", sorted({"torch", "transformers", "deepspeed"} & set(sys.modules)))
"""


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["--help"], 0, ["torchrun -m launcher gpus=2", "model: ", "llama3_3_70b_awq", "prefill_chunk"]),
        (["task=plan", "model=llama3_3_70b_awq", "hardware=rtx4090", "gpus=2"], 0, ['"task": "plan"']),
        (["gpus=9", "hardware=cpu"], 1, ["gpus=9 must be from 1 to 4"]),
        (["gpus=2", "hardware=cpu", "prompts_file=missing.txt"], 1, ["missing.txt cannot be read"]),
    ],
    ids=["help", "plan", "refused at once", "refused after the plan"],
)
def test_answers_without_ranks_come_without_torch(tmp_path: Path, args: list[str], code: int, words: list[str]) -> None:
    command = [sys.executable, "-c", PROGRAM, *args]
    result = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120)
    assert result.stdout.endswith(f"code {code} heavy []\n"), result
    assert [word for word in words if word not in result.stdout] == []
