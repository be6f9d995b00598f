"""The edge folder: what is in it, and that it needs nothing but NumPy, cuda-python, TensorRT and itself."""

from __future__ import annotations

import ast
import json
import os
import shlex
import shutil
import site
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from click.testing import CliRunner

from warpcache.cli.main import cli
from warpcache.engine.bundle.bundle import Bundle
from warpcache.engine.errors import BackendError, InputError
from warpcache.engine.promise.calibration import Calibration, Quality
from warpcache.engine.tensorrt.flavour import Flavour
from warpcache.tasks.build import Built, build_bundle
from warpcache.tasks.choices import BuildOptions
from warpcache.tasks.deploy import (
    CUDA_PYTHON,
    LEFT_OUT,
    NUMPY,
    add_bundle,
    add_runtime,
    check_place,
    deployed_sources,
    written_folder,
)

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")

ROOT = Path(__file__).resolve().parents[3]
TARGETS = ("sm_89", "sm_120")

# Run with -I -S: no site-packages, so no editable install either; then only what the folder says it needs is let in.
BLOCKED = """
import os, sys

folder, *places = sys.argv[1:]
sys.argv[1:] = []
allowed = {"numpy", "cuda", "tensorrt_rtx", "tensorrt_rtx_libs", "tensorrt_rtx_bindings", "warpcache"}

class Blocker:
    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        if top in allowed or top in sys.stdlib_module_names or top.startswith("_sysconfigdata"):
            return None
        raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Blocker())
sys.path = [folder, *sys.path, *places]
os.environ["WARPCACHE_CACHE"] = os.path.join(folder, "cache")
for name in ("click", "onnxruntime", "safetensors", "flip_evaluator", "torch", "onnx", "rich"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"the blocker lets {name} through")
"""


def run_alone(folder: Path, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code` where only the folder, NumPy, cuda-python and TensorRT-RTX can be imported, and no GPU is seen."""
    places = [*site.getsitepackages(), site.getusersitepackages()]
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", BLOCKED + textwrap.dedent(code), str(folder), *places],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment},
    )


def run_in_software(driver: Any, folder: Path, words: list[str]) -> subprocess.CompletedProcess[str]:
    """The folder's own runtime and example, in a process that has the driver and TensorRT-RTX in software.

    The engines are the real library's, so the double builds its own.
    """
    code = f"""
import ctypes, importlib, runpy, sys
sys.path.append({str(Path(__file__).resolve().parents[2] / "software_tensorrt")!r})
sys.path.insert(0, {str(folder)!r})
driver = ctypes.CDLL({str(driver._library._name)!r}, mode=ctypes.RTLD_GLOBAL)
driver.swcuda_configure(b"compute_major", ctypes.c_longlong(8))
sys.modules["tensorrt_rtx"] = importlib.import_module("tests_software_tensorrt")
sys.argv[1:] = {words!r}
runpy.run_path({str(folder / "run.py")!r}, run_name="__main__")
import warpcache
assert warpcache.__file__.startswith({str(folder)!r}), warpcache.__file__
"""
    return subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def built(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The tiny bundle as a folder, by the real builder. Read it only."""
    out = tmp_path_factory.mktemp("deployed") / "new" / "edge"
    return build_bundle(tiny_bundle, BuildOptions(backend="tensorrt-rtx", targets=TARGETS, out=out))


@pytest.fixture(scope="module")
def edge(built: Built) -> Path:
    assert built.deployment is not None
    return built.deployment.path


def files(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            yield path.relative_to(folder).as_posix(), path


def test_what_is_in_the_folder(built: Built, edge: Path, tiny_bundle: Path) -> None:
    found = dict(files(edge))
    tops = {name.split("/")[0] for name in found}
    assert tops == {"tiny.warp", "engines", "cache", "warpcache", "requirements.txt", "run.py", "README.md"}
    assert [path.name for path in edge.parent.iterdir()] == ["edge"]
    assert Bundle.open(edge / "tiny.warp").manifest == Bundle.open(tiny_bundle).manifest
    engines = [path.name for path in (edge / "engines").iterdir()]
    assert sorted(engines) == sorted(engine.path.name for engine in built.engines if engine.path is not None)
    assert len(engines) == 4
    sources = {name for name in found if name.startswith("warpcache/")} - {"warpcache/LICENSE"}
    assert sources == {f"warpcache/{name}" for name in deployed_sources()}
    kernels = [path.name for path in (ROOT / "kernels").glob("*.cu")]
    for kernel in kernels:
        for target in TARGETS:
            assert len(list((edge / "cache" / "kernels").glob(f"{Path(kernel).stem}.{target}.*.cubin"))) == 1
    assert (edge / "warpcache" / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()


def test_the_sizes_are_those_on_disk(built: Built, edge: Path) -> None:
    assert built.deployment is not None
    sizes: dict[str, int] = {}
    for name, path in files(edge):
        top = name.split("/")[0]
        sizes[top] = sizes.get(top, 0) + path.stat().st_size
    assert built.deployment.parts == sizes
    assert built.deployment.size_bytes == sum(sizes.values())


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_everything_is_readable_as_what_one_writes_oneself(edge: Path) -> None:
    mask = os.umask(0o022)
    os.umask(mask)
    for path in (edge, *edge.rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~mask, path


def test_requirements_are_those_of_the_package(built: Built, edge: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [line for line in (edge / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    assert lines == [NUMPY, CUDA_PYTHON, f"tensorrt-rtx=={built.flavour.version}"]
    # The lower bounds are the package's own; above them the next major is shut out.
    assert NUMPY.split(",")[0] in project["dependencies"]
    assert CUDA_PYTHON.split(",")[0] in project["optional-dependencies"]["cuda"]
    assert built.deployment is not None
    for dependency in built.deployment.dependencies:
        # Each is a library of several MB, and installed where this test runs.
        assert dependency.size_bytes is not None
        assert dependency.size_bytes > 5_000_000, dependency


def test_the_readme_names_what_is_there(built: Built, edge: Path) -> None:
    text = (edge / "README.md").read_text()
    rows = [line.split("|")[1].strip().strip("`") for line in text.splitlines() if line.startswith("| `")]
    assert {*rows, "README.md"} == {path.name for path in edge.iterdir()}
    for word in ("sm_89, sm_120", built.flavour.version, "`x`: float32 [frames, 3, 16, 16]", "pip install -r"):
        assert word in text, word


def test_nothing_left_out_is_imported_by_what_is_there(edge: Path) -> None:
    runtime = edge / "warpcache"
    missing = []
    for _, path in files(runtime):
        if path.suffix != ".py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level and node.module:
                base = path.parents[node.level - 1] / Path(*node.module.split("."))
                if not base.with_suffix(".py").is_file() and not (base / "__init__.py").is_file():
                    missing.append(f"{path.relative_to(runtime)}:{node.lineno}: {node.module}")
    assert not missing
    assert {path.relative_to(ROOT).as_posix() for path in (ROOT / "engine").rglob("*.py")} >= LEFT_OUT


def test_every_module_imports_alone(edge: Path) -> None:
    result = run_alone(
        edge,
        """
        import importlib, pkgutil
        import warpcache, warpcache.engine, warpcache.kernels
        for package in (warpcache.engine, warpcache.kernels):
            for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
                importlib.import_module(module.name)
        ours = [module for name, module in sys.modules.items() if name.split(".")[0] == "warpcache"]
        assert len(ours) > 40, len(ours)
        for module in ours:
            assert os.path.realpath(module.__file__).startswith(os.path.realpath(folder) + os.sep), module
        """,
    )
    assert result.returncode == 0, result.stderr


def test_bundle_engines_and_kernels_are_found_alone(built: Built, edge: Path) -> None:
    result = run_alone(
        edge,
        f"""
        import json
        from pathlib import Path
        from warpcache.engine.tensorrt.engines import Toolchain, build_engines, engine_key
        from warpcache.engine.bundle.bundle import Bundle
        from warpcache.engine.tensorrt.engine_cache import EngineCache, default_folder
        from warpcache.engine.tensorrt.flavour import Flavour
        from warpcache.kernels.loader import KernelLibrary

        bundle = Bundle.open(Path(folder) / "tiny.warp")
        cache = EngineCache(default_folder(bundle.path))
        flavour = Flavour.load("tensorrt-rtx")
        found = {{}}
        for target in {TARGETS!r}:
            # One GPU at a time, as a machine asks; build=False raises where one is missing.
            for engine in build_engines(bundle, Toolchain(flavour, (target,)), cache, build=False):
                found[f"{{engine.module}} {{target}}"] = engine.reused and engine.size_bytes
        # Without a compiler: what is not in the folder's cache is an error before the driver is asked for.
        sys.modules["cuda.bindings.nvrtc"] = sys.modules["cuda.core"] = None

        class Gpu:
            def __init__(self, architecture):
                self.architecture = architecture

        import warpcache.kernels
        for source in Path(warpcache.kernels.__file__).parent.glob("*.cu"):
            for target in (*{TARGETS!r}, "sm_75"):
                try:
                    KernelLibrary(Gpu(target), source.name)
                except Exception as error:
                    found[f"{{source.name}} {{target}}"] = type(error).__name__
        print(json.dumps({{"folder": str(cache.folder), "found": found}}))
        """,
        WARPCACHE_CACHE="",
    )
    assert result.returncode == 0, result.stderr
    said: dict[str, Any] = json.loads(result.stdout)
    assert Path(said["folder"]) == edge / "engines"
    for engine in built.engines:
        for target in TARGETS:
            assert said["found"].pop(f"{engine.module} {target}") == engine.size_bytes
    expected = {
        f"{path.name} {target}": "DeviceError" if target in TARGETS else "BackendError"
        for path in (ROOT / "kernels").glob("*.cu")
        for target in (*TARGETS, "sm_75")
    }
    assert said["found"] == expected


def test_everything_is_made_up_to_the_gpu_alone(edge: Path) -> None:
    result = run_alone(
        edge,
        """
        from warpcache import Engine, CudaOptions
        from warpcache.engine import DeviceError
        from warpcache.engine.backends import choose_backend
        backend = choose_backend("tensorrt-rtx", CudaOptions(build=False))
        assert backend.name == "tensorrt-rtx"
        try:
            Engine(os.path.join(folder, "tiny.warp"), device="cuda:0", backend="tensorrt-rtx")
        except DeviceError as error:
            print(error)
        """,
    )
    assert result.returncode == 0, result.stderr
    # What the driver's absence, or the empty CUDA_VISIBLE_DEVICES where there is one, is called.
    assert result.stdout.startswith(("no NVIDIA driver was found", "starting the CUDA driver failed")), result.stdout


def test_the_example_ends_with_one_sentence_where_no_gpu_is(edge: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "frames.npz", x=np.zeros((3, 3, 16, 16), np.float32))
    code = """
    import runpy
    sys.argv[1:] = [os.environ["FRAMES"], os.environ["ANSWERS"]][: int(os.environ["COUNT"])]
    runpy.run_path(os.path.join(folder, "run.py"), run_name="__main__")
    """
    places = {"FRAMES": str(tmp_path / "frames.npz"), "ANSWERS": str(tmp_path / "answers.npz")}
    result = run_alone(edge, code, **places, COUNT="2")
    assert result.returncode == 1
    assert result.stderr.startswith(("run.py: no NVIDIA driver was found", "run.py: starting the CUDA driver failed"))
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "answers.npz").exists()
    assert run_alone(edge, code, **places, COUNT="0").stderr.startswith("Answer the frames of an .npz")
    # Frames that are none, the same: a file of another kind, one that was cut off, an array alone, objects.
    whole = (tmp_path / "frames.npz").read_bytes()
    (tmp_path / "frames.npz").write_bytes(b"hello")
    said = [run_alone(edge, code, **places, COUNT="1").stderr]
    (tmp_path / "frames.npz").write_bytes(whole[:500])
    said.append(run_alone(edge, code, **places, COUNT="1").stderr)
    with (tmp_path / "frames.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    said.append(run_alone(edge, code, **places, COUNT="1").stderr)
    np.savez(tmp_path / "frames.npz", x=np.array([{}], dtype=object))
    said.append(run_alone(edge, code, **places, COUNT="1").stderr)
    for line in said:
        assert line.startswith(f"run.py: '{tmp_path / 'frames.npz'}' is not an .npz of arrays: "), line
        assert len(line.splitlines()) == 1


def test_the_example_is_short(edge: Path) -> None:
    lines = (edge / "run.py").read_text().splitlines()
    assert len(lines) <= 45
    compile("\n".join(lines), "run.py", "exec")


def test_a_place_that_is_taken_or_in_the_bundle_is_refused(make_bundle: Any, tmp_path: Path) -> None:
    bundle = make_bundle()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match=r"'.*file' already exists; remove it"):
        check_place(tmp_path / "file", bundle)
    with pytest.raises(InputError, match=r"'.*edge' lies in the bundle '.*tiny.warp'"):
        check_place(bundle / "edge", bundle)
    result = CliRunner().invoke(
        cli, ["build", str(bundle), "--backend", "tensorrt-rtx", "--out", str(tmp_path / "file")]
    )
    assert result.exit_code == 1
    assert result.stderr.startswith("warpcache: ")
    assert "already exists" in result.stderr
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_folder_that_is_not_finished_is_not_there(error: BaseException, tmp_path: Path) -> None:
    out = tmp_path / "new" / "edge"
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else InputError

    def write() -> None:
        with written_folder(out) as folder:
            (folder / "half").write_text("written")
            raise error

    with pytest.raises(expected):
        write()
    assert list(out.parent.iterdir()) == []


def test_an_interrupted_deployment_leaves_nothing(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import warpcache.tasks.build

    def interrupted(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(warpcache.tasks.build, "add_runtime", interrupted)
    out = tmp_path / "edge"
    arguments = ["build", str(tiny_bundle), "--backend", "tensorrt-rtx", "--target", "sm_89", "--out", str(out)]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("warpcache: interrupted; ")
    assert list(tmp_path.iterdir()) == []


def test_the_edge_folder_answers_on_a_gpu_in_software(software_cuda_driver: Any, edge: Path, tmp_path: Path) -> None:
    session = onnxruntime.InferenceSession(edge / "tiny.warp" / "generator.onnx", providers=["CPUExecutionProvider"])
    frames = np.random.default_rng(3).uniform(-1, 1, (6, 3, 16, 16)).astype(np.float32)
    image = np.concatenate([session.run(["image"], {"x": frame[None]})[0] for frame in frames])
    inputs, answers = tmp_path / "inputs.npz", tmp_path / "answers.npz"
    np.savez(inputs, x=frames)
    edge = shutil.copytree(edge, tmp_path / "edge")
    result = run_in_software(software_cuda_driver, edge, [str(inputs), str(answers)])
    assert result.returncode == 0, result.stderr
    *lines, statistics = result.stdout.strip().splitlines()
    assert statistics.startswith("SessionStatistics(")
    with np.load(answers) as arrays:
        assert len(arrays["image"]) == len(lines) > 0
        for line, answered in zip(lines, arrays["image"], strict=True):
            index, age, route = line.split()[:3]
            t, s = int(index), int(index) - int(age)
            expected = image[s] + np.float32(0.1) * frames[t] if route == "warp" else image[s]
            # ONNX Runtime's float32 on both sides, fused differently at most: 72 products of values below 4.
            np.testing.assert_allclose(answered, expected, atol=1e-5)


@pytest.fixture(scope="module")
def routed(routed_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A bundle that promises a quality as a folder, converted to fp16 by the way. Read it only."""
    pytest.importorskip("torch", reason="the export extra is not installed")
    out = tmp_path_factory.mktemp("routed") / "edge"
    return build_bundle(
        routed_bundle, BuildOptions(backend="tensorrt-rtx", precision="fp16", targets=TARGETS[:1], out=out)
    )


def test_a_bundle_with_exits_is_carried_whole(routed: Built, routed_bundle: Path) -> None:
    source, there = Bundle.open(routed_bundle), Bundle.open(routed.bundle.path)
    assert sorted(engine.module for engine in routed.engines) == sorted(source.manifest.modules)
    assert len(list((routed.bundle.path.parent / "engines").iterdir())) == len(source.manifest.modules)
    assert there.file("calibration.npz").read_bytes() == source.file("calibration.npz").read_bytes()
    quality = Quality("psnr_db", 30.0)
    assert Calibration.read(there).rule(quality) == Calibration.read(source).rule(quality)
    assert there.manifest.created["precision"]["promise"].startswith("calibrated before the conversion")
    thumbnail = next(spec for spec in there.manifest.cache if spec.name == "cache.thumbnail")
    assert thumbnail.dtype == "float32"


def test_the_example_of_a_promise_takes_a_quality_and_that_of_none_does_not(edge: Path, routed: Built) -> None:
    assert routed.deployment is not None
    folder = routed.deployment.path
    code = (folder / "run.py").read_text()
    compile(code, "run.py", "exec")
    assert len(code.splitlines()) <= 50
    for word in ("--quality", "--audit-every", "in psnr_db", "default=30"):
        assert word in code, word
    page = (folder / "README.md").read_text()
    assert "python run.py FRAMES.npz ANSWERS.npz --quality psnr=35" in page
    assert "One answer in 30 is compared with the whole generator's" in page
    for name in ("run.py", "README.md"):
        assert "--quality" not in (edge / name).read_text()


@pytest.mark.parametrize(("metric", "word"), [("lpips", "WARPCACHE_LPIPS"), ("flip", "pip install flip-evaluator")])
def test_audits_that_need_more_than_numpy_are_not_made_by_themselves(
    make_routed: Any, tmp_path: Path, metric: str, word: str
) -> None:
    bundle = Bundle.open(make_routed(metric=metric))
    folder = tmp_path / "edge"
    folder.mkdir()
    add_bundle(folder, bundle)
    (folder / "engines").mkdir()
    add_runtime(folder, folder, bundle, flavour=Flavour.load("tensorrt-rtx"), targets=())
    assert '--audit-every", type=int, default=0' in (folder / "run.py").read_text()
    page = (folder / "README.md").read_text()
    assert f"--quality {metric}=0.05" in page
    assert word in page
    # NumPy alone is what the metrics' modules need to be imported.
    assert {"engine/metrics/images.py", "engine/metrics/lpips.py", "engine/metrics/products.py"} <= set(
        deployed_sources()
    )


def test_the_edge_folder_routes_on_a_gpu_in_software(
    software_cuda_driver: Any, routed: Built, steered: Any, tmp_path: Path
) -> None:
    assert routed.deployment is not None
    # Every frame is the same, and every exit is said to be good, truly.
    frames = steered(8, warp2=-0.95, warp=-0.95, branch1=-0.95)
    inputs, answers = tmp_path / "inputs.npz", tmp_path / "answers.npz"
    np.savez(inputs, x=frames)
    words = [str(inputs), str(answers), "--quality", "psnr=30", "--audit-every", "1"]
    result = run_in_software(software_cuda_driver, shutil.copytree(routed.deployment.path, tmp_path / "edge"), words)
    assert result.returncode == 0, result.stderr
    *lines, statistics = result.stdout.strip().splitlines()
    routes = {line.split()[2] for line in lines}
    assert routes <= {"whole", "plain", "warp", "warp2", "branch1"}
    assert "predictor=LatencySummary" in statistics
    assert "audit_misses=0" in statistics
    with np.load(answers) as arrays:
        assert len(arrays["image"]) == len(lines) > 0
        assert np.isfinite(arrays["image"]).all()
    refused = run_in_software(software_cuda_driver, tmp_path / "edge", [str(inputs), "--quality", "lpips=0.1"])
    assert refused.returncode == 1
    assert refused.stderr.startswith("run.py: the bundle is calibrated for psnr, so nothing can be promised in lpips")


def test_the_commands_of_the_guide_parse() -> None:
    guide = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    lines = [line.strip() for line in guide.splitlines() if line.startswith("    ") and "warpcache " in line]
    commands = [shlex.split(line[line.index("warpcache ") :], comments=True)[1:] for line in lines]
    assert {words[0] for words in commands} == {"build", "run", "bench", "doctor"}
    for words in commands:
        cli.commands[words[0]].make_context(words[0], words[1:])


@pytest.mark.gpu
def test_the_folder_answers_on_the_gpu_that_is_here(tiny_bundle: Path, tmp_path: Path) -> None:
    try:
        built = build_bundle(
            tiny_bundle, BuildOptions(backend="tensorrt-rtx", targets=("current",), out=tmp_path / "edge")
        )
    except BackendError as exc:
        pytest.skip(str(exc))
    frames = np.random.default_rng(3).uniform(-1, 1, (8, 3, 16, 16)).astype(np.float32)
    np.savez(tmp_path / "inputs.npz", x=frames)
    assert built.deployment is not None
    command = [built.deployment.path / "run.py", tmp_path / "inputs.npz", tmp_path / "answers.npz"]
    result = subprocess.run([sys.executable, "-P", *command], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    with np.load(tmp_path / "answers.npz") as arrays:
        assert arrays["image"].shape[1:] == (3, 16, 16)
        assert np.isfinite(arrays["image"]).all()
