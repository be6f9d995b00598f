"""Streams of inputs from files: checked whole, so that a wrong clip is refused before anything runs.

An ``.npz`` holds one array per generator input, leading axis time, and beside them, where there are such,

- the motion array that the bundle names (the surface atlas);
- ``truth``: rendered or filmed images [T, C, H, W], float32 in [-1, 1] or uint8, kept apart from the inputs;
- ``fps``: frames per second, one number.

An array whose leading extent is 1 never changes and serves every frame. Images may come as uint8 where the generator
takes float32: 0..255 becomes [-1, 1]. An ``.mp4`` serves a generator with one image input.
"""

from __future__ import annotations

import difflib
import math
import os
import zipfile
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..engine.errors import InputError
from ..engine.spec import TensorSpec
from .outputs import OutputWriter, save_outputs
from .video import read_video, to_float

if TYPE_CHECKING:
    from ..engine.bundle.manifest import InputRecord

__all__ = ["InputStream", "OutputWriter", "load_inputs", "save_outputs"]

Array = NDArray[Any]

TRUTH = "truth"
FPS = "fps"
_IMAGE_CHANNELS = (1, 3, 4)


@dataclass(frozen=True)
class InputStream:
    """A clip of inputs in memory.

    Attributes:
        arrays: Name -> array [T, ...] (or [1, ...] where it never changes), contiguous; inputs and motion.
        frames: T.
        fps: Frames per second, None where unknown.
        truth: Ground-truth images float32 [T, C, H, W] in [-1, 1], None where there are none.
    """

    arrays: dict[str, Array]
    frames: int
    fps: float | None = None
    truth: NDArray[np.float32] | None = None

    @classmethod
    def from_arrays(
        cls,
        arrays: Mapping[str, Array],
        manifest_inputs: Sequence[InputRecord] | None = None,
        *,
        fps: float | None = None,
        truth: Array | None = None,
        source: str = "the inputs",
    ) -> InputStream:
        """Check arrays against a bundle's inputs.

        Args:
            arrays: Name -> array, leading axis time.
            manifest_inputs: `Manifest.inputs` of the bundle; None checks only what holds for every generator.
            fps: Frames per second.
            truth: Images [T, C, H, W], float32 or uint8.
            source: What to call the whole in messages.

        Raises:
            InputError: If names, dtypes, ranks, sizes or lengths are wrong, a value is NaN or Inf, or nothing is there.
        """
        if manifest_inputs is not None:
            _check_names(arrays, [record.spec.name for record in manifest_inputs], source)
            # In the bundle's order, whatever the file's was.
            checked = {
                record.spec.name: _fitted(arrays[record.spec.name], record.spec, source) for record in manifest_inputs
            }
        else:
            checked = {name: _plausible(name, array, source) for name, array in arrays.items()}
        if not checked:
            raise InputError(f"{source} holds no input arrays; it needs one per generator input")
        frames = _common_length(checked, source)
        for name, array in checked.items():
            _refuse_not_finite(name, array, source)
        if fps is not None and not (math.isfinite(fps) and fps > 0):
            raise InputError(f"{source} has fps {fps}; it must be a positive number")
        if truth is not None:
            truth = _checked_truth(truth, frames, source)
        return cls({name: np.ascontiguousarray(array) for name, array in checked.items()}, frames, fps=fps, truth=truth)

    def __len__(self) -> int:
        return self.frames

    def __iter__(self) -> Iterator[dict[str, Array]]:
        return (self.frame(index) for index in range(self.frames))

    def frame(self, index: int) -> dict[str, Array]:
        """Inputs of one frame: views with leading extent 1.

        Raises:
            IndexError: If there is no such frame.
        """
        if not 0 <= index < self.frames:
            raise IndexError(f"frame {index} of {self.frames}")
        return {name: array if array.shape[0] == 1 else array[index : index + 1] for name, array in self.arrays.items()}

    def head(self, frames: int) -> InputStream:
        """The first `frames` frames (all if there are fewer), as views.

        Raises:
            InputError: If `frames` is below 1.
        """
        if frames < 1:
            raise InputError(f"cannot take {frames} frames; give a number from 1 to {self.frames}")
        return InputStream(
            {name: array if array.shape[0] == 1 else array[:frames] for name, array in self.arrays.items()},
            min(frames, self.frames),
            self.fps,
            None if self.truth is None else self.truth[:frames],
        )


def load_inputs(
    path: str | os.PathLike[str],
    manifest_inputs: Sequence[InputRecord] | None = None,
    *,
    ignore: Collection[str] = (),
) -> InputStream:
    """Read a stream of inputs.

    Args:
        path: An ``.npz``, or an ``.mp4`` for a generator with one image input.
        manifest_inputs: `Manifest.inputs` of the bundle; None takes every array as an input (and the frames of an
            ``.mp4`` as ``image``).
        ignore: Arrays of an ``.npz`` to leave out, e.g. a motion array that the bundle makes no use of.

    Raises:
        InputError: If the file is missing, damaged or truncated, or its arrays do not fit (it says which).
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in (".npz", ".mp4"):
        raise InputError(f"inputs {str(path)!r} must be an .npz or an .mp4")
    if not path.is_file():
        raise InputError(f"inputs {str(path)!r} do not exist; check the path")
    if suffix == ".mp4":
        return _load_video(path, manifest_inputs)
    source = f"inputs {str(path)!r}"
    arrays = {name: array for name, array in _read_npz(path, source).items() if name not in ignore}
    # A generator may have an input of this name; then it is that.
    taken = {record.spec.name for record in manifest_inputs or ()}
    truth = arrays.pop(TRUTH, None) if TRUTH not in taken else None
    rate = arrays.pop(FPS, None) if FPS not in taken else None
    fps: float | None = None
    if rate is not None:
        if rate.size != 1 or rate.dtype.kind not in "iuf":
            raise InputError(f"{source} has an 'fps' of dtype {rate.dtype} and shape {rate.shape}; give one number")
        fps = float(rate.reshape(()))
    return InputStream.from_arrays(arrays, manifest_inputs, fps=fps, truth=truth, source=source)


def _read_npz(path: Path, source: str) -> dict[str, Array]:
    if not zipfile.is_zipfile(path):
        raise InputError(f"{source} is not an .npz: it is no zip archive, or its end is missing; write it again")
    members: dict[str, Any]
    try:
        with np.load(path, allow_pickle=False) as archive:
            members = {name: archive[name] for name in archive.files}
    except ValueError as error:
        if "allow_pickle" in str(error) or "Object arrays" in str(error):
            raise InputError(f"{source} holds an object array, which could run code; save numbers only") from error
        raise InputError(f"{source} is damaged ({error}); write it again") from error
    except MemoryError as error:
        raise InputError(f"{source} does not fit into memory; cut it into shorter clips") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError) as error:
        raise InputError(f"{source} is damaged or truncated ({error}); write it again") from error
    for name, member in members.items():
        if not isinstance(member, np.ndarray):  # what is no array comes back as bytes
            raise InputError(f"{source} holds {name!r}, which is no array; write it with numpy.savez")
    return members


def _load_video(path: Path, manifest_inputs: Sequence[InputRecord] | None) -> InputStream:
    source = f"inputs {str(path)!r}"
    spec: TensorSpec | None = None
    if manifest_inputs is not None:
        names = [record.spec.name for record in manifest_inputs]
        if len(names) != 1:
            raise InputError(
                f"{source} is one video, but this generator takes {len(names)} inputs ({', '.join(names)}); "
                "give an .npz"
            )
        spec = manifest_inputs[0].spec
        if len(spec.shape) != 4 or spec.shape[1] != 3 or spec.dtype not in ("float32", "uint8"):
            raise InputError(
                f"{source} is a video, but input {spec.name!r} is {spec.dtype} {spec.shape}, no RGB image; give an .npz"
            )
    video = read_video(path, what="inputs")
    height, width = video.frames.shape[2:]
    if spec is not None and spec.shape[2:] != (height, width):
        raise InputError(
            f"{source} has {width} x {height} pixels, but input {spec.name!r} takes {spec.shape[3]} x {spec.shape[2]}; "
            "scale the clip first"
        )
    frames: Array = video.frames if spec is not None and spec.dtype == "uint8" else to_float(video.frames)
    return InputStream({spec.name if spec is not None else "image": frames}, len(frames), fps=video.fps)


def _check_names(arrays: Mapping[str, Array], expected: list[str], source: str) -> None:
    missing = [name for name in expected if name not in arrays]
    unexpected = [name for name in arrays if name not in expected]
    if not missing and not unexpected:
        return
    faults = []
    if missing:
        faults.append(f"lacks {_quoted(missing)}")
    if unexpected:
        faults.append(f"has {_quoted(unexpected)}, which the generator does not take")
    hints = [
        f"{name!r} for {near[0]!r}"
        for name in unexpected
        if (near := difflib.get_close_matches(name, missing, n=1, cutoff=0.5))
    ]
    advice = f"is it {' and '.join(hints)}?" if hints else f"it needs {_quoted(expected)}"
    raise InputError(f"{source} {' and '.join(faults)}; {advice}")


def _fitted(array: Array, spec: TensorSpec, source: str) -> Array:
    """The array as the generator takes it; uint8 images become float32 in [-1, 1]."""
    shape = ("T", *spec.shape[1:])
    expected = f"{spec.dtype} [{', '.join(map(str, shape))}]"
    found = f"{array.dtype} [{', '.join(map(str, array.shape))}]"
    wrong = f"{source}: array {spec.name!r} is {found}, expected {expected}"
    if array.ndim != len(spec.shape):
        raise InputError(f"{wrong}; its rank must be {len(spec.shape)}, time first")
    if array.shape[1:] != spec.shape[1:]:
        raise InputError(f"{wrong}; its size must be the generator's")
    if array.dtype == np.dtype(spec.dtype):
        return array
    if array.dtype == np.uint8 and spec.dtype == "float32" and array.ndim == 4 and array.shape[1] in _IMAGE_CHANNELS:
        return to_float(array)
    raise InputError(f"{wrong}; convert it with .astype({spec.dtype!r})")


def _plausible(name: str, array: Array, source: str) -> Array:
    if array.ndim == 0:
        raise InputError(f"{source}: array {name!r} is one number; its leading axis must be time")
    if array.dtype.kind not in "biuf":
        raise InputError(f"{source}: array {name!r} has dtype {array.dtype}; save numbers")
    return array


def _common_length(arrays: Mapping[str, Array], source: str) -> int:
    for name, array in arrays.items():
        if array.shape[0] == 0:
            raise InputError(f"{source}: array {name!r} has no frames; the clip is empty")
    changing = {name: array.shape[0] for name, array in arrays.items() if array.shape[0] != 1}
    if not changing:
        return 1
    first = next(iter(changing))
    for name, length in changing.items():
        if length != changing[first]:
            raise InputError(
                f"{source}: array {first!r} has {changing[first]} frames but {name!r} has {length}; make them equal "
                "(or 1 for what never changes)"
            )
    return int(changing[first])


def _refuse_not_finite(name: str, array: Array, source: str) -> None:
    if array.dtype.kind != "f":
        return
    for index, frame in enumerate(array):
        # One pass and no temporary where all is well; a sum may also overflow, so that it only raises suspicion.
        with np.errstate(over="ignore", invalid="ignore"):
            suspicious = not np.isfinite(frame.sum())
        if suspicious and not np.isfinite(frame).all():
            raise InputError(f"{source}: array {name!r} holds NaN or Inf, first in frame {index}; mend it there")


def _checked_truth(truth: Array, frames: int, source: str) -> NDArray[np.float32]:
    found = f"{truth.dtype} [{', '.join(map(str, truth.shape))}]"
    if truth.ndim != 4 or truth.dtype not in (np.dtype("float32"), np.dtype("uint8")):
        raise InputError(f"{source}: array {TRUTH!r} is {found}, expected float32 or uint8 [T, C, H, W]")
    if truth.shape[0] != frames:
        raise InputError(f"{source}: array {TRUTH!r} has {truth.shape[0]} frames but the inputs have {frames}")
    if truth.dtype == np.uint8:
        return to_float(truth)
    _refuse_not_finite(TRUTH, truth, source)
    return truth


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names)
