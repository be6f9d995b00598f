"""Streams of inputs: what is read, and every way in which a file can be wrong."""

from __future__ import annotations

import io
import pickle
import re
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from warpcache.engine.bundle.manifest import InputRecord
from warpcache.engine.errors import InputError
from warpcache.engine.spec import TensorSpec
from warpcache.media.inputs import InputStream, OutputWriter, load_inputs, save_outputs
from warpcache.media.video import VideoWriter, read_video, to_float

Array = NDArray[Any]

IMAGE = InputRecord(TensorSpec("image", "float32", (1, 3, 16, 24)))
POSE = InputRecord(TensorSpec("pose", "float32", (1, 6)))
ATLAS = InputRecord(TensorSpec("atlas", "float32", (1, 3, 8, 8)), role="motion")


def clip(frames: int = 5, seed: int = 0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {
        "image": rng.uniform(-1, 1, (frames, 3, 16, 24)).astype(np.float32),
        "pose": rng.normal(size=(frames, 6)).astype(np.float32),
    }


def saved(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def saved_video(path: Path, frames: int = 6, size: tuple[int, int] = (16, 24)) -> Path:
    rows, columns = np.mgrid[: size[0], : size[1]] / 24
    with VideoWriter(path, 25, size) as writer:
        for t in range(frames):
            writer.write(np.stack([rows, columns, rows * 0 + t / 10]).astype(np.float32))
    return path


def test_npz_gives_arrays_in_the_bundles_order_with_truth_and_fps_apart(tmp_path: Path) -> None:
    arrays = clip()
    truth = np.random.default_rng(1).uniform(-1, 1, (5, 3, 16, 24)).astype(np.float32)
    path = saved(tmp_path / "in.npz", truth=truth, pose=arrays["pose"], fps=29.97, image=arrays["image"])
    stream = load_inputs(path, [IMAGE, POSE])
    assert list(stream.arrays) == ["image", "pose"]
    for name, array in arrays.items():
        np.testing.assert_array_equal(stream.arrays[name], array)
    assert (stream.frames, len(stream), stream.fps) == (5, 5, 29.97)
    assert stream.truth is not None
    np.testing.assert_array_equal(stream.truth, truth)


def test_without_a_bundle_every_array_is_an_input(tmp_path: Path) -> None:
    stream = load_inputs(saved(tmp_path / "in.npz", **clip(), count=np.arange(5)))
    assert list(stream.arrays) == ["image", "pose", "count"]
    assert stream.arrays["count"].dtype == np.int64
    assert stream.fps is None
    assert stream.truth is None


def test_frames_are_views_and_what_never_changes_serves_every_frame() -> None:
    arrays = clip() | {"pose": clip()["pose"][:1]}
    stream = InputStream.from_arrays(arrays, [IMAGE, POSE])
    frames = list(stream)
    assert len(frames) == 5
    for t, frame in enumerate(frames):
        np.testing.assert_array_equal(frame["image"], arrays["image"][t : t + 1])
        np.testing.assert_array_equal(frame["pose"], arrays["pose"])
        assert np.shares_memory(frame["image"], stream.arrays["image"])
    with pytest.raises(IndexError):
        stream.frame(5)
    short = stream.head(2)
    assert (short.frames, len(short.arrays["image"]), len(short.arrays["pose"])) == (2, 2, 1)
    assert stream.head(99).frames == 5
    with pytest.raises(InputError, match="cannot take 0 frames"):
        stream.head(0)


def test_uint8_images_and_truth_become_float(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 16, 24), dtype=np.uint8)
    stream = load_inputs(saved(tmp_path / "in.npz", image=pixels, truth=pixels), [IMAGE])
    # 255 * (1 / 127.5) - 1 rounds twice in float32.
    expected = pixels / 127.5 - 1
    np.testing.assert_allclose(stream.arrays["image"], expected, atol=3e-7)
    assert stream.truth is not None
    np.testing.assert_allclose(stream.truth, expected, atol=3e-7)
    assert stream.arrays["image"].dtype == stream.truth.dtype == np.float32


def test_reserved_names_are_inputs_where_the_generator_has_them(tmp_path: Path) -> None:
    fps = InputRecord(TensorSpec("fps", "float32", (1, 2)))
    values = np.ones((3, 2), np.float32)
    stream = load_inputs(saved(tmp_path / "in.npz", fps=values), [fps])
    np.testing.assert_array_equal(stream.arrays["fps"], values)
    assert stream.fps is None


def test_motion_belongs_to_the_inputs_and_can_be_left_out_by_name(tmp_path: Path) -> None:
    atlas = np.zeros((5, 3, 8, 8), np.float32)
    path = saved(tmp_path / "in.npz", **clip(), atlas=atlas)
    assert list(load_inputs(path, [IMAGE, POSE, ATLAS]).arrays) == ["image", "pose", "atlas"]
    assert list(load_inputs(path, [IMAGE, POSE], ignore={"atlas"}).arrays) == ["image", "pose"]
    with pytest.raises(InputError, match=r"inputs .* has 'atlas', which the generator does not take"):
        load_inputs(path, [IMAGE, POSE])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pose": None}, r"lacks 'pose'; it needs 'image', 'pose'"),
        (
            {"pose": None, "poses": np.zeros((5, 6), "f4")},
            r"lacks 'pose' and has 'poses', .*is it 'poses' for 'pose'\?",
        ),
        ({"pose": np.zeros((5, 6), "f8")}, r"array 'pose' is float64 \[5, 6\], expected float32 \[T, 6\]; convert"),
        ({"pose": np.zeros((5, 6), "u1")}, r"array 'pose' is uint8 \[5, 6\], expected float32"),
        ({"pose": np.zeros((5, 6, 1), "f4")}, r"array 'pose' is float32 \[5, 6, 1\], .*its rank must be 2"),
        (
            {"image": np.zeros((5, 3, 24, 16), "f4")},
            r"array 'image' is float32 \[5, 3, 24, 16\], .*T, 3, 16, 24\]; its size",
        ),
        ({"pose": np.zeros((4, 6), "f4")}, r"array 'image' has 5 frames but 'pose' has 4"),
        ({"pose": np.zeros((0, 6), "f4")}, r"array 'pose' has no frames; the clip is empty"),
        ({"truth": np.zeros((4, 3, 16, 24), "f4")}, r"array 'truth' has 4 frames but the inputs have 5"),
        ({"truth": np.zeros((5, 3, 16, 24), "f8")}, r"array 'truth' is float64"),
        ({"fps": np.zeros(3)}, r"has an 'fps' of dtype float64 and shape \(3,\); give one number"),
        ({"fps": -1}, r"has fps -1.0; it must be a positive number"),
    ],
)
def test_wrong_arrays_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    arrays = {name: array for name, array in (clip() | change).items() if array is not None}
    path = saved(tmp_path / "in.npz", **arrays)
    with pytest.raises(InputError, match=rf"^inputs '{re.escape(str(path))}'.*{message}"):
        load_inputs(path, [IMAGE, POSE])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["image", "pose", "truth"])
def test_the_first_frame_that_is_not_finite_is_named(tmp_path: Path, name: str, value: float) -> None:
    arrays = clip() | {"truth": np.zeros((5, 3, 16, 24), np.float32)}
    arrays[name][3].flat[2] = value
    arrays[name][4].flat[0] = value
    with pytest.raises(InputError, match=rf"array '{name}' holds NaN or Inf, first in frame 3"):
        load_inputs(saved(tmp_path / "in.npz", **arrays), [IMAGE, POSE])


def test_huge_but_finite_values_pass() -> None:
    """Their sum overflows; that is no reason to refuse them."""
    pose = np.full((2, 6), np.finfo(np.float32).max, np.float32)
    assert InputStream.from_arrays({"pose": pose}, [POSE]).frames == 2


def test_a_missing_or_oddly_named_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"inputs '.*none.npz' do not exist"):
        load_inputs(tmp_path / "none.npz")
    with pytest.raises(InputError, match=r"inputs '.*clip.avi' must be an .npz or an .mp4"):
        load_inputs(tmp_path / "clip.avi")


def test_an_npz_without_inputs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"inputs .* holds no input arrays"):
        load_inputs(saved(tmp_path / "in.npz", fps=30))
    with pytest.raises(InputError, match=r"array 'x' is one number"):
        load_inputs(saved(tmp_path / "in.npz", x=30))
    with pytest.raises(InputError, match=r"array 'x' has dtype <U3; save numbers"):
        load_inputs(saved(tmp_path / "in.npz", x=np.array(["abc"])))


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    path = saved(tmp_path / "in.npz", image=np.array([Trap()], dtype=object))
    with pytest.raises(InputError, match=r"inputs .* holds an object array, which could run code"):
        load_inputs(path, [IMAGE])
    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(InputError, match=r"inputs .* is not an .npz"):
        load_inputs(path, [IMAGE])
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("image", pickle.dumps(Trap()))
    with pytest.raises(InputError, match=r"inputs .* holds 'image', which is no array"):
        load_inputs(path, [IMAGE])
    assert not (tmp_path / "sprung").exists()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_npz_is_one_sentence_or_the_same_arrays(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Cut anywhere or with any one byte changed: never another exception, never other numbers."""
    buffer = io.BytesIO()
    arrays = {"pose": clip()["pose"]}
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    content = bytearray(buffer.getvalue())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.mktemp("damaged") / "in.npz"
    path.write_bytes(content)
    stream: InputStream | None = None
    message = f"inputs '{path}'"
    try:
        stream = load_inputs(path, [POSE])
    except InputError as error:
        message = str(error)
    assert message.startswith(f"inputs '{path}'")
    if stream is not None:
        np.testing.assert_array_equal(stream.arrays["pose"], arrays["pose"])


def test_mp4_serves_a_generator_with_one_image_input(tmp_path: Path) -> None:
    path = saved_video(tmp_path / "clip.mp4")
    decoded = read_video(path)
    stream = load_inputs(path, [IMAGE])
    assert (stream.frames, stream.fps) == (6, 25.0)
    np.testing.assert_array_equal(stream.arrays["image"], to_float(decoded.frames))
    raw = InputRecord(TensorSpec("picture", "uint8", (1, 3, 16, 24)))
    np.testing.assert_array_equal(load_inputs(path, [raw]).arrays["picture"], decoded.frames)
    assert list(load_inputs(path).arrays) == ["image"]


def test_mp4_that_does_not_fit_says_why(tmp_path: Path) -> None:
    path = saved_video(tmp_path / "clip.mp4", size=(32, 20))
    with pytest.raises(InputError, match=r"has 20 x 32 pixels, but input 'image' takes 24 x 16"):
        load_inputs(path, [IMAGE])
    with pytest.raises(InputError, match=r"is one video, but this generator takes 2 inputs \(image, pose\)"):
        load_inputs(path, [IMAGE, POSE])
    with pytest.raises(InputError, match=r"is a video, but input 'pose' is float32 \(1, 6\), no RGB image"):
        load_inputs(path, [POSE])


def test_outputs_npz_keeps_the_generators_order_and_any_name(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "out.npz"
    frames = [{"z": np.full((1, 2), t, np.float32), "file": np.array([t]), "a/b": np.ones((1, 1, 2))} for t in range(3)]
    assert save_outputs(path, iter(frames)) == 3
    with np.load(path) as archive:
        assert archive.files == ["z", "file", "a/b"]
        assert archive["z"].dtype == np.float32
        np.testing.assert_array_equal(archive["z"], [[0, 0], [1, 1], [2, 2]])
        np.testing.assert_array_equal(archive["file"], [0, 1, 2])
    assert [p.name for p in path.parent.iterdir()] == ["out.npz"]
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_outputs_are_copied_so_that_the_engine_may_reuse_its_buffer(tmp_path: Path) -> None:
    buffer = np.zeros((1, 1), np.float32)
    with OutputWriter(tmp_path / "out.npz") as writer:
        for t in range(3):
            buffer[:] = t
            writer.write({"y": buffer})
    with np.load(tmp_path / "out.npz") as archive:
        assert archive["y"].ravel().tolist() == [0, 1, 2]


def test_outputs_mp4_shows_the_image_output(tmp_path: Path) -> None:
    ramp = np.broadcast_to(np.linspace(-0.8, 0.8, 32, dtype=np.float32), (1, 3, 16, 32))
    frames = [{"mask": np.zeros((1, 1)), "image": ramp * (1 - t / 10)} for t in range(4)]
    save_outputs(tmp_path / "out.mp4", frames, image_output="image", fps=12.5)
    video = read_video(tmp_path / "out.mp4")
    assert video.fps == 12.5
    assert video.frames.shape == (4, 3, 16, 32)
    # 8 bits and x264 at rate factor 14: a smooth grey ramp comes back within a few levels of 127.5.
    expected = np.concatenate([frame["image"] for frame in frames])
    assert np.abs(to_float(video.frames) - expected).max() < 6 / 127.5


@pytest.mark.parametrize("name", ["out.npz", "out.mp4"])
def test_a_failing_source_leaves_what_was_there(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("kept")

    def source() -> Any:
        yield {"image": np.zeros((1, 3, 16, 16), np.float32)}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_outputs(path, source(), image_output="image")
    with pytest.raises(InputError, match=r"cannot write .*: there were no frames"):
        save_outputs(path, [], image_output="image")
    assert path.read_text() == "kept"
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["out.npz", "out.mp4"])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    """A limit on the size of files stands in for the full disk: the write fails just so, and no disk must be filled."""
    code = textwrap.dedent(
        """
        import resource, sys, numpy as np
        from warpcache.engine.errors import InputError
        from warpcache.media.inputs import save_outputs
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        rng = np.random.default_rng(0)
        frames = ({"image": rng.uniform(-1, 1, (1, 3, 64, 64)).astype(np.float32)} for _ in range(60))
        try:
            save_outputs(sys.argv[1], frames, image_output="image")
        except InputError as error:
            print(error)
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / name)], capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith(f"cannot write '{tmp_path / name}': File too large"), done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot write 'out.gif': the name must end in .npz or .mp4"):
        OutputWriter("out.gif")
    with pytest.raises(InputError, match=r"cannot write 'out.mp4': this generator has no image output"):
        OutputWriter("out.mp4")
    with pytest.raises(InputError, match="frame 1 has outputs"):
        save_outputs(tmp_path / "out.npz", [{"a": np.zeros(1)}, {"b": np.zeros(1)}])
    with pytest.raises(InputError, match="frame 0 has no output 'image'"):
        save_outputs(tmp_path / "out.mp4", [{"a": np.zeros(1)}], image_output="image")
    with pytest.raises(InputError, match="output 'a' has shape"):
        save_outputs(tmp_path / "out.mp4", [{"a": np.zeros((1, 1, 8, 8))}], image_output="a")
    with pytest.raises(InputError, match=r"cannot write '.*': it is a folder"):
        save_outputs(_folder(tmp_path / "x.npz"), [{"a": np.zeros(1)}])
    assert not (tmp_path / "out.npz").exists()


def _folder(path: Path) -> Path:
    path.mkdir()
    return path
