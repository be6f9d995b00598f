"""The benchmarks are not installed: they are loaded from the checkout, without the checkout on the import path.

There the checkout's warpcache/ would hide the installed package, which is what the tests are to test.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

_FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
_spec = importlib.util.spec_from_file_location(
    "benchmarks", _FOLDER / "__init__.py", submodule_search_locations=[str(_FOLDER)]
)
assert _spec is not None
assert _spec.loader is not None
_package = importlib.util.module_from_spec(_spec)
sys.modules["benchmarks"] = _package
_spec.loader.exec_module(_package)
