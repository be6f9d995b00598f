"""What keeps the house as it is: no circles between files, no names in the place of roles, no endless signatures."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("engine", "export", "kernels", "models", "warpcache")

# Names that modules of a bundle have had. What a module is for is asked of its role.
MODULE_NAMES = {"generator", "producer", "plain", "predictor", "predictor_cold", "whole"}
MOST_ARGUMENTS = 7
MANY_ARGUMENTS = {
    # The public constructor: keyword options of an engine, which a record would only move out of sight.
    ("engine/engine.py", "__init__"),
}


def modules() -> dict[str, Path]:
    """Every module of ours by its dotted name."""
    found = {}
    for folder in PACKAGES:
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = list(path.relative_to(ROOT).with_suffix("").parts)
            name = ".".join(parts if folder == "warpcache" else ["warpcache", *parts])
            found[name.removesuffix(".__init__")] = path
    return found


def imported(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of ours that one imports when it is loaded, or for its annotations."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(path.read_text("utf-8"))
    later = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or id(node) in later:
            continue
        base = package.split(".")
        base = base[: len(base) - (node.level - 1)] if node.level else []
        module = ".".join([*base, *([node.module] if node.module else [])])
        found |= {full if (full := f"{module}.{alias.name}") in known else module for alias in node.names}
    return (found & set(known)) - {name}


def circles(graph: dict[str, set[str]]) -> list[str]:
    """One line for a set of modules that import each other; empty where there is none."""
    left = dict(graph)
    while left:
        ground = {name for name, below in left.items() if not below & set(left)}
        if not ground:
            return [", ".join(sorted(left))]
        left = {name: below for name, below in left.items() if name not in ground}
    return []


def compared_names(source: str) -> Iterator[tuple[int, str]]:
    """Lines on which something is compared with the name of a module, or looked for among such names."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            for side in (node.left, *node.comparators):
                values = side.elts if isinstance(side, ast.Tuple | ast.List | ast.Set) else [side]
                if any(isinstance(value, ast.Constant) and value.value in MODULE_NAMES for value in values):
                    yield node.lineno, ast.unparse(node)


def test_no_two_files_import_each_other() -> None:
    known = modules()
    graph = {name: imported(name, path, known) for name, path in known.items()}
    assert circles(graph) == []


def test_a_circle_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a, b, c"]


@pytest.mark.parametrize("folder", [*PACKAGES, "benchmarks"])
def test_nothing_is_decided_by_a_modules_name(folder: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {text}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path.name != "roles.py"
        for line, text in compared_names(path.read_text("utf-8"))
    ]
    assert not wrong, "\n".join(wrong)


def test_a_comparison_with_a_name_is_found() -> None:
    assert list(compared_names('if name == "producer" or "whole" in names or name in ("plain", "warp"):\n    pass'))
    assert not list(compared_names('if role is Role.PRODUCER or mode == "full":\n    pass'))


def test_signatures_stay_short() -> None:
    long = set()
    for folder in (*PACKAGES, "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    every = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
                    if len([given for given in every if given.arg not in ("self", "cls")]) > MOST_ARGUMENTS:
                        long.add((path.relative_to(ROOT).as_posix(), node.name))
    assert long == MANY_ARGUMENTS, "take a record, or say here why not"


@pytest.mark.parametrize("folder", ["engine", "export", "warpcache"])
def test_few_files_stand_at_the_top(folder: str) -> None:
    assert len(list((ROOT / folder).glob("*.py"))) <= 8
