"""The manifest of a bundle: what it holds, what goes in and out, and how good each exit was measured to be.

Frozen records with a strict JSON form. Reading trusts nothing: every missing, unknown or mistyped key is a
`BundleError` that names the key by its path in the document, e.g. ``modules.plain.inputs[0].shape``.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from ..errors import BundleError, InputError
from ..spec import AGE_INPUT, AGE_SPEC, TensorSpec
from .strict_json import (
    Fields,
    a_name,
    a_positive,
    a_string,
    an_integer,
    an_object,
    mapping_of,
    mistyped,
    optional,
    parse,
    refuse_duplicates,
    tuple_of,
)

__all__ = [
    "CACHE_PREFIX",
    "FILE_NAME",
    "FORMAT",
    "PREDICTORS",
    "Cut",
    "ExitRecord",
    "FileRecord",
    "InputRecord",
    "Manifest",
    "ModuleRecord",
]

FORMAT = 1
"""The manifest version that this library writes, and the only one it reads."""

FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}\.(onnx|npz|safetensors)")
"""What a file of a bundle may be called: no separator, no leading dot, one of the three known kinds."""

CACHE_PREFIX = "cache."
MAX_RANK = 8
MAX_EXTENT = 2**20
MAX_TENSOR_BYTES = 4 * 2**30
# What NumPy and ONNX both know; bfloat16 and the fp8 kinds have no NumPy dtype and stay inside a graph.
DTYPES = frozenset(
    ["bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64"]
)
_REQUIRED_MODULES = ("generator", "producer", "plain")

PREDICTORS = ("predictor", "predictor_cold")
"""The modules that predict every exit's quality: for a frame with a cache, and for one without."""

Role = Literal["generator", "motion"]


@dataclass(frozen=True)
class InputRecord:
    """One input of the bundle.

    Attributes:
        spec: Name, dtype and shape of one frame of it (leading axis 1).
        role: ``generator`` for an input of the generator, ``motion`` for the surface atlas that only the warp uses.
    """

    spec: TensorSpec
    role: Role = "generator"


@dataclass(frozen=True)
class ModuleRecord:
    """One executable graph: its file and its tensors.

    Attributes:
        file: Name of the ``.onnx`` file in the bundle's folder.
        inputs: What it takes: cache tensors and frame inputs, in the graph's order.
        outputs: What it gives, in the graph's order.
    """

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class ExitRecord:
    """One way to answer a frame.

    Attributes:
        name: ``whole``, ``plain``, ``warp``, ``warp2``, ``branch1``, ...
        module: The module that answers.
        cost_ratio: Its measured cost as a fraction of the whole generator's, both on one thread.
    """

    name: str
    module: str
    cost_ratio: float


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and SHA-256 (64 lower-case hexadecimal digits) of one file."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Cut:
    """Where the generator was split.

    Attributes:
        tensors: Names of the cut's values in the generator's graph.
        candidates: The cuts that were considered, best first, as JSON-ready records for people to read.
    """

    tensors: tuple[str, ...]
    candidates: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Manifest:
    """Everything a bundle says about itself.

    Attributes:
        name: The bundle's name, for people.
        created: By what, when and with which options it was made.
        inputs: What one frame is fed with, in the generator's order; the motion array, if any, comes last.
        outputs: What answers a frame, in the generator's order.
        image_output: The output that is a picture ([1, 3, H, W], float32 in [-1, 1]), if there is one.
        fps: Frames per second the generator was made for, if known.
        cut: Where the generator was split.
        cache: The cache tensors; their names start with ``cache.``.
        modules: The graphs: ``generator``, ``producer``, ``plain``, one a trained exit; with a promise `PREDICTORS`.
        exits: The ways to answer a frame.
        calibration: Measured quality by exit and age, or None: then nothing is known of it.
        files: Size and hash of every file of the folder but the manifest itself; filled in by `write_bundle`.
    """

    name: str
    created: dict[str, Any]
    inputs: tuple[InputRecord, ...]
    outputs: tuple[TensorSpec, ...]
    image_output: str | None
    fps: float | None
    cut: Cut
    cache: tuple[TensorSpec, ...]
    modules: dict[str, ModuleRecord]
    exits: tuple[ExitRecord, ...]
    calibration: dict[str, Any] | None
    files: dict[str, FileRecord] = field(default_factory=dict)

    @property
    def generator_inputs(self) -> tuple[TensorSpec, ...]:
        """The generator's inputs, in its order."""
        return tuple(record.spec for record in self.inputs if record.role == "generator")

    @property
    def motion_inputs(self) -> tuple[TensorSpec, ...]:
        """The arrays that say how the surface moved; empty where the bundle was made without motion."""
        return tuple(record.spec for record in self.inputs if record.role == "motion")

    def exit(self, name: str) -> ExitRecord:
        """The exit called `name`.

        Raises:
            InputError: If the bundle has no such exit; the message lists those it has.
        """
        for record in self.exits:
            if record.name == name:
                return record
        known = ", ".join(record.name for record in self.exits) or "none"
        raise InputError(f"bundle {self.name!r} has no exit {name!r}; it has: {known}")

    def to_json(self) -> str:
        """The JSON document, ending in a newline.

        Raises:
            BundleError: If a value cannot be written, e.g. NaN or infinity in the calibration.
        """
        document = {
            "format": FORMAT,
            "name": self.name,
            "created": self.created,
            "inputs": [{**spec_to_record(record.spec), "role": record.role} for record in self.inputs],
            "outputs": [spec_to_record(spec) for spec in self.outputs],
            "image_output": self.image_output,
            "fps": self.fps,
            "cut": {"tensors": list(self.cut.tensors), "candidates": list(self.cut.candidates)},
            "cache": [spec_to_record(spec) for spec in self.cache],
            "modules": {
                name: {
                    "file": module.file,
                    "inputs": [spec_to_record(spec) for spec in module.inputs],
                    "outputs": [spec_to_record(spec) for spec in module.outputs],
                }
                for name, module in self.modules.items()
            },
            # A list, because a later exit may run several modules one after the other.
            "exits": [
                {"name": record.name, "modules": [record.module], "cost_ratio": record.cost_ratio}
                for record in self.exits
            ],
            "calibration": self.calibration,
            "files": {name: dataclasses.asdict(record) for name, record in self.files.items()},
        }
        try:
            return json.dumps(document, indent=1, allow_nan=False) + "\n"
        except (TypeError, ValueError) as exc:
            raise BundleError(
                f"the manifest of {self.name!r} cannot be written as JSON ({exc}); use plain finite values"
            ) from exc

    @classmethod
    def from_json(cls, text: str | bytes) -> Manifest:
        """Read a manifest strictly.

        Args:
            text: The JSON document, UTF-8 if bytes.

        Raises:
            BundleError: If it is no JSON, of an unknown version, a key is missing, unknown or mistyped, a value is
                absurd, or its parts do not fit each other (`check`).
        """
        root = Fields(parse(text), "")
        version = root.take("format", an_integer)
        if version != FORMAT:
            raise BundleError(
                f"manifest.json is of format {version}, this library reads format {FORMAT}; "
                "compile the bundle again or use the version of warpcache that wrote it"
            )
        manifest = cls(
            name=root.take("name", a_name),
            created=root.take("created", an_object),
            inputs=root.take("inputs", tuple_of(_input)),
            outputs=root.take("outputs", tuple_of(_spec)),
            image_output=root.take("image_output", optional(a_name)),
            fps=root.take("fps", optional(a_positive)),
            cut=root.take("cut", _cut),
            cache=root.take("cache", tuple_of(_spec)),
            modules=root.take("modules", mapping_of(_module)),
            exits=root.take("exits", tuple_of(_exit)),
            calibration=root.take("calibration", optional(an_object)),
            files=root.take("files", mapping_of(_file)),
        )
        root.finish()
        manifest.check()
        return manifest

    def check(self) -> None:
        """Check that the parts fit each other; the files on disk are `Bundle.open`'s to check.

        Raises:
            BundleError: If a name occurs twice, a module or exit refers to what is not there, a module's tensors are
                not the bundle's, or the producer does not give the cache.
        """
        for where, names in (
            ("inputs", [record.spec.name for record in self.inputs]),
            ("outputs", [spec.name for spec in self.outputs]),
            ("cache", [spec.name for spec in self.cache]),
            ("exits", [record.name for record in self.exits]),
            ("cut.tensors", self.cut.tensors),
            ("files", [name.casefold() for name in self.files]),
            *((f"modules.{name}.inputs", [s.name for s in module.inputs]) for name, module in self.modules.items()),
            *((f"modules.{name}.outputs", [s.name for s in module.outputs]) for name, module in self.modules.items()),
        ):
            refuse_duplicates(where, names)
        for where, count in (("inputs", len(self.inputs)), ("outputs", len(self.outputs)), ("cache", len(self.cache))):
            if count == 0:
                raise BundleError(f"manifest.json: {where} is empty; a bundle has at least one")
        for name in _REQUIRED_MODULES:
            if name not in self.modules:
                raise BundleError(f"manifest.json: module {name!r} is missing; compile the bundle again")
        for spec in self.cache:
            if not spec.name.startswith(CACHE_PREFIX):
                raise BundleError(f"manifest.json: cache tensor {spec.name!r} does not start with {CACHE_PREFIX!r}")
        for record in self.inputs:
            if record.spec.name.startswith(CACHE_PREFIX):
                raise BundleError(
                    f"manifest.json: input {record.spec.name!r} starts with {CACHE_PREFIX!r}, "
                    "which is kept for the cache"
                )
        if self.image_output is not None and self.image_output not in {spec.name for spec in self.outputs}:
            raise BundleError(f"manifest.json: image_output {self.image_output!r} is not one of the outputs")
        for file in self.files:
            _check_file_name(file, "files")
        for name, module in self.modules.items():
            self._check_module(name, module)
        for exit_record in self.exits:
            if exit_record.name == "producer" or exit_record.name.startswith("predictor"):
                raise BundleError(
                    f"manifest.json: an exit is called {exit_record.name!r}; that is kept for what answers no frame"
                )
            if exit_record.module not in self.modules or exit_record.module in ("producer", *PREDICTORS):
                raise BundleError(
                    f"manifest.json: exit {exit_record.name!r} refers to module {exit_record.module!r}, "
                    "which is not one that answers frames"
                )

    def _check_module(self, name: str, module: ModuleRecord) -> None:
        _check_file_name(module.file, f"modules.{name}.file")
        frame = {record.spec.name: record.spec for record in self.inputs}
        if name.startswith("predictor") and name not in PREDICTORS:
            raise BundleError(f"manifest.json: module {name!r} is unknown; a predictor is one of {_named(PREDICTORS)}")
        # Only a consumer reads the cache: the generator and the producer start from the frame's inputs alone.
        without = ("generator", "producer", "predictor_cold")
        cache = {} if name in without else {spec.name: spec for spec in self.cache}
        known = frame | cache
        if name == "predictor":
            if AGE_INPUT in frame:
                raise BundleError(
                    f"manifest.json: an input is called {AGE_INPUT!r}, which is what a predictor is told the age by"
                )
            known = known | {AGE_INPUT: AGE_SPEC}
        for spec in module.inputs:
            if spec.name not in known:
                kind = "neither a cache tensor nor an input" if cache else "not an input"
                raise BundleError(f"manifest.json: module {name!r} takes {spec.name!r}, which is {kind} of the bundle")
            if spec != known[spec.name]:
                raise BundleError(
                    f"manifest.json: module {name!r} takes {_shown(spec)}, "
                    f"but the bundle has {_shown(known[spec.name])}"
                )
        if name in PREDICTORS:
            _check_prediction(name, module.outputs)
            return
        wanted, what = (self.cache, "cache") if name == "producer" else (self.outputs, "outputs")
        if set(module.outputs) != set(wanted):
            given = ", ".join(map(_shown, module.outputs)) or "none"
            raise BundleError(
                f"manifest.json: the outputs of module {name!r} are {given}, "
                f"which do not match the bundle's {what}: {', '.join(map(_shown, wanted))}"
            )


def spec_to_record(spec: TensorSpec) -> dict[str, Any]:
    """The JSON form of a tensor spec: ``{"name", "dtype", "shape"}``."""
    return {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape)}


def _check_file_name(name: str, where: str) -> None:
    if FILE_NAME.fullmatch(name) is None:
        raise BundleError(
            f"manifest.json: {where} holds the file name {name!r}; "
            "a bundle's files lie directly in its folder and end in .onnx, .npz or .safetensors"
        )


def _check_prediction(name: str, outputs: tuple[TensorSpec, ...]) -> None:
    """What a predictor gives: scores [1, E] and their spread, and how far the frame is from what it knows [1, 1]."""
    scores = next((spec.shape for spec in outputs if spec.name == "predicted"), ())
    exits = scores[1] if len(scores) == 2 else 1
    wanted = {
        TensorSpec("predicted", "float32", (1, exits)),
        TensorSpec("spread", "float32", (1, exits)),
        TensorSpec("novelty", "float32", (1, 1)),
    }
    if name == "predictor":
        wanted.add(TensorSpec("change", "float32", (1, 1)))
    if set(outputs) != wanted:
        given = ", ".join(map(_shown, outputs)) or "none"
        raise BundleError(
            f"manifest.json: the outputs of module {name!r} are {given}, "
            f"but a predictor gives {', '.join(sorted(map(_shown, wanted)))}"
        )


def _spec(value: Any, where: str) -> TensorSpec:
    fields = Fields(value, where)
    spec = _spec_fields(fields, where)
    fields.finish()
    return spec


def _spec_fields(fields: Fields, where: str) -> TensorSpec:
    name = fields.take("name", a_name)
    dtype = fields.take("dtype", a_string)
    if dtype not in DTYPES:
        raise mistyped(f"{where}.dtype", f"one of {', '.join(sorted(DTYPES))}", dtype)
    shape = fields.take("shape", tuple_of(an_integer))
    if len(shape) > MAX_RANK or not all(1 <= extent <= MAX_EXTENT for extent in shape):
        raise mistyped(f"{where}.shape", f"at most {MAX_RANK} extents, each from 1 to {MAX_EXTENT}", list(shape))
    spec = TensorSpec(name, dtype, shape)
    if spec.size_bytes > MAX_TENSOR_BYTES:
        raise mistyped(f"{where}.shape", f"a tensor of at most {MAX_TENSOR_BYTES} bytes", list(shape))
    return spec


def _input(value: Any, where: str) -> InputRecord:
    fields = Fields(value, where)
    spec = _spec_fields(fields, where)
    role = fields.take("role", a_string)
    fields.finish()
    if role not in ("generator", "motion"):
        raise mistyped(f"{where}.role", "'generator' or 'motion'", role)
    return InputRecord(spec, cast(Role, role))


def _cut(value: Any, where: str) -> Cut:
    fields = Fields(value, where)
    cut = Cut(fields.take("tensors", tuple_of(a_name)), fields.take("candidates", tuple_of(an_object)))
    fields.finish()
    return cut


def _module(value: Any, where: str) -> ModuleRecord:
    fields = Fields(value, where)
    module = ModuleRecord(
        fields.take("file", a_string), fields.take("inputs", tuple_of(_spec)), fields.take("outputs", tuple_of(_spec))
    )
    fields.finish()
    return module


def _exit(value: Any, where: str) -> ExitRecord:
    fields = Fields(value, where)
    name = fields.take("name", a_name)
    modules = fields.take("modules", tuple_of(a_name))
    if len(modules) != 1:
        raise mistyped(f"{where}.modules", "a list of one module", list(modules))
    cost_ratio = fields.take("cost_ratio", a_positive)
    fields.finish()
    return ExitRecord(name, modules[0], cost_ratio)


def _file(value: Any, where: str) -> FileRecord:
    fields = Fields(value, where)
    size_bytes = fields.take("size_bytes", an_integer)
    if size_bytes < 0:
        raise mistyped(f"{where}.size_bytes", "0 or more", size_bytes)
    sha256 = fields.take("sha256", a_string)
    if re.fullmatch(r"[0-9a-f]{64}", sha256) is None:
        raise mistyped(f"{where}.sha256", "64 lower-case hexadecimal digits", sha256)
    fields.finish()
    return FileRecord(size_bytes, sha256)


def _shown(spec: TensorSpec) -> str:
    return f"{spec.name!r} ({spec.dtype}, {list(spec.shape)})"


def _named(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
