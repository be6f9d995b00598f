"""`warpcache build`: what is built for what, where it goes, and that nothing half-made is left."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import warpcache.engine.tensorrt.engines
import warpcache.engine.tensorrt.flavour
from warpcache.cli.main import cli
from warpcache.engine.bundle.bundle import Bundle
from warpcache.engine.errors import BackendError, DeviceError
from warpcache.engine.tensorrt.engine_cache import EngineCache, default_folder
from warpcache.engine.tensorrt.engines import precision_of
from warpcache.engine.tensorrt.flavour import Flavour
from warpcache.tasks.build import CONSUMER_GPUS, Built, build_bundle, choose_targets, converted_path
from warpcache.tasks.choices import BuildOptions

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")


def call(*arguments: Any) -> Result:
    return CliRunner().invoke(cli, ["build", *(str(argument) for argument in arguments)], prog_name="warpcache")


def assert_failed(result: Result, opening: str) -> None:
    """One sentence on stderr that begins with `opening`, after the stages of the progress."""
    assert result.exit_code == 1, result.output
    lines = [line for line in result.stderr.splitlines() if not line.endswith(" ...")]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith(f"warpcache: {opening}"), result.stderr


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache folder, empty: the engines are in `engines`."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("WARPCACHE_CACHE", str(folder))
    return folder


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A function that says which GPU is here; None for none. It says so to the choice of targets only."""

    def set_(architecture: str | None) -> None:
        class Context:
            def __init__(self, ordinal: int) -> None:
                if architecture is None:
                    raise DeviceError("no NVIDIA driver was found")
                self.name, self.architecture = "Some GPU", architecture

            def close(self) -> None: ...

            def __str__(self) -> str:
                return "cuda:0"

        monkeypatch.setattr(warpcache.engine.tensorrt.flavour, "Context", Context)

    return set_


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    path = tmp_path / "frames.npz"
    np.savez(path, x=np.random.default_rng(5).uniform(-1, 1, (6, 3, 16, 16)).astype(np.float32))
    return path


def test_targets_are_chosen_by_what_is_here(gpu: Any) -> None:
    flavour = Flavour.load("tensorrt-rtx")
    gpu(None)
    targets, why = choose_targets(flavour, None)
    assert targets == CONSUMER_GPUS
    assert why.startswith("no GPU is here, so for GeForce RTX 30, 40 and 50")
    gpu("sm_89")
    assert choose_targets(flavour, None) == (("sm_89",), "the GPU that is here")
    assert choose_targets(flavour, ("current", "sm_120")) == (("sm_89", "sm_120"), "")
    gpu("sm_90")  # which the library does not know
    targets, why = choose_targets(flavour, None)
    assert targets == CONSUMER_GPUS
    assert why.startswith("TensorRT-RTX does not build for the GPU that is here, so for")
    # Asked for by name, it is an error and no other choice.
    with pytest.raises(BackendError, match=r"TensorRT-RTX .* has no code for cuda:0 \(Some GPU, sm_90\)"):
        choose_targets(flavour, ("current",))


def test_without_ahead_of_time_only_the_gpu_that_is_here(gpu: Any) -> None:
    class Module:
        __name__, __version__ = "tensorrt", "10.16.1.11"
        Builder = Runtime = object

    flavour = Flavour.of(Module(), "tensorrt")
    gpu("sm_90")
    assert choose_targets(flavour, None) == (("sm_90",), "the GPU that is here")
    with pytest.raises(BackendError, match="TensorRT builds for the GPU that is here only, not for 'sm_89'"):
        choose_targets(flavour, ("sm_89",))
    gpu(None)
    with pytest.raises(DeviceError, match="TensorRT cannot build for the GPU that is here: no NVIDIA driver"):
        choose_targets(flavour, None)


def test_engines_are_built_once_and_shown(tiny_bundle: Path, cache: Path, tmp_path: Path, gpu: Any) -> None:
    gpu(None)
    report = tmp_path / "build.json"
    first = call(tiny_bundle, "--backend", "tensorrt-rtx", "--json", report)
    assert first.exit_code == 0, first.output
    document = json.loads(report.read_text())
    assert (document["schema"], document["command"], document["backend"]) == (1, "build", "tensorrt-rtx")
    assert document["engines"] == str(cache / "engines")
    assert document["environment"]["packages"]["tensorrt-rtx"] == document["version"]
    files = {path.name: path.stat().st_size for path in (cache / "engines").glob("*.engine")}
    assert {row["file"] for row in document["rows"]} == set(files)
    for row in document["rows"]:
        assert (row["precision"], row["targets"], row["built"]) == ("fp32", list(CONSUMER_GPUS), True)
        # The file has a header besides the engine.
        assert 0 < row["size_bytes"] < files[row["file"]]
    for word in ("no GPU is here", "sm_86, sm_89, sm_120", "generator", "warp", "built", "next:  warpcache run"):
        assert word in first.stdout, word
    assert f"engines in {cache / 'engines'}" in first.stdout
    # One target of those, named: served by the same files.
    second = call(tiny_bundle, "--backend", "tensorrt-rtx", "--target", "sm_89", "--json", report)
    assert second.exit_code == 0, second.output
    assert not any(row["built"] for row in json.loads(report.read_text())["rows"])
    assert "found" in second.stdout
    assert {path.name for path in (cache / "engines").glob("*.engine")} == set(files)


def test_a_conversion_is_written_beside_and_built(make_bundle: Any, frames: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="the export extra is not installed")
    bundle, report = make_bundle(), tmp_path / "build.json"
    common = ["--backend", "tensorrt-rtx", "--target", "sm_89", "--precision", "fp16"]
    result = call(bundle, *common, "--inputs", frames, "--json", report)
    assert result.exit_code == 0, result.output
    made = bundle.with_name("tiny.fp16.warp")
    converted = Bundle.open(made)
    assert precision_of(converted) == "fp16"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "build.json",
        "cache",
        "frames.npz",
        "tiny.fp16.warp",
        "tiny.warp",
    ]
    document = json.loads(report.read_text())
    assert document["converted"] is True
    assert document["bundle"] == str(made)
    assert {row["precision"] for row in document["rows"]} == {"fp16"}
    for name, parity in document["precision"]["parity"].items():
        assert parity["psnr_db"]["worst"] >= 45, name  # what the conversion promises by default
        assert parity["nan"] == 0
    for word in (
        "Parity of fp16 with fp32",
        "whole",
        "plain",
        "warp",
        f"wrote {made}",
        f"next:  warpcache run {made} ",
    ):
        assert word in result.stdout, word
    shown = CliRunner().invoke(cli, ["inspect", str(made)])
    assert shown.exit_code == 0, shown.output
    for word in ("Parity of fp16 with fp32", "Computes in fp16; the cache is in fp"):
        assert word in shown.stdout, word
    # The converted bundle is built as it is, by the engines that are there, and cannot be converted again.
    again = call(made, *common)
    assert again.exit_code == 0, again.output
    assert "Engines: 0 built in 0.0 s, 4 found" in again.stdout
    for other in ("fp32", "bf16"):
        refused = call(made, "--backend", "tensorrt-rtx", "--precision", other)
        assert_failed(refused, f"the bundle '{made}' is fp16 already and cannot become {other}; convert the fp32")
    # And it is not made a second time.
    before = (made / "manifest.json").read_bytes()
    assert_failed(call(bundle, *common), f"'{made}' already exists; build that one")
    assert (made / "manifest.json").read_bytes() == before


def test_a_bundle_with_exits_is_converted_and_every_module_built(
    make_routed: Any, frames: Path, tmp_path: Path
) -> None:
    pytest.importorskip("torch", reason="the export extra is not installed")
    bundle, report = make_routed(), tmp_path / "build.json"
    common = ["--backend", "tensorrt-rtx", "--target", "sm_89", "--precision", "fp16"]
    result = call(bundle, *common, "--inputs", frames, "--json", report)
    assert result.exit_code == 0, result.output
    document = json.loads(report.read_text())
    exits, predictors = {"whole", "plain", "warp", "warp2", "branch1"}, {"predictor", "predictor_cold"}
    assert {row["module"] for row in document["rows"]} == (exits - {"whole"}) | predictors | {"generator", "producer"}
    precision = document["precision"]
    assert set(precision["parity"]) == exits
    assert all(parity["psnr_db"]["worst"] >= 45 and not parity["nan"] for parity in precision["parity"].values())
    assert precision["promise"].startswith("calibrated before the conversion")
    assert not predictors & set(precision["rules"])
    converted, source = Bundle.open(bundle.with_name("routed.fp16.warp")), Bundle.open(bundle)
    for name in predictors:
        assert converted.manifest.modules[name] == source.manifest.modules[name]


def test_parity_without_frames_is_said_to_be_missing(make_bundle: Any, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="the export extra is not installed")
    bundle = make_bundle()
    out = tmp_path / "edge"
    result = call(bundle, "--backend", "tensorrt-rtx", "--target", "sm_89", "--precision", "fp16", "--out", out)
    assert result.exit_code == 0, result.output
    assert "Parity with fp32 was not measured: no --inputs was given." in result.stdout
    # The folder holds the converted bundle under the name of its own; nothing stands beside it.
    assert precision_of(Bundle.open(out / "tiny.warp")) == "fp16"
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == ["edge", "tiny.warp"]
    for word in ("engines", "cuda-python>=13.4,<14", f"wrote {out}", f"next:  python {out / 'run.py'} "):
        assert word in result.stdout, word


@pytest.mark.parametrize("error", [BackendError("module 'warp' is refused by TensorRT-RTX: no"), KeyboardInterrupt()])
@pytest.mark.parametrize("out", [False, True])
def test_what_fails_leaves_no_bundle(
    error: BaseException, out: bool, make_bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch", reason="the export extra is not installed")

    def fail(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(warpcache.engine.tensorrt.engines, "build_engines", fail)
    bundle = make_bundle()
    place = ["--out", tmp_path / "edge"] if out else []
    result = call(bundle, "--backend", "tensorrt-rtx", "--target", "sm_89", "--precision", "fp16", *place)
    opening = "interrupted; nothing unfinished was left behind" if isinstance(error, KeyboardInterrupt) else str(error)
    assert_failed(result, opening)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.warp"]


def test_a_bundle_that_somebody_else_made_meanwhile_stays(
    make_bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch", reason="the export extra is not installed")
    bundle, theirs = make_bundle(), tmp_path / "tiny.fp16.warp"
    real = warpcache.engine.tensorrt.engines.build_engines

    def meanwhile(*arguments: Any, **options: Any) -> Any:
        theirs.mkdir()
        (theirs / "manifest.json").write_text("theirs")
        return real(*arguments, **options)

    monkeypatch.setattr(warpcache.engine.tensorrt.engines, "build_engines", meanwhile)
    result = call(bundle, "--backend", "tensorrt-rtx", "--target", "sm_89", "--precision", "fp16")
    assert_failed(result, f"'{theirs}' was made by somebody else meanwhile; build that one")
    assert (theirs / "manifest.json").read_text() == "theirs"
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == [theirs.name, "tiny.warp"]


def test_engines_that_cannot_be_kept_are_a_failure(tiny_bundle: Path, cache: Path) -> None:
    cache.mkdir()
    (cache / "engines").write_text("a file where the folder is to be")
    result = call(tiny_bundle, "--backend", "tensorrt-rtx", "--target", "sm_89")
    assert result.exit_code == 1, result.output
    # Before it, a warning for each says why.
    last = result.stderr.splitlines()[-1]
    assert last.startswith(f"warpcache: 4 of 4 engines could not be written into '{cache / 'engines'}'"), last
    assert [path.name for path in cache.iterdir()] == ["engines"]


def test_gpus_without_the_precision_are_left_out_or_refused_before_the_conversion(
    make_bundle: Any, frames: Path, tmp_path: Path, gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch", reason="the export extra is not installed")
    gpu(None)
    bundle = make_bundle()
    common = [bundle, "--backend", "tensorrt-rtx", "--precision", "fp8", "--inputs", frames, "--min-psnr", "20"]
    result = call(*common, "--target", "sm_86,sm_89")
    assert_failed(result, "fp8 does not run on sm_86: it takes sm_89 or newer; name other targets")
    assert "converting" not in result.stderr
    result = call(*common)
    assert result.exit_code == 0, result.output
    assert "for sm_89, sm_120 (no GPU is here, " in result.stdout
    assert "; without sm_86, which has no fp8)" in result.stdout


def test_a_job_that_is_ended_from_outside_leaves_nothing(make_bundle: Any, tmp_path: Path) -> None:
    """As `timeout` and service managers end one: what Ctrl-C cleans up is cleaned up."""
    bundle = make_bundle()
    code = """
    import os, signal, sys
    import warpcache.engine.tensorrt.engines
    from warpcache.cli.main import main

    def build_engines(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal did nothing")

    warpcache.engine.tensorrt.engines.build_engines = build_engines
    main()
    """
    command = ["build", bundle, "--backend", "tensorrt-rtx", "--target", "sm_89", "--out", tmp_path / "edge"]
    result = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(code), *map(str, command)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1, result.stderr
    assert result.stderr.splitlines()[-1].startswith("warpcache: interrupted; nothing unfinished was left behind")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.warp"]


def test_a_temporary_folder_without_room_is_no_crash_of_the_library(make_bundle: Any, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="limits of files are a Unix's")
    # No file above 200 KiB, for both processes; TensorRT-RTX's smallest engines of convolutions are 260 KB.
    asked = ["--backend", "tensorrt-rtx", "--target", "sm_89", "--out", tmp_path / "edge"]
    result = subprocess.run(
        [sys.executable, "-P", "-m", "warpcache", "build", make_bundle(), *asked],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200 << 10, 200 << 10)),
    )
    assert result.returncode == 1, result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("warpcache: module 'generator': its engine cannot be handed over in "), result.stderr
    assert last.endswith("(File too large); free some space there, or set TMPDIR to another folder")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.warp"]


@pytest.mark.parametrize(
    ("arguments", "opening"),
    [
        (["--target", "sm_42"], "TensorRT-RTX 1."),
        (["--precision", "int8"], "int8 is calibrated on frames of yours; name them with --inputs"),
        (["--precision", "fp8"], "fp8 is calibrated on frames of yours; name them with --inputs"),
        (["--inputs", "x.npz"], "--inputs belongs to a conversion, but the bundle "),
        (["--precision", "fp32", "--keep", "up", "--min-psnr", "50"], "--keep, --min-psnr belong to a conversion"),
        (["--precision", "fp16", "--inputs", "none.npz"], "inputs 'none.npz' do not exist"),
    ],
)
def test_what_does_not_fit_is_one_sentence(arguments: list[str], opening: str, tiny_bundle: Path, gpu: Any) -> None:
    gpu(None)
    assert_failed(call(tiny_bundle, "--backend", "tensorrt-rtx", *arguments), opening)


def test_an_unknown_target_is_answered_with_those_known(tiny_bundle: Path) -> None:
    stderr = call(tiny_bundle, "--backend", "tensorrt-rtx", "--target", "sm_89,sm_42").stderr
    assert "does not build for 'sm_42'; it knows sm_75, " in stderr
    assert stderr.rstrip().endswith("current")
    empty = call(tiny_bundle, "--backend", "tensorrt-rtx", "--target", "sm_89,")
    assert empty.exit_code == 2
    assert "empty name" in empty.stderr


def test_a_library_that_is_missing_or_another_one(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    result = call(tiny_bundle, "--backend", "tensorrt")
    assert_failed(result, 'TensorRT is not installed; install it with pip install "warpcache[tensorrt]"')
    monkeypatch.setitem(sys.modules, "tensorrt", sys.modules["tensorrt_rtx"])
    assert_failed(call(tiny_bundle, "--backend", "tensorrt"), "the module 'tensorrt_rtx' is TensorRT-RTX, not TensorRT")


def test_a_conversion_without_the_export_extra_says_what_to_install(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As where it is not installed: none of its modules is there, and onnx cannot be imported.
    for name in [name for name in sys.modules if name.startswith("warpcache.export")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnx", None)
    result = call(tiny_bundle, "--backend", "tensorrt-rtx", "--target", "sm_89", "--precision", "fp16")
    assert_failed(result, 'onnx is not installed; build --precision needs pip install "warpcache[export]"')
    assert not converted_path(tiny_bundle, "fp16").exists()


def test_a_folder_of_engines_beside_the_bundle_is_the_cache(make_bundle: Any, tmp_path: Path, cache: Path) -> None:
    bundle = make_bundle()
    (tmp_path / "engines").mkdir()
    built: Built = build_bundle(bundle, BuildOptions(backend="tensorrt-rtx", targets=("sm_89",)))
    assert built.folder == default_folder(bundle) == tmp_path / "engines"
    assert not cache.exists()
    keys = [
        warpcache.engine.tensorrt.engines.engine_key(
            Bundle.open(bundle),
            engine.module,
            warpcache.engine.tensorrt.engines.Toolchain(built.flavour, ("sm_89",)),
        )
        for engine in built.engines
    ]
    assert EngineCache(built.folder).missing(keys) == []
