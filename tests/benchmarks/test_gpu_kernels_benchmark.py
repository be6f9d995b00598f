"""The kernels' benchmark on the driver in software: its arithmetic, its sizes, and that wrong results are not timed.

Nothing here says how fast anything is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from benchmarks import gpu_kernels, kernel_checks
from benchmarks.gpu_arrays import Gpu
from benchmarks.gpu_kernels import PARTS, bandwidth_gb_s, face_mesh, ratio_figures
from benchmarks.kernel_checks import smooth_grid
from warpcache.kernels.reference.rasterizer import rasterize
from warpcache.kernels.reference.warp import warp_map

TINY = ["--mib", "0.1", "--launches", "1", "--repeats", "1", "--frames", "1", "--picture", "64"]


def measure(path: Path, *arguments: str) -> tuple[Result, dict[str, Any]]:
    result = CliRunner().invoke(gpu_kernels.main, [*TINY, "--json", str(path), *arguments])
    return result, json.loads(path.read_text())


@pytest.fixture
def gpu(software_cuda: Any) -> Iterator[Gpu]:
    with closing(Gpu(0)) as opened:
        yield opened


def test_bandwidth_is_bytes_over_time() -> None:
    assert bandwidth_gb_s(4 * 10**9, 1000.0) == pytest.approx(4.0)


def test_the_ratio_is_of_medians_of_bandwidths() -> None:
    # 8 MB in 2 ms are 4 GB/s; 10 MB copied in 1 ms are 10 GB/s.
    ratio, achieved = ratio_figures("k", 8_000_000, [2.0, 1.0, 9.0], 10_000_000, [1.0, 5.0, 0.5])
    assert ratio.value == pytest.approx(0.4)
    assert (ratio.target, ratio.at_least, ratio.reached) == (0.7, True, False)
    assert (achieved.value, achieved.target) == (pytest.approx(4.0), None)


@pytest.mark.parametrize(("l2_mib", "asked", "mib"), [(0, None, 512), (50, None, 512), (96, None, 768), (96, 0.5, 0.5)])
def test_a_launch_moves_several_times_the_cache(l2_mib: int, asked: float | None, mib: float) -> None:
    assert gpu_kernels._size_bytes(l2_mib * 2**20, asked) == mib * 2**20


@pytest.mark.parametrize(("size", "a_pixel"), [(512 * 2**20, 9), (100_000, 12), (1, 3)])
def test_a_square_holds_what_was_asked_and_little_more(size: int, a_pixel: int) -> None:
    side = gpu_kernels._side(size, a_pixel)
    assert side % 64 == 0
    assert side * side * a_pixel >= size
    assert (side - 64) ** 2 * a_pixel < size


def test_the_face_has_900_triangles_to_the_camera_over_most_of_the_picture() -> None:
    size = 128
    points, mesh = face_mesh(size)
    assert mesh.triangles.shape == (900, 3)
    assert points.shape == (len(mesh.uv), 3)
    a, b, c = (points[mesh.triangles[:, k], :2] for k in range(3))
    area = (b[:, 0] - a[:, 0]) * (c[:, 1] - a[:, 1]) - (c[:, 0] - a[:, 0]) * (b[:, 1] - a[:, 1])
    assert (area < 0).all()
    assert points[:, :2].min() > 0
    assert points[:, :2].max() < size
    assert rasterize(points, mesh.triangles, size, size).mask.mean() > 0.7


def test_the_grid_moves_everything_a_little() -> None:
    still = np.stack(np.meshgrid(np.linspace(-1, 1, 40), np.linspace(-1, 1, 30)))
    moved = np.abs(smooth_grid(30, 40) - still)
    # Pixel centres are half a pixel inside of the ends of linspace.
    assert moved.max() < 0.02 + 1 / 30
    image = np.random.default_rng(0).uniform(-1, 1, (1, 30, 40)).astype(np.float32)
    assert np.abs(warp_map(image, smooth_grid(30, 40), padding="border") - image).max() > 0.01


def test_an_event_time_is_divided_by_its_launches(gpu: Gpu) -> None:
    calls: list[str] = []

    class Event:
        def record(self, stream: Any) -> None:
            calls.append("record")

        def wait(self) -> None: ...

        def elapsed_ms(self, since: Any) -> float:
            return 12.0

        def close(self) -> None: ...

    gpu.device.event = lambda **options: Event()  # type: ignore[method-assign, assignment]
    assert gpu.time_ms(lambda: calls.append("launch"), 4) == 3.0
    # One before, so that the GPU has work when the first that counts is issued.
    assert calls == ["launch", "record", *["launch"] * 4, "record"]


def test_large_arrays_are_filled_to_their_end(gpu: Gpu) -> None:
    array = gpu.filled((3, 700, 1001), "float16")
    values = gpu.download(array).astype(np.float32).ravel()
    assert values.size > 2**21
    assert values.min() >= -1
    assert values.max() <= 1
    np.testing.assert_array_equal(values[: 2**20], values[2**20 : 2**21])
    assert np.std(values[-1000:]) > 0.5


def test_every_part_runs_and_the_record_says_on_what(software_cuda: Any, tmp_path: Path) -> None:
    result, document = measure(tmp_path / "k.json")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("Kernels on Software CUDA 0 (cuda:0, a driver in software: no figure here is a GPU")
    assert document["device"]["name"] == "Software CUDA 0"
    assert [part["name"] for part in document["parts"]] == list(PARTS)
    for part in document["parts"]:
        assert part["error"] is None
        assert all(figure["value"] > 0 for figure in part["figures"])
        if part["name"] in ("image", "change", "warp"):
            assert sum(figure["target"] == 0.7 for figure in part["figures"]) == len(part["figures"]) / 2
            cases = [case for case in part["details"].values() if isinstance(case, dict)]
            assert len(cases) == len(part["figures"]) / 2
            assert all(case["bytes_moved"] >= 0.1 * 2**20 for case in cases)
            assert all(len(case["ms"]) == len(case["copy_ms"]) == 1 for case in cases)
    faces = document["parts"][-1]["figures"]
    assert [figure["target"] for figure in faces] == [10_000.0, None, None, None]
    assert "900 triangles at 64x64, graph replay" in faces[0]["name"]


def test_a_wrong_result_is_not_timed(software_cuda: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernel_checks.store_image
    monkeypatch.setattr(kernel_checks, "store_image", lambda *given, **options: right(*given, **options) ^ 1)
    result, document = measure(tmp_path / "k.json", "--part", "image", "--part", "copy")
    assert result.exit_code == 1
    image, copy = document["parts"]
    assert image["error"].startswith("storing an image from float16 is not what its NumPy reference gives")
    assert image["figures"] == []
    assert copy["error"] is None
    assert result.stdout.splitlines()[-1] == "1 of 2 parts ran; not: image"


@pytest.mark.parametrize(
    ("name", "wrong", "part", "opening"),
    [
        ("load_image", lambda image: image + 1, "image", "loading an image as float16"),
        ("measure_change", lambda pair: (pair[0] * 1.01, pair[1]), "change", "the change metric of uint8"),
        ("warp_map", lambda image: np.nextafter(image, np.float16(9)), "warp", "the warp of float16 maps"),
        ("condition_raster", lambda image: image + 1e-5, "rasterizer", "the picture of 900 triangles"),
    ],
)
def test_every_kernel_is_compared(
    software_cuda: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    wrong: Any,
    part: str,
    opening: str,
) -> None:
    right = getattr(kernel_checks, name)
    monkeypatch.setattr(kernel_checks, name, lambda *given, **options: wrong(right(*given, **options)))
    result, document = measure(tmp_path / "k.json", "--part", part)
    assert result.exit_code == 1
    assert document["parts"][0]["error"].startswith(opening)


def test_without_a_gpu_every_part_says_so(no_cuda_driver: None, tmp_path: Path) -> None:
    result, document = measure(tmp_path / "k.json")
    assert result.exit_code == 1
    assert result.stdout.startswith("Kernels on no GPU (cuda:0)")
    assert document["device"]["name"] is None
    assert document["device"]["missing"].startswith("no NVIDIA driver was found")
    assert len(document["parts"]) == len(PARTS)
    assert all(part["error"].startswith("no NVIDIA driver was found") for part in document["parts"])


def test_the_cpu_is_refused() -> None:
    result = CliRunner().invoke(gpu_kernels.main, ["--device", "cpu"])
    assert result.exit_code == 2
    assert "the kernels run on a GPU only" in result.output
