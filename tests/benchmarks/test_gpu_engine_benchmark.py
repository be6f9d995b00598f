"""The engines' benchmark on the driver in software with TensorRT's double: every part, its failures, its refusals.

Nothing here says how fast anything is.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from tests_software_tensorrt import failing, software_flavour  # type: ignore[import-not-found]

from benchmarks import gpu_engine, rtx_probe
from benchmarks.empty_backend import EmptyCpuBackend, EmptyCudaBackend, write_empty_bundle
from benchmarks.gpu_engine import PARTS
from benchmarks.mesh_to_picture import MeshToPicture
from benchmarks.rtx_probe import probe_rtx
from benchmarks.streams import as_clip, frames_for
from warpcache.engine.bundle.bundle import Bundle
from warpcache.engine.cuda.device import CudaDevice
from warpcache.engine.cuda.options import CudaOptions
from warpcache.engine.engine import Engine
from warpcache.engine.errors import BackendError
from warpcache.engine.tensorrt.backend import TensorRtBackend
from warpcache.export.precision.convert import PrecisionOptions, convert_bundle
from warpcache.models.head import SyntheticHead
from warpcache.tasks.demo import demo_bundle

TINY = "--frames 8 --host-frames 12 --warmup 3 --fps 500 --drawn 3 --empty-frames 50 --demo-frames 10 --parity-frames 6"


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module")
def fp16(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fp16") / "tiny16.warp"
    return convert_bundle(Bundle.open(tiny_bundle), out, options=PrecisionOptions("fp16"), frames=None).path


@pytest.fixture
def measure(
    software_cuda: Any, monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path, engines: Path, tmp_path: Path
) -> Callable[..., tuple[Result, dict[str, dict[str, Any]]]]:
    """Run the command on the software GPU, where TensorRT-RTX's double is the only executor; its parts by name."""

    def choose(name: str, options: CudaOptions) -> TensorRtBackend:
        if name != "tensorrt-rtx":
            raise BackendError(f"{name} is not installed; install it")
        return TensorRtBackend(software_flavour(), engine_cache=options.engine_cache)

    monkeypatch.setattr(gpu_engine, "choose_backend", choose)
    monkeypatch.setattr(rtx_probe.Flavour, "load", lambda name: software_flavour())

    def run(*arguments: Any) -> tuple[Result, dict[str, dict[str, Any]]]:
        path = tmp_path / "e.json"
        given = [*TINY.split(), "--bundle", tiny_bundle, "--engine-cache", engines, "--json", path, *arguments]
        result = CliRunner().invoke(gpu_engine.main, [str(argument) for argument in given])
        gc.collect()
        document = json.loads(path.read_text())
        assert document["device"]["name"] == "Software CUDA 0"
        assert result.stdout.startswith("Engines on Software CUDA 0 (cuda:0, a driver in software: no figure here is")
        return result, {part["name"]: part for part in document["parts"]}

    return run


def targets(part: dict[str, Any]) -> dict[str, float]:
    return {figure["name"]: figure["target"] for figure in part["figures"] if figure["target"] is not None}


# The empty consumer


def test_the_empty_bundle_is_answered_by_replays_of_one_memset(software_cuda: Any, tmp_path: Path) -> None:
    bundle = write_empty_bundle(tmp_path)
    (frame,) = frames_for(bundle, 1)
    options = CudaOptions(graphs="on")
    with (
        Engine(bundle, device="cuda:0", backend=EmptyCudaBackend(), cuda=options, age=1) as engine,
        engine.session() as session,
    ):
        answers = session.frames()

        def answer(count: int) -> tuple[int, ...]:
            for _ in range(count):
                session.submit(frame)
                answered = next(answers)
            return answered.outputs["image"].shape

        answer(3)
        before = {what: software_cuda.count(what) for what in ("graph_launches", "allocations")}
        assert answer(4) == (1, 3, 16, 16)
        # In lockstep a frame is one replay of the producer and one of the consumer.
        assert software_cuda.count("graph_launches") - before["graph_launches"] == 2 * 4
        assert software_cuda.count("allocations") == before["allocations"]
        assert session.statistics.graphs > 0


def test_the_empty_module_of_the_cpu_does_nothing(tmp_path: Path) -> None:
    bundle = write_empty_bundle(tmp_path)
    (frame,) = frames_for(bundle, 1)
    with Engine(bundle, backend=EmptyCpuBackend(), threads=1, policy="every:3") as engine, engine.session() as session:
        answers = session.frames()
        for _ in range(4):
            session.submit(frame)
            assert next(answers).route == "plain"
        assert session.statistics.producer_runs == 2


def test_frames_fit_the_bundle_and_differ(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    frames = frames_for(bundle, 3)
    for frame in frames:
        for record in bundle.manifest.inputs:
            record.spec.check(frame[record.spec.name])
    assert not np.array_equal(frames[0]["x"], frames[1]["x"])
    clip = as_clip(frames)
    np.testing.assert_array_equal(clip["x"][2:3], frames[2]["x"])


# Parts


def test_every_part_runs(measure: Callable[..., Any], fp16: Path) -> None:
    # A mesh's pictures need a bundle of the head, which has a test of its own.
    names = [name for name in PARTS if name != "mesh"]
    asked = [argument for name in names for argument in ("--part", name)]
    result, parts = measure("--fp16", fp16, "--reference", fp16, *asked)
    assert result.exit_code == 0, result.output
    assert {name: part["error"] for name, part in parts.items()} == dict.fromkeys(names)

    assert targets(parts["host-time"]) == {
        f"answer a frame, {policy}, p50": 50.0 for policy in ("async", "lockstep", "one cache")
    }
    details = parts["host-time"]["details"]
    assert len(details["answer a frame, async"]["us"]) == 12
    assert details["answer a frame, async"]["graphs"] > 0
    assert details["the same without a device, async"]["graphs"] == 0
    assert len(details["bare graph replay"]) == 12

    tails = targets(parts["producers"])
    assert set(tails.values()) == {1.2}
    assert len(tails) == 4
    streams = parts["producers"]["details"]
    assert set(streams) == {
        f"{label}, arrays on the {place}"
        for label in ("without producers", "async, unpaced", "async, 500 fps")
        for place in ("host", "device")
    }
    assert all(len(stream["latency_ms"]) == 8 for stream in streams.values())
    # One cache at the beginning, which grows old: every counted frame came from it.
    alone = streams["without producers, arrays on the device"]
    assert (alone["routes"], alone["age_max"]) == ({"warp": 8}, 3 + 8 - 1)
    assert "tensorrt does not run it: tensorrt is not installed; install it" in parts["producers"]["notes"]

    reference = parts["reference"]
    first = reference["figures"][0]
    assert first["name"] == "16x16 consumer on the device, end to end, p50, best executor (tensorrt-rtx)"
    assert first["target"] == 1.0
    alone = reference["details"]["16x16 consumer alone, tensorrt-rtx, device to device"]
    assert first["value"] == pytest.approx(np.median(alone["answer_ms"]), abs=1e-4)  # both are rounded to 1e-5
    assert [note.split(" ", 1)[0] for note in reference["notes"]] == ["tensorrt", "tensorrt-rtx:", "onnxruntime"]

    parity = targets(parts["parity"])
    assert parity == {
        **{f"fp16 against fp32, {exit_}, worst frame's PSNR": 45.0 for exit_ in ("whole", "plain", "warp")},
        "NaN and Inf in all answers": 0.0,
    }
    assert all(figure["reached"] for figure in parts["parity"]["figures"])
    # fp16 is not fp32: an answer that is the same to the bit would mean that one was compared with itself.
    assert max(max(values) for values in parts["parity"]["details"]["psnr_db"].values()) < 100

    memory = targets(parts["memory"])
    assert sorted(memory.values()) == [0.0, 0.0, 1024.0, 1024.0]
    device = [figure for figure in parts["memory"]["figures"] if figure["name"].startswith("device memory")]
    assert [figure["value"] for figure in device] == [0.0, 0.0]

    assert parts["rtx"]["notes"][1] == "an engine built for sm_90 loads here"


def test_a_mesh_becomes_a_picture(measure: Callable[..., Any]) -> None:
    result, parts = measure("--part", "mesh", "--fp16", demo_bundle().path, "--frames", "4", "--warmup", "1")
    assert result.exit_code == 0, result.output
    (name,) = parts["mesh"]["details"]
    assert name == "mesh of 6288 triangles to 256x256 picture, tensorrt-rtx, host to host"
    assert len(parts["mesh"]["details"][name]["answer_ms"]) == 4


def test_the_picture_is_the_answer_in_bytes(software_cuda: Any, engines: Path) -> None:
    """Against the same frame answered on the CPU from conditions that were drawn there."""
    bundle = demo_bundle()
    head = SyntheticHead(0, 256)
    with Engine(bundle, policy="full") as engine:
        clip = head.inputs(head.motion(2, bundle.manifest.fps or 30.0, seed=4))
        needed = {name: array for name, array in clip.items() if name in engine.required_inputs}
        images = [np.array(frame.outputs["image"][0]) for frame in engine.session().render(needed)]
    backend = TensorRtBackend(software_flavour(), engine_cache=engines)
    options = CudaOptions(outputs="device")
    with (
        CudaDevice(0) as device,
        closing(MeshToPicture(device, bundle, 2)) as way,
        Engine(bundle, policy="full", device="cuda:0", backend=backend, cuda=options) as engine,
        engine.session() as session,
    ):
        for index, image in enumerate(images):
            way.answer(session, index)
            expected = np.clip(np.rint((image.transpose(1, 2, 0) + 1) * 127.5), 0, 255)
            off = np.abs(way.picture.astype(np.float32) - expected)
            # A value half-way between two bytes may be rounded to either; a pixel of the mesh's edge may differ.
            assert np.mean(off > 1) < 1e-3


def test_a_bundle_without_a_mesh_is_refused(measure: Callable[..., Any], fp16: Path) -> None:
    result, parts = measure("--part", "mesh", "--fp16", fp16)
    assert result.exit_code == 1
    assert "is not fed with a mesh's conditions; take a bundle of the head" in parts["mesh"]["error"]


def test_without_a_reference_bundle_the_others_run(measure: Callable[..., Any], fp16: Path) -> None:
    result, parts = measure("--part", "reference", "--part", "parity", "--fp16", fp16)
    assert result.exit_code == 1
    assert parts["reference"]["error"].startswith("no reference bundle was named; make one with")
    assert parts["parity"]["error"] is None
    assert result.stdout.splitlines()[-1] == "1 of 2 parts ran; not: reference"


def test_where_no_executor_runs_every_reason_is_said(measure: Callable[..., Any], fp16: Path) -> None:
    backends = ("--backend", "tensorrt", "--backend", "onnxruntime")
    result, parts = measure("--part", "reference", "--part", "parity", "--reference", fp16, "--fp16", fp16, *backends)
    assert result.exit_code == 1
    for part in parts.values():
        assert part["error"] == (
            "tensorrt does not run it: tensorrt is not installed; install it; "
            "onnxruntime does not run it: onnxruntime is not installed; install it"
        )


def test_an_executor_that_fails_in_the_middle_gives_no_figure(measure: Callable[..., Any], fp16: Path) -> None:
    with failing(refuses_run="no kernel image"):
        result, parts = measure("--part", "reference", "--reference", fp16)
    assert result.exit_code == 1
    assert "tensorrt-rtx does not run it: " in parts["reference"]["error"]
    assert parts["reference"]["figures"] == []


def test_a_miss_is_shown_and_is_no_failure(
    measure: Callable[..., Any], tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answers on the GPU are 0.02 off on a range of 2: 20 log10(2 / 0.02) is 40 dB."""
    right = gpu_engine._images

    def wrong(opened: Any, clip: Any) -> Any:
        off = np.float32(0 if opened.backend == "cpu" else 0.02)
        return [(route, image + off) for route, image in right(opened, clip)]

    monkeypatch.setattr(gpu_engine, "_images", wrong)
    result, parts = measure("--part", "parity", "--fp16", tiny_bundle)
    assert result.exit_code == 0
    figures = parts["parity"]["figures"]
    assert [figure["reached"] for figure in figures] == [False, False, False, True]
    # What float32 loses by adding 0.02 to values below 1 is nothing beside it.
    assert [figure["value"] for figure in figures[:3]] == pytest.approx([40.0] * 3, abs=0.01)


def test_a_nan_counts_and_is_no_picture(
    measure: Callable[..., Any], tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = gpu_engine._images

    def broken(opened: Any, clip: Any) -> Any:
        answers = right(opened, clip)
        if opened.backend != "cpu":
            answers[2][1][0, 0, :2, 0] = [np.nan, np.inf]
        return answers

    monkeypatch.setattr(gpu_engine, "_images", broken)
    _, parts = measure("--part", "parity", "--fp16", tiny_bundle)
    *psnr, bad = parts["parity"]["figures"]
    assert bad["value"] == 2 * len(psnr)  # two values in one frame of every exit's run
    assert bad["reached"] is False
    # A frame with a NaN counts as 0 dB; the other frames of its exit do not hide it.
    assert {figure["name"]: figure["value"] for figure in psnr}["fp16 against fp32, whole, worst frame's PSNR"] == 0


def test_memory_that_grows_is_seen(measure: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.empty_backend import EmptyCudaModule
    from warpcache.engine.spec import TensorSpec

    kept: list[Any] = []

    class Leaking(EmptyCudaBackend):
        """Forgets memory whenever an engine waits for its producers, which is before every reading."""

        def load(self, module: Any, site: Any) -> EmptyCudaModule:
            if "producer" in module.name:
                synchronize = Engine.synchronize

                def leak(engine: Engine) -> None:
                    synchronize(engine)
                    kept.append(site.stream.device.allocate(TensorSpec("lost", "uint8", (1024,))))

                monkeypatch.setattr(Engine, "synchronize", leak)
            return super().load(module, site)

    monkeypatch.setattr(gpu_engine, "EmptyCudaBackend", Leaking)
    result, parts = measure("--part", "memory", "--demo-frames", "0")
    assert result.exit_code == 0
    grown = parts["memory"]["figures"][0]
    assert grown["name"] == "device memory grown over 50 frames of an empty consumer"
    assert grown["value"] > 1
    assert grown["reached"] is False
    kept.clear()


# TensorRT-RTX


def test_a_gpu_that_rtx_does_not_know_is_told_and_tried(
    software_cuda: Any, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    software_cuda.configure(compute_major=10, compute_minor=3)
    monkeypatch.setattr(rtx_probe.Flavour, "load", lambda name: software_flavour())
    named, tried = probe_rtx(Bundle.open(tiny_bundle), 0)
    assert "names no code for Software CUDA 0 (sm_103)" in named
    assert tried.startswith("an engine built for sm_90 does not load here: ")


def test_without_rtx_the_probe_says_so(software_cuda: Any, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise BackendError("TensorRT-RTX is not installed; install it")

    monkeypatch.setattr(rtx_probe.Flavour, "load", missing)
    assert probe_rtx(Bundle.open(tiny_bundle), 0) == [
        "TensorRT-RTX was not probed on Software CUDA 0 (sm_90): TensorRT-RTX is not installed; install it"
    ]


@pytest.mark.parametrize(
    ("architecture", "nearest"), [("sm_90", "sm_89"), ("sm_130", "sm_121"), ("sm_70", "sm_75"), ("sm_86", "sm_86")]
)
def test_the_nearest_target_is_the_newest_that_is_not_newer(architecture: str, nearest: str) -> None:
    assert rtx_probe._nearest(architecture, ("sm_75", "sm_80", "sm_86", "sm_89", "sm_120", "sm_121")) == nearest


# Refusals


def test_without_a_gpu_every_part_says_so(no_cuda_driver: None, tiny_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "e.json"
    arguments = [*TINY.split(), "--bundle", str(tiny_bundle), "--json", str(path)]
    result = CliRunner().invoke(gpu_engine.main, arguments)
    assert result.exit_code == 1
    assert result.stdout.startswith("Engines on no GPU (cuda:0)")
    document = json.loads(path.read_text())
    assert document["device"]["name"] is None
    assert [part["name"] for part in document["parts"]] == list(PARTS)
    assert all(part["error"].startswith("no NVIDIA driver was found") for part in document["parts"])


def test_the_cpu_is_refused() -> None:
    result = CliRunner().invoke(gpu_engine.main, ["--device", "cpu"])
    assert result.exit_code == 2
    assert "this measures GPUs" in result.output
