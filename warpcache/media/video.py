"""Video files in and out, by PyAV (FFmpeg).

Frames are images [3, H, W], RGB, float32 in [-1, 1] on the way in and uint8 on the way out of a file.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from ..engine.errors import ClosedError, InputError
from .files import written_beside

if TYPE_CHECKING:
    from av.video.stream import VideoStream

__all__ = ["Video", "VideoWriter", "read_video", "side_by_side", "to_float", "to_uint8"]

Images = NDArray[Any]
UInt8 = NDArray[np.uint8]
Float32 = NDArray[np.float32]

_LOGGER = logging.getLogger(__name__)
_GAP = 4
_STRIP_HEIGHT = 24
_BT709 = 1  # FFmpeg's number of it for colour space, primaries and transfer alike
_LIMITED_RANGE = 1


@dataclass(frozen=True)
class Video:
    """A decoded clip.

    Attributes:
        frames: uint8 [T, 3, H, W], RGB.
        fps: Mean frames per second, None where the file does not say.
    """

    frames: UInt8
    fps: float | None


class VideoWriter:
    """Write frames to an ``.mp4`` as they come, H.264 in yuv420p; the file appears when the writer is closed.

    Use it as a context manager: leaving the block by an exception leaves no file. FFmpeg builds without libx264 are
    served with MPEG-4 part 2, which browsers do not play; that is logged, and `codec` tells. Colours are BT.709,
    limited range. yuv420p needs even sides: an odd side is made even by repeating the last row or column.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        fps: float,
        size: tuple[int, int],
        *,
        quality: int = 14,
        preset: str = "veryfast",
    ) -> None:
        """Open the file.

        Args:
            path: Where the file is to be.
            fps: Frames per second.
            size: (height, width) of the frames in pixels.
            quality: x264's constant rate factor: 0 lossless, 18 hardly to be told from it, 51 worst.
            preset: x264's speed preset.

        Raises:
            InputError: If fps or size makes no sense, or the file cannot be written.
        """
        import av

        if not 0.01 <= fps <= 1000:
            raise InputError(f"a video cannot have {fps} frames per second; give a number between 0.01 and 1000")
        height, width = size
        if height < 1 or width < 1:
            raise InputError(f"a video cannot be {width} x {height} pixels; give a positive size")
        self.path = Path(path)
        self.frames = 0
        self.codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
        if self.codec != "libx264":
            _LOGGER.warning("this FFmpeg has no libx264: %s is written as MPEG-4 part 2", self.path)
        self._size = (height, width)
        self._closed = False
        self._stack = contextlib.ExitStack()
        with self._stack:  # closed again if anything below fails
            temporary = self._stack.enter_context(written_beside(self.path))
            # The index in front lets a page begin to play at once, and shows a truncated copy for what it is.
            self._container = self._stack.enter_context(
                av.open(str(temporary), "w", format="mp4", options={"movflags": "faststart"})
            )
            rate = Fraction(fps).limit_denominator(1001)
            stream = cast("VideoStream", self._container.add_stream(self.codec, rate=rate))
            stream.height, stream.width = height + height % 2, width + width % 2
            stream.pix_fmt = "yuv420p"
            stream.options = (
                {"crf": str(quality), "preset": preset} if self.codec == "libx264" else {"qmin": "1", "qmax": "3"}
            )
            context = stream.codec_context
            context.color_range = _LIMITED_RANGE
            context.colorspace = context.color_primaries = context.color_trc = _BT709
            self._stream = stream
            self._stack = self._stack.pop_all()

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif not self._closed:
            # The exit stack sees the exception, so that the unfinished file is removed instead of renamed.
            self._closed = True
            self._stack.__exit__(kind, error, trace)

    def write(self, image: Images) -> None:
        """Append one frame.

        Args:
            image: float32 [3, H, W] in [-1, 1] (values beyond are clipped), or uint8 [3, H, W].

        Raises:
            InputError: If the size is another one, a value is NaN or Inf, or the disk is full. The file is then gone.
            ClosedError: If the writer is closed.
        """
        import av
        from av.video.reformatter import Colorspace

        if self._closed:
            raise ClosedError(f"the video {str(self.path)!r} is closed; open a new writer")
        with self._abandoned_on_error():
            if image.shape != (3, *self._size):
                raise InputError(
                    f"frame {self.frames} has shape {tuple(image.shape)}, but the video was opened for "
                    f"{(3, *self._size)}"
                )
            if image.dtype != np.uint8:
                if not np.isfinite(image).all():
                    raise InputError(f"frame {self.frames} holds NaN or Inf and cannot be written to a video")
                image = to_uint8(image)
            height, width = self._size
            if height % 2 or width % 2:
                image = np.pad(image, [(0, 0), (0, height % 2), (0, width % 2)], mode="edge")
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(image.transpose(1, 2, 0)), format="rgb24")
            for packet in self._stream.encode(picture.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)):
                self._container.mux(packet)
            self.frames += 1

    def close(self) -> None:
        """Finish the file and put it in its place; safe to call twice.

        Raises:
            InputError: If there was no frame, or the disk is full; no file is left then.
        """
        if self._closed:
            return
        with self._abandoned_on_error():
            if not self.frames:
                raise InputError(f"the video {str(self.path)!r} would have no frames; write at least one")
            for packet in self._stream.encode():
                self._container.mux(packet)
            self._closed = True
            self._stack.close()

    @contextlib.contextmanager
    def _abandoned_on_error(self) -> Iterator[None]:
        """Remove the unfinished file on any exception, and let `written_beside` word it."""
        try:
            yield
        except BaseException as error:
            if self._closed:
                raise
            self._closed = True
            with self._stack:
                raise error


def read_video(path: str | os.PathLike[str], *, what: str = "video") -> Video:
    """Decode a clip whole into memory.

    Args:
        path: A file that FFmpeg reads.
        what: What the file is, for error messages.

    Raises:
        InputError: If it is missing, no video, truncated, damaged, has no frames or changes its size on the way.
    """
    import av

    path = Path(path)
    if not path.is_file():
        raise InputError(f"{what} {str(path)!r} does not exist; check the path")
    _refuse_truncated(path, what)
    frames: list[UInt8] = []
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise InputError(f"{what} {str(path)!r} holds no video stream; give a video file")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            rate = stream.average_rate
            for frame in container.decode(stream):
                picture = frame.to_ndarray(format="rgb24").transpose(2, 0, 1)
                if frames and picture.shape != frames[0].shape:
                    raise InputError(
                        f"{what} {str(path)!r} changes its size at frame {len(frames)}; every frame must have the same"
                    )
                frames.append(np.ascontiguousarray(picture))
    except av.error.FFmpegError as error:
        where = f"after {len(frames)} frames " if frames else ""
        raise InputError(
            f"{what} {str(path)!r} cannot be decoded {where}({error.strerror}); it is damaged, truncated or no video"
        ) from error
    if not frames:
        raise InputError(f"{what} {str(path)!r} has no frames; give a clip that has at least one")
    return Video(np.stack(frames), float(rate) if rate else None)


def side_by_side(*images: Images, labels: Sequence[str] = ()) -> Float32:
    """Put images of one height beside each other, four dark pixels apart.

    Args:
        images: float32 [3, H, W] in [-1, 1], of one height.
        labels: What each shows, drawn in a strip of 24 pixels above; without any there is no strip.

    Returns:
        New image float32 [3, H or H + 24, sum of W + gaps].

    Raises:
        InputError: If the heights differ, or there are not as many labels as images.
    """
    if not images or any(image.ndim != 3 or image.shape[:2] != images[0].shape[:2] for image in images):
        raise InputError(f"images to put side by side have shapes {[image.shape for image in images]}; heights differ")
    if labels and len(labels) != len(images):
        raise InputError(f"{len(images)} images were given {len(labels)} labels; give one each")
    gap = np.full((3, images[0].shape[1], _GAP), -1, np.float32)
    parts: list[Images] = [images[0]]
    for image in images[1:]:
        parts += [gap, image]
    row: Float32 = np.concatenate(parts, axis=2).astype(np.float32, copy=False)
    if not labels:
        return row
    strip = _label_strip(tuple(image.shape[2] for image in images), tuple(labels))
    return np.concatenate([strip, row], axis=1)


@lru_cache(maxsize=16)
def _label_strip(widths: tuple[int, ...], labels: tuple[str, ...]) -> Float32:
    """The labels, each centred above its image: float32 [3, 24, sum of widths + gaps]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    total = sum(widths) + _GAP * (len(widths) - 1)
    dpi = 100
    # Half a pixel more: inches times dpi is rounded down, and 5.16 * 100 is less than 516.
    figure = Figure(figsize=((total + 0.5) / dpi, (_STRIP_HEIGHT + 0.5) / dpi), dpi=dpi, facecolor="#15171c")
    canvas = FigureCanvasAgg(figure)
    left = 0
    for width, label in zip(widths, labels, strict=True):
        centre = (left + width / 2) / total
        figure.text(centre, 0.5, label, color="#e8eaf0", size=8.5, ha="center", va="center_baseline")
        left += width + _GAP
    canvas.draw()  # type: ignore[no-untyped-call]
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]  # type: ignore[no-untyped-call]
    assert pixels.shape == (_STRIP_HEIGHT, total, 3), pixels.shape
    return to_float(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def to_uint8(images: Images) -> UInt8:
    """[-1, 1] to 0..255, rounded, values beyond clipped; any shape."""
    scaled = np.clip(images, -1, 1)
    scaled = (scaled + 1) * 127.5
    return np.rint(scaled).astype(np.uint8)


def to_float(images: UInt8) -> Float32:
    """0..255 to float32 in [-1, 1]; any shape. `to_uint8` takes it back exactly."""
    converted = images.astype(np.float32)
    converted *= np.float32(1 / 127.5)
    converted -= np.float32(1)
    return converted


def _refuse_truncated(path: Path, what: str) -> None:
    """Refuse an ISO media file (mp4, mov) that ends before one of its boxes does.

    FFmpeg plays such a file as far as it goes and reports no error if it was cut between two frames.
    """
    size_bytes = path.stat().st_size
    if size_bytes == 0:
        raise InputError(f"{what} {str(path)!r} is empty; give a video file")
    with path.open("rb") as file:
        offset = 0
        while offset + 8 <= size_bytes:
            file.seek(offset)
            header = file.read(16)
            length, kind = int.from_bytes(header[:4], "big"), header[4:8]
            if offset == 0 and kind != b"ftyp":
                return  # another container: its own demuxer must tell
            if length == 1:
                length = int.from_bytes(header[8:16], "big")
            elif length == 0:
                return  # "to the end of the file"
            if length < 8:
                return  # damaged rather than truncated: the decoder says what it makes of it
            offset += length
        if offset > size_bytes:
            raise InputError(
                f"{what} {str(path)!r} is truncated: {size_bytes} of at least {offset} bytes are there; copy it again"
            )
