"""The change metric: the reference against scikit-image's blocks, the kernel against the reference, what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from skimage.util import view_as_blocks

from warpcache.kernels.array import DeviceArray
from warpcache.kernels.change import BLOCKS, ChangeMetric
from warpcache.kernels.errors import InputError
from warpcache.kernels.reference.change import measure_change

THRESHOLD = 0.35


def pair(dtype: str, shape: tuple[int, int, int], seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Two images whose blocks lie on both sides of the threshold."""
    rng = np.random.default_rng(seed)
    if dtype == "uint8":
        return rng.integers(0, 256, shape, np.uint8), rng.integers(0, 256, shape, np.uint8)
    ramp = np.linspace(0, 1, shape[2], dtype=np.float32)
    first = rng.uniform(-1, 1, shape).astype(np.float32)
    return first.astype(dtype), (first + ramp * rng.uniform(-1, 1, shape)).astype(dtype)


def assert_near(found: np.ndarray, expected: np.ndarray, terms: int) -> None:
    """Equal within what float32 sums may differ from float64 ones.

    A block's sum is taken in at most `terms` additions of positive numbers, the rest is one division, and a difference
    of two pixels that is the same on both sides: `terms` + 1 roundings, each of half a unit of 2 ** -23.
    """
    np.testing.assert_allclose(found, expected, rtol=(terms + 1) * 2**-24, atol=0)


class TestReference:
    @pytest.mark.parametrize("dtype", ["float32", "float16", "uint8"])
    def test_whole_blocks_are_scikit_images(self, dtype: str) -> None:
        first, second = pair(dtype, (3, 16, 24))
        blocks, summary = measure_change(first, second, block=8, threshold=THRESHOLD)
        difference = np.abs(first.astype(np.float64) - second.astype(np.float64))
        cells = view_as_blocks(difference, (3, 8, 8))[0]
        # float16 and uint8 differences are exact in float32; those of float32 are rounded once, and means once more.
        np.testing.assert_allclose(blocks[0], cells.mean(axis=(2, 3, 4)), rtol=2**-23)
        np.testing.assert_allclose(blocks[1], cells.max(axis=(2, 3, 4)), rtol=2**-23)
        np.testing.assert_allclose(summary[:2], [difference.mean(), difference.max()], rtol=2**-23)
        assert summary[2] == np.float32((cells.mean(axis=(2, 3, 4)) > THRESHOLD).mean())

    def test_blocks_at_the_border_are_means_of_fewer_pixels(self) -> None:
        first, second = np.zeros((1, 5, 6), np.float32), np.zeros((1, 5, 6), np.float32)
        second[0, 4, 4:] = [1, 3]
        blocks, summary = measure_change(first, second, block=4, threshold=1)
        assert blocks.tolist() == [[[0, 0], [0, 2]], [[0, 0], [0, 3]]]
        assert summary.tolist() == [np.float32(4 / 30), 3, 0.25]

    def test_nan_is_seen_and_counts_as_changed(self) -> None:
        first, second = np.zeros((2, 4, 8), np.float32), np.zeros((2, 4, 8), np.float32)
        first[1, 2, 5] = np.nan
        blocks, summary = measure_change(first, second, block=4, threshold=1)
        assert np.isnan(blocks[:, 0]).tolist() == [[False, True]] * 2
        assert np.isnan(summary).tolist() == [True, True, False]
        assert summary[2] == 0.5


@pytest.fixture
def metric(cuda_context: Any) -> Iterator[Callable[[int], ChangeMetric]]:
    made: dict[int, ChangeMetric] = {}

    def make(block: int) -> ChangeMetric:
        return made.setdefault(block, ChangeMetric(cuda_context, block=block))

    yield make
    for item in made.values():
        item.close()


def measured(
    gpu: Any,
    metric: ChangeMetric,
    first: np.ndarray,
    second: np.ndarray,
    *,
    threshold: float = THRESHOLD,
    **layout: Any,
) -> tuple[np.ndarray, np.ndarray]:
    a, b = gpu.place(first, **layout), gpu.place(second)
    blocks = gpu.empty(metric.blocks_shape(*first.shape[1:]), "float32")
    summary = gpu.empty((3,), "float32")
    metric.measure(a.array, b.array, blocks.array, summary.array, threshold=threshold, stream=gpu.stream.handle)
    return blocks.read(), summary.read()


class TestKernel:
    # A thread adds at most 4 pixels x C channels x B / 8 rows, then come 7 rows and log2(B / 4) halvings.
    @staticmethod
    def terms(channels: int, block: int) -> int:
        return 4 * channels * max(1, block // 8) + 7 + 5

    @pytest.mark.parametrize("dtype", ["float32", "float16", "uint8"])
    @pytest.mark.parametrize("shape", [(3, 1, 1), (1, 3, 5), (3, 17, 33), (2, 16, 132), (3, 20, 130)])
    def test_equals_the_reference(
        self, gpu: Any, metric: Callable[[int], ChangeMetric], shape: tuple[int, int, int], dtype: str
    ) -> None:
        first, second = pair(dtype, shape)
        blocks, summary = measured(gpu, metric(16), first, second)
        expected_blocks, expected_summary = measure_change(first, second, block=16, threshold=THRESHOLD)
        assert_near(blocks[0], expected_blocks[0], self.terms(shape[0], 16))
        np.testing.assert_array_equal(blocks[1], expected_blocks[1])
        # The whole's mean is made of the blocks' in float64: it carries their error and one rounding more.
        assert_near(summary[:1], expected_summary[:1], self.terms(shape[0], 16) + 2)
        assert summary[1] == expected_summary[1]
        # No block's mean is so near the threshold that rounding could decide: the reference says so itself.
        assert np.abs(expected_blocks[0] - THRESHOLD).min() > 1e-5
        assert summary[2] == expected_summary[2]

    @pytest.mark.parametrize("block", BLOCKS)
    def test_every_block_size(self, gpu: Any, metric: Callable[[int], ChangeMetric], block: int) -> None:
        first, second = pair("float32", (2, min(block, 32) + 3, 141))
        blocks, summary = measured(gpu, metric(block), first, second)
        expected_blocks, expected_summary = measure_change(first, second, block=block, threshold=THRESHOLD)
        assert_near(blocks[0], expected_blocks[0], self.terms(2, block))
        np.testing.assert_array_equal(blocks[1], expected_blocks[1])
        assert_near(summary[:1], expected_summary[:1], self.terms(2, block) + 2)
        assert summary[1:].tolist() == expected_summary[1:].tolist()

    def test_sums_of_bytes_are_exact(self, gpu: Any, metric: Callable[[int], ChangeMetric]) -> None:
        # Below 2 ** 24 every sum of bytes is a float32, so that the means are the reference's to the bit.
        first, second = pair("uint8", (3, 19, 70))
        blocks, _ = measured(gpu, metric(16), first, second)
        np.testing.assert_array_equal(blocks, measure_change(first, second, block=16, threshold=THRESHOLD)[0])

    @pytest.mark.parametrize("dtype", ["float32", "float16", "uint8"])
    @pytest.mark.parametrize(
        "pad",
        [
            ((0, 0), (0, 0), (0, 4)),  # a pitch that keeps groups of four whole
            ((1, 0), (0, 2), (0, 1)),  # rows start between groups
            ((0, 0), (0, 0), (3, 1)),  # the first row does
        ],
    )
    def test_strides(
        self, gpu: Any, metric: Callable[[int], ChangeMetric], pad: tuple[tuple[int, int], ...], dtype: str
    ) -> None:
        first, second = pair(dtype, (2, 9, 40))
        blocks, summary = measured(gpu, metric(8), first, second, pad=pad)
        dense_blocks, dense_summary = measured(gpu, metric(8), first, second)
        # The order of additions does not depend on the layout.
        assert blocks.tobytes() == dense_blocks.tobytes()
        assert summary.tobytes() == dense_summary.tobytes()
        assert_near(blocks[0], measure_change(first, second, block=8, threshold=THRESHOLD)[0][0], self.terms(2, 8))

    def test_channels_and_rows_may_change_places(self, gpu: Any, metric: Callable[[int], ChangeMetric]) -> None:
        first, second = pair("float32", (2, 9, 40))
        blocks, _ = measured(gpu, metric(8), first, second, order=(1, 0, 2))
        assert_near(blocks[0], measure_change(first, second, block=8, threshold=THRESHOLD)[0][0], self.terms(2, 8))

    @pytest.mark.parametrize("where", [(0, 0, 0), (1, 8, 39), (0, 4, 17), (1, 8, 36)])
    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_nan_reaches_the_figures_of_its_block(
        self, gpu: Any, metric: Callable[[int], ChangeMetric], value: float, where: tuple[int, int, int]
    ) -> None:
        first, second = pair("float32", (2, 9, 40))
        # The difference of two infinities is NaN, too.
        first[where] = second[where] = value
        blocks, summary = measured(gpu, metric(8), first, second)
        expected_blocks, expected_summary = measure_change(first, second, block=8, threshold=THRESHOLD)
        np.testing.assert_array_equal(np.isnan(blocks), np.isnan(expected_blocks))
        assert np.isnan(blocks).sum() == 2
        assert np.isnan(summary).tolist() == [True, True, False]
        assert summary[2] == expected_summary[2]

    def test_the_same_twice_is_the_same_bits_and_nothing_changed(
        self, gpu: Any, metric: Callable[[int], ChangeMetric]
    ) -> None:
        first, second = pair("float32", (3, 33, 47))
        runs = [measured(gpu, metric(16), first, second) for _ in range(3)]
        assert len({blocks.tobytes() + summary.tobytes() for blocks, summary in runs}) == 1
        blocks, summary = measured(gpu, metric(16), first, first, threshold=0)
        assert not blocks.any()
        assert not summary.any()

    def test_a_mean_at_the_threshold_has_not_changed(self, gpu: Any, metric: Callable[[int], ChangeMetric]) -> None:
        first = np.zeros((1, 4, 8), np.float32)
        second = np.full((1, 4, 8), 0.25, np.float32)
        second[:, :, 4:] = 0.5
        assert measured(gpu, metric(4), first, second, threshold=0.25)[1][2] == 0.5

    def test_the_comparison_sees_a_defect(self, gpu: Any, metric: Callable[[int], ChangeMetric]) -> None:
        # One pixel left out of one block, at a border: 1 part in 4 * 8 * 2.
        first, second = pair("float32", (2, 9, 40))
        blocks, _ = measured(gpu, metric(8), first, second)
        spoilt = second.copy()
        spoilt[1, 3, 39] = first[1, 3, 39]
        with pytest.raises(AssertionError):
            assert_near(blocks[0], measure_change(first, spoilt, block=8, threshold=THRESHOLD)[0][0], self.terms(2, 8))

    def test_bytes_moved(self, gpu: Any, metric: Callable[[int], ChangeMetric]) -> None:
        # Two images of 2 x 9 x 40 halves, 2 x 2 x 5 statistics written and read, 3 figures written.
        image = gpu.allocate((2, 9, 40), "float16")
        assert metric(8).bytes_moved(image) == 2 * 2 * 9 * 40 * 2 + 2 * 2 * 2 * 5 * 4 + 12


def array(shape: tuple[int, ...], dtype: str = "float32", *, pointer: int = 4096, **options: Any) -> DeviceArray:
    """An array that is looked at and never touched."""
    return DeviceArray(pointer, shape, dtype, device=options.pop("device", 0), **options)


class TestGrouping:
    """Where four pixels are read at once. A GPU faults on a misaligned group; the host that stands for it does not."""

    @pytest.mark.parametrize(
        ("dtype", "offset", "strides", "grouped"),
        [
            ("float32", 0, (400, 20, 1), True),
            ("float32", 16, (404, 20, 1), True),
            ("float32", 8, (400, 20, 1), False),  # the first row is not at a group
            ("float32", 0, (402, 20, 1), False),  # the second channel is not
            ("float32", 0, (400, 21, 1), False),  # the second row is not
            ("float16", 8, (400, 20, 1), True),
            ("float16", 4, (400, 20, 1), False),
            ("uint8", 4, (400, 20, 1), True),
            ("uint8", 2, (400, 20, 1), False),
        ],
    )
    @pytest.mark.parametrize("other_first", [False, True])
    def test_only_where_every_row_allows_it(
        self, no_gpu: Any, dtype: str, offset: int, strides: tuple[int, ...], grouped: bool, other_first: bool
    ) -> None:
        pair = [array((3, 20, 20), dtype, pointer=4096 + offset, strides=strides), array((3, 20, 20), dtype)]
        if other_first:
            pair.reverse()
        launch = ChangeMetric(no_gpu).prepare(*pair, array((2, 2, 2)), array((3,)), threshold=1)
        _, _, (plan, _) = launch._launches[0]  # type: ignore[misc]  # what no_gpu gives for a launch
        assert plan.grouped == grouped


class TestRefused:
    @pytest.mark.parametrize("block", [0, 2, 12, 256])
    def test_a_block_of_another_size(self, no_gpu: Any, block: int) -> None:
        with pytest.raises(InputError, match=f"^a block of {block} pixels is not supported"):
            ChangeMetric(no_gpu, block=block)

    @pytest.mark.parametrize(
        ("replaced", "message"),
        [
            ({"first": array((3, 20, 20), "int32")}, "first is int32, expected float32 or float16 or uint8"),
            ({"first": array((3, 20, 20), device=1)}, "first is on cuda:1, expected cuda:0"),
            ({"second": array((3, 20, 21))}, "second is float32 [3, 20, 21], expected float32 [3, 20, 20]"),
            ({"second": array((3, 20, 20), "float16")}, "second is float16 [3, 20, 20], expected float32"),
            ({"second": array((3, 20, 20), strides=(1, 60, 3))}, "second has a stride of 3 elements along its rows"),
            ({"second": array((20, 20))}, "second has shape [20, 20], expected [C, H, W]"),
            ({"blocks": array((2, 1, 2))}, "blocks has shape [2, 1, 2], expected [2, 2, 2]"),
            ({"blocks": array((2, 2, 2), strides=(8, 4, 1))}, "blocks has shape [2, 2, 2], expected [2, 2, 2], contig"),
            ({"blocks": array((2, 2, 2), "float16")}, "blocks is float16, expected float32"),
            ({"summary": array((4,))}, "summary has shape [4], expected [3]"),
            ({"summary": array((3,), pointer=4097)}, "summary starts at address 0x1001"),
            ({"threshold": float("nan")}, "threshold is nan, expected a finite number"),
        ],
    )
    def test_arguments(self, no_gpu: Any, replaced: dict[str, Any], message: str) -> None:
        given: dict[str, Any] = {
            "first": array((3, 20, 20)),
            "second": array((3, 20, 20)),
            "blocks": array((2, 2, 2)),
            "summary": array((3,)),
            "threshold": 1.0,
        }
        with pytest.raises(InputError) as caught:
            ChangeMetric(no_gpu, block=16).prepare(**given | replaced)
        assert str(caught.value).startswith(message)
