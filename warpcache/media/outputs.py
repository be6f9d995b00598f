"""What a run leaves behind: an ``.npz`` of every output or an ``.mp4`` of the image, whole or not there."""

from __future__ import annotations

import contextlib
import os
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..engine.errors import InputError
from .files import written_beside
from .video import VideoWriter

__all__ = ["OutputWriter", "save_outputs"]

Array = NDArray[Any]


class OutputWriter:
    """Write outputs frame by frame; the file appears when the writer is closed.

    Use it as a context manager: leaving the block by an exception leaves no file. An ``.mp4`` grows on disk as frames
    come; an ``.npz`` is held in memory until it is closed, since its arrays begin with their lengths.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, image_output: str | None = None, fps: float | None = None
    ) -> None:
        """Check where the outputs go; nothing is written before the first frame.

        Args:
            path: A path ending in ``.npz`` or ``.mp4``.
            image_output: The output that is a picture; needed for ``.mp4``.
            fps: Frames per second of the video, 30 where unknown.

        Raises:
            InputError: If the suffix is another one, or a video is asked of a generator without an image output.
        """
        self.path = Path(path)
        self.frames = 0
        self._suffix = check_suffix(self.path)
        if self._suffix == ".mp4" and image_output is None:
            raise InputError(f"cannot write {str(path)!r}: this generator has no image output; write an .npz instead")
        self._image_output = image_output or ""
        self._fps = 30.0 if fps is None else fps
        self._video: VideoWriter | None = None
        self._arrays: dict[str, list[Array]] = {}
        self._closed = False

    def __enter__(self) -> OutputWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
            return
        self._closed = True
        if self._video is not None:
            self._video.__exit__(kind, error, trace)

    def write(self, outputs: Mapping[str, Array]) -> None:
        """Append one frame.

        Args:
            outputs: Output name -> array with leading axis 1, in the generator's order. Arrays are copied.

        Raises:
            InputError: If names or shapes differ from the first frame's, the image is none, or the disk is full.
        """
        if self._suffix == ".mp4":
            self._write_image(outputs)
        else:
            if self.frames == 0:
                self._arrays = {name: [] for name in outputs}
            if list(outputs) != list(self._arrays):
                raise InputError(
                    f"frame {self.frames} has outputs {list(outputs)}, but the first had {list(self._arrays)}"
                )
            for name, array in outputs.items():
                self._arrays[name].append(np.array(array))
        self.frames += 1

    def _write_image(self, outputs: Mapping[str, Array]) -> None:
        if self._image_output not in outputs:
            raise InputError(f"frame {self.frames} has no output {self._image_output!r}; it has {list(outputs)}")
        image = outputs[self._image_output]
        if image.ndim != 4 or image.shape[:2] != (1, 3):
            raise InputError(
                f"output {self._image_output!r} has shape {tuple(image.shape)}, a video needs (1, 3, H, W); "
                "write an .npz instead"
            )
        if self._video is None:
            self._video = VideoWriter(self.path, self._fps, (image.shape[2], image.shape[3]))
        self._video.write(image[0])

    def close(self) -> None:
        """Finish the file and put it in its place; safe to call twice.

        Raises:
            InputError: If there was no frame, or the disk is full; no file is left then.
        """
        if self._closed:
            return
        self._closed = True
        if not self.frames:
            raise InputError(f"cannot write {str(self.path)!r}: there were no frames")
        if self._video is not None:
            self._video.close()
            return
        with written_beside(self.path) as temporary:
            write_npz(temporary, {name: np.concatenate(parts) for name, parts in self._arrays.items()})


def save_outputs(
    path: str | os.PathLike[str],
    frames: Iterable[Mapping[str, Array]],
    *,
    image_output: str | None = None,
    fps: float | None = None,
) -> int:
    """Write the outputs of all frames; see `OutputWriter`.

    Args:
        path: A path ending in ``.npz`` (every output, in the generator's order) or ``.mp4`` (the image output).
        frames: Outputs of each frame, name -> array with leading axis 1; consumed one by one.
        image_output: The output that is a picture; needed for ``.mp4``.
        fps: Frames per second of the video, 30 where unknown.

    Returns:
        Number of frames written.

    Raises:
        InputError: If there is no frame, an output does not fit, or the file cannot be written.
    """
    with OutputWriter(path, image_output=image_output, fps=fps) as writer:
        for outputs in frames:
            writer.write(outputs)
    return writer.frames


def check_suffix(path: Path) -> str:
    """The suffix of an output path.

    Raises:
        InputError: If it is neither ``.npz`` nor ``.mp4``.
    """
    suffix = path.suffix.lower()
    if suffix not in (".npz", ".mp4"):
        raise InputError(f"cannot write {str(path)!r}: the name must end in .npz or .mp4")
    return suffix


def write_npz(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write an uncompressed ``.npz``; unlike `numpy.savez` it takes any array name, also ``file``."""
    with contextlib.ExitStack() as stack:
        archive = stack.enter_context(zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True))
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)
