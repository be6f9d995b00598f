"""The layering: which folder may import what, read from the source, and the runtime without torch and onnx."""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("kernels", "engine", "export", "models")

# What each folder may import of ours: the arrows of docs/architecture.md, and no others.
OURS: dict[str, set[str]] = {
    "kernels": set(),
    "engine": {"kernels"},
    "export": {"engine"},
    "models": {"engine", "kernels"},
    "warpcache": {"engine"},
}
# What the face may import besides, inside functions: a command pays for what it uses.
OURS_IN_FUNCTIONS: dict[str, set[str]] = {"warpcache": {"engine", "export", "models"}}

# What each folder may import of others; None: anything that the project depends on.
OTHERS: dict[str, set[str] | None] = {
    "kernels": {"numpy", "cuda"},
    "engine": {"numpy", "onnxruntime", "tensorrt", "tensorrt_rtx", "cuda", "flip_evaluator", "safetensors"},
    "export": None,
    "models": {"numpy", "torch"},
    "warpcache": {"numpy", "av", "click", "jinja2", "matplotlib", "rich"},
}


# Inside a package, from the ground up: what each folder may import of its neighbours. A folder that is not listed is a
# mistake, and so is an arrow that is not: the floors are the architecture.
FOLDERS: dict[str, dict[str, set[str]]] = {
    "engine": {
        "files": set(),
        "metrics": set(),
        "bundle": {"files"},
        "schedule": {"bundle"},
        "device": {"bundle"},
        "promise": {"bundle", "metrics"},
        "cpu": {"bundle", "device", "schedule"},
        "cuda": {"bundle", "device", "schedule"},
        "routing": {"bundle", "device", "metrics", "promise", "schedule"},
        "session": {"bundle", "device", "promise", "routing", "schedule"},
        "onnxruntime": {"bundle", "cuda", "device"},
        "tensorrt": {"bundle", "cuda", "device", "files"},
    },
    "export": {
        "training": {"frames"},
        "graph": set(),
        "frames": {"graph"},
        "torch_graph": {"graph"},
        "cut": {"frames", "graph"},
        "adapter": {"cut", "frames", "graph", "training"},
        "branches": {"frames", "graph", "torch_graph", "training"},
        "promise": {"adapter", "frames", "graph", "training"},
        "bundle": {"cut", "frames", "graph"},
        "precision": {"bundle", "frames", "graph", "promise"},
    },
    "warpcache": {
        "media": set(),
        "report": {"media"},
        "tasks": {"media", "report"},
        "cli": {"media", "report", "tasks"},
    },
    "models": {"head": set()},
    "kernels": {"reference": set()},
}
# What the files at a package's top may be imported by: those that every folder may (the ground), and no others.
GROUND: dict[str, set[str]] = {
    "engine": {"errors", "spec", "telemetry"},
    "export": set(),
    "warpcache": {"__init__"},
    "models": {"rasterizer"},
    "kernels": {"errors", "driver", "array", "arguments", "loader", "compiler"},
}


@dataclass(frozen=True)
class Import:
    """One imported module as it is written in the source, made absolute."""

    module: str
    line: int
    in_function: bool


def package_of(folder: str) -> str:
    return "warpcache" if folder == "warpcache" else f"warpcache.{folder}"


def imports(source: str, module: str, *, is_package: bool = False) -> Iterator[Import]:
    """Every module that `source` imports; `from x import y` gives x.y too, since y may be a module."""
    package = module.split(".") if is_package else module.split(".")[:-1]

    def is_typing_guard(node: ast.AST) -> bool:
        return isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}

    def visit(node: ast.AST, in_function: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, in_function)
        elif isinstance(node, ast.ImportFrom):
            base = [] if node.level == 0 else package[: len(package) - (node.level - 1)]
            name = ".".join([*base, *([node.module] if node.module else [])])
            yield Import(name, node.lineno, in_function)
            for alias in node.names:
                yield Import(f"{name}.{alias.name}", node.lineno, in_function)
        # An import for annotations only never runs, so it counts like one in a function.
        inside = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside or is_typing_guard(node))

    yield from visit(ast.parse(source), False)


def violations(source: str, folder: str, module: str, *, is_package: bool = False) -> list[str]:
    """The imports of `source` that the layering forbids, each as one line."""
    found: dict[int, str] = {}
    for item in imports(source, module, is_package=is_package):
        top, *rest = item.module.split(".")
        if top == "warpcache":
            layer = rest[0] if rest and rest[0] in LAYERS else "warpcache"
            allowed = {folder} | OURS[folder]
            if item.in_function:
                allowed |= OURS_IN_FUNCTIONS.get(folder, set())
            # `from .. import __version__` of a lower layer: reading the name and version is no arrow up.
            if layer == "warpcache" and item.module in {"warpcache", "warpcache.__version__"}:
                continue
            if layer not in allowed:
                found[item.line] = f"line {item.line}: {package_of(folder)} imports {item.module}"
        elif top in LAYERS or top in {"tests", "benchmarks"}:
            found[item.line] = f"line {item.line}: bare import of {item.module}; write warpcache.{item.module}"
        elif top not in sys.stdlib_module_names and top != "__future__":
            others = OTHERS[folder]
            if others is not None and top not in others:
                found[item.line] = f"line {item.line}: {package_of(folder)} imports {item.module}"
    return [found[line] for line in sorted(found)]


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("folder", ["warpcache", *LAYERS])
def test_imports_follow_the_layering(folder: str) -> None:
    files = sources(folder)
    assert files, f"no sources in {folder}"
    wrong = []
    for file in files:
        parts = file.relative_to(ROOT / folder).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        module = ".".join([package_of(folder), *(parts[:-1] if is_package else parts)])
        for line in violations(file.read_text(encoding="utf-8"), folder, module, is_package=is_package):
            wrong.append(f"{file.relative_to(ROOT)}: {line}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("folder", "source"),
    [
        ("engine", "import torch"),
        ("engine", "def f():\n    import torch.nn as nn"),
        ("engine", "from ..export import cut"),
        ("engine", "from .. import export"),
        ("engine", "from ..cli import main"),
        ("engine", "import onnx"),
        ("kernels", "from ..engine.spec import TensorSpec"),
        ("models", "from ..export.cut import Cut"),
        ("export", "from warpcache.models import head"),
        ("warpcache", "from .export.compile import compile_generator"),
        ("warpcache", "import torch"),
        ("export", "import engine"),
        ("engine", "from tests.conftest import tiny"),
    ],
)
def test_a_planted_violation_is_found(folder: str, source: str) -> None:
    assert violations(source, folder, f"{package_of(folder)}.planted")


@pytest.mark.parametrize(
    ("folder", "source"),
    [
        ("engine", "import numpy as np\nfrom .spec import TensorSpec\nfrom ..kernels import warp\nimport onnxruntime"),
        ("engine", "from .. import __version__"),
        ("export", "from ..engine.errors import ExportError\nimport torch, onnx"),
        ("warpcache", "def f():\n    from .export.compile import compile_generator\n    from .models.head import x"),
        ("warpcache", "from .engine import Engine\nfrom .report import row"),
    ],
)
def test_what_is_allowed_passes(folder: str, source: str) -> None:
    assert violations(source, folder, f"{package_of(folder)}.planted") == []


def folder_violations(package: str, source: str, where: str, module: str, *, is_package: bool) -> list[str]:
    """The imports of a file in folder `where` of a package that its floor does not allow, each as one line."""
    base = package_of(package).split(".")
    found = []
    for item in imports(source, module, is_package=is_package):
        parts = item.module.split(".")
        if parts[: len(base)] != base or len(parts) == len(base):
            continue
        into = parts[len(base)]
        if package == "warpcache" and into in LAYERS:
            continue
        allowed = FOLDERS[package][where] | {where} | GROUND[package]
        if into not in allowed and not (package == "warpcache" and into == "__version__"):
            found.append(f"line {item.line}: {package}/{where} imports {into}")
    return sorted(set(found))


@pytest.mark.parametrize("package", sorted(FOLDERS))
def test_folders_import_downwards_only(package: str) -> None:
    floors = FOLDERS[package]
    there = {path.name for path in (ROOT / package).iterdir() if (path / "__init__.py").is_file()}
    assert there == set(floors), "a folder has no floor, or a floor no folder"
    wrong = []
    for file in sources(package):
        parts = file.relative_to(ROOT / package).with_suffix("").parts
        if len(parts) == 1:
            continue
        is_package = parts[-1] == "__init__"
        module = ".".join([package_of(package), *(parts[:-1] if is_package else parts)])
        for line in folder_violations(package, file.read_text("utf-8"), parts[0], module, is_package=is_package):
            wrong.append(f"{file.relative_to(ROOT)}: {line}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", sorted(FOLDERS))
def test_the_floors_have_no_stairs_in_a_circle(package: str) -> None:
    left = {folder: set(below) for folder, below in FOLDERS[package].items()}
    while left:
        ground = {folder for folder, below in left.items() if not below & set(left)}
        assert ground, f"{package}: {sorted(left)} import each other in a circle"
        left = {folder: below for folder, below in left.items() if folder not in ground}


def test_an_arrow_up_is_found() -> None:
    for package, where, source in (
        ("engine", "device", "from ..cpu.device import CpuDevice"),
        ("engine", "schedule", "def f():\n    from ..session.session import Session"),
        ("engine", "session", "from ..engine import Engine"),
        ("export", "graph", "from ..bundle.weights import shared_weights"),
        ("warpcache", "report", "from ..tasks.quality_choice import QualityChoice"),
    ):
        module = f"{package_of(package)}.{where}.planted"
        assert folder_violations(package, source, where, module, is_package=False), source


@pytest.mark.parametrize("package", sorted(FOLDERS))
def test_every_folder_says_what_lives_there(package: str) -> None:
    for folder in FOLDERS[package]:
        text = ast.get_docstring(ast.parse((ROOT / package / folder / "__init__.py").read_text("utf-8"))) or ""
        assert text.count(".") >= (1 if folder == "reference" else 3), f"{package}/{folder}: three sentences"


BLOCKED = textwrap.dedent(
    """
    import sys

    class Blocker:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in {"torch", "onnx", "onnxscript", "onnx_ir", "scipy"}:
                raise ImportError(f"{name} is blocked")
            return None

    sys.meta_path.insert(0, Blocker())
    try:
        import torch
    except ImportError:
        pass
    else:
        raise SystemExit("the blocker does not block")
    """
)


def run_blocked(code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter in which torch and onnx cannot be imported."""
    # -P: the checkout's own warpcache/ must not shadow the installed package.
    return subprocess.run(
        [sys.executable, "-P", "-c", BLOCKED + textwrap.dedent(code)], capture_output=True, text=True, check=False
    )


def test_every_engine_module_imports_without_torch_and_onnx() -> None:
    result = run_blocked(
        """
        import importlib, pkgutil
        import warpcache, warpcache.engine, warpcache.kernels
        for package in (warpcache.engine, warpcache.kernels):
            for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
                importlib.import_module(module.name)
        """
    )
    assert result.returncode == 0, result.stderr


def test_the_command_line_and_the_demo_import_without_torch_and_onnx() -> None:
    result = run_blocked(
        """
        import warpcache.cli.main, warpcache.tasks.demo, warpcache.tasks.bench, warpcache.media.inputs
        import warpcache.report.policies, warpcache.models.head
        """
    )
    assert result.returncode == 0, result.stderr


def test_the_command_line_loads_nothing_heavy() -> None:
    # What `warpcache --help` pays for; each of these takes from a tenth of a second to seconds to import.
    result = run_blocked(
        """
        import warpcache.cli.main
        heavy = {"onnxruntime", "matplotlib", "av", "jinja2", "flip_evaluator"} & set(sys.modules)
        raise SystemExit(f"loaded: {sorted(heavy)}" if heavy else 0)
        """
    )
    assert result.returncode == 0, result.stderr
