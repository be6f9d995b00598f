"""Video files: colours and sizes survive, damage is told, nothing half-written stays."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from warpcache.engine.errors import ClosedError, InputError
from warpcache.media.video import VideoWriter, read_video, side_by_side, to_float, to_uint8

Images = NDArray[np.float32]

# Flat colours: 8 bits in 16..235 lose one level, x264 at rate factor 14 few more; measured 2.
COLOUR_LEVELS = 5
# Mean over a picture whose colours turn once in 48 pixels, which 4:2:0 keeps at half the resolution; measured 2.2. A
# shift by one pixel gives 4.6, one by a frame 8.
MEAN_LEVELS = 3


def written(path: Path, frames: int = 12, size: tuple[int, int] = (32, 48)) -> Images:
    """A clip of smooth moving colours, [T, 3, H, W]."""
    rows, columns = np.mgrid[: size[0], : size[1]] / max(size)
    clip = np.stack(
        [np.stack([np.sin(rows + t / 9), np.cos(columns * 2 + t / 7), rows - columns]) for t in range(frames)]
    ).astype(np.float32)
    with VideoWriter(path, 30, size) as writer:
        for image in clip:
            writer.write(image)
    return clip


def test_a_clip_comes_back(tmp_path: Path) -> None:
    clip = written(tmp_path / "a.mp4")
    video = read_video(tmp_path / "a.mp4")
    assert video.fps == 30
    assert video.frames.dtype == np.uint8
    assert video.frames.shape == clip.shape
    difference = video.frames.astype(int) - to_uint8(clip)
    assert np.abs(difference).mean() < MEAN_LEVELS
    assert np.abs(np.roll(video.frames, 1, axis=0).astype(int) - to_uint8(clip)).mean() > 2 * MEAN_LEVELS


@pytest.mark.parametrize("colour", [(1, -1, -1), (-1, 1, -1), (-1, -1, 1), (1, 1, -1), (0.2, 0.5, -0.6), (1, 1, 1)])
def test_colours_keep_their_channel_and_matrix(tmp_path: Path, colour: tuple[float, float, float]) -> None:
    """Swapped channels or the BT.601 matrix read as BT.709 would be off by 20 levels and more."""
    image = np.broadcast_to(np.array(colour, np.float32)[:, None, None], (3, 32, 32))
    with VideoWriter(tmp_path / "a.mp4", 30, (32, 32)) as writer:
        for _ in range(3):
            writer.write(image)
    found = read_video(tmp_path / "a.mp4").frames[1, :, 16, 16].astype(int)
    assert np.abs(found - to_uint8(np.array(colour))).max() <= COLOUR_LEVELS


def test_odd_sizes_are_made_even_by_repeating_the_border(tmp_path: Path) -> None:
    clip = written(tmp_path / "a.mp4", frames=3, size=(31, 45))
    frames = read_video(tmp_path / "a.mp4").frames
    assert frames.shape == (3, 3, 32, 46)
    difference = np.abs(frames[:, :, :31, :45].astype(int) - to_uint8(clip))
    assert difference.mean() < MEAN_LEVELS
    assert np.abs(frames[:, :, 31].astype(int) - frames[:, :, 30]).mean() < 3


@pytest.mark.parametrize("fps", [29.97, 12.5, 0.5, 240])
def test_frame_rates_are_kept(tmp_path: Path, fps: float) -> None:
    with VideoWriter(tmp_path / "a.mp4", fps, (16, 16)) as writer:
        for _ in range(4):
            writer.write(np.zeros((3, 16, 16), np.float32))
    assert read_video(tmp_path / "a.mp4").fps == pytest.approx(fps, rel=1e-6)  # a fraction of 1001 parts at most


def test_bytes_and_floats_convert_exactly_back() -> None:
    levels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(to_uint8(to_float(levels)), levels)
    assert to_uint8(np.array([-5, -1, 0, 1, 5.0])).tolist() == [0, 0, 128, 255, 255]  # 127.5 rounds to even


def test_nothing_appears_before_the_end_and_nothing_after_a_failure(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with VideoWriter(path, 30, (16, 16)) as writer:
        writer.write(np.zeros((3, 16, 16), np.float32))
        assert not path.exists()
    assert path.exists()
    path.unlink()
    writer = VideoWriter(path, 30, (16, 16))
    writer.write(np.zeros((3, 16, 16), np.float32))
    with pytest.raises(KeyboardInterrupt), writer:
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("image", "opening"),
    [
        (
            np.zeros((3, 16, 18), np.float32),
            r"frame 1 has shape \(3, 16, 18\), but the video was opened for \(3, 16, 16\)",
        ),
        (np.full((3, 16, 16), np.nan, np.float32), "frame 1 holds NaN or Inf"),
    ],
)
def test_a_wrong_frame_is_refused_and_the_file_given_up(tmp_path: Path, image: Images, opening: str) -> None:
    writer = VideoWriter(tmp_path / "a.mp4", 30, (16, 16))
    writer.write(np.zeros((3, 16, 16), np.float32))
    with pytest.raises(InputError, match=opening):
        writer.write(image)
    with pytest.raises(ClosedError, match=r"the video '.*' is closed"):
        writer.write(np.zeros((3, 16, 16), np.float32))
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_closing_twice_is_fine_and_an_empty_video_is_not(tmp_path: Path) -> None:
    writer = VideoWriter(tmp_path / "a.mp4", 30, (16, 16))
    writer.write(np.zeros((3, 16, 16), np.float32))
    writer.close()
    writer.close()
    assert len(read_video(tmp_path / "a.mp4").frames) == 1
    empty = VideoWriter(tmp_path / "b.mp4", 30, (16, 16))
    with pytest.raises(InputError, match=r"the video '.*b.mp4' would have no frames"):
        empty.close()
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_what_makes_no_video_is_refused(tmp_path: Path) -> None:
    for fps in (0, -3, float("nan"), float("inf")):
        with pytest.raises(InputError, match="a video cannot have"):
            VideoWriter(tmp_path / "a.mp4", fps, (16, 16))
    with pytest.raises(InputError, match="a video cannot be 0 x 16 pixels"):
        VideoWriter(tmp_path / "a.mp4", 30, (16, 0))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write '.*a.mp4': "):
        VideoWriter(tmp_path / "file" / "a.mp4", 30, (16, 16))


def test_without_libx264_the_video_is_mpeg4_and_that_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(av, "codecs_available", av.codecs_available - {"libx264"})
    clip = written(tmp_path / "a.mp4")
    assert "this FFmpeg has no libx264" in caplog.text
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "mpeg4"
    difference = read_video(tmp_path / "a.mp4").frames.astype(int) - to_uint8(clip)
    assert np.abs(difference).mean() < 2 * MEAN_LEVELS  # an older codec, at its finest quantisers


def test_truncated_damaged_and_foreign_files_are_told(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    written(path)
    content = path.read_bytes()
    for part in (len(content) - 1, len(content) * 3 // 4, len(content) // 2):
        path.write_bytes(content[:part])
        with pytest.raises(InputError, match=rf"video '.*a.mp4' is truncated: {part} of at least {len(content)} bytes"):
            read_video(path)
    path.write_bytes(b"")
    with pytest.raises(InputError, match=r"video '.*' is empty"):
        read_video(path)
    path.write_bytes(bytes(range(256)) * 40)
    with pytest.raises(InputError, match=r"video '.*' cannot be decoded"):
        read_video(path)
    with pytest.raises(InputError, match=r"inputs '.*none.mp4' does not exist"):
        read_video(tmp_path / "none.mp4", what="inputs")


def test_files_without_a_picture_are_told(tmp_path: Path) -> None:
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100, layout="mono")
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 44100
        for packet in [*stream.encode(silence), *stream.encode(None)]:
            container.mux(packet)
    with pytest.raises(InputError, match=r"video '.*' holds no video stream"):
        read_video(path)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
        container.start_encoding()
    with pytest.raises(InputError, match=r"video '.*' (has no frames|holds no video|cannot be decoded)"):
        read_video(path)


def test_images_stand_side_by_side_under_their_labels() -> None:
    a, b = np.full((3, 20, 100), 0.5, np.float32), np.full((3, 20, 60), -0.25, np.float32)
    plain = side_by_side(a, b)
    assert plain.shape == (3, 20, 164)
    np.testing.assert_array_equal(plain[:, :, :100], a)
    np.testing.assert_array_equal(plain[:, :, 104:], b)
    assert (plain[:, :, 100:104] == -1).all()
    labelled = side_by_side(a, b, labels=("left", "right"))
    assert labelled.shape == (3, 44, 164)
    np.testing.assert_array_equal(labelled[:, 24:], plain)
    for start, stop in ((0, 100), (104, 164)):  # each label has light ink, centred over its own image
        ink = labelled[0, :24, start:stop].max(0) > 0
        assert ink.any()
        assert abs(np.flatnonzero(ink).mean() - (stop - start) / 2) < 4
    with pytest.raises(InputError, match="images to put side by side have shapes"):
        side_by_side(a, b[:, :10])
    with pytest.raises(InputError, match="2 images were given 1 labels"):
        side_by_side(a, b, labels=("one",))
