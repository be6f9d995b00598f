"""Image conversion: the reference against direct formulas, the kernel against the reference, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pytest

from warpcache.kernels.array import DeviceArray
from warpcache.kernels.errors import InputError
from warpcache.kernels.image import ImageKernels
from warpcache.kernels.reference.image import load_image, store_image

# Heights and widths: below a group of four pixels, around one, around a thread block of 128 x 8, and one that is whole.
SIZES = [(1, 1), (2, 3), (3, 5), (9, 8), (7, 131), (8, 128), (17, 129)]


@pytest.fixture
def images(cuda_context: Any) -> Iterator[ImageKernels]:
    images = ImageKernels(cuda_context)
    yield images
    images.close()


def random_pixels(height: int, width: int, channels: int) -> np.ndarray:
    return np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, channels), np.uint8)


def random_image(channels: int, height: int, width: int, dtype: str) -> np.ndarray:
    """Beyond [-1, 1] on both sides, with halves between two bytes, infinities and NaN among them."""
    rng = np.random.default_rng(height * 1000 + width)
    values = rng.uniform(-1.2, 1.2, (channels, height, width)).astype(np.float32)
    special = np.array([-1, 1, np.nan, np.inf, -np.inf, (0.5 + 7) / 127.5 - 1, (0.5 + 8) / 127.5 - 1], np.float32)
    flat = values.reshape(-1)
    flat[: min(flat.size, special.size)] = special[: flat.size]
    return values.astype(dtype)


class TestReference:
    def test_bytes_span_minus_one_to_one(self) -> None:
        pixels = np.array([0, 255], np.uint8).reshape(1, 2, 1)
        assert load_image(pixels).ravel().tolist() == [-1.0, 1.0]

    def test_every_byte_is_the_formula(self) -> None:
        pixels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
        exact = np.arange(256) / 127.5 - 1
        # Two float32 operations and a rounded factor, at values of up to 2: 3 half units of 2 ** -23.
        np.testing.assert_allclose(load_image(pixels).ravel(), exact, rtol=0, atol=3 * 2**-23)

    @pytest.mark.parametrize("dtype", ["float32", "float16"])
    def test_store_takes_back_what_load_gave(self, dtype: str) -> None:
        pixels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
        # Also in float16: its steps near 1 are 2 ** -11, a sixteenth of a byte's 1 / 127.5.
        np.testing.assert_array_equal(store_image(load_image(pixels, dtype)), pixels)

    def test_halves_go_to_the_even_byte(self) -> None:
        image = np.array([0.5, 1.5, 2.5, 254.5], np.float32).reshape(1, 1, 4)
        assert store_image(image, scale=1, offset=0).ravel().tolist() == [0, 2, 2, 254]

    def test_what_is_beyond_is_clamped_and_nan_is_black(self) -> None:
        image = np.array([-3, 300, np.inf, -np.inf, np.nan], np.float32).reshape(1, 1, 5)
        assert store_image(image, scale=1, offset=0).ravel().tolist() == [0, 255, 255, 0, 0]

    def test_scale_and_offset_are_by_channel_of_the_image(self) -> None:
        pixels = np.full((1, 1, 3), 10, np.uint8)
        loaded = load_image(pixels, scale=[1, 2, 3], offset=[0, 1, 2], swap_red_blue=True)
        assert loaded.ravel().tolist() == [10, 21, 32]

    def test_swapped_channels_keep_alpha(self) -> None:
        pixels = np.array([1, 2, 3, 4], np.uint8).reshape(1, 1, 4)
        assert load_image(pixels, scale=1, offset=0, swap_red_blue=True).ravel().tolist() == [3, 2, 1, 4]
        image = np.array([1, 2, 3, 4], np.float32).reshape(4, 1, 1)
        assert store_image(image, scale=1, offset=0, swap_red_blue=True).ravel().tolist() == [3, 2, 1, 4]


# The kernel equals the reference to the bit, and no tolerance is needed: every operation is rounded by IEEE 754 and
# multiply and add are not fused.
class TestKernel:
    @pytest.mark.parametrize("dtype", ["float32", "float16"])
    @pytest.mark.parametrize("channels", [1, 3, 4])
    def test_load_equals_the_reference(self, gpu: Any, images: ImageKernels, channels: int, dtype: str) -> None:
        for height, width in SIZES:
            pixels = random_pixels(height, width, channels)
            source, target = gpu.place(pixels), gpu.empty((channels, height, width), dtype)
            images.load(source.array, target.array, stream=gpu.stream.handle)
            np.testing.assert_array_equal(target.read(), load_image(pixels, dtype), err_msg=f"{height}x{width}")

    @pytest.mark.parametrize("dtype", ["float32", "float16"])
    @pytest.mark.parametrize("channels", [1, 3, 4])
    def test_store_equals_the_reference(self, gpu: Any, images: ImageKernels, channels: int, dtype: str) -> None:
        for height, width in SIZES:
            image = random_image(channels, height, width, dtype)
            source, target = gpu.place(image), gpu.empty((height, width, channels), "uint8")
            images.store(source.array, target.array, stream=gpu.stream.handle)
            np.testing.assert_array_equal(target.read(), store_image(image), err_msg=f"{height}x{width}")

    @pytest.mark.parametrize("dtype", ["float32", "float16"])
    def test_halves_go_to_the_even_byte(self, gpu: Any, images: ImageKernels, dtype: str) -> None:
        # Also from below 0 to above 255; all of them are exact in float16.
        image = np.arange(-2, 258, 0.5).astype(dtype).reshape(1, 20, 26)
        source, target = gpu.place(image), gpu.empty((20, 26, 1), "uint8")
        images.store(source.array, target.array, stream=gpu.stream.handle, scale=1, offset=0)
        exact = np.clip(np.rint(np.arange(-2, 258, 0.5)), 0, 255)
        np.testing.assert_array_equal(target.read().ravel(), exact)

    # Of the pixels, pad and order; of the image, pad and order.
    LAYOUTS: tuple[tuple[Any, ...], ...] = (
        (((0, 0), (0, 4), (0, 0)), None, ((0, 0), (0, 0), (0, 4)), None),  # a pitch that keeps groups whole
        (((1, 0), (1, 2), (0, 0)), None, ((0, 0), (0, 0), (0, 0)), None),  # rows start between words
        (((0, 0), (0, 0), (0, 0)), None, ((0, 1), (2, 0), (1, 2)), None),  # planes start between groups
        (((0, 0), (0, 0), (0, 1)), None, ((0, 0), (0, 0), (0, 0)), None),  # a gap after every pixel
        (((0, 0), (0, 0), (0, 0)), (2, 0, 1), ((0, 0), (0, 0), (0, 0)), (1, 2, 0)),  # planar pixels, interleaved floats
        (((0, 0), (0, 0), (0, 0)), (1, 0, 2), ((0, 0), (0, 0), (0, 0)), (0, 2, 1)),  # both transposed
    )

    @pytest.mark.parametrize("layout", range(len(LAYOUTS)))
    @pytest.mark.parametrize("channels", [3, 4])
    def test_strides_of_both_sides(self, gpu: Any, images: ImageKernels, channels: int, layout: int) -> None:
        pixel_pad, pixel_order, image_pad, image_order = self.LAYOUTS[layout]
        height, width = 10, 20
        pixels = random_pixels(height, width, channels)
        image = random_image(channels, height, width, "float16")
        source = gpu.place(pixels, pad=pixel_pad, order=pixel_order)
        target = gpu.empty(image.shape, "float16", pad=image_pad, order=image_order)
        images.load(source.array, target.array, stream=gpu.stream.handle)
        np.testing.assert_array_equal(target.read(), load_image(pixels, "float16"))
        source = gpu.place(image, pad=image_pad, order=image_order)
        target = gpu.empty(pixels.shape, "uint8", pad=pixel_pad, order=pixel_order)
        images.store(source.array, target.array, stream=gpu.stream.handle)
        np.testing.assert_array_equal(target.read(), store_image(image))

    @pytest.mark.parametrize("width", [8, 9])
    def test_scale_offset_and_swapped_channels(self, gpu: Any, images: ImageKernels, width: int) -> None:
        options: dict[str, Any] = {
            "scale": [1 / 58.4, 1 / 57.1, 1 / 57.4, 0.5],
            "offset": [-2.1, -2.0, -1.8, 3.0],
            "swap_red_blue": True,
        }
        pixels = random_pixels(3, width, 4)
        source, target = gpu.place(pixels), gpu.empty((4, 3, width), "float32")
        images.load(source.array, target.array, stream=gpu.stream.handle, **options)
        loaded = target.read()
        np.testing.assert_array_equal(loaded, load_image(pixels, **options))
        back = gpu.empty(pixels.shape, "uint8")
        images.store(target.array, back.array, stream=gpu.stream.handle, **options)
        np.testing.assert_array_equal(back.read(), store_image(loaded, **options))
        np.testing.assert_array_equal(back.read(), pixels)

    def test_a_prepared_launch_sees_new_pixels(self, gpu: Any, images: ImageKernels) -> None:
        first, second = random_pixels(4, 8, 3), 255 - random_pixels(4, 8, 3)
        source, target = gpu.place(first), gpu.empty((1, 3, 4, 8), "float32")
        other = gpu.place(second)
        launch = images.prepare_load(source.array, target.array)
        launch.launch(gpu.stream.handle)
        np.testing.assert_array_equal(target.read()[0], load_image(first))
        image = gpu.allocate((3, 4, 8), "float32")
        images.load(other.array, image, stream=gpu.stream.handle)
        images.store(image, source.array, stream=gpu.stream.handle)
        launch.launch(gpu.stream.handle)
        np.testing.assert_array_equal(target.read()[0], load_image(second))

    def test_the_comparison_sees_a_defect(self, gpu: Any, images: ImageKernels) -> None:
        # What a kernel that took blue for red, or rounded halves up, would have to get past.
        pixels = random_pixels(9, 8, 3)
        source, target = gpu.place(pixels), gpu.empty((3, 9, 8), "float32")
        images.load(source.array, target.array, stream=gpu.stream.handle, swap_red_blue=True)
        assert not np.array_equal(target.read(), load_image(pixels))
        halves = np.full((1, 1, 4), 2.5, np.float32)
        out = gpu.empty((1, 4, 1), "uint8")
        images.store(gpu.place(halves).array, out.array, stream=gpu.stream.handle, scale=1, offset=0)
        assert not np.array_equal(out.read().ravel(), np.floor(halves.ravel() + 0.5))

    def test_bytes_moved(self, gpu: Any, images: ImageKernels) -> None:
        pixels, image = gpu.allocate((4, 8, 3), "uint8"), gpu.allocate((3, 4, 8), "float16")
        assert images.bytes_moved(pixels, image) == 4 * 8 * 3 * (1 + 2)

    def test_closed_twice_and_then_refused(self, gpu: Any, images: ImageKernels) -> None:
        launch = images.prepare_load(gpu.allocate((4, 8, 3), "uint8"), gpu.allocate((3, 4, 8), "float32"))
        images.close()
        images.close()
        with pytest.raises(Exception, match=r"^the kernels of image\.cu on cuda:0 are closed"):
            launch.launch(gpu.stream.handle)


def array(shape: tuple[int, ...], dtype: str, *, pointer: int = 4096, device: int = 0) -> DeviceArray:
    """An array that is looked at and never touched."""
    return DeviceArray(pointer, shape, dtype, device=device)


class TestGrouping:
    """Where four pixels are moved at once. A GPU faults on a misaligned group; the host that stands for it does not."""

    @pytest.mark.parametrize(
        ("channels", "dtype", "pixels", "image", "grouped"),
        [
            # Of pixels and image: offset of the first element in bytes, and strides in elements.
            (3, "float32", (0, (60, 3, 1)), (0, (200, 20, 1)), True),
            (3, "float32", (4, (64, 3, 1)), (16, (204, 24, 1)), True),
            (3, "float32", (2, (60, 3, 1)), (0, (200, 20, 1)), False),  # not at a word
            (3, "float32", (0, (61, 3, 1)), (0, (200, 20, 1)), False),  # the second row is not
            (3, "float32", (0, (80, 4, 1)), (0, (200, 20, 1)), False),  # a gap after every pixel
            (3, "float32", (0, (60, 3, -1)), (0, (200, 20, 1)), False),
            (3, "float32", (0, (60, 3, 1)), (8, (200, 20, 1)), False),  # not at a group of four
            (3, "float16", (0, (60, 3, 1)), (8, (200, 20, 1)), True),
            (3, "float16", (0, (60, 3, 1)), (4, (200, 20, 1)), False),
            (3, "float32", (0, (60, 3, 1)), (0, (202, 20, 1)), False),  # the second plane is not
            (3, "float32", (0, (60, 3, 1)), (0, (210, 21, 1)), False),  # its second row is not
            (3, "float32", (0, (60, 3, 1)), (0, (400, 40, 2)), False),  # pixels apart
            (4, "float32", (16, (80, 4, 1)), (0, (200, 20, 1)), True),
            (4, "float32", (4, (80, 4, 1)), (0, (200, 20, 1)), False),  # four channels are moved as 16 bytes
            (4, "float32", (0, (84, 4, 1)), (0, (200, 20, 1)), False),
            (1, "float16", (4, (20, 1, 7)), (0, (99, 20, 1)), True),  # one channel has no neighbour
            (1, "float16", (4, (22, 1, 1)), (0, (200, 20, 1)), False),
        ],
    )
    def test_only_where_every_row_allows_it(
        self, no_gpu: Any, channels: int, dtype: str, pixels: Any, image: Any, grouped: bool
    ) -> None:
        source = DeviceArray(4096 + pixels[0], (10, 20, channels), "uint8", device=0, strides=pixels[1])
        target = DeviceArray(8192 + image[0], (channels, 10, 20), dtype, device=0, strides=image[1])
        for prepared in (
            ImageKernels(no_gpu).prepare_load(source, target),
            ImageKernels(no_gpu).prepare_store(target, source),
        ):
            _, _, (plan,) = cast(Any, prepared)
            assert plan.grouped == grouped


class TestRefused:
    @pytest.mark.parametrize(
        ("pixels", "image", "message"),
        [
            (np.zeros((4, 4, 3), np.uint8), array((3, 4, 4), "float32"), "pixels is of type ndarray; borrow it first"),
            (array((4, 4, 3), "uint8", device=1), array((3, 4, 4), "float32"), "pixels is on cuda:1, expected cuda:0"),
            (array((4, 4, 3), "float32"), array((3, 4, 4), "float32"), "pixels is float32, expected uint8"),
            (array((4, 4, 3), "uint8"), array((3, 4, 4), "int32"), "image is int32, expected float32 or float16"),
            (
                array((2, 4, 4, 3), "uint8"),
                array((3, 4, 4), "float32"),
                "pixels has shape [2, 4, 4, 3], expected [H, W",
            ),
            (array((0, 4, 3), "uint8"), array((3, 0, 4), "float32"), "pixels has shape [0, 4, 3], which holds nothing"),
            (array((4, 1 << 17, 3), "uint8"), array((3, 4, 4), "float32"), "pixels has shape [4, 131072, 3]; extents"),
            (array((4, 4, 2), "uint8"), array((2, 4, 4), "float32"), "pixels has shape [4, 4, 2], expected [H, W, C]"),
            (array((4, 5, 3), "uint8"), array((3, 4, 4), "float32"), "image has shape [3, 4, 4], expected [3, 4, 5]"),
            (array((4, 4, 3), "uint8"), array((3, 4, 4), "float32", pointer=4098), "image starts at address 0x1002"),
        ],
    )
    def test_arrays(self, no_gpu: Any, pixels: Any, image: DeviceArray, message: str) -> None:
        images = ImageKernels(no_gpu)
        for prepare in (lambda: images.prepare_load(pixels, image), lambda: images.prepare_store(image, pixels)):
            with pytest.raises(InputError) as caught:
                prepare()
            assert str(caught.value).startswith(message)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"scale": [1, 2]}, "scale has shape [2], expected one number or 3"),
            ({"offset": float("nan")}, "offset is nan, expected finite numbers"),
            ({"scale": [1, 0, 1]}, "a scale of 0 cannot be undone"),
        ],
    )
    def test_options(self, no_gpu: Any, options: dict[str, Any], message: str) -> None:
        with pytest.raises(InputError) as caught:
            ImageKernels(no_gpu).prepare_store(array((3, 4, 4), "float32"), array((4, 4, 3), "uint8"), **options)
        assert str(caught.value).startswith(message)

    def test_one_channel_has_nothing_to_swap(self, no_gpu: Any) -> None:
        with pytest.raises(InputError, match=r"^red and blue cannot change places"):
            ImageKernels(no_gpu).prepare_load(
                array((4, 4, 1), "uint8"), array((1, 4, 4), "float32"), swap_red_blue=True
            )
