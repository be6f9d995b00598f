"""Backward warp: the reference against torch's grid_sample, the kernel against the reference, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch.nn import functional

from warpcache.kernels.array import DeviceArray
from warpcache.kernels.errors import InputError
from warpcache.kernels.reference.warp import warp_map
from warpcache.kernels.warp import MOST_MAPS, WarpKernel

PADDINGS: tuple[Literal["zeros", "border"], ...] = ("zeros", "border")


def random_map(channels: int, height: int, width: int, dtype: str = "float32") -> np.ndarray:
    rng = np.random.default_rng(channels * 100 + width)
    return rng.uniform(-2, 2, (channels, height, width)).astype(dtype)


def random_grid(height: int, width: int) -> np.ndarray:
    """Beyond the map on every side; exact corners, pixel centres and far points are among them."""
    grid = np.random.default_rng(height * 100 + width).uniform(-1.3, 1.3, (2, height, width)).astype(np.float32)
    special = np.array([-1, 1, 0, 1e9, -1e9, np.inf, -np.inf, -1.2], np.float32)
    flat = grid.reshape(2, -1)
    count = min(flat.shape[1], special.size)
    flat[0, :count] = special[:count]
    flat[1, :count] = special[::-1][:count]
    return grid


def identity_grid(height: int, width: int, *, right_px: int = 0, down_px: int = 0) -> np.ndarray:
    """Every pixel reads the one `right_px` and `down_px` from it."""
    x = (2 * (np.arange(width) + right_px) + 1) / width - 1
    y = (2 * (np.arange(height) + down_px) + 1) / height - 1
    return np.stack(np.meshgrid(x, y)).astype(np.float32)


class TestReference:
    @pytest.mark.parametrize("padding", PADDINGS)
    @pytest.mark.parametrize("shape", [(3, 5, 7), (1, 1, 1), (2, 1, 9), (4, 16, 3)])
    def test_is_torchs_grid_sample(self, shape: tuple[int, int, int], padding: Literal["zeros", "border"]) -> None:
        # At infinity torch's CPU kernel gives NaN and its GPU kernel 0 (padding zeros): our own text decides there.
        source, grid = random_map(*shape), np.clip(random_grid(6, 11), -1e9, 1e9)
        expected = functional.grid_sample(
            torch.from_numpy(source)[None],
            torch.from_numpy(grid).permute(1, 2, 0)[None],
            mode="bilinear",
            padding_mode=padding,
            align_corners=False,
        )[0].numpy()
        # Both in float32, but torch may fuse and reorder: a position near 16 is then rounded at twice that once less
        # (half a unit of 2 ** -19, halved), where values change by up to 4 a pixel; sums of values of up to 2 add less.
        np.testing.assert_allclose(warp_map(source, grid, padding=padding), expected, rtol=0, atol=4.5e-6)

    def test_the_identity_and_whole_pixels_move_nothing_but_whole_pixels(self) -> None:
        source = random_map(2, 8, 16)
        # Extents are powers of two, so that positions are exact.
        np.testing.assert_array_equal(warp_map(source, identity_grid(8, 16)), source)
        moved = warp_map(source, identity_grid(8, 16, right_px=3, down_px=-2))
        np.testing.assert_array_equal(moved[:, 2:, :-3], np.roll(source, (2, -3), (1, 2))[:, 2:, :-3])
        assert not moved[:, :2].any()
        assert not moved[:, :, -3:].any()

    def test_pixels_that_are_not_read_are_not_seen(self) -> None:
        source = np.full((1, 4, 4), np.nan, np.float32)
        source[0, :, 0] = 1
        grid = np.zeros((2, 1, 1), np.float32)
        grid[0] = -1.1  # left of the first column's centre: a neighbour outside, and none of the NaNs
        assert warp_map(source, grid).item() == pytest.approx(0.3)

    @pytest.mark.parametrize("padding", PADDINGS)
    def test_unknown_positions_are_nan_and_infinite_ones_outside(self, padding: Literal["zeros", "border"]) -> None:
        grid = np.zeros((2, 1, 3), np.float32)
        grid[:, 0, 0] = np.nan, 0
        grid[:, 0, 1] = np.inf, -np.inf
        warped = warp_map(np.ones((2, 4, 4), np.float32), grid, padding=padding)
        outside = 1 if padding == "border" else 0
        np.testing.assert_array_equal(warped, np.broadcast_to(np.float32([np.nan, outside, 1]), (2, 1, 3)))


@pytest.fixture
def kernel(cuda_context: Any) -> Iterator[WarpKernel]:
    kernel = WarpKernel(cuda_context)
    yield kernel
    kernel.close()


def warped(
    gpu: Any, kernel: WarpKernel, sources: list[np.ndarray], grid: np.ndarray, padding: Literal["zeros", "border"]
) -> list[np.ndarray]:
    targets = [gpu.empty((source.shape[0], *grid.shape[1:]), source.dtype.name) for source in sources]
    kernel.warp(
        [gpu.place(source).array for source in sources],
        gpu.place(grid).array,
        [target.array for target in targets],
        padding=padding,
        stream=gpu.stream.handle,
    )
    return [target.read() for target in targets]


# The kernel equals the reference to the bit, and no tolerance is needed: every operation is rounded by IEEE 754, in the
# same order, and multiply and add are not fused. So floor cannot fall to different sides either.
class TestKernel:
    @pytest.mark.parametrize("padding", PADDINGS)
    @pytest.mark.parametrize("dtype", ["float32", "float16"])
    @pytest.mark.parametrize("size", [(1, 1), (3, 5), (9, 33), (8, 64)])
    def test_equals_the_reference(
        self, gpu: Any, kernel: WarpKernel, size: tuple[int, int], dtype: str, padding: Literal["zeros", "border"]
    ) -> None:
        grid = random_grid(*size)
        for shape in [(1, 1, 1), (3, 7, 5), (5, 16, 16)]:
            source = random_map(*shape, dtype)
            (found,) = warped(gpu, kernel, [source], grid, padding)
            np.testing.assert_array_equal(found, warp_map(source, grid, padding=padding), err_msg=str(shape))

    @pytest.mark.parametrize("padding", PADDINGS)
    def test_many_maps_of_many_kinds_at_once(
        self, gpu: Any, kernel: WarpKernel, padding: Literal["zeros", "border"]
    ) -> None:
        grid = random_grid(7, 10)
        # More channels than a thread does: parts begin and end within maps, and span several of them.
        shapes = [(1, 8, 8), (9, 8, 8), (3, 5, 11), (16, 4, 4), (2, 4, 4), (30, 9, 2), (1, 1, 1), (7, 8, 8)]
        sources = [random_map(*shape, ("float32", "float16")[i % 3 == 1]) for i, shape in enumerate(shapes)]
        assert len(sources) == MOST_MAPS
        assert kernel._channels_a_thread(69, 70) <= 30
        for source, found in zip(sources, warped(gpu, kernel, sources, grid, padding), strict=True):
            np.testing.assert_array_equal(found, warp_map(source, grid, padding=padding))

    def test_all_channels_in_one_thread_where_there_are_pixels_enough(self, no_gpu: Any) -> None:
        kernel = WarpKernel(no_gpu)
        assert kernel._channels_a_thread(64, 1 << 22) == 64
        assert kernel._channels_a_thread(3, 1) == 3

    def test_every_number_of_channels_a_thread(
        self, gpu: Any, kernel: WarpKernel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        grid = random_grid(3, 4)
        sources = [random_map(5, 4, 4), random_map(6, 4, 4, "float16"), random_map(3, 2, 2)]
        expected = [warp_map(source, grid) for source in sources]
        for channels in (1, 2, 4, 5, 7, 11, 14, 20):
            monkeypatch.setattr(kernel, "_channels_a_thread", lambda *_, channels=channels: channels)
            for found, right in zip(warped(gpu, kernel, sources, grid, "zeros"), expected, strict=True):
                np.testing.assert_array_equal(found, right, err_msg=f"{channels} channels a thread")

    @pytest.mark.parametrize("pad", [((0, 0), (1, 0), (2, 3)), ((1, 2), (0, 0), (0, 1))])
    def test_strides(self, gpu: Any, kernel: WarpKernel, pad: tuple[tuple[int, int], ...]) -> None:
        # The two maps differ in nothing but the steps between rows.
        sources, grid = [random_map(3, 6, 5), random_map(3, 6, 5) + 1], random_grid(9, 7)
        placed = [gpu.place(sources[0], pad=pad), gpu.place(sources[1])]
        points = gpu.place(grid, pad=pad)
        targets = [gpu.empty((3, 9, 7), "float32", pad=pad), gpu.empty((1, 3, 9, 7), "float32")]
        kernel.warp(
            [item.array for item in placed],
            points.array,
            [item.array for item in targets],
            stream=gpu.stream.handle,
        )
        np.testing.assert_array_equal(targets[0].read(), warp_map(sources[0], grid))
        np.testing.assert_array_equal(targets[1].read()[0], warp_map(sources[1], grid))

    def test_channels_last_is_not_for_rows_but_rows_may_be_anywhere(self, gpu: Any, kernel: WarpKernel) -> None:
        source, grid = random_map(3, 6, 5), random_grid(4, 4)
        placed, target = gpu.place(source, order=(1, 0, 2)), gpu.empty((3, 4, 4), "float32", order=(1, 0, 2))
        kernel.warp([placed.array], gpu.place(grid).array, [target.array], stream=gpu.stream.handle)
        np.testing.assert_array_equal(target.read(), warp_map(source, grid))

    @pytest.mark.parametrize("padding", PADDINGS)
    def test_nan_and_infinite_positions(
        self, gpu: Any, kernel: WarpKernel, padding: Literal["zeros", "border"]
    ) -> None:
        grid = random_grid(4, 6)
        grid[0, 1, 2] = grid[1, 2, 3] = np.nan
        grid[:, 3, 3] = np.inf, -np.inf
        source = random_map(3, 5, 5)
        (found,) = warped(gpu, kernel, [source], grid, padding)
        np.testing.assert_array_equal(found, warp_map(source, grid, padding=padding))
        assert np.isnan(found).sum() == 6

    def test_pixels_that_are_not_read_are_not_seen(self, gpu: Any, kernel: WarpKernel) -> None:
        source = random_map(2, 6, 6)
        source[0, 3, 3] = np.nan
        grid = random_grid(8, 8)
        (found,) = warped(gpu, kernel, [source], grid, "border")
        expected = warp_map(source, grid, padding="border")
        assert 0 < np.isnan(expected).sum() < 32
        np.testing.assert_array_equal(found, expected)

    def test_an_atlas_gives_its_first_two_channels(self, gpu: Any, kernel: WarpKernel) -> None:
        atlas = np.concatenate([random_grid(5, 6), np.ones((1, 5, 6), np.float32)])
        source, target = random_map(2, 4, 4), gpu.empty((2, 5, 6), "float32")
        kernel.warp([gpu.place(source).array], gpu.place(atlas).array[0:2], [target.array], stream=gpu.stream.handle)
        np.testing.assert_array_equal(target.read(), warp_map(source, atlas[:2]))

    def test_the_comparison_sees_a_defect(self, gpu: Any, kernel: WarpKernel) -> None:
        # What a kernel with align_corners=True, or with x and y exchanged, would have to get past.
        source, grid = random_map(2, 6, 6), random_grid(5, 5)
        (found,) = warped(gpu, kernel, [source], grid, "border")
        assert not np.array_equal(found, warp_map(source, grid[::-1], padding="border"))
        aligned = functional.grid_sample(
            torch.from_numpy(source)[None],
            torch.from_numpy(grid).permute(1, 2, 0)[None],
            padding_mode="border",
            align_corners=True,
        )[0].numpy()
        assert np.abs(found - aligned).max() > 1e-2

    def test_bytes_moved(self, gpu: Any, kernel: WarpKernel) -> None:
        sources = [gpu.allocate((3, 4, 4), "float32"), gpu.allocate((5, 2, 2), "float16")]
        targets = [gpu.allocate((3, 6, 7), "float32"), gpu.allocate((5, 6, 7), "float16")]
        grid = gpu.allocate((2, 6, 7), "float32")
        expected = 3 * 16 * 4 + 5 * 4 * 2 + 3 * 42 * 4 + 5 * 42 * 2 + 2 * 42 * 4
        assert kernel.bytes_moved(sources, grid, targets) == expected


def array(shape: tuple[int, ...], dtype: str = "float32", *, pointer: int, **options: Any) -> DeviceArray:
    """An array that is looked at and never touched."""
    return DeviceArray(pointer, shape, dtype, device=options.pop("device", 0), **options)


SOURCE, GRID, TARGET = 1 << 20, 2 << 20, 3 << 20


class TestRefused:
    @pytest.mark.parametrize(
        ("replaced", "message"),
        [
            ({"sources": []}, "0 maps were given, expected 1 to 8"),
            ({"sources": [array((1, 2, 2), pointer=SOURCE)] * 9}, "9 maps were given, expected 1 to 8"),
            ({"targets": []}, "0 targets were given for 1 maps"),
            ({"sources": [array((3, 4, 4), "uint8", pointer=SOURCE)]}, "map 0 is uint8, expected float32 or float16"),
            ({"sources": [array((3, 4, 4), pointer=SOURCE, device=1)]}, "map 0 is on cuda:1, expected cuda:0"),
            ({"sources": [array((3, 4, 4), pointer=SOURCE, strides=(1, 12, 3))]}, "map 0 has a stride of 3 elements"),
            ({"grid": array((3, 5, 6), pointer=GRID)}, "grid has shape [3, 5, 6], expected [2, h, w]: x, y"),
            ({"grid": array((2, 5, 6), "float16", pointer=GRID)}, "grid is float16, expected float32"),
            ({"grid": array((2, 5, 6), pointer=GRID + 2)}, "grid starts at address"),
            ({"targets": [array((3, 4, 4), pointer=TARGET)]}, "target 0 has shape [3, 4, 4], expected [3, 5, 6]"),
            ({"targets": [array((3, 5, 6), "float16", pointer=TARGET)]}, "target 0 is float16, expected float32"),
            ({"targets": [array((3, 5, 6), pointer=SOURCE + 188)]}, "target 0 and map 0 lie in the same memory"),
            ({"targets": [array((3, 5, 6), pointer=GRID - 356)]}, "target 0 and grid lie in the same memory"),
            ({"padding": "reflection"}, "padding is 'reflection', expected 'zeros' or 'border'"),
        ],
    )
    def test_arguments(self, no_gpu: Any, replaced: dict[str, Any], message: str) -> None:
        given: dict[str, Any] = {
            "sources": [array((3, 4, 4), pointer=SOURCE)],
            "grid": array((2, 5, 6), pointer=GRID),
            "targets": [array((3, 5, 6), pointer=TARGET)],
        }
        with pytest.raises(InputError) as caught:
            WarpKernel(no_gpu).prepare(**given | replaced)
        assert str(caught.value).startswith(message)

    def test_neighbours_in_one_block_of_memory_do_not_overlap(self, no_gpu: Any) -> None:
        sources = [array((3, 4, 4), pointer=SOURCE), array((3, 4, 4), pointer=SOURCE)]
        targets = [array((3, 5, 6), pointer=SOURCE + 192), array((3, 5, 6), pointer=SOURCE + 192 + 360)]
        kernel = WarpKernel(no_gpu)
        kernel.prepare(sources, array((2, 5, 6), pointer=GRID), targets)
        with pytest.raises(InputError, match=r"^target 1 and target 0 lie in the same memory"):
            kernel.prepare(sources, array((2, 5, 6), pointer=GRID), [targets[0], targets[0]])
