"""Every name that is called of TensorRT is there in each of its Python bindings, and takes as many arguments.

The code runs on the doubles in the other tests, and the doubles have no public name beyond what it uses: so what the
doubles have is held against the bindings. TensorRT-RTX's are installed. Those of full TensorRT are fetched by pip
(1.3 MB each, kept in pytest's cache) and imported over stubs of the libraries that they link.
"""

from __future__ import annotations

import enum
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tests_software_tensorrt
import tests_software_tensorrt_full

from warpcache.engine.tensorrt.flavour import Flavour

# What prints the surface of a bindings module as JSON: class -> attribute -> its docstring, which holds the signature.
DUMP = """
import importlib, json, sys
module = importlib.import_module(sys.argv[1])
surface = {}
for name, kind in vars(module).items():
    if isinstance(kind, type):
        surface[name] = {key: getattr(kind, key).__doc__ or "" for key in dir(kind) if key[0] != "_"}
        severity = getattr(kind, "Severity", None)
        if severity is not None:
            surface[name + ".Severity"] = {key: "" for key in dir(severity)}
print(json.dumps({"version": module.__version__, "surface": surface}))
"""
# All that the bindings take of the libraries: entries that make objects. None is called.
STUBS = """
void *createInferBuilder_INTERNAL(void) { return 0; }
void *createInferRefitter_INTERNAL(void) { return 0; }
void *createInferRuntime_INTERNAL(void) { return 0; }
void *createNvOnnxParser_INTERNAL(void) { return 0; }
void *createNvOnnxParserRefitter_INTERNAL(void) { return 0; }
void *getPluginRegistry(void) { return 0; }
void *getBuilderPluginRegistry(void) { return 0; }
int getNvOnnxParserVersion(void) { return 0; }
int initLibNvInferPlugins(void) { return 1; }
"""
BINDINGS = [
    # The oldest that serves (JetPack 6.2), the last of 10, and 11.
    ("tensorrt-cu12-bindings", "10.3.0"),
    ("tensorrt-cu12-bindings", "10.16.1.11"),
    ("tensorrt-cu13-bindings", "11.4.0.106"),
]
# What the driver in software reports is Hopper, which TensorRT-RTX does not serve.
ONLY_IN_SOFTWARE = {("ComputeCapability", "SM90")}

Surface = Mapping[str, Mapping[str, str]]


def dump(module: str, environment: Mapping[str, str]) -> tuple[str, Surface]:
    done = subprocess.run(
        [sys.executable, "-P", "-c", DUMP, module],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    return said["version"], said["surface"]


def fetch(package: str, version: str, into: Path) -> Path:
    """The wheel of a package, from the cache or by pip."""
    pattern = f"{package.replace('-', '_')}-{version}-*.whl"
    if not any(into.glob(pattern)):
        options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--retries=0", "--timeout=20"]
        command = [sys.executable, "-m", "pip", "download", "-q", *options, "-d", str(into), f"{package}=={version}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            said = (done.stderr.strip() or "no reason given").splitlines()[-1]
            pytest.skip(f"pip cannot fetch {package} {version}: {said}")
    return next(into.glob(pattern))


@pytest.fixture(scope="module", params=BINDINGS, ids=[version for _, version in BINDINGS])
def full(
    request: pytest.FixtureRequest, pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Surface]:
    """Version and surface of full TensorRT's bindings."""
    package, version = request.param
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("the libraries' stubs need a C compiler on Linux")
    assert pytestconfig.cache is not None
    wheel = fetch(package, version, pytestconfig.cache.mkdir("tensorrt-bindings"))
    folder = tmp_path_factory.mktemp("bindings")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    (folder / "stubs.c").write_text(STUBS)
    package_folder, major = folder / "tensorrt_bindings", version.split(".", maxsplit=1)[0]
    for library in ("libnvinfer", "libnvinfer_plugin", "libnvonnxparser"):
        name = f"{library}.so.{major}"
        command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", name, str(folder / "stubs.c")]
        subprocess.run(command, cwd=package_folder, check=True)
    return dump("tensorrt_bindings", {"PYTHONPATH": str(folder), "LD_LIBRARY_PATH": str(package_folder)})


@pytest.fixture(scope="module")
def rtx() -> tuple[str, Surface]:
    """Version and surface of the TensorRT-RTX that is installed."""
    return dump("tensorrt_rtx", {})


def used(double: ModuleType) -> Iterator[tuple[str, str, Any]]:
    """Every class and public attribute of a double, as the library names the class."""
    for kind in double.SURFACE:
        name = double.REAL_NAMES.get(kind, kind.__name__)
        yield name, "", None
        if issubclass(kind, enum.Enum):
            for member in kind.__members__:
                yield name, member, None
            continue
        for attribute in dir(kind):
            if not attribute.startswith("_"):
                yield name, attribute, inspect.getattr_static(kind, attribute)
        for inner in getattr(getattr(kind, "Severity", None), "__members__", ()):
            yield f"{name}.Severity", inner, None


def missing(double: ModuleType, surface: Surface) -> list[str]:
    return [
        f"{kind}.{attribute}"
        for kind, attribute, _ in used(double)
        if (kind, attribute) not in ONLY_IN_SOFTWARE
        and (kind not in surface or (attribute and attribute not in surface[kind]))
    ]


def argument_counts(doc: str) -> list[tuple[int, int]]:
    """How many arguments each overload takes at least and at most, `self` left out, from pybind's docstring."""
    found = []
    for signature in re.findall(r"^(?:\d+\. )?\w+\((self: .*)\) ->", doc, re.MULTILINE):
        # Brackets hold commas of their own, e.g. Sequence[int, ...].
        flat = signature
        while re.search(r"\[[^\[\]]*\]", flat):
            flat = re.sub(r"\[[^\[\]]*\]", "", flat)
        flat = re.sub(r"<[^<>]*>", "", flat)
        arguments = flat.split(", ")[1:]
        found.append((sum("=" not in argument for argument in arguments), len(arguments)))
    return found


def called_otherwise(double: ModuleType, surface: Surface) -> list[str]:
    """The attributes that a double is called for and the library is not, or with another number of arguments."""
    wrong = []
    for kind, attribute, member in used(double):
        if member is None:
            continue
        counts = argument_counts(surface[kind][attribute])
        if not inspect.isfunction(member):
            # A property or a slot: pybind writes a signature for what is called, and only for that.
            if counts:
                wrong.append(f"{kind}.{attribute} is a method")
            continue
        taken = len(inspect.signature(member).parameters) - 1
        if not any(least <= taken <= most for least, most in counts):
            wrong.append(f"{kind}.{attribute} takes {counts}, and is given {taken}")
    return wrong


def test_tensorrt_rtx_has_every_name_that_is_used(rtx):
    version, surface = rtx
    assert version == Flavour.load("tensorrt-rtx").version
    assert missing(tests_software_tensorrt, surface) == []
    assert called_otherwise(tests_software_tensorrt, surface) == []


def test_full_tensorrt_has_every_name_that_is_used(full):
    _, surface = full
    assert missing(tests_software_tensorrt_full, surface) == []
    assert called_otherwise(tests_software_tensorrt_full, surface) == []


def test_what_only_tensorrt_rtx_has_is_not_in_the_full_ones(full):
    """Each of these is asked for by `hasattr`: were it there, the code would go another way than was tested."""
    _, surface = full
    absent = {
        ("ComputeCapability", ""),
        ("CudaGraphStrategy", ""),
        ("BuilderFlag", "REQUIRE_USER_ALLOCATION"),
        ("Runtime", "get_engine_validity"),
        ("IExecutionContext", "is_stream_capturable"),
    }
    names = {(kind, attribute) for kind, attribute, _ in used(tests_software_tensorrt)}
    assert absent <= names
    for kind, attribute in absent:
        assert attribute not in surface.get(kind, {})
        assert attribute or kind not in surface
    assert not absent & {(kind, attribute) for kind, attribute, _ in used(tests_software_tensorrt_full)}


def test_the_comparison_finds_what_is_missing_and_what_is_given_too_much(rtx):
    """A seeded defect for each half of the comparison above."""
    _, surface = rtx
    without = {kind: dict(attributes) for kind, attributes in surface.items()}
    del without["IExecutionContext"]["execute_async_v3"]
    del without["DataType"]["INT64"]
    assert missing(tests_software_tensorrt, without) == ["DataType.INT64", "IExecutionContext.execute_async_v3"]
    other = {kind: dict(attributes) for kind, attributes in surface.items()}
    other["IExecutionContext"]["set_tensor_address"] = "set_tensor_address(self: trt.X, name: str) -> bool"
    assert called_otherwise(tests_software_tensorrt, other) == [
        "IExecutionContext.set_tensor_address takes [(1, 1)], and is given 2"
    ]
    other["IExecutionContext"]["set_tensor_address"] = surface["IExecutionContext"]["set_tensor_address"]
    other["ICudaEngine"]["num_io_tensors"] = "num_io_tensors(self: trt.X) -> int"
    assert called_otherwise(tests_software_tensorrt, other) == ["ICudaEngine.num_io_tensors is a method"]


def test_signatures_are_read_from_docstrings():
    doc = """f(*args, **kwargs)
    Overloaded function.

1. f(self: a.B, name: str, shape: list[int, ...] = [1, 2]) -> bool
2. f(self: a.B) -> None
3. f(self: a.B, strategy: a.C = <C.STATIC: 0>) -> a.D
"""
    assert argument_counts(doc) == [(1, 2), (0, 0), (0, 1)]
