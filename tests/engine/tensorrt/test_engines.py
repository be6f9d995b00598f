"""A bundle's engines: built together, found again, kept where one of them cannot be built."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest

from warpcache.engine.bundle.bundle import Bundle
from warpcache.engine.bundle.write import write_bundle
from warpcache.engine.errors import BackendError
from warpcache.engine.tensorrt import builder as tensorrt_builder
from warpcache.engine.tensorrt.engine_cache import EngineCache
from warpcache.engine.tensorrt.engines import Toolchain, build_engines, engine_key, precision_of, without_kernels
from warpcache.engine.tensorrt.flavour import Flavour
from warpcache.engine.tensorrt.options import BuildOptions
from warpcache.kernels.driver import Context

TARGETS = ("sm_89", "sm_86")
pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")


@pytest.fixture(scope="module")
def flavour() -> Flavour:
    return Flavour.load("tensorrt-rtx")


def test_engines_are_built_once_and_found_again(tiny_bundle: Path, tmp_path: Path, flavour: Flavour) -> None:
    bundle, cache = Bundle.open(tiny_bundle), EngineCache(tmp_path / "engines")
    steps: list[tuple[str, int, int]] = []
    first = build_engines(bundle, Toolchain(flavour, TARGETS), cache, progress=lambda *step: steps.append(step))
    assert [built.module for built in first] == ["generator", "plain", "producer", "warp"]
    assert all(not built.reused and built.path is not None and built.engine[:4] == b"vtrt" for built in first)
    assert all(built.targets == ("sm_86", "sm_89") for built in first)
    assert steps[0] == ("engines", 0, 4)
    assert steps[-1] == ("engines", 4, 4)
    second = build_engines(bundle, Toolchain(flavour, TARGETS[::-1]), cache)
    assert all(built.reused for built in second)
    assert [built.engine for built in second] == [built.engine for built in first]
    # One of the targets alone is served by the same file.
    (warp,) = build_engines(bundle, Toolchain(flavour, ("sm_86",)), cache, modules=["warp"])
    assert warp.reused
    assert warp.engine == first[3].engine


def test_what_is_missing_is_said_where_nothing_is_to_be_built(
    tiny_bundle: Path, tmp_path: Path, flavour: Flavour
) -> None:
    cache = EngineCache(tmp_path / "engines")
    with pytest.raises(BackendError, match=r"holds no TensorRT-RTX .* engine of 'warp' for sm_89; build them with"):
        build_engines(Bundle.open(tiny_bundle), Toolchain(flavour, ("sm_89",)), cache, modules=["warp"], build=False)
    assert not list(cache.folder.glob("*.engine"))


def test_one_graph_that_cannot_be_built_does_not_cost_the_others(
    make_bundle: Callable[[], Path], tmp_path: Path, flavour: Flavour
) -> None:
    bundle = Bundle.open(make_bundle())
    model = onnx.load(bundle.file("plain.onnx"), load_external_data=False)
    # TensorRT has no NonZero; that its result is thrown away does not help: the graph's outputs stay as they are.
    model.graph.node.extend(
        [
            onnx.helper.make_node("NonZero", ["cache.h"], ["places"], name="find"),
            onnx.helper.make_node("ReduceMax", ["places"], ["most"], keepdims=0),
            onnx.helper.make_node("Cast", ["most"], ["zero"], to=onnx.TensorProto.FLOAT),
            onnx.helper.make_node("Mul", ["h", "zero"], ["scaled"]),
        ]
    )
    files = {name: bundle.file(name) for name in bundle.manifest.files}
    broken = write_bundle(tmp_path / "broken.warp", bundle.manifest, {**files, "plain.onnx": model.SerializeToString()})
    cache = EngineCache(tmp_path / "engines")
    with pytest.raises(BackendError, match=r"'plain'.*NonZero"):
        build_engines(broken, Toolchain(flavour, TARGETS), cache)
    others = build_engines(
        broken, Toolchain(flavour, TARGETS), cache, modules=["generator", "producer", "warp"], build=False
    )
    assert all(built.reused for built in others)


def test_an_engine_that_cannot_be_stored_is_used_all_the_same(
    tiny_bundle: Path, tmp_path: Path, flavour: Flavour, caplog: pytest.LogCaptureFixture
) -> None:
    in_the_way = tmp_path / "engines"
    in_the_way.write_text("a file where the folder is to be")
    with caplog.at_level(logging.WARNING, "warpcache.engine"):
        (built,) = build_engines(
            Bundle.open(tiny_bundle),
            Toolchain(flavour, ("sm_86",)),
            EngineCache(in_the_way),
            modules=["warp"],
        )
    assert built.path is None
    assert built.engine[:4] == b"vtrt"
    assert "the engine serves this process only" in caplog.text


def test_an_interrupt_keeps_what_is_ready(
    tiny_bundle: Path, tmp_path: Path, flavour: Flavour, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tensorrt_builder._run

    def interrupted(folder: Path) -> int:
        run(folder)
        # As it is when the third of four was being written.
        (folder / "2.json").write_text('{"error": nu')
        (folder / "3.json").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(tensorrt_builder, "_run", interrupted)
    bundle, cache = Bundle.open(tiny_bundle), EngineCache(tmp_path / "engines")
    with pytest.raises(KeyboardInterrupt):
        build_engines(bundle, Toolchain(flavour, TARGETS), cache)
    monkeypatch.undo()
    with cache.locked() as held:
        assert held
    built = build_engines(bundle, Toolchain(flavour, TARGETS), cache)
    assert [one.reused for one in built] == [True, True, False, False]


def test_what_another_process_built_meanwhile_is_taken(
    tiny_bundle: Path, tmp_path: Path, flavour: Flavour, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(tiny_bundle)
    theirs = build_engines(bundle, Toolchain(flavour, TARGETS), EngineCache(tmp_path / "theirs"))

    class Late(EngineCache):
        """A cache whose lock another process held, which has stored its engines when we get it."""

        @contextlib.contextmanager
        def locked(self) -> Iterator[bool]:
            for path in (tmp_path / "theirs").glob("*.engine"):
                shutil.copy(path, self.folder)
            yield True

    ours = Late(tmp_path / "ours")
    ours.folder.mkdir()
    monkeypatch.setattr(
        "warpcache.engine.tensorrt.engines.build_engines_isolated", lambda *_, **__: pytest.fail("built again")
    )
    found = build_engines(bundle, Toolchain(flavour, TARGETS), ours)
    assert all(built.reused for built in found)
    assert [built.engine for built in found] == [built.engine for built in theirs]


@pytest.mark.parametrize(
    ("precision", "targets", "lacking"),
    [
        ("fp8", ("sm_80", "sm_86", "sm_89", "sm_120"), ["sm_80", "sm_86"]),
        ("bf16", ("sm_75", "sm_80"), ["sm_75"]),
        ("int8", ("sm_75",), []),
        ("fp16", ("sm_75",), []),
        ("fp32", ("sm_75",), []),
    ],
)
def test_gpus_that_do_not_compute_in_a_precision_are_refused(
    precision: str,
    targets: tuple[str, ...],
    lacking: list[str],
    make_bundle: Callable[[], Path],
    tmp_path: Path,
    flavour: Flavour,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As TensorRT-RTX 1.7 answers when it builds: 'Cannot compile for target(s) ..., HW-specific datatypes'."""
    assert without_kernels(precision, targets) == lacking
    if not lacking:
        return
    bundle = Bundle.open(make_bundle())
    created = {**bundle.manifest.created, "precision": {"precision": precision}}
    bundle = dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, created=created))
    monkeypatch.setattr(
        "warpcache.engine.tensorrt.engines.build_engines_isolated", lambda *_, **__: pytest.fail("built")
    )
    with pytest.raises(BackendError, match=rf"^{precision} does not run on {', '.join(lacking)}: it takes sm_8"):
        build_engines(bundle, Toolchain(flavour, targets), EngineCache(tmp_path / "engines"))


def test_full_tensorrts_engines_are_kept_by_the_model_of_the_gpu(tiny_bundle: Path, software_cuda: Any) -> None:
    from tests_software_tensorrt import software_flavour  # type: ignore[import-not-found]

    bundle, options = Bundle.open(tiny_bundle), BuildOptions()
    context = Context(0)
    full = engine_key(bundle, "warp", Toolchain(software_flavour("tensorrt"), ("sm_90",), options))
    assert full.options["gpu"] == context.name
    rtx = engine_key(bundle, "warp", Toolchain(software_flavour("tensorrt-rtx"), ("sm_86",), options))
    assert "gpu" not in rtx.options
    context.close()


def test_the_precision_is_what_the_manifest_says(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    assert precision_of(bundle) == "fp32"
    created = {**bundle.manifest.created, "precision": {"precision": "fp16"}}
    half = dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, created=created))
    assert precision_of(half) == "fp16"
