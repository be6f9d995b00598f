"""Conformance from outside: ONNX's node cases through both backends, run once a session."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

# Test folders are no packages; helpers beside the tests are imported by their names.
sys.path.insert(0, str(Path(__file__).parent))

import onnx_cases
import ort_runs
import rtx_builds


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-operators", action="store_true", help="write docs/operators.md anew")


@dataclass(frozen=True)
class Outcomes:
    """What became of every node case.

    Attributes:
        collection: The cases.
        ort: Case name -> None, or what ONNX Runtime did wrong.
        rtx: Case name -> None, or why TensorRT-RTX does not build it.
    """

    collection: onnx_cases.Collection
    ort: Mapping[str, str | None]
    rtx: Mapping[str, str | None]


@pytest.fixture(scope="session")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Every case, run by ONNX Runtime and built by TensorRT-RTX."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed, so nothing can be built with it")
    folder = tmp_path_factory.mktemp("cases")
    collection = onnx_cases.collect()
    paths = {case.name: folder / f"{case.name}.onnx" for case in collection.tried}
    for case in collection.tried:
        paths[case.name].write_bytes(case.model.SerializeToString())
    with ThreadPoolExecutor(1) as pool:
        # ONNX Runtime takes a second of the time between.
        built = pool.submit(rtx_builds.build_all, paths)
        ort: dict[str, str | None] = {}
        for case in collection.tried:
            ort[case.name] = ort_runs.run(case, paths[case.name], ort)
        return Outcomes(collection, ort, built.result())
