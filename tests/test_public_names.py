"""The public names, pinned: adding or removing one is a decision, not a side effect."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

PUBLIC: dict[str, set[str]] = {
    "warpcache": {
        "BackendError",
        "Bundle",
        "BundleError",
        "ClosedError",
        "CudaOptions",
        "DeadlineError",
        "DeviceError",
        "Engine",
        "ExportError",
        "Frame",
        "InputError",
        "Policy",
        "Quality",
        "Session",
        "SessionStatistics",
        "WarpcacheError",
        "__version__",
    },
    "warpcache.engine": {
        "Array",
        "BackendError",
        "Bundle",
        "BundleError",
        "ClosedError",
        "CudaOptions",
        "DeadlineError",
        "DeviceError",
        "Engine",
        "ExportError",
        "Frame",
        "InputError",
        "LatencySummary",
        "Manifest",
        "Policy",
        "Quality",
        "Session",
        "SessionStatistics",
        "TensorSpec",
        "WarpcacheError",
        "write_bundle",
    },
}


def modules() -> list[str]:
    """Every module of the package, private ones and `__main__` left out."""
    found = []
    for folder in ("warpcache", "engine", "export", "kernels", "models"):
        prefix = "warpcache" if folder == "warpcache" else f"warpcache.{folder}"
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            # A folder's own file says what lives there, and hands nothing on.
            if not parts[-1].startswith("_"):
                found.append(".".join([prefix, *parts]))
    return found


@pytest.mark.parametrize("package", sorted(PUBLIC))
def test_public_names_are_pinned(package: str) -> None:
    module = importlib.import_module(package)
    assert set(module.__all__) == PUBLIC[package]
    for name in module.__all__:
        assert getattr(module, name) is not None


@pytest.mark.parametrize("name", modules())
def test_every_module_says_what_is_public(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__, f"{name} has no docstring"
    exported = module.__all__
    assert len(exported) == len(set(exported))
    for public in exported:
        assert hasattr(module, public), f"{name}.__all__ names {public!r}, which is not there"


def test_the_version_is_one() -> None:
    import warpcache

    metadata = importlib.import_module("importlib.metadata")
    assert metadata.version("warpcache") == warpcache.__version__


def test_python_m_warpcache_is_the_command() -> None:
    # -P: a checkout's own warpcache/ must not shadow the installed package.
    result = subprocess.run(
        [sys.executable, "-P", "-m", "warpcache", "--version"], capture_output=True, text=True, check=False
    )
    import warpcache

    assert result.returncode == 0, result.stderr
    assert warpcache.__version__ in result.stdout
