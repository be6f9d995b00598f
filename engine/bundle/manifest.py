"""The manifest of a bundle: what it holds, what goes in and out, and how good each exit was measured to be.

Frozen records with a strict JSON form. Reading trusts nothing: every missing, unknown or mistyped key is a
`BundleError` that names the key by its path in the document, e.g. ``modules.plain.inputs[0].shape``.

Format 2 says of every module what it is for (`Role`); format 1, which is still read, said it by the modules' names.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import BundleError, InputError
from ..spec import AGE_INPUT, AGE_SPEC, TensorSpec
from .roles import RESERVED_NAMES, Role, role_by_name
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
    "Cut",
    "ExitRecord",
    "FileRecord",
    "InputRecord",
    "Manifest",
    "ModuleRecord",
    "StateRecord",
    "module_record",
]

FORMAT = 2
"""The manifest version that this library writes; it reads this one and format 1."""

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
KINDS = {"onnx": ".onnx"}
"""What a module may be, and what its file ends in."""

InputRole = Literal["generator", "motion"]


@dataclass(frozen=True)
class InputRecord:
    """One input of the bundle.

    Attributes:
        spec: Name, dtype and shape of one frame of it (leading axis 1).
        role: ``generator`` for an input of the generator, ``motion`` for the surface atlas that only the warp uses.
    """

    spec: TensorSpec
    role: InputRole = "generator"

    @property
    def is_motion(self) -> bool:
        """Whether it says how the surface moved, rather than being an input of the generator."""
        return self.role == "motion"


@dataclass(frozen=True)
class StateRecord:
    """What a generator hands from one frame to the next.

    Attributes:
        input: Name, dtype and shape as the modules of frame t + 1 read it.
        output: The name under which the modules of frame t write it, of the same dtype and shape.
        initial: The ``.npz`` file that holds the first frame's value under the input's name; None: zeros.
    """

    input: TensorSpec
    output: str
    initial: str | None = None

    @property
    def written(self) -> TensorSpec:
        """What a module writes."""
        return dataclasses.replace(self.input, name=self.output)


@dataclass(frozen=True)
class ModuleRecord:
    """One executable: what it is for, its file and its tensors.

    Attributes:
        file: Name of its file in the bundle's folder.
        inputs: What it reads, in its own order: frame inputs, cache tensors, state, or what an earlier module of the
            same exit writes; which of them by name.
        outputs: What it writes, in its own order.
        role: What it is for.
        kind: What executes it; ``onnx``.
    """

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    role: Role
    kind: str = "onnx"


@dataclass(frozen=True)
class ExitRecord:
    """One way to answer a frame.

    Attributes:
        name: ``whole``, ``plain``, ``warp``, ``warp2``, ``branch1``, ...
        modules: The modules that answer, run in this order.
        cost_ratio: Its measured cost as a fraction of the whole generator's, both on one thread.
    """

    name: str
    modules: tuple[str, ...]
    cost_ratio: float

    @property
    def module(self) -> str:
        """The module that gives the answer: the last one."""
        return self.modules[-1]


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
        inputs: What one frame is fed with, in the generator's order; the motion array, if any, comes last. State is
            not among them.
        outputs: What answers a frame, in the generator's order, without the state.
        image_output: The output that is a picture ([1, 3, H, W], float32 in [-1, 1]), if there is one.
        fps: Frames per second the generator was made for, if known.
        cut: Where the generator was split; None where it was not.
        cache: The cache tensors; their names start with ``cache.``. Empty where there is no producer.
        modules: What is executed, by name.
        exits: The ways to answer a frame.
        calibration: Measured quality by exit and age, or None: then nothing is known of it.
        files: Size and hash of every file of the folder but the manifest itself; filled in by `write_bundle`.
        state: What the generator hands from frame to frame; empty for most.
    """

    name: str
    created: dict[str, Any]
    inputs: tuple[InputRecord, ...]
    outputs: tuple[TensorSpec, ...]
    image_output: str | None
    fps: float | None
    cut: Cut | None
    cache: tuple[TensorSpec, ...]
    modules: dict[str, ModuleRecord]
    exits: tuple[ExitRecord, ...]
    calibration: dict[str, Any] | None
    files: dict[str, FileRecord] = field(default_factory=dict)
    state: tuple[StateRecord, ...] = ()

    @property
    def generator_inputs(self) -> tuple[TensorSpec, ...]:
        """The generator's inputs, in its order."""
        return tuple(record.spec for record in self.inputs if not record.is_motion)

    @property
    def motion_inputs(self) -> tuple[TensorSpec, ...]:
        """The arrays that say how the surface moved; empty where the bundle was made without motion."""
        return tuple(record.spec for record in self.inputs if record.is_motion)

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

    def module_of(self, role: Role) -> str | None:
        """The module of a role that a bundle has at most one of; None where it has none."""
        return next((name for name, module in self.modules.items() if module.role is role), None)

    def role_of(self, exit_name: str) -> Role:
        """What an exit is: the role of its last module; raises as `exit`."""
        return self.modules[self.exit(exit_name).modules[-1]].role

    def exits_of(self, *roles: Role) -> tuple[ExitRecord, ...]:
        """The exits of these roles, in the manifest's order."""
        return tuple(record for record in self.exits if self.modules[record.modules[-1]].role in roles)

    @property
    def exact_exit(self) -> str | None:
        """The exit that is the whole generator; None where the bundle says that it has none."""
        return next((record.name for record in self.exits_of(Role.WHOLE)), None)

    @property
    def plain_exit(self) -> str | None:
        """The exit that is exact with a cache of the frame itself."""
        return next((record.name for record in self.exits_of(Role.PLAIN)), None)

    def exit_inputs(self, exit_name: str) -> tuple[TensorSpec, ...]:
        """What an exit reads from outside: not what its own earlier modules write. Raises as `exit`."""
        made: set[str] = set()
        read: dict[str, TensorSpec] = {}
        for name in self.exit(exit_name).modules:
            module = self.modules[name]
            read |= {spec.name: spec for spec in module.inputs if spec.name not in made}
            made |= {spec.name for spec in module.outputs}
        return tuple(read.values())

    def reads_cache(self, exit_name: str) -> bool:
        """Whether an exit needs a cache."""
        cache = {spec.name for spec in self.cache}
        return any(spec.name in cache for spec in self.exit_inputs(exit_name))

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
            "cut": self.cut and {"tensors": list(self.cut.tensors), "candidates": list(self.cut.candidates)},
            "cache": [spec_to_record(spec) for spec in self.cache],
            "modules": {
                name: {
                    "role": str(module.role),
                    "kind": module.kind,
                    "file": module.file,
                    "inputs": [spec_to_record(spec) for spec in module.inputs],
                    "outputs": [spec_to_record(spec) for spec in module.outputs],
                }
                for name, module in self.modules.items()
            },
            "exits": [
                {"name": record.name, "modules": list(record.modules), "cost_ratio": record.cost_ratio}
                for record in self.exits
            ],
            "exact_exit": self.exact_exit,
            "state": [
                {"input": spec_to_record(record.input), "output": record.output, "initial": record.initial}
                for record in self.state
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
        if version not in (1, FORMAT):
            raise BundleError(
                f"manifest.json is of format {version}, this library reads formats 1 and {FORMAT}; "
                "compile the bundle again or use the version of warpcache that wrote it"
            )
        old = version == 1
        exact_exit = None if old else root.take("exact_exit", optional(a_name))
        manifest = cls(
            name=root.take("name", a_name),
            created=root.take("created", an_object),
            inputs=root.take("inputs", tuple_of(_input)),
            outputs=root.take("outputs", tuple_of(_spec)),
            image_output=root.take("image_output", optional(a_name)),
            fps=root.take("fps", optional(a_positive)),
            cut=root.take("cut", _cut if old else optional(_cut)),
            cache=root.take("cache", tuple_of(_spec)),
            modules=root.take("modules", _modules_by_name if old else mapping_of(_module)),
            exits=root.take("exits", tuple_of(_exit)),
            calibration=root.take("calibration", optional(an_object)),
            files=root.take("files", mapping_of(_file)),
            state=() if old else root.take("state", tuple_of(_state)),
        )
        root.finish()
        manifest.check()
        if not old and exact_exit != manifest.exact_exit:
            raise BundleError(
                f"manifest.json: exact_exit is {exact_exit!r}, but the exit that is the whole generator is "
                f"{manifest.exact_exit!r}; say null where there is none"
            )
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
            ("cut.tensors", () if self.cut is None else self.cut.tensors),
            ("files", [name.casefold() for name in self.files]),
            ("state inputs", [record.input.name for record in self.state]),
            ("state outputs", [record.output for record in self.state]),
            *((f"modules.{name}.inputs", [s.name for s in module.inputs]) for name, module in self.modules.items()),
            *((f"modules.{name}.outputs", [s.name for s in module.outputs]) for name, module in self.modules.items()),
        ):
            refuse_duplicates(where, names)
        for where, count in (("inputs", len(self.inputs)), ("outputs", len(self.outputs)), ("exits", len(self.exits))):
            if count == 0:
                raise BundleError(f"manifest.json: {where} is empty; a bundle has at least one")
        for spec in self.cache:
            if not spec.name.startswith(CACHE_PREFIX):
                raise BundleError(f"manifest.json: cache tensor {spec.name!r} does not start with {CACHE_PREFIX!r}")
        for given in (*(record.spec for record in self.inputs), *(record.input for record in self.state)):
            if given.name.startswith(CACHE_PREFIX):
                raise BundleError(
                    f"manifest.json: input {given.name!r} starts with {CACHE_PREFIX!r}, which is kept for the cache"
                )
        if self.image_output is not None and self.image_output not in {spec.name for spec in self.outputs}:
            raise BundleError(f"manifest.json: image_output {self.image_output!r} is not one of the outputs")
        for file in self.files:
            _check_file_name(file, "files")
        self._check_roles()
        self._check_state()
        for name, module in self.modules.items():
            self._check_module(name, module)
        for record in self.exits:
            self._check_exit(record)

    def _check_roles(self) -> None:
        """At most one module of what a bundle has one of, and a producer where there is a cache."""
        for role in Role:
            named = [name for name, module in self.modules.items() if module.role is role]
            if role.single and len(named) > 1:
                raise BundleError(
                    f"manifest.json: modules {_named(named)} are of role {str(role)!r}, which a bundle has one of"
                )
        if self.cache and self.module_of(Role.PRODUCER) is None:
            raise BundleError(
                "manifest.json: there is a cache and no module of role 'producer' that makes it; compile the bundle "
                "again"
            )

    def _check_state(self) -> None:
        taken = {record.spec.name for record in self.inputs}
        given = {spec.name for spec in self.outputs}
        for record in self.state:
            if record.input.name in taken or record.output in given:
                raise BundleError(
                    f"manifest.json: state {record.input.name!r} (written as {record.output!r}) is an input or output "
                    "of the frame too; a session keeps it to itself, so list it once"
                )
            if record.initial is not None and record.initial not in self.files and self.files:
                raise BundleError(
                    f"manifest.json: the first value of state {record.input.name!r} is in {record.initial!r}, which "
                    "files does not list"
                )
        if self.state and not any(module.role.carries_state for module in self.modules.values()):
            raise BundleError("manifest.json: there is state and no module that carries it; compile the bundle again")

    def _check_module(self, name: str, module: ModuleRecord) -> None:
        if module.kind not in KINDS:
            raise BundleError(
                f"manifest.json: module {name!r} is of kind {module.kind!r}; this library runs {_named(KINDS)}"
            )
        _check_file_name(module.file, f"modules.{name}.file")
        role = module.role
        frame = {record.spec.name: record.spec for record in self.inputs}
        cache = {spec.name: spec for spec in self.cache} if role.reads_cache else {}
        state = {record.input.name: record.input for record in self.state} if role.carries_state else {}
        known = frame | cache | state | self._made_before(name)
        if role is Role.PREDICTOR:
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
        if role.predicts:
            _check_prediction(name, module.outputs, aged=role is Role.PREDICTOR)
        elif role is Role.PRODUCER:
            self._check_outputs(name, module, self.cache, "cache")
        elif role is Role.WHOLE:
            self._check_outputs(name, module, self.outputs, "outputs")
        elif role.answers:
            self._check_written(name, module.outputs, self.outputs, "outputs")

    def _made_before(self, name: str) -> dict[str, TensorSpec]:
        """What earlier modules of the exits that run module `name` write for it."""
        made: dict[str, TensorSpec] = {}
        for record in self.exits:
            if name in record.modules:
                for earlier in record.modules[: record.modules.index(name)]:
                    if earlier in self.modules:
                        made |= {spec.name: spec for spec in self.modules[earlier].outputs}
        return made

    def _check_outputs(self, name: str, module: ModuleRecord, wanted: tuple[TensorSpec, ...], what: str) -> None:
        """The outputs of a module that carries the state: what it is for, and the next state."""
        given = {spec.name: spec for spec in module.outputs}
        for record in self.state:
            written = given.get(record.output)
            if written is None:
                raise BundleError(f"manifest.json: module {name!r} does not write the state {record.output!r}")
            if written != record.written:
                raise BundleError(
                    f"manifest.json: state {record.output!r} is written by module {name!r} as {_shown(written)}, "
                    f"but read as {_shown(record.input)}; they must be alike"
                )
        state = {record.output for record in self.state}
        self._check_written(name, tuple(spec for spec in module.outputs if spec.name not in state), wanted, what)

    def _check_written(
        self, name: str, outputs: tuple[TensorSpec, ...], wanted: tuple[TensorSpec, ...], what: str
    ) -> None:
        if set(outputs) != set(wanted):
            given = ", ".join(map(_shown, outputs)) or "none"
            raise BundleError(
                f"manifest.json: the outputs of module {name!r} are {given}, "
                f"which do not match the bundle's {what}: {', '.join(map(_shown, wanted))}"
            )

    def _check_exit(self, record: ExitRecord) -> None:
        if record.name in RESERVED_NAMES or record.name.startswith(Role.PREDICTOR):
            raise BundleError(
                f"manifest.json: an exit is called {record.name!r}; that is kept for what answers no frame"
            )
        for position, name in enumerate(record.modules):
            module = self.modules.get(name)
            last = position == len(record.modules) - 1
            if module is None or not (module.role.answers if last else module.role is Role.PART):
                raise BundleError(
                    f"manifest.json: exit {record.name!r} refers to module {name!r}, "
                    + ("which is not one that answers frames" if last else "which is not a first part of an exit")
                )
        made = {record.spec.name for record in self.inputs} | {spec.name for spec in self.cache}
        made |= {state.input.name for state in self.state}
        for name in record.modules:
            for spec in self.modules[name].inputs:
                if spec.name not in made:
                    raise BundleError(
                        f"manifest.json: in exit {record.name!r} module {name!r} reads {spec.name!r}, which no module "
                        "before it writes"
                    )
            made |= {spec.name for spec in self.modules[name].outputs}


def module_record(
    name: str, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], *, file: str | None = None
) -> ModuleRecord:
    """The record of a module that is called as the compiler calls it: file and role follow from its name."""
    reads_cache = any(spec.name.startswith(CACHE_PREFIX) for spec in inputs)
    return ModuleRecord(file or f"{name}.onnx", inputs, outputs, role_by_name(name, reads_cache=reads_cache))


def spec_to_record(spec: TensorSpec) -> dict[str, Any]:
    """The JSON form of a tensor spec: ``{"name", "dtype", "shape"}``."""
    return {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape)}


def _check_file_name(name: str, where: str) -> None:
    if FILE_NAME.fullmatch(name) is None:
        raise BundleError(
            f"manifest.json: {where} holds the file name {name!r}; "
            "a bundle's files lie directly in its folder and end in .onnx, .npz or .safetensors"
        )


def _check_prediction(name: str, outputs: tuple[TensorSpec, ...], *, aged: bool) -> None:
    """What a predictor gives: scores [1, E] and their spread, and how far the frame is from what it knows [1, 1]."""
    scores = next((spec.shape for spec in outputs if spec.name == "predicted"), ())
    exits = scores[1] if len(scores) == 2 else 1
    wanted = {
        TensorSpec("predicted", "float32", (1, exits)),
        TensorSpec("spread", "float32", (1, exits)),
        TensorSpec("novelty", "float32", (1, 1)),
    }
    if aged:
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
    known: dict[str, InputRole] = {"generator": "generator", "motion": "motion"}
    if role not in known:
        raise mistyped(f"{where}.role", "'generator' or 'motion'", role)
    return InputRecord(spec, known[role])


def _cut(value: Any, where: str) -> Cut:
    fields = Fields(value, where)
    cut = Cut(fields.take("tensors", tuple_of(a_name)), fields.take("candidates", tuple_of(an_object)))
    fields.finish()
    return cut


def _module(value: Any, where: str) -> ModuleRecord:
    fields = Fields(value, where)
    role = fields.take("role", a_string)
    if role not in set(Role):
        raise mistyped(f"{where}.role", f"one of {', '.join(map(str, Role))}", role)
    kind = fields.take("kind", a_string)
    return dataclasses.replace(_file_and_tensors(fields, Role(role)), kind=kind)


def _file_and_tensors(fields: Fields, role: Role) -> ModuleRecord:
    module = ModuleRecord(
        fields.take("file", a_string),
        fields.take("inputs", tuple_of(_spec)),
        fields.take("outputs", tuple_of(_spec)),
        role,
    )
    fields.finish()
    return module


def _modules_by_name(value: Any, where: str) -> dict[str, ModuleRecord]:
    """The modules of format 1, whose names say what they are for: the exits by whether they read the cache."""

    def read(found: Any, place: str) -> ModuleRecord:
        name = place.removeprefix(f"{where}.")
        module = _file_and_tensors(Fields(found, place), Role.PART)
        reads_cache = any(spec.name.startswith(CACHE_PREFIX) for spec in module.inputs)
        role = role_by_name(name, reads_cache=reads_cache)
        if name.startswith(Role.PREDICTOR) and not role.predicts:
            raise BundleError(
                f"manifest.json: module {name!r} is unknown; a predictor is one of "
                f"{_named([Role.PREDICTOR, Role.PREDICTOR_COLD])}"
            )
        return dataclasses.replace(module, role=role)

    modules = mapping_of(read)(value, where)
    for name in ("generator", "producer", "plain"):
        if name not in modules:
            raise BundleError(f"manifest.json: module {name!r} is missing; compile the bundle again")
    return modules


def _state(value: Any, where: str) -> StateRecord:
    fields = Fields(value, where)
    record = StateRecord(
        fields.take("input", _spec), fields.take("output", a_name), fields.take("initial", optional(a_name))
    )
    fields.finish()
    return record


def _exit(value: Any, where: str) -> ExitRecord:
    fields = Fields(value, where)
    name = fields.take("name", a_name)
    modules = fields.take("modules", tuple_of(a_name))
    if not modules or len(set(modules)) != len(modules):
        raise mistyped(f"{where}.modules", "a list of one or more different modules", list(modules))
    cost_ratio = fields.take("cost_ratio", a_positive)
    fields.finish()
    return ExitRecord(name, modules, cost_ratio)


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
