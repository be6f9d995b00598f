"""Conditions drawn on the GPU are the reference's, and go into a session without passing the host."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests_software_tensorrt import software_flavour  # type: ignore[import-not-found]

from warpcache.engine.cuda.device import CudaDevice
from warpcache.engine.cuda.mesh_conditioner import MeshConditioner
from warpcache.engine.cuda.options import CudaOptions
from warpcache.engine.engine import Engine
from warpcache.engine.errors import ClosedError, InputError
from warpcache.engine.tensorrt.backend import TensorRtBackend
from warpcache.models.head import SyntheticHead
from warpcache.models.rasterizer import SurfaceAtlas
from warpcache.tasks.demo import demo_bundle

SIZE = 64
ATLAS = 64


@pytest.fixture(scope="module")
def head() -> SyntheticHead:
    return SyntheticHead(0, SIZE)


@pytest.fixture(scope="module")
def takes(head: SyntheticHead) -> list[dict[str, Any]]:
    """Vertices and the reference's inputs of some frames."""
    motion = head.motion(8, 30.0, seed=3)
    drawn = head.inputs(motion)
    return [
        {"vertices": head.vertices(parameters), **{name: drawn[name][t] for name in drawn}}
        for t, parameters in enumerate(motion)
    ]


def conditioner(device: CudaDevice, head: SyntheticHead, **options: Any) -> MeshConditioner:
    return MeshConditioner(
        device, head.mesh, head.size, atlas=SurfaceAtlas(head.mesh, ATLAS), cull_back=True, **options
    )


@pytest.mark.parametrize("lazy", [0, 1])
def test_what_is_drawn_is_what_the_reference_draws(
    software_cuda: Any, head: SyntheticHead, takes: list[dict[str, Any]], lazy: int
) -> None:
    software_cuda.configure(lazy=lazy)
    with CudaDevice(0) as device:
        drawer = conditioner(device, head)
        vertices = np.empty_like(takes[0]["vertices"])
        drawn = []
        for take in takes:
            vertices[:] = take["vertices"]
            drawn.append(drawer.draw(vertices))
            vertices[:] = np.nan  # it was copied
        drawer.synchronize()
        for take, frame in zip(takes, drawn, strict=True):
            # The kernels repeat the reference's operations in its order; with another compiler the last bit may go.
            np.testing.assert_allclose(device.download(frame["condition"])[0], take["condition"], rtol=0, atol=1e-6)
            np.testing.assert_allclose(device.download(frame["atlas"])[0], take["atlas"], rtol=0, atol=1e-6)
        drawer.close()
        drawer.close()
        with pytest.raises(ClosedError, match="stream 'warpcache-conditioner' is closed"):
            drawer.draw(takes[0]["vertices"])
        del drawn, frame, drawer


def test_no_memory_is_taken_per_frame(software_cuda: Any, head: SyntheticHead, takes: list[dict[str, Any]]) -> None:
    with CudaDevice(0) as device:
        drawer = conditioner(device, head)
        before = software_cuda.count("allocations")
        for _ in range(3):
            for take in takes:
                frame = drawer.draw(take["vertices"])
                drawer.synchronize()
        assert software_cuda.count("allocations") == before
        drawer.close()
        del frame, drawer


def test_a_session_answers_as_from_conditions_of_the_host(software_cuda: Any, tmp_path: Path) -> None:
    bundle = demo_bundle()
    head = SyntheticHead(0, 256)
    motion = head.motion(3, 30.0, seed=3)
    inputs = head.inputs(motion)
    with Engine(bundle, age=1, threads=1) as engine:
        expected = [np.array(frame.outputs["image"]) for frame in engine.session().render(inputs)]
    backend = TensorRtBackend(software_flavour(), engine_cache=tmp_path)
    options = CudaOptions(debug=True)
    with (
        CudaDevice(0) as device,
        Engine(bundle, age=1, device="cuda:0", backend=backend, cuda=options) as engine,
        engine.session() as session,
    ):
        drawer = conditioner(device, head)
        answers = []
        for parameters in motion:
            session.submit(drawer.draw(head.vertices(parameters)))
            answers.append(np.array(next(session.frames()).outputs["image"]))
        drawer.close()
        del drawer
    # Pixels of an edge may fall on the other side by a rounding of the last bit, which the network spreads a little.
    for one, two in zip(answers, expected, strict=True):
        assert np.abs(one - two).mean() < 1e-4


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (lambda v: v.astype(np.float64), "the vertices are float64, expected a NumPy array of float32"),
        (lambda v: v[:, :2], r"the vertices have shape \(\d+, 2\), the mesh has \(\d+, 3\)"),
        (lambda v: v.tolist(), "the vertices are list, expected a NumPy array"),
    ],
)
def test_vertices_that_do_not_fit_are_refused(
    software_cuda: Any,
    head: SyntheticHead,
    takes: list[dict[str, Any]],
    wrong: Callable[[Any], Any],
    sentence: str,
) -> None:
    with CudaDevice(0) as device:
        drawer = conditioner(device, head)
        with pytest.raises(InputError, match=sentence):
            drawer.draw(wrong(takes[0]["vertices"]))
        drawer.close()
        del drawer
