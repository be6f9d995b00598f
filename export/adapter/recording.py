"""Record what a generator does on a stream: its images and its cut's tensors, once, for training and calibration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from onnx import ModelProto
from torch import Tensor

from ...engine.errors import ExportError, InputError
from ...engine.spec import Array
from ..frames.streams import Progress, frames_of
from ..graph.index import GraphIndex
from ..graph.run import open_session, run_session
from ..graph.surgery import give_out
from .layout import AdapterConfig, AdapterLayout
from .network import at_working_grid

__all__ = ["Recording", "record"]


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
