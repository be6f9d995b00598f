"""Record what a generator does on a stream: its images and its cut's tensors, once, for training and calibration."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from onnx import ModelProto
from torch import Tensor

from ...engine.errors import ExportError, InputError
from ...engine.spec import Array, TensorSpec
from ..graph.run import frame_at, open_session, run_session
from ..graph.surgery import GraphIndex, give_out
from .network import AdapterConfig, AdapterLayout, ImageInput, Surface, VectorInput, at_working_grid

__all__ = ["Progress", "Recording", "frames_of", "layout_of", "record"]

Progress = Callable[[str, int, int], None]
"""What long work calls to say how far it is: stage, done, total."""


@dataclass(frozen=True)
class Recording:
    """What the generator did on a stream; every leading axis is time.

    Attributes:
        inputs: Generator inputs, [T, ...]; [1, ...] where one never changes.
        taps: Cut tensors at the working resolution, bfloat16 [T, C, h, w], or [T, C] for vectors.
        images: Every output, channels together, float32 [T, C, H, W].
        atlas: Surface atlas, float32 [T, 3, h, w], or None.
        truth: Ground truth for `images`, float32 [T, C, H, W], or None; outputs without truth hold the generator's.
    """

    inputs: Mapping[str, Tensor]
    taps: tuple[Tensor, ...]
    images: Tensor
    atlas: Tensor | None = None
    truth: Tensor | None = None

    def at(self, name: str, frames: Tensor) -> Tensor:
        """Input `name` at `frames` (int64 [N])."""
        array = self.inputs[name]
        return array.expand(len(frames), *array.shape[1:]) if array.shape[0] == 1 else array[frames]


def layout_of(
    model: ModelProto, cut: Sequence[str], surface: Surface | None, atlas_shape: tuple[int, ...] | None
) -> AdapterLayout:
    """What a warp adapter reads and writes for this generator and cut.

    Args:
        model: The whole, in normal form.
        cut: Names of the cut's values.
        surface: The generator's declaration of its surface, or None.
        atlas_shape: Shape of the atlas array in the stream, where there is a surface.

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


def record(
    model: ModelProto,
    layout: AdapterLayout,
    config: AdapterConfig,
    arrays: Mapping[str, Array],
    *,
    truth: Array | None = None,
    progress: Progress,
) -> Recording:
    """Run the generator on a stream and keep what training needs.

    Args:
        model: The whole, in normal form.
        layout: From `layout_of`.
        config: Says the working resolution.
        arrays: The stream, name -> [T, ...]: generator inputs, and the atlas where the layout has a surface.
        truth: Ground truth of one output, float32 [T, C, H, W], or None.
        progress: Told how far it is.

    Returns:
        The recording.

    Raises:
        InputError: If the truth has no output's shape.
        ExportError: If the generator gives NaN or Inf.
    """
    names = [tap[0] for tap in layout.taps]
    session = open_session(give_out(model, names))
    inputs = GraphIndex(model).inputs
    frames = max(len(arrays[name]) for name in arrays)
    grid = (layout.height // config.stride, layout.width // config.stride)
    taps: list[list[Tensor]] = [[] for _ in names]
    images = np.empty((frames, layout.channels, layout.height, layout.width), np.float32)
    for t, feeds in enumerate(frames_of(arrays, inputs)):
        got = run_session(session, feeds)
        images[t] = np.concatenate([got[name] for name, _ in layout.outputs], axis=1)[0]
        if not np.isfinite(images[t]).all():
            raise ExportError(f"the generator gives NaN or Inf for frame {t}; nothing can be learnt from that")
        for kept, name in zip(taps, names, strict=True):
            kept.append(working_tap(torch.from_numpy(got[name]), grid).bfloat16())
        progress("recording the generator", t + 1, frames)
    atlas = None if layout.surface is None else torch.from_numpy(np.ascontiguousarray(arrays[layout.surface.atlas]))
    return Recording(
        inputs={name: torch.from_numpy(np.ascontiguousarray(arrays[name])) for name in inputs},
        taps=tuple(torch.cat(kept) for kept in taps),
        images=torch.from_numpy(images),
        atlas=None if atlas is None else atlas.expand(frames, -1, -1, -1),
        truth=None if truth is None else torch.from_numpy(_whole_truth(truth, images, layout)),
    )


def frames_of(arrays: Mapping[str, Array], names: Sequence[str]) -> Iterator[dict[str, Array]]:
    """Inputs of every frame, by name; an array of leading extent 1 serves all."""
    frames = max(len(array) for array in arrays.values())
    wanted = {name: arrays[name] for name in names}
    for t in range(frames):
        yield frame_at(wanted, t)


def working_tap(tap: Tensor, grid: tuple[int, int]) -> Tensor:
    """A cut tensor as the cache encoder takes it: at the working resolution, or [1, C] for a vector.

    Tokens [1, N, C] are averaged over N.
    """
    if tap.ndim == 4 and tap.shape[2] > 1 and tap.shape[3] > 1:
        return at_working_grid(tap, grid)
    if tap.ndim == 3:
        return tap.mean(1)
    return tap.reshape(1, -1)


def _whole_truth(truth: Array, images: Array, layout: AdapterLayout) -> Array:
    """Truth of every output: given for the first that it fits, for the others what the generator made of them."""
    first = 0
    for _, channels in layout.outputs:
        if truth.shape == (len(images), channels, layout.height, layout.width):
            if channels == layout.channels:
                return truth
            whole = images.copy()
            whole[:, first : first + channels] = truth
            return whole
        first += channels
    raise InputError(
        f"the truth has shape {truth.shape}, which is that of no output: "
        f"{', '.join(f'{name} ({channels} channels)' for name, channels in layout.outputs)} of "
        f"{layout.height}x{layout.width} in {len(images)} frames; make them alike, or leave it out"
    )


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


def spec_of(name: str, array: Array) -> TensorSpec:
    """Spec of one frame of a stream's array."""
    return TensorSpec(name, str(array.dtype), (1, *array.shape[1:]))
