"""What all launchers promise: work in order on the caller's stream, no host wait, no memory taken, fit for graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from warpcache.engine.cuda.graph import CudaGraph
from warpcache.kernels.change import ChangeMetric
from warpcache.kernels.image import ImageKernels
from warpcache.kernels.reference.change import measure_change
from warpcache.kernels.reference.image import load_image
from warpcache.kernels.reference.warp import warp_map
from warpcache.kernels.warp import WarpKernel

SHAPE = (3, 8, 12)


class Pipeline:
    """Pixels become an image, the image is warped and compared with what it was: each launcher needs the last."""

    def __init__(self, gpu: Any) -> None:
        rng = np.random.default_rng(5)
        self.pixels = [rng.integers(0, 256, (8, 12, 3), np.uint8) for _ in range(2)]
        self.grid = rng.uniform(-1, 1, (2, *SHAPE[1:])).astype(np.float32)
        self._gpu = gpu
        self._images, self._warp, self._change = (
            ImageKernels(gpu.context),
            WarpKernel(gpu.context),
            ChangeMetric(gpu.context, block=4),
        )
        self._source, self._other = (gpu.place(pixels).array for pixels in self.pixels)
        self._image, self.warped = gpu.allocate(SHAPE, "float32"), gpu.empty(SHAPE, "float32")
        self._blocks = gpu.allocate(self._change.blocks_shape(*SHAPE[1:]), "float32")
        self.summary = gpu.empty((3,), "float32")
        self._launches = (
            self._images.prepare_load(self._source, self._image),
            self._warp.prepare([self._image], gpu.place(self.grid).array, [self.warped.array]),
            self._change.prepare(self._image, self.warped.array, self._blocks, self.summary.array, threshold=0.5),
        )
        self._spare = gpu.allocate(SHAPE, "float32")

    def launch(self) -> None:
        for item in self._launches:
            item.launch(self._gpu.stream.handle)

    def exchange_pixels(self) -> None:
        """Put the second picture where the first one is, on the stream."""
        self._images.load(self._other, self._spare, stream=self._gpu.stream.handle)
        self._images.store(self._spare, self._source, stream=self._gpu.stream.handle)

    def check(self, index: int) -> None:
        """Whether the results are those of picture `index`."""
        image = load_image(self.pixels[index])
        warped = warp_map(image, self.grid)
        np.testing.assert_array_equal(self.warped.read(), warped)
        summary = measure_change(image, warped, block=4, threshold=0.5)[1]
        # The figures are compared closely in the metric's own tests.
        np.testing.assert_allclose(self.summary.read(), summary, rtol=1e-5)

    def close(self) -> None:
        for item in (self._images, self._warp, self._change):
            item.close()


@pytest.fixture
def pipeline(gpu: Any) -> Iterator[Callable[[], Pipeline]]:
    made: list[Pipeline] = []

    def make() -> Pipeline:
        made.append(Pipeline(gpu))
        return made[-1]

    yield make
    for item in made:
        item.close()


def test_each_sees_what_the_one_before_it_wrote(pipeline: Callable[[], Pipeline]) -> None:
    run = pipeline()
    run.launch()
    run.check(0)
    run.exchange_pixels()
    run.launch()
    run.check(1)


def test_a_graph_of_them_is_replayed_on_new_pixels(gpu: Any, pipeline: Callable[[], Pipeline]) -> None:
    run = pipeline()
    # Nothing ran before the capture: the kernels were loaded when they were looked up.
    graph = CudaGraph.capture(gpu.stream, run.launch, name="kernels")
    graph.launch(gpu.stream)
    run.check(0)
    run.exchange_pixels()
    graph.launch(gpu.stream)
    run.check(1)
    graph.close()


@pytest.mark.parametrize("cuda_context", ["software"], indirect=True)
def test_nothing_waits_and_nothing_is_allocated(software_cuda: Any, gpu: Any, pipeline: Callable[[], Pipeline]) -> None:
    # Asked of the driver in software, which holds streams and counts: on hardware it would be a question of time.
    run = pipeline()
    untouched = run.warped.read()
    allocations = software_cuda.count("allocations")
    with software_cuda.held(gpu.stream):
        run.launch()
        run.exchange_pixels()
        run.launch()
        # Two by two launches of the metric, three others, and load and store of the exchange: all still to come.
        assert software_cuda.pending(gpu.stream) == 2 * (2 + 2) + 2
        np.testing.assert_array_equal(gpu.device.download(run.warped.array), untouched)
    run.check(1)
    assert software_cuda.count("allocations") == allocations
