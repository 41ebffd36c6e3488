"""Imports run down: no module knows one above it; a config's sections are joined in `config` and nowhere else."""

from __future__ import annotations

import ast
import dataclasses
import functools
import graphlib
from collections.abc import Iterator
from pathlib import Path
from typing import get_type_hints

LEVELS = (
    "errors fields hints registry parts launch.events",
    "parallel",
    "models",
    "data",
    "tasks",
    "train.sections train.optim train.schedules train.groups train.adafactor compress.adapters "
    "compress.codes compress.coding compress.distillation compress.patterns compress.rounded compress.sparse",
    "config",
    "hf",
    "train",
    "compress",
    "generate",
    "plan",
    "report",
    "launch",
    "serve",
    "commands",
)
"""From the bottom to the top; a name stands for its package too, and the longest name that fits a module counts."""


def level(module: str) -> tuple[int, str]:
    """The height of a module and the name by which it has it; what is in no room (cli, options) is on top."""
    inside = module.removeprefix("jaxmodels.")
    named = [(name, i) for i, names in enumerate(LEVELS) for name in names.split()]
    fit = [(len(name), i, name) for name, i in named if f"{inside}.".startswith(f"{name}.")]
    return max(fit)[1:] if fit else (len(LEVELS), inside.split(".")[0])


@functools.cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def imports(root: Path, file: Path, types: bool = True) -> Iterator[str]:
    """The modules of jaxmodels that a file imports anywhere in it, in functions too; and with `types`, for types."""
    for node in walk(parsed(file), types):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: imports are written out"
            if (node.module or "").split(".")[0] == "jaxmodels":
                for alias in node.names:
                    inner = root.joinpath(*f"{node.module}.{alias.name}".split("."))
                    is_module = inner.is_dir() or inner.with_suffix(".py").is_file()
                    yield f"{node.module}.{alias.name}" if is_module else str(node.module)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "jaxmodels")


def walk(node: ast.AST, types: bool) -> Iterator[ast.AST]:
    """Every node of a tree; without `types`, none of those below `if TYPE_CHECKING`."""
    yield node
    for child in ast.iter_child_nodes(node):
        if types or not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield from walk(child, types)


def modules(root: Path) -> Iterator[tuple[str, Path]]:
    for file in sorted((root / "jaxmodels").rglob("*.py")):
        name = ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        if name not in ("jaxmodels", "jaxmodels.__main__"):  # the surface, which shows what is below it
            yield name, file


def test_no_import_runs_upward(root):
    found: dict[str, set[str]] = {}
    for module, file in modules(root):
        here, name = level(module)
        for other in imports(root, file):
            above, theirs = level(other)
            if above > here and other != "jaxmodels":
                found.setdefault(f"{name} -> {theirs}", set()).add(f"{module} imports {other}")
    assert not found, {edge: sorted(lines) for edge, lines in found.items()}


def test_no_modules_import_each_other_in_a_circle(root):
    """An import inside a function counts: it may hide a circle. One for types alone does not, since it never runs."""
    graph = {module: {*imports(root, file, types=False)} - {module, "jaxmodels"} for module, file in modules(root)}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        raise AssertionError(" is imported by ".join(error.args[1])) from None


def test_only_config_joins_sections(root):
    """A module may read a section of its own room, and one of a room below it; the whole config is one name."""
    from jaxmodels import config

    sections = {kind.__name__ for kind in get_type_hints(config.Config).values() if dataclasses.is_dataclass(kind)}
    assert len(sections) > 8
    for module, file in modules(root):
        if not module.startswith("jaxmodels.config"):
            names = {
                alias.name
                for node in ast.walk(parsed(file))
                if isinstance(node, ast.ImportFrom)
                for alias in node.names
            }
            assert len(sections & names) <= 2, f"{module} imports {sorted(sections & names)}"


def test_the_outside_is_never_imported(root):
    for module, file in modules(root):
        for node in ast.walk(parsed(file)):
            named = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            named += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            outside = {name.split(".")[0] for name in named} & {"configs", "benchmarks", "launch", "tests", "examples"}
            assert not outside, f"{module} imports {outside}"


def test_ci_runs_every_comparison_with_torch_and_transformers(root):
    """Tests marked `parity` are left out of the main run: those elsewhere than in tests/parity are named beside it."""
    named = (root / ".ci" / "run").read_text()
    marked = [path for path in (root / "tests").rglob("test_*.py") if "mark.parity" in path.read_text()]
    elsewhere = {str(path.relative_to(root)) for path in marked if path != Path(__file__)}
    missing = {name for name in elsewhere if not name.startswith("tests/parity/") and f" {name} " not in named}
    assert not missing
