"""What a warp adapter reads and writes: its inputs, outputs and the cut's tensors, and its size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass

import numpy as np
import torch
from onnx import ModelProto
from torch import Tensor

from ...engine.errors import ExportError, InputError
from ..frames.subject import Subject
from ..frames.surface import Surface
from ..graph.index import GraphIndex

__all__ = ["AdapterConfig", "AdapterLayout", "ImageInput", "VectorInput", "layout_of", "subject_layout"]

CACHE_FEATURES = "cache.features"


CACHE_IMAGE = "cache.image"


CACHE_ATLAS = "cache.atlas"


@dataclass(frozen=True)
class AdapterConfig:
    """Size of a warp adapter.

    Attributes:
        stride: Image pixels to one pixel of the working resolution.
        width: Channels of the consumer's convolutions.
        blocks: Residual blocks of the consumer.
        features: Channels of the cached encoding.
        encoder_width: Channels of the cache encoder, which is not on the latency path.
    """

    stride: int = 4
    width: int = 32
    blocks: int = 1
    features: int = 32
    encoder_width: int = 64

    def to_record(self) -> dict[str, int]:
        """JSON-ready form for the manifest."""
        return asdict(self)


@dataclass(frozen=True)
class ImageInput:
    """A generator input with rows and columns, brought to the working resolution by its own strided convolution."""

    name: str
    channels: int
    height: int
    width: int
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class VectorInput:
    """A generator input without rows and columns; the adapter flattens it.

    Attributes:
        name: Its name.
        shape: Of one frame, [1, ...].
        dtype: As the generator takes it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    @property
    def elements(self) -> int:
        """Numbers a frame."""
        return math.prod(self.shape[1:])


@dataclass(frozen=True)
class AdapterLayout:
    """What the adapter reads and writes.

    Attributes:
        height: Rows of the output images.
        width: Columns of the output images.
        outputs: Output names and their channels, in the generator's order.
        images: Inputs with rows and columns.
        vectors: Inputs without.
        taps: Cut tensors as (name, channels, rows, columns); rows = columns = 0 for a flattened vector.
        surface: Where the inputs carry the surface's motion, if they do.
        atlas_size: Rows and columns of the atlas.
    """

    height: int
    width: int
    outputs: tuple[tuple[str, int], ...]
    images: tuple[ImageInput, ...]
    vectors: tuple[VectorInput, ...]
    taps: tuple[tuple[str, int, int, int], ...]
    surface: Surface | None = None
    atlas_size: tuple[int, int] = (0, 0)

    @property
    def channels(self) -> int:
        """Channels of all outputs together."""
        return sum(c for _, c in self.outputs)

    def input_examples(self) -> dict[str, Tensor]:
        """One zero tensor per generator input, by name."""
        examples = {i.name: torch.zeros(1, i.channels, i.height, i.width, dtype=i.dtype) for i in self.images}
        return examples | {vector.name: torch.zeros(vector.shape, dtype=vector.dtype) for vector in self.vectors}


def layout_of(
    model: ModelProto,
    cut: Sequence[str],
    surface: Surface | None,
    atlas_shape: tuple[int, ...] | None,
    *,
    without: AbstractSet[str] = frozenset(),
) -> AdapterLayout:
    """What a warp adapter reads and writes for this generator and cut.

    Args:
        model: The whole, in normal form.
        cut: Names of the cut's values.
        surface: The generator's declaration of its surface, or None.
        atlas_shape: Shape of the atlas array in the stream, where there is a surface.
        without: Inputs that no consumer may read: the state.

    Raises:
        ExportError: If an output is no image, the images differ in size, or the declared surface does not fit.
    """
    index = GraphIndex(model)
    outputs = [index.specs[name] for name in index.outputs]
    for spec in outputs:
        if len(spec.shape) != 4 or spec.dtype != "float32" or spec.shape[2:] != outputs[0].shape[2:]:
            raise ExportError(
                f"output {spec.name!r} is {spec.dtype} {spec.shape}; the warp adapter needs outputs that are float32 "
                "images of one size; compile with --steps 0 to cut without training"
            )
    images, vectors = [], []
    for name in index.inputs:
        if name in without:
            continue
        spec = index.specs[name]
        dtype = torch.from_numpy(np.empty(0, spec.dtype)).dtype
        if len(spec.shape) == 4 and spec.shape[2] > 1 and spec.shape[3] > 1:
            images.append(ImageInput(name, spec.shape[1], spec.shape[2], spec.shape[3], dtype))
        else:
            vectors.append(VectorInput(name, spec.shape, dtype))
    if surface is not None:
        _check_surface(surface, {image.name: image for image in images}, atlas_shape, outputs[0].shape[2:])
    taps = []
    for name in cut:
        shape = index.specs[name].shape
        if len(shape) == 4 and shape[2] > 1 and shape[3] > 1:
            taps.append((name, shape[1], shape[2], shape[3]))
        else:
            taps.append((name, _vector_channels(shape), 0, 0))
    return AdapterLayout(
        height=outputs[0].shape[2],
        width=outputs[0].shape[3],
        outputs=tuple((spec.name, spec.shape[1]) for spec in outputs),
        images=tuple(images),
        vectors=tuple(vectors),
        taps=tuple(taps),
        surface=surface,
        atlas_size=(0, 0) if surface is None or atlas_shape is None else (atlas_shape[2], atlas_shape[3]),
    )


def subject_layout(subject: Subject, cut: Sequence[str]) -> AdapterLayout:
    """What a warp adapter reads and writes for a generator that is compiled, at the cut `cut`.

    Raises:
        InputError: If the atlas is not float32.
        ExportError: As `layout_of`.
    """
    atlas = None if subject.surface is None else subject.train.arrays.get(subject.surface.atlas)
    shape = None if atlas is None else atlas.shape
    layout = layout_of(subject.answering, cut, subject.surface, shape, without=subject.state_inputs)
    if subject.surface is not None and atlas is not None and atlas.dtype != np.float32:
        raise InputError(f"the atlas {subject.surface.atlas!r} has dtype {atlas.dtype}; convert it to float32")
    return layout


def _vector_channels(shape: tuple[int, ...]) -> int:
    return shape[2] if len(shape) == 3 else int(np.prod(shape[1:], dtype=np.int64))


def _check_surface(
    surface: Surface, images: Mapping[str, ImageInput], atlas_shape: tuple[int, ...] | None, size: tuple[int, ...]
) -> None:
    if atlas_shape is None:
        raise ExportError(
            f"the generator declares a surface, but the inputs hold no array {surface.atlas!r}; add the atlas "
            "[T, 3, h, w], or remove the declaration"
        )
    if len(atlas_shape) != 4 or atlas_shape[1] != 3:
        raise ExportError(f"the atlas {surface.atlas!r} has shape {atlas_shape}; expected [T, 3, h, w]")
    name, first, last = surface.uv
    mask_name, channel = surface.mask
    for what, where, ok in (
        ("uv", name, name in images and first >= 0 and last == first + 2 and last <= images[name].channels),
        ("mask", mask_name, mask_name in images and 0 <= channel < images[mask_name].channels),
    ):
        if not ok:
            raise ExportError(
                f"the generator's surface says that {what} is in input {where!r}, which has no such channels; "
                f"its image inputs are {', '.join(f'{i.name} ({i.channels} channels)' for i in images.values())}"
            )
        if (images[where].height, images[where].width) != size:
            raise ExportError(
                f"the generator's surface has its {what} in input {where!r} of {images[where].height}x"
                f"{images[where].width}, but its images are {size[0]}x{size[1]}; rasterise at the size of the images, "
                "or remove the declaration"
            )
