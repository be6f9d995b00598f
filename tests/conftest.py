"""Fixtures that tests of several packages use."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

# One thread for each library's loops, in this process and those that it starts: there is a process a core, sizes are
# small, and OpenMP's threads spin while they wait for each other (the README's compile took 130 s with two threads on
# two busy cores, and 51 s with one). It must be said before NumPy, PyTorch or ONNX Runtime is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest

# The doubles of TensorRT's Python modules are imported by name, also by the process that builds engines.
sys.path.append(str(Path(__file__).parent / "software_tensorrt"))
# What several files set up alike; tests/ is no package, so its modules are imported by name too.
sys.path.append(str(Path(__file__).parent / "support"))

from tiny_bundles import SIZE, STEER, make_routed_bundle, make_tiny_bundle


def _software_cuda_fixtures() -> ModuleType:
    """The fixtures of tests/software_cuda, imported as the package `software_cuda`: tests/ itself is no package."""
    folder = Path(__file__).resolve().parent / "software_cuda"
    spec = importlib.util.spec_from_file_location(
        "software_cuda", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["software_cuda"] = package
    spec.loader.exec_module(package)
    return importlib.import_module("software_cuda.fixture")


_fixtures = _software_cuda_fixtures()
software_cuda_driver = _fixtures.software_cuda_driver
software_cuda = _fixtures.software_cuda
no_cuda_driver = _fixtures.no_cuda_driver


# The files that take longest, longest first: begun last, one of them would keep one core busy and leave the rest idle.
LONGEST = (
    "test_readme.py",
    "conformance/test_split_everywhere.py",
    "export/test_compile_exits.py",
    "conformance/test_operator_table.py",
    "export/precision/test_convert.py",
    "export/branches/test_branches.py",
    "export/test_compile.py",
    "benchmarks/test_gpu_engine_benchmark.py",
    "benchmarks/test_building_benchmarks.py",
    "conformance/test_generators.py",
)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """No further processes where the tests of a GPU are asked for: it is one, and they measure its memory."""
    return 0 if config.option.markexpr == "gpu" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files; the order of the others, and within a file, stays."""
    root = Path(__file__).parent
    rank = {root / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))


def pytest_configure(config: pytest.Config) -> None:
    """Say what the fixtures' marker means."""
    config.addinivalue_line(
        "markers", "leaves_cuda_behind: the test may keep memory, streams, events and graphs of software CUDA"
    )


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Engines and compiled kernels go into a folder of the run: neither does it write to the user's, nor live on it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WARPCACHE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny complete bundle, shared by all tests: read it only (`make_bundle` gives one to damage)."""
    return make_tiny_bundle(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def routed_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny bundle with a quality promise in PSNR, shared by all tests: read it only."""
    return make_routed_bundle(tmp_path_factory.mktemp("routed"))


@pytest.fixture(scope="session")
def make_routed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that makes another routed bundle (see `make_routed_bundle`)."""
    return lambda **options: make_routed_bundle(tmp_path_factory.mktemp("routed"), **options)


@pytest.fixture(scope="session")
def steered() -> Callable[..., np.ndarray]:
    """A function ``(frames, **values)`` -> x [frames, 3, 16, 16] that does not change, with pixels of `STEER` set.

    A value is one number, or one a frame. What is not named is 0 for the predictor's novelty and NaN switches.
    """

    def make(frames: int, **values: object) -> np.ndarray:
        x = np.repeat(np.random.default_rng(3).uniform(-0.5, 0.5, (1, 3, SIZE, SIZE)), frames, axis=0)
        x[:, 0, 0, : max(STEER.values()) + 1] = 0.0
        for name, value in values.items():
            x[:, 0, 0, STEER[name]] = value
        return x.astype(np.float32)

    return make


@pytest.fixture
def make_bundle(tmp_path: Path) -> Callable[[], Path]:
    """A function that makes a fresh tiny bundle, which the test may damage."""
    return lambda: make_tiny_bundle(tmp_path)
